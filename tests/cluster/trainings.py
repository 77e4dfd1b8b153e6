"""What every runner of this folder trains: a control and four copies, of which the weights are compared."""

from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from deme_core.artifacts import ArtifactStore
from deme_core.recipe import Recipe
from deme_core.segments import recipe_segments
from deme_core.settings import Settings
from deme_core.store import open_store
from flows.encodings import encode_dataset
from flows.flow_runtime import flow_runtime
from flows.trainings import Trainings
from tasks.jobs import JobResult
from tasks.stages import obtain_pretrained
from tests.e2e.conftest import TOY_RECIPE

CHECKPOINT_EVERY = 10
# After two checkpoints enough are left for a node to be killed in the middle: the flow hears of steps each half second.
NUM_STEPS = 8 * CHECKPOINT_EVERY


def training_recipe(checkpoint_every: int = CHECKPOINT_EVERY, **execution: Any) -> Recipe:
    """The toy recipe with four segments, and trainings long enough to be ended in the middle."""
    finetune = {"num_steps": NUM_STEPS, "batch_size": 4, "checkpoint_every": checkpoint_every}
    execution = {"device": "cpu", "num_workers": 2, **execution}
    return Recipe.model_validate(
        TOY_RECIPE
        | {"segments": {"count": 4}, "merge": {"weights": [0.25] * 4}, "finetune": finetune, "execution": execution}
    )


@flow(task_runner=ThreadPoolTaskRunner(max_workers=16))  # type: ignore[arg-type]
def train(recipe: Recipe) -> tuple[str, dict[str, JobResult]]:
    """The pretrained model, the control and the four copies of a recipe."""
    with flow_runtime(recipe):
        pretrained = obtain_pretrained()
        segments = recipe_segments(recipe.segments, pretrained.metrics["num_train_timesteps"])
        trainings = Trainings(recipe, pretrained.ref, encode_dataset(recipe, pretrained), segments)
        futures = {"control": trainings.control()} | dict(zip("0123", trainings.copies(), strict=True))
        return str(flow_run.id), {"pretrained": pretrained} | {name: each.result() for name, each in futures.items()}


@dataclass(frozen=True)
class Trained:
    """Digests and weights (SHA-256) of all models."""

    digests: dict[str, str]
    weights: dict[str, str]

    @classmethod
    def of(cls, results: dict[str, JobResult]) -> "Trained":
        artifacts = ArtifactStore(open_store(Settings().store_uri), Settings().cache_folder)
        files = {name: artifacts.manifest(result.ref).files for name, result in results.items()}
        return cls(
            {name: result.ref.digest for name, result in results.items()},
            {name: f.sha256 for name, each in files.items() for f in each if f.name.endswith(".safetensors")},
        )
