"""The flow ``deme-evaluate``: any model, scored under a recipe's evaluation."""

import json
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from deme_core.recipe_file import load_recipe
from flows.evaluation import first_real_features, submit_reference, submit_row
from flows.flow_runtime import flow_runtime
from flows.parameters import Overrides, RecipeName
from tasks.report import write_score
from tasks.stages import obtain_pretrained

# Overrides of the model that is scored, and not of the recipe's own, in whose place it comes.
_ABOUT_MODEL = ("pretrained.allow_pickle=", "pretrained.revision=")


@flow(name="deme-evaluate", flow_run_name="evaluate {model}")
def evaluate(model: str, recipe: RecipeName = "digits", overrides: Overrides = ()) -> dict[str, Any]:
    """Scores a model with the sampler, seeds, counts and real images that a recipe evaluates with.

    Args:
        model: a diffusers folder, an object-store URI, or a hub id.
        recipe: name of a recipe, or path or object-store URI of a YAML file.
        overrides: settings such as ``evaluate.num_images=5000``.

    Returns:
        Each metric with its interval, and the fingerprint of the evaluation: scores with equal ones can be compared.
    """
    source = f"pretrained={json.dumps({'source': model})}"
    about_model = [given for given in overrides if given.startswith(_ABOUT_MODEL)]
    with flow_runtime(load_recipe(recipe, [*overrides, source, *about_model])) as runtime:
        imported = obtain_pretrained()
        first = first_real_features(runtime.recipe, "report").result()
        reference = submit_reference(runtime.recipe, "report", first).result()
        results = submit_row(runtime.recipe, "model", (imported.ref,), None, reference.ref).result()
        return write_score(model, results, flow_run_id=str(flow_run.id))
