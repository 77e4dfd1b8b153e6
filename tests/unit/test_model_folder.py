import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from deme_core.checkpoint import save_tensors, tensor_infos
from deme_core.errors import ModelFolderError
from deme_core.model_folder import (
    WEIGHTS_NAME,
    build_denoiser,
    load_denoiser,
    load_tensors,
    open_model_folder,
)
from deme_core.model_folder_writer import write_like, write_model_folder
from deme_core.projection import attach_projections
from deme_core.recipe import MethodSpec
from tasks.work.merge import merge_folders
from tests.tiny_models import (
    SCHEDULER_CONFIG,
    UNET_CONFIG,
    UNET_VARIANTS,
    predict,
    randomize,
    same_bits,
    tiny_unet,
    write_tiny_folder,
)
from tests.tiny_pipelines import save_pipeline

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder that tests damage."""
    return write_tiny_folder(tmp_path / "model", tiny_unet())


def flatten(folder: Path) -> Path:
    """Moves all parts into one folder, the other layout of the hub."""
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    (folder / "model_index.json").unlink()
    return folder


def pickle_weights(folder: Path, content: Any = None) -> Path:
    (folder / "unet" / WEIGHTS_NAME).unlink()
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(tiny_unet().state_dict() if content is None else content, file)
    return file


def shard(folder: Path) -> None:
    tensors = tiny_unet().state_dict()
    (folder / "unet" / WEIGHTS_NAME).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_tensors(folder / "unet" / file, {name: tensors[name] for name in held})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "unet" / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("variant", UNET_VARIANTS.values(), ids=UNET_VARIANTS.keys())
def test_what_is_written_loads_again_with_every_bit(tmp_path: Path, variant: dict[str, Any]) -> None:
    model = tiny_unet(**variant)
    loaded = load_denoiser(open_model_folder(write_tiny_folder(tmp_path, model, **variant)))
    state = loaded.state_dict()
    assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
    assert predict(loaded.eval()).equal(predict(model))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_stock_diffusers_loads_what_was_written(folder: Path) -> None:
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert type(pipeline.unet) is UNet2DModel
    assert type(pipeline.scheduler) is DDPMScheduler
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    assert predict(pipeline.unet).equal(predict(tiny_unet()))


def test_a_scheduler_config_is_what_stock_diffusers_writes(tmp_path: Path) -> None:
    """With the list of defaults other samplers would take their own, and no scores would compare."""
    made, file = DDPMScheduler(timestep_spacing="trailing"), Path("scheduler") / "scheduler_config.json"
    ours = tmp_path / "ours"
    write_model_folder(
        ours,
        denoiser_config={"_class_name": "UNet2DModel", **tiny_unet().config},
        scheduler_config={"_class_name": "DDPMScheduler", **made.config},
        tensors=tiny_unet().state_dict(),
    )
    DDPMPipeline.from_pretrained(ours).save_pretrained(tmp_path / "stock")
    stock = json.loads((tmp_path / "stock" / file).read_text())
    assert json.loads((ours / file).read_text()).items() == {k: v for k, v in stock.items() if k[:2] != "_d"}.items()
    expected = open_model_folder(tmp_path / "stock").scheduler_config
    of_before = json.loads((ours / file).read_text()) | {"_use_default_values": ["variance_type"]}
    (ours / file).write_text(json.dumps(of_before))
    found = open_model_folder(ours).scheduler_config
    assert found == {name: value for name, value in expected.items() if name != "_diffusers_version"}


def test_a_ddim_scheduler_makes_a_ddim_pipeline(tmp_path: Path) -> None:
    write_model_folder(
        tmp_path,
        denoiser_config=UNET_CONFIG,
        scheduler_config={"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"},
        tensors=tiny_unet().state_dict(),
    )
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is DDIMPipeline
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_the_caller_may_write_the_weights(tmp_path: Path) -> None:
    weights = write_model_folder(tmp_path, denoiser_config=UNET_CONFIG, scheduler_config=SCHEDULER_CONFIG)
    assert not weights.exists()
    save_tensors(weights, tiny_unet().state_dict())
    assert predict(load_denoiser(open_model_folder(tmp_path)).eval()).equal(predict(tiny_unet()))


def test_what_stock_diffusers_writes_is_read(tmp_path: Path) -> None:
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler(num_train_timesteps=50)).save_pretrained(tmp_path)
    opened = open_model_folder(tmp_path)
    assert opened.num_train_timesteps == 50
    assert predict(load_denoiser(opened).eval()).equal(predict(tiny_unet()))


@pytest.mark.parametrize("with_index", [False, True])
def test_the_layout_in_one_folder_is_read(folder: Path, with_index: bool) -> None:
    index = (folder / "model_index.json").read_bytes()
    flatten(folder)
    if with_index:  # As google/ddpm-cifar10-32 has it.
        (folder / "model_index.json").write_bytes(index)
    opened = open_model_folder(folder)
    assert opened.weights == (folder / WEIGHTS_NAME,)
    assert predict(load_denoiser(opened).eval()).equal(predict(tiny_unet()))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", WEIGHTS_NAME])
def test_a_missing_file_is_named(folder: Path, name: str, flat: bool) -> None:
    if flat:
        flatten(folder)
    file = next(folder.rglob(name))
    file.unlink()
    with pytest.raises(ModelFolderError, match=rf"{file} is missing; a model folder needs it\."):
        open_model_folder(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=rf"There is no model folder {tmp_path / 'nowhere'}\."):
        open_model_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b'{"a": ', "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"), (b"[1]", "does not hold a JSON object")],
)
def test_a_damaged_config_is_named(folder: Path, name: str, content: bytes, sentence: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=rf"{folder / name} {sentence}"):
        open_model_folder(folder)


def test_truncated_weights_are_named(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=rf"{file} is not a whole safetensors file"):
        load_denoiser(open_model_folder(folder))


@pytest.mark.parametrize("class_name", ["UNet2DConditionModel", None])
def test_a_model_of_another_class_is_refused(folder: Path, class_name: str | None) -> None:
    config = UNET_CONFIG | {"_class_name": class_name}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=f"describes a {class_name}; known are UNet2DModel"):
        open_model_folder(folder)


def test_a_pipeline_that_no_family_knows_is_refused_with_those_known(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    known = "known are DDIMPipeline, DDPMPipeline, DiTPipeline, .*PixArtAlphaPipeline, .*, StableDiffusionXLPipeline"
    with pytest.raises(ModelFolderError, match=rf"describes a LDMPipeline; {known}\."):
        open_model_folder(folder)


def test_the_pipeline_of_any_sampler_is_read(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(file.read_text().replace("DDPMPipeline", "PNDMPipeline"))
    assert predict(load_denoiser(open_model_folder(folder)).eval()).equal(predict(tiny_unet()))


def test_transformers_saved_before_they_had_classes_of_their_own_are_read(tmp_path: Path) -> None:
    expected = load_denoiser(open_model_folder(save_pipeline("DiTPipeline", tmp_path))).state_dict()
    file = tmp_path / "transformer" / "config.json"
    file.write_text(file.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    model = load_denoiser(open_model_folder(tmp_path))
    assert type(model).__name__ == "DiTTransformer2DModel"
    assert all(same_bits(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "tokenizer", "unet"])
def test_a_part_that_a_pipeline_needs_is_named(missing: str, tmp_path: Path) -> None:
    shutil.rmtree(save_pipeline("StableDiffusionPipeline", tmp_path) / missing)
    with pytest.raises(ModelFolderError, match=rf"{missing}, which a StableDiffusionPipeline needs\."):
        open_model_folder(tmp_path)


def test_only_the_files_that_stock_diffusers_loads_are_frozen_parts(tmp_path: Path) -> None:
    path = save_pipeline("PixArtAlphaPipeline", tmp_path)
    expected = {file.relative_to(path) for file in open_model_folder(path).frozen_files()}
    for name in (
        "model.fp16.safetensors",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin",
        "flax_model.msgpack",
    ):
        (path / "text_encoder" / name).write_bytes(b"{}")
    found = {file.relative_to(path) for file in open_model_folder(path).frozen_files()}
    assert found == expected
    assert {str(name) for name in found} >= {"model_index.json", "tokenizer/tokenizer.json", "vae/config.json"}


def test_a_pickled_text_encoder_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = save_pipeline("PixArtAlphaPipeline", tmp_path)
    (path / "text_encoder" / "model.safetensors").unlink()
    (path / "text_encoder" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFolderError, match=r"text_encoder/pytorch_model.bin is pickled, which can run code"):
        open_model_folder(path)
    folder = open_model_folder(path, allow_pickle=True)
    assert path / "text_encoder" / "pytorch_model.bin" in folder.frozen_files(allow_pickle=True)


def pickle_part(folder: Path, *, num_shards: int = 1, suffix: str = ".bin") -> None:
    """Replaces the weights of a frozen part by pickled ones, as the hub has them."""
    (file,) = folder.glob("*.safetensors")
    tensors, name = load_file(file), file.name.replace("model", "pytorch_model") if file.name[0] == "m" else file.name
    name = name.removesuffix(".safetensors")
    file.unlink()
    if num_shards == 1:
        torch.save(tensors, folder / f"{name}{suffix}")
        return
    weight_map = {key: f"{name}-{index % num_shards}{suffix}" for index, key in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({key: tensors[key] for key in tensors if weight_map[key] == shard}, folder / shard)
    (folder / f"{name}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_pickled_frozen_parts_that_are_allowed_become_safetensors(part: str, num_shards: int, tmp_path: Path) -> None:
    path = save_pipeline("StableDiffusionPipeline", tmp_path / "model")
    expected = open_model_folder(path).adapter()
    states, images = expected.encode_prompts(["a cat"])["encoder_hidden_states"], torch.zeros(1, 3, 16, 16)
    latents = expected.encode_images(images)
    pickle_part(path / part, num_shards=num_shards)
    with pytest.raises(ModelFolderError, match=rf"{part}/.* is pickled, which can run code"):
        open_model_folder(path)
    # The adapter reads no pickle, whoever opened the folder.
    unchecked = open_model_folder(path, allow_pickle=True).adapter()
    with pytest.raises(ModelFolderError, match=rf"{part} cannot be loaded"):
        unchecked.decode_latents(unchecked.encode_prompts(["a cat"])["encoder_hidden_states"])

    folder = open_model_folder(path, allow_pickle=True)
    write_like(tmp_path / "copy", folder, tensors=load_denoiser(folder).state_dict(), allow_pickle=True)
    assert not list((tmp_path / "copy").rglob("*.bin*"))
    copy = open_model_folder(tmp_path / "copy").adapter()
    assert copy.encode_prompts(["a cat"])["encoder_hidden_states"].equal(states)
    assert copy.encode_images(images).equal(latents)


@pytest.mark.parametrize("has_decoy", [False, True])
def test_pickled_shards_of_another_name_are_refused(tmp_path: Path, has_decoy: bool) -> None:
    path = save_pipeline("StableDiffusionPipeline", tmp_path)
    pickle_part(path / "text_encoder", num_shards=2, suffix=".txt")
    if has_decoy:
        save_tensors(path / "text_encoder" / "other.safetensors", {"a": torch.ones(1)})
    for allow_pickle in (False, True):
        with pytest.raises(ModelFolderError, match=r"pytorch_model\.bin\.index\.json names '.*\.txt' .* no \.bin file"):
            open_model_folder(path, allow_pickle=allow_pickle)


def test_an_index_of_pickled_shards_alone_is_refused(tmp_path: Path) -> None:
    path = save_pipeline("StableDiffusionPipeline", tmp_path)
    pickle_part(path / "text_encoder", num_shards=2)
    save_tensors(path / "text_encoder" / "other.safetensors", {"a": torch.ones(1)})  # Beside which .bin is left out.
    with pytest.raises(ModelFolderError, match=r"pytorch_model\.bin\.index\.json is pickled"):
        open_model_folder(path)


def test_an_index_of_pickled_shards_beside_safetensors_is_copied(tmp_path: Path) -> None:
    path = save_pipeline("StableDiffusionPipeline", tmp_path)
    index = path / "text_encoder" / "pytorch_model.bin.index.json"  # As DeepFloyd/IF-I-XL-v1.0 has it.
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))
    assert index in open_model_folder(path).frozen_files()


@pytest.mark.parametrize("name", ["a.bin", "a.txt"])
def test_shards_of_a_denoiser_that_are_no_safetensors_are_refused(folder: Path, name: str) -> None:
    torch.save(tiny_unet().state_dict(), folder / "unet" / name)
    index = {"weight_map": dict.fromkeys(tiny_unet().state_dict(), name)}
    (folder / "unet" / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelFolderError, match=rf"index\.json names '{name}' in its weight_map, which is no .safetensors"
    ):
        open_model_folder(folder)


@pytest.mark.parametrize("kind", ["index", "index.fp16", "fp16.index"])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_an_index_of_a_frozen_part_does_not_lead_out_of_its_folder(part: str, kind: str, tmp_path: Path) -> None:
    path = save_pipeline("StableDiffusionPipeline", tmp_path / "model")
    adapter = open_model_folder(path).adapter()
    (file,) = (path / part).glob("*.safetensors")
    names = list(load_file(file))
    file.rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../outside.safetensors")}
    (path / part / f"{file.name}.{kind}.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=rf"{part}/{file.name}\.{kind}\.json has no weight_map"):
        open_model_folder(path)
    # As the frozen parts of a copy, which are in another folder than the one that was opened.
    with pytest.raises(ModelFolderError, match="has no weight_map"):
        adapter.decode_latents(adapter.encode_prompts(["a cat"])["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer/model_index.json", {"_class_name": "DiffusionPipeline"}, "makes tokenizer more than one model"),
        ("text_encoder/adapter_config.json", {"base_model_name_or_path": "/x"}, "makes text_encoder more than one"),
        ("text_encoder/config.json", {"transformers_weights": "adapter_model.bin"}, "names the file of its weights"),
    ],
)
def test_a_part_that_names_other_models_or_weights_is_refused(
    name: str, content: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    file = save_pipeline("StableDiffusionPipeline", tmp_path) / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | content))
    with pytest.raises(ModelFolderError, match=sentence):
        open_model_folder(tmp_path)


def test_weights_of_other_shapes_than_the_config_gives_are_listed(folder: Path) -> None:
    config = UNET_CONFIG | {"in_channels": 3, "out_channels": 3}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelFolderError,
        match=r"mis-shaped tensors: conv_in.weight \(8, 1, 3, 3\) for \(8, 3, 3, 3\), conv_out.bias \(1,\) for \(3,\)",
    ):
        load_denoiser(open_model_folder(folder))


def test_missing_and_extra_weights_are_listed(folder: Path) -> None:
    tensors = tiny_unet().state_dict() | {"head": torch.ones(1)}
    del tensors["conv_in.bias"]
    save_tensors(folder / "unet" / WEIGHTS_NAME, tensors)
    with pytest.raises(ModelFolderError, match=r"missing tensors: conv_in\.bias; extra tensors: head\.$"):
        load_denoiser(open_model_folder(folder))


def test_pickled_weights_are_refused_unless_allowed(folder: Path) -> None:
    file = pickle_weights(folder)
    with pytest.raises(ModelFolderError, match=rf"{file} is pickled, .* set pretrained.allow_pickle: true\."):
        open_model_folder(folder)
    loaded = load_denoiser(open_model_folder(folder, allow_pickle=True))
    assert predict(loaded.eval()).equal(predict(tiny_unet()))


def test_safetensors_are_preferred_to_pickled_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert predict(load_denoiser(open_model_folder(folder, allow_pickle=True)).eval()).equal(predict(tiny_unet()))


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def test_a_malicious_pickle_is_refused_even_when_allowed(folder: Path, tmp_path: Path) -> None:
    file = pickle_weights(folder, {"conv_in.weight": torch.ones(1), "evil": RunsCode(tmp_path / "trace")})
    with pytest.raises(ModelFolderError, match=rf"{file} cannot be read safely"):
        load_denoiser(open_model_folder(folder, allow_pickle=True))
    assert not (tmp_path / "trace").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "trace").exists()  # It would have run.


@pytest.mark.parametrize("content", [[torch.ones(1)], {"state_dict": {"a": torch.ones(1)}}, {"step": 3}], ids=str)
def test_a_pickle_of_anything_else_is_refused(folder: Path, content: Any) -> None:
    file = pickle_weights(folder, content)
    with pytest.raises(ModelFolderError, match=rf"{file} does not hold named tensors and nothing else\."):
        load_denoiser(open_model_folder(folder, allow_pickle=True))


def test_a_damaged_pickle_is_refused(folder: Path) -> None:
    file = pickle_weights(folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelFolderError, match=rf"{file} cannot be read safely"):
        load_denoiser(open_model_folder(folder, allow_pickle=True))


def test_sharded_weights_are_read(folder: Path) -> None:
    shard(folder)
    opened = open_model_folder(folder)
    assert [file.name for file in opened.weights] == ["a.safetensors", "b.safetensors"]
    assert predict(load_denoiser(opened).eval()).equal(predict(tiny_unet()))


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "unet" / "b.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"unet misses b\.safetensors, which .*index\.json names\."):
        open_model_folder(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}], ids=str)
def test_an_index_without_files_is_named(folder: Path, index: dict[str, Any]) -> None:
    file = folder / "unet" / f"{WEIGHTS_NAME}.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=rf"{file} has no weight_map"):
        open_model_folder(folder)


def save_under_old_names(folder: Path) -> None:
    old = {}
    for name, tensor in tiny_unet().state_dict().items():
        for new_part, old_part in OLD_NAMES.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        old[name] = tensor
    assert sum(".query." in name for name in old) == 8
    save_tensors(folder / "unet" / WEIGHTS_NAME, old)


def test_a_model_under_old_names_is_merged_with_copies_under_todays(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    save_under_old_names(folder)
    merge_folders(folder, [tmp_path / "copy"], MethodSpec(), (0.5,), tmp_path / "merged")
    merged = UNet2DModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    assert predict(merged).equal(predict(tiny_unet()))


def test_attention_layers_under_their_old_names_are_read(folder: Path) -> None:
    save_under_old_names(folder)

    loaded = load_denoiser(open_model_folder(folder))

    assert predict(loaded.eval()).equal(predict(tiny_unet()))
    assert predict(UNet2DModel.from_pretrained(folder, subfolder="unet")).equal(predict(tiny_unet()))


def expert_with_projections() -> nn.Module:
    model = tiny_unet()
    attach_projections(model)
    return randomize(model, seed=1)


def test_an_expert_loads_folded(tmp_path: Path) -> None:
    expert = expert_with_projections()
    loaded = load_denoiser(open_model_folder(write_tiny_folder(tmp_path, expert)))
    assert loaded.state_dict().keys() == tiny_unet().state_dict().keys()
    torch.testing.assert_close(predict(loaded.eval()), predict(expert), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_float32(folder: Path, dtype: torch.dtype) -> None:
    half = tiny_unet().to(dtype).state_dict()
    save_tensors(folder / "unet" / WEIGHTS_NAME, half)
    state = load_denoiser(open_model_folder(folder)).state_dict()
    assert all(same_bits(state[name], tensor.float()) for name, tensor in half.items())


def test_a_loaded_model_does_not_depend_on_its_files(folder: Path) -> None:
    model = load_denoiser(open_model_folder(folder)).eval()
    file = folder / "unet" / WEIGHTS_NAME
    content = file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(bytes(len(content)))
    assert predict(model).equal(predict(tiny_unet()))
    randomize(model, seed=1)
    assert file.read_bytes() == bytes(len(content))


def test_the_checkpoint_is_what_is_stored(folder: Path) -> None:
    opened = open_model_folder(folder)
    stored = opened.checkpoint().tensors()
    assert all(same_bits(tensor, stored[name]) for name, tensor in load_tensors(opened).items())


def test_a_model_without_weights_has_the_names_and_shapes_of_one_with() -> None:
    empty = build_denoiser(UNET_CONFIG, materialize=False)
    assert {tensor.device.type for tensor in empty.parameters()} == {"meta"}
    assert tensor_infos(empty.state_dict()) == tensor_infos(build_denoiser(UNET_CONFIG).state_dict())
