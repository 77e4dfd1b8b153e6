"""The flow ``deme-evaluate``: any model, scored under a recipe's evaluation."""

import json
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from deme_core.recipe_file import load_recipe
from flows.decouple_then_merge import reference_job
from flows.flow_runtime import flow_runtime
from flows.parameters import Overrides, RecipeName
from tasks.report import write_score
from tasks.stages import build_reference, evaluate_row, obtain_pretrained


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
    with flow_runtime(load_recipe(recipe, [*overrides, source])) as runtime:
        imported = obtain_pretrained()
        reference = build_reference(reference_job(runtime.recipe, "report"))
        results = evaluate_row("model", (imported.ref,), None, reference.ref)
        return write_score(model, results, flow_run_id=str(flow_run.id))
