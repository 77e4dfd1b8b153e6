import json
import mmap
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import (
    conditioning_cache,
    demo,
    features,
    finetune_contestants,
    finetune_step,
    merge,
    merge_child,
    overhead,
    scaling,
    search,
    shapes,
    store,
)
from benchmarks.gpu import parted_state
from benchmarks.measurement import Duration, median_ratio, take_turns
from benchmarks.run_traffic import Folder
from benchmarks.s3_server import s3_server as private_s3_server
from deme_core.artifacts import ArtifactStore
from deme_core.denoiser_size import measure_denoiser
from deme_core.model_folder_writer import write_model_folder
from deme_core.store import open_store
from tests.fault_proxy import FaultProxy
from tests.integration.conftest import S3Server
from tests.tiny_models import randomize, tiny_unet


def last_line(output: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert {"name", "ratio", "goal", "holds"} <= result.keys()
    return result


def test_contestants_take_turns_and_each_begins_in_turn() -> None:
    calls: list[str] = []
    contestants = {name: partial(calls.append, name) for name in "ab"}
    assert take_turns(contestants, num_rounds=3) == {"a": [None] * 3, "b": [None] * 3}
    assert "".join(calls) == "abbaab"


def test_a_disturbed_round_does_not_move_the_median_ratio() -> None:
    assert median_ratio([2.0, 40.0, 6.0], [1.0, 2.0, 3.0]) == 2.0


def test_the_finetuning_benchmark_ends_with_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    finetune_step.main(["--quick", "--rounds", "1", "--batch-size", "1"])
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] == max(result["ratio_channel_projection_off"], result["ratio_channel_projection_on"]) > 0
    # All draw the same noise and timesteps; projections begin as the identity.
    losses = list(result["mean_losses"].values())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-2)
    # Three passes for the forward and the backward pass of each, one for the frozen model's: 4 to 4.5 of one.
    config = shapes.cifar10(tiny=True)
    size = measure_denoiser(shapes.adapter_of(config), channel_projection=True)
    expected = 3 * size.trained_forward_flops + size.forward_flops
    assert result["step_flops"] == pytest.approx(expected, rel=0.02)


def test_the_features_benchmark_compares_equal_features(capsys: pytest.CaptureFixture[str]) -> None:
    # Inception's network and clean-fid's distance take a minute each.
    features.main(["--quick", "--features-only", "--extractor", "efficientnet_lite0", "--num-images", "9"])
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] > 0
    assert result["largest_difference"] < 1e-5


def test_the_cache_benchmark_ends_with_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    conditioning_cache.main(["--quick", "--rounds", "1", "--batch-size", "1", "--num-images", "4"])
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] > 0
    # Four channels of 8 x 8 in float32, and as many of the mirror image; 77 tokens of width 64; sizes and headers.
    assert 0 < result["bytes_per_image"] - 2 * 4 * 8 * 8 * 4 < 250
    assert 0 < result["bytes_per_caption"] - 77 * 64 * 4 < 50


def test_a_search_is_done_when_a_full_score_is_as_good_as_the_grids() -> None:
    steps = [search.Step(1.0, 75.0, None), search.Step(2.0, 300.0, 5.0), search.Step(3.0, 600.0, 4.0)]
    assert search.cost_to_reach(steps, 4.0, metric="fid") == steps[2]
    assert search.cost_to_reach(steps, 3.9, metric="fid") is None
    assert search.cost_to_reach(steps, 4.5, metric="clip_score") == steps[1]
    assert search.cost_to_reach(steps, 5.1, metric="clip_score") is None


def test_both_contestants_of_the_merging_benchmark_write_the_same_merge(tmp_path: Path) -> None:
    for index in range(3):
        model = tiny_unet()
        randomize(model, seed=index)
        config = {"_class_name": "UNet2DModel"} | dict(model.config)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        write_model_folder(tmp_path / str(index), denoiser_config=config, scheduler_config={}, tensors=tensors)
    written = []
    for method in ("deme", "load_all"):
        out = tmp_path / method
        merge_child.METHODS[method](tmp_path / "0", [tmp_path / "1", tmp_path / "2"], [0.3, 0.5], out)()
        written.append(load_file(out / merge_child.WEIGHTS_PATH))
    torch.testing.assert_close(*written)


