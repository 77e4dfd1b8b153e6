"""A Ray cluster of two nodes on loopback, as `ray start` makes it, with an S3 server as all that they share."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cluster.trainings import Trained, train, training_recipe
from tests.integration.conftest import S3Server, free_ports, prefect_server, s3_server

__all__ = ["prefect_server", "s3_server"]

_CPUS_PER_NODE = 2
_MANIFEST = Path(__file__).parents[2] / "deployments" / "kubernetes" / "ray-cluster.yaml"


@dataclass
class RayCluster:
    """Two nodes, of which the second may be killed or taken away.

    Attributes:
        port: of the head.
        client_port: of the server for drivers on other machines.
        logs: folder with all that Ray writes.
        nodes: the `ray start` process of each node, head first; its children are the node.
    """

    port: int
    client_port: int
    logs: Path
    nodes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def client_address(self) -> str:
        return f"ray://127.0.0.1:{self.client_port}"

    def kill_second_node(self) -> None:
        """SIGKILL of all its processes at once, as when a machine loses power."""
        _kill(self.nodes.pop())

    def take_second_node_away(self) -> None:
        """What Kubernetes does: the preStop hook of its manifest, then SIGTERM."""
        node = self.nodes.pop()
        pod = yaml.safe_load(_MANIFEST.read_text())["spec"]["workerGroupSpecs"][0]["template"]["spec"]
        _, *hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        # In a container all processes descend from the first one; here others do, too.
        assert hook[-2:] == ["--root", "1"]
        subprocess.run([sys.executable, *hook[:-1], str(node.pid)], check=True, cwd=self.logs)
        node.terminate()
        node.wait(pod["terminationGracePeriodSeconds"])

    def second_node_is_there(self, home: Path) -> None:
        """Starts a second node if there is none, with ``home`` as its disk."""
        if len(self.nodes) < 2:
            home.mkdir(exist_ok=True)
            self.nodes.append(_start_node(home, [f"--address={self.address}"]))
            _wait_for_nodes(self)


def _kill(node: "subprocess.Popen[bytes]") -> None:
    root = psutil.Process(node.pid)
    family = [root, *root.children(recursive=True)]
    for process in family:
        process.suspend()  # So that none sees another die.
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    node.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Nodes know neither the object store nor its keys; each has a disk of its own."""
    # Ray listens on all interfaces; nobody without the token is heard. Read when Ray is imported.
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    # On two cores that other programs use too.
    settings["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "90"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield from _two_nodes(tmp_path_factory)


def _two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    logs = Path(tempfile.mkdtemp(prefix="ray"))  # A short path, for Ray makes sockets in it.
    ports = free_ports(2)
    found = RayCluster(*ports, logs)
    head = [
        "--head",
        "--include-dashboard=false",
        f"--port={ports[0]}",
        f"--ray-client-server-port={ports[1]}",
        f"--temp-dir={logs}",
    ]
    try:
        found.nodes.append(_start_node(tmp_path_factory.mktemp("node-a"), head))
        _wait_for_port(ports[0])
        found.second_node_is_there(tmp_path_factory.mktemp("node-b"))
        yield found
    finally:
        for node in found.nodes:
            _kill(node)
        shutil.rmtree(logs, ignore_errors=True)


def _start_node(home: Path, options: list[str]) -> "subprocess.Popen[bytes]":
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--min-worker-port=20000", "--max-worker-port=20999", "--object-store-memory=100000000"]
    command += [f"--num-cpus={_CPUS_PER_NODE}", "--num-gpus=0", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DEME_"))}
    # The flow of the test is imported there, too.
    environment |= {"DEME_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    with (home / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home)


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while not any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in psutil.net_connections("tcp")):
        assert time.monotonic() < deadline, "The head of the Ray cluster did not start."
        time.sleep(0.2)


def _wait_for_nodes(cluster: RayCluster) -> None:
    import ray

    ray.init(cluster.address, log_to_driver=False)
    deadline = time.monotonic() + 60
    while len([node for node in ray.nodes() if node["Alive"]]) < len(cluster.nodes):
        assert time.monotonic() < deadline, "The second node of the Ray cluster did not join."
        time.sleep(0.2)
    ray.shutdown()


@contextmanager
def two_cores() -> Iterator[None]:
    """One thread for each of two local workers on any machine, as on the nodes: with two, last bits differ."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:2]))
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def expected(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What the local runner makes of the same recipe, with a store of its own."""
    home = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch, two_cores():
        patch.setenv("DEME_HOME", str(home))
        patch.delenv("DEME_STORE_URI", raising=False)
        return Trained.of(train(training_recipe(runner="local"))[1])


@pytest.fixture
def flow_machine(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The environment of a flow: the keys of a new bucket, and a disk of its own."""
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "flow"))
    monkeypatch.setenv("DEME_STORE_URI", f"s3://{s3_server.make_bucket(f'deme-{secrets.token_hex(4)}')}/store")
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    yield s3_server
