"""LoRA experts through the jobs of a run, and what stock diffusers makes of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from deme_core.errors import InputError, ModelFolderError
from deme_core.families import FAMILIES
from deme_core.model_folder import load_denoiser, open_model_folder
from deme_core.recipe import DatasetSpec, FinetuneSpec, MethodSpec, RegMeanSpec
from deme_core.settings import Settings
from flows.model_commands import merge_models
from tasks.jobs import ConfineJob, FinetuneJob, GramsJob, HeldoutJob, ImportJob, JobResult, LossJob, MergeJob
from tasks.lora_adapter import LoraSummary, write_merged_adapter
from tasks.work.base import JobContext, execute
from tests.family_method import WEIGHTS, Method, files_below, two_classes
from tests.tiny_models import same_bits, tiny_unet, write_tiny_folder

EDGES = (0, 400, 1000)
LORA = {"rank": 2, "alpha": 3.0}
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetSpec:
    return two_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory, dataset: DatasetSpec) -> Method:
    return Method("StableDiffusionPipeline", tmp_path_factory.mktemp("method"), dataset)


@pytest.fixture(scope="module")
def experts(method: Method) -> list[JobResult]:
    return finetuned(method)


def finetuned(method: Method) -> list[JobResult]:
    return [method.finetune(low, high, lora=LORA) for low, high in ((0, 400), (400, 1000))]


def merge(
    run: Method, experts: list[JobResult], weights: tuple[float, ...] = WEIGHTS, spec: MethodSpec | None = None
) -> JobResult:
    job = MergeJob(
        pretrained=run.pretrained.ref,
        experts=tuple(expert.ref for expert in experts),
        method=spec or MethodSpec(),
        weights=weights,
    )
    return run.do(job)


def export(method: Method, merged: JobResult, out: Path, rank: int | None = None) -> LoraSummary:
    out.mkdir()
    return write_merged_adapter(method.context.artifacts, merged.ref, rank, out)


def one_prediction(pipeline: Any, part: str) -> torch.Tensor:
    """Returns what the pipeline's denoiser predicts, with every condition that its family has."""
    denoiser = getattr(pipeline, part).eval()
    rng = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    given: dict[str, Any] = {"encoder_hidden_states": noise(2, 12, denoiser.config.get("cross_attention_dim") or 32)}
    latents = noise(2, 4, 8, 8)
    if part == "transformer":
        given["pooled_projections"] = noise(2, denoiser.config["pooled_projection_dim"])
    if "axes_dims_rope" in denoiser.config:
        given |= {"txt_ids": torch.zeros(12, 3), "img_ids": noise(16, 3).round(), "guidance": torch.ones(2)}
        latents = latents.view(2, 16, 16)
    elif denoiser.config.get("addition_embed_type") == "text_time":
        given["added_cond_kwargs"] = {"text_embeds": noise(2, 16), "time_ids": noise(2, 6)}
    with torch.no_grad():
        prediction: torch.Tensor = denoiser(latents, timestep=torch.tensor([3, 700]), **given).sample
    return prediction


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_stock_diffusers_makes_the_merged_model_of_one_file(name: str, tmp_path: Path, dataset: DatasetSpec) -> None:
    method = Method(name, tmp_path, dataset)
    part, context = FAMILIES[name].denoiser_part, method.context
    experts = finetuned(method)
    folders = [context.fetch(expert.ref) for expert in experts]
    for folder in folders:
        assert files_below(folder) == {
            "finetuned_copy.json",
            f"{part}/config.json",
            FILE,
            "scheduler/scheduler_config.json",
        }
    merged = merge(method, experts)
    assert files_below(context.fetch(merged.ref)) == files_below(method.stock)
    summary = export(method, merged, tmp_path / "lora")
    assert (summary.rank, summary.error) == (4, 0.0)

    # The explicit sum, from the files themselves.
    start = load_file(method.stock / part / "diffusion_pytorch_model.safetensors")
    files = [load_file(folder / FILE) for folder in folders]
    fused = load_file(context.fetch(merged.ref) / part / "diffusion_pytorch_model.safetensors")
    assert len(files[0]) == 2 * summary.num_layers
    for key, tensor in start.items():
        layer, expected = f"{part}.{key.removesuffix('.weight')}", tensor.double().numpy()
        if f"{layer}.lora_A.weight" not in files[0]:
            assert same_bits(fused[key], tensor), key
            continue
        for weight, file in zip(WEIGHTS, files, strict=True):
            up, down = (file[f"{layer}.lora_{letter}.weight"].double().numpy() for letter in "BA")
            expected = expected + weight * (up @ down)
        np.testing.assert_allclose(fused[key].numpy(), expected, atol=1e-6, err_msg=key)
        assert not same_bits(fused[key], tensor)

    # Three ways to the same model, by stock diffusers alone: the folder, the one file, and both experts' files.
    expected_prediction = one_prediction(DiffusionPipeline.from_pretrained(context.fetch(merged.ref)), part)
    pretrained = one_prediction(DiffusionPipeline.from_pretrained(method.stock), part)
    assert (pretrained - expected_prediction).abs().max() > 1e-4
    one = DiffusionPipeline.from_pretrained(method.stock)
    one.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(one_prediction(one, part), expected_prediction, atol=1e-5, rtol=1e-4)
    several = DiffusionPipeline.from_pretrained(method.stock)
    for index, folder in enumerate(folders):
        several.load_lora_weights(folder, weight_name=FILE, adapter_name=f"e{index}")
    several.set_adapters(["e0", "e1"], adapter_weights=list(WEIGHTS))
    torch.testing.assert_close(one_prediction(several, part), expected_prediction, atol=1e-5, rtol=1e-4)

    # A rank below the summed one is not exact, and what is lost is what the summary says.
    summary = export(method, merged, tmp_path / "small", rank=1)
    assert summary.rank == 1
    small, lost, total = load_file(tmp_path / "small" / FILE), 0.0, 0.0
    for layer, error in summary.errors.items():
        product = small[f"{part}.{layer}.lora_B.weight"] @ small[f"{part}.{layer}.lora_A.weight"]
        change = fused[f"{layer}.weight"] - start[f"{layer}.weight"]
        if change.abs().max() > 1e-5:  # The last block of SD3 ignores what some of its layers return.
            assert error == pytest.approx(float((product - change).norm() / change.norm()), abs=1e-3)
        lost, total = lost + float((product - change).norm() ** 2), total + float(change.norm() ** 2)
    assert summary.error == pytest.approx((lost / total) ** 0.5, abs=1e-4)
    assert summary.error > 0.01


