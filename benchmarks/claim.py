"""Does the claim hold: is the merged model better than the pretrained one, and than the control of equal steps?

The whole flow runs once per training seed, which seeds the pretraining and every finetuning. The training seed moves
a score more than the sampling seed does (METHOD section 5.2), so the claim is judged by a t interval over the
training seeds' mean paired differences. Stages are kept in the store: to resume, run the same command.
"""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from benchmarks.measurement import print_result, print_table
from deme_core.metrics import direction, higher_is_better
from deme_core.recipe_file import load_recipe
from deme_core.verdict import Interval, interval, paired_difference

BASELINES = ("pretrained", "finetuned")
_QUICK_OVERRIDES = (
    "dataset.num_images=96",
    "pretrained.training.num_steps=10",
    "finetune.num_steps=3",
    "merge.search.max_candidates=5",
    "merge.search.num_images=8",
    "merge.search.num_reference_images=32",
    "evaluate.num_images=8",
    "evaluate.seeds=[1, 2, 3]",
    "evaluate.num_inference_steps=2",
    "evaluate.extractor_resolution=32",
    "evaluate.kid_subset_size=4",
)


@dataclass(frozen=True)
class Comparison:
    """Merged against one baseline; a difference is merged minus baseline, below zero where merging helped.

    Attributes:
        by_training_seed: of each training seed, the mean over its sampling seeds and its t interval.
        over_training_seeds: mean of those means and its t interval: what the claim is judged by.
        over_all_seeds: t interval as if every training seed x sampling seed were drawn by itself; too narrow.
        verdicts: how many training seeds were judged better, worse, too close to call.
    """

    by_training_seed: list[Interval]
    over_training_seeds: Interval
    over_all_seeds: Interval
    verdicts: dict[str, int]


def compare_rows(reports: Sequence[dict[str, Any]], baseline: str, metric: str) -> Comparison:
    """Compares merged with ``baseline`` in the reports of the training seeds."""
    merged, other = ([report["scores"][row][metric] for report in reports] for row in ("merged", baseline))
    by_training_seed = [paired_difference(*scores) for scores in zip(merged, other, strict=True)]
    return Comparison(
        by_training_seed=by_training_seed,
        over_training_seeds=interval([difference.mean for difference in by_training_seed]),
        over_all_seeds=paired_difference(list(chain(*merged)), list(chain(*other))),
        verdicts=dict(Counter(report["verdict"][f"vs_{baseline}"] for report in reports)),
    )


def run_flows(recipe: str, training_seeds: Sequence[int], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the flow once per training seed and returns the reports."""
    from flows.decouple_then_merge import deme  # Reads DEME_HOME.

    pretrains = load_recipe(recipe, overrides).pretrained.source == "pretrain"
    reports = []
    for seed in training_seeds:
        seeds = [f"finetune.seed={seed}", *([f"pretrained.training.seed={seed}"] if pretrains else [])]
        reports.append(deme(recipe=recipe, overrides=[*overrides, *seeds]))
    return reports


def print_claim(reports: Sequence[dict[str, Any]], training_seeds: Sequence[int]) -> None:
    """Prints a table per metric, and the result for the first metric, which decides."""
    metrics = list(reports[0]["rows"]["merged"])
    for metric in metrics:
        _print_metric(reports, training_seeds, metric)
    primary = metrics[0]
    means = {row: [report["rows"][row][primary]["mean"] for report in reports] for row in reports[0]["rows"]}
    comparisons = {row: compare_rows(reports, row, primary) for row in BASELINES}
    ratio = sum(means["merged"]) / sum(means["finetuned"])
    print_result(
        "claim",
        ratio=1 / ratio if higher_is_better(primary) else ratio,
        goal=1.0,
        holds=all(_is_better(comparison.over_training_seeds, primary) for comparison in comparisons.values()),
        recipe=reports[0]["recipe"],
        metric=primary,
        training_seeds=list(training_seeds),
        sampling_seeds=reports[0]["seeds"],
        num_images=reports[0]["num_images"],
        means=means,
        **{f"vs_{row}": asdict(comparison) for row, comparison in comparisons.items()},
    )


def _print_metric(reports: Sequence[dict[str, Any]], training_seeds: Sequence[int], metric: str) -> None:
    rows = list(reports[0]["rows"])
    comparisons = [compare_rows(reports, row, metric) for row in BASELINES]
    lines = []
    for index, (seed, report) in enumerate(zip(training_seeds, reports, strict=True)):
        means = [f"{report['rows'][row][metric]['mean']:.4g}" for row in rows]
        lines.append((str(seed), *means, *(_text(c.by_training_seed[index]) for c in comparisons)))
    averages = [sum(report["rows"][row][metric]["mean"] for report in reports) / len(reports) for row in rows]
    over_training_seeds = [_text(c.over_training_seeds) for c in comparisons]
    lines.append(("over training seeds", *(f"{average:.4g}" for average in averages), *over_training_seeds))
    lines.append(("over all seeds", *([""] * len(rows)), *(_text(c.over_all_seeds) for c in comparisons)))
    if metric == next(iter(reports[0]["rows"]["merged"])):
        verdicts = [", ".join(f"{count} {verdict}" for verdict, count in c.verdicts.items()) for c in comparisons]
        lines.append(("verdicts", *([""] * len(rows)), *verdicts))
    title = f"{reports[0]['recipe']}: {metric}, {direction([metric])}; differences with 95 % intervals"
    print_table(title, ("training seed", *rows, *(f"merged - {row}" for row in BASELINES)), lines)


def _is_better(difference: Interval, metric: str) -> bool:
    return difference.low > 0 if higher_is_better(metric) else difference.high < 0


def _text(difference: Interval) -> str:
    return f"{difference.mean:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the flows, prints the tables and the result."""
    options = _options(arguments)
    if options.quick:
        with _temporary_home():
            reports = run_flows(options.recipe, options.seeds, [*_QUICK_OVERRIDES, *options.overrides])
    else:
        reports = run_flows(options.recipe, options.seeds, options.overrides)
    print_claim(reports, options.seeds)


@contextmanager
def _temporary_home() -> Iterator[None]:
    """Keeps toy numbers out of the user's store and tracking; works once, before flows is imported."""
    for name in ("DEME_STORE_URI", "MLFLOW_TRACKING_URI", "PREFECT_HOME"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="deme-claim-", ignore_cleanup_errors=True) as home:
        os.environ["DEME_HOME"] = home
        yield


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.claim", description=__doc__)
    parser.add_argument("--recipe", default="digits", help="a recipe's name or file (default digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default 0 1 2)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--quick", action="store_true", help="toy steps in a temporary home: shows that it runs")
    options = parser.parse_args(arguments)
    if len(set(options.seeds)) < 2:
        parser.error("an interval over training seeds needs at least two of them")
    return options


if __name__ == "__main__":
    main()
