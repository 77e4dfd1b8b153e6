"""What the features of generated images cost in memory, over PNG files and clean-fid's own path over their folder.

Both sides take the same images, which are there before anything is timed, the same network, and end with a Fréchet
distance from the same reference: ours from batches in memory, theirs by saving each image, `get_folder_features` and
`frechet_distance`. Inception's trained weights are not needed for that: it is torchvision's architecture with random
ones, as TorchScript, called as clean-fid calls its own file.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measurement import Duration, median_ratio, print_result, print_table, take_turns, timed
from deme_core.extractors import FeatureArray, NetworkExtractor, load_extractor
from deme_core.metrics.frechet import frechet_distance_to
from deme_core.reference import Reference

GOAL = 1 / 3
_BATCH_SIZE, _CLEANFID_BATCH_SIZE = 64, 128
_OURS = "DeMe, in memory"
_OUR_FEATURES, _OUR_DISTANCE = "of DeMe's: features", "of DeMe's: Fréchet distance"
_THEIR_FEATURES, _THEIR_DISTANCE = "of clean-fid's: files and features", "of clean-fid's: Fréchet distance"


class InceptionLayers(torch.nn.Module):
    """Torchvision's Inception-V3 under the names that clean-fid uses: ``layers`` gives 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import Inception3

        self.layers = Inception3(init_weights=False, aux_logits=False).eval()
        self.layers.fc = torch.nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of standardised images (B, 3, 299, 299)."""
        features: torch.Tensor = self.layers(images)
        return features


@dataclass(frozen=True)
class Setup:
    """What both sides use.

    Attributes:
        extractor: turns batches in memory into features.
        images: uint8 (n, 3, size, size).
        reference: features of other images; None leaves the distance out.
        model: the extractor's network as clean-fid calls it, from a batch that its data loader made.
        resize: what clean-fid's data loader does with an image; None for its own.
        device: where the network is.
    """

    extractor: NetworkExtractor
    images: torch.Tensor
    reference: Reference | None
    model: Callable[[torch.Tensor], torch.Tensor]
    resize: Callable[[Any], Any] | None
    device: str = "cpu"


def load_stand_in(folder: Path, device: str) -> NetworkExtractor:
    """Returns the extractor ``inception`` with random weights."""
    torch.manual_seed(0)
    path = folder / "random-inception.pt"
    torch.jit.trace(InceptionLayers(), torch.zeros(1, 3, 299, 299)).save(str(path))
    return _loaded("inception", str(path), None, folder, device)


def _loaded(name: str, weights: str | None, resolution: int | None, folder: Path, device: str) -> NetworkExtractor:
    extractor = load_extractor(name, weights=weights, resolution=resolution, cache=folder, device=device)
    assert isinstance(extractor, NetworkExtractor)
    return extractor


def build_setup(
    name: str, folder: Path, *, num_images: int, size: int, resolution: int, distance: bool, device: str
) -> Setup:
    """Returns images, as smooth as photographs are, with their reference and both ways to features."""
    noise = torch.rand(num_images + 64, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1).mul(255).byte()
    if name == "inception":
        extractor = load_stand_in(folder, device)
    else:
        extractor = _loaded(name, None, resolution, folder, device)
    model, resize = (extractor.network, None) if name == "inception" else _as_cleanfid(extractor, resolution)
    reference = _draw_reference(extractor) if distance else None
    return Setup(extractor, images[:num_images], reference, model, resize, device)


def _draw_reference(extractor: NetworkExtractor) -> Reference:
    """Returns normal features, as many images as give a regular covariance: only the time of a distance counts."""
    drawn = np.random.default_rng(0).standard_normal((2 * extractor.num_features, extractor.num_features))
    reference = Reference(drawn.astype(np.float32), extractor_name=extractor.name)
    reference.statistics, reference.factor  # noqa: B018 - computed once per run, not once per score
    return reference


def _as_cleanfid(extractor: NetworkExtractor, resolution: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], Any]:
    """Returns any other network behind clean-fid's resizer, one image at a time as clean-fid resizes."""
    from cleanfid.resize import make_resizer

    # At the network's own resolution its preparation resizes nothing more, and standardises.
    return lambda batch: extractor.network(extractor.prepare(batch)), make_resizer(
        "PIL", False, "bicubic", (resolution, resolution)
    )


def ours(setup: Setup) -> None:
    """Computes the Fréchet distance of the images, in batches as generation yields them."""
    features = our_features(setup)
    if setup.reference:
        frechet_distance_to(setup.reference, features)


def our_features(setup: Setup) -> FeatureArray:
    """Returns the features, in batches as generation yields them."""
    return np.concatenate([setup.extractor(batch) for batch in setup.images.split(_BATCH_SIZE)])


def theirs(setup: Setup, num_workers: int) -> None:
    """Computes the same along files and clean-fid's own functions."""
    features = their_features(setup, num_workers)
    if setup.reference:
        their_distance(setup.reference, features)


def their_distance(reference: Reference, features: FeatureArray) -> float:
    """Returns clean-fid's Fréchet distance; the reference's mean and covariance are there, as its statistics are."""
    from cleanfid.fid import frechet_distance

    real = reference.statistics
    with _quiet():
        mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False)
        return float(frechet_distance(mean, covariance, real.mean, real.covariance))


