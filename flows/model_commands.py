"""What the command line does with models: export, merge, generate. Folders appear whole or not at all."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rich.console import Console
from rich.progress import track

from deme_core.artifacts import ArtifactStore, fetch_or_withdraw
from deme_core.errors import InputError
from deme_core.local_files import system_errors
from deme_core.manifest import ArtifactRef
from deme_core.recipe import Sampler
from deme_core.settings import Settings
from deme_core.store import open_store

# What `deme merge` stores weights in.
Dtype = Literal["float32", "float16", "bfloat16"]


def export_model(run: str | None, out: Path, row: str = "merged") -> Path:
    """Writes the merged or distilled model of a run, by default the newest that has one, into ``out``."""
    artifacts, ref = _find_model(run, row)
    with new_folder(out) as folder:
        shutil.copytree(fetch_or_withdraw(artifacts, ref), folder, dirs_exist_ok=True)
    return out


def export_lora(run: str | None, out: Path, rank: int | None) -> str:
    """Writes the merged model of a run of LoRA experts as one adapter into ``out``; returns what it is, in words.

    Args:
        run: as in `export_model`.
        out: the folder; ``lora.json`` in it has the error by layer.
        rank: of the adapter; None for the exact sum.

    Raises:
        InputError: there is no such run, or its merge is no adapter, or none of that kind.
    """
    artifacts, ref = _find_model(run, "merged")
    from tasks.lora_adapter import write_merged_adapter

    with new_folder(out) as folder:
        found = write_merged_adapter(artifacts, ref, rank, folder)
        (folder / "lora.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    words = f"{out}, a LoRA of rank {found.rank} for {found.num_layers} layers"
    if not found.errors:
        return f"{words}, the exact sum of the experts'"
    worst = max(found.errors, key=lambda layer: found.errors[layer])
    return f"{words}; relative error {found.error:.3g}, at most {found.errors[worst]:.3g} of one layer, {worst}"


def _find_model(run: str | None, row: str) -> tuple[ArtifactStore, ArtifactRef]:
    from tasks.tracked_runs import find_tag

    settings = Settings()
    ref = ArtifactRef.of_folder(find_tag(settings, f"deme.{row}.uri", run))
    return ArtifactStore(open_store(ref.store_uri), settings.cache_folder), ref


def merge_models(
    pretrained: Path, experts: list[Path], weights: str | None, out: Path, *, dtype: Dtype = "float32", **method: Any
) -> Path:
    """Merges model folders into the folder ``out``.

    Args:
        pretrained: folder of theta_0.
        experts: folders of the copies.
        weights: separated by commas; None for a method without.
        out: a new folder.
        dtype: what its floating-point weights are stored in.
        method: of `MethodSpec`; what is None is left at its default.

    Raises:
        InputError: weights or settings are none, do not fit the method, or are another method's.
    """
    try:
        parsed = tuple(float(weight) for weight in weights.split(",")) if weights else ()
    except ValueError:
        raise InputError(f"--weights '{weights}' are not numbers separated by commas.") from None
    from pydantic import ValidationError

    from deme_core.recipe import MethodSpec
    from tasks.work.merge import merge_folders

    given = {name: value for name, value in method.items() if value is not None}
    try:
        spec = MethodSpec.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise InputError(f"--{option} {problem['input']}: {problem['msg']}.") from None
    for name in sorted(given.keys() - spec.settings().keys()):
        option = name.replace("_", "-")
        raise InputError(
            f"--{option} is no setting of --method {spec.method}; leave it out, or give the method that it belongs to."
        )
    if spec.method == "average" and parsed:
        raise InputError("--method average takes no --weights.")
    import torch

    # None and not float32 itself, which would round a model of float64.
    stored = None if dtype == "float32" else getattr(torch, dtype)
    with new_folder(out) as folder:
        merge_folders(pretrained, experts, spec, parsed, folder, dtype=stored)
    return out


def generate_images(
    model: str,
    out: Path,
    *,
    num_images: int,
    seed: int,
    num_inference_steps: int,
    console: Console,
    batch_size: int = 64,
    sampler: str | None = None,
    prompts: str | None = None,
    guidance_scale: float = 1.0,
) -> None:
    """Writes ``num_images`` PNG files named by image index into the folder ``out``.

    Raises:
        InputError: the sampler does not fit the model, or it needs prompts.
    """
    if sampler not in (None, *get_args(Sampler)):
        raise InputError(f"--sampler '{sampler}' is none of {', '.join(get_args(Sampler))}.")
    import torch
    from PIL import Image

    from deme_core.generate import SingleModel, generate
    from deme_core.model_folder import load_denoiser, open_model_folder
    from deme_core.model_source import fetch_source
    from deme_core.prompts import load_prompts
    from deme_core.sampling import Sampling

    cache = Settings().cache_folder
    folder = open_model_folder(fetch_source(model, revision=None, cache=cache))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapter = folder.adapter(device)
    sampling = Sampling(
        cast(Sampler, sampler or adapter.noise_process.samplers[0]),
        num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    batches = generate(
        SingleModel(load_denoiser(folder).eval().to(device)),
        adapter,
        sampling,
        seed=seed,
        indices=range(num_images),
        prompts=load_prompts(prompts, cache) if prompts else None,
        device=device,
    )
    with new_folder(out) as partial:
        index = 0
        total = math.ceil(num_images / batch_size)
        for images in track(batches, "generating", total=total, console=console, disable=not console.is_terminal):
            for image in images.permute(0, 2, 3, 1).numpy():
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial / f"{index:06d}.png")
                index += 1


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        InputError: there is something under ``path`` already.
        StoreUnavailableError: it cannot be written, e.g. because the disk is full.
    """
    with system_errors(str(path), "choose another --out"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists and is not an empty folder; choose another --out.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".deme-") as name:
            partial = Path(name) / "whole"
            partial.mkdir()
            yield partial
            partial.replace(path)
