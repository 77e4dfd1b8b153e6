"""The flow ``deme-compare``: several runs in one table, if they were evaluated alike."""

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from deme_core.errors import InputError
from deme_core.settings import Settings
from deme_core.verdict import compare, differing_conditions
from tasks.tracking import check_tracking, find_report

Runs = Annotated[
    list[str],
    Field(min_length=2, description="Ids of MLflow runs of deme/full, or their beginnings; the first is the baseline."),
]


@flow(name="deme-compare")
def compare_runs(runs: Runs) -> dict[str, Any]:
    """Puts the merged models of several runs side by side.

    Args:
        runs: ids of MLflow runs of deme/full, or their beginnings; the first is what the others are compared with.

    Returns:
        Per run: its scores, and the verdict on its merged model against the first run's.
    """
    table = compare_reports(runs)
    create_table_artifact(
        key="comparison",
        table=[{"run": run, **row} for run, row in table.items()],
        description="Merged models; lower is better.",
    )
    return table


def compare_reports(runs: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the rows of the comparison.

    Raises:
        InputError: a run is unknown, or was evaluated under other conditions; names those that differ.
    """
    settings = Settings()
    check_tracking(settings)
    reports = {run: find_report(settings, run=run) for run in runs}
    first = reports[runs[0]]
    metric = next(iter(first["rows"]["merged"]))
    table = {}
    for run, report in reports.items():
        if different := differing_conditions(first["conditions"], report["conditions"]):
            raise InputError(f"Runs {runs[0]} and {run} cannot be compared: they differ in {', '.join(different)}.")
        scores = {
            name: f"{bounds['mean']:.4g} ({bounds['low']:.4g} to {bounds['high']:.4g})"
            for name, bounds in report["rows"]["merged"].items()
        }
        verdict = (
            "baseline"
            if run == runs[0]
            else compare(report["scores"]["merged"][metric], first["scores"]["merged"][metric])
        )
        table[run] = {
            "recipe": report["recipe"],
            **scores,
            "verdict": verdict,
            "weights": str(report["merged"]["weights"]),
        }
    return table