def test_everything_else_takes_a_lora_for_a_copy(method: Method, experts: list[JobResult]) -> None:
    refs, dataset = tuple(expert.ref for expert in experts), method.dataset
    before = method.do(HeldoutJob(model=method.pretrained.ref, dataset=dataset, edges=EDGES)).metrics["bins"]
    after = method.do(HeldoutJob(model=refs[0], dataset=dataset, edges=EDGES)).metrics["bins"]
    assert all(math.isfinite(loss) for loss in after)
    assert before != after
    loss = LossJob(
        label="candidate",
        pretrained=method.pretrained.ref,
        experts=refs,
        method=MethodSpec(),
        weights=(1.0, 0.0),
        dataset=dataset,
        segment_edges=EDGES,
    )
    first_alone = method.do(loss).metrics["value"]
    fused = merge(method, experts, (1.0, 0.0))
    merged = method.do(HeldoutJob(model=fused.ref, dataset=dataset, edges=EDGES)).metrics["bins"]
    assert merged == pytest.approx(after, rel=1e-5)
    assert len(first_alone) == 2
    scores = {method.score((fused.ref,), None), method.score(refs, EDGES), method.score((refs[0],), None)}
    assert all(math.isfinite(score) for score in scores)
    assert len(scores) >= 2


def test_the_expert_alone_is_the_model_that_its_adapter_makes(method: Method, experts: list[JobResult]) -> None:
    folder = method.context.open_model(experts[0].ref)
    state = load_denoiser(folder).state_dict()
    fused = open_model_folder(method.context.fetch(merge(method, experts, (1.0, 0.0)).ref)).checkpoint()
    assert all(same_bits(tensor, fused[name]) for name, tensor in state.items())
    with pytest.raises(ModelFolderError, match="holds a LoRA adapter alone; give a whole StableDiffusionPipeline"):
        load_denoiser(open_model_folder(folder.path))


@pytest.mark.parametrize("spec", [{"method": "ties", "density": 0.5}, {"method": "dare", "drop_rate": 0.5}])
def test_merges_that_are_no_sum_need_a_rank(
    spec: dict[str, Any], method: Method, experts: list[JobResult], tmp_path: Path
) -> None:
    merged = merge(method, experts, spec=MethodSpec(**spec))
    with pytest.raises(InputError, match=rf"A merge by {spec['method']} is no weighted sum of the LoRAs.* give --rank"):
        export(method, merged, tmp_path / "exact")
    summary = export(method, merged, tmp_path / "full", rank=32)
    assert summary.error < 1e-6
    one = DiffusionPipeline.from_pretrained(method.stock)
    one.load_lora_weights(tmp_path / "full")
    expected = one_prediction(DiffusionPipeline.from_pretrained(method.context.fetch(merged.ref)), "unet")
    torch.testing.assert_close(one_prediction(one, "unet"), expected, atol=1e-5, rtol=1e-4)
    assert export(method, merged, tmp_path / "small", rank=2).error > summary.error


