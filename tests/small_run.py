"""The method on a tiny model in one process, for faults to be tried on: train theta_0, two copies of it, merge them."""

import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deme_core.artifacts import ArtifactStore
from deme_core.digests import sha256_file
from deme_core.recipe import DatasetSpec, FinetuneSpec, MethodSpec, TrainingSpec
from deme_core.settings import Settings
from tasks.jobs import FinetuneJob, Job, JobResult, MergeJob, PretrainJob
from tasks.work.base import JobContext, execute
from tests.store_contract import ANY_AGE

DATASET = DatasetSpec(source="digits", num_images=40, num_heldout_images=4)
_UNET = {
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
}
_TRAINING = {"batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 3}
STAGES = ("pretrained", "finetune", "merged")


def make_context(home: Path, store_uri: str | None = None) -> JobContext:
    return JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": store_uri}), "cpu")


def pretrain_job() -> PretrainJob:
    training = TrainingSpec(num_steps=5, **_TRAINING)
    return PretrainJob(dataset=DATASET, unet=_UNET, noise_scheduler={}, training=training)


def finetune_job(pretrained: JobResult, low: int, *, num_steps: int = 5, **finetune: Any) -> FinetuneJob:
    return FinetuneJob(
        label=f"segment [{low}, {low + 500})",
        pretrained=pretrained.ref,
        dataset=DATASET,
        finetune=FinetuneSpec.model_validate({"num_steps": num_steps, **_TRAINING, **finetune}),
        low=low,
        high=low + 500,
        num_steps=num_steps,
    )


def run_all(context: JobContext, done: Callable[[Job, JobResult], None] = lambda *_: None) -> JobResult:
    """Does all jobs in turn; returns the result of the merge."""

    def do(job: Job) -> JobResult:
        result = execute(job, context, lambda _: None)
        done(job, result)
        return result

    pretrained = do(pretrain_job())
    copies = [do(finetune_job(pretrained, low)) for low in (0, 500)]
    merge = MergeJob(
        pretrained=pretrained.ref, experts=tuple(copy.ref for copy in copies), method=MethodSpec(), weights=(0.3, 0.6)
    )
    return do(merge)


def contents(artifacts: ArtifactStore) -> dict[str, dict[str, str]]:
    """Returns the files of every artifact that is visible, by stage and digest: name and SHA-256, as downloaded anew.

    An artifact of which anything is missing or wrong makes this fail.
    """
    found = {}
    stages = {*STAGES, *(key.rsplit("/", 2)[0] for key in _manifest_keys(artifacts))}
    with tempfile.TemporaryDirectory() as folder:
        anew = ArtifactStore(artifacts.store, Path(folder))
        for stage in stages:
            for ref in anew.list_refs(stage):
                copy = anew.fetch(ref)
                found[f"{stage}/{ref.digest}"] = _files(copy)
    return found


def _manifest_keys(artifacts: ArtifactStore) -> list[str]:
    return [item.key for item in artifacts.store.list("") if item.key.endswith("/manifest.json")]


def check_cache(artifacts: ArtifactStore, visible: dict[str, dict[str, str]]) -> None:
    """Fails if the local cache shows anything but whole copies of what is in the store."""
    for name, files in visible.items():
        for copy in artifacts.cache.glob(f"{name}-*"):
            assert _files(copy) == files, name


def check_nothing_is_left(artifacts: ArtifactStore, expected: list[str]) -> None:
    """Fails if a sweep leaves anything in the store but what an undisturbed run leaves there."""
    artifacts.sweep(ANY_AGE)
    assert layout(artifacts) == expected


def layout(artifacts: ArtifactStore) -> list[str]:
    """Returns the keys of all objects, without the random parts of them."""
    return sorted(re.sub(r"/upload-[0-9a-f]{32}/", "/", item.key) for item in artifacts.store.list(""))


def _files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def in_child(act: Callable[[], object], started: Callable[[int], object] = lambda _: None) -> int:
    """Does something in a forked process; returns its exit status, negative for the signal that killed it."""
    begin, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.read(begin, 1)
            act()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        started(pid)
        os.write(end, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(begin)
        os.close(end)
