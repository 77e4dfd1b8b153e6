"""One merge, or the copying it is compared with, in a fresh process.

Run by benchmarks.merge as ``python -m benchmarks.merge_child METHOD QUANTITY FOLDER WEIGHT…`` with a method from
`METHODS` and a quantity from `QUANTITIES`; prints the numbers. The method mergekit runs in an environment of its own.
Time and memory are measured in processes of their own, since sampling the memory slows a merge down. Only torch is
imported before the idle memory is read: whatever else a merge needs counts as its own.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch  # Idle memory is that of an interpreter with torch.

from benchmarks.memory import PeakAnonymousMemory, anonymous_bytes

WEIGHTS_PATH = Path("unet/diffusion_pytorch_model.safetensors")


def prepare_copy(pretrained: Path, experts: Sequence[Path], weights: Sequence[float], out: Path) -> Callable[[], None]:
    """Imports what DeMe's merge imports, so that both find the machine alike, and returns the copying."""
    import tasks.work.merge  # noqa: F401

    def copy() -> None:
        files = [str(folder / WEIGHTS_PATH) for folder in (pretrained, *experts)]
        subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
        (out / WEIGHTS_PATH).parent.mkdir(parents=True)
        subprocess.run(["cp", files[0], str(out / WEIGHTS_PATH)], check=True)

    return copy


def prepare_deme(pretrained: Path, experts: Sequence[Path], weights: Sequence[float], out: Path) -> Callable[[], None]:
    """Imports DeMe's merge and returns the call."""
    from deme_core.recipe import MethodSpec
    from tasks.work.merge import merge_folders

    # As the others write it, whatever it rounds away.
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[_stored_type(pretrained)]
    return lambda: merge_folders(pretrained, list(experts), MethodSpec(), tuple(weights), out, dtype=dtype)


def prepare_load_all(
    pretrained: Path, experts: Sequence[Path], weights: Sequence[float], out: Path
) -> Callable[[], None]:
    """Imports safetensors and returns the plain way: load every model, add, save."""
    from safetensors.torch import load_file, save_file

    def merge() -> None:
        base, *others = [load_file(folder / WEIGHTS_PATH) for folder in (pretrained, *experts)]
        merged = {
            key: tensor + sum(weight * (other[key] - tensor) for weight, other in zip(weights, others, strict=True))
            for key, tensor in base.items()
        }
        (out / WEIGHTS_PATH).parent.mkdir(parents=True)
        save_file(merged, out / WEIGHTS_PATH, metadata={"format": "pt"})

    return merge


def prepare_mergekit(
    pretrained: Path, experts: Sequence[Path], weights: Sequence[float], out: Path
) -> Callable[[], None]:
    """Imports mergekit and returns what its command ``mergekit-pytorch`` does, in float32 as DeMe's merge."""
    from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch

    models = [
        {"model": str(folder / WEIGHTS_PATH), "parameters": {"weight": weight}}
        for folder, weight in zip(experts, weights, strict=True)
    ]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(pretrained / WEIGHTS_PATH),
        "models": models,
        "dtype": "float32",
        "out_dtype": {"BF16": "bfloat16", "F32": "float32"}[_stored_type(pretrained)],
    }
    recipe = out.parent / "mergekit.yaml"
    recipe.write_text(json.dumps(config))  # Which is YAML too.
    return lambda: mergekit_pytorch([str(recipe), str(out)], standalone_mode=False)


def _stored_type(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_PATH, "pt") as file:
        return str(file.get_slice(next(iter(file.keys()))).get_dtype())


def measure_both(prepare: Callable[[], Callable[[], None]]) -> tuple[float, int]:
    """Returns seconds and peak of one merge: for models so large that sampling the memory costs nothing beside."""
    idle = anonymous_bytes()
    with PeakAnonymousMemory() as memory:
        merge = prepare()
        started = time.perf_counter()
        merge()
        seconds = time.perf_counter() - started
    return seconds, memory.peak_bytes - idle


def measure_seconds(prepare: Callable[[], Callable[[], None]]) -> tuple[float]:
    """Returns how long a merge takes once everything is imported."""
    merge = prepare()
    started = time.perf_counter()
    merge()
    return (time.perf_counter() - started,)


def measure_peak_bytes(prepare: Callable[[], Callable[[], None]]) -> tuple[int]:
    """Returns the peak of anonymous memory, imports included, over what this process had before."""
    idle = anonymous_bytes()
    with PeakAnonymousMemory() as memory:
        prepare()()
    return (memory.peak_bytes - idle,)


METHODS = {"copy": prepare_copy, "deme": prepare_deme, "load_all": prepare_load_all, "mergekit": prepare_mergekit}
QUANTITIES: dict[str, Callable[[Callable[[], Callable[[], None]]], tuple[float, ...]]] = {
    "seconds": measure_seconds,
    "peak_bytes": measure_peak_bytes,
    "both": measure_both,
}


def main(method: str, quantity: str, folder: Path, weights: Sequence[float]) -> None:
    """Merges ``folder``/0 and its experts ``folder``/1, 2, … into ``folder``/out."""
    experts = [folder / str(index + 1) for index in range(len(weights))]
    print(*QUANTITIES[quantity](lambda: METHODS[method](folder / "0", experts, weights, folder / "out")))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [float(weight) for weight in sys.argv[4:]])
