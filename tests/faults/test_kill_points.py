"""`kill -9` at every point: a process that does the method on tiny models dies at its k-th operation, k = 1, 2, 3, …

Each attempt finds what the killed ones before it left, and k starts anew with every stage that is done, so that each
is killed at each of its operations. After every kill what can be seen is whole; the attempt that gets through ends with
the artifacts of an undisturbed run, and a sweep leaves nothing else behind.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deme_core.artifacts import ArtifactStore
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DistillSpec, EvaluateSpec, MethodSpec, RegMeanSpec
from tasks.jobs import (
    ConfineJob,
    DistillJob,
    EmbeddingsJob,
    EvaluateJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    GramsJob,
    HeldoutJob,
    ImportJob,
    Job,
    JobResult,
    LatentsJob,
    RealFeaturesJob,
    ReferenceJob,
    ScoreJob,
)
from tasks.work.base import JobContext, execute
from tests.fault_proxy import FaultProxy, Kind
from tests.integration.conftest import S3Server, s3_server
from tests.small_run import (
    DATASET,
    check_cache,
    check_nothing_is_left,
    contents,
    in_child,
    layout,
    make_context,
    run_all,
)
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

__all__ = ["s3_server"]

pytestmark = pytest.mark.timeout(280)
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
_MAX_ATTEMPTS = 1500
ONE_LEVEL = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
EVALUATE = EvaluateSpec(
    num_images=4, num_inference_steps=4, extractor="efficientnet_lite0", extractor_resolution=32, kid_subset_size=4
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    context = make_context(tmp_path_factory.mktemp("undisturbed"))
    run_all(context)
    return context.artifacts


def _import_models(context: JobContext, folder: Path) -> tuple[JobResult, JobResult]:
    """Returns a model of pixels, and one of latents."""
    sources = (folder / "pixels", folder / "latents")
    if not folder.exists():
        write_tiny_folder(sources[0], randomize(one_level_unet(), seed=1), **ONE_LEVEL)
        save_pipeline("StableDiffusionPipeline", sources[1])
    pixels, latents = (execute(ImportJob(source=str(source)), context, lambda _: None) for source in sources)
    return pixels, latents


def _do_the_rest(context: JobContext, folder: Path) -> None:
    """Does every stage that `run_all` does not, as a distillation of one expert."""
    pixels, latents = _import_models(context, folder)

    def do(job: Job) -> ArtifactRef:
        return execute(job, context, lambda _: None).ref

    part: dict[str, Any] = {"dataset": DATASET, "evaluate": EVALUATE, "part": "report", "num_for_search": 0}
    reference = do(ReferenceJob(**part, features=(do(RealFeaturesJob(**part, low=0, high=40)),)))
    images = GeneratedImages(models=(pixels.ref,), edges=None, seed=1)
    features = do(GeneratedFeaturesJob(label="model", images=images, evaluate=EVALUATE, low=0, high=4))
    do(EvaluateJob(images=images, features=(features,), evaluate=EVALUATE, reference=reference))
    do(HeldoutJob(model=pixels.ref, dataset=DATASET, edges=(0, 500, 1000)))
    merge: dict[str, Any] = {"pretrained": pixels.ref, "experts": (pixels.ref,), "method": MethodSpec()}
    sampling: dict[str, Any] = {"evaluate": EVALUATE, "seeds": (1,), "num_images": 4}
    do(ScoreJob(label="candidate", **merge, **sampling, weights=(0.5,), reference=reference))
    captioned = DATASET.model_copy(update={"resolution": 16, "channels": 3, "caption_template": "a {label}"})
    do(LatentsJob(pretrained=latents.ref, dataset=captioned, low=0, high=40))
    do(EmbeddingsJob(pretrained=latents.ref, dataset=captioned, low=0, high=40))
    spec, everything = RegMeanSpec(num_images=8), (0, 1000)
    grams = do(GramsJob(expert=pixels.ref, dataset=DATASET, low=0, high=1000, spec=spec))
    do(ConfineJob(pretrained=pixels.ref, expert=pixels.ref, grams=(grams,), index=0, spec=spec))
    training = DistillSpec(num_steps=5, batch_size=4, learning_rate=1e-3, checkpoint_every=3)
    models: dict[str, Any] = {"pretrained": pixels.ref, "merged": pixels.ref, "experts": (pixels.ref,)}
    do(DistillJob(label="distilled", **models, segment_edges=everything, dataset=DATASET, distill=training))


def _die_at(number: int, home: Path) -> None:
    """Kills this process when it is about to change the file system below ``home`` for that time."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _CHANGES) and str(arguments[0]).startswith(str(home)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _attempt_until_done(
    attempt: Callable[[int], int], artifacts: ArtifactStore, undisturbed: ArtifactStore
) -> list[int]:
    """Attempts it, to be killed at operation k, until it gets through; returns for each stage the last k."""
    expected, number, reached, num_done = contents(undisturbed), 0, list[int](), 0
    for _ in range(_MAX_ATTEMPTS):
        number += 1
        status = attempt(number)
        visible = contents(artifacts)
        check_cache(artifacts, visible)
        done = {name: files for name, files in visible.items() if name in expected}
        assert done.items() <= expected.items()
        if len(done) > num_done:
            reached.append(number)
            num_done, number = len(done), 0
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0
    assert visible == expected
    check_nothing_is_left(artifacts, layout(undisturbed))
    return reached