def their_features(setup: Setup, num_workers: int) -> FeatureArray:
    """Returns clean-fid's features of the images, saved as PNG files first."""
    from cleanfid.fid import get_folder_features

    with tempfile.TemporaryDirectory() as folder, _quiet():
        for index, image in enumerate(setup.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder) / f"{index:06}.png")
        features: FeatureArray = get_folder_features(
            folder,
            setup.model,
            num_workers=num_workers,
            batch_size=_CLEANFID_BATCH_SIZE,
            device=torch.device(setup.device),
            custom_fn_resize=setup.resize,
            verbose=False,
        )
    return features


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without SciPy's and the data loader's warnings, and clean-fid's words about singular products."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def measure(setup: Setup, workers: Sequence[int], num_rounds: int) -> dict[str, list[Duration]]:
    """Returns the durations of both ways, one per round, and of their parts."""
    contestants: dict[str, Callable[[], object]] = {_OURS: partial(ours, setup)}
    contestants |= {_label(count): partial(theirs, setup, count) for count in workers}
    our_features(setup)  # Warms up.
    durations = take_turns({name: partial(timed, call) for name, call in contestants.items()}, num_rounds=num_rounds)
    return durations | {name: [duration] for name, duration in parts(setup, workers[0]).items()}


def parts(setup: Setup, num_workers: int) -> dict[str, Duration]:
    """Returns what the features and the distance alone take, on both sides."""
    features = our_features(setup)
    calls: dict[str, Callable[[], object]] = {
        _OUR_FEATURES: partial(our_features, setup),
        _THEIR_FEATURES: partial(their_features, setup, num_workers),
    }
    if setup.reference:
        calls[_OUR_DISTANCE] = partial(frechet_distance_to, setup.reference, features)
        calls[_THEIR_DISTANCE] = partial(their_distance, setup.reference, features)
    return {name: timed(call) for name, call in calls.items()}


def _label(num_workers: int) -> str:
    return f"PNG files and clean-fid, num_workers {num_workers}"


def report(durations: Mapping[str, list[Duration]], *, title: str, difference: float, workers: Sequence[int]) -> None:
    """Prints the table and the result: the clock decides, processor seconds are what a busy machine does not change."""
    wall = {name: [duration.wall_sec for duration in values] for name, values in durations.items()}
    cpu = {name: [duration.cpu_sec for duration in values] for name, values in durations.items()}
    ratios = {count: median_ratio(wall[_OURS], wall[_label(count)]) for count in workers}
    cpu_ratios = {count: median_ratio(cpu[_OURS], cpu[_label(count)]) for count in workers}
    counts = {_label(count): count for count in workers}
    rows = []
    for name in durations:
        cells = [name]
        for seconds, over in ((wall, ratios), (cpu, cpu_ratios)):
            speedup = f"{1 / over[counts[name]]:.2f}" if name in counts else ""
            cells += [f"{statistics.median(seconds[name]):.2f}", speedup]
        rows.append(cells)
    print_table(title, ("", "wall s", "times DeMe's", "processor s", "times DeMe's"), rows)
    ratio = max(ratios.values())  # The faster of clean-fid's ways is the one to beat.
    details = {f"ratio_workers_{count}": value for count, value in ratios.items()}
    details |= {f"ratio_processor_workers_{count}": value for count, value in cpu_ratios.items()}
    details["ratio_features"] = wall[_OUR_FEATURES][0] / wall[_THEIR_FEATURES][0]
    details["ratio_processor_features"] = cpu[_OUR_FEATURES][0] / cpu[_THEIR_FEATURES][0]
    print_result("features", ratio=ratio, goal=GOAL, holds=ratio <= GOAL, largest_difference=difference, **details)


def largest_difference(setup: Setup) -> float:
    """Returns how far our features lie from clean-fid's, over the largest feature."""
    small = replace(setup, images=setup.images[:8])
    expected = their_features(small, 0)
    return float(np.abs(our_features(small) - expected).max() / np.abs(expected).max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and the result."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="deme-features-") as scratch:
        setup = build_setup(
            options.extractor,
            Path(scratch),
            num_images=options.num_images,
            size=options.size,
            resolution=options.resolution,
            distance=not options.features_only,
            device=options.device,
        )
        difference = largest_difference(setup)
        durations = measure(setup, options.workers, options.rounds)
    title = (
        f"{options.extractor}: {options.num_images} images of {options.size} pixels, {options.device}, "
        f"{torch.get_num_threads()} threads, medians of {options.rounds} rounds"
    )
    report(durations, title=title, difference=difference, workers=options.workers)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.features", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, one round: shows that it runs")
    parser.add_argument("--features-only", action="store_true", help="leave the Fréchet distance out on both sides")
    parser.add_argument("--extractor", choices=("inception", "efficientnet_lite0"), default="inception")
    parser.add_argument("--resolution", type=int, help="of efficientnet_lite0 (default 224)", default=224)
    parser.add_argument("--size", type=int, help="side of the images (default 32)", default=32)
    parser.add_argument("--num-images", type=int, help="images per round (default 512, quick 16)")
    parser.add_argument("--rounds", type=int, help="rounds of each kind (default 3, quick 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the network is, on both sides")
    parser.add_argument(
        "--workers", type=int, nargs="+", help="clean-fid's num_workers (default 0 and its own default, 12)"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.num_images = options.num_images or (16 if options.quick else 512)
    options.workers = options.workers or ([0] if options.quick else [0, 12])
    return options


if __name__ == "__main__":
    main()
