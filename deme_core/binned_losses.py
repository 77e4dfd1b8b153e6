"""Losses by timestep bin: how they are kept, averaged and compared. How they are measured: `deme_core.heldout_loss`.

No torch here: the flow reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from deme_core.segments import TimestepSegment, segment_index
from deme_core.verdict import Interval, interval

Losses = npt.NDArray[np.float32]

_MIN_BINS = 20
_FILE = "losses.safetensors"


def bin_edges(num_train_timesteps: int, segment_edges: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns the edges of 20 equal bins of [0, T), and the segments' edges, so that no bin spans two."""
    equal = {index * num_train_timesteps // _MIN_BINS for index in range(_MIN_BINS + 1)}
    return tuple(sorted(equal | set(segment_edges)))


def save_losses(folder: Path, losses: Losses) -> None:
    """Writes the losses into a folder."""
    save_file({"losses": losses}, folder / _FILE)


def load_losses(folder: Path) -> Losses:
    """Reads what `save_losses` wrote."""
    return load_file(folder / _FILE)["losses"]


def bin_shares(edges: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns the share of the timesteps that each bin holds, (B,), summing to one."""
    lengths = np.diff(np.asarray(edges, dtype=np.float64))
    return lengths / lengths.sum()


def mean_loss(losses: Losses, edges: Sequence[int]) -> float:
    """Returns the expected loss over all timesteps, as training weighs them."""
    return float(losses.astype(np.float64).mean(axis=0) @ bin_shares(edges))


def ensemble_losses(experts: Sequence[Losses], edges: Sequence[int], segments: Sequence[TimestepSegment]) -> Losses:
    """Returns the losses of the ensemble: in each bin those of the expert of its segment."""
    columns = [experts[segment_index(segments, low)][:, column] for column, low in enumerate(edges[:-1])]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class RelativeLosses:
    """Change of the loss against a baseline in each bin, with 95 % intervals over the images.

    Attributes:
        edges: B + 1 bin edges.
        changes: one interval per bin; -0.02 is a loss two per cent lower.
    """

    edges: tuple[int, ...]
    changes: tuple[Interval, ...]


def relative_losses(losses: Losses, baseline: Losses, edges: Sequence[int]) -> RelativeLosses:
    """Compares losses (n, B) with a baseline's, of the same images, timesteps and noise, bin by bin."""
    differences, scale = losses.astype(np.float64) - baseline, baseline.mean(axis=0, dtype=np.float64)
    return RelativeLosses(
        tuple(edges), tuple(_relative(differences[:, b], float(scale[b])) for b in range(len(edges) - 1))
    )


def _relative(differences: npt.NDArray[np.float64], scale: float) -> Interval:
    found = interval(differences.tolist())
    return Interval(mean=found.mean / scale, low=found.low / scale, high=found.high / scale)


def own_change(expert: Losses, pretrained: Losses, edges: Sequence[int], segment: TimestepSegment) -> Interval:
    """Compares a finetuned copy with the pretrained model on its own segment, relative to the latter's loss.

    Args:
        expert: losses of the copy, (n, B).
        pretrained: losses of the pretrained model, of the same images and bins.
        edges: bin edges; those of the segment are among them.
        segment: what the copy was finetuned for.

    Returns:
        Relative change of the loss with its 95 % interval over the images, paired: below 0 the copy is better.
    """
    inside = [low in segment for low in edges[:-1]]
    share = bin_shares(edges)[inside]
    share /= share.sum()
    before = pretrained[:, inside].astype(np.float64) @ share
    difference = expert[:, inside].astype(np.float64) @ share - before
    return _relative(difference, float(before.mean()))
