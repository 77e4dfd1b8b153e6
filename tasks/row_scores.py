"""What the rows of a run scored, and under which conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deme_core.digests import json_digest
from deme_core.errors import DemeError
from deme_core.verdict import RowScores, differing_conditions, interval, row_intervals
from tasks.jobs import JobResult

Rows = Mapping[str, Sequence[JobResult]]


def scores_by_row(rows: Rows, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Returns the scores of each row, by metric, one per seed; metrics in the order of ``names``, for all tables.

    What comes from the store is sorted.
    """
    return {
        row: {metric: [r.metrics["scores"][metric] for r in results] for metric in names}
        for row, results in rows.items()
    }


def deciding_scores(rows: Rows, metric: str) -> dict[str, RowScores]:
    """Returns what each row scored by ``metric``, the one that decides."""
    return {
        row: RowScores(
            [result.metrics["scores"][metric] for result in results],
            [result.metrics["replicates"] for result in results],
        )
        for row, results in rows.items()
    }


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Returns the mean and the interval over seeds of each metric."""
    return {metric: asdict(interval(values)) for metric, values in scores.items()}


def both_intervals(deciding: Mapping[str, RowScores]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the intervals over seeds and over images of each row."""
    return {row: {k: asdict(v) for k, v in row_intervals(scores).items()} for row, scores in deciding.items()}


def shared_conditions(rows: Rows, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns all that the scores of all rows share.

    Raises:
        DemeError: rows were evaluated under different conditions; names those that differ, with their values.
    """
    conditions = [result.metrics["conditions"] for results in rows.values() for result in results]
    first = conditions[0]
    different = sorted({name for other in conditions for name in differing_conditions(first, other)})
    if different:
        stepped = any(name.startswith("scheduler.timestep_spacing") for name in different)
        mend = "; stored images are of older steps: set evaluate.timestep_spacing to leading, which makes all anew"
        raise DemeError(f"The rows cannot be compared: they differ in {', '.join(different)}{mend if stepped else ''}.")
    return {**first, "seeds": list(seeds)}


def fingerprint(conditions: Mapping[str, Any]) -> str:
    """Returns the digest of evaluation conditions: only scores with the same one can be compared."""
    return json_digest(conditions)
