"""What others write, mutated and at random: manifests, recipes, safetensors and configs fail with a DemeError alone."""

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deme_core.artifacts import ArtifactStore
from deme_core.checkpoint import Checkpoint
from deme_core.errors import ChecksumMismatchError, DemeError, ModelFolderError
from deme_core.file_store import FileStore
from deme_core.manifest import ArtifactRef, Manifest
from deme_core.model_folder import load_denoiser, open_model_folder
from deme_core.recipe_file import dump_recipe, load_recipe
from tests.tiny_models import one_level_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline
from tests.unit.test_artifacts import DIGEST, MANIFEST
from tests.unit.test_recipe import MINIMAL

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(max_size=8) | st.sampled_from(["..", "/etc/passwd", "../../up", "a/b", "a\\b", ".tmp-x", "con\0"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | NAMES
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one part, however deep, replaced, removed or doubled."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        change = draw(st.sampled_from(["deeper", "deeper", "remove", "rename"]))
        rest = {k: v for k, v in value.items() if k != key}
        if change == "remove":
            return rest
        if change == "rename":
            return rest | {draw(NAMES): value[key]}
        return rest | {key: draw(mutated(value[key]))}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(mutated(value[index])), *value[index:]]
    return draw(JSON)


def only_deme_errors(act: Callable[[], object]) -> None:
    with contextlib.suppress(DemeError):
        act()


@quick
@given(mutated(json.loads(MANIFEST.to_json())))
def test_a_mutated_manifest_is_read_or_refused(content: Any) -> None:
    only_deme_errors(lambda: Manifest.from_json(json.dumps(content)))


@quick
@given(st.binary(max_size=200) | st.text(max_size=200))
@example(b"[" * 100_000)
@example(b"9" * 10_000)
@example("\ud800".encode("utf-8", "surrogatepass"))
def test_bytes_that_are_no_manifest_are_refused(content: bytes | str) -> None:
    with pytest.raises(ChecksumMismatchError):
        Manifest.from_json(content)


@quick
@given(name=NAMES | st.text(), key=NAMES | st.text(), size=st.integers(-1, 10))
def test_no_name_of_a_manifest_leads_out_of_the_cache(name: str, key: str, size: int) -> None:
    """Whatever a manifest says, its files are fetched below the artifact's folder, or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        artifacts = ArtifactStore(FileStore(root / "store"), root / "in" / "cache")
        (root / "secret").write_text("x" * max(size, 0))
        content = json.loads(MANIFEST.to_json())
        home = f"merge/{DIGEST}/upload-{'0' * 32}"
        content["files"] = [
            {"name": name, "key": f"{home}/a", "size": 1, "sha256": "f" * 64},
            {"name": "b", "key": key, "size": size, "sha256": "f" * 64},
        ]
        artifacts.store.put_bytes(f"{home}/a", b"1")
        artifacts.store.put_bytes(f"merge/{DIGEST}/manifest.json", json.dumps(content).encode())
        before = _tree(root, except_for="in")
        only_deme_errors(lambda: artifacts.fetch(ArtifactRef(f"{artifacts.store.uri}/merge/{DIGEST}", DIGEST)))
        assert _tree(root, except_for="in") == before
        assert not [path for path in (root / "in").rglob("*") if path.is_file()], "no sha256 was right"


def _tree(root: Path, *, except_for: str) -> set[str]:
    names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    return {name for name in names if name.partition("/")[0] != except_for}


def test_a_link_in_the_store_becomes_a_file_in_the_cache(tmp_path: Path) -> None:
    artifacts = ArtifactStore(FileStore(tmp_path / "store"), tmp_path / "cache")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("told")
    ref, _ = artifacts.publish("merge", DIGEST, tmp_path / "made", settings={}, inputs={})
    stored = tmp_path / "store" / artifacts.manifest(ref).files[0].key
    elsewhere = stored.with_name("elsewhere")
    stored.rename(elsewhere)
    stored.symlink_to(elsewhere)
    copy = artifacts.fetch(ref) / "a"
    assert not copy.is_symlink() and copy.read_text() == "told"


@quick
@given(mutated(MINIMAL), st.lists(st.text(max_size=12), max_size=2))
def test_a_mutated_recipe_is_read_or_refused(content: Any, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        try:
            recipe = load_recipe(str(path), overrides)
        except DemeError as error:
            assert "\n" not in str(error).strip()
            return
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(str(path)) == recipe


@quick
@given(st.text(max_size=60) | st.binary(max_size=60))
@example("[" * 2000)
@example("a: &a [*a, *a]\nb: *a")
@example("{a: 1, a: 2}")
@example("a: !!int ''")
@example("a: !!bool zz")
@example("a: !!timestamp zz")
@example("? [1, 2]\n: 3")
@example("1: 2")
@example("\ud800")
@example(b"\xff\xfe")
def test_text_that_is_no_recipe_is_refused(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        with pytest.raises(DemeError):
            load_recipe(str(path))


HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "a.bias": {"dtype": "BF16", "shape": [2], "data_offsets": [16, 20]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
}


def _read_all(path: Path) -> None:
    checkpoint = Checkpoint(path)
    infos, tensors = checkpoint.infos, checkpoint.tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: i.shape for n, i in infos.items()}


def _safetensors(header: bytes, length: int | None = None, data: bytes = bytes(28)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@quick
@given(mutated(HEADER), st.integers(-3, 3))
def test_a_mutated_safetensors_header_is_read_or_refused(header: Any, shift: int) -> None:
    encoded = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(_safetensors(encoded, max(len(encoded) + shift, 0)))
        only_deme_errors(lambda: _read_all(path))


@quick
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1))
@example(b"", 2**64 - 1)
@example(b"{}", 10**8)
@example(b"[" * 50_000, 50_000)
def test_bytes_that_are_no_safetensors_are_refused(content: bytes, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        for data in (content, _safetensors(content, length, b"")):
            path.write_bytes(data)
            only_deme_errors(lambda: _read_all(path))


@quick
@given(
    st.sampled_from(
        [
            "BOOL",
            "U8",
            "I8",
            "F8_E4M3",
            "F8_E5M2",
            "F8_E8M0",
            "F4",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "F64",
            "I64",
            "U64",
            "C64",
            "F6_E2M3",
            "X",
        ]
    )
)
def test_every_type_of_a_tensor_is_read_or_named(dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        for size in (1, 2, 4, 8):
            header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
            path.write_bytes(_safetensors(header, data=bytes(size)))
            only_deme_errors(lambda: _read_all(path))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    return write_tiny_folder(tmp_path_factory.mktemp("model"), one_level_unet(), **config)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@settings(parent=quick, max_examples=20)
@given(data=st.data())
def test_a_mutated_config_is_read_or_refused(model_folder: Path, name: str, data: st.DataObject) -> None:
    path = model_folder / name
    original = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(mutated(json.loads(original)))))
        only_deme_errors(lambda: _load(model_folder))
    finally:
        path.write_text(original)


def _load(folder: Path) -> None:
    model = open_model_folder(folder)
    load_denoiser(model)
    model.adapter()
    model.frozen_files()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 10_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b""])
def test_json_that_no_parser_takes_is_refused(model_folder: Path, content: bytes) -> None:
    path = model_folder / "unet" / "config.json"
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(DemeError, match=r"config\.json"):
            open_model_folder(model_folder)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../../other/diffusion_pytorch_model.safetensors", "..", "", "sub/a.safetensors", 3, None, []],
)
def test_a_shard_outside_its_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    folder = write_tiny_folder(tmp_path / "model", one_level_unet())
    other = write_tiny_folder(tmp_path / "other", one_level_unet())
    assert other.is_dir()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = list(Checkpoint(weights))
    (folder / "unet" / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(DemeError, match="weight_map"):
        open_model_folder(folder)


@pytest.mark.parametrize("part", ["..", "../secret", "/etc", "a/b", ""])
def test_a_part_outside_its_folder_is_refused(tmp_path: Path, part: str) -> None:
    folder = write_tiny_folder(tmp_path / "model", one_level_unet())
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.json").write_text("{}")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionPipeline", part: ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DemeError, match="model_index"):
        open_model_folder(folder)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("StableDiffusionPipeline", tmp_path_factory.mktemp("pipeline") / "model")


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize(
    "part",
    [["evil", "Model"], ["transformers.evil", "Model"], ["diffusers", "a.b"], ["diffusers", None], ["x"], [3, 4], [[]]],
)
def test_a_part_of_a_foreign_library_is_refused(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: list[Any]
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('the module ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    adapter = open_model_folder(folder).adapter()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: part}))
    with pytest.raises(ModelFolderError, match=r"only classes|misses"):
        open_model_folder(folder)
    # As the frozen parts of a copy, which are in another folder than the one that was opened.
    for load in (lambda: adapter.vae, lambda: adapter.encode_prompts(["a cat"])):
        with pytest.raises(ModelFolderError, match=r"model_index.*only classes of diffusers and transformers"):
            load()


@pytest.mark.parametrize("class_name", ["NoSuchModel", "pipelines", "DDIMScheduler", "DiffusionPipeline"])
def test_a_part_that_is_no_model_of_its_library_is_refused(
    pipeline_folder: Path, tmp_path: Path, class_name: str
) -> None:
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", class_name]}))
    with pytest.raises(ModelFolderError, match=f"{class_name}, which is no model of diffusers"):
        _ = open_model_folder(folder).adapter().vae


@settings(parent=quick, max_examples=20)
@given(data=st.data())
def test_a_mutated_index_of_a_pipeline_is_read_or_refused(pipeline_folder: Path, data: st.DataObject) -> None:
    path = pipeline_folder / "model_index.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(mutated(json.loads(original)))))
        only_deme_errors(lambda: open_model_folder(pipeline_folder).frozen_files())
    finally:
        path.write_text(original)


@pytest.mark.parametrize("digest", ["../../etc", 3, None, "x" * 64, ["a"]])
def test_a_copy_of_what_is_no_artifact_is_refused(tmp_path: Path, digest: Any) -> None:
    (tmp_path / "finetuned_copy.json").write_text(json.dumps({"pipeline": "DiTPipeline", "pretrained": digest}))
    with pytest.raises(DemeError, match="finetuned_copy"):
        open_model_folder(tmp_path)


def test_a_config_of_any_length_is_not_read(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "model", one_level_unet())
    with (folder / "unet" / "config.json").open("wb") as file:
        file.truncate(10**10)  # A hole, which takes no space.
    with pytest.raises(DemeError, match=r"config\.json holds 10000000000 bytes"):
        open_model_folder(folder)
