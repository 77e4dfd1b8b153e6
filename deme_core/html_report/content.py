"""What the pages show, as plain data: no page knows where its numbers come from."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deme_core.binned_losses import RelativeLosses
from deme_core.segments import TimestepSegment
from deme_core.verdict import Interval, Verdict

_SMALL = 600  # Pixels.


@dataclass(frozen=True)
class Score:
    """What a row scored by one metric.

    Attributes:
        seeds: mean and interval over sampling seeds.
        images: bootstrap interval over the images; None where nothing was resampled.
        by_seed: one score per sampling seed.
    """

    seeds: Interval
    images: Interval | None
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """How a row's score differs from a baseline's, by one metric.

    Attributes:
        row: whose score it is.
        baseline: whose is subtracted.
        metric: name of the metric.
        seeds: interval over sampling seeds, paired.
        images: bootstrap interval over images, paired; None where nothing was resampled.
        verdict: on the row; None for a metric that does not decide.
    """

    row: str
    baseline: str
    metric: str
    seeds: Interval
    images: Interval | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Picture:
    """A picture inside of the page.

    Attributes:
        uri: a ``data:`` URI.
        width: its width in pixels.
        caption: text under it, such as a prompt.
    """

    uri: str
    width: int
    caption: str | None = None

    @property
    def is_small(self) -> bool:
        """Whether a page is likely to enlarge it, so that pixels should stay sharp."""
        return self.width <= _SMALL


@dataclass(frozen=True)
class Copy:
    """What the gate found of one finetuned copy.

    Attributes:
        segment: what it was finetuned for.
        own_change: relative change of the held-out loss on that segment against the pretrained model's.
        merged: whether it took part in the merge.
        weights: its merge weights: one, or one per block.
    """

    segment: TimestepSegment
    own_change: Interval
    merged: bool
    weights: tuple[float, ...]


@dataclass(frozen=True)
class TriedWeights:
    """A candidate of a search.

    Attributes:
        weights: what was scored.
        score: mean over the search's seeds; None if the images were not finite.
        rough: scored with few sampling steps, on a scale of its own.
    """

    weights: tuple[float, ...]
    score: float | None
    rough: bool


@dataclass(frozen=True)
class SearchLog:
    """What a search tried and what that cost.

    Attributes:
        title: what was searched.
        weight_names: a name for each weight.
        candidates: in the order in which they were proposed.
        rank_correlation: Spearman's, of each proxy with the full scores.
        num_images: images that the scores needed.
        num_losses: held-out losses that the fit and the rank correlation needed.
        higher_is_better: whether scores grow as images get better.
        guards: names of the scores that made a candidate's worse where they were worse than the pretrained model's.
    """

    title: str
    weight_names: tuple[str, ...]
    candidates: tuple[TriedWeights, ...]
    rank_correlation: Mapping[str, float]
    num_images: int
    num_losses: int
    higher_is_better: bool = False
    guards: tuple[str, ...] = ()

    @property
    def num_scores(self) -> int:
        """Scores that were measured, rough ones included; what was asked for twice was measured once."""
        return len({(tried.weights, tried.rough) for tried in self.candidates if tried.score is not None})

    @property
    def num_failed(self) -> int:
        """Candidates whose images were not finite."""
        return len({tried.weights for tried in self.candidates if tried.score is None})


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run cost.

    Attributes:
        stage: first part of its artifacts' keys.
        label: what a person calls it.
        num_jobs: pieces of work.
        num_cached: how many of them the store had already.
        wall_seconds: time during which at least one of them ran.
        worker_seconds: sum of their times.
        num_images: images generated now; none for what the store had.
    """

    stage: str
    label: str
    num_jobs: int
    num_cached: int
    wall_seconds: float
    worker_seconds: float
    num_images: int


