import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from deme_core.errors import InputError, ModelFolderError
from deme_core.families import FAMILIES, Adapter, encode_batch
from deme_core.families.adapter import NO_LABEL
from deme_core.generate import SingleModel, generate, initial_noise
from deme_core.images.training_batch import CropSizes
from deme_core.model_folder import ModelFolder, load_denoiser, open_model_folder, weights_digest
from deme_core.projection import attach_projections, fold_projections, is_projection
from deme_core.prompts import Prompts
from deme_core.recipe import MethodSpec, Sampler
from deme_core.sampling import Sampling
from deme_core.seeds import generator
from tasks.work.merge import merge_folders
from tests.tiny_models import one_level_unet, randomize_projections, tiny_images, write_tiny_folder
from tests.tiny_pipelines import PIPELINES, flux, save_pipeline

PROMPTS = Prompts(("a photo of a cat", "a truck", "photo of ship"), {}, "digest")
NUM_IMAGES = 4
every_pipeline = pytest.mark.parametrize("name", PIPELINES)
Folders = Callable[[str], ModelFolder]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Gives the folder of a pipeline, saved by stock diffusers when it is first asked for."""
    saved: dict[str, ModelFolder] = {}

    def folder(name: str) -> ModelFolder:
        if name not in saved:
            saved[name] = open_model_folder(save_pipeline(name, tmp_path_factory.mktemp(name)))
        return saved[name]

    return folder


def sampling_for(adapter: Adapter, **settings: Any) -> Sampling:
    return Sampling(**{"sampler": adapter.noise_process.samplers[0], "num_inference_steps": 4, **settings})


def images_of(folder: ModelFolder, **settings: Any) -> torch.Tensor:
    adapter = folder.adapter()
    batches = generate(
        SingleModel(load_denoiser(folder).eval()),
        adapter,
        sampling_for(adapter, **settings),
        seed=5,
        indices=range(NUM_IMAGES),
        prompts=PROMPTS,
    )
    return torch.cat(list(batches))


def stock_images(folder: ModelFolder, guidance_scale: float, **parts: Any) -> torch.Tensor:
    """Returns what the pipeline itself makes of the same noise, prompts or classes, sampler and steps."""
    pipeline = DiffusionPipeline.from_pretrained(folder.path, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if folder.index.pipeline not in ("StableDiffusion3Pipeline", "FluxPipeline"):
        # PixArt comes with linspace, which DDIM cannot step along: see `Sampling`.
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, timestep_spacing="leading"
        )
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "np"}
    if folder.index.pipeline == "DiTPipeline":
        settings["class_labels"] = list(range(NUM_IMAGES))
        settings["generator"] = [generator("image", 5, index) for index in range(NUM_IMAGES)]
    else:
        settings |= {"prompt": PROMPTS.of_images(range(NUM_IMAGES)), "height": 16, "width": 16}
        settings["latents"] = initial_noise(5, range(NUM_IMAGES), folder.adapter().latent_shape)[0]
    if folder.index.pipeline == "IFPipeline":
        del settings["latents"]
        settings["generator"] = [generator("image", 5, index) for index in range(NUM_IMAGES)]
    if folder.index.pipeline == "FluxPipeline":
        settings["latents"] = FluxPipeline._pack_latents(settings["latents"], NUM_IMAGES, 4, 8, 8)
        del settings["guidance_scale"]
        settings |= {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * NUM_IMAGES}
    if "PixArt" in str(folder.index.pipeline):
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    made = pipeline(**settings).images
    return torch.from_numpy((np.asarray(made) * 255).round()).to(torch.uint8).permute(0, 3, 1, 2)


def assert_same_images(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert int((actual.int() - expected.int()).abs().max()) <= 1


@every_pipeline
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_equal_those_of_the_stock_pipeline(name: str, guidance_scale: float, folders: Folders) -> None:
    made = images_of(folders(name), guidance_scale=guidance_scale)
    assert made.shape == (NUM_IMAGES, 3, 16, 16)
    assert_same_images(made, stock_images(folders(name), guidance_scale))
    assert len({tuple(image.flatten().tolist()) for image in made}) == NUM_IMAGES


@every_pipeline
def test_images_do_not_depend_on_the_batch_size(name: str, folders: Folders) -> None:
    whole = images_of(folders(name), guidance_scale=2.0)
    assert_same_images(images_of(folders(name), guidance_scale=2.0, batch_size=3), whole)


@every_pipeline
def test_guidance_changes_the_images(name: str, folders: Folders) -> None:
    assert not images_of(folders(name)).equal(images_of(folders(name), guidance_scale=5.0))


@every_pipeline
def test_another_condition_makes_other_images(name: str, folders: Folders) -> None:
    adapter, model = folders(name).adapter(), load_denoiser(folders(name)).eval()
    made = []
    for text, label in (("a photo of a cat", 3), ("a truck", 4)):
        batch = encode_batch(adapter, tiny_images(1, size=16, channels=3), captions=[text], labels=[label])
        with torch.no_grad():
            made.append(adapter.predict(model, batch.latents, torch.tensor([500]), batch.conditioning))
    assert not torch.allclose(*made, atol=1e-4)


@every_pipeline
def test_an_example_is_encoded_alike_in_any_batch(name: str, folders: Folders) -> None:
    adapter = folders(name).adapter()
    images, texts, labels = tiny_images(3, size=16, channels=3), ["a cat", "", "truck"], [0, NO_LABEL, 9]
    whole = encode_batch(adapter, images, captions=texts, labels=labels)
    one = encode_batch(adapter, images[1:2], captions=texts[1:2], labels=labels[1:2])
    torch.testing.assert_close(one.latents, whole.latents[1:2], atol=1e-5, rtol=1e-5)
    assert one.conditioning.keys() == whole.conditioning.keys() != set()
    for key, tensor in one.conditioning.items():
        assert len(whole.conditioning[key]) == 3
        torch.testing.assert_close(tensor, whole.conditioning[key][1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "IFPipeline"])  # It is on pixels.
def test_latents_are_the_scaled_mean_of_the_posterior(name: str, folders: Folders) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(folders(name).path / "vae")
    images = tiny_images(2, size=16, channels=3)
    with torch.no_grad():
        expected = (vae.encode(images).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    adapter = folders(name).adapter()
    latents = adapter.encode_images(images)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    torch.testing.assert_close(adapter.decode_latents(latents), decoded, atol=1e-4, rtol=1e-4)


def predict(folder: ModelFolder, model: nn.Module) -> torch.Tensor:
    """Returns what ``model`` predicts for two fixed examples; for a training step as well, so gradients are kept."""
    adapter = folder.adapter()
    batch = encode_batch(
        adapter, tiny_images(2, size=16, channels=3), captions=["a photo of a cat", "dog"], labels=[2, 7]
    )
    told = adapter.noise_process.model_timesteps(torch.tensor([3, 700]))
    return adapter.predict(model, batch.latents, told, batch.conditioning)


@every_pipeline
def test_folded_projections_give_the_same_output_in_a_stock_model(name: str, folders: Folders) -> None:
    folder = folders(name)
    model, stock = load_denoiser(folder).eval(), load_denoiser(folder).eval()
    attach_projections(model)
    randomize_projections(model)
    with torch.no_grad():
        before, projected = predict(folder, stock), predict(folder, model)
        assert not torch.allclose(before, projected, atol=1e-3)
        stock.load_state_dict(fold_projections(model.state_dict()))
        torch.testing.assert_close(predict(folder, stock), projected, atol=2e-5, rtol=1e-4)


@every_pipeline
def test_every_projection_takes_part_in_the_output(name: str, folders: Folders) -> None:
    model = load_denoiser(folders(name)).eval()
    attached = attach_projections(model)
    predict(folders(name), model).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if is_projection(key)}
    assert len(gradients) == len(attached)
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0] == []


@every_pipeline
def test_gradients_do_not_depend_on_gradient_checkpointing(name: str, folders: Folders) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_denoiser(folders(name)).train()
        folders(name).adapter().prepare_training(model)
        attach_projections(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        predict(folders(name), model).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@every_pipeline
def test_attention_is_torch_s_own(name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append(settings)
        return attend(*tensors, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        predict(folders(name), load_denoiser(folders(name)).eval())
    assert calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DiTPipeline", {"attn1.to_out.0", "ff.net.2"}),
        ("PixArtAlphaPipeline", {"attn1.to_out.0", "attn2.to_out.0", "ff.net.2"}),
        (
            "StableDiffusion3Pipeline",
            {"attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2"},
        ),
    ],
)
def test_attention_and_feed_forward_outputs_of_transformers_are_projected(
    name: str, expected: set[str], folders: Folders
) -> None:
    attached = attach_projections(load_denoiser(folders(name)))
    assert {key.removeprefix("transformer_blocks.0.") for key in attached if ".0." in key[:22]} == expected
    # The last joint block has no text output to project.
    last = {key.removeprefix("transformer_blocks.1.") for key in attached if key.startswith("transformer_blocks.1.")}
    assert last == expected - {"attn.to_add_out", "attn2.to_out.0" * (name[0] == "S"), "ff_context.net.2"}


def test_a_model_that_knows_no_such_class_says_so(folders: Folders) -> None:
    adapter = folders("DiTPipeline").adapter()
    with pytest.raises(InputError, match=r"knows the classes 0 to 999, but there are images of class 1000, 2000"):
        adapter.encode_labels([0, 2000, 1000, NO_LABEL])
    assert adapter.encode_labels([NO_LABEL])["class_labels"].tolist() == [1000]


@every_pipeline
def test_what_a_model_is_conditioned_on_must_be_there(name: str, folders: Folders) -> None:
    adapter = folders(name).adapter()
    missing = {"captions": "dataset.caption_column", "labels": "dataset.label_column"}[adapter.conditioned_on]
    with pytest.raises(InputError, match=missing):
        encode_batch(adapter, tiny_images(1, size=16, channels=3))


def test_text_to_image_needs_prompts(folders: Folders) -> None:
    adapter, model = folders("StableDiffusionPipeline").adapter(), SingleModel(nn.Identity())
    with pytest.raises(InputError, match=r"makes images from text; name a file of prompts"):
        next(generate(model, adapter, sampling_for(adapter), seed=0, indices=[0]))


@pytest.mark.parametrize(
    ("name", "sampler", "known"),
    [("StableDiffusion3Pipeline", "ddim", "flow_match_euler"), ("DiTPipeline", "flow_match_euler", "ddim or ddpm")],
)
def test_a_sampler_must_fit_the_model(name: str, sampler: Any, known: str, folders: Folders) -> None:
    with pytest.raises(InputError, match=rf"The sampler {sampler} does not fit a {name}; .* to {known}"):
        Sampling(sampler).build_scheduler(folders(name).adapter())


@pytest.mark.parametrize("name", ["IFPipeline", "DiTPipeline", "PixArtAlphaPipeline"])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_takes_a_fixed_variance_where_a_learned_one_is_left_out(
    name: str, variance_type: str, folders: Folders
) -> None:
    def with_variance(variance_type: str) -> ModelFolder:
        folder = folders(name)
        return replace(folder, scheduler_config={**folder.scheduler_config, "variance_type": variance_type})

    def recorded(variance_type: str, sampler: Sampler) -> Any:
        scheduler = Sampling(sampler).build_scheduler(with_variance(variance_type).adapter())
        return scheduler.config["variance_type"]

    assert recorded(variance_type, "ddpm") == "fixed_small"
    assert recorded("fixed_large", "ddpm") == "fixed_large"
    assert recorded(variance_type, "ddim") == variance_type, "DDIM has no use for it, and conditions are what they were"
    images, fixed = (images_of(with_variance(each), sampler="ddpm") for each in (variance_type, "fixed_small"))
    assert images.equal(fixed)


def test_an_autoencoder_that_normalizes_latents_is_refused(tmp_path: Path) -> None:
    config = save_pipeline("StableDiffusionPipeline", tmp_path / "sd") / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_mean": [0.5] * 4}))
    with pytest.raises(ModelFolderError, match="normalizes latents by latents_mean"):
        _ = open_model_folder(tmp_path / "sd").adapter().vae


def test_an_autoencoder_works_without_tf32(folders: Folders) -> None:
    adapter, seen = folders("StableDiffusionPipeline").adapter(), list[bool]()
    for part in (adapter.vae.encoder, adapter.vae.decoder):
        part.conv_in.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        adapter.decode_latents(adapter.encode_images(tiny_images(1, size=16, channels=3)))
        assert torch.backends.cudnn.allow_tf32, "what is trained has its own setting"
    assert seen == [False, False]


def test_flow_matching_has_no_choice_of_spacing(folders: Folders) -> None:
    adapter = folders("StableDiffusion3Pipeline").adapter()
    with pytest.raises(InputError, match=r"leave evaluate\.timestep_spacing out"):
        sampling_for(adapter, timestep_spacing="trailing").build_scheduler(adapter)


def test_images_of_another_size_are_refused(folders: Folders) -> None:
    adapter = folders("StableDiffusionPipeline").adapter()
    with pytest.raises(InputError, match=r"The images are 1 x 8 x 8, but .* makes 3 x 16 x 16; set dataset.resolution"):
        adapter.encode_images(tiny_images(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_pipeline
def test_frozen_parts_leave_the_gpu_to_the_denoiser(name: str, folders: Folders) -> None:
    adapter = folders(name).adapter("cuda")
    model = SingleModel(load_denoiser(folders(name)).eval().to("cuda"))
    made = list(
        generate(model, adapter, sampling_for(adapter), seed=5, indices=range(4), prompts=PROMPTS, device="cuda")
    )
    assert int((torch.cat(made).int() - images_of(folders(name)).int()).abs().max()) <= 8
    vae = getattr(adapter, "vae", None)  # A model of pixels has none.
    parts = [*filter(None, [vae]), *(adapter._text_encoders() if adapter.conditioned_on == "captions" else [])]
    assert {parameter.device.type for part in parts for parameter in part.parameters()} == {"cpu"}


def test_resting_parts_work_again(folders: Folders) -> None:
    adapter = folders("StableDiffusionPipeline").adapter()
    before = adapter.encode_prompts(["a cat"])["encoder_hidden_states"]
    adapter.rest()
    assert adapter.encode_prompts(["a cat"])["encoder_hidden_states"].equal(before)


def test_the_label_dropout_of_the_model_itself_is_off_while_it_is_trained(folders: Folders) -> None:
    adapter, model = folders("DiTPipeline").adapter(), load_denoiser(folders("DiTPipeline"))
    labels = adapter.encode_labels([1] * 64)
    noisy, timesteps = torch.zeros(64, 4, 8, 8), torch.full((64,), 10)
    with torch.no_grad():
        torch.manual_seed(0)
        assert len(adapter.predict(model.train(), noisy, timesteps, labels).unique(dim=0)) > 1
        adapter.prepare_training(model)
        assert len(adapter.predict(model.train(), noisy, timesteps, labels).unique(dim=0)) == 1


def test_sdxl_is_told_the_sizes_it_is_given(folders: Folders) -> None:
    adapter = folders("StableDiffusionXLPipeline").adapter()
    given = CropSizes(*(torch.tensor([pair]) for pair in ([480, 640], [0, 80], [16, 16])))
    assert adapter.encode_sizes(1, given)["time_ids"].tolist() == [[480, 640, 0, 80, 16, 16]]
    assert adapter.encode_sizes(2)["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_pixart_of_1024_pixels_is_told_the_size_of_the_square_and_its_shape() -> None:
    adapter = FAMILIES["PixArtAlphaPipeline"](denoiser_config={"sample_size": 128}, scheduler_config={})
    given = CropSizes(*(torch.tensor([pair]) for pair in ([480, 640], [0, 80], [1024, 1024])))
    told = {name: tensor.tolist() for name, tensor in adapter.encode_sizes(1, given).items()}
    assert told == {"resolution": [[1024.0, 1024.0]], "aspect_ratio": [[1.0]]}


@pytest.mark.parametrize("is_zeros", [None, True, False])  # None: the index does not say.
def test_sdxl_guides_away_from_zeros_unless_its_index_says_otherwise(is_zeros: bool | None, tmp_path: Path) -> None:
    index = save_pipeline("StableDiffusionXLPipeline", tmp_path) / "model_index.json"
    content = json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": is_zeros}
    index.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    encoded = open_model_folder(tmp_path).adapter().encode_prompts(["a cat", ""])
    for tensor in encoded.values():
        assert tensor[0].abs().sum() > 0
        assert bool(tensor[1].any()) == (is_zeros is False)


def test_sd3_needs_no_t5(tmp_path: Path) -> None:
    pipeline = PIPELINES["StableDiffusion3Pipeline"]()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    folder = open_model_folder(tmp_path)
    assert_same_images(images_of(folder), stock_images(folder, 1.0, text_encoder_3=None, tokenizer_3=None))


def test_sd3_shifts_its_timesteps_by_the_resolution_as_its_pipeline_does(tmp_path: Path) -> None:
    pipeline = PIPELINES["StableDiffusion3Pipeline"]()
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    pipeline.save_pretrained(tmp_path)
    folder = open_model_folder(tmp_path)
    assert "mu" in folder.adapter().timestep_settings(3)
    assert_same_images(images_of(folder), stock_images(folder, 1.0))


def test_flux_without_distilled_guidance_is_told_none(tmp_path: Path) -> None:
    path = tmp_path / "schnell"
    flux(guidance_embeds=False).save_pretrained(path)
    config = path / "transformer" / "config.json"
    assert open_model_folder(path).adapter().latent_shape == (4, 128, 128)  # Of 1024 pixels, as its pipeline makes.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    assert_same_images(images_of(open_model_folder(path)), stock_images(open_model_folder(path), 1.0))


def test_frozen_parts_stored_in_half_precision_compute_in_full(tmp_path: Path) -> None:
    PIPELINES["StableDiffusionPipeline"]().to(torch.float16).save_pretrained(tmp_path)
    adapter = open_model_folder(tmp_path).adapter()
    parts = [adapter.vae, adapter.text_pipeline.text_encoder]  # type: ignore[attr-defined]
    assert [part.dtype for part in parts] == [torch.float32] * 2


@pytest.mark.parametrize("shard", ["10GB", "8KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "PixArtAlphaPipeline"])
def test_a_folder_of_half_precision_alone_is_the_same_model_and_its_merge_a_plain_folder(
    name: str, shard: str, tmp_path: Path
) -> None:
    pipeline = PIPELINES[name]().to(torch.float16)
    pipeline.save_pretrained(tmp_path / "plain", max_shard_size=shard)
    pipeline.save_pretrained(tmp_path / "variant", max_shard_size=shard, variant="fp16")
    plain, variant = (open_model_folder(tmp_path / kind) for kind in ("plain", "variant"))
    assert all(".fp16" in file.name for file in variant.weights)
    assert weights_digest(variant) == weights_digest(plain)
    assert images_of(variant).equal(images_of(plain))
    for kind in ("plain", "variant"):
        merge_folders(tmp_path / kind, [tmp_path / kind], MethodSpec(), (0.5,), tmp_path / f"merged-{kind}")
    merged = [tmp_path / f"merged-{kind}" for kind in ("plain", "variant")]
    contents = [{file.relative_to(path): file.read_bytes() for file in path.rglob("*.*")} for path in merged]
    assert contents[0] == contents[1]
    assert DiffusionPipeline.from_pretrained(merged[1]) is not None


def test_nobody_is_told_of_a_safety_checker_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

    warnings: list[str] = []
    monkeypatch.setattr(pipeline_stable_diffusion.logger, "warning", warnings.append)
    index = save_pipeline("StableDiffusionPipeline", tmp_path) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"requires_safety_checker": True}))
    open_model_folder(tmp_path).adapter().encode_prompts(["a cat"])
    assert not warnings


def test_a_scheduler_config_older_than_its_offset_is_corrected_as_the_pipeline_does(tmp_path: Path) -> None:
    config = save_pipeline("StableDiffusionPipeline", tmp_path) / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps_offset": 0}))
    folder = open_model_folder(tmp_path)
    assert_same_images(images_of(folder), stock_images(folder, 1.0))


def test_a_damaged_text_encoder_is_not_started_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = open_model_folder(save_pipeline("PixArtAlphaPipeline", tmp_path))
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"text_encoder misses the tensors encoder.final_layer_norm.weight"):
        folder.adapter().encode_prompts(["a cat"])


def test_each_pipeline_belongs_to_one_family() -> None:
    assert set(PIPELINES) | {"DDPMPipeline", "DDIMPipeline"} == set(FAMILIES)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16)])
def test_an_unconditional_model_refuses_images_of_another_size_too(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    config = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    adapter = open_model_folder(write_tiny_folder(tmp_path / "model", one_level_unet(), **config)).adapter()
    assert adapter.encode_images(torch.zeros(2, 1, 8, 8)).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match=r"but the DDPMPipeline makes 1 x 8 x 8; set dataset.resolution"):
        adapter.encode_images(torch.zeros(2, *shape))
