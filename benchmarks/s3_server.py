"""A private S3 server for benchmarks: the one of the local stack, in a folder of its own."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from deme_core.errors import StoreUnavailableError
from flows.stack.ports import choose_ports
from flows.stack.services import Layout, s3

_SECONDS_TO_START = 60.0


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Starts SeaweedFS with its data in ``folder``; gives the AWS_* variables that point at it.

    Raises:
        StoreUnavailableError: it did not start.
    """
    layout = Layout(folder, choose_ports({}, {}))
    service = s3(layout)
    service.prepare()
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(service.command, env=dict(service.environment), stdout=log, stderr=log, cwd=folder)
    try:
        _wait(service.check, process)
        yield {name: value for name, value in layout.client_environment().items() if name.startswith("AWS_")}
    finally:
        process.terminate()
        process.wait(timeout=30)
        # mini leaves it behind, and ignores -s3.localSocket.
        Path(f"/tmp/seaweedfs-s3-{layout.ports['s3']}.sock").unlink(missing_ok=True)


def _wait(check: Callable[[], None], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            return check()
        except (httpx.HTTPError, StoreUnavailableError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise StoreUnavailableError(f"weed did not start ({error}).") from error
            time.sleep(0.2)


def client_environment(variables: dict[str, str]) -> dict[str, str]:
    """Returns this process's environment without what would lead an S3 client elsewhere, and with ``variables``."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | variables
