"""One run, completely described."""

import math
import re
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from deme_core.errors import InputError
from deme_core.metrics import metric_names
from deme_core.recipe.base import Spec
from deme_core.recipe.dataset import DatasetSpec
from deme_core.recipe.evaluate import EvaluateSpec
from deme_core.recipe.execution import ExecutionSpec
from deme_core.recipe.merge import MergeSpec
from deme_core.recipe.pretrained import PretrainedSpec
from deme_core.recipe.segments import SegmentsSpec
from deme_core.recipe.training import DistillSpec, FinetuneSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Recipe(Spec):
    """One run, completely described."""

    name: str = Field(
        description="Name of the MLflow experiment: letters a to z and A to Z, digits, '.', '_' and '-', the first a "
        "letter or digit."
    )
    pretrained: PretrainedSpec
    dataset: DatasetSpec
    segments: SegmentsSpec
    finetune: FinetuneSpec
    copies: tuple[str, ...] = Field(
        (),
        exclude_if=lambda copies: not copies,
        description="Copies that were finetuned elsewhere, one for each segment, lowest timesteps first: diffusers "
        "folders, object-store URIs or hub ids. Then none is trained here; `finetune` describes the control, and its "
        "num_steps the steps that each copy took.",
    )
    merge: MergeSpec
    distill: DistillSpec | None = Field(
        None,
        description="Train the merged model to predict, at every timestep, what its segment's copy predicts: the row "
        "distilled. The control sees as many images more.",
    )
    evaluate: EvaluateSpec
    execution: ExecutionSpec = ExecutionSpec()

    @property
    def process_counts(self) -> tuple[int, ...]:
        """Processes of each training."""
        trainings = (self.finetune, self.pretrained.training, self.distill)
        return tuple(training.num_processes for training in trainings if training)

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "must be of letters a to z and A to Z, digits, '.', '_' and '-', and begin with a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        num_segments = self.segments.num_segments
        if self.merge.weights is not None and len(self.merge.weights) != num_segments:
            raise ValueError(f"merge.weights has {len(self.merge.weights)} values for {num_segments} segments")
        self._check_copies(num_segments)
        if self.pretrained.source == "pretrain" and self.segments.edges is not None:
            # Of a model from elsewhere this is known once it is there; of this one it would be after its training.
            num_timesteps = self.pretrained.noise_scheduler.get("num_train_timesteps", 1000)
            if self.segments.edges[-1] != num_timesteps:
                raise ValueError(
                    f"segments.edges {list(self.segments.edges)} must end at {num_timesteps}, the number of timesteps"
                )
        if self.dataset.side % self.pretrained.side_divisor:
            raise ValueError(
                f"dataset.resolution {self.dataset.side} must be a multiple of {self.pretrained.side_divisor}, since "
                "pretrained.unet halves the side at each of its blocks but the last; change it, or give the UNet fewer "
                "blocks"
            )
        if self.merge.search and (shared := _shared(self.merge.search.seeds, self.evaluate.seeds)):
            raise ValueError(f"merge.search.seeds and evaluate.seeds share {shared}: a search must not see the report")
        # Of block weights there are more, which of a model from elsewhere is known once it is there: `check_search`.
        num_weights = num_segments * (self.pretrained.num_blocks if self.merge.method == "block_weights" else 1)
        if self.merge.search and (shortcoming := self.merge.search.shortcoming(num_weights)):
            raise ValueError(f"merge.search: {shortcoming}")
        self._check_known_weights(num_segments)
        if self.merge.search and (unknown := set(self.merge.search.guards) - set(self.evaluate.score_names[1:])):
            able = ", ".join(self.evaluate.score_names[1:]) or "none"
            raise ValueError(
                f"merge.search.guards names {', '.join(sorted(unknown))}; evaluate computes, beside the score that "
                f"decides: {able}"
            )
        if self.merge.search and "kd_pixels_4x4" in self.merge.search.guards:
            raise ValueError(
                "merge.search.guards names kd_pixels_4x4, which is about 0, now and then negative: a share of it means "
                "nothing; name fd_pixels_4x4"
            )
        few, full = self.merge.search and self.merge.search.few_steps, self.evaluate.num_inference_steps
        if few and few >= full:
            raise ValueError(f"merge.search.few_steps {few} are no fewer than evaluate.num_inference_steps {full}")
        return self

    def _check_copies(self, num_segments: int) -> None:
        if not self.copies:
            return
        if len(self.copies) != num_segments:
            raise ValueError(f"copies has {len(self.copies)} models for {num_segments} segments")
        if self.pretrained.source == "pretrain":
            raise ValueError("copies from elsewhere are of a model from elsewhere; name it as pretrained.source")
        if self.finetune.lora:
            raise ValueError("copies are whole models, and finetune.lora makes the control an adapter; leave it out")

    def _check_known_weights(self, num_segments: int) -> None:
        known = self.merge.search.known_weights if self.merge.search else ()
        if known and self.merge.method == "block_weights":
            raise ValueError("merge.search.known_weights are one for each segment, which block_weights does not take")
        for weights in known:
            if len(weights) != num_segments:
                raise ValueError(
                    f"merge.search.known_weights has {len(weights)} values in {list(weights)}, for {num_segments} "
                    "segments"
                )

    def num_control_steps(self, num_segments: int) -> int:
        """Optimizer steps of the control: as many as all copies take, and as the distillation's images are worth."""
        num_images = self.distill.num_steps * self.distill.images_per_step if self.distill else 0
        return self.finetune.num_steps * num_segments + math.ceil(num_images / self.finetune.images_per_step)

    def check_search(self, num_blocks: int) -> None:
        """Raises an InputError if the search's budget or grid does not suit a model of so many blocks."""
        if self.merge.search is None or self.merge.method != "block_weights":
            return
        if shortcoming := self.merge.search.shortcoming(self.segments.num_segments * num_blocks):
            raise InputError(f"merge.search: {shortcoming}.")

    @property
    def reference_dataset(self) -> DatasetSpec:
        """Where the real images of reference and search come from."""
        return self.evaluate.reference_dataset or self.dataset

    @property
    def samplings(self) -> tuple[EvaluateSpec, ...]:
        """How images are made: the report's, and the search's where that samples in few steps first."""
        search = self.merge.search
        few = {"num_inference_steps": search.few_steps} if search and search.few_steps else None
        return (self.evaluate, *([self.evaluate.model_copy(update=few)] if few else []))

    def evaluate_for(self, part: Literal["search", "report"]) -> EvaluateSpec:
        """How images of the search or of the report are scored: a search needs what decides or guards, and no more.

        So another metric in the report changes nothing that a search has measured.
        """
        if part == "report":
            return self.evaluate
        guards, spec = set(self.merge.search.guards) if self.merge.search else set(), self.evaluate
        extractors = [name for name in spec.more_extractors if guards.intersection(metric_names(spec.metrics, [name]))]
        names = (spec.extractor_name, *extractors)
        guarding = [metric for metric in spec.metrics[1:] if guards.intersection(metric_names([metric], names))]
        needed = (spec.metrics[0], *guarding)
        subset = {} if "kid" in needed else {"kid_subset_size": EvaluateSpec.model_fields["kid_subset_size"].default}
        return spec.model_copy(update={"more_extractors": tuple(extractors), "metrics": needed, **subset})


def _shared(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return sorted(set(left) & set(right))
