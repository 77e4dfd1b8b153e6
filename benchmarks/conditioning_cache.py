"""What a finetuning step costs on cached latents and embeddings, over encoding images and captions in every step.

A pipeline of Stable Diffusion 1.x's shape, narrower and with random weights, is finetuned by `Training` as shipped: on
JPEG files and captions, which VAE and text encoder encode again in each step; on encodings read from files; and on one
batch that lies encoded in memory, which no way of reading can beat. The goal is about the last.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.measurement import Duration, median_ratio, print_result, print_table, take_turns, timed
from deme_core.encodings import (
    Embeddings,
    EncodedBatches,
    Latents,
    distinct_captions,
    write_embeddings,
    write_latents,
)
from deme_core.families import Adapter, EncodedBatch, encode_batch
from deme_core.images import ImageSubset, TrainingBatches, load_images, split_heldout
from deme_core.model_folder import load_denoiser, open_model_folder
from deme_core.recipe import DatasetSpec, FinetuneSpec
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training import Training
from deme_core.training_plan import TrainingPlan

GOAL = 1.05
_IMAGES, _CACHE, _MEMORY = "images and captions", "cached latents and embeddings", "a batch in memory"
_NEVER, _NUM_TOKENS = 1_000_000, 77
_STREAM: dict[str, Any] = {"seed": 0, "random_flip": True, "caption_dropout": 0.1}
Durations = dict[str, list[Duration]]


def save_pipeline(folder: Path, *, size: int, width: int) -> Path:
    """Writes a pipeline of the architecture of Stable Diffusion 1.x; ``width`` 320 is its own."""
    torch.manual_seed(0)
    vae_width, text_width = max(width * 2 // 5 // 32 * 32, 32), max(width * 12 // 5 // 64 * 64, 64)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=_NUM_TOKENS
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=12,
        num_attention_heads=text_width // 32,
        max_position_embeddings=_NUM_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=size,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=size // 8,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=text_width,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_images(folder: Path, *, num_images: int, size: int) -> ImageSubset:
    """Writes JPEG files as smooth as photographs are, in a folder for each of ten classes, and opens them."""
    noise = torch.rand(num_images, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, size=(size, size * 5 // 4), mode="bicubic").clamp(0, 1)
    for number, pixels in enumerate(images.mul(255).byte()):
        path = folder / "abcdefghij"[number % 10] / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    spec = DatasetSpec(
        source="imagefolder",
        path=str(folder),
        resolution=size,
        caption_template="a photo of {label}",
        num_heldout_images=2,
    )
    return split_heldout(load_images(spec, cache=folder.parent / "cache"), spec.num_heldout_images)[0]


@dataclass(frozen=True, eq=False)
class Cache:
    """What was encoded, and what that took.

    Attributes:
        latents: of the images and their mirror images.
        embeddings: of the captions.
        seconds: to encode and write all, in processor time and on the clock.
        num_latent_bytes: in files, for each image with its mirror image.
        num_embedding_bytes: in files, for each distinct caption.
    """

    latents: Latents
    embeddings: Embeddings
    seconds: Duration
    num_latent_bytes: float
    num_embedding_bytes: float


def build_cache(folder: Path, images: ImageSubset, adapter: Adapter) -> Cache:
    """Encodes all images and captions."""
    whole, texts = images.dataset, distinct_captions(images.captions or ())
    for name in ("latents", "embeddings"):
        (folder / name).mkdir(parents=True)

    def write() -> None:
        list(write_latents(folder / "latents", whole, adapter, low=0, high=len(whole), mirrored=True))
        list(write_embeddings(folder / "embeddings", texts, adapter))

    seconds = timed(write)
    return Cache(
        Latents([folder / "latents"], resolution=images.resolution, mirrored=True),
        Embeddings([folder / "embeddings"], texts),
        seconds,
        _num_bytes(folder / "latents") / len(whole),
        _num_bytes(folder / "embeddings") / len(texts),
    )


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(
    model: Path, images: ImageSubset, cache: Cache, *, batch_size: int, num_rounds: int, device: str
) -> Durations:
    """Returns how long the three kinds of steps took, one per round."""
    folder = open_model_folder(model)
    adapter, denoiser = folder.adapter(device), load_denoiser(folder)
    stream: dict[str, Any] = _STREAM | {"batch_size": batch_size}
    encoded = EncodedBatches(images, images.indices, cache.latents, cache.embeddings, adapter, **stream)
    sources: dict[str, Callable[[], Iterator[EncodedBatch]]] = {
        _IMAGES: lambda: _encoded_anew(adapter, TrainingBatches(images, random_crop=False, **stream)),
        _CACHE: lambda: iter(encoded),
        _MEMORY: lambda: itertools.repeat(next(iter(encoded))),
    }
    steps = {
        name: Training(
            copy.deepcopy(denoiser),
            adapter,
            lambda _first_batch, source=source: source(),  # type: ignore[misc]
            spec=FinetuneSpec(num_steps=_NEVER, batch_size=batch_size, checkpoint_every=_NEVER),
            plan=TrainingPlan("benchmark", TimestepSampler(TimestepSegment(0, 250), 1000, 0.3), _NEVER, 1.0),
            teacher=Teacher([copy.deepcopy(denoiser)]),
            device=device,
            record_every=1,
        ).progress()
        for name, source in sources.items()
    }
    contestants = {name: _waited(step.__next__, device) for name, step in steps.items()}
    take_turns(contestants, num_rounds=1)  # Warms up, and loads the frozen parts.
    return take_turns(contestants, num_rounds=num_rounds)


def _encoded_anew(adapter: Adapter, batches: TrainingBatches) -> Iterator[EncodedBatch]:
    return (encode_batch(adapter, batch.clean_images, captions=batch.captions) for batch in batches)


def _waited(call: Callable[[], object], device: str) -> Callable[[], Duration]:
    def wait() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize(device)

    return lambda: timed(wait)


def report(durations: Durations, cache: Cache, *, batch_size: int, num_images: int, title: str, on_gpu: bool) -> None:
    """Prints the table and the result; on a CPU it is processor time that counts."""
    seconds = {
        name: [duration.wall_sec if on_gpu else duration.cpu_sec for duration in values]
        for name, values in durations.items()
    }
    rates = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median_ratio(values, seconds[_MEMORY]) for name, values in seconds.items()}
    rows = [(name, f"{rate:.2f}", f"{ratios[name]:.3f}") for name, rate in rates.items()]
    print_table(title, ("a step on", f"images per {'' if on_gpu else 'processor '}second", "seconds over memory"), rows)
    encoding = (cache.seconds.wall_sec if on_gpu else cache.seconds.cpu_sec) / num_images
    print_table(
        "The cache",
        ("", ""),
        [
            ("bytes per image, with its mirror image", f"{cache.num_latent_bytes:,.0f}"),
            ("bytes per distinct caption", f"{cache.num_embedding_bytes:,.0f}"),
            ("seconds per image, once", f"{encoding:.3f}"),
        ],
    )
    print_result(
        "conditioning_cache",
        ratio=ratios[_CACHE],
        goal=GOAL,
        holds=ratios[_CACHE] <= GOAL,
        images_per_sec_without=rates[_IMAGES],
        images_per_sec_with=rates[_CACHE],
        seconds_with_over_without=median_ratio(seconds[_CACHE], seconds[_IMAGES]),
        bytes_per_image=cache.num_latent_bytes,
        bytes_per_caption=cache.num_embedding_bytes,
        seconds_to_encode_an_image=encoding,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables and the result."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="deme-benchmark-") as name:
        model = save_pipeline(Path(name) / "model", size=options.size, width=options.width)
        images = write_images(Path(name) / "images", num_images=options.num_images, size=options.size)
        cache = build_cache(Path(name) / "encoded", images, open_model_folder(model).adapter(options.device))
        durations = measure(
            model, images, cache, batch_size=options.batch_size, num_rounds=options.rounds, device=options.device
        )
    report(
        durations,
        cache,
        batch_size=options.batch_size,
        num_images=options.num_images,
        title=f"One finetuning step: width {options.width} of Stable Diffusion's 320, {options.size} pixels, batch "
        f"{options.batch_size}, fp32, {options.device}, medians of {options.rounds} rounds",
        on_gpu=options.device == "cuda",
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.conditioning_cache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow model and few rounds: shows that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", type=int, help="side of the images, in pixels (default 128, quick 64)")
    parser.add_argument("--width", type=int, help="channels of the UNet's first level (default 64, quick 32)")
    parser.add_argument("--batch-size", type=int, default=2, help="images per step (default 2)")
    parser.add_argument("--num-images", type=int, default=24, help="images in the data set (default 24)")
    parser.add_argument("--rounds", type=int, help="steps of each kind (default 5, quick 2)")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default all cores)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.size = options.size or (64 if options.quick else 128)
    options.width = options.width or (32 if options.quick else 64)
    return options


if __name__ == "__main__":
    main()
