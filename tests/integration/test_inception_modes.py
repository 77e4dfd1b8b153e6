"""Clean-fid's modes, against clean-fid itself on the same images in a folder."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image

from deme_core.errors import ExtractorUnavailableError
from deme_core.extractors import FeatureExtractor, NetworkExtractor, load_extractor
from deme_core.extractors.inception import resize_on_device
from deme_core.metrics import Comparison, metric_name, score
from deme_core.metrics.frechet import frechet_distance_to
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from tests.inception_stand_in import draw_images, save_pytorch_stand_in, save_torchscript_stand_in

MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
TORCHSCRIPT_FILE = "inception-2015-12-05.pt"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    torchscript = save_torchscript_stand_in(folder / TORCHSCRIPT_FILE)
    return {
        "clean": torchscript,
        "legacy_pytorch": save_pytorch_stand_in(folder / "stand-in.pth"),
        "legacy_tensorflow": torchscript,
    }


def load(mode: str, weights: Path | str | None, cache: Path) -> FeatureExtractor:
    evaluate = EvaluateSpec.model_validate({"num_images": 2, "extractor_mode": mode})
    given = None if weights is None else str(weights)
    return load_extractor(evaluate.extractor_name, weights=given, cache=cache, device="cpu")


def model_of_cleanfid(
    mode: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What clean-fid's build_feature_extractor returns, its downloads served from our files."""
    from cleanfid import features, inception_torchscript

    load = lambda *_, **__: torch.load(weights, weights_only=True)  # noqa: E731
    monkeypatch.setattr("cleanfid.inception_pytorch.load_state_dict_from_url", load)

    def local(_path: str, download: bool, resize_inside: bool) -> torch.nn.Module:
        return inception_torchscript.InceptionV3W(str(weights.parent), download=False, resize_inside=resize_inside)

    monkeypatch.setattr("cleanfid.features.InceptionV3W", local)
    built: Callable[[torch.Tensor], torch.Tensor] = features.build_feature_extractor(mode, CPU, use_dataparallel=False)
    return built


def features_of_cleanfid(
    mode: str, images: torch.Tensor, model: Callable[[torch.Tensor], torch.Tensor], folder: Path
) -> np.ndarray:
    """Features along clean-fid's own path: PNG files, its data loader, its resizer."""
    from cleanfid.fid import get_folder_features

    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{index:04}.png")
    with warnings.catch_warnings():  # clean-fid silences all that follow
        features: np.ndarray = get_folder_features(
            str(folder), model, num_workers=0, batch_size=4, device=CPU, mode=mode, verbose=False
        )
    return features


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64), (3, 320)])
def test_features_in_memory_are_those_of_cleanfids_folder_path(
    mode: str,
    channels: int,
    size: int,
    weights: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = draw_images(3, channels, size)
    model = model_of_cleanfid(mode, weights[mode], monkeypatch)
    theirs = features_of_cleanfid(mode, images, model, tmp_path / "images")
    ours = load(mode, weights[mode], tmp_path)(images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("mode", MODES)
def test_the_distances_in_memory_are_those_of_cleanfids_folder_path(
    mode: str, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid.fid import fid_from_feats, kernel_distance

    # Real and generated images differ in contrast. The network of legacy_pytorch is Inception in full, and slow.
    num_images, num_projected = (8, 5) if mode == "legacy_pytorch" else (80, 64)
    real, generated = draw_images(num_images, 3, 32, seed=0), draw_images(num_images, 3, 32, seed=1) // 2
    model = model_of_cleanfid(mode, weights[mode], monkeypatch)
    theirs = [
        features_of_cleanfid(mode, images, model, tmp_path / name)
        for name, images in {"real": real, "generated": generated}.items()
    ]
    extractor = load(mode, weights[mode], tmp_path)
    ours = [extractor(images) for images in (real, generated)]

    # All features are mixed into fewer than there are images, since clean-fid's matrix square root, which is slow for
    # 2048 features, does not converge for singular covariances.
    mixing = np.random.default_rng(0).standard_normal((2048, num_projected)) / 2048**0.5
    reference = Reference((ours[0] @ mixing).astype(np.float32), extractor_name=extractor.name)
    distance = frechet_distance_to(reference, ours[1] @ mixing)
    assert distance == pytest.approx(fid_from_feats(*(features @ mixing for features in theirs)), rel=1e-6)

    whole = Comparison(features=ours[1], reference=Reference(ours[0], extractor.name), kid_subset_size=5)
    np.random.seed(whole.kid_seed)
    expected = kernel_distance(*theirs, num_subsets=100, max_subset_size=5)
    assert score(whole, ("kid",))[metric_name("kid", extractor.name)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64), (3, 320)])
def test_a_gpu_resizes_as_cleanfid_does(channels: int, size: int) -> None:
    images = draw_images(3, channels, size)
    with warnings.catch_warnings():
        resizer = build_resizer("clean")
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    theirs = torch.from_numpy(np.stack([resizer(image) for image in pixels])).permute(0, 3, 1, 2)
    ours = resize_on_device(images, device=CPU)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=3e-5)


