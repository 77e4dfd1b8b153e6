"""A run of a model that takes text: finetuned on encodings, its images scored against prompts by a tiny CLIP model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import TOY_RECIPE, WriteRecipe
from tests.tiny_clip import write_tiny_clip
from tests.tiny_pipelines import save_pipeline

PROMPTS = "Prompt\tCategory\na cat\tAnimals\nQ! Q!\tAbstract\n"


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Any]:
    """A recipe's sections for a tiny Stable Diffusion on captioned images, searched by the CLIP score."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(path)
    (tmp_path / "prompts.tsv").write_text(PROMPTS)
    scored = {
        "metrics": ["clip_score", "fid"],
        "prompts": str(tmp_path / "prompts.tsv"),
        "clip_weights": str(write_tiny_clip(tmp_path / "clip", seed=3)),
    }
    return {
        "pretrained": {"source": str(save_pipeline("StableDiffusionPipeline", tmp_path / "model"))},
        "dataset": {
            "source": "imagefolder",
            "path": str(tmp_path / "images"),
            "resolution": 16,
            "caption_template": "a photo of a {label}",
            "caption_dropout": 0.1,
            "random_flip": True,
        },
        "evaluate": TOY_RECIPE["evaluate"] | scored,
        "execution": TOY_RECIPE["execution"] | {"num_workers": 2, "images_per_task": 16},
    }


def test_a_model_that_takes_text_is_finetuned_on_encodings_and_searched_by_the_clip_score(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, sections: dict[str, Any]
) -> None:
    done = fresh_deme.run("run", write_recipe(**sections))
    assert done.returncode == 0, done.stderr
    assert "higher of clip_score" in " ".join(done.stdout.split())
    stored = fresh_deme.home / "store"
    assert [len(list((stored / stage).glob("*/manifest.json"))) for stage in ("latents", "embeddings")] == [2, 1]

    report = json.loads(next((fresh_deme.home / "mlartifacts").rglob("report.json")).read_text())
    assert {"latents", "embeddings", "finetune", "merged"} <= report["seconds"].keys()
    assert report["metric"] == "clip_score"
    assert list(report["rows"]["merged"]) == ["clip_score", "fd_efficientnet_lite0", "fd_pixels_4x4"]
    assert {"prompts", "clip"} < set(report["conditions"])
    (candidates,) = [
        found
        for path in stored.glob("weights/*/manifest.json")
        if len((found := json.loads(path.read_text())["metrics"]["candidates"])[0]["weights"]) == 2
    ]
    assert report["search"]["experts"]["score"] == max(candidate["score"] for candidate in candidates) > 0

    means = {row: report["rows"][row]["clip_score"]["mean"] for row in ("merged", "pretrained")}
    client = MlflowClient(f"sqlite:///{fresh_deme.home / 'mlflow.db'}")
    logged = client.get_run(report["mlflow_run_id"]).data.metrics
    assert math.isclose(logged["clip_score/gain"], means["merged"] - means["pretrained"], abs_tol=1e-9)
    lower_is_better = [report["rows"][row]["fd_efficientnet_lite0"]["mean"] for row in ("pretrained", "merged")]
    assert math.isclose(logged["fd_efficientnet_lite0/gain"], lower_is_better[0] - lower_is_better[1], abs_tol=1e-9)

    details = [json.loads(path.read_text())["metrics"]["details"] for path in stored.glob("evaluate/*/manifest.json")]
    assert {tuple(found) for found in details} == {("clip_score/category/Abstract", "clip_score/category/Animals")}
