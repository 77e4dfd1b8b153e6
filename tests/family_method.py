"""The jobs of a run on a tiny pipeline, done in one process."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, EvaluateSpec, FinetuneSpec, MethodSpec
from deme_core.settings import Settings
from tasks.jobs import (
    EvaluateJob,
    FinetuneJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    ImportJob,
    Job,
    JobResult,
    MergeJob,
    RealFeaturesJob,
    ReferenceJob,
)
from tasks.work.base import JobContext, execute
from tests.tiny_pipelines import save_pipeline

WEIGHTS = (0.3, 0.5)


def two_classes(folder: Path) -> DatasetSpec:
    """Writes twenty images of two classes, bright and dark, into ``folder``."""
    rng = torch.Generator().manual_seed(0)
    for index in range(20):
        pixels = torch.randint(0, 128, (16, 16, 3), generator=rng) + 127 * (index % 2)
        file = folder / ("cat", "truck")[index % 2] / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(file)
    return DatasetSpec(
        source="imagefolder",
        path=str(folder),
        resolution=16,
        caption_template="a photo of a {label}",
        label_column="label",
        caption_dropout=0.2,
    )


class Method:
    """The jobs of a run on one pipeline, done in this process."""

    def __init__(self, name: str, home: Path, dataset: DatasetSpec) -> None:
        self.context = JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": None}), "cpu")
        self.name, self.dataset = name, dataset
        self.stock = save_pipeline(name, home / "stock")
        prompts = home / "prompts.txt"
        prompts.write_text("a photo of a cat\na photo of a truck\n")
        self.evaluate = EvaluateSpec(
            num_images=4,
            sampler="flow_match_euler" if "3" in name or "Flux" in name else "ddim",
            num_inference_steps=4,
            guidance_scale=2.0,
            prompts=str(prompts),
            extractor="efficientnet_lite0",
            extractor_resolution=32,
            kid_subset_size=4,
            num_bootstrap=2,
        )
        self.pretrained = self.do(ImportJob(source=str(self.stock)))

    def do(self, job: Job) -> JobResult:
        return execute(job, self.context, lambda _: None)

    def finetune(self, low: int, high: int, **settings: Any) -> JobResult:
        finetune = FinetuneSpec.model_validate(
            {"num_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.5} | settings
        )
        job = FinetuneJob(
            label=f"segment [{low}, {high})",
            pretrained=self.pretrained.ref,
            dataset=self.dataset,
            finetune=finetune,
            low=low,
            high=high,
            num_steps=2,
        )
        return self.do(job)

    def merge(self, experts: tuple[ArtifactRef, ...]) -> JobResult:
        return self.do(MergeJob(pretrained=self.pretrained.ref, experts=experts, method=MethodSpec(), weights=WEIGHTS))

    def score(self, models: tuple[ArtifactRef, ...], edges: tuple[int, ...] | None) -> float:
        images = GeneratedImages(models=models, edges=edges, seed=1)
        slices = [(0, 2), (2, 4)]
        features = tuple(
            self.do(GeneratedFeaturesJob(label="row", images=images, evaluate=self.evaluate, low=low, high=high)).ref
            for low, high in slices
        )
        job = EvaluateJob(images=images, features=features, evaluate=self.evaluate, reference=self.reference())
        return float(self.do(job).metrics["scores"]["fd_efficientnet_lite0"])

    def reference(self) -> ArtifactRef:
        part: dict[str, Any] = {"dataset": self.dataset, "evaluate": self.evaluate, "part": "report"}
        real = self.do(RealFeaturesJob(**part, num_for_search=0, low=0, high=20)).ref
        return self.do(ReferenceJob(**part, num_for_search=0, features=(real,))).ref


def files_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
