"""What each copy's weight does to the held-out loss of each segment at theta_0, to first and second order.

Of a converged model the losses of all segments together have no slope, so that no merge lowers their mean by more than
second order (docs/science.md). Central differences at weights of ``--step``, each copy alone.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.laboratory import Laboratory
from benchmarks.measurement import print_table
from deme_core.manifest import ArtifactRef
from deme_core.recipe import MethodSpec, RegMeanSpec
from deme_core.recipe_file import load_recipe
from tasks.jobs import LossJob


@dataclass(frozen=True)
class Slopes:
    """Derivatives by the weight of one copy, relative to theta_0's mean loss.

    Attributes:
        by_segment: first derivative of each segment's share of the mean loss, (N,).
        curvature: second derivative of the mean loss.
    """

    by_segment: npt.NDArray[np.float64]
    curvature: float

    @property
    def mean(self) -> float:
        """The first derivative of the mean loss."""
        return float(self.by_segment.sum())

    @property
    def best_change(self) -> float:
        """The change of the mean loss at the best weight of this copy, by the parabola; 0 if it has no minimum."""
        return -(self.mean**2) / (2 * self.curvature) if self.curvature > 0 else 0.0


def measure_slopes(laboratory: Laboratory, copies: Sequence[ArtifactRef], *, step: float) -> list[Slopes]:
    """Returns the slopes of each copy, from 2 N + 1 held-out losses."""

    def losses(index: int, weight: float) -> npt.NDArray[np.float64]:
        weights = tuple(weight if i == index else 0.0 for i in range(len(copies)))
        job = LossJob(
            label=f"loss of {weights}",
            pretrained=laboratory.pretrained.ref,
            experts=tuple(copies),
            method=MethodSpec(),
            weights=weights,
            dataset=laboratory.recipe.dataset,
            segment_edges=laboratory.edges,
        )
        return np.array(laboratory.do(job).metrics["value"], dtype=np.float64)

    before, found = losses(0, 0.0), []
    for index in range(len(copies)):
        above, below = losses(index, step), losses(index, -step)
        slope, bend = (above - below) / (2 * step), (above + below - 2 * before).sum() / step**2
        found.append(Slopes(slope / before.sum(), float(bend / before.sum())))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object."""
    parser = argparse.ArgumentParser("python -m benchmarks.loss_slopes", description=__doc__)
    parser.add_argument("--recipe", default="digits", help="a recipe's name or file (default digits)")
    parser.add_argument("--step", type=float, default=0.25, help="weight on both sides of 0 (default 0.25)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models are (default cpu)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    options = parser.parse_args(arguments)
    laboratory = Laboratory(load_recipe(options.recipe, options.overrides), device=options.device)
    copies = laboratory.experts()
    groups = {
        "copy": copies,
        "confined": laboratory.confined(copies, RegMeanSpec()),
        "control": (laboratory.control(),),
    }
    rows, result = [], dict[str, list[dict[str, float]]]()
    for name, refs in groups.items():
        slopes = measure_slopes(laboratory, refs, step=options.step)
        result[name] = [{"slope": s.mean, "curvature": s.curvature, "best_change": s.best_change} for s in slopes]
        for index, found in enumerate(slopes):
            numbers = (*found.by_segment, found.mean, found.curvature, found.best_change)
            rows.append((f"{name} {index}" if len(refs) > 1 else name, *(f"{100 * number:+.3f}" for number in numbers)))
    columns = ("", *(f"segment {i}" for i in range(len(copies))), "mean", "curvature", "at the best weight")
    print_table("Derivatives of the held-out loss by a copy's weight, % of the mean loss", columns, rows)
    print(json.dumps({"name": "loss_slopes", **result}), flush=True)


if __name__ == "__main__":
    main()
