"""How copies become one model, and how its weights are found."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deme_core.recipe.base import Spec

# At half a minute for each, a week.
_LARGEST_GRID = 20_000
# How far a control may be scaled, whatever bounds the weights of segments: those add up where copies agree, and a
# control that could not even keep what it learnt would lose to any merge.
CONTROL_REACH = 2.0


class SearchSpec(Spec):
    """How merge weights are searched; the control's scale is searched the same way (METHOD section 5.1)."""

    strategy: Literal["grid", "coordinate", "quadratic", "tpe", "cma_es", "gp"] = Field(
        "coordinate",
        description="How candidates are proposed. grid: every combination of values. coordinate: one weight at a time "
        "around the best so far. quadratic: a quadratic fit of the held-out loss, and a few scores along the line to "
        "its minimum. tpe, cma_es, gp: Optuna's TPE, CMA-ES or Gaussian process of the scores, started from that fit.",
    )
    values: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5), min_length=1, description="grid: the candidate values of each weight."
    )
    initial_weight: float | None = Field(
        None,
        gt=0,
        description="Where every weight starts, and the step of the fit; default 1/N, and 1 with regmean and ties. The "
        "control's scale always starts at 1, whatever this says.",
    )
    max_weight: float = Field(
        2.0,
        gt=0,
        description="quadratic, tpe, cma_es, gp: upper bound of each weight; the control's scale may always reach 2.",
    )
    min_weight: float = Field(
        0.0,
        le=0,
        description="tpe, cma_es, gp: lower bound of each weight; the control's scale always has the lower bound 0. A "
        "weight below 0 subtracts what a copy learnt.",
    )
    few_steps: int | None = Field(
        None,
        ge=1,
        description="Score all candidates with so few sampling steps, and only the best in full; must be less than "
        "evaluate.num_inference_steps.",
    )
    survivors: float = Field(0.25, gt=0, le=1, description="few_steps: share of the candidates scored in full.")
    step_size: float = Field(0.25, gt=0, description="coordinate: first step, halved when no step helps.")
    max_candidates: int = Field(
        24,
        ge=2,
        description="Each search scores at most so many candidates, the pretrained model included; must be more than "
        "the number of weights, or with known weights at least their number plus 2. grid ignores it. With few_steps "
        "the full scores of the survivors come on top.",
    )
    num_images: int = Field(500, ge=2, description="Images generated per candidate and seed.")
    seeds: tuple[int, ...] = Field(
        (1001,), min_length=1, description="Sampling seeds, all different; none may be a seed of the report."
    )
    # Left out of a dump where there are none: digests made before there were guards stay.
    guards: tuple[str, ...] = Field(
        (),
        exclude_if=lambda guards: not guards,
        description="Names of scores that shall not become worse than the pretrained model's, as the report names "
        "them, such as fd_pixels_4x4. If one is 5 % worse, the candidate's score counts as worse by 5 % of the "
        "pretrained model's score; several add up.",
    )
    known_weights: tuple[tuple[float, ...], ...] = Field(
        (),
        exclude_if=lambda known: not known,
        description="coordinate, tpe, cma_es, gp: weights that earlier searches found, lowest timesteps first. They "
        "are scored in the first batch and count as candidates; coordinate goes on from the best, cma_es around the "
        "first.",
    )
    known_scales: tuple[float, ...] = Field(
        (),
        exclude_if=lambda known: not known,
        description="The same for the control's scale. known_weights and known_scales must be given together, or the "
        "control would start behind.",
    )
    num_reference_images: int | None = Field(
        None, ge=2, description="Real images set aside for the search alone; default half of the data set."
    )

    @model_validator(mode="after")
    def _distinct_seeds(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ from one another: one seed makes the same images twice")
        return self

    @model_validator(mode="after")
    def _known_to_both(self) -> Self:
        if not self.known_weights and not self.known_scales:
            return self
        if not (self.known_weights and self.known_scales):
            raise ValueError(
                "give known_weights and known_scales, or neither: a report has both, as merged.weights and "
                "finetuned.scale"
            )
        if self.strategy in ("grid", "quadratic"):
            raise ValueError(f"strategy '{self.strategy}' takes no known_weights: it goes its own way")
        bounds = [(self.known_scales, 0.0, max(self.max_weight, CONTROL_REACH))]
        if self.strategy != "coordinate":
            bounds += [(known, self.min_weight, self.max_weight) for known in self.known_weights]
        for known, low, high in bounds:
            if not all(low <= weight <= high for weight in known):
                raise ValueError(f"the known {list(known)} are not all in [{low:g}, {high:g}], where the search looks")
        return self

    def shortcoming(self, num_weights: int) -> str | None:
        """Returns why so many weights cannot be searched: with too small a budget, or on too large a grid."""
        if num_known := max(len(self.known_weights), len(self.known_scales)):
            # What is known to be near needs no change of each weight to be found.
            if self.max_candidates > num_known + 1:
                return None
            return (
                f"max_candidates {self.max_candidates} is too small: theta_0, what is known and one candidate more "
                f"take {num_known + 2}"
            )
        if self.strategy != "grid":
            if self.max_candidates > num_weights:
                return None
            return (
                f"max_candidates {self.max_candidates} is too small for {num_weights} weights: theta_0 and a change of "
                f"each take {num_weights + 1}"
            )
        size = len(set(self.values)) ** num_weights
        if set(self.values) == {0.0}:
            return "a grid of the value 0 alone has theta_0 and no merge; give more values"
        if size <= _LARGEST_GRID:
            return None
        return (
            f"a grid of {len(set(self.values))} values has {size:,} combinations of {num_weights} weights; give fewer "
            "values or another strategy"
        )


class RegMeanSpec(Spec):
    """How the inputs of a copy's linear maps are measured, and used."""

    num_images: int = Field(1024, ge=1, description="Noisy training images that pass through each copy.")
    max_features: int = Field(
        4608,
        ge=1,
        description="Maps from more features than that are averaged: their matrices, of features x features, would be "
        "too large. A 3x3 convolution of 512 channels has 4,608.",
    )
    shrinkage: float = Field(0.9, ge=0, le=1, description="Share of the matrices' off-diagonal entries that is kept.")


class MethodSpec(Spec):
    """How task vectors are combined (METHOD section 2)."""

    method: Literal["task_arithmetic", "block_weights", "ties", "dare", "average", "regmean"] = Field(
        "task_arithmetic",
        description="How task vectors are combined. task_arithmetic: theta_0 + sum of w_i tau_i. block_weights: the "
        "same with a weight per segment and block; blocks are the levels of a UNet and its middle, or quarters of a "
        "transformer's depth, and what lies outside of them. regmean: task vectors confined to the inputs of their own "
        "segments (natural weights 1). ties: trimmed, with elected signs. dare: with random entries dropped. average: "
        "the plain mean of the copies.",
    )
    regmean: RegMeanSpec = Field(RegMeanSpec(), description="regmean: how inputs are measured.")
    density: float = Field(
        0.2, gt=0, le=1, description="ties: share of the entries that is kept in each tensor of a task vector."
    )
    drop_rate: float = Field(0.5, ge=0, lt=1, description="dare: chance of each entry of a task vector to be dropped.")
    seed: int = Field(0, ge=0, description="dare: decides which entries are dropped.")

    def settings(self) -> dict[str, Any]:
        """Returns what decides the result of this method."""
        own = {"ties": ["density"], "dare": ["drop_rate", "seed"]}.get(self.method, [])
        return {"method": self.method} | {name: getattr(self, name) for name in own}


class MergeSpec(MethodSpec):
    """How the copies become one model, and which weights they get."""

    weights: tuple[float, ...] | None = Field(
        None, description="Fixed merge weights, lowest timesteps first; block_weights takes one for each copy."
    )
    search: SearchSpec | None = Field(None, description="Search the weights instead.")
    on_bad_expert: Literal["drop", "keep", "fail"] = Field(
        "drop", description="What to do with a copy that is no better than the pretrained model on its own segment."
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.method == "average":
            if self.weights is not None or self.search is not None:
                raise ValueError("method 'average' takes neither weights nor search")
        elif (self.weights is None) == (self.search is None):
            raise ValueError("give either weights or search")
        return self