def test_killed_at_every_change_of_the_file_system(undisturbed: ArtifactStore, tmp_path: Path) -> None:
    def run(number: int) -> None:
        _die_at(number, tmp_path)
        run_all(make_context(tmp_path))

    reached = _attempt_until_done(
        lambda number: in_child(lambda: run(number)), make_context(tmp_path).artifacts, undisturbed
    )
    assert len(reached) == 4 and sum(reached) > 100


@pytest.mark.timeout(1200)
def test_the_other_stages_are_killed_at_every_change_of_the_file_system(tmp_path: Path) -> None:
    models, undisturbed = tmp_path / "models", make_context(tmp_path / "undisturbed")
    _do_the_rest(undisturbed, models)
    home = tmp_path / "killed"
    _import_models(make_context(home), models)

    def run(number: int) -> None:
        _die_at(number, home)
        _do_the_rest(make_context(home), models)

    reached = _attempt_until_done(
        lambda number: in_child(lambda: run(number)), make_context(home).artifacts, undisturbed.artifacts
    )
    assert len(reached) == 1 + 11 and sum(reached) > 100


def test_killed_at_every_request_to_the_object_store(
    undisturbed: ArtifactStore, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the server has the request, in the middle of its body, and before the answer, in turn."""
    uri = f"s3://{s3_server.make_bucket('kill-points')}/store"
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    with FaultProxy(s3_server.endpoint_url) as proxy:

        def run() -> None:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            run_all(make_context(tmp_path, uri))

        def attempt(number: int) -> int:
            moment: Kind = ("kill before", "kill within", "kill after")[number % 3]
            status = in_child(run, lambda pid: proxy.plan(moment, after=number - 1, victim=pid))
            proxy.plan(None)
            return status

        reached = _attempt_until_done(attempt, make_context(tmp_path, uri).artifacts, undisturbed)
    assert len(reached) == 4 and sum(reached) > 40


@pytest.mark.parametrize("moment", ["kill within", "kill after"])
def test_killed_in_the_middle_of_an_upload_in_parts(
    moment: Kind, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket(f"parts-{moment.replace(' ', '-')}")
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_bytes(b"a")
    (tmp_path / "made" / "large").write_bytes(os.urandom(30 * 2**20))
    artifacts = make_context(tmp_path, f"s3://{bucket}/store").artifacts

    def publish(store: ArtifactStore) -> ArtifactRef:
        return store.publish("merged", "d", tmp_path / "made", settings={}, inputs={})[0]

    with FaultProxy(s3_server.endpoint_url) as proxy:

        def run() -> None:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            publish(make_context(tmp_path, f"s3://{bucket}/store").artifacts)

        status = in_child(
            run, lambda pid: proxy.plan(moment, lambda _, path: "partNumber" in path, after=2, victim=pid)
        )
    assert status == -signal.SIGKILL
    assert contents(artifacts) == {} and artifacts.find("merged", "d") is None
    assert len(s3_server.client.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1
    check_nothing_is_left(artifacts, [])
    assert not s3_server.client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert (artifacts.fetch(publish(artifacts)) / "large").stat().st_size == 30 * 2**20
