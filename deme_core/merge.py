"""Task arithmetic in weight space (Ilharco et al. 2023, arXiv 2212.04089), as DeMe uses it.

theta_merged = theta_0 + sum_i w_i (theta_i - theta_0), computed as (1 - sum_i w_i) theta_0 + sum_i w_i theta_i,
so that all w = 0 gives theta_0, and N = 1 with w = 1 gives theta_1, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from deme_core.checkpoint import Checkpoint, TensorInfo, check_same_tensors, write_tensors
from deme_core.errors import InputError
from deme_core.projection import fold_into, is_projection, projection_key


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch's arithmetic to one thread.

    One thread already keeps up with reading the files, and hundreds of short operations make threads that share
    their cores with other work wait for each other: ten times slower on a busy machine (benchmarks/merge.py).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@_one_thread()
def merge_tensor(pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Returns pretrained + sum_i weights[i] (finetuned[i] - pretrained), in float32; inputs are not changed.

    Tensors that are not floating point (counters, masks) are returned as they came.
    """
    if not pretrained.is_floating_point():
        return pretrained
    terms = [(1.0 - sum(weights), pretrained), *zip(weights, finetuned, strict=True)]
    terms = [(weight, tensor) for weight, tensor in terms if weight != 0.0]
    (weight, tensor), *others = terms  # Never empty: the weights of all terms sum to one.
    merged = tensor.float() if weight == 1.0 and not others else torch.mul(tensor.float(), weight)
    for weight, tensor in others:
        merged.add_(tensor.float(), alpha=weight)
    return merged


def merged_tensors(
    pretrained: Mapping[str, torch.Tensor] | Checkpoint,
    experts: Sequence[Mapping[str, torch.Tensor] | Checkpoint],
    weights: Sequence[float],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the merged stock tensors, float32, one at a time, with merged projections folded in.

    Projections are merged as parameters of their own, with the identity as their pretrained value, and folded
    afterwards, as the paper merges them.
    """
    for key in pretrained:
        merged = merge_tensor(pretrained[key], [expert[key] for expert in experts], weights)
        projection = projection_key(key)
        if experts and projection in experts[0]:
            projections = [expert[projection] for expert in experts]
            identity = torch.eye(len(projections[0]), device=projections[0].device)
            merged = fold_into(merged, merge_tensor(identity, projections, weights))
        yield key, merged


def check_experts(pretrained: Mapping[str, TensorInfo], experts: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Checks that experts hold the pretrained tensors and, all or none of them, the same projections.

    Args:
        pretrained: tensors of the pretrained model.
        experts: tensors of each expert, by its name.

    Raises:
        IncompatibleCheckpointsError: tensors are missing, extra or mis-shaped; all are listed.
    """
    projections: dict[str, TensorInfo] = {}
    for infos in experts.values():
        projections |= {key: info for key, info in infos.items() if _projects(key, info, pretrained)}
    for name, infos in experts.items():
        check_same_tensors(name, infos, {**pretrained, **projections}, reference="the pretrained model")


def _projects(key: str, info: TensorInfo, pretrained: Mapping[str, TensorInfo]) -> bool:
    weight = pretrained.get(f"{key.rpartition('.')[0]}.weight")
    return is_projection(key) and weight is not None and info.shape == (weight.shape[0], weight.shape[0])


def merge_checkpoints(
    pretrained: Checkpoint, experts: Mapping[str, Checkpoint], weights: Sequence[float], path: Path
) -> None:
    """Writes the merge of ``experts`` as a safetensors file with the pretrained model's names and dtypes.

    Args:
        pretrained: theta_0.
        experts: theta_1 … theta_N by name, lowest timesteps first.
        weights: w_1 … w_N.
        path: the file to write.

    Raises:
        InputError: there are not as many weights as experts, or one is not finite.
        IncompatibleCheckpointsError: the tensors do not match.
    """
    check_weights(weights, num_experts=len(experts))
    check_experts(pretrained.infos, {name: expert.infos for name, expert in experts.items()})
    infos = {key: pretrained.infos[key] for key in pretrained}
    write_tensors(path, infos, merged_tensors(pretrained, list(experts.values()), weights))


def check_weights(weights: Sequence[float], *, num_experts: int) -> None:
    """Raises InputError unless there is one finite weight per expert."""
    if len(weights) != num_experts:
        raise InputError(f"{len(weights)} merge weights were given for {num_experts} experts; give one for each.")
    if not all(torch.tensor(list(weights), dtype=torch.float64).isfinite()):
        raise InputError(f"Merge weights must be finite numbers, not {list(weights)}.")
