"""What search and evaluation share: how a job sets up the generation of images and their scoring."""

from dataclasses import fields

from deme_core.artifacts import ArtifactRef
from deme_core.errors import RecipeError
from deme_core.evaluation import Evaluation, FeatureSource
from deme_core.generate import Sampling, image_shape
from deme_core.model_folder import ModelFolder
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from tasks.work.base import JobContext
from tasks.work.real_features import extractor_of


def build_evaluation(
    context: JobContext, evaluate: EvaluateSpec, *, model: ModelFolder, reference: ArtifactRef, num_images: int
) -> Evaluation:
    """Returns how the denoisers that share ``model``'s architecture and scheduler are scored."""
    source = build_source(context, evaluate, model=model)
    return Evaluation(
        **{field.name: getattr(source, field.name) for field in fields(source)},
        num_images=num_images,
        reference=load_reference(context, reference),
        metrics=evaluate.metrics,
        kid_subset_size=evaluate.kid_subset_size,
    )


def build_source(context: JobContext, evaluate: EvaluateSpec, *, model: ModelFolder) -> FeatureSource:
    """Returns how the denoisers that share ``model``'s architecture and scheduler generate features."""
    if evaluate.num_inference_steps > model.num_train_timesteps:
        raise RecipeError(
            f"evaluate.num_inference_steps {evaluate.num_inference_steps} exceeds the model's "
            f"{model.num_train_timesteps} timesteps; lower it."
        )
    return FeatureSource(
        scheduler_config=model.scheduler_config,
        sampling=Sampling(
            sampler=evaluate.sampler,
            num_inference_steps=evaluate.num_inference_steps,
            eta=evaluate.eta,
            timestep_spacing=evaluate.timestep_spacing,
            batch_size=evaluate.batch_size,
        ),
        shape=image_shape(model.unet_config),
        extractor=extractor_of(evaluate, context),
        device=context.device,
    )


def load_reference(context: JobContext, reference: ArtifactRef) -> Reference:
    """Returns the real images' side of a score, once per process."""
    return context.remember(reference.uri, lambda: Reference.load(context.fetch(reference)))
