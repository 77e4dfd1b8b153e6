"""What can go wrong, each with the exit code the command line gives it.

``InputError`` and its children are the user's to mend (exit code 2); every other ``DemeError`` is a
failure of the run (exit code 1). Every message is one sentence that names the cause and the mend.
"""

from collections.abc import Sequence
from typing import Any


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error of another library says, or its kind, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


class DemeError(Exception):
    """A failure that DeMe foresaw."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what was said, whatever the arguments of a child's constructor: errors cross processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[DemeError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> DemeError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error


class InputError(DemeError, ValueError):
    """Something the user gave cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe or an override is unknown or invalid."""


class DatasetError(InputError):
    """A data set is missing, empty, broken or too small for what was asked."""


class PromptsError(InputError):
    """Prompts are missing, empty or damaged."""


class ModelFolderError(InputError):
    """A model folder is incomplete, damaged, pickled, or does not match its own config."""


class ExtractorUnavailableError(InputError):
    """The weights of a feature extractor cannot be had."""


class NonFiniteImagesError(InputError):
    """Images that were generated, or what was computed of images, are NaN or infinite."""


class StoreUnavailableError(InputError):
    """The object store cannot be reached, refuses the credentials, or has no space left."""


class NoAnswerError(StoreUnavailableError):
    """No answer of the object store: another attempt may succeed, unlike after a refusal."""


class ObjectTooLargeError(InputError):
    """An object is larger than what is read of its kind, or than its manifest promises."""


class GpuMemoryError(InputError):
    """A GPU has too little memory for a job.

    Attributes:
        job: what was being done.
    """

    def __init__(self, job: str, reason: str, mend: str) -> None:
        self.job = job
        super().__init__(f"The GPU has too little memory for {job} ({reason}); {mend}.")


class TrackingUnavailableError(InputError):
    """The MLflow server cannot be reached."""


class IncompatibleCheckpointsError(InputError):
    """Checkpoints that should hold the same tensors do not.

    Attributes:
        missing: names the checkpoint lacks.
        extra: names only the checkpoint has.
        mismatched: names whose shapes differ, each as ``name (shape) for (expected shape)``.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        reference: str,
        missing: Sequence[str] = (),
        extra: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        self.missing, self.extra, self.mismatched = tuple(missing), tuple(extra), tuple(mismatched)
        parts = [
            f"{label} {', '.join(_first_of(names))}"
            for label, names in (
                ("missing tensors:", self.missing),
                ("extra tensors:", self.extra),
                ("mis-shaped tensors:", self.mismatched),
            )
            if names
        ]
        super().__init__(f"{checkpoint} does not hold the tensors of {reference}; {'; '.join(parts)}.")


def _first_of(names: Sequence[str]) -> list[str]:
    """Returns the first three names and how many more there are: hundreds would bury the sentence."""
    num_more = len(names) - 3
    return [*names[:3], f"and {num_more} more"] if num_more > 0 else list(names)


class ArtifactNotFoundError(DemeError):
    """An object or artifact is not in the store."""


class ChecksumMismatchError(DemeError):
    """A stored object does not hold the bytes its manifest promises."""


class DamagedArtifactError(ChecksumMismatchError):
    """An object of an artifact is lost, or holds other bytes than its manifest promises, each time it is read.

    Attributes:
        uri: of the artifact.
        problem: what is wrong with which object.
    """

    def __init__(self, uri: str, problem: str, mend: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"The artifact {uri} is damaged: {problem}; {mend}.")


class NonFiniteLossError(DemeError):
    """The training loss, or its gradient, became NaN or infinite.

    Attributes:
        run: what was being trained, e.g. ``segment 2 [500, 750)``.
        global_step: the optimizer step at which it happened.
    """

    def __init__(self, run: str, global_step: int) -> None:
        self.run, self.global_step = run, global_step
        super().__init__(
            f"The loss of {run}, or its gradient, is not finite at step {global_step}; lower finetune.learning_rate or "
            "use mixed_precision: fp32."
        )


class FrozenModelChangedError(DemeError):
    """The frozen pretrained model was modified while a copy of it was finetuned."""


class TimestepHistogramError(DemeError):
    """The timesteps that were drawn contradict the settings of the run."""


class BadExpertError(DemeError):
    """A finetuned copy is not better than the pretrained model where it should be."""


class RunEndedError(DemeError):
    """A job was not done, or not to its end, since the flow run that wanted it ended."""

    def __init__(self, message: str = "The flow run ended before the job did.") -> None:
        super().__init__(message)


class WorkerDiedError(DemeError):
    """A worker process ended without finishing its job."""


class WorkerStoppedError(WorkerDiedError):
    """A worker process was told to leave, and left a checkpoint of its training first.

    Attributes:
        run: what was being trained, e.g. ``segment 2 [500, 750)``.
        global_step: the optimizer step of the checkpoint.
    """

    def __init__(self, run: str, global_step: int) -> None:
        self.run, self.global_step = run, global_step
        super().__init__(
            f"The worker process of {run} was told to leave and left a checkpoint at step {global_step}; run again to "
            "go on from there."
        )
