"""The gate before the merge: is each copy better than the pretrained model on its own segment?"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from deme_core.binned_losses import (
    Losses,
    RelativeLosses,
    ensemble_losses,
    load_losses,
    own_change,
    relative_losses,
)
from deme_core.errors import BadExpertError
from deme_core.manifest import ArtifactRef
from deme_core.segments import TimestepSegment
from deme_core.verdict import Interval
from tasks.jobs import JobResult
from tasks.runtime import Runtime, current_runtime


@dataclass(frozen=True)
class Expert:
    """One finetuned copy and what the gate says of it.

    Attributes:
        segment: what it was finetuned for.
        ref: its artifact.
        own_change: relative change of the held-out loss on its segment, against the pretrained model's.
        merged: whether it takes part in the merge.
    """

    segment: TimestepSegment
    ref: ArtifactRef
    own_change: Interval
    merged: bool

    def sentence(self) -> str:
        """Returns what the gate says."""
        change = self.own_change
        return (
            f"The copy for {self.segment} changes the held-out loss on its own segment by {change.mean:+.2%} "
            f"({change.low:+.2%} to {change.high:+.2%}){'' if self.merged else ' and is left out of the merge'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for the report."""
        return {
            "segment": [self.segment.low, self.segment.high],
            "own_change": asdict(self.own_change),
            "merged": self.merged,
        }


@task(name="judge experts", task_run_name="judge experts", cache_policy=NO_CACHE)
def judge_experts(
    segments: Sequence[TimestepSegment],
    experts: Sequence[ArtifactRef],
    expert_losses: Sequence[JobResult],
    pretrained_losses: JobResult,
) -> list[Expert]:
    """Compares each copy with the pretrained model on its own segment, and decides which ones are merged.

    Raises:
        BadExpertError: a copy is not better, and merge.on_bad_expert is fail.
    """
    runtime, logger = current_runtime(), get_run_logger()
    policy = runtime.recipe.merge.on_bad_expert
    edges = pretrained_losses.metrics["edges"]
    before = losses_of(runtime, pretrained_losses)
    judged = []
    for segment, ref, result in zip(segments, experts, expert_losses, strict=True):
        change = own_change(losses_of(runtime, result), before, edges, segment)
        judged.append(judge(segment, ref, change, policy))
        logger.log(logging.INFO if change.mean < 0 else logging.WARNING, judged[-1].sentence())
    return judged


def judge(segment: TimestepSegment, ref: ArtifactRef, change: Interval, policy: str) -> Expert:
    """Decides about one copy: it is bad unless its held-out loss on its own segment fell.

    Raises:
        BadExpertError: it is bad, and the policy is fail.
    """
    expert = Expert(segment, ref, change, merged=change.mean < 0 or policy == "keep")
    if change.mean >= 0 and policy == "fail":
        raise BadExpertError(f"{expert.sentence()}; train it longer, or set merge.on_bad_expert to drop or keep.")
    return expert


def losses_of(runtime: Runtime, result: JobResult) -> Losses:
    """Returns the held-out losses (images, bins) of a model."""
    return load_losses(runtime.fetch(result.ref))


def relative_heldout_losses(
    runtime: Runtime, rows: Mapping[str, JobResult], copies: Sequence[JobResult], experts: Sequence[Expert]
) -> dict[str, RelativeLosses]:
    """Returns the held-out loss of every row and every copy per timestep bin, relative to the pretrained model's.

    Args:
        runtime: to fetch them.
        rows: the losses of pretrained, finetuned and merged, and of distilled where the recipe distills.
        copies: the losses of the copies, which make those of the ensemble.
        experts: the copies' segments.
    """
    edges = rows["pretrained"].metrics["edges"]
    of_rows = {row: losses_of(runtime, result) for row, result in rows.items()}
    of_copies = [losses_of(runtime, result) for result in copies]
    before = of_rows.pop("pretrained")
    of_rows["ensemble"] = ensemble_losses(of_copies, edges, [expert.segment for expert in experts])
    of_rows |= {f"segment {i} {e.segment}": of_copies[i] for i, e in enumerate(experts)}
    return {row: relative_losses(losses, before, edges) for row, losses in of_rows.items()}


def weights_of_merged(experts: Sequence[Expert], weights: Sequence[float]) -> tuple[float, ...]:
    """Returns of one weight per expert those of the merged ones."""
    return tuple(weight for weight, expert in zip(weights, experts, strict=True) if expert.merged)


def spread_weights(experts: Sequence[Expert], weights: Sequence[float]) -> list[float]:
    """Returns the weights of all experts from those of the merged ones: a dropped one has 0.

    Args:
        experts: all of them.
        weights: of the merged ones, one or several each; none for the plain average.
    """
    num_merged = sum(expert.merged for expert in experts)
    if num_merged == 0:
        return [0.0] * len(experts)
    each = len(weights) // num_merged
    remaining = iter(weights or [1.0 / num_merged] * num_merged)
    return [next(remaining) if expert.merged else 0.0 for expert in experts for _ in range(max(each, 1))]
