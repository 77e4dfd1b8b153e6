"""How any job is done: look its artifact up, and otherwise do the work and publish what it wrote.

A module of this package does one kind of job with two functions: ``identity(job, context)``, which says what the
artifact's digest is made of, and ``run(job, context, out, digest)``, which writes the artifact's files into ``out``,
yields progress records and returns the metrics. None of them knows Prefect or MLflow.
"""

import errno
import gc
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from filelock import FileLock, Timeout
from torch import distributed

from deme_core.artifacts import ArtifactStore, fetch_or_withdraw
from deme_core.digests import stage_digest
from deme_core.errors import ArtifactNotFoundError
from deme_core.images import ImageDataset, ImageSubset, load_images, split_heldout
from deme_core.local_files import local_errors
from deme_core.manifest import ArtifactRef
from deme_core.model_folder import ModelFolder, open_model_folder
from deme_core.recipe import DatasetSpec
from deme_core.scratch_folder import scratch_folder
from deme_core.settings import Settings
from deme_core.store import open_store
from tasks.jobs import CHECKPOINTS, PRETRAINED_STAGE, Job, JobResult
from tasks.patience import patiently
from tasks.progress import Record, Report, exhaust, waiting

# Of `remember_latest`: N + 2 models of a search of N weights.
LIVE_MERGE = "live merge"

T = TypeVar("T")
Work = Generator[Record, None, dict[str, Any]]


@dataclass(frozen=True)
class Identity:
    """What the digest of a stage's artifact is made of.

    Attributes:
        settings: resolved settings that change the result.
        inputs: digests of input artifacts, by role.
        dataset: fingerprint of the data set.
    """

    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None


def checkpoint_stage(digest: str) -> str:
    """Returns the stage under which the training checkpoints of the artifact ``digest`` lie."""
    return f"{CHECKPOINTS}/{digest}"


class JobContext:
    """What a job may use: settings, the artifact store, a device; and what it loaded before.

    Attributes:
        stop: set when this process is to leave: a training then leaves a checkpoint and ends.
        storage_seconds: how long the artifact store was used.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, device
        self.stop = threading.Event()
        self.storage_seconds = 0.0
        self._remembered: dict[str, Any] = {}
        self._latest: dict[str, dict[str, Any]] = {}

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """The artifact store of this environment."""
        return ArtifactStore(open_store(self.settings.store_uri), self.settings.cache_folder)

    @contextmanager
    def storing(self) -> Iterator[ArtifactStore]:
        """Gives the artifact store and adds the time it is used to ``storage_seconds``."""
        started = time.perf_counter()
        try:
            yield self.artifacts
        finally:
            self.storage_seconds += time.perf_counter() - started

    def find(self, stage: str, digest: str) -> ArtifactRef | None:
        """Returns the artifact if it is in the store."""
        with self.storing() as artifacts:
            return artifacts.find(stage, digest)

    def find_metrics(self, stage: str, digest: str) -> tuple[ArtifactRef, dict[str, Any]] | None:
        """Returns the artifact and its metrics if it is in the store; a manifest that is damaged is taken out of it."""
        with self.storing() as artifacts:
            return artifacts.find_metrics(stage, digest)

    def fetch(self, ref: ArtifactRef) -> Path:
        """Returns a local, verified folder with the artifact's files.

        Raises:
            DamagedArtifactError: they are not what they were; the next run makes the artifact anew.
        """
        with self.storing() as artifacts:
            return fetch_or_withdraw(artifacts, ref)

    def open_model(self, ref: ArtifactRef) -> ModelFolder:
        """Opens the model in an artifact; for a finetuned copy, with the frozen parts of its pretrained model.

        Raises:
            ArtifactNotFoundError: the pretrained model is not in the store any more.
        """
        folder = open_model_folder(self.fetch(ref))
        if folder.index.pretrained is None:
            return folder
        pretrained = self.find(PRETRAINED_STAGE, folder.index.pretrained)
        if pretrained is None:
            raise ArtifactNotFoundError(
                f"The pretrained model {folder.index.pretrained}, which holds the frozen parts of {ref.uri}, is not in "
                "the store."
            )
        return replace(folder, frozen=self.fetch(pretrained))

    def publish(
        self, stage: str, digest: str, folder: Path, identity: Identity, metrics: dict[str, Any]
    ) -> tuple[ArtifactRef, dict[str, Any]]:
        """Stores the files in ``folder`` as an artifact; the folder is gone then.

        Returns:
            The artifact and its metrics: those of another machine's, where that was first.
        """
        with self.storing() as artifacts:
            return patiently(
                lambda: artifacts.publish(
                    stage,
                    digest,
                    folder,
                    settings=identity.settings,
                    inputs=identity.inputs,
                    dataset=identity.dataset,
                    metrics=metrics,
                    take_folder=True,
                    look_first=False,  # `execute` has, under the lock.
                )
            )

    def discard_unfinished(self, digest: str) -> None:
        """Removes what an artifact that is in the store needed while it was made."""
        with self.storing() as artifacts:
            for ref in artifacts.list_refs(checkpoint_stage(digest)):
                artifacts.remove(ref)

    def images(self, spec: DatasetSpec) -> ImageDataset:
        """Opens a data set, once per process."""
        key = spec.model_dump_json()
        return self.remember(
            key, lambda: load_images(spec, cache=self.settings.cache_folder, index_store=self.artifacts.store)
        )

    def training_images(self, spec: DatasetSpec) -> ImageSubset:
        """Returns the images that training sees."""
        return split_heldout(self.images(spec), spec.num_heldout_images)[0]

    def heldout_images(self, spec: DatasetSpec) -> ImageSubset:
        """Returns the images that no training sees."""
        return split_heldout(self.images(spec), spec.num_heldout_images)[1]

    def remember(self, key: str, load: Callable[[], T]) -> T:
        """Returns what ``load`` returned the first time ``key`` was asked for in this process."""
        if key not in self._remembered:
            self._remembered[key] = load()
        return self._remembered[key]

    def remember_latest(self, kind: str, key: str, load: Callable[[], T], *, num_kept: int) -> T:
        """Does the same for what is too large to be kept for ever: only the ``num_kept`` of a kind used last stay."""
        kept = self._latest.setdefault(kind, {})
        if key in kept:
            kept[key] = kept.pop(key)  # The newest is last.
        else:
            while len(kept) >= num_kept:  # Before the new one is loaded, so that both never need memory at once.
                del kept[next(iter(kept))]
            kept[key] = load()
        return kept[key]

    def forget(self, *kinds: str) -> bool:
        """Drops what `remember_latest` keeps of these kinds, by default of all; returns whether there was any."""
        dropped = [self._latest.pop(kind) for kind in (kinds or tuple(self._latest)) if kind in self._latest]
        return any(dropped)

    @contextmanager
    def exclusive(self, digest: str, report: Report) -> Iterator[None]:
        """Lets one process of this DEME_HOME at a time make an artifact; a killed one's lock ends with it."""
        path = self.settings.state_folder / "locks" / f"{digest}.lock"
        with local_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                report(waiting("another run that does the same"))
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """Gives a folder under DEME_HOME, removed afterwards; a disk that fills meanwhile is said so."""
        parent = self.settings.state_folder / "scratch"
        with scratch_folder(parent) as out:
            try:
                yield out
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                with local_errors(parent):
                    raise


