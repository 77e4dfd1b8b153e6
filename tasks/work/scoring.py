"""What search and evaluation share: how a job sets up the generation of images and their scoring."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from deme_core.errors import InputError, RecipeError
from deme_core.evaluation import Evaluation, FeatureSource
from deme_core.extractors.clip import ClipScore, clip_score_digest, load_clip_score
from deme_core.generate import Sampling
from deme_core.manifest import ArtifactRef
from deme_core.metrics import needs_prompts
from deme_core.model_folder import ModelFolder
from deme_core.prompts import Prompts, load_prompts
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from tasks.work.base import JobContext
from tasks.work.real_features import extractor_of


def build_evaluation(
    context: JobContext, evaluate: EvaluateSpec, *, model: ModelFolder, reference: ArtifactRef, num_images: int
) -> Evaluation:
    """Returns how the denoisers that share ``model``'s architecture and scheduler are scored."""
    source = build_source(context, evaluate, model=model)
    real = load_reference(context, reference)
    check_extractor(source.extractor.name, source.extractor.digest, real)
    return Evaluation(
        **{field.name: getattr(source, field.name) for field in fields(source)},
        num_images=num_images,
        reference=real,
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
    prompts = prompts_of(evaluate, context)
    return FeatureSource(
        # Kept from one candidate of a search to the next: text encoders take longer to load than images to make.
        adapter=context.remember_latest(
            "adapter", f"{model.path} {model.frozen}", lambda: model.adapter(context.device), num_kept=1
        ),
        sampling=Sampling(
            sampler=evaluate.sampler,
            num_inference_steps=evaluate.num_inference_steps,
            eta=evaluate.eta,
            timestep_spacing=evaluate.timestep_spacing,
            guidance_scale=evaluate.guidance_scale,
            batch_size=evaluate.batch_size,
            precision=evaluate.mixed_precision,
        ),
        extractor=extractor_of(evaluate, context),
        device=context.device,
        prompts=prompts,
        clip=clip_score_of(evaluate, context) if needs_prompts(evaluate.metrics) else None,
    )


def prompts_of(evaluate: EvaluateSpec, context: JobContext) -> Prompts | None:
    """Returns the prompts that a recipe names, read once per process; None if it names none."""
    path = evaluate.prompts
    if path is None:
        return None
    return context.remember(f"prompts {path}", lambda: load_prompts(path, context.settings.cache_folder))


def clip_score_of(evaluate: EvaluateSpec, context: JobContext) -> ClipScore:
    """Returns what scores images against prompts, loaded once per process."""
    weights, cache = evaluate.clip_weights, context.settings.cache_folder
    return context.remember(
        f"CLIP score {weights}", lambda: load_clip_score(weights=weights, cache=cache, device=context.device)
    )


def evaluation_settings(evaluate: EvaluateSpec, context: JobContext, *, exclude: set[str]) -> dict[str, Any]:
    """Returns what of an evaluation is part of a digest: files by their content, and real images by the reference."""
    dump = evaluate.model_dump(mode="json", exclude=exclude | {"prompts", "clip_weights", "reference_dataset"})
    return dump | prompt_settings(evaluate, context)


def prompt_settings(evaluate: EvaluateSpec, context: JobContext) -> dict[str, str]:
    """Returns the digests of the prompts and of the CLIP score, where a recipe asks for them."""
    settings = {}
    if prompts := prompts_of(evaluate, context):
        settings["prompts"] = prompts.digest
    if needs_prompts(evaluate.metrics):
        weights, cache = evaluate.clip_weights, context.settings.cache_folder
        settings["clip"] = context.remember(
            f"digest of the CLIP score {weights}", lambda: clip_score_digest(weights=weights, cache=cache)
        )
    return settings


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


def check_prompts(here: Mapping[str, str], there: Mapping[str, Any]) -> None:
    """Raises an InputError if images were scored against other prompts, or by another CLIP model, than are here.

    Args:
        here: what `prompt_settings` gave.
        there: the conditions under which the images were generated.
    """
    if any(there.get(name) != digest for name, digest in here.items()):
        raise InputError(
            "The prompts or the CLIP model are not those that the images were scored with; give every machine the "
            "same evaluate.prompts and evaluate.clip_weights, and run again."
        )
