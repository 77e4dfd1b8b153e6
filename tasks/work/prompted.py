"""Prompts, and the CLIP score of images made from them."""

from collections.abc import Mapping
from typing import Any

from deme_core.errors import InputError
from deme_core.extractors.clip import ClipScore, clip_score_digest, load_clip_score
from deme_core.metrics import needs_prompts
from deme_core.prompts import Prompts, load_prompts
from deme_core.recipe import EvaluateSpec
from tasks.work.base import JobContext


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
