"""What stands for models, images and prompts of the paper's recipes."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.tiny_clip import write_tiny_clip
from tests.tiny_models import tiny_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg" / "test.tar.xz"
CLASSES = ("cat", "dog", "frog", "ship")
IMAGES_PER_CLASS = 10
_THREE_CHANNELS = {"sample_size": 16, "in_channels": 3, "out_channels": 3}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, CIFAR-10 images with captions of their classes, and prompts."""
    if not CIFAR.exists():
        pytest.skip("needs ../shared/data/cifar10-jpeg")
    folder = tmp_path_factory.mktemp("stand-ins")
    write_tiny_folder(folder / "ddpm", tiny_unet(**_THREE_CHANNELS), **_THREE_CHANNELS)
    save_pipeline("StableDiffusionPipeline", folder / "sd")
    write_tiny_clip(folder / "clip")
    images, rows = folder / "images", []
    images.mkdir()
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            kind = Path(member.name).parent.name
            if member.isfile() and kind in CLASSES and sum(row["kind"] == kind for row in rows) < IMAGES_PER_CLASS:
                file = archive.extractfile(member)
                assert file is not None
                name = f"{kind}-{Path(member.name).name}"
                (images / name).write_bytes(file.read())
                rows.append({"file_name": name, "text": f"a photo of a {kind}", "kind": kind})
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.tsv").write_text("Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\na ship\tVehicles\tBasic\n")
    return folder
