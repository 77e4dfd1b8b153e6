"""What merging four copies costs: peak memory, and time over reading five model files and writing one.

The reference for time is ``cat`` of the five files to /dev/null followed by ``cp`` of one of them to a new file: the
bytes that any merge has to move, and no arithmetic. The files of the smaller shape lie in the page cache before
anything is timed; those of the larger, 26 GB, come from the disk each time. Memory is compared with the bytes of one
model. Beside it run the plain way, load all and add, and mergekit's ``mergekit-pytorch`` in an environment of its own.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import median_ratio, print_result, print_table, take_turns
from benchmarks.shapes import lsun, sdxl
from deme_core.checkpoint import Checkpoint, TensorInfo, write_tensors
from deme_core.model_folder import build_denoiser
from deme_core.model_folder_writer import write_model_folder
from deme_core.projection import attach_projections, is_projection

TIME_GOAL, MEMORY_GOAL = 2.0, 1.3
MERGE_WEIGHTS = (0.3, 0.3, 0.2, 0.2)
_COPY, _DEME, _LOAD_ALL, _MERGEKIT = "cat 5 files, cp 1", "DeMe", "load all and add", "mergekit-pytorch"
_METHODS = {_DEME: "deme", _LOAD_ALL: "load_all", _MERGEKIT: "mergekit"}
_CHECKOUT = Path(__file__).resolve().parents[1]
_BLOCK = 1 << 22
# The stored type of each shape; the name of its class is that of a model on pixels, whose folder has no other parts.
SHAPES = {"lsun": (lsun, torch.float32), "sdxl": (sdxl, torch.bfloat16)}


class Models:
    """The pretrained model and its copies, slightly off, written tensor by tensor.

    Args:
        shape: key of `SHAPES`.
        tiny: the shape's parts at a tiny width.
        channel_projection: the copies carry projections.
    """

    def __init__(self, shape: str, *, tiny: bool, channel_projection: bool) -> None:
        make_config, self._dtype = SHAPES[shape]
        self._config = make_config(tiny=tiny)
        model = build_denoiser(self._config, materialize=False)
        self._stock = self._infos(model)
        if channel_projection:
            attach_projections(model)
        self._copies = self._infos(model)
        self._noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).repeat(2)

    def _infos(self, model: torch.nn.Module) -> dict[str, TensorInfo]:
        tensors = sorted(model.state_dict().items())
        return {name: TensorInfo(tuple(tensor.shape), self._dtype) for name, tensor in tensors}

    @property
    def num_parameters(self) -> int:
        """Of one model, without projections."""
        return self.num_bytes // self._dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of one model, without projections."""
        return sum(info.num_bytes for info in self._stock.values())

    def write(self, folder: Path) -> None:
        """Writes theta_0 as ``folder``/0 and its copies as ``folder``/1 to 4; what is there is kept."""
        needed = (len(MERGE_WEIGHTS) + 2) * self.num_bytes
        if not (folder / "0").exists() and shutil.disk_usage(folder).free < 1.1 * needed:
            raise SystemExit(f"{folder} needs {1.1 * needed / 1e9:.0f} GB free; --folder names another place.")
        # Any class on pixels will do for the folder: merging looks at tensors alone.
        config = {**self._config, "_class_name": "UNet2DModel"}
        for index in range(len(MERGE_WEIGHTS) + 1):
            if not (folder / str(index)).exists():
                infos = self._copies if index else self._stock
                weights = write_model_folder(folder / str(index), denoiser_config=config, scheduler_config={})
                write_tensors(weights, infos, self._tensors(infos, index))

    def _tensors(self, infos: Mapping[str, TensorInfo], index: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in infos.items():
            tensor = 0.02 * self._random(name, info)
            if is_projection(name):
                tensor = torch.eye(info.shape[0])
            yield name, torch.add(tensor, self._random(f"{index} {name}", info), alpha=1e-3) if index else tensor

    def _random(self, name: str, info: TensorInfo) -> torch.Tensor:
        """Returns numbers cut from one block of noise, which is some thirty times faster than drawing all anew."""
        count = info.num_bytes // info.dtype.itemsize
        start = zlib.crc32(name.encode()) % _BLOCK
        block = self._noise[start : start + _BLOCK]
        return block.repeat(-(-count // _BLOCK))[:count].view(info.shape)


def merge_in_child(method: str, quantity: str, folder: Path, python: str = sys.executable) -> tuple[float, ...]:
    """Returns the seconds or the peak bytes of one merge, or both; see benchmarks.merge_child."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [python, "-m", "benchmarks.merge_child", method, quantity, str(folder), *map(str, MERGE_WEIGHTS)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=_CHECKOUT)
    return tuple(map(float, finished.stdout.splitlines()[-1].split()))


@contextmanager
def mergekit_environment(folder: Path, given: Path | None) -> Iterator[str | None]:
    """Gives the Python of an environment with mergekit, made for the purpose; None if it cannot be installed."""
    if given is not None:
        yield str(given)
        return
    uv = shutil.which("uv") or str(_CHECKOUT / ".uv" / "bin" / "uv")
    with tempfile.TemporaryDirectory(dir=folder, prefix="deme-mergekit-") as place:
        python = f"{place}/bin/python"
        try:
            subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, place], check=True)
            subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "mergekit"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"mergekit could not be installed ({error}); it takes no part.")
            yield None
        else:
            yield python


class Contest:
    """Merges by several methods, and what they wrote compared with what DeMe wrote.

    Args:
        folder: with the models.
        methods: name in `benchmarks.merge_child`, by name in the table.
        mergekit: the Python that has it.
        together: time and memory are measured in one run.
    """

    def __init__(self, folder: Path, methods: Mapping[str, str], mergekit: str | None, *, together: bool) -> None:
        self._folder, self._methods, self._mergekit, self._together = folder, methods, mergekit or "", together
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, float] = {}
        self.differences: dict[str, float] = {}
        self._ours: dict[str, torch.Tensor] = {}

    def run(self, num_rounds: int) -> None:
        """Measures the seconds of copying and of each method, one per round, and the peak bytes of each method."""
        contestants = {name: partial(self._run, name, method) for name, method in self._contestants().items()}
        if not self._together:
            contestants[_COPY]()  # Warms the page cache.
        self.seconds = take_turns(contestants, num_rounds=num_rounds)
        for name, method in self._methods.items() if not self._together else ():
            (self.peaks[name],) = merge_in_child(method, "peak_bytes", self._folder, self._python(method))

    def _contestants(self) -> dict[str, str]:
        return {_COPY: "copy", **self._methods}

    def _python(self, method: str) -> str:
        return self._mergekit if method == "mergekit" else sys.executable

    def _run(self, name: str, method: str) -> float:
        together = self._together and method != "copy"
        found = merge_in_child(method, "both" if together else "seconds", self._folder, self._python(method))
        if together:
            self.peaks[name] = max(found[1], self.peaks.get(name, 0.0))
        if method != "copy":
            self._compare(name)
        shutil.rmtree(self._folder / "out")
        return found[0]

    def _compare(self, name: str) -> None:
        """Notes the largest difference of a tenth of the tensors from those that DeMe wrote, which comes first."""
        written = Checkpoint(*(self._folder / "out").rglob("*.safetensors"))
        names = list(written)[::10]
        if name == _DEME:
            self._ours = {key: written[key].clone() for key in names}
        elif self._ours:
            gaps = [(written[key].float() - self._ours[key].float()).abs().max().item() for key in names]
            self.differences[name] = max(gaps)


def report(contest: Contest, *, title: str, model_bytes: int) -> None:
    """Prints the table and the result."""
    seconds, peaks = contest.seconds, contest.peaks
    ratios = {name: median_ratio(values, seconds[_COPY]) for name, values in seconds.items()}
    memory = {name: peak / model_bytes for name, peak in peaks.items()}
    rows = [
        (
            name,
            f"{statistics.median(values):.2f}",
            f"{ratios[name]:.2f}",
            f"{peaks[name] / 1e6:.0f}" if name in peaks else "",
            f"{memory[name]:.2f}" if name in peaks else "",
        )
        for name, values in seconds.items()
    ]
    print_table(title, ("", "s", "over cat + cp", "peak memory, MB", "over one model"), rows)
    print_result(
        "merge",
        ratio=ratios[_DEME],
        goal=TIME_GOAL,
        holds=ratios[_DEME] <= TIME_GOAL and memory[_DEME] <= MEMORY_GOAL,
        memory_ratio=memory[_DEME],
        memory_goal=MEMORY_GOAL,
        model_bytes=model_bytes,
        time_ratios=ratios,
        memory_ratios=memory,
        largest_differences=contest.differences,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the models, measures, prints a table and the result."""
    options = _options(arguments)
    models = Models(options.shape, tiny=options.quick, channel_projection=options.channel_projection)
    title = f"Merging {len(MERGE_WEIGHTS)} copies of {models.num_parameters / 1e6:.1f} M parameters, "
    title += f"{str(SHAPES[options.shape][1]).removeprefix('torch.')}"
    title += ", with channel projections" if options.channel_projection else ""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="deme-merge-") as scratch:
        folder = options.models or Path(scratch)
        folder.mkdir(exist_ok=True, parents=True)
        models.write(folder)
        with mergekit_environment(Path(scratch), options.mergekit_python) as mergekit:
            methods = {name: _METHODS[name] for name in _METHODS if _METHODS[name] in options.methods}
            if options.channel_projection or mergekit is None:  # Only DeMe folds.
                methods = {_DEME: "deme"} if options.channel_projection else {_DEME: "deme", _LOAD_ALL: "load_all"}
            contest = Contest(folder, methods, mergekit, together=options.shape == "sdxl")
            contest.run(options.rounds)
    report(contest, title=f"{title}, medians of {options.rounds} rounds", model_bytes=models.num_bytes)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.merge", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: shows that it runs")
    parser.add_argument(
        "--shape", choices=SHAPES, default="lsun", help="113.7 M parameters in fp32, or 2,567 M in bf16 (34 GB of disk)"
    )
    parser.add_argument("--rounds", type=int, help="merges of each kind (default 7, sdxl 3, quick 1)")
    parser.add_argument("--folder", type=Path, help="where the models are written (default the temporary folder)")
    parser.add_argument("--models", type=Path, help="write the models here and leave them, or take those that are here")
    parser.add_argument("--methods", nargs="+", choices=_METHODS.values(), default=list(_METHODS.values()))
    parser.add_argument("--mergekit-python", type=Path, help="of an environment that has mergekit (default a new one)")
    parser.add_argument(
        "--channel-projection", action="store_true", help="the copies carry projections, which the merge folds in"
    )
    options: Any = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else {"lsun": 7, "sdxl": 3}[options.shape])
    if "deme" not in options.methods:
        options.methods.append("deme")
    return options


if __name__ == "__main__":
    main()