def test_every_mode_has_its_own_digest_and_features(weights: dict[str, Path], tmp_path: Path) -> None:
    extractors = {mode: load(mode, weights[mode], tmp_path) for mode in MODES}
    assert len({extractor.digest for extractor in extractors.values()}) == 3
    assert extractors["clean"].name == "inception"
    images = draw_images(2, 3, 32)
    clean, resized_inside = (extractors[mode](images) for mode in ("clean", "legacy_tensorflow"))
    assert np.abs(clean - resized_inside).max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_nothing_in_what_is_resized(mode: str, weights: dict[str, Path], tmp_path: Path) -> None:
    extractor = load(mode, weights[mode], tmp_path)
    assert isinstance(extractor, NetworkExtractor)
    images, num_threads = draw_images(5, 3, 40), torch.get_num_threads()
    alone = torch.cat([extractor.prepare(image[None]) for image in images])
    torch.set_num_threads(3)
    try:
        together = extractor.prepare(images)
    finally:
        torch.set_num_threads(num_threads)
    # PyTorch's own interpolation, which legacy_pytorch uses, takes another kernel where it has one thread.
    tolerance = 1e-4 if mode == "legacy_pytorch" else 0
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def test_loading_a_mode_silences_no_warnings(weights: dict[str, Path], tmp_path: Path) -> None:
    before = list(warnings.filters)
    load("legacy_pytorch", weights["legacy_pytorch"], tmp_path)
    assert warnings.filters == before


class Trap:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_legacy_pytorch_refuses_other_files_and_runs_none_of_their_code(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    tensors = torch.load(weights["legacy_pytorch"], weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "fc.bias"}, tmp_path / "missing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(tensors | {"fc.bias": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    (tmp_path / "truncated.pth").write_bytes(weights["legacy_pytorch"].read_bytes()[:-200])
    for name in ("missing.pth", "list.pth", "trap.pth", "truncated.pth", "absent.pth"):
        with pytest.raises(ExtractorUnavailableError, match=r"extractor_weights .*pt_inception-2015-12-05-6726825d"):
            load("legacy_pytorch", tmp_path / name, tmp_path / "cache")
    with pytest.raises(ExtractorUnavailableError, match="another kind"):
        load("legacy_pytorch", weights["clean"], tmp_path / "cache")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where pytorch-fid's file is downloaded from."""
    source = tmp_path / "published" / "weights.pth"
    source.parent.mkdir()
    monkeypatch.setattr("cleanfid.inception_pytorch.FID_WEIGHTS_URL", source.as_uri())
    yield source


def test_pytorch_fids_weights_are_downloaded_once(published: Path, weights: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ExtractorUnavailableError, match="cannot be downloaded"):
        load("legacy_pytorch", None, cache)
    published.write_bytes(weights["legacy_pytorch"].read_bytes()[:-200])
    with pytest.raises(ExtractorUnavailableError, match="damaged"):
        load("legacy_pytorch", None, cache)
    assert not list(cache.rglob("*.pth"))
    published.write_bytes(weights["legacy_pytorch"].read_bytes())
    first = load("legacy_pytorch", None, cache)
    published.unlink()
    assert load("legacy_pytorch", None, cache).digest == first.digest


def test_a_download_whose_checksum_is_not_in_its_name_is_refused(
    published: Path, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = published.with_name("weights-6726825d.pth")
    named.write_bytes(weights["legacy_pytorch"].read_bytes())
    monkeypatch.setattr("cleanfid.inception_pytorch.FID_WEIGHTS_URL", named.as_uri())
    with pytest.raises(ExtractorUnavailableError, match="damaged on their way"):
        load("legacy_pytorch", None, tmp_path / "cache")


@pytest.mark.parametrize("extractor", ["efficientnet_lite0", "dinov2_vitl14", "clip_vit_b_32"])
def test_only_inception_has_modes(extractor: str) -> None:
    with pytest.raises(ValueError, match=f"legacy_pytorch is a mode of inception, not of {extractor}"):
        EvaluateSpec.model_validate({"num_images": 2, "extractor": extractor, "extractor_mode": "legacy_pytorch"})


def test_the_mode_changes_settings_only_where_it_is_not_the_default() -> None:
    assert "extractor_mode" not in EvaluateSpec(num_images=2).model_dump(mode="json")
    legacy = EvaluateSpec(num_images=2, extractor_mode="legacy_pytorch")
    assert EvaluateSpec.model_validate(legacy.model_dump(mode="json")) == legacy
