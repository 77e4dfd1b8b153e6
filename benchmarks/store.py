"""What the object store costs: artifacts of mixed sizes up and down, over ``rclone copy`` on the same server.

Both sides move the same files to and from one SeaweedFS on loopback, in processes of their own, and verify what they
moved: DeMe by SHA-256, rclone by MD5. DeMe's download also waits until everything is on the disk. Its seconds leave out
the imports of a Python process, which a worker pays once; rclone's are those of the whole command.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measurement import median_ratio, print_result, print_table, take_turns
from benchmarks.memory import run_measured
from benchmarks.s3_server import client_environment, s3_server

# DeMe's throughput over rclone's, and DeMe's anonymous memory: buffers must not grow with files.
THROUGHPUT_GOAL, MEMORY_GOAL_MB = 0.8, 300
_UP, _DOWN = "upload", "download"
_OURS, _RCLONE = "DeMe", "rclone"
# Shares of the bytes, and the size of the files that they are in: a few weights, more middling files, many small ones.
_MIX = ((0.5, 900_000_000), (0.25, 120_000_000), (0.2, 16_000_000), (0.05, 500_000))


@dataclass(frozen=True)
class Transfer:
    """One way of one contestant.

    Attributes:
        seconds: how long it took.
        peak_bytes: most anonymous memory of its process.
    """

    seconds: float
    peak_bytes: int


def write_files(folder: Path, num_bytes: int) -> int:
    """Writes random files of mixed sizes, ``num_bytes`` in all, and returns how many."""
    generator, number = random.Random(0), 0
    for share, size in _MIX:
        part = round(num_bytes * share)
        while part > 0:
            path = folder / f"{size}" / f"{number}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            left = min(size, part)
            part, number = part - left, number + 1
            with path.open("wb") as file:
                while left > 0:
                    left -= file.write(generator.randbytes(min(left, 1 << 24)))
    return number


def deme(way: str, folder: Path, cache: Path, digest: str) -> None:
    """Publishes ``folder`` as an artifact, or fetches it into ``cache``, in this process; prints the seconds."""
    from deme_core.artifacts import ArtifactStore
    from deme_core.store import open_store

    artifacts = ArtifactStore(open_store(os.environ["DEME_STORE_URI"]), cache)
    artifacts.find("bench", digest)  # The first request makes the client's tables; a worker has done it long ago.
    started = time.perf_counter()
    if way == _UP:
        artifacts.publish("bench", digest, folder, settings={}, inputs={})
    else:
        found = artifacts.find("bench", digest)
        assert found is not None
        artifacts.fetch(found)
    print(time.perf_counter() - started)


class Contest:
    """Both contestants against one server; each upload of a round is followed by a download of the same.

    Args:
        files: what is moved.
        scratch: for what is fetched.
        variables: AWS_* of the server.
    """

    def __init__(self, files: Path, scratch: Path, variables: Mapping[str, str]) -> None:
        self._files, self._scratch, self._number = files, scratch, 0
        self._environment = client_environment(dict(variables)) | {
            "DEME_STORE_URI": "s3://deme/store",
            "RCLONE_CONFIG_S3_TYPE": "s3",
            "RCLONE_CONFIG_S3_PROVIDER": "SeaweedFS",
            "RCLONE_CONFIG_S3_ENV_AUTH": "true",
            "RCLONE_CONFIG_S3_ENDPOINT": variables["AWS_ENDPOINT_URL"],
            "RCLONE_CONFIG_S3_REGION": variables["AWS_DEFAULT_REGION"],
        }

    def deme(self) -> dict[str, Transfer]:
        """Moves everything up and down by DeMe."""
        self._number += 1
        digest, cache = f"round-{self._number}", self._scratch / "cache"
        command = [sys.executable, "-m", "benchmarks.store", "--child"]
        moved = {}
        for way in (_UP, _DOWN):
            child = [*command, way, str(self._files), str(cache), digest]
            _, peak, printed = run_measured(child, self._environment)
            moved[way] = Transfer(float(printed.splitlines()[-1]), peak)
        (copy,) = (cache / "bench").iterdir()
        self._check(copy)
        shutil.rmtree(cache)
        return moved

    def rclone(self) -> dict[str, Transfer]:
        """Moves everything up and down by rclone."""
        self._number += 1
        remote, target = f"s3:deme/rclone/round-{self._number}", self._scratch / "rclone"
        moved = {}
        for way, source, place in ((_UP, str(self._files), remote), (_DOWN, remote, str(target))):
            seconds, peak, _ = run_measured(["rclone", "--config", "", "copy", source, place], self._environment)
            moved[way] = Transfer(seconds, peak)
        self._check(target)
        shutil.rmtree(target)
        return moved

    def _check(self, folder: Path) -> None:
        sent, got = (
            {path.relative_to(root): path.stat().st_size for path in root.rglob("*") if path.is_file()}
            for root in (self._files, folder)
        )
        if sent != got:
            raise AssertionError(f"{folder} does not hold what was sent")


def report(moved: Mapping[str, Sequence[Mapping[str, Transfer]]], num_bytes: int, title: str) -> None:
    """Prints the table and the result; ``ratio`` is DeMe's time over rclone's, of the worse way."""
    rows, ratios, peaks = [], {}, {}
    for way in (_UP, _DOWN):
        seconds = {name: [transfers[way].seconds for transfers in rounds] for name, rounds in moved.items()}
        ratios[way] = median_ratio(seconds[_OURS], seconds[_RCLONE])
        for name, rounds in moved.items():
            middle = statistics.median(seconds[name])
            peaks[name, way] = max(transfers[way].peak_bytes for transfers in rounds) / 1e6
            over = f"{1 / ratios[way]:.2f}" if name == _OURS else ""
            rows.append(
                (f"{way}, {name}", f"{middle:.2f}", f"{num_bytes / middle / 1e6:.0f}", over, f"{peaks[name, way]:.0f}")
            )
    print_table(title, ("", "s", "MB/s", "of rclone's throughput", "peak memory, MB"), rows)
    peak = max(peaks[_OURS, way] for way in (_UP, _DOWN))
    print_result(
        "store",
        ratio=max(ratios.values()),
        goal=1 / THROUGHPUT_GOAL,
        holds=max(ratios.values()) <= 1 / THROUGHPUT_GOAL and peak <= MEMORY_GOAL_MB,
        throughput={way: 1 / ratio for way, ratio in ratios.items()},
        peak_mb=peak,
        peak_goal_mb=MEMORY_GOAL_MB,
        peak_mb_rclone=max(peaks[_RCLONE, way] for way in (_UP, _DOWN)),
        num_bytes=num_bytes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts a server, moves files, prints a table and the result."""
    options = _options(arguments)
    if options.child:
        way, folder, cache, digest = options.child
        return deme(way, Path(folder), Path(cache), digest)
    if shutil.which("rclone") is None:
        raise SystemExit("There is no rclone command; install Debian's package rclone.")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="deme-store-") as scratch:
        files, server = Path(scratch, "files"), Path(scratch, "server")
        server.mkdir()
        num_bytes = round(options.megabytes * 1e6)
        num_files = write_files(files, num_bytes)
        with s3_server(server) as variables:
            contest = Contest(files, Path(scratch), variables)
            contestants: dict[str, Callable[[], dict[str, Transfer]]] = {_OURS: contest.deme, _RCLONE: contest.rclone}
            moved = take_turns(contestants, num_rounds=options.rounds)
    title = f"{num_bytes / 1e6:.0f} MB in {num_files} files, medians of {options.rounds} rounds"
    report(moved, num_bytes, title)
    return None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.store", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the bytes, once: shows that it runs")
    parser.add_argument("--megabytes", type=float, help="bytes in all (default 2000, quick 20)")
    parser.add_argument("--rounds", type=int, help="up and down by each (default 3, quick 1)")
    parser.add_argument("--folder", type=Path, help="where files and server lie (default the temporary folder)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.megabytes = options.megabytes or (20 if options.quick else 2000)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


if __name__ == "__main__":
    main()