def test_regmean_confines_adapters_and_exports_them_by_rank(
    method: Method, experts: list[JobResult], tmp_path: Path
) -> None:
    spec = RegMeanSpec(num_images=8, max_features=200)
    grams = tuple(
        method.do(GramsJob(expert=expert.ref, dataset=method.dataset, low=low, high=high, spec=spec)).ref
        for expert, low, high in zip(experts, EDGES, EDGES[1:], strict=False)
    )
    confined = [
        method.do(ConfineJob(pretrained=method.pretrained.ref, expert=expert.ref, grams=grams, index=index, spec=spec))
        for index, expert in enumerate(experts)
    ]
    merged = merge(method, confined, (1.0, 1.0))
    with pytest.raises(InputError, match="A merge by regmean is no weighted sum"):
        export(method, merged, tmp_path / "exact")
    # A confined task vector has the adapter's rank, so two of rank 2 fit into one of rank 4, up to rounding.
    assert export(method, merged, tmp_path / "lora", rank=4).error < 1e-3
    assert export(method, merged, tmp_path / "small", rank=1).error > 1e-3


def test_an_adapter_of_another_base_is_refused(
    method: Method, experts: list[JobResult], tmp_path: Path, dataset: DatasetSpec
) -> None:
    other = tmp_path / "other"
    pipeline = DiffusionPipeline.from_pretrained(method.stock)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1e-3)
    pipeline.save_pretrained(other)
    expert = method.context.fetch(experts[0].ref)
    with pytest.raises(ModelFolderError, match=r"is a LoRA of the pretrained weights \w{12}, not of .*other"):
        merge_models(other, [expert], "0.5", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    # The same weights elsewhere are the same model.
    merge_models(method.stock, [expert], "0.5", tmp_path / "merged")
    assert files_below(tmp_path / "merged") == files_below(method.stock)


def test_whole_copies_are_no_lora(method: Method, tmp_path: Path) -> None:
    merged = merge(method, [method.finetune(0, 400), method.finetune(400, 1000)])
    with pytest.raises(InputError, match="finetuned whole copies, whose merge is no LoRA; export it without --lora"):
        export(method, merged, tmp_path / "lora")


def test_a_pipeline_that_loads_no_lora_is_named(tmp_path: Path, dataset: DatasetSpec) -> None:
    method = Method("DiTPipeline", tmp_path, dataset)
    merged = merge(method, finetuned(method))
    with pytest.raises(InputError, match=r"A DiTPipeline of stock diffusers loads no LoRA; export the"):
        export(method, merged, tmp_path / "lora")
    start = open_model_folder(method.context.fetch(method.pretrained.ref)).checkpoint()
    fused = open_model_folder(method.context.fetch(merged.ref)).checkpoint()
    assert not same_bits(
        start["transformer_blocks.0.attn1.to_q.weight"], fused["transformer_blocks.0.attn1.to_q.weight"]
    )


def test_a_merge_of_no_expert_is_no_lora(method: Method, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No expert takes part in this merge"):
        export(method, merge(method, [], ()), tmp_path / "lora")


def test_a_model_on_pixels_has_lora_experts_too(tmp_path: Path) -> None:
    context = JobContext(Settings.model_validate({"DEME_HOME": tmp_path / "home", "DEME_STORE_URI": None}), "cpu")
    source = str(write_tiny_folder(tmp_path / "model", tiny_unet()))
    pretrained = execute(ImportJob(source=source), context, lambda _: None).ref
    settings: dict[str, Any] = {"num_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "lora": LORA}
    job = FinetuneJob(
        label="all",
        pretrained=pretrained,
        dataset=DatasetSpec(source="digits", num_images=64),
        finetune=FinetuneSpec.model_validate(settings),
        low=0,
        high=1000,
        num_steps=2,
    )
    expert = execute(job, context, lambda _: None).ref
    assert files_below(context.fetch(expert)) == {
        "finetuned_copy.json",
        "unet/config.json",
        FILE,
        "scheduler/scheduler_config.json",
    }
    merge = MergeJob(pretrained=pretrained, experts=(expert,), method=MethodSpec(), weights=(1.0,))
    merged = load_denoiser(context.open_model(execute(merge, context, lambda _: None).ref)).state_dict()
    alone = load_denoiser(context.open_model(expert)).state_dict()
    assert all(same_bits(tensor, merged[name]) for name, tensor in alone.items())
    changed = {name for name, tensor in tiny_unet().state_dict().items() if not same_bits(tensor, merged[name])}
    assert changed
    assert all(".to_" in name for name in changed)
