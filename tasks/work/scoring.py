"""What search and evaluation share: how a job sets up the scoring of a denoiser."""

from deme_core.artifacts import ArtifactRef
from deme_core.errors import RecipeError
from deme_core.evaluation import Evaluation
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
        extractor=extractor_of(evaluate, context),
        reference=context.remember(reference.uri, lambda: Reference.load(context.fetch(reference))),
        metrics=evaluate.metrics,
        kid_subset_size=evaluate.kid_subset_size,
        device=context.device,
    )
