"""A training run as jobs do it: resumed from its newest checkpoint, with checkpoints published on the way."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from deme_core.artifacts import ArtifactStore
from deme_core.data_parallel import agree
from deme_core.encodings import EncodedBatches
from deme_core.errors import ArtifactNotFoundError, ChecksumMismatchError, WorkerStoppedError
from deme_core.families import Adapter, EncodedBatch, encode_batch
from deme_core.images import CropsInMemory, ImageSubset, TrainingBatches, fits_in_memory
from deme_core.lora import LoraTeacher
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, TrainingSpec
from deme_core.teacher import Teacher
from deme_core.training import Training
from deme_core.training_checkpoint import restore_checkpoint, save_checkpoint
from deme_core.training_plan import TrainingPlan
from tasks.patience import patiently
from tasks.progress import Record
from tasks.work.base import JobContext, checkpoint_stage
from tasks.work.encodings import Encodings

_NUM_CHECKPOINTS_KEPT = 2
_NUM_HISTOGRAM_BINS = 20
_MAX_DECODERS = 8


def run_training(
    context: JobContext,
    digest: str,
    *,
    model: nn.Module,
    adapter: Adapter,
    dataset: DatasetSpec,
    spec: TrainingSpec,
    plan: TrainingPlan,
    teacher: Teacher | LoraTeacher | None = None,
    encodings: Encodings | None = None,
) -> Generator[Record, None, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Trains ``model`` to the end of ``plan``; yields progress records, returns EMA tensors and metrics.

    Args:
        context: of the job.
        digest: of what is trained; its checkpoints are found by it.
        model: where training begins, with what it trains attached; it is changed.
        adapter: of the model's family.
        dataset: the images, less those held out.
        spec: how.
        plan: on which timesteps, with which losses, for how long.
        teacher: what the consistency loss, replay or a distillation asks for predictions.
        encodings: the data set encoded; without them images and captions are encoded batch by batch.

    Raises:
        WorkerStoppedError: the process was told to leave; a checkpoint of that very step is in the store.
    """
    images = context.training_images(dataset)
    if images.num_skipped:
        yield {"message": f"leaves out {images.num_skipped} images that cannot be decoded"}
    settings: dict[str, Any] = {
        "batch_size": spec.batch_size,
        "seed": plan.seed,
        "random_flip": dataset.random_flip,
        "caption_dropout": dataset.caption_dropout,
    }

    def batches(start_batch: int) -> Iterable[EncodedBatch]:
        if encodings is None:
            random_crop = dataset.crop == "random"
            return _encoded_here(context, images, adapter, random_crop, start_batch=start_batch, **settings)
        latents, embeddings = encodings.latents, encodings.embeddings
        return EncodedBatches(images, images.indices, latents, embeddings, adapter, start_batch=start_batch, **settings)

    training = Training(
        model,
        adapter,
        batches,
        spec=spec,
        plan=plan,
        teacher=teacher,
        device=context.device,
        should_stop=lambda: agree(context.stop.is_set()),
    )
    checkpoints = Checkpoints(context, digest)
    yield from checkpoints.restore(training)
    history: list[Record] = checkpoints.history
    for progress in training.progress():
        history.append(asdict(progress))
        yield history[-1]
        if progress.global_step == plan.num_steps:  # Publishing what is done takes no longer than a checkpoint.
            continue
        stopped = agree(context.stop.is_set())  # At one step, or the others would wait for a process that left.
        if stopped or progress.global_step % spec.checkpoint_every == 0:
            checkpoints.save(training, history)
        if stopped:
            raise WorkerStoppedError(plan.label, progress.global_step)
    return training.averaged_tensors(), {"history": history, "timestep_histogram": _histogram(training.timestep_counts)}


def _encoded_here(
    context: JobContext, images: ImageSubset, adapter: Adapter, random_crop: bool, **settings: Any
) -> Iterator[EncodedBatch]:
    """Yields batches that are encoded as they come, from the frozen parts of the model."""
    # Cores that wait for a GPU decode ahead; where they do the computing themselves there is nothing to gain.
    decoders = min(torch.get_num_threads(), _MAX_DECODERS) if context.device == "cuda" else 0
    kept = _kept(context, images, random_crop)
    for batch in TrainingBatches(images, random_crop=random_crop, num_workers=decoders, kept=kept, **settings):
        yield encode_batch(adapter, batch.clean_images, captions=batch.captions, labels=batch.labels, sizes=batch.sizes)


def _kept(context: JobContext, images: ImageSubset, random_crop: bool) -> CropsInMemory | None:
    """Returns what earlier trainings of this process decoded of the same images; None where they are too many."""
    if not fits_in_memory(images, random_crop=random_crop):
        return None
    return context.remember_latest(
        "decoded images", images.reference_fingerprint, lambda: CropsInMemory(images), num_kept=1
    )


def _histogram(counts: torch.Tensor) -> list[int]:
    """Returns how many timesteps were drawn in each of 20 bins of [0, T)."""
    return [int(part.sum()) for part in torch.tensor_split(counts, _NUM_HISTOGRAM_BINS)]


class Checkpoints:
    """The resumable checkpoints of one training run, kept in the store until its artifact is there."""

    def __init__(self, context: JobContext, digest: str) -> None:
        self._context, self._digest = context, digest
        self._stage = checkpoint_stage(digest)
        self.history: list[Record] = []

    def restore(self, training: Training) -> Iterator[Record]:
        """Puts ``training`` where the newest whole checkpoint left off, and yields what there is to say of it.

        A damaged checkpoint is removed, and the one before it taken.
        """
        with self._context.storing() as artifacts:
            damaged: list[str] = []
            # Rank 0 looks for all processes: they share a cache, so that the others find what it verified.
            found = agree(self._newest_whole(artifacts, damaged) if training.share.rank == 0 else None)
            yield from ({"message": f"removed a checkpoint: {error}"} for error in damaged)
            if found is None:
                return
            newest, self.history = found
            restore_checkpoint(training, artifacts.fetch(newest))
        yield {"message": f"resumed at step {training.global_step}"}

    def _newest_whole(self, artifacts: ArtifactStore, damaged: list[str]) -> tuple[ArtifactRef, list[Record]] | None:
        missing: ArtifactRef | None = None
        while (newest := artifacts.newest(self._stage)) is not None:
            try:
                history = list(artifacts.manifest(newest).metrics["history"])
                artifacts.fetch(newest)
            except ArtifactNotFoundError as error:
                # Another machine has trained the same to its end meanwhile, and removed it. Listed again, it is a rest.
                if newest == missing:
                    artifacts.remove(newest)
                    damaged.append(str(error))
                missing = newest
            except ChecksumMismatchError as error:
                artifacts.remove(newest)
                damaged.append(str(error))
            else:
                return newest, history
        return None

    def save(self, training: Training, history: list[Record]) -> None:
        """Publishes the state of ``training``, once for all its processes, and removes all but the newest ones."""
        if training.share.rank > 0:
            return
        with self._context.scratch_folder() as folder, self._context.storing() as artifacts:
            save_checkpoint(training, folder)
            patiently(
                lambda: artifacts.publish(
                    self._stage,
                    f"step-{training.global_step:08d}",
                    folder,
                    settings={},
                    inputs={"run": self._digest},
                    metrics={"history": history},
                )
            )
            for old in artifacts.list_refs(self._stage)[:-_NUM_CHECKPOINTS_KEPT]:
                artifacts.remove(old)
