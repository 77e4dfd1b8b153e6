"""Secrets: a real run with marked ones, and then everything that it wrote, said and showed is searched for them."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe, write_recipe
from tests.integration.conftest import S3Server, s3_server

__all__ = ["s3_server", "write_recipe"]

pytestmark = pytest.mark.timeout(280)
_MARKED = {
    "HF_TOKEN": "hf_marked-secret-of-the-hub",
    "MLFLOW_TRACKING_PASSWORD": "marked-secret-of-mlflow",
    "PREFECT_API_KEY": "marked-secret-of-prefect",
}


class Watch:
    """Looks at the command lines of all processes, as `ps` does, and at what ours listen on, again and again."""

    def __init__(self, home: Path, secrets: list[str]) -> None:
        self.found, self.addresses, self._home = set[str](), set[str](), str(home)
        self.num_looks, self._secrets, self._end = 0, secrets, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.3):
            self.num_looks += 1
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or ())
                if any(secret in line for secret in self._secrets):
                    self.found.add(line)
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("DEME_HOME") == self._home:
                        sockets = process.net_connections("tcp")
                        self.addresses |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}


@pytest.fixture
def environment(s3_server: S3Server, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    bucket = s3_server.make_bucket(f"secrets-{abs(hash(request.node.name)) % 10**6}")
    yield s3_server.env | _MARKED | {"DEME_STORE_URI": f"s3://{bucket}/store"}


def _files_with(folder: Path, secret: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_no_secret_is_written_said_or_shown(
    environment: dict[str, str], s3_server: S3Server, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    deme = CommandLine(tmp_path / "home")
    recipe = write_recipe()
    secrets = [s3_server.secret_key, *_MARKED.values()]
    with Watch(deme.home, secrets) as watch:
        done = deme.run("run", recipe, "--verbose", "--json", extra=environment)
        wrong = environment | {"AWS_SECRET_ACCESS_KEY": "marked-and-wrong"}
        refused = deme.run("run", recipe, extra=wrong)
        doctor = deme.run("doctor", recipe, extra=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["merged"]["uri"].startswith("s3://secrets-")
    assert refused.returncode == 2 and "AWS_SECRET_ACCESS_KEY" in refused.stderr
    assert watch.num_looks > 20 and watch.found == set()
    assert watch.addresses == {"127.0.0.1"}, "Prefect's temporary server"
    said = "".join(r.stdout + r.stderr for r in (done, refused, doctor))
    assert len(said) > 1000
    bucket = environment["DEME_STORE_URI"].split("/")[2]
    stored = s3_server.client.list_objects_v2(Bucket=bucket)["Contents"]
    assert len(stored) > 50
    objects = {o["Key"]: s3_server.client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in stored}
    # The databases of MLflow and Prefect, the cache, the page of the run.
    assert any(deme.home.rglob("mlflow.db")) and any(deme.home.rglob("prefect.db")) and any(deme.home.rglob("*.html"))
    for secret in (*secrets, "marked-and-wrong"):
        assert secret not in said
        assert [key for key, content in objects.items() if secret.encode() in content] == []
        assert _files_with(deme.home, secret) == []


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    deme, recipe = CommandLine(tmp_path / "home"), write_recipe()
    for variable, address in (
        ("MLFLOW_TRACKING_URI", "http://user:marked-hush@127.0.0.1:1"),
        ("AWS_ENDPOINT_URL", "http://user:marked-hush@127.0.0.1:1"),
    ):
        extra = {variable: address} | ({"DEME_STORE_URI": "s3://b/c"} if variable.startswith("AWS") else {})
        for command in (("run", recipe), ("report",), ("doctor",)):
            done = deme.run(*command, extra=extra)
            assert done.returncode != 0 or command == ("report",), (command, done.stdout)
            assert "marked-hush" not in done.stdout + done.stderr, (variable, command)
        assert _files_with(deme.home, "marked-hush") == []
