"""The recipe: everything that decides the result of a run, as one frozen model; one file per section.

Defaults live here and nowhere else. Secrets and endpoints never appear in a recipe; they come from the
environment (`deme_core.settings`).
"""

from deme_core.recipe.base import Precision
from deme_core.recipe.dataset import DEFAULT_IMAGE_COLUMN, DatasetSpec
from deme_core.recipe.evaluate import EvaluateSpec, Sampler
from deme_core.recipe.execution import ExecutionSpec
from deme_core.recipe.merge import CONTROL_REACH, MergeSpec, MethodSpec, RegMeanSpec, SearchSpec
from deme_core.recipe.pretrained import PretrainedSpec
from deme_core.recipe.recipe import Recipe
from deme_core.recipe.segments import SegmentsSpec
from deme_core.recipe.training import DistillSpec, FinetuneSpec, LoraSpec, TrainingSpec

__all__ = [
    "CONTROL_REACH",
    "DEFAULT_IMAGE_COLUMN",
    "DatasetSpec",
    "DistillSpec",
    "EvaluateSpec",
    "ExecutionSpec",
    "FinetuneSpec",
    "LoraSpec",
    "MergeSpec",
    "MethodSpec",
    "Precision",
    "PretrainedSpec",
    "Recipe",
    "RegMeanSpec",
    "Sampler",
    "SearchSpec",
    "SegmentsSpec",
    "TrainingSpec",
]
