"""How a recipe's copies, and its control, get their merge weights and become models."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefect.futures import PrefectFuture

from deme_core.manifest import ArtifactRef
from deme_core.recipe import MethodSpec, Recipe
from deme_core.search import from_natural_weights
from tasks.experts import Expert, weights_of_merged
from tasks.jobs import JobResult, MergeJob, SearchJob
from tasks.stages import merge, search

# The control is one copy: all there is to find is how far to go.
_SCALE = MethodSpec(method="task_arithmetic")


@dataclass
class MergePlan:
    """Everything a search and a merge need but the experts.

    Attributes:
        recipe: says how.
        pretrained: theta_0.
        segment_edges: 0, inner edges, T.
        reference: real images of the search; None without one.
        searches: results so far, by what was searched.
    """

    recipe: Recipe
    pretrained: ArtifactRef
    segment_edges: tuple[int, ...]
    reference: ArtifactRef | None
    searches: dict[str, JobResult] = field(default_factory=dict)

    def find_weights(
        self, refs: tuple[ArtifactRef, ...], experts: Sequence[Expert] | None, what: str
    ) -> PrefectFuture[JobResult] | None:
        """Submits the search for weights; None if there is nothing to search; ``experts`` is None for the control."""
        if self.reference is None or self.recipe.merge.search is None or not refs:
            return None
        search_spec = from_natural_weights(self.recipe.merge.search, self.recipe.merge)
        if experts is not None and search_spec.known_weights:
            known = dict.fromkeys(weights_of_merged(experts, weights) for weights in search_spec.known_weights)
            search_spec = search_spec.model_copy(update={"known_weights": tuple(known)})
        job = SearchJob(
            pretrained=self.pretrained,
            experts=refs,
            method=_SCALE if experts is None else self._method(),
            segment_edges=self.segment_edges,
            is_control=experts is None,
            search=search_spec,
            evaluate=self.recipe.evaluate_for("search"),
            dataset=self.recipe.dataset,
            reference=self.reference,
        )
        return search.submit(job, what)

    def merge(
        self,
        refs: tuple[ArtifactRef, ...],
        found: PrefectFuture[JobResult] | None,
        experts: Sequence[Expert] | None,
        what: str,
    ) -> JobResult:
        """Merges with the weights that were found, or those the recipe fixes; ``experts`` is None for the control."""
        if found is not None:
            self.searches[what] = found.result()
            weights = tuple(self.searches[what].metrics["weights"])
        elif experts is None:
            weights = (1.0,)
        else:
            fixed = self.recipe.merge.weights
            weights = weights_of_merged(experts, fixed) if fixed else ()
        method = _SCALE if experts is None else self._method()
        return merge(MergeJob(pretrained=self.pretrained, experts=refs, method=method, weights=weights), what)

    def _method(self) -> MethodSpec:
        """Returns the method without weights and search; what RegMean does beyond task arithmetic is done before."""
        if self.recipe.merge.method == "regmean":
            return _SCALE
        return MethodSpec(**self.recipe.merge.model_dump(include=set(MethodSpec.model_fields)))
