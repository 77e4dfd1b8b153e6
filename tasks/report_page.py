"""The page of a run: what it shows, where it is kept."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deme_core.binned_losses import RelativeLosses
from deme_core.html_report import run_page
from deme_core.html_report.content import (
    Copy,
    HeldoutLosses,
    Provenance,
    RunContent,
    SearchLog,
    TriedWeights,
)
from deme_core.html_report.sentences import headline
from deme_core.metrics import higher_is_better
from deme_core.recipe_file import dump_recipe
from deme_core.rows import BASELINES, ROWS
from deme_core.verdict import RowScores
from tasks.experts import Expert
from tasks.page_samples import image_prompts, page_samples
from tasks.page_scores import evaluation_facts, page_scores
from tasks.provenance import evaluation_digests, model_digests, versions
from tasks.report_figures import report_folder
from tasks.row_scores import Rows
from tasks.run_page import PAGE_NAME, REPORT_STAGE
from tasks.run_results import CONTROL, EXPERTS, RunResults
from tasks.runtime import Runtime
from tasks.tracked_runs import REPORT_TAG

_PROXIES = {"heldout_loss": "held-out loss", "few_steps": "score of few steps"}
_SEARCHED = {EXPERTS: "Merge weights", CONTROL: "Scale of the control"}


def page_of_run(
    runtime: Runtime,
    report: Mapping[str, Any],
    results: RunResults,
    deciding: Mapping[str, RowScores],
    relative: Mapping[str, RelativeLosses],
    grids: Mapping[str, Path],
) -> RunContent:
    """Returns what the page of a run of the whole method shows.

    Args:
        runtime: of the run.
        report: the numbers.
        results: what the stages left behind.
        deciding: what each row scored by the metric that decides.
        relative: held-out losses by row and copy.
        grids: sample grids by row.
    """
    pairs = [(row, baseline) for row in ("merged", "distilled") if row in results.rows for baseline in BASELINES]
    command = f"deme run {recipe_file(runtime)}"
    content = page_of_rows(runtime, report, deciding, grids, title=runtime.recipe.name, command=command, pairs=pairs)
    segments = [expert.segment for expert in results.experts]
    search = runtime.recipe.merge.search
    guards = search.guards if search else ()
    digests = model_digests(runtime.artifacts, results.models, results.trainings)
    return replace(
        content,
        provenance=replace(content.provenance, digests={**content.provenance.digests, **digests}),
        heldout=HeldoutLosses(curves=_ordered(relative), segment_edges=(segments[0].low, *(s.high for s in segments))),
        trainings=results.histories,
        searches=tuple(
            _search_log(what, found, results.experts, report["metric"], guards)
            for what, found in results.searches.items()
        ),
        copies=_copies(results.experts, report["merged"]["weights"]),
        control_min_snr_gamma=runtime.recipe.finetune.for_control(1).min_snr_gamma,
    )


def page_of_rows(
    runtime: Runtime,
    report: Mapping[str, Any],
    deciding: Mapping[str, RowScores],
    grids: Mapping[str, Path],
    *,
    title: str,
    command: str,
    pairs: Sequence[tuple[str, str]] = (),
) -> RunContent:
    """Returns what the page of any evaluation shows.

    Args:
        runtime: of the run.
        report: the numbers.
        deciding: what each row scored by the metric that decides.
        grids: sample grids by row.
        title: what was evaluated.
        command: does it again, from the `recipe_file`.
        pairs: rows and the baselines that they are compared with.
    """
    name, seed = runtime.recipe.name, report["seeds"][0]
    return RunContent(
        title=title,
        run=runtime.tracker.run_id,
        finished=f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC",
        facts=evaluation_facts(report),
        scores=page_scores(
            report["scores"], deciding, report["metric"], pairs, draws_real_images=report["draws_real_images"]
        ),
        samples=page_samples(grids, seed, report["conditions"], image_prompts(runtime, report["conditions"])),
        provenance=Provenance(
            recipe_name=name,
            recipe=dump_recipe(runtime.recipe),
            commands=(
                "# With the same DEME_STORE_URI nothing is computed again.",
                command,
            ),
            versions=versions(),
            digests=evaluation_digests(report),
        ),
        costs=runtime.timing.costs(),
        seconds=report["seconds"],
    )


def recipe_file(runtime: Runtime) -> str:
    """Name of the file that the page calls its recipe."""
    return f"{runtime.recipe.name}.yaml"


def keep_page(runtime: Runtime, content: RunContent, report: Mapping[str, Any], rows: Rows) -> dict[str, str]:
    """Writes the page into the report's folder, logs it to MLflow, and publishes the folder as an artifact.

    Returns:
        ``path`` of the page, and ``uri`` of the artifact.
    """
    folder, run_id = report_folder(runtime), runtime.tracker.run_id
    (folder / PAGE_NAME).write_text(run_page(content), encoding="utf-8")
    runtime.tracker.log_file(run_id, folder / PAGE_NAME)
    ref, _ = runtime.artifacts.publish(
        REPORT_STAGE,
        run_id,
        folder,
        settings=runtime.recipe.model_dump(mode="json"),
        inputs={f"{row}-{r.metrics['seed']}": r.ref.digest for row, results in rows.items() for r in results},
        metrics=report,
    )
    runtime.tracker.set_tags(run_id, {REPORT_TAG: ref.uri})
    if sentence := headline(content.scores.differences, content.copies):
        runtime.tracker.describe(run_id, sentence)
    return {"path": str(folder / PAGE_NAME), "uri": ref.uri}


def _ordered(curves: Mapping[str, RelativeLosses]) -> dict[str, RelativeLosses]:
    """Returns the rows in the order of the table, then the copies: what is drawn later lies above."""
    rows = [row for row in ROWS if row in curves]
    return {name: curves[name] for name in [*rows, *(name for name in curves if name not in rows)]}


def _search_log(
    what: str, found: Mapping[str, Any], experts: Sequence[Expert], metric: str, guards: tuple[str, ...]
) -> SearchLog:
    candidates = tuple(TriedWeights(tuple(c["weights"]), c["score"], c["rough"]) for c in found["candidates"])
    num_weights = len(candidates[0].weights)
    merged = [f"segment {i} {expert.segment}" for i, expert in enumerate(experts) if expert.merged]
    return SearchLog(
        title=_SEARCHED[what],
        weight_names=("scale",) if what == CONTROL else _weight_names(merged, num_weights),
        candidates=candidates,
        rank_correlation={_PROXIES[name]: rho for name, rho in found["rank_correlation"].items()},
        num_images=found["num_images"],
        num_losses=found["num_losses"],
        higher_is_better=higher_is_better(metric),
        guards=guards,
    )


def _weight_names(merged: Sequence[str], num_weights: int) -> tuple[str, ...]:
    """Returns a name for each weight: one per merged copy, or one per block of each."""
    each = num_weights // len(merged)
    if each == 1:
        return tuple(merged)
    return tuple(f"{name}, block {block}" for name, block in itertools.product(merged, range(each)))


def _copies(experts: Sequence[Expert], weights: Sequence[float]) -> tuple[Copy, ...]:
    each = len(weights) // len(experts)
    return tuple(
        Copy(expert.segment, expert.own_change, expert.merged, tuple(weights[i * each : (i + 1) * each]))
        for i, expert in enumerate(experts)
    )
