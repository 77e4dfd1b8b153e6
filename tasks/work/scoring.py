"""What search and evaluation share: how a job sets up the scoring of a denoiser."""

from deme_core.artifacts import ArtifactRef
from deme_core.errors import InputError, RecipeError
from deme_core.evaluation import Evaluation
from deme_core.extractors import FeatureExtractor
from deme_core.generate import Sampling, image_shape
from deme_core.metrics import Reference
from deme_core.model_folder import ModelFolder
from deme_core.recipe import EvaluateSpec
from tasks.work.base import JobContext
from tasks.work.reference import extractor_of


def build_evaluation(
    context: JobContext, evaluate: EvaluateSpec, *, model: ModelFolder, reference: ArtifactRef, num_images: int
) -> Evaluation:
    """Returns how the denoisers that share ``model``'s architecture and scheduler are scored."""
    if evaluate.num_inference_steps > model.num_train_timesteps:
        raise RecipeError(
            f"evaluate.num_inference_steps {evaluate.num_inference_steps} exceeds the model's "
            f"{model.num_train_timesteps} timesteps; lower it."
        )
    extractor = extractor_of(evaluate, context)
    real = context.remember(reference.uri, lambda: Reference.load(context.fetch(reference)))
    check_extractor(extractor, real)
    return Evaluation(
        scheduler_config=model.scheduler_config,
        sampling=Sampling(
            sampler=evaluate.sampler,
            num_inference_steps=evaluate.num_inference_steps,
            eta=evaluate.eta,
            timestep_spacing=evaluate.timestep_spacing,
            batch_size=evaluate.batch_size,
        ),
        shape=image_shape(model.unet_config),
        num_images=num_images,
        extractor=extractor,
        reference=real,
        metrics=evaluate.metrics,
        kid_subset_size=evaluate.kid_subset_size,
        device=context.device,
    )


def check_extractor(extractor: FeatureExtractor, reference: Reference) -> None:
    """Raises an InputError if the real images went through another extractor than the generated ones would.

    It happens where machines hold different files at the same path, or a file changes while a run goes on.
    """
    if extractor.digest != reference.extractor_digest:
        raise InputError(
            f"The extractor {extractor.name} has the digest {extractor.digest} here, but the reference was made with "
            f"{reference.extractor_digest}; give every machine the same evaluate.extractor_weights, and run again."
        )
