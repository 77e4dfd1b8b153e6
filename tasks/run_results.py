"""All that a run of the whole method found, as its report takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.experts import Expert
from tasks.jobs import JobResult
from tasks.row_scores import Rows

# What is merged, and searched for before.
EXPERTS, CONTROL = "experts", "control"


@dataclass(frozen=True)
class RunResults:
    """What the stages of a run left behind.

    Attributes:
        rows: scores by row, one result per sampling seed.
        models: ``pretrained``, ``finetuned`` (the control, scaled), ``merged``, and ``distilled`` if the recipe asks.
        trainings: the control's, under ``finetuned``, the copies', by name, and ``distilled``; a copy from elsewhere
            has no history.
        losses: held-out losses of the models.
        expert_losses: held-out losses of the copies.
        experts: the copies and what the gate said.
        searches: what each search found, by what was searched: `EXPERTS` and `CONTROL`.
    """

    rows: Rows
    models: Mapping[str, JobResult]
    trainings: Mapping[str, JobResult]
    losses: Mapping[str, JobResult]
    expert_losses: Sequence[JobResult]
    experts: Sequence[Expert]
    searches: Mapping[str, Mapping[str, Any]]

    @property
    def histories(self) -> dict[str, Any]:
        """The records of what was trained here, by name of the training."""
        histories = {name: result.metrics["history"] for name, result in self.trainings.items()}
        return {name: history for name, history in histories.items() if history}

    @property
    def scale(self) -> float:
        """The scale of the control's task vector."""
        return float(self.models["finetuned"].metrics["weights"][0])
