"""What does it cost to find merge weights: each strategy against the paper's grid.

A strategy is done when it has scored a candidate as well as the grid's best one. Its cost is the images it generated
until then, and the seconds, held-out losses included. The weights that each finds are scored again on the report's
seeds and real images, which no search has seen: the best of many scores flatters itself, the grid's above all, so that
what each spent in all is told beside that. Models are trained once and kept in the store.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.laboratory import Laboratory
from benchmarks.measurement import print_result, print_table
from deme_core.manifest import ArtifactRef
from deme_core.metrics import direction, higher_is_better
from deme_core.recipe import MethodSpec
from deme_core.recipe_file import load_recipe
from tasks.jobs import Job, JobResult
from tasks.progress import exhaust
from tasks.weight_search import find_weights

STRATEGIES: dict[str, dict[str, Any]] = {
    "grid": {"strategy": "grid"},
    "grid, few steps first": {"strategy": "grid", "few_steps": 5, "survivors": 0.1},
    "coordinate": {"strategy": "coordinate"},
    "quadratic": {"strategy": "quadratic"},
    "tpe": {"strategy": "tpe"},
    "cma_es": {"strategy": "cma_es"},
    "gp": {"strategy": "gp"},
}
_GOAL = 0.1
_QUICK = (
    "dataset.num_images=96",
    "pretrained.training.num_steps=10",
    "finetune.num_steps=3",
    "evaluate.num_images=8",
    "evaluate.num_inference_steps=6",
    "evaluate.extractor_resolution=32",
    "evaluate.kid_subset_size=4",
    "merge.search.num_images=8",
    "merge.search.num_reference_images=32",
    "merge.search.max_candidates=5",
)


@dataclass(frozen=True)
class Step:
    """One scored candidate.

    Attributes:
        seconds: since the search began.
        images: generated so far; those of few steps count by their share of the steps.
        score: of a full candidate; None for a rough one.
    """

    seconds: float
    images: float
    score: float | None


def search_anew(laboratory: Laboratory, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Step]]:
    """Runs one strategy, and returns its result and its way there; nothing that another has measured is free for it."""
    recipe, steps = laboratory.recipe, list[Step]()
    assert recipe.merge.search is not None
    search = recipe.merge.search.model_copy(update=settings)
    job = laboratory.search_job(laboratory.experts(), search, MethodSpec())
    each = search.num_images * len(search.seeds)
    rough_share = (search.few_steps or 0) / recipe.evaluate.num_inference_steps
    started, images = time.perf_counter(), 0.0

    def note(record: dict[str, Any]) -> None:
        nonlocal images
        images += each * (rough_share if record["rough"] else 1.0)
        score = None if record["rough"] else record["score"]
        steps.append(Step(time.perf_counter() - started, images, score))

    def measure(jobs: Sequence[Job]) -> Iterator[JobResult]:
        for candidate in jobs:
            work, start = import_module(f"tasks.work.{candidate.work}"), time.perf_counter()
            metrics = exhaust(work.run(candidate, laboratory.context, Path(), ""), lambda _: None)
            yield JobResult(ArtifactRef("", ""), metrics, False, time.perf_counter() - start, 0.0)

    return exhaust(find_weights(job, laboratory.do(job).metrics["num_weights"], measure), note), steps


def cost_to_reach(steps: Sequence[Step], score: float, *, metric: str) -> Step | None:
    """Returns the first step with so good a full score, or None."""
    sign = -1 if higher_is_better(metric) else 1
    return next((step for step in steps if step.score is not None and sign * step.score <= sign * score), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every strategy and prints the table and the result."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="deme-search-") as home:
        if options.quick or "DEME_HOME" not in os.environ:
            os.environ["DEME_HOME"] = home
            os.environ.pop("DEME_STORE_URI", None)
        overrides = [*(_QUICK if options.quick else ()), *options.overrides]
        _measure(Laboratory(load_recipe(options.recipe, overrides)))


def _measure(laboratory: Laboratory) -> None:
    experts = laboratory.experts()
    found = {name: search_anew(laboratory, settings) for name, settings in STRATEGIES.items()}
    scores = {
        name: fmean(laboratory.scores((laboratory.merged(experts, result["weights"]),)))
        for name, (result, _) in found.items()
    }
    target, grid_cost = found["grid"][0]["score"], found["grid"][1][-1]
    metric = laboratory.recipe.evaluate.score_names[0]
    rows, ratios, spent = [], {}, {}
    for name, (result, steps) in found.items():
        reached = grid_cost if name == "grid" else cost_to_reach(steps, target, metric=metric)
        ratios[name] = reached.images / grid_cost.images if reached else None
        spent[name] = steps[-1].images / grid_cost.images
        rows.append(
            (
                name,
                f"{reached.images:.0f}" if reached else f"not in {steps[-1].images:.0f}",
                f"{reached.seconds:.0f}" if reached else f"not in {steps[-1].seconds:.0f}",
                f"{ratios[name]:.2f}" if ratios[name] is not None else "",
                f"{spent[name]:.2f}",
                f"{result['score']:.4g}",
                f"{scores[name]:.4g}",
                ", ".join(f"{weight:g}" for weight in result["weights"]),
                ", ".join(f"{rho:+.2f}" for rho in result["rank_correlation"].values()),
            )
        )
    columns = (
        "",
        "images to grid's best",
        "seconds",
        "of the grid",
        "in all",
        "search score",
        "report score",
        "weights",
        "rank ρ",
    )
    title = f"{laboratory.recipe.name}: finding {len(experts)} merge weights by {metric}, {direction([metric])}"
    print_table(title, columns, rows)
    best = min((ratio for name, ratio in ratios.items() if ratio is not None and name != "grid"), default=1.0)
    print_result(
        "search",
        ratio=best,
        goal=_GOAL,
        holds=best <= _GOAL,
        recipe=laboratory.recipe.name,
        images_over_grid=ratios,
        images_spent_over_grid=spent,
        report_scores=scores,
        rank_correlation={name: result["rank_correlation"] for name, (result, _) in found.items()},
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.search", description=__doc__)
    parser.add_argument("--recipe", default="digits", help="a recipe's name or file (default digits)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--quick", action="store_true", help="toy steps: shows that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
