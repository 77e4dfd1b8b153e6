"""The stages of one recipe, done one by one in this process: what benchmarks share that look inside of a run.

Everything is kept in the store of DEME_HOME, where the flow's artifacts are too: nothing is done twice.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from deme_core.binned_losses import bin_edges, load_losses, own_change
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DistillSpec, FinetuneSpec, MethodSpec, Recipe, RegMeanSpec, SearchSpec
from deme_core.segments import TimestepSegment, recipe_segments
from deme_core.settings import Settings
from deme_core.verdict import RowScores
from tasks.jobs import (
    ConfineJob,
    DistillJob,
    EvaluateJob,
    FinetuneJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    GramsJob,
    HeldoutJob,
    Job,
    JobResult,
    MergeJob,
    RealFeaturesJob,
    ReferenceJob,
    SearchJob,
    pretrained_job,
)
from tasks.weight_search import search_artifact
from tasks.work.base import JobContext, execute


class Laboratory:
    """The jobs of one recipe; what the store has is not done again.

    Args:
        device: where they are done.
        context: of another laboratory, whose decoded images this one takes; None for its own.
        before_job: called before each job; what it raises ends the work between two jobs.

    Attributes:
        recipe: what is done.
        pretrained: theta_0.
        edges: 0, inner edges, T of the segments.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: str = "cpu",
        context: JobContext | None = None,
        before_job: Callable[[], None] = lambda: None,
    ) -> None:
        self.recipe, self.context, self._before_job = recipe, context or JobContext(Settings(), device), before_job
        self.pretrained = self.do(pretrained_job(recipe))
        segments = recipe_segments(recipe.segments, self.pretrained.metrics["num_train_timesteps"])
        self.edges = (segments[0].low, *(segment.high for segment in segments))

    def do(self, job: Job) -> JobResult:
        """Does a job, or takes its result from the store."""
        self._before_job()
        return execute(job, self.context, lambda _: None)

    def experts(self) -> tuple[ArtifactRef, ...]:
        """Returns one finetuned copy per segment."""
        pairs = zip(self.edges, self.edges[1:], strict=False)
        return tuple(self.finetuned(low, high, self.recipe.finetune.num_steps) for low, high in pairs)

    def control(self) -> ArtifactRef:
        """Returns the copy finetuned on all timesteps with the steps of all experts, and a distillation, together."""
        num_segments = len(self.edges) - 1
        control = self.recipe.finetune.for_control(num_segments)
        return self.finetuned(0, self.edges[-1], self.recipe.num_control_steps(num_segments), control)

    def soup(self) -> tuple[ArtifactRef, ...]:
        """Returns copies as many and as long as the experts, all of them of all timesteps: their seeds differ alone."""
        finetune, first = self.recipe.finetune.for_control(1), 10_000 + 10 * self.recipe.finetune.seed
        seeded = [finetune.model_copy(update={"seed": seed}) for seed in range(first + 1, first + len(self.edges))]
        return tuple(self.finetuned(0, self.edges[-1], finetune.num_steps, each) for each in seeded)

    def finetuned(self, low: int, high: int, num_steps: int, finetune: FinetuneSpec | None = None) -> ArtifactRef:
        """Returns the copy finetuned on [low, high), as the recipe says or otherwise."""
        job = FinetuneJob(
            label=f"[{low}, {high})",
            pretrained=self.pretrained.ref,
            dataset=self.recipe.dataset,
            finetune=finetune or self.recipe.finetune.for_copies(),
            low=low,
            high=high,
            num_steps=num_steps,
        )
        return self.do(job).ref

    def merged(
        self, experts: tuple[ArtifactRef, ...], weights: Sequence[float], method: MethodSpec | None = None
    ) -> ArtifactRef:
        """Returns the merge of experts; with one expert, its task vector scaled."""
        method = method or MethodSpec()
        job = MergeJob(pretrained=self.pretrained.ref, experts=experts, method=method, weights=tuple(weights))
        return self.do(job).ref

    def heldout(self, model: ArtifactRef) -> list[float]:
        """Returns the denoising loss by timestep bin on images that no training saw, as the flow's report has it."""
        losses: list[float] = self._heldout(model).metrics["bins"]
        return losses

    def mean_heldout(self, model: ArtifactRef) -> float:
        """Returns the denoising loss on images that no training saw, over all timesteps."""
        return float(self._heldout(model).metrics["mean"])

    def loss_changes(self, model: ArtifactRef) -> list[float]:
        """Returns by what share of it the denoising loss differs from the pretrained model's in each segment."""
        after, before = (load_losses(self.context.fetch(self._heldout(m).ref)) for m in (model, self.pretrained.ref))
        segments = (TimestepSegment(*pair) for pair in itertools.pairwise(self.edges))
        return [own_change(after, before, self._bin_edges, segment).mean for segment in segments]

    def _heldout(self, model: ArtifactRef) -> JobResult:
        return self.do(HeldoutJob(model=model, dataset=self.recipe.dataset, edges=self._bin_edges))

    @property
    def _bin_edges(self) -> tuple[int, ...]:
        return bin_edges(self.edges[-1], self.edges)

    def reference(self, part: Literal["search", "report"]) -> JobResult:
        """Returns what scores need of the real images of the search, or of the report."""
        recipe = self.recipe
        shared: dict[str, Any] = {
            "dataset": recipe.reference_dataset,
            "evaluate": recipe.evaluate_for(part),
            "part": part,
            "num_for_search": recipe.merge.search.num_reference_images if recipe.merge.search else 0,
        }
        features = self.do(RealFeaturesJob(**shared, low=0, high=2**31))
        return self.do(ReferenceJob(**shared, features=(features.ref,)))

    def scores(self, models: tuple[ArtifactRef, ...], edges: tuple[int, ...] | None = None) -> list[float]:
        """Returns the deciding metric under each seed of the report, of one model or of the ensemble of experts."""
        return list(next(iter(self.scores_by_metric(models, edges).values())).by_seed)

    def scores_by_metric(
        self, models: tuple[ArtifactRef, ...], edges: tuple[int, ...] | None = None
    ) -> dict[str, RowScores]:
        """Returns every metric of the recipe under each seed of the report; the deciding one first, with resamples."""
        spec, reference, found = self.recipe.evaluate, self.reference("report").ref, []
        for seed in spec.seeds:
            images = GeneratedImages(models=models, edges=edges, seed=seed)
            features = self.do(
                GeneratedFeaturesJob(label="model", images=images, evaluate=spec, low=0, high=spec.num_images)
            )
            job = EvaluateJob(images=images, features=(features.ref,), evaluate=spec, reference=reference)
            found.append(self.do(job).metrics)
        # In the order of the recipe: a manifest has its own.
        names = spec.score_names
        by_metric = {name: RowScores([metrics["scores"][name] for metrics in found]) for name in names}
        resampled = [metrics["replicates"] for metrics in found]
        return by_metric | {names[0]: RowScores(by_metric[names[0]].by_seed, resampled)}

    def found_weights(
        self, experts: tuple[ArtifactRef, ...], search: SearchSpec, method: MethodSpec, *, is_control: bool = False
    ) -> dict[str, Any]:
        """Returns what a search found, candidate by candidate from the store where they are there."""
        job = self.search_job(experts, search, method, is_control=is_control)
        return search_artifact(job, self.context.artifacts, lambda jobs: map(self.do, jobs), lambda _: None).metrics

    def confined(self, experts: tuple[ArtifactRef, ...], spec: RegMeanSpec) -> tuple[ArtifactRef, ...]:
        """Returns the experts, each confined to the inputs of its own segment."""
        segments = zip(experts, self.edges, self.edges[1:], strict=False)
        jobs = [GramsJob(expert=e, dataset=self.recipe.dataset, low=a, high=b, spec=spec) for e, a, b in segments]
        grams = tuple(self.do(job).ref for job in jobs)
        return tuple(
            self.do(ConfineJob(pretrained=self.pretrained.ref, expert=e, grams=grams, index=i, spec=spec)).ref
            for i, e in enumerate(experts)
        )

    def distilled(self, merged: ArtifactRef, experts: tuple[ArtifactRef, ...], spec: DistillSpec) -> ArtifactRef:
        """Returns the merge, trained to predict what the experts predict."""
        job = DistillJob(
            label="the ensemble into the merge",
            pretrained=self.pretrained.ref,
            merged=merged,
            experts=experts,
            segment_edges=self.edges,
            dataset=self.recipe.dataset,
            distill=spec,
        )
        return self.do(job).ref

    def search_job(
        self, experts: tuple[ArtifactRef, ...], search: SearchSpec, method: MethodSpec, *, is_control: bool = False
    ) -> SearchJob:
        """Returns the search for the weights of experts, or for the scale of the control, which is the only one."""
        return SearchJob(
            pretrained=self.pretrained.ref,
            experts=experts,
            method=method,
            segment_edges=self.edges,
            is_control=is_control,
            search=search,
            evaluate=self.recipe.evaluate_for("search"),
            dataset=self.recipe.dataset,
            reference=self.reference("search").ref,
        )