@dataclass(frozen=True)
class Provenance:
    """What it takes to do a run again.

    Attributes:
        recipe_name: name of the recipe.
        recipe: the resolved recipe, as YAML.
        commands: lines for a shell.
        versions: by program or package.
        digests: by what they are digests of.
    """

    recipe_name: str
    recipe: str
    commands: tuple[str, ...]
    versions: Mapping[str, str]
    digests: Mapping[str, str]

    @property
    def recipe_uri(self) -> str:
        """The recipe as a file that a browser saves without asking a server."""
        return f"data:application/yaml;base64,{base64.b64encode(self.recipe.encode()).decode()}"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rows that a page compares.

    Attributes:
        metric: name of the metric that decides.
        rows: scores by row and metric.
        differences: those that the page states, the metric that decides first.
        higher_is_better: the metrics that grow as images get better.
        draws_real_images: whether resamples draw the real images, too.
    """

    metric: str
    rows: Mapping[str, Mapping[str, Score]]
    differences: tuple[Difference, ...] = ()
    higher_is_better: frozenset[str] = frozenset()
    draws_real_images: bool = True

    @property
    def deciding(self) -> tuple[Difference, ...]:
        """The differences that carry a verdict."""
        return tuple(difference for difference in self.differences if difference.verdict is not None)

    @property
    def is_resampled(self) -> bool:
        """Whether a row has an interval over images; without one no difference has."""
        return any(by_metric[self.metric].images is not None for by_metric in self.rows.values())

    def lacks_images(self, difference: Difference) -> bool:
        """Whether a difference has no interval over images because one of its rows, and only one, was resampled."""
        ours, theirs = (self.rows[row][difference.metric].images for row in (difference.row, difference.baseline))
        return (ours is None) != (theirs is None)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images that the rows made from the same initial noise.

    Attributes:
        note: what they share.
        rows: the pictures of each row; the n-th of all rows belong together, and share the first row's caption.
    """

    note: str
    rows: Mapping[str, Sequence[Picture]]

    @property
    def lines(self) -> tuple[tuple[Picture, ...], ...]:
        """The pictures that belong together, one of each row."""
        return tuple(zip(*self.rows.values(), strict=False))


@dataclass(frozen=True, kw_only=True)
class HeldoutLosses:
    """Held-out losses by timestep, as changes against the pretrained model's.

    Attributes:
        curves: by row or copy.
        segment_edges: 0, inner edges, T; none to draw no borders.
    """

    curves: Mapping[str, RelativeLosses]
    segment_edges: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """All that the page of one run shows; what a run does not have is left empty.

    Attributes:
        title: the recipe's name, or the model's.
        run: id of the MLflow run.
        finished: when, for people.
        facts: how it was evaluated, by name.
        scores: the rows and what they scored.
        samples: images of the rows.
        heldout: losses by timestep.
        trainings: progress records by training run.
        searches: what was searched.
        copies: what the gate found.
        control_min_snr_gamma: by which the control's loss was weighed; None for all timesteps alike.
        costs: by stage, in the order in which the stages first ended a job.
        seconds: of the run: ``total``, and of it ``storage`` and ``idle``.
        provenance: how to do it again.
    """

    title: str
    run: str
    finished: str
    facts: Mapping[str, str]
    scores: Scores
    samples: Samples
    provenance: Provenance
    costs: tuple[StageCost, ...]
    seconds: Mapping[str, float]
    heldout: HeldoutLosses | None = None
    trainings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
    searches: tuple[SearchLog, ...] = ()
    copies: tuple[Copy, ...] = ()
    control_min_snr_gamma: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One of several runs.

    Attributes:
        label: short name that is unique on the page.
        run: id of the MLflow run.
        recipe: name of its recipe.
        model: what was scored: ``merged``, or where a model came from.
        settings: its recipe's settings by dotted name, as far as they differ among the runs.
    """

    label: str
    run: str
    recipe: str
    model: str
    settings: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ComparisonContent:
    """All that the page of several runs shows.

    Attributes:
        runs: the first is the baseline.
        facts: how all were evaluated, by name.
        scores: by label.
        samples: by label.
        heldout: by label; None if no run has them.
    """

    runs: tuple[ComparedRun, ...]
    facts: Mapping[str, str]
    scores: Scores
    samples: Samples
    heldout: HeldoutLosses | None = None
