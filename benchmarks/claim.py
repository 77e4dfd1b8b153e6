"""Does the claim hold: is a merged model better than the pretrained one, and than the control of equal steps?

A small laboratory. A cell is one training seed under one setting, with a row for each way to merge; every stage of it
is an artifact, so that to resume, or to add cells, the same command does only what is missing. A training seed seeds
every finetuning and, unless all share one, the pretraining. It moves a score more than the sampling seed does (METHOD
section 5.2), but where training seeds share sampling seeds and a pretrained model, they share its luck: so a row is
judged by the intervals over training seeds, over sampling seeds, and over resampled images, which must agree. None of
them sees the luck of a shared pretrained model: the claim is then about that model alone (docs/science.md has a gain
that another gave with two training seeds of three), and ``--set pretrained.training.seed=N`` asks another.
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
from deme_core import verdict
from deme_core.metrics import direction, higher_is_better
from deme_core.recipe_file import load_recipe
from deme_core.rows import BASELINES
from deme_core.verdict import Interval, RowScores, interval


def run_cells(options: argparse.Namespace) -> dict[str, list[Cell]]:
    """Returns the cells of each setting, one per training seed, and prints each setting's table as it is done."""
    cells = {}
    # All of them first: a setting that is none is told before any work, not after that of the settings before it.
    recipes = {name: [_recipe(options, name, seed) for seed in options.seeds] for name in options.ablations}
    for name, of_seeds in recipes.items():
        cells[name] = [
            run_cell(recipe, options.merges, soup=options.soup, device=options.device) for recipe in of_seeds
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


def differences(cells: Sequence[Cell], row: str, baseline: str) -> dict[str, Interval]:
    """Returns row minus baseline, the mean over all cells, with the interval over each thing that was drawn.

    ``training seeds`` are the cells; without a second one there is no such interval. ``sampling seeds`` are those that
    all cells share, and ``images`` theirs, if they were resampled: what the baseline's images have of luck is in both,
    and in the first only if each training seed has a baseline of its own.
    """
    rows, baselines = ([cell.scores[name] for cell in cells] for name in (row, baseline))
    by_seed = [
        [ours - theirs for ours, theirs in zip(a.by_seed, b.by_seed, strict=True)]
        for a, b in zip(rows, baselines, strict=True)
    ]
    found = {"training seeds": interval([fmean(cell) for cell in by_seed])} if len(cells) > 1 else {}
    found["sampling seeds"] = interval([fmean(seed) for seed in zip(*by_seed, strict=True)])
    together = verdict.differences(_together(rows), _together(baselines))
    return found | ({"images": together["images"]} if "images" in together else {})


def _together(rows: Sequence[RowScores]) -> RowScores:
    """Returns the scores of several training seeds as one row: resample b of a sampling seed is the same in all."""
    return RowScores(
        [score for row in rows for score in row.by_seed], [seed for row in rows for seed in row.replicates]
    )


def print_setting(name: str, cells: Sequence[Cell], training_seeds: Sequence[int]) -> None:
    """Prints what every row scored, against both baselines, and with which weights; then the same of other metrics."""
    rows = sorted(cells[0].scores, key=lambda row: (row not in (*BASELINES, "ensemble"), row.startswith("merged")))
    lines = []
    for row in rows:
        means = [f"{fmean(cell.scores[row].by_seed):.4g}" for cell in cells]
        losses = [cell.heldout[row] for cell in cells if row in cell.heldout]
        found = [cell.weights[row] for cell in cells if row in cell.weights]
        weights = "; ".join(", ".join(f"{w:.3g}" for w in each[:8]) for each in found)
        changes = [cell.loss_changes[row] for cell in cells if row in cell.loss_changes]
        by_segment = ", ".join(f"{fmean(each):+.1%}" for each in zip(*changes, strict=True))
        lines.append((row, *means, f"{fmean(losses):.6f}" if losses else "", by_segment, weights))
    metric = cells[0].metric
    columns = ("row", *(f"seed {seed}" for seed in training_seeds), "held-out loss", "by segment", "weights")
    print_table(f"{name}: {metric}, {direction([metric])}", columns, lines)
    pairs = [(row, base) for base in BASELINES for row in rows if row not in BASELINES[: BASELINES.index(base) + 1]]
    compared = [(row, base, differences(cells, row, base)) for row, base in pairs]
    print_table(
        f"{name}: {metric}, differences, with 95 % intervals over what was drawn",
        ("row", "minus", "mean", *compared[0][2], "beyond all"),
        [
            (row, base, f"{next(iter(found.values())).mean:+.3g}", *map(_text, found.values()), _beyond_all(found))
            for row, base, found in compared
        ],
    )
    for others in zip(*(cell.others for cell in cells), strict=True):
        print_setting(name, others, training_seeds)


def _text(difference: Interval) -> str:
    return f"{difference.low:+.3g} to {difference.high:+.3g}"


def _beyond_all(found: Mapping[str, Interval]) -> str:
    """Returns on which side of zero all intervals lie; nothing if they do not agree."""
    if all(difference.high < 0 for difference in found.values()):
        return "lower"
    return "higher" if all(difference.low > 0 for difference in found.values()) else ""


def outcome(cells: Sequence[Cell]) -> dict[str, Any]:
    """Returns whether the claim holds of the first way to merge of a setting's cells, and what that rests on.

    It holds if all intervals say so, and there are at least two training seeds.
    """
    first = cells[0]
    row = next(row for row in first.scores if row.startswith("merged"))
    better = "higher" if higher_is_better(first.metric) else "lower"
    means = {name: [fmean(cell.scores[name].by_seed) for cell in cells] for name in first.scores}
    return {
        "ratio": sum(means[row]) / sum(means["finetuned"]),
        "goal": 1.0,
        "holds": len(cells) > 1 and all(_beyond_all(differences(cells, row, base)) == better for base in BASELINES),
        "row": row,
        "metric": first.metric,
        "means": means,
    }


def all_differences(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns each row's differences from each baseline as plain data: row, baseline, what was drawn."""
    return {
        row: {
            base: {drawn: asdict(each) for drawn, each in differences(cells, row, base).items()}
            for base in BASELINES
            if base != row
        }
        for row in cells[0].scores
    }


def print_claim(cells: Mapping[str, Sequence[Cell]], options: Mapping[str, Any]) -> None:
    """Prints the result, which is about the first setting."""
    name, first = next(iter(cells.items()))
    by_setting = {setting: all_differences(found) for setting, found in cells.items()}
    print_result("claim", **outcome(first), setting=name, differences=by_setting, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Does the cells, prints the tables and the result."""
    options = _options(arguments)
    if options.quick:
        with _temporary_home():
            options.overrides = [*QUICK_OVERRIDES, *options.overrides]
            cells = run_cells(options)
    else:
        cells = run_cells(options)
    if options.same_pretrained:
        print("All of it is about one pretrained model; --set pretrained.training.seed=N asks another.")
    settings = {"recipe": options.recipe, "overrides": options.overrides, "same_pretrained": options.same_pretrained}
    print_claim(cells, settings | {"training_seeds": options.seeds})


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
