"""What a run will take, estimated from its recipe: operations, memory and storage.

An estimate and no measurement. Counted is what dominates: the denoiser's operations in training, in the searches and in
the images of the report. Not counted are autoencoder, text encoders, feature extractor, held-out losses, reading of
images, and activations in memory.
"""

from dataclasses import dataclass

from deme_core.denoiser_size import DenoiserSize
from deme_core.recipe import EvaluateSpec, FinetuneSpec, Recipe, SearchSpec, TrainingSpec
from deme_core.rows import NUM_ROWS
from deme_core.search import max_scores

_FP32 = 4  # Bytes.
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A backward pass takes two forward passes; one where the weights are frozen, and only activations have gradients.
_FORWARD_AND_BACKWARD, _FROZEN_FORWARD_AND_BACKWARD = 3, 2
# Two of each training are kept (`tasks.work.training_run`), and the older one goes once a third is stored.
NUM_CHECKPOINTS_STORED = 3

# Dense peaks of NVIDIA's data sheet for the H100 SXM, in operations per second.
H100_PEAK = {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12}
UTILIZATION = 0.4


@dataclass(frozen=True)
class CostEstimate:
    """What a run will take at most, if nothing of it is in the store yet.

    Attributes:
        training_flops: of all copies and the control.
        search_flops: of the searches of merge weights and of the control's scale, with all candidates they may ask for.
        evaluation_flops: of the images of all rows and seeds.
        memory_bytes: of one training: weights, gradients, moments, moving average and frozen model; with LoRA, the
            control's, whose adapter is the largest.
        sampling_bytes: of the models that a candidate of the search, or an image of the ensemble, needs at once.
        num_trainings: copies and control that are trained at once.
        checkpoint_bytes: of one checkpoint of each of these.
        model_bytes: of all models: pretrained, copies, control, scaled control and merged.
        feature_bytes: of generated images.
        encoding_bytes: of latents and captions, if every image has a caption of its own.
    """

    training_flops: float
    search_flops: float
    evaluation_flops: float
    memory_bytes: int
    sampling_bytes: int
    num_trainings: int
    checkpoint_bytes: int
    model_bytes: int
    feature_bytes: int
    encoding_bytes: int

    @property
    def storage_bytes(self) -> int:
        """At most in the store at once: what stays there, and the checkpoints of trainings, which go when they end."""
        return self._lasting_bytes + NUM_CHECKPOINTS_STORED * self.checkpoint_bytes

    @property
    def local_bytes(self) -> int:
        """At most in cache and scratch of a machine that does everything, its object store apart.

        A copy of what stays, and of each training the checkpoint that it writes and the one that it resumed from.
        """
        return self._lasting_bytes + 2 * self.checkpoint_bytes

    @property
    def _lasting_bytes(self) -> int:
        return self.model_bytes + self.feature_bytes + self.encoding_bytes

    def seconds(self, *, training_rate: float, image_rate: float) -> float:
        """Returns how long one device takes.

        Args:
            training_rate: operations per second in the recipe's precision of training.
            image_rate: operations per second in the precision in which images are generated.
        """
        return self.training_flops / training_rate + (self.search_flops + self.evaluation_flops) / image_rate


def estimate_cost(
    recipe: Recipe,
    size: DenoiserSize,
    *,
    num_images: int,
    num_features: int,
    frozen_bytes: int = 0,
    num_workers: int | None = None,
) -> CostEstimate:
    """Returns what a run of ``recipe`` will take.

    Args:
        recipe: how.
        size: of the denoiser.
        num_images: images of the data set.
        num_features: of the extractor.
        frozen_bytes: of the frozen parts, which pretrained, scaled and merged model all hold.
        num_workers: trainings that there is room for at once; None if that is not known, and all may be.
    """
    num_segments, finetune, evaluate = recipe.segments.num_segments, recipe.finetune, recipe.evaluate
    trained, stock = _FP32 * size.num_trained, _FP32 * size.num_parameters
    # The control's adapter has the summed rank of all.
    control = trained * (num_segments if finetune.lora else 1)
    rows = NUM_ROWS + (recipe.distill is not None)
    num_at_most = 1 if recipe.copies else num_segments + 1
    num_trainings = min(num_at_most, num_workers or num_at_most)
    return CostEstimate(
        training_flops=_training_flops(recipe, size),
        search_flops=_search_flops(recipe.merge.search, num_segments, evaluate, size),
        evaluation_flops=rows * len(evaluate.seeds) * evaluate.num_images * _image_flops(evaluate, size),
        memory_bytes=_training_memory(finetune, control, stock),
        sampling_bytes=_sampling_memory(recipe, trained, stock),
        num_trainings=num_trainings,
        # The control is first, and the longest.
        checkpoint_bytes=_checkpoint(finetune, control) + (num_trainings - 1) * _checkpoint(finetune, trained),
        model_bytes=num_segments * trained + control + (rows - 1) * (stock + frozen_bytes),
        feature_bytes=rows * len(evaluate.seeds) * evaluate.num_images * num_features * _FP32,
        encoding_bytes=_encoding_bytes(recipe, size, num_images),
    )


