from pathlib import Path
from uuid import uuid4

import pytest
import torch

from deme_core.encodings import Embeddings, Latents, distinct_captions
from deme_core.recipe import DatasetSpec
from deme_core.settings import Settings
from tasks.jobs import EmbeddingsJob, ImportJob, Job, JobResult, LatentsJob
from tasks.work.base import JobContext, execute
from tests.integration.conftest import S3Server
from tests.tiny_pipelines import save_pipeline

DATASET = DatasetSpec(
    source="digits",
    resolution=16,
    channels=3,
    num_images=20,
    caption_template="a photo of a cat",
    random_flip=True,
)


@pytest.fixture
def store_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.make_bucket(f'encodings-{uuid4().hex}')}/store"


def test_what_one_machine_encodes_another_reads_from_the_bucket(store_uri: str, tmp_path: Path) -> None:
    def machine(name: str, uri: str | None) -> JobContext:
        return JobContext(Settings.model_validate({"DEME_HOME": tmp_path / name, "DEME_STORE_URI": uri}), "cpu")

    def do(job: Job, context: JobContext) -> JobResult:
        return execute(job, context, lambda _: None)

    def encoded(context: JobContext) -> list[JobResult]:
        model = do(ImportJob(source=str(tmp_path / "model")), context).ref
        slices: list[Job] = [
            LatentsJob(pretrained=model, dataset=DATASET, low=0, high=16),
            LatentsJob(pretrained=model, dataset=DATASET, low=16, high=32),
            EmbeddingsJob(pretrained=model, dataset=DATASET, low=0, high=16),
        ]
        return [do(job, context) for job in slices]

    def rows(context: JobContext, results: list[JobResult]) -> list[torch.Tensor]:
        *latents, embeddings = (context.fetch(result.ref) for result in results)
        indices, mirrored = torch.tensor([19, 0, 16, 3]), torch.tensor([True, False, False, True])
        texts = distinct_captions(["a photo of a cat"])
        return [
            Latents(latents, resolution=16, mirrored=True).gather(indices, mirrored).latents,
            *Embeddings([embeddings], texts).gather(["a photo of a cat", ""]).values(),
        ]

    save_pipeline("StableDiffusionPipeline", tmp_path / "model")
    first, second, local = machine("first", store_uri), machine("second", store_uri), machine("local", None)
    made, found, expected = encoded(first), encoded(second), encoded(local)
    assert [result.cached for result in made] == [False] * 3
    assert [result.cached for result in found] == [True] * 3
    for actual, wanted in zip(rows(second, found), rows(local, expected), strict=True):
        assert torch.equal(actual, wanted)
