"""A run whose images are scored against prompts, by a tiny CLIP model."""

import json
import math
from pathlib import Path

from mlflow import MlflowClient

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import TOY_RECIPE, WriteRecipe
from tests.tiny_clip import write_tiny_clip

PROMPTS = "Prompt\tCategory\na cat\tAnimals\nQ! Q!\tAbstract\n"


def test_the_highest_clip_score_is_searched_and_a_gain_is_positive(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "prompts.tsv").write_text(PROMPTS)
    changed = {
        "metrics": ["clip_score", "fid"],
        "prompts": str(tmp_path / "prompts.tsv"),
        "clip_weights": str(write_tiny_clip(tmp_path / "clip", seed=3)),
    }
    execution = TOY_RECIPE["execution"] | {"num_workers": 2}
    done = fresh_deme.run("run", write_recipe(evaluate=TOY_RECIPE["evaluate"] | changed, execution=execution))
    assert done.returncode == 0, done.stderr
    assert "higher of clip_score" in " ".join(done.stdout.split())
    report = json.loads(next((fresh_deme.home / "mlartifacts").rglob("report.json")).read_text())
    assert report["metric"] == "clip_score"
    assert list(report["rows"]["merged"]) == ["clip_score", "fd_efficientnet_lite0"]
    assert {"prompts", "clip"} < set(report["conditions"])
    (candidates,) = [
        found
        for path in fresh_deme.home.glob("store/weights/*/manifest.json")
        if len((found := json.loads(path.read_text())["metrics"]["candidates"])[0]["weights"]) == 2
    ]
    assert report["search"]["experts"]["score"] == max(candidate["score"] for candidate in candidates) > 0

    means = {row: report["rows"][row]["clip_score"]["mean"] for row in ("merged", "pretrained")}
    client = MlflowClient(f"sqlite:///{fresh_deme.home / 'mlflow.db'}")
    logged = client.get_run(report["mlflow_run_id"]).data.metrics
    assert math.isclose(logged["clip_score/gain"], means["merged"] - means["pretrained"], abs_tol=1e-9)
    lower_is_better = [report["rows"][row]["fd_efficientnet_lite0"]["mean"] for row in ("pretrained", "merged")]
    assert math.isclose(logged["fd_efficientnet_lite0/gain"], lower_is_better[0] - lower_is_better[1], abs_tol=1e-9)

    details = [
        json.loads(path.read_text())["metrics"]["details"]
        for path in fresh_deme.home.glob("store/evaluate/*/manifest.json")
    ]
    assert {tuple(found) for found in details} == {("clip_score/category/Abstract", "clip_score/category/Animals")}