def _training_flops(recipe: Recipe, size: DenoiserSize) -> float:
    """N copies of S steps, if they are trained here, and a control of N S; with a distillation, its steps twice."""
    finetune, distill, num_segments = recipe.finetune, recipe.distill, recipe.segments.num_segments
    control = finetune.for_control(num_segments)
    num_copies = 0 if recipe.copies else num_segments
    flops = num_copies * finetune.num_steps * _step_flops(finetune, size, has_teacher=finetune.has_teacher)
    flops += recipe.num_control_steps(num_segments) * _step_flops(finetune, size, has_teacher=control.has_teacher)
    if distill:
        flops += distill.num_steps * _step_flops(distill, size, has_teacher=True)
    if pretraining := recipe.pretrained.training:
        flops += pretraining.num_steps * _step_flops(pretraining, size, has_teacher=False)
    return flops


def _step_flops(training: TrainingSpec, size: DenoiserSize, *, has_teacher: bool) -> float:
    is_frozen = isinstance(training, FinetuneSpec) and training.lora is not None
    passes = _FROZEN_FORWARD_AND_BACKWARD if is_frozen else _FORWARD_AND_BACKWARD
    passes += training.gradient_checkpointing
    each = passes * size.trained_forward_flops + has_teacher * size.forward_flops
    images = training.images_per_step
    return images * float(each)


def _search_flops(search: SearchSpec | None, num_segments: int, evaluate: EvaluateSpec, size: DenoiserSize) -> float:
    if search is None:
        return 0.0
    of_merge = max_scores(search, num_weights=num_segments, num_segments=num_segments)
    of_control = max_scores(search, num_weights=1, num_segments=num_segments, is_control=True)
    rough, full = (sum(counts) for counts in zip(of_merge, of_control, strict=True))
    few = evaluate.model_copy(update={"num_inference_steps": search.few_steps or 0})
    flops = rough * _image_flops(few, size) + full * _image_flops(evaluate, size)
    return len(search.seeds) * search.num_images * flops


def _image_flops(evaluate: EvaluateSpec, size: DenoiserSize) -> float:
    return float(evaluate.num_inference_steps * (2 if evaluate.guidance_scale != 1 else 1) * size.forward_flops)


def _training_memory(finetune: FinetuneSpec, trained: int, stock: int) -> int:
    if finetune.lora:  # The one model is trained and, its adapter switched off, the frozen one.
        return stock + 3 * trained + _moment_bytes(finetune, trained)
    frozen = stock if finetune.has_teacher else 0
    return 3 * trained + _moment_bytes(finetune, trained) + frozen


def _sampling_memory(recipe: Recipe, trained: int, stock: int) -> int:
    """Of all copies, whole ones or LoRAs, and beside them of theta_0 and what a search changes into the candidate.

    Without a search of the ensemble's: the copies, and the one model that LoRAs need.
    """
    num_stock = 2 if recipe.merge.search else int(recipe.finetune.lora is not None)
    return num_stock * stock + recipe.segments.num_segments * trained


def _checkpoint(training: TrainingSpec, trained: int) -> int:
    """Weights, moving average and moments."""
    return 2 * trained + _moment_bytes(training, trained)


def _moment_bytes(training: TrainingSpec, trained: int) -> int:
    return 2 * trained // (4 if training.optimizer == "adamw_8bit" else 1)


def _encoding_bytes(recipe: Recipe, size: DenoiserSize, num_images: int) -> int:
    """Latents, those of mirror images too, and captions; nothing for models on pixels, or where it is switched off."""
    dataset = recipe.dataset
    if not size.latent_size or not dataset.is_encoded:
        return 0
    latents = size.latent_size * (2 if dataset.random_flip else 1)
    return num_images * (latents + size.caption_size) * _BYTES[dataset.cache_precision]
