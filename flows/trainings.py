"""The trainings of a run: the control, one copy per segment, and the distillation."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefect.futures import PrefectFuture

from deme_core.errors import InputError
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DistillSpec, FinetuneSpec, Recipe
from deme_core.segments import TimestepSegment
from flows.encodings import EncodedDataset
from tasks.jobs import DistillJob, FinetuneJob, ImportCopyJob, JobResult
from tasks.stages import distill, finetune, import_copy


@dataclass(frozen=True)
class Trainings:
    """What every training of a run starts from.

    Attributes:
        recipe: says how.
        pretrained: theta_0.
        encoded: the data set.
        segments: the timestep segments.
    """

    recipe: Recipe
    pretrained: ArtifactRef
    encoded: EncodedDataset
    segments: tuple[TimestepSegment, ...]

    def control(self) -> PrefectFuture[JobResult]:
        """Submits the control: all timesteps, and as many images as all other trainings together."""
        control = self.recipe.finetune.for_control(len(self.segments))
        num_steps = self.recipe.num_control_steps(len(self.segments))
        everything = TimestepSegment(self.segments[0].low, self.segments[-1].high)
        return self._finetune(control, everything, num_steps, "all timesteps", "finetune/all")

    def copies(self) -> list[PrefectFuture[JobResult]]:
        """Submits one copy per segment."""
        finetune = self.recipe.finetune.for_copies()
        return [
            self._finetune(finetune, segment, finetune.num_steps, f"segment {i} {segment}", f"finetune/segment-{i}")
            for i, segment in enumerate(self.segments)
        ]

    def _finetune(
        self, spec: FinetuneSpec, segment: TimestepSegment, num_steps: int, label: str, child_name: str
    ) -> PrefectFuture[JobResult]:
        job = FinetuneJob(
            label=label,
            pretrained=self.pretrained,
            dataset=self.recipe.dataset,
            finetune=spec,
            low=segment.low,
            high=segment.high,
            num_steps=num_steps,
            latents=self.encoded.latents,
            embeddings=self.encoded.embeddings,
        )
        return finetune.submit(job, child_name)

    def imported_copies(self) -> list[PrefectFuture[JobResult]]:
        """Brings the copies that were finetuned elsewhere, if there are any; waits for it."""
        allow_pickle = self.recipe.pretrained.allow_pickle
        imports = [
            import_copy.submit(
                ImportCopyJob(
                    label=f"segment {i} {segment}",
                    pretrained=self.pretrained,
                    source=source,
                    allow_pickle=allow_pickle,
                )
            )
            for i, (segment, source) in enumerate(zip(self.segments, self.recipe.copies, strict=False))
        ]
        for each in imports:
            each.result()
        return imports

    def distillation(self, spec: DistillSpec, merged: ArtifactRef, experts: tuple[ArtifactRef, ...]) -> JobResult:
        """Teaches the merged model what the ensemble knows."""
        job = DistillJob(
            label="the ensemble into the merge",
            pretrained=self.pretrained,
            merged=merged,
            experts=experts,
            segment_edges=(self.segments[0].low, *(segment.high for segment in self.segments)),
            dataset=self.recipe.dataset,
            distill=spec,
            latents=self.encoded.latents,
            embeddings=self.encoded.embeddings,
        )
        return distill(job)


def check_base(pretrained: JobResult, trained: Sequence[JobResult]) -> None:
    """Refuses copies of weights that theta_0 had before it was lost and made anew.

    Where an artifact is named by how it was made, what it is made of is not in its name; and a training on another kind
    of processor ends at other weights.

    Raises:
        InputError: one of ``trained`` was finetuned from others.
    """
    for result in trained:
        base = result.metrics.get("pretrained_weights")  # Copies from elsewhere, and older ones, do not say.
        if base is not None and base != pretrained.metrics["weights_digest"]:
            raise InputError(
                f"{result.ref.uri} was finetuned from other weights of the pretrained model than {pretrained.ref.uri} "
                "holds, which was lost and made anew. What else the store has of it was made with those, too: change "
                "pretrained.training.seed, and all is made anew."
            )
