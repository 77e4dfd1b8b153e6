"""How a recipe's copies, and its control, get their merge weights and become models."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefect.futures import PrefectFuture

from deme_core.manifest import ArtifactRef
from deme_core.recipe import MethodSpec, Recipe, SearchSpec
from deme_core.search import from_natural_weights
from tasks.experts import Expert, weights_of_merged
from tasks.jobs import JobResult, MergeJob, SearchJob
from tasks.run_results import CONTROL, EXPERTS
from tasks.stages import merge, search

# The control is one copy: all there is to find is how far to go.
_SCALE = MethodSpec(method="task_arithmetic")
# As the tasks of the searches, and their runs in MLflow, are called.
_MERGE_WEIGHTS, _SCALE_OF_CONTROL = "merge weights", "scale of the control"


@dataclass
class MergePlan:
    """Everything that the searches and merges of a run need but the copies and the control.

    Attributes:
        recipe: says how.
        pretrained: theta_0.
        segment_edges: 0, inner edges, T.
        reference: real images of the search; None without one.
        searches: results so far, under `EXPERTS` and `CONTROL`.
    """

    recipe: Recipe
    pretrained: ArtifactRef
    segment_edges: tuple[int, ...]
    reference: ArtifactRef | None
    searches: dict[str, JobResult] = field(default_factory=dict)

    def find_weights(self, refs: tuple[ArtifactRef, ...], experts: Sequence[Expert]) -> PrefectFuture[JobResult] | None:
        """Submits the search for the merge weights; None if there is nothing to search.

        Args:
            refs: the copies that are merged.
            experts: all copies, and which of them are.
        """
        spec = self._search_spec()
        if spec is None or not refs:
            return None
        if spec.known_weights:
            known = dict.fromkeys(weights_of_merged(experts, weights) for weights in spec.known_weights)
            spec = spec.model_copy(update={"known_weights": tuple(known)})
        return self._submit_search(spec, refs, is_control=False)

    def find_scale(self, control: ArtifactRef) -> PrefectFuture[JobResult] | None:
        """Submits the search for the scale of the control's task vector; None if nothing is searched."""
        spec = self._search_spec()
        return None if spec is None else self._submit_search(spec, (control,), is_control=True)

    def merge(
        self, refs: tuple[ArtifactRef, ...], experts: Sequence[Expert], found: PrefectFuture[JobResult] | None
    ) -> JobResult:
        """Merges the copies with the weights that were found, or those the recipe fixes; ``refs`` as for a search."""
        fixed = self.recipe.merge.weights
        if found is not None:
            weights = self._weights_found(EXPERTS, found)
        else:
            weights = weights_of_merged(experts, fixed) if fixed else ()
        job = MergeJob(pretrained=self.pretrained, experts=refs, method=self._method(), weights=weights)
        return merge(job, EXPERTS)

    def scale_control(self, control: ArtifactRef, found: PrefectFuture[JobResult] | None) -> JobResult:
        """Scales the task vector of the control as was found best, or takes it as it is."""
        weights = (1.0,) if found is None else self._weights_found(CONTROL, found)
        return merge(MergeJob(pretrained=self.pretrained, experts=(control,), method=_SCALE, weights=weights), CONTROL)

    def _search_spec(self) -> SearchSpec | None:
        """Returns how to search, in the weights that a merge takes; None where the recipe does not."""
        merging = self.recipe.merge
        return from_natural_weights(merging.search, merging) if self.reference and merging.search else None

    def _submit_search(
        self, spec: SearchSpec, refs: tuple[ArtifactRef, ...], *, is_control: bool
    ) -> PrefectFuture[JobResult]:
        assert self.reference is not None
        job = SearchJob(
            pretrained=self.pretrained,
            experts=refs,
            method=_SCALE if is_control else self._method(),
            segment_edges=self.segment_edges,
            is_control=is_control,
            search=spec,
            evaluate=self.recipe.evaluate_for("search"),
            dataset=self.recipe.dataset,
            reference=self.reference,
        )
        return search.submit(job, _SCALE_OF_CONTROL if is_control else _MERGE_WEIGHTS)

    def _weights_found(self, what: str, found: PrefectFuture[JobResult]) -> tuple[float, ...]:
        self.searches[what] = found.result()
        return tuple(self.searches[what].metrics["weights"])

    def _method(self) -> MethodSpec:
        """Returns the method without weights and search; what RegMean does beyond task arithmetic is done before."""
        if self.recipe.merge.method == "regmean":
            return _SCALE
        return MethodSpec(**self.recipe.merge.model_dump(include=set(MethodSpec.model_fields)))
