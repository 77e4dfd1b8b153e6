"""What a run asks of the object store, in calls and bytes, if every job is done on a machine of its own.

The worst case, and that of a large cluster: on one machine what was made there is in its cache, and little is read.
Counted are the trainings, merges, held-out losses, images and scores of a recipe with fixed weights; not a search,
encodings, and the images of the data set.
"""

import math
from dataclasses import dataclass

from deme_core.denoiser_size import DenoiserSize
from deme_core.recipe import EvaluateSpec, Recipe, TrainingSpec
from deme_core.rows import NUM_ROWS

_FP32 = 4  # Bytes.
_SAMPLES_BYTES = (
    1600  # The picture of a set's first images, for images of 8 pixels; of larger ones, little beside the rest.
)
_MANIFEST_BYTES = 1500
_CHECKPOINT_FILES = 2
_MODEL_FILES = 4  # Index, scheduler, config, weights.
# boto3 sends a large file in parts of this size, `S3Store` fetches it in parts of that one, a request each.
_SENT_PART_BYTES, _FETCHED_PART_BYTES = 8 << 20, 16 << 20


@dataclass(frozen=True)
class Traffic:
    """Calls of a store's methods, and bytes through them.

    Attributes:
        calls: objects put, got, looked for and deleted, and listings.
        parts: further requests that large objects take on S3.
        written: bytes to the store.
        read: bytes from it.
    """

    calls: int = 0
    parts: int = 0
    written: int = 0
    read: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Returns both together."""
        return Traffic(
            self.calls + other.calls, self.parts + other.parts, self.written + other.written, self.read + other.read
        )

    def __mul__(self, times: int) -> "Traffic":
        """Returns it so many times."""
        return Traffic(self.calls * times, self.parts * times, self.written * times, self.read * times)


@dataclass(frozen=True)
class Folder:
    """Files of an artifact, of which one has almost all of the bytes."""

    num_files: int
    num_bytes: int

    def made(self) -> Traffic:
        """Returns what a job does to store it: it looks for it, puts the files, then the manifest."""
        calls = 1 + self.num_files + 1
        return Traffic(calls, _more_to_send(self.num_bytes), written=self.num_bytes + _MANIFEST_BYTES)

    def fetched(self) -> Traffic:
        """Returns what another machine does to have it: the manifest, then the files."""
        more = _num_parts(self.num_bytes, _FETCHED_PART_BYTES) - 1
        return Traffic(self.num_files + 1, more, read=self.num_bytes + _MANIFEST_BYTES)


@dataclass(frozen=True)
class Artifacts:
    """The artifacts of a run, by what they hold.

    Attributes:
        stock: a stock model, with its frozen parts.
        copy: a finetuned copy, with its projections.
        checkpoint: all of a training's state.
        features: of the images of one row under one seed.
        real: features of the real images, and what is made of them: two artifacts.
    """

    stock: Folder
    copy: Folder
    checkpoint: Folder
    features: Folder
    real: Folder


def measure_artifacts(recipe: Recipe, size: DenoiserSize, *, num_real: int, num_features: int) -> Artifacts:
    """Returns the sizes of the artifacts of a run whose model has no frozen parts.

    Args:
        recipe: what is run, with fixed weights.
        size: of the denoiser.
        num_real: real images of the report.
        num_features: of the extractor.
    """
    trained = _FP32 * size.num_trained
    moments = 2 * trained // (4 if recipe.finetune.optimizer == "adamw_8bit" else 1)
    return Artifacts(
        stock=Folder(_MODEL_FILES, _FP32 * size.num_parameters),
        copy=Folder(_MODEL_FILES, trained),
        checkpoint=Folder(_CHECKPOINT_FILES, 2 * trained + moments),
        features=Folder(2, recipe.evaluate.num_images * num_features * _FP32 + _SAMPLES_BYTES),
        real=Folder(1, num_real * num_features * _FP32),
    )


def estimate_traffic(recipe: Recipe, artifacts: Artifacts) -> Traffic:
    """Returns what a run with fixed weights asks of the store."""
    count, finetune = recipe.segments.num_segments, recipe.finetune
    traffic = _evaluation(recipe.evaluate, artifacts, count)
    traffic += _training(finetune, finetune.num_steps, artifacts) * count
    traffic += _training(finetune, finetune.num_steps * count, artifacts)
    merge = artifacts.stock.fetched() + artifacts.stock.made()
    traffic += merge * 2 + artifacts.copy.fetched() * (count + 1)  # The copies, and the control's scale.
    if pretraining := recipe.pretrained.training:
        traffic += _checkpoints(pretraining, pretraining.num_steps, artifacts.checkpoint)
    return traffic + artifacts.stock.made()


def _training(training: TrainingSpec, num_steps: int, artifacts: Artifacts) -> Traffic:
    checkpoints = _checkpoints(training, num_steps, artifacts.checkpoint)
    return artifacts.stock.fetched() + artifacts.copy.made() + checkpoints


def _checkpoints(training: TrainingSpec, num_steps: int, checkpoint: Folder) -> Traffic:
    """A listing when a training begins and when it is done; for each checkpoint one, its files, and their removal."""
    saved = Traffic(1 + 1 + checkpoint.num_files + 1, _more_to_send(checkpoint.num_bytes), checkpoint.num_bytes)
    removed = Traffic(1 + 1 + checkpoint.num_files)
    return (saved + removed) * ((num_steps - 1) // training.checkpoint_every) + Traffic(calls=2)


def _evaluation(evaluate: EvaluateSpec, artifacts: Artifacts, num_segments: int) -> Traffic:
    """Of each row and seed features and scores; the ensemble reads all copies; of the real images two artifacts."""
    copy = artifacts.copy.fetched()
    models = artifacts.stock.fetched() * (NUM_ROWS - 1) + copy * num_segments
    losses = artifacts.stock.fetched() * (NUM_ROWS - 1) + copy * num_segments
    losses += Folder(1, 0).made() * (NUM_ROWS - 1 + num_segments)
    conditions = Traffic(1, read=_MANIFEST_BYTES)
    scores = conditions + artifacts.features.fetched() + artifacts.real.fetched() + Folder(1, _SAMPLES_BYTES).made()
    real = artifacts.real.made() * 2 + artifacts.real.fetched()
    each_seed = models + (artifacts.features.made() + scores) * NUM_ROWS
    return real + losses + each_seed * len(evaluate.seeds)


def _more_to_send(num_bytes: int) -> int:
    """Returns the requests beyond one: an upload in parts is begun and completed, too."""
    return _num_parts(num_bytes, _SENT_PART_BYTES) + 1 if num_bytes >= _SENT_PART_BYTES else 0


def _num_parts(num_bytes: int, part_bytes: int) -> int:
    return max(math.ceil(num_bytes / part_bytes), 1)
