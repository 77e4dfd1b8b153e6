"""Merging in weight space: tensor by tensor from files, whatever the method (`deme_core.merge_methods`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from deme_core.checkpoint import Checkpoint, TensorInfo, check_same_tensors, write_tensors
from deme_core.lora.expert import LoraExpert
from deme_core.merge_methods import TensorMerge
from deme_core.projection import fold_into, is_projection, projection_key

# Theta_i, whichever way it is kept.
Expert = Mapping[str, torch.Tensor] | Checkpoint | LoraExpert


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch's arithmetic on the CPU to one thread.

    One thread already keeps up with reading the files, and hundreds of short operations make threads that share
    their cores with other work wait for each other: ten times slower on a busy machine (benchmarks/merge.py).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def merged_tensors(
    pretrained: Mapping[str, torch.Tensor] | Checkpoint,
    experts: Sequence[Expert],
    method: TensorMerge,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the merged stock tensors, float32, one at a time, with merged projections folded in.

    Projections are merged as parameters of their own, with the identity as their pretrained value, and folded
    afterwards, as the paper merges them. What no LoRA changes is theta_0 bit for bit.
    """
    for key in pretrained:
        if experts and not any(changes(expert, key) for expert in experts):
            yield key, pretrained[key]
            continue
        merged = _merge_one(method, key, pretrained[key], [expert[key] for expert in experts])
        projection = projection_key(key)
        if experts and projection in experts[0]:
            projections = [expert[projection] for expert in experts]
            identity = torch.eye(len(projections[0]), device=projections[0].device)
            merged = fold_into(merged, _merge_one(method, projection, identity, projections))
        yield key, merged


def changes(expert: Expert, key: str) -> bool:
    """Whether an expert may differ from theta_0 in the tensor ``key``; a LoRA does in those of its layers alone."""
    return not isinstance(expert, LoraExpert) or expert.changes(key)


@one_thread()
def _merge_one(
    method: TensorMerge, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]
) -> torch.Tensor:
    return method(name, pretrained, finetuned)


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
    pretrained: Checkpoint,
    experts: Mapping[str, Checkpoint | LoraExpert],
    method: TensorMerge,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the merge of ``experts`` as a safetensors file with the pretrained model's names.

    A finetuning moves most weights by less than half a step of bfloat16: in the type of a model of half precision
    nearly all of the merge would be rounded away.

    Args:
        pretrained: theta_0.
        experts: theta_1 … theta_N by name, lowest timesteps first.
        method: combines them.
        path: the file to write.
        dtype: of the floating-point tensors; None for those of the pretrained model, but at least float32.

    Raises:
        IncompatibleCheckpointsError: the tensors do not match.
    """
    check_experts(pretrained.infos, {name: expert.infos for name, expert in experts.items()})
    infos = {key: _stored(pretrained.infos[key], dtype) for key in pretrained}
    write_tensors(path, infos, merged_tensors(pretrained, list(experts.values()), method))


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if not info.dtype.is_floating_point:
        return info
    return TensorInfo(info.shape, dtype or (info.dtype if info.dtype == torch.float64 else torch.float32))
