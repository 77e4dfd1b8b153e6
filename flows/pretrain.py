"""The flow ``deme-pretrain``: theta_0 for those who bring none."""

from typing import Any

from prefect import flow

from deme_core.recipe_file import load_recipe
from flows.flow_runtime import flow_runtime
from flows.parameters import Overrides, RecipeName, recipe_name
from tasks.stages import obtain_pretrained


@flow(name="deme-pretrain", flow_run_name=recipe_name)
def pretrain(recipe: RecipeName = "digits", overrides: Overrides = ()) -> dict[str, Any]:
    """Trains, or imports, the pretrained model of a recipe into the object store.

    Args:
        recipe: name of a recipe, or path or object-store URI of a YAML file.
        overrides: settings such as ``pretrained.training.num_steps=50``.

    Returns:
        Where the model lies, and its digest.
    """
    with flow_runtime(load_recipe(recipe, overrides)) as runtime:
        result = obtain_pretrained()
        return {
            "recipe": runtime.recipe.name,
            "mlflow_run_id": runtime.tracker.run_id,
            "uri": runtime.artifacts.folder_uri(result.ref),
            "digest": result.ref.digest,
            "num_parameters": result.metrics["num_parameters"],
            "cached": result.cached,
            "seconds": runtime.timing.seconds(),
        }
