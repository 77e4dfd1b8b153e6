"""What a machine has for worker processes: cores that its control groups allow, GPUs, and their names for locks."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deme_core.errors import InputError
from deme_core.recipe import ExecutionSpec
from tasks import gpu_lock, slots
from tasks.gpu_lock import GpuLock
from tasks.slots import card_names, count_cores, plan_slots, visible_gpus

A = "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"
B = "GPU-5d0f8e1c-0b0a-4c8e-b3f9-1f2f6f3c9a10"
MIG = "MIG-c7384736-a75d-5afc-978f-d2f1294409fd"

ShowGpus = Callable[..., None]
Limit = Callable[[str, dict[str, str]], int]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ShowGpus]:
    """Has nvidia-smi list GPUs, and CUDA_VISIBLE_DEVICES name some of them."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path)

    def show_gpus(*uuids: str, models: tuple[str, ...] = (), visible: str | None = None, status: int = 0) -> None:
        models = models or ("NVIDIA H200",) * len(uuids)
        rows = [f"{number}, {uuid}, {model}" for number, (uuid, model) in enumerate(zip(uuids, models, strict=True))]
        listing = "\n".join(rows)
        program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho '{listing}'\nexit {status}\n")
        program.chmod(0o755)
        slots._listed_gpus.cache_clear()
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    yield show_gpus
    slots._listed_gpus.cache_clear()


def taken() -> GpuLock | None:
    """Takes the first GPU as a process does that sees what is shown now."""
    lock = GpuLock(visible_gpus()[:1])
    return lock if lock.try_acquire() else None


def test_two_jobs_that_each_see_their_own_gpu_as_number_0_run_side_by_side(show: ShowGpus) -> None:
    show(A)
    first = taken()
    show(B)
    assert first
    assert taken(), "another container, another GPU"
    show(A)
    assert not taken(), "a third sees the first one's"


def test_a_gpu_is_the_same_by_number_by_uuid_and_by_the_beginning_of_that(show: ShowGpus) -> None:
    show(A, B, visible="1")
    by_number = taken()
    assert by_number
    for visible in (B, B[:12], " 1 "):
        show(A, B, visible=visible)
        assert taken() is None, visible
    by_number.release()
    assert taken()


def test_an_ambiguous_beginning_a_mig_instance_and_what_nvidia_smi_does_not_list_keep_their_names(
    show: ShowGpus,
) -> None:
    show(A, B)
    assert card_names(["GPU-5d", MIG, "7", "0"]) == ["GPU-5d", MIG, "7", A]


def test_a_number_stays_where_cuda_and_nvidia_smi_may_count_differently(
    show: ShowGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(A, B, models=("NVIDIA T400", "NVIDIA H200"))
    assert card_names(["0", "1", B]) == ["0", "1", B]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert card_names(["0", "1", B]) == [A, B, B]


def test_without_an_answer_of_nvidia_smi_gpus_are_known_by_their_numbers(show: ShowGpus) -> None:
    show(A, status=9)
    assert visible_gpus() == []
    show(A, visible="0", status=9)
    assert card_names(visible_gpus()) == ["0"]


def test_nvidia_smi_is_asked_once_in_a_process_and_not_before_a_lock_is_wanted(show: ShowGpus, tmp_path: Path) -> None:
    show(A, B, visible="0,1")
    locks = [GpuLock([gpu]) for gpu in visible_gpus()]
    assert not (tmp_path / "asked").exists()
    assert all(lock.try_acquire() for lock in locks)
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("NoDevFiles", []),
        ("-1", []),
        ("", []),
        ("0, 1", ["0", "1"]),
        ("0,-1,1", ["0"]),
        (f"{A},{MIG}", [A, MIG]),
        ("MIG-GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77/1/0", ["MIG-GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77/1/0"]),
    ],
)
def test_gpus_are_those_that_cuda_would_show(visible: str, gpus: list[str], show: ShowGpus) -> None:
    show(A, B, visible=visible)
    assert visible_gpus() == gpus


def test_a_slurm_job_without_a_gpu_has_none(show: ShowGpus) -> None:
    show(A, visible="NoDevFiles")
    assert [slot.device for slot in plan_slots(ExecutionSpec(num_workers=1))] == ["cpu"]
    with pytest.raises(InputError, match="shows no GPU"):
        plan_slots(ExecutionSpec(device="cuda"))


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Limit:
    """Counts the cores of a process on 192, in control groups with such files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(192)), raising=False)
    monkeypatch.setattr(slots, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(slots, "_OWN_GROUPS", tmp_path / "own")

    def count(own: str, files: dict[str, str]) -> int:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return count_cores()

    return count


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "800000 100000\n"}, 8),  # A pod, or a container of Compose.
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 192),
        ("0::/\n", {"cpu.max": "99999900000 100000\n"}, 192),
        ("0::/\n", {}, 192),
        ("", {}, 192),
        # A service of systemd whose slice has a limit of its own, which holds for all below.
        ("0::/a.slice/b.service\n", {"a.slice/cpu.max": "400000 100000", "a.slice/b.service/cpu.max": "max 100000"}, 4),
        # Version 1, on the host and in a container, which sees its group at the top.
        (
            "2:cpu,cpuacct:/job_7\n1:cpuset:/x\n0::/y\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/job_7/cpu.cfs_quota_us": "600000",
                "cpu/job_7/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        ("2:cpu:/docker/5e7e\n", {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 192),
    ],
)
def test_cores_are_as_many_as_control_groups_give_the_time_of(
    own: str, files: dict[str, str], expected: int, cores: Limit
) -> None:
    assert cores(own, files) == expected


def test_threads_are_shared_out_of_what_the_control_group_allows(cores: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    cores("0::/\n", {"cpu.max": "800000 100000\n"})
    assert [slot.num_threads for slot in plan_slots(ExecutionSpec(device="cuda"))] == [4, 4]


def test_a_process_without_control_groups_has_the_cores_that_it_is_bound_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slots, "_OWN_GROUPS", tmp_path / "not there")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert count_cores() == 3
