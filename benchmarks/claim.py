"""Does the claim hold: is a merged model better than the pretrained one, and than the control of equal steps?

A small laboratory. A cell is one training seed under one setting, with a row for each way to merge; every stage of it
is an artifact, so that to resume, or to add cells, the same command does only what is missing. The training seed moves
a score more than the sampling seed does (METHOD section 5.2), so a row is judged by a t interval over the training
seeds' mean paired differences. A training seed seeds every finetuning and, unless all share one, the pretraining.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import fmean
from typing import Any

from benchmarks.claim_cell import ABLATIONS, MERGES, Cell, ablation_overrides, run_cell
from benchmarks.measurement import QUICK_OVERRIDES, print_result, print_table
from deme_core.metrics import direction, higher_is_better
from deme_core.recipe_file import load_recipe
from deme_core.verdict import Interval, interval, paired_difference

BASELINES = ("pretrained", "finetuned")


def run_cells(options: argparse.Namespace) -> dict[str, list[Cell]]:
    """Returns the cells of each setting, one per training seed, and prints each setting's table as it is done."""
    cells = {}
    for name in options.ablations:
        cells[name] = [
            run_cell(_recipe(options, name, seed), options.merges, soup=options.soup, device=options.device)
            for seed in options.seeds
        ]
        print_setting(name, cells[name], options.seeds)
    return cells


def _recipe(options: argparse.Namespace, ablation: str, seed: int) -> Any:
    plain = load_recipe(options.recipe, options.overrides)
    seeds = [f"finetune.seed={seed}"]
    if plain.pretrained.source == "pretrain" and not options.same_pretrained:
        seeds.append(f"pretrained.training.seed={seed}")
    if plain.distill:
        seeds.append(f"distill.seed={seed}")
    return load_recipe(options.recipe, [*options.overrides, *ablation_overrides(plain, ablation), *seeds])


def over_training_seeds(cells: Sequence[Cell], row: str, baseline: str) -> Interval:
    """Returns row minus baseline: the mean over training seeds of each one's mean paired difference, and its interval.

    With a single training seed the interval is that over its sampling seeds, which leaves out what training moves.
    """
    differences = [paired_difference(cell.scores[row], cell.scores[baseline]) for cell in cells]
    return interval([difference.mean for difference in differences]) if len(cells) > 1 else differences[0]


def print_setting(name: str, cells: Sequence[Cell], training_seeds: Sequence[int]) -> None:
    """Prints what every row scored, against both baselines, and with which weights; then the same of other metrics."""
    rows = sorted(cells[0].scores, key=lambda row: (row not in (*BASELINES, "ensemble"), row.startswith("merged")))
    lines = []
    for row in rows:
        differences = ["" if row == base else _text(over_training_seeds(cells, row, base)) for base in BASELINES]
        means = [f"{fmean(cell.scores[row]):.4g}" for cell in cells]
        losses = [cell.heldout[row] for cell in cells if row in cell.heldout]
        weights = "; ".join(", ".join(f"{w:.3g}" for w in cell.weights.get(row, ())[:8]) for cell in cells)
        lines.append((row, *means, *differences, f"{fmean(losses):.6f}" if losses else "", weights))
    metric = cells[0].metric
    columns = ("row", *(f"seed {seed}" for seed in training_seeds), *(f"- {base}" for base in BASELINES))
    title = f"{name}: {metric}, {direction([metric])}; differences with 95 % intervals over training seeds"
    print_table(title, (*columns, "held-out loss", "weights"), lines)
    for others in zip(*(cell.others for cell in cells), strict=True):
        print_setting(name, others, training_seeds)


def _text(difference: Interval) -> str:
    return f"{difference.mean:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"


def print_claim(cells: Mapping[str, Sequence[Cell]], options: Mapping[str, Any]) -> None:
    """Prints the result: the first way to merge under the first setting is the one that the claim is about."""
    name, first = next(iter(cells.items()))
    row = next(row for row in first[0].scores if row.startswith("merged"))
    sign = -1.0 if higher_is_better(first[0].metric) else 1.0
    decisive = {base: over_training_seeds(first, row, base) for base in BASELINES}
    means = {row: [fmean(cell.scores[row]) for cell in first] for row in first[0].scores}
    print_result(
        "claim",
        ratio=sum(means[row]) / sum(means["finetuned"]),
        goal=1.0,
        holds=all(max(sign * found.low, sign * found.high) < 0 for found in decisive.values()),
        row=row,
        setting=name,
        metric=first[0].metric,
        means=means,
        differences={
            setting: {
                row: {base: asdict(over_training_seeds(found, row, base)) for base in BASELINES if base != row}
                for row in found[0].scores
            }
            for setting, found in cells.items()
        },
        **options,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Does the cells, prints the tables and the result."""
    options = _options(arguments)
    if options.quick:
        with _temporary_home():
            options.overrides = [*QUICK_OVERRIDES, *options.overrides]
            cells = run_cells(options)
    else:
        cells = run_cells(options)
    print_claim(cells, {"recipe": options.recipe, "training_seeds": options.seeds})


@contextmanager
def _temporary_home() -> Iterator[None]:
    """Keeps toy numbers out of the user's store; works once, before any settings are read."""
    os.environ.pop("DEME_STORE_URI", None)
    with tempfile.TemporaryDirectory(prefix="deme-claim-", ignore_cleanup_errors=True) as home:
        os.environ["DEME_HOME"] = home
        yield


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.claim", description=__doc__)
    parser.add_argument("--recipe", default="digits", help="a recipe's name or file (default digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default 0 1 2)")
    parser.add_argument(
        "--merges", nargs="+", default=["cma_es"], choices=MERGES, help="ways to merge; the claim is about the first"
    )
    parser.add_argument(
        "--ablations", nargs="+", default=["none"], choices=ABLATIONS, help="settings; the claim is about the first"
    )
    parser.add_argument("--same-pretrained", action="store_true", help="training seeds share one pretrained model")
    parser.add_argument("--soup", action="store_true", help="a row of N copies of all timesteps, merged with a search")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models are (default cpu)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--quick", action="store_true", help="toy steps in a temporary home: shows that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
