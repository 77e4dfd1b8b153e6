from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import TOY_RECIPE, WriteRecipe
from tests.tiny_pipelines import save_pipeline


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Any]:
    """A recipe's sections for a tiny Stable Diffusion on captioned images."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(path)
    (tmp_path / "prompts.txt").write_text("a photo of a cat\na photo of a dog\n")
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
        "merge": {"weights": [0.3, 0.3]},
        "evaluate": TOY_RECIPE["evaluate"] | {"prompts": str(tmp_path / "prompts.txt")},
        "execution": TOY_RECIPE["execution"] | {"images_per_task": 16},
    }


def test_a_text_conditional_model_is_finetuned_on_encodings(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, sections: dict[str, Any]
) -> None:
    report = fresh_deme.report("run", write_recipe(**sections))
    assert {"latents", "embeddings", "finetune", "merged"} <= report["seconds"].keys()
    stored = fresh_deme.home / "store"
    assert [len(list((stored / stage).glob("*/manifest.json"))) for stage in ("latents", "embeddings")] == [2, 1]
