"""A faulty way to a real S3 server: errors, throttling, silence, cut connections, damaged and truncated answers.

What passes by itself is not noticed; what does not is said in one sentence, nothing half-made can be seen, and the next
run ends with the artifacts of an undisturbed one.
"""

import random
import time
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import botocore.auth
import pytest

from deme_core import s3_client
from deme_core.artifacts import ArtifactStore
from deme_core.errors import ChecksumMismatchError, DamagedArtifactError, StoreUnavailableError
from tasks import patience
from tests.fault_proxy import FaultProxy, Kind
from tests.integration.conftest import S3Server, s3_server
from tests.small_run import check_cache, check_nothing_is_left, contents, layout, make_context, run_all

__all__ = ["s3_server"]

pytestmark = pytest.mark.timeout(280)
# What boto3 tries again by itself, and what only the run that follows can mend.
_ANSWERS: list[Kind] = ["InternalError", "ServiceUnavailable", "SlowDown", "cut", "lost answer", "truncated", "hang"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    context = make_context(tmp_path_factory.mktemp("undisturbed"))
    run_all(context)
    return context.artifacts


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket("faults")


@pytest.fixture
def uri(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_client, "_READ_TIMEOUT_SEC", 1.0)
    return f"s3://{bucket}/{uuid4().hex}/store"


def _direct(home: Path, uri: str, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    return make_context(home, uri).artifacts


@pytest.mark.parametrize("kind", _ANSWERS)
def test_a_fault_that_passes_is_not_noticed(
    kind: Kind,
    undisturbed: ArtifactStore,
    uri: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request in six meets it, and never two in a row."""
    rng, met = random.Random(0), [False]

    def some(method: str, path: str) -> bool:
        met.append(not met[-1] and rng.random() < 0.2)
        return met[-1]

    with FaultProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        committed = proxy.plan(kind, some, times=10**6)
        run_all(make_context(tmp_path, uri))
        # Nothing of it is in the cache yet: reads meet the fault as well.
        proxy_read = contents(make_context(tmp_path / "other", uri).artifacts)
    assert len(committed) >= 8 and {entry.split()[0] for entry in committed} >= {"GET", "PUT"}
    assert proxy_read == contents(undisturbed)
    artifacts = _direct(tmp_path, uri, s3_server, monkeypatch)
    check_cache(artifacts, proxy_read)
    check_nothing_is_left(artifacts, layout(undisturbed))


@pytest.mark.parametrize("kind", ["InternalError", "SlowDown", "cut", "lost answer", "hang"])
def test_a_store_that_stays_away_is_said_and_the_next_run_goes_on(
    kind: Kind,
    undisturbed: ArtifactStore,
    uri: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = contents(undisturbed)
    monkeypatch.setattr(patience, "_WAITS_SEC", (0.1,))
    with FaultProxy(s3_server.endpoint_url) as proxy:
        for after in (2, 9, 25, 40, 10**6):
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            proxy.plan(kind, after=after, times=10**6)
            try:
                run_all(make_context(tmp_path, uri))
                assert after == 10**6
            except StoreUnavailableError as error:
                message = str(error)
                assert proxy.url in message and "AWS_ENDPOINT_URL" in message and "\n" not in message
                assert s3_server.secret_key not in message and s3_server.access_key not in message
            visible = contents(_direct(tmp_path / "other", uri, s3_server, monkeypatch))
            check_cache(make_context(tmp_path, uri).artifacts, visible)
            assert {name: files for name, files in visible.items() if name in expected}.items() <= expected.items()
    assert visible == expected
    check_nothing_is_left(_direct(tmp_path, uri, s3_server, monkeypatch), layout(undisturbed))


@pytest.mark.parametrize("kind", ["short", "flipped"])
def test_bytes_that_arrive_wrong_are_never_used(
    kind: Kind,
    undisturbed: ArtifactStore,
    uri: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_all(make_context(tmp_path, uri))

    def is_weights(method: str, path: str) -> bool:
        return method == "GET" and path.endswith(".safetensors")

    with FaultProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        artifacts = make_context(tmp_path / "other", uri).artifacts
        (merged,) = artifacts.list_refs("merged")
        proxy.plan(kind, is_weights, times=10**6)
        with pytest.raises((ChecksumMismatchError, DamagedArtifactError, StoreUnavailableError)):
            artifacts.fetch(merged)
        assert not artifacts.cache.joinpath("merged", merged.digest).exists()
        proxy.plan(kind, is_weights, times=1)
        assert artifacts.fetch(merged).is_dir()
    assert contents(_direct(tmp_path / "other", uri, s3_server, monkeypatch)) == contents(undisturbed)


def test_a_clock_that_is_wrong_is_said(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = botocore.auth.get_current_datetime
    store = make_context(Path("/nowhere"), uri).artifacts.store
    store.put_bytes("a", b"1")
    for hours in (-2, 2):
        with monkeypatch.context() as patch:
            patch.setattr(botocore.auth, "get_current_datetime", lambda *a, h=hours: real(*a) + timedelta(hours=h))
            with pytest.raises(StoreUnavailableError, match="clock is wrong"):
                store.get_bytes("a")
    # After the jump back all is as before.
    assert store.get_bytes("a") == b"1"


def test_a_store_away_for_seconds_in_mid_upload_is_waited_for(
    undisturbed: ArtifactStore, uri: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a training made is not thrown away for an outage that boto3's own attempts do not outlast."""
    with FaultProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        began: list[float] = []

        def is_away(method: str, path: str) -> bool:
            if method == "PUT" and "/finetune/" in path:
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] < 12.0

        committed = proxy.plan("ServiceUnavailable", is_away, times=10**6)
        run_all(make_context(tmp_path, uri))
    assert len(committed) > 4
    assert contents(_direct(tmp_path, uri, s3_server, monkeypatch)) == contents(undisturbed)
