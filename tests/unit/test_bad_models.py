"""What is wrong with models, adapters, captions, segments and prompts, as the command line says it: one sentence."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.main import get_command

from deme_core.artifacts import ArtifactStore
from deme_core.errors import DamagedArtifactError
from deme_core.lora import LoraFactors
from deme_core.model_folder import open_model_folder
from deme_core.model_folder_writer import write_lora_copy
from deme_core.recipe import MethodSpec
from deme_core.store import open_store
from flows.cli import app, main
from flows.model_commands import export_model
from tests.family_method import two_classes
from tests.tiny_models import tiny_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("StableDiffusionPipeline", tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command line in this process; returns the one sentence."""
    monkeypatch.setattr(sys, "argv", ["deme", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert not said.out
    assert lines[-1].startswith("deme: ")
    assert lines[-1].endswith(".")
    assert "Traceback" not in said.err
    assert not Path("out").exists()
    return lines[-1].removeprefix("deme: ")


def test_a_pipeline_that_no_adapter_knows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableCascadePipeline"}))
    said = refused(monkeypatch, capsys, "generate", "other", "--out", "out")
    assert (
        "other/model_index.json describes a StableCascadePipeline; known are DDIMPipeline, DDPMPipeline, DiTPipel"
        in said
    )
    assert "FluxPipeline, IFPipeline" in said


def test_a_lora_of_another_base(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {LAYER: LoraFactors(torch.ones(2, 16), torch.ones(16, 2))}
    write_lora_copy(tmp_path / "lora", open_model_folder(model), factors, copy_of="0" * 64)
    pipeline = DiffusionPipeline.from_pretrained(model)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1e-3)
    pipeline.save_pretrained(tmp_path / "other")
    merge = ("--expert", "lora", "--weights", "0.5", "--out", "out")
    said = refused(monkeypatch, capsys, "merge", "--pretrained", "other", *merge)
    assert "lora is a LoRA of the pretrained weights" in said
    assert said.endswith("give the model that it was trained on.")
    # By itself it is no model either.
    assert "lora holds a LoRA adapter alone" in refused(monkeypatch, capsys, "generate", "lora", "--out", "out")
    # A copy of other layers, or a file torn in two, is found as well.
    write_lora_copy(tmp_path / "lora", open_model_folder(model), {"nowhere": factors[LAYER]}, copy_of="0" * 64)
    said = refused(monkeypatch, capsys, "merge", "--pretrained", str(model), *merge)
    assert "factors for nowhere.weight (16, 16), which the pretrained model lacks" in said
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "is not a whole safetensors file" in refused(
        monkeypatch, capsys, "merge", "--pretrained", str(model), *merge
    )


def test_experts_in_other_forms_are_told_how_to_become_folders(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(expert: str) -> str:
        merge = ("--expert", expert, "--weights", "0.5", "--out", "out")
        return refused(monkeypatch, capsys, "merge", "--pretrained", str(model), *merge)

    part = (
        "holds a UNet2DConditionModel, the denoiser of a pipeline alone; give the folder of a whole pipeline in which"
    )
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(model / "unet", checkpoint / "unet")
    for expert in ("checkpoint-5", "checkpoint-5/unet"):
        assert f"checkpoint-5/unet {part} it is unet/." in said(expert)
    adapter = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    adapter.parent.mkdir()
    adapter.touch()
    assert "is a LoRA, which is not taken; load it into its pipeline in diffusers (load_lora_weights, " in said("lora")
    for path in ("lora/pytorch_lora_weights.safetensors", str(adapter)):
        assert f"{path} is a file, and a model is a folder; load it in diffusers" in said(path)
        assert "is a file, and a model is a folder" in refused(monkeypatch, capsys, "generate", path, "--out", "out")


def test_an_expert_of_other_noise_is_not_merged(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shutil.copytree(model, tmp_path / "other") / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    merge = ("--expert", "other", "--weights", "0.5", "--out", "out")
    said = refused(monkeypatch, capsys, "merge", "--pretrained", str(model), *merge)
    assert "gives prediction_type as 'v_prediction', that of the pretrained model 'epsilon': it was trained on" in said


def test_a_name_that_is_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(monkeypatch, capsys, "generate", "nope", "--out", "out")
    assert said.startswith("The model 'nope' is no folder, object-store URI or hub id; name a folder that holds")


def test_an_expert_of_another_shape_is_told_by_its_first_tensors(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_folder(tmp_path / "base", tiny_unet())
    write_tiny_folder(tmp_path / "wider", tiny_unet(block_out_channels=[16, 32]))
    merge = ("merge", "--pretrained", "base", "--expert", "wider", "--weights", "1", "--out", "out")
    said = refused(monkeypatch, capsys, *merge)
    assert re.search(r"mis-shaped tensors: (\S+ \([\d, ]+\) for \([\d, ]+\), ){3}and \d+ more\.$", said), said


def test_a_pickled_autoencoder(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = shutil.copytree(model, tmp_path / "pickled") / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    said = refused(monkeypatch, capsys, "generate", "pickled", "--prompts", "prompts.txt", "--out", "out")
    assert "vae/diffusion_pytorch_model.bin is pickled, which can run code; convert it to safetensors (load the" in said


def test_prompts_that_are_none(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    said = refused(monkeypatch, capsys, "generate", str(model), "--prompts", "empty.txt", "--out", "out")
    assert said.startswith("There are no prompts in empty.txt; set evaluate.prompts to a text file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "segments={edges: [0, 500, 2000]}"], "segments.edges [0, 500, 2000] must end at 1000"),
        (["--set", "segments={edges: [0, 500, 900]}"], "segments.edges [0, 500, 900] must end at 1000"),
        (
            ["--set", "finetune={num_steps: 1, lora: {rank: 4}, channel_projection: true}"],
            "finetune: finetune.lora and channel_projection exclude each other",
        ),
        (["--set", "finetune={num_steps: 1, lora: {rank: 0}}"], "finetune.lora.rank"),
        (["--set", "finetune={num_steps: 1, lora: {ranks: 4}}"], "did you mean rank?"),
        (["--set", "evaluate.mixed_precision=fp8"], "evaluate.mixed_precision"),
        (["--set", "pretrained={source: a/b, text_encoder: {}}"], "text_encoder apply to source 'pretrain' only"),
    ],
)
def test_what_a_recipe_gets_wrong_is_said_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(monkeypatch, capsys, "run", "digits", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "3"], "--rank is that of a LoRA; add --lora."),
        (["--lora", "--row", "distilled"], "A distilled model is no LoRA; leave out --lora, or --row distilled."),
    ],
)
def test_what_an_export_gets_wrong(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(monkeypatch, capsys, "export", *arguments, "--out", "out") == message


def test_a_damaged_merged_model_is_made_anew_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = ArtifactStore(open_store((tmp_path / "store").as_uri()), tmp_path / "cache")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_bytes(b"sound")
    ref, _ = artifacts.publish("merged", "d" * 64, tmp_path / "made", settings={}, inputs={})
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.setattr("tasks.tracked_runs.find_tag", lambda *_: ref.uri)
    export_model(None, tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    (file,) = (tmp_path / "store").rglob("weights")
    file.write_bytes(b"souud")
    with pytest.raises(DamagedArtifactError, match="it was taken out of the store: run again, which makes it anew"):
        export_model(None, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert artifacts.find("merged", "d" * 64) is None


def test_captions_that_are_missing_and_segments_out_of_range_of_a_model_from_elsewhere(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    two_classes(tmp_path / "images")
    files = sorted(path.relative_to(tmp_path / "images") for path in (tmp_path / "images").rglob("*.png"))
    rows = [json.dumps({"file_name": str(file), "text": "" if i < 4 else "a cat"}) for i, file in enumerate(files)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    settings = {
        "pretrained": f"{{source: {model}}}",
        "dataset": "{source: imagefolder, path: images, resolution: 16, caption_column: text}",
        "segments": "{edges: [0, 500, 2000]}",
        "evaluate.prompts": "cifar10",
    }
    arguments = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["deme", "doctor", "digits", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 2
    assert "FAIL model segments.edges [0, 500, 2000] must start at 0 and end at 1000." in said
    first = ", ".join(str(file) for file in files[:3])
    assert "4 of 20 images" in said
    assert first in said


def test_settings_of_a_merge_method(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ("merge", "--pretrained", str(model), "--expert", str(model), "--out", "out")
    dare = ("--weights", "1", "--method", "dare", "--drop-rate", "1")
    assert refused(monkeypatch, capsys, *merge, *dare) == "--drop-rate 1.0: Input should be less than 1."
    average = ("--weights", "1", "--method", "average")
    assert refused(monkeypatch, capsys, *merge, *average) == "--method average takes no --weights."
    assert "0 merge weights were given for 1 experts" in refused(monkeypatch, capsys, *merge)


@pytest.mark.parametrize(
    ("given", "option", "method"),
    [
        (["--density", "0.1", "--drop-rate", "0.3", "--seed", "4"], "density", "task_arithmetic"),
        (["--density", "0.2", "--method", "dare"], "density", "dare"),
        (["--drop-rate", "0.3", "--method", "ties"], "drop-rate", "ties"),
        (["--seed", "0", "--method", "block_weights"], "seed", "block_weights"),
    ],
)
def test_a_setting_that_the_merge_method_would_ignore(
    model: Path,
    given: list[str],
    option: str,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    merge = ("merge", "--pretrained", str(model), "--expert", str(model), "--weights", "1", "--out", "out")
    assert refused(monkeypatch, capsys, *merge, *given) == (
        f"--{option} is no setting of --method {method}; leave it out, or give the method that it belongs to."
    )


def test_the_help_of_a_merge_names_the_defaults_of_its_methods() -> None:
    options = {option.name: option.show_default for option in get_command(app).commands["merge"].params}
    for name in ("density", "drop_rate", "seed"):
        assert options[name] == str(MethodSpec.model_fields[name].default)


def test_a_merge_by_another_method(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model)
    before = pipeline.unet.conv_in.bias.detach().clone()
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1.0)
    pipeline.save_pretrained(tmp_path / "copy")
    copies = ("--expert", "copy", "--expert", str(model))
    monkeypatch.setattr(
        sys, "argv", ["deme", "merge", "--pretrained", str(model), *copies, "--method", "average", "--out", "out"]
    )
    with contextlib.suppress(SystemExit):
        main()
    merged = DiffusionPipeline.from_pretrained("out").unet.conv_in.bias
    assert torch.allclose(merged, before + 0.5)