def _processes(job: Job, digest: str, context: JobContext) -> AbstractContextManager[None]:
    if job.num_processes == 1:
        return nullcontext()
    return cast(AbstractContextManager[None], import_module("tasks.work.ranks").all_ranks(job, digest, context))


def execute(job: Job, context: JobContext, report: Report) -> JobResult:
    """Returns the artifact of ``job``, doing its work only if the store does not have it."""
    started, stored_before = time.perf_counter(), context.storage_seconds
    work = import_module(f"tasks.work.{job.work}")
    identity = work.identity(job, context)
    digest = stage_digest(
        job.stage,
        settings=identity.settings,
        inputs=identity.inputs,
        dataset=identity.dataset,
        version=job.version,
    )
    with context.exclusive(digest, report):  # Of two runs that want it, one makes it and the other finds it.
        found = context.find_metrics(job.stage, digest)
        if found is None:
            if not job.keeps_live_merge:
                context.forget(LIVE_MERGE)
            with context.scratch_folder() as out:
                with _processes(job, digest, context):
                    metrics = exhaust(work.run(job, context, out, digest), report)
                ref, metrics = context.publish(job.stage, digest, out, identity, metrics)
        else:
            ref, metrics = found
        if job.leaves_checkpoints:
            context.discard_unfinished(digest)
    seconds = time.perf_counter() - started
    return JobResult(ref, metrics, found is not None, seconds, context.storage_seconds - stored_before)


def execute_with_room(job: Job, context: JobContext, report: Report) -> JobResult:
    """Does the same; where a GPU has too little memory, once more without what other jobs left in it."""
    try:
        return execute(job, context, report)
    except torch.OutOfMemoryError:
        if distributed.is_initialized() or not context.forget():
            raise
    # Behind the block, in which the error's traceback would keep what the job had in memory.
    report({"message": "too little memory; once more without what other jobs left in it"})
    gc.collect()
    torch.cuda.empty_cache()
    return execute(job, context, report)
