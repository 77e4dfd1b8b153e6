"""The merge of a run's LoRA experts as one adapter, from the artifacts of the run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deme_core.artifacts import ArtifactStore, fetch_or_withdraw
from deme_core.errors import ArtifactNotFoundError, InputError
from deme_core.lora import LORA_NAME, LoraFactors, sum_adapters, truncate, truncate_difference, write_factors
from deme_core.manifest import ArtifactRef, Manifest
from deme_core.merge_methods import Average, BlockWeights, TaskArithmetic
from deme_core.merge_methods.build import build_method
from deme_core.model_folder import ModelFolder, open_model_folder, weights_digest
from deme_core.recipe import MethodSpec
from tasks.jobs import PRETRAINED_STAGE, ConfineJob, FinetuneJob


@dataclass(frozen=True)
class LoraSummary:
    """What was written.

    Attributes:
        rank: of every layer.
        error: Frobenius norm of what was cut off over that of the whole; 0 for the exact sum.
        errors: the same by layer; empty for the exact sum.
        num_layers: layers that the adapter changes.
    """

    rank: int
    error: float
    errors: dict[str, float]
    num_layers: int


def write_merged_adapter(artifacts: ArtifactStore, merged: ArtifactRef, rank: int | None, out: Path) -> LoraSummary:
    """Writes the adapter that turns theta_0 into the merged model, for ``load_lora_weights`` of stock diffusers.

    Args:
        artifacts: the store.
        merged: the merged model.
        rank: of the adapter; None for the exact sum of the experts' adapters.
        out: an empty folder.

    Raises:
        InputError: the experts are no LoRAs, the pipeline takes none, or the merge has no exact adapter and there is
            no rank.
        ArtifactNotFoundError: a model that was merged is not in the store any more.
    """
    manifest = artifacts.manifest(merged)
    base = _open(artifacts, PRETRAINED_STAGE, manifest.inputs["pretrained"])
    _check_takes_lora(base)
    experts, is_confined = _experts(artifacts, manifest)
    method = _method(manifest, len(experts), base)
    adapters = [expert.lora_factors() for expert in experts]
    is_sum = isinstance(method, TaskArithmetic | BlockWeights | Average) and not is_confined
    if rank is None and not is_sum:
        raise InputError(
            f"A merge by {'regmean' if is_confined else manifest.settings['method']} is no weighted sum of the LoRAs, "
            "so no LoRA of their summed rank equals it; give --rank for the nearest one of that rank."
        )
    if is_sum or not adapters:
        factors = sum_adapters(adapters, method)
        found = truncate(factors, rank) if rank else None
    else:
        assert rank is not None
        found = truncate_difference(_differences(base, fetch_or_withdraw(artifacts, merged), adapters[0]), rank)
    factors = found.factors if found else factors
    digest = weights_digest(base)
    write_factors(out / LORA_NAME, factors, part=base.index.family.denoiser_part, base_digest=digest)
    return LoraSummary(
        next(iter(factors.values())).rank, found.error if found else 0.0, found.errors if found else {}, len(factors)
    )


def _experts(artifacts: ArtifactStore, manifest: Manifest) -> tuple[list[ModelFolder], bool]:
    """Returns the copies that were merged as they were trained, and whether they were confined in between."""
    digests = [manifest.inputs[f"expert-{i}"] for i in range(len(manifest.inputs) - 1)]
    confined = [artifacts.find(ConfineJob.stage, digest) for digest in digests]
    trained = [artifacts.manifest(ref).inputs["expert"] if ref else d for ref, d in zip(confined, digests, strict=True)]
    experts = [_open(artifacts, FinetuneJob.stage, digest) for digest in trained]
    if any(expert.index.lora_base is None for expert in experts):
        raise InputError("This run finetuned whole copies, whose merge is no LoRA; export it without --lora.")
    return experts, any(confined)


def _method(manifest: Manifest, num_experts: int, base: ModelFolder) -> Any:
    spec = MethodSpec.model_validate({k: v for k, v in manifest.settings.items() if k in MethodSpec.model_fields})
    return build_method(spec, manifest.settings["weights"], num_experts, base.checkpoint().infos)


def _open(artifacts: ArtifactStore, stage: str, digest: str) -> ModelFolder:
    ref = artifacts.find(stage, digest)
    if ref is None:
        raise ArtifactNotFoundError(f"The model {stage}/{digest}, which was merged, is not in the store.")
    return open_model_folder(fetch_or_withdraw(artifacts, ref))


def _check_takes_lora(base: ModelFolder) -> None:
    import diffusers

    pipeline = base.index.pipeline or base.index.family.pipelines[0]
    if not hasattr(getattr(diffusers, pipeline), "load_lora_weights"):
        raise InputError(f"A {pipeline} of stock diffusers loads no LoRA; export the merged model without --lora.")


def _differences(
    base: ModelFolder, merged: Path, factors: dict[str, LoraFactors]
) -> Iterator[tuple[str, torch.Tensor]]:
    before, after = base.checkpoint(), open_model_folder(merged).checkpoint()
    for layer in factors:
        yield layer, after[f"{layer}.weight"].float() - before[f"{layer}.weight"].float()
