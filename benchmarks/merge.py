"""What merging four copies costs: peak memory, and time over reading five model files and writing one.

The reference for time is ``cat`` of the five files to /dev/null followed by ``cp`` of one of them to a new file: the
bytes that any merge has to move, and no arithmetic. Every file lies in the page cache before anything is timed. Memory
is compared with the bytes of one model. The plain way, load all and add, runs beside it.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DModel

from benchmarks.measurement import median_ratio, print_result, print_table, take_turns
from deme_core.model_folder import write_model_folder
from deme_core.projection import attach_projections

TIME_GOAL, MEMORY_GOAL = 2.0, 1.3
MERGE_WEIGHTS = (0.3, 0.3, 0.2, 0.2)
_COPY, _DEME, _LOAD_ALL = "cat 5 files, cp 1", "DeMe", "load all and add"


def build_model(*, quick: bool) -> UNet2DModel:
    """Returns the architecture of google/ddpm-ema-church-256 (113.7 million parameters), or half its width."""
    width = 64 if quick else 128
    return UNet2DModel(
        sample_size=256,
        block_out_channels=tuple(width * factor for factor in (1, 1, 2, 2, 4, 4)),
        layers_per_block=2,
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        attention_head_dim=None,
    )


def write_models(folder: Path, model: UNet2DModel, *, channel_projection: bool) -> None:
    """Writes the pretrained model as ``folder``/0 and its copies, slightly off, as ``folder``/1 to 4."""
    config = {"_class_name": "UNet2DModel", **model.config}
    tensors = dict(model.state_dict())
    write_model_folder(folder / "0", denoiser_config=config, scheduler_config={}, tensors=tensors)
    if channel_projection:
        attach_projections(model)
        tensors = dict(model.state_dict())
    for index in range(len(MERGE_WEIGHTS)):
        expert = {name: torch.add(tensor, torch.randn_like(tensor), alpha=1e-3) for name, tensor in tensors.items()}
        write_model_folder(folder / str(index + 1), denoiser_config=config, scheduler_config={}, tensors=expert)


def merge_in_child(method: str, quantity: str, folder: Path) -> float:
    """Returns the seconds or the peak bytes of one merge; see benchmarks.merge_child."""
    command = [sys.executable, "-m", "benchmarks.merge_child", method, quantity, str(folder), *map(str, MERGE_WEIGHTS)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(folder / "out")
    return float(finished.stdout.splitlines()[-1])


def measure(
    folder: Path, methods: Mapping[str, str], num_rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of copying and of each method, one per round, and the peak bytes of each method."""
    contestants = {
        name: partial(merge_in_child, method, "seconds", folder) for name, method in {_COPY: "copy", **methods}.items()
    }
    contestants[_COPY]()  # Warms the page cache.
    seconds = take_turns(contestants, num_rounds=num_rounds)
    return seconds, {name: merge_in_child(method, "peak_bytes", folder) for name, method in methods.items()}


def report(seconds: dict[str, list[float]], peaks: dict[str, float], *, title: str, model_bytes: int) -> None:
    """Prints the table and the result."""
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
        load_all_ratio=ratios.get(_LOAD_ALL),
        load_all_memory_ratio=memory.get(_LOAD_ALL),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the models, measures, prints a table and the result."""
    options = _options(arguments)
    methods = {_DEME: "deme"} if options.channel_projection else {_DEME: "deme", _LOAD_ALL: "load_all"}
    model = build_model(quick=options.quick)
    model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    title = f"Merging {len(MERGE_WEIGHTS)} copies of {model_bytes / 4e6:.1f} M parameters, fp32"
    title += ", with channel projections" if options.channel_projection else ""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="deme-merge-") as scratch:
        write_models(Path(scratch), model, channel_projection=options.channel_projection)
        del model
        seconds, peaks = measure(Path(scratch), methods, options.rounds)
    report(seconds, peaks, title=f"{title}, medians of {options.rounds} rounds", model_bytes=model_bytes)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.merge", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and one round: shows that it runs")
    parser.add_argument("--rounds", type=int, help="merges of each kind (default 7, quick 1)")
    parser.add_argument("--folder", type=Path, help="where the models are written (default the temporary folder)")
    parser.add_argument(
        "--channel-projection", action="store_true", help="the copies carry projections, which the merge folds in"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 7)
    return options


if __name__ == "__main__":
    main()
