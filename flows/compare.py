"""The flow ``deme-compare``: several runs in one table, if they were evaluated alike."""

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from deme_core.metrics import direction
from tasks.comparison import comparable_reports, comparison_table

Runs = Annotated[
    list[str],
    Field(min_length=2, description="MLflow run ids of deme/full or deme-evaluate; the first is the baseline."),
]


@flow(name="deme-compare")
def compare_runs(runs: Runs) -> dict[str, Any]:
    """Puts the models of several runs side by side.

    Args:
        runs: ids of MLflow runs, or their beginnings; the first is what the others are compared with.

    Returns:
        Per run: its scores, and the verdict on its model against the first run's.
    """
    table = comparison_table(comparable_reports(runs))
    create_table_artifact(
        key="comparison",
        table=[{"run": run, **row} for run, row in table.items()],
        description=f"In each column {direction(list(next(iter(table.values()))))}.",
    )
    return table