def test_a_state_comes_back_from_its_parts_and_a_damaged_part_is_named(tmp_path: Path) -> None:
    root, state, again = tmp_path / "root", tmp_path / "state", tmp_path / "again"
    (root / "deep").mkdir(parents=True)
    again.mkdir()
    assert not parted_state.unpack(state, again)
    files = {root / "a": b"1" * 5000, root / "deep" / "b": bytes(range(256)) * 30}
    for path, content in files.items():
        path.write_bytes(content)
    for _ in range(2):  # The second replaces the first.
        num_parts = parted_state.pack(root, files, state, part_bytes=4096)
    assert num_parts > 3
    assert all(path.stat().st_size <= 4096 for path in state.iterdir())
    assert parted_state.unpack(state, again)
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == {
        path.relative_to(root): content for path, content in files.items()
    }
    (state / "part-001").write_bytes(b"other")
    with pytest.raises(ValueError, match="part-001"):
        parted_state.unpack(state, again)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_counts_anonymous_memory_and_no_page_cache(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    idle = merge_child.anonymous_bytes()
    with merge_child.PeakAnonymousMemory() as memory, (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        assert not any(mapped[::4096])
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[::4096] = bytes(range(256)) * (size // 4096 // 256)
    assert 0.9 * size < memory.peak_bytes - idle < 1.5 * size


def test_the_demo_benchmark_runs_what_the_makefile_runs() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (recipe,) = re.findall(r"^demo: install\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert tuple(re.findall(r"\$\(BIN\)/([a-z]+(?: [a-z/]+)*)", recipe)) == demo.COMMANDS


def test_the_parts_of_the_demo_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    ends = {"begin": 100.0, demo.UP: 110.0, demo.ENV: 110.5, demo.RUN: 112.0, demo.FOLLOW: 272.0}
    moments = {name: demo.Moment(epoch, 2 * (epoch - 100)) for name, epoch in ends.items()}
    report = {"seconds": {"finetune": 150.0, "idle": 4.0, "storage": 1.0, "total": 154.0}}
    run = demo.Demo(Path(), moments, report, flow_began=115.0, first_task_began=116.0)
    parts = demo.split(run)
    assert parts == {"stack": 10, "until_first_task": 6, "work": 149, "idle": 3, "storage": 1, "end": 3}
    demo.print_demo(run, peak_gb=2.0)
    result = last_line(capsys.readouterr().out)
    assert result["seconds"]["total"] == 172
    assert result["ratio"] == pytest.approx(23 / 172)
    assert result["cpu_seconds"][demo.UP] == 20
    assert not result["holds"]


@pytest.mark.long
def test_what_a_small_run_takes_is_what_was_predicted() -> None:
    ratios = {name: predicted / found for name, (predicted, found) in scaling.compare(2, 32, 3, 16).items()}
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=0.05)
    assert ratios["calls of the store"] == 1.0


@pytest.mark.parametrize("num_bytes", [2**23 - 1, 2**23, 40 * 2**20 + 1])
def test_an_artifact_takes_as_many_requests_to_s3_as_predicted(
    num_bytes: int, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "made").mkdir()
    for name, size in {"a": 1, "b": 2, "large": num_bytes}.items():
        (tmp_path / "made" / name).write_bytes(bytes(size))
    folder = Folder(3, num_bytes)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(f"s3://{s3_server.make_bucket(f'requests-{num_bytes}')}/store")
        artifacts = ArtifactStore(store, tmp_path / "cache")
        ref, _ = artifacts.publish("merged", "d", tmp_path / "made", settings={}, inputs={})
        made = len(proxy.requests)
        artifacts.fetch(ref)
    assert made == folder.made().calls + folder.made().parts
    assert len(proxy.requests) - made == folder.fetched().calls + folder.fetched().parts


def test_the_merging_benchmark_ends_with_its_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_here(method: str, quantity: str, folder: Path, _python: str) -> tuple[float, ...]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        merge_child.main(method, quantity, folder, merge.MERGE_WEIGHTS)
        return tuple(map(float, capsys.readouterr().out.split()))

    # Each of its seven processes would import torch; mergekit would be installed first.
    monkeypatch.setattr(merge, "merge_in_child", merge_here)
    merge.main(["--quick", "--methods", "deme", "load_all", "--mergekit-python", sys.executable])
    result = last_line(capsys.readouterr().out)
    assert result["time_ratios"].keys() == {"cat 5 files, cp 1", "DeMe", "load all and add"}
    assert result["memory_ratios"].keys() == {"DeMe", "load all and add"}
    assert result["largest_differences"]["load all and add"] < 1e-6


def test_the_store_benchmark_moves_all_files_and_compares_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server").mkdir()
    assert store.write_files(tmp_path / "files", 2_000_000) == 4
    with private_s3_server(tmp_path / "server") as variables:
        moved = store.Contest(tmp_path / "files", tmp_path, variables).deme()
    slower = {way: store.Transfer(2 * transfer.seconds, 10**6) for way, transfer in moved.items()}
    store.report({"DeMe": [moved], "rclone": [slower]}, 2_000_000, "without rclone")
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] == pytest.approx(0.5)
    assert result["holds"] is (result["peak_mb"] <= 300)


@pytest.mark.parametrize(
    ("seconds", "holds"),
    [((0.8, 0.99), True), ((0.7, 0.99), False), ((1.1, 1.1), False)],
    ids=["well", "more by more segments", "slow"],
)
def test_a_segment_is_charged_its_part_of_the_median_flow(
    seconds: tuple[float, float], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(count: int, wall: float) -> overhead.Run:
        return overhead.Run(count, wall, wall + 3.0, 0.2 * count, 0.4 * count, 0.1 * count, 0.3 * count)

    walls = {count: each * count for count, each in zip((2, 8), seconds, strict=True)}
    overhead.report({n: [run(n, 9 * wall), run(n, wall / 2), run(n, wall)] for n, wall in walls.items()}, title="")
    printed = capsys.readouterr().out
    result = last_line(printed)
    assert result["seconds_per_segment"] == pytest.approx(dict(zip("28", seconds, strict=True)))
    assert result["ratio"] == pytest.approx(max(seconds))
    assert result["growth"] == pytest.approx(seconds[1] / seconds[0])
    assert result["holds"] is holds
    row = [f"{seconds[1]:.3f}", "0.200", "0.300", "0.400", "0.100", "3.0"]
    assert ["8", *row] in [re.findall(r"[\d.]+", line) for line in printed.splitlines()]


def test_the_overhead_benchmark_takes_its_options() -> None:
    options = overhead._options(["--quick", "--store", "file"])
    assert (options.counts, options.rounds, options.store) == ([2, 4], 1, "file")
    options = overhead._options(["--counts", "1"])
    assert (options.counts, options.rounds, options.store) == ([1], 3, "s3")


@pytest.mark.parametrize(
    ("seconds", "loss", "holds"),
    [(0.5, 1.009, True), (0.5, 1.011, False), (0.5, 0.98, False), (0.51, 1.0, False)],
    ids=["as fast and as good", "worse", "not the same", "slow"],
)
def test_on_a_gpu_the_step_must_be_fast_at_an_equal_loss(
    seconds: float, loss: float, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(seconds: float, loss: float) -> finetune_step.Measured:
        return finetune_step.Measured([Duration(seconds, seconds)], [loss])

    names = list(finetune_contestants.contestants_of(with_options=True))
    rows = dict.fromkeys(names, measured(1.0, 1.0)) | {"+ compile": measured(seconds, loss)}
    rates = {"fp32": 1e9, "tf32": 2e9, "bf16": 4e9}
    finetune_step.report(rows, {}, rates, title="", on_gpu=True, flops=10**9)
    printed = capsys.readouterr().out
    assert last_line(printed)["fastest"] == "+ compile"
    assert last_line(printed)["holds"] is holds
    # Each by the rate of its type, and none for those of other operations than were counted.
    shares = {
        name: re.findall(r"(\d+)%", line) for line in printed.splitlines() for name in names if f" {name} " in line
    }
    bf16 = [f"{100 / 4:.0f}"]
    expected = [[], [], [], ["100"], ["50"], bf16, bf16, [f"{100 / 4 / seconds:.0f}"]]
    assert [shares[name] for name in names] == expected
