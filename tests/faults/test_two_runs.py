"""Two identical runs of a platform at once: each artifact is computed by one of them, and both finish."""

from mlflow import MlflowClient

from tasks.tracked_runs import find_report
from tests.e2e.conftest import WriteRecipe, platform, write_recipe
from tests.e2e.stack_platform import FINAL, Platform

__all__ = ["platform", "write_recipe"]


def test_of_two_runs_at_once_one_computes_and_both_finish(platform: Platform, write_recipe: WriteRecipe) -> None:
    finetune = {"num_steps": 40, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 20, "seed": 7}
    recipe = write_recipe(finetune=finetune)
    flow_runs = [platform.start(recipe) for _ in range(2)]
    for flow_run in flow_runs:
        state = platform.wait(flow_run, lambda state: state["type"] in FINAL)
        assert state["type"] == "COMPLETED", state["message"]
    reports = [find_report(platform.settings, flow_run=flow_run) for flow_run in flow_runs]
    assert reports[0]["merged"] == reports[1]["merged"]
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    for name in ("finetune/segment-0", "finetune/segment-1", "finetune/all"):
        children = [
            child
            for report in reports
            for child in client.search_runs(
                [platform.experiment("toy")], f"tags.mlflow.parentRunId = '{report['mlflow_run_id']}'"
            )
            if child.info.run_name == name
        ]
        assert sorted(child.data.tags["deme.cached"] for child in children) == ["false", "true"], name
