"""What search and evaluation share: how a job sets up the generation of images and their scoring."""

from typing import Any

from deme_core.errors import InputError
from deme_core.evaluation import FeatureSource
from deme_core.families import Adapter
from deme_core.manifest import ArtifactRef
from deme_core.metrics import needs_prompts
from deme_core.model_folder import ModelFolder
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from deme_core.sampling import Sampling
from tasks.work.base import JobContext
from tasks.work.prompted import clip_score_of, prompt_settings, prompts_of
from tasks.work.real_features import extractor_of


def build_source(context: JobContext, evaluate: EvaluateSpec, *, model: ModelFolder) -> FeatureSource:
    """Returns how the denoisers that share ``model``'s architecture and scheduler generate features."""
    prompts = prompts_of(evaluate, context)
    return FeatureSource(
        adapter=adapter_of(model, context),
        sampling=Sampling.of(evaluate),
        extractor=extractor_of(evaluate, context),
        device=context.device,
        prompts=prompts,
        clip=clip_score_of(evaluate, context) if needs_prompts(evaluate.metrics) else None,
    )


def adapter_of(model: ModelFolder, context: JobContext) -> Adapter:
    """Returns the frozen parts of a model, kept from one candidate of a search to the next.

    Text encoders take longer to load than images to make.
    """
    key = f"{model.path} {model.frozen}"
    return context.remember_latest("adapter", key, lambda: model.adapter(context.device), num_kept=1)


def evaluation_settings(evaluate: EvaluateSpec, context: JobContext, *, exclude: set[str]) -> dict[str, Any]:
    """Returns what of an evaluation is part of a digest: files by their content, and real images by the reference.

    The reference also tells the extractor, wherever its weights lie; digests made before that was left out stay.
    """
    dump = evaluate.model_dump(mode="json", exclude=exclude | {"prompts", "clip_weights", "reference_dataset"})
    return dump | {"extractor_weights": None} | prompt_settings(evaluate, context)


def load_reference(context: JobContext, reference: ArtifactRef) -> Reference:
    """Returns the real images' side of a score, once per process."""
    return context.remember(reference.uri, lambda: Reference.load(context.fetch(reference)))


def check_extractor(name: str, digest: str, reference: Reference) -> None:
    """Raises an InputError if the real images went through another extractor than the generated ones would.

    It happens where machines hold different files at the same path, or a file changes while a run goes on.
    """
    if digest != reference.extractor_digest:
        raise InputError(
            f"The extractor {name} has the digest {digest} here, but the reference was made with "
            f"{reference.extractor_digest}; give every machine the same evaluate.extractor_weights, and run again."
        )
