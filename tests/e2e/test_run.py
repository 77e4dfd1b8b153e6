import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe

ROWS = {"pretrained", "finetuned", "ensemble", "merged"}
VERDICTS = {"better", "worse", "too close to call"}
METRICS = {"fd_efficientnet_lite0", "kd_efficientnet_lite0", "fd_pixels_4x4", "kd_pixels_4x4"}


def test_the_report_has_what_scripts_rely_on(first_report: dict[str, Any]) -> None:
    assert set(first_report["rows"]) == ROWS
    for scores in first_report["rows"].values():
        assert set(scores) == METRICS
        for bounds in scores.values():
            assert bounds["low"] <= bounds["mean"] <= bounds["high"]
            assert all(math.isfinite(value) for value in bounds.values())
    assert set(first_report["verdict"]) == {"vs_pretrained", "vs_finetuned"}
    assert set(first_report["verdict"].values()) <= VERDICTS
    assert set(first_report["gain_by"]["vs_pretrained"]) == {"seeds", "images"}
    assert set(first_report["merged"]) >= {"uri", "digest", "weights"}
    assert len(first_report["merged"]["weights"]) == 2
    assert [expert["segment"] for expert in first_report["experts"]] == [[0, 500], [500, 1000]]
    assert set(first_report["heldout_loss"]) == {"pretrained", "finetuned", "merged"}
    assert set(first_report["search"]) == {"experts", "control"}
    assert {"recipe", "flow_run_id", "mlflow_run_id", "fingerprint", "seconds"} <= set(first_report)
    assert {"pretrained", "finetune", "search", "merged", "evaluate", "total"} <= set(first_report["seconds"])


def _manifest(deme: CommandLine, stage: str, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((deme.home / "store" / stage / digest / "manifest.json").read_text())
    return found


def _segments(deme: CommandLine, inputs: dict[str, str], role: str) -> list[list[int]]:
    """Returns the segments of the copies that an artifact was made of, in its order."""
    return [_manifest(deme, "finetune", inputs[f"{role}-{i}"])["settings"]["segment"] for i in range(2)]


def test_a_search_sees_no_real_image_of_the_report(deme: CommandLine, first_report: dict[str, Any]) -> None:
    scored = [json.loads(path.read_text()) for path in deme.home.glob("store/search/*/manifest.json")]
    of_search = {each["inputs"]["reference"] for each in scored if each["settings"]["kind"] == "score"}
    report = _manifest(deme, "report", first_report["mlflow_run_id"])
    of_rows = {_manifest(deme, "evaluate", digest)["inputs"]["reference"] for digest in report["inputs"].values()}
    assert len(of_rows) == 1
    assert of_search
    assert of_search.isdisjoint(of_rows)
    assert all(_manifest(deme, "reference", digest)["metrics"]["num_images"] == 32 for digest in of_search | of_rows)


def test_the_ensemble_has_each_copy_on_its_own_segment(deme: CommandLine, first_report: dict[str, Any]) -> None:
    report = _manifest(deme, "report", first_report["mlflow_run_id"])
    row = _manifest(deme, "evaluate", report["inputs"]["ensemble-1"])
    assert row["settings"]["edges"] == [0, 500, 1000]
    assert _segments(deme, row["inputs"], "model") == [[0, 500], [500, 1000]]


def test_everything_is_in_mlflow(deme: CommandLine, first_report: dict[str, Any]) -> None:
    client = MlflowClient(f"sqlite:///{deme.home / 'mlflow.db'}")
    parent = client.get_run(first_report["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == f"toy-{first_report['mlflow_run_id'][:8]}", "what `deme report` takes"
    assert parent.data.tags["mlflow.note.content"].startswith("The merged model ")
    for row in ROWS:
        mean = first_report["rows"][row]["fd_efficientnet_lite0"]["mean"]
        assert parent.data.metrics[f"fd_efficientnet_lite0/{row}"] == mean
    gain = parent.data.metrics["fd_efficientnet_lite0/pretrained"] - parent.data.metrics["fd_efficientnet_lite0/merged"]
    assert math.isclose(parent.data.metrics["fd_efficientnet_lite0/gain"], gain, rel_tol=1e-6, abs_tol=1e-9)
    assert parent.data.params["finetune.num_steps"] == "8"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "samples.png",
        "losses.png",
        "recipe.yaml",
        "report.html",
        "report.json",
    }
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    by_name = {child.info.run_name: child for child in children}
    assert set(by_name) >= {"pretrain", "finetune/segment-0", "finetune/segment-1", "finetune/all", "merge"} | {
        f"evaluate/{row}" for row in ROWS
    }
    assert all(child.info.status == "FINISHED" for child in children)
    control, segment = by_name["finetune/all"], by_name["finetune/segment-0"]
    assert (control.data.params["num_steps"], segment.data.params["num_steps"]) == ("16", "8")
    steps = [metric.step for metric in client.get_metric_history(control.info.run_id, "loss/diffusion")]
    assert sorted(steps)[-1] == 16
    assert control.data.metrics["loss/consistency"] > 0


def test_the_figures_show_something(first_report: dict[str, Any]) -> None:
    for path in first_report["figures"].values():
        with Image.open(path) as figure:
            assert figure.width > 400
            assert len(figure.convert("L").getcolors(256) or []) > 10


def test_the_exported_model_loads_in_stock_diffusers_and_scores_as_its_row_did(
    deme: CommandLine,
    first_report: dict[str, Any],
    evaluated: dict[str, Any],
    write_recipe: WriteRecipe,
    tmp_path: Path,
) -> None:
    out = evaluated["model"]
    script = (
        "import sys; from diffusers import DDPMPipeline; pipeline = DDPMPipeline.from_pretrained(sys.argv[1]);"
        "images = pipeline(batch_size=2, num_inference_steps=2).images; assert images[0].size == (8, 8);"
        "assert not [m for m in sys.modules if m.startswith(('deme_core', 'tasks', 'flows'))]"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script, out], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert "were not used" not in loaded.stderr

    assert evaluated["scores"]["model"] == first_report["scores"]["merged"]
    images = tmp_path / "images"
    done = deme.run("generate", out, "--num-images", "3", "--num-inference-steps", "4", "--out", str(images))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in images.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert deme.run("export", "--out", out).returncode == 2, "an existing folder must not be overwritten"


def test_other_weights_train_nothing_and_equal_a_merge_by_hand(
    deme: CommandLine, first_report: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    trained = sorted(deme.home.glob("store/finetune/*/manifest.json"))
    report = deme.report("run", write_recipe(merge={"weights": [0.4, 0.3]}))
    assert sorted(deme.home.glob("store/finetune/*/manifest.json")) == trained
    assert report["rows"]["ensemble"].keys() == first_report["rows"]["ensemble"].keys()
    assert report["merged"]["weights"] == [0.4, 0.3]
    client = MlflowClient(f"sqlite:///{deme.home / 'mlflow.db'}")
    experiment = client.get_run(report["mlflow_run_id"]).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{report['mlflow_run_id']}'")
    trained_before = next(child for child in children if child.info.run_name == "finetune/segment-0")
    assert trained_before.data.tags["deme.cached"] == "true"
    assert trained_before.data.metrics["loss/diffusion"] > 0
    # Without a search the whole data set is the reference: other conditions.
    refused = deme.run("compare", first_report["mlflow_run_id"], report["mlflow_run_id"])
    assert refused.returncode == 2
    assert "cannot be compared: they differ in reference" in refused.stderr
    folders = _model_folders(deme)
    out = tmp_path / "by-hand"
    experts = [argument for segment in ("[0,500]", "[500,1000]") for argument in ("--expert", folders[segment])]
    done = deme.run("merge", "--pretrained", folders["pretrained"], *experts, "--weights", "0.4,0.3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    exported = tmp_path / "exported"
    assert deme.run("export", report["mlflow_run_id"], "--out", str(exported)).returncode == 0
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (exported / weights).read_bytes()


@pytest.mark.long
def test_slices_in_another_home_make_the_same_images_and_scores(
    deme: CommandLine, evaluated: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    sliced = replace(deme, home=tmp_path / "home").report(
        "evaluate", evaluated["model"], "--recipe", write_recipe(), "--set", "execution.images_per_task=4"
    )
    assert sliced["scores"] == evaluated["scores"]
    assert sliced["fingerprint"] == evaluated["fingerprint"]
    slices = [json.loads(path.read_text()) for path in (tmp_path / "home").glob("store/features/*/manifest.json")]
    assert sorted(m["settings"]["slice"] for m in slices if "slice" in m["settings"]) == [[0, 4]] * 3 + [[4, 8]] * 3


@pytest.mark.long
def test_a_recipe_can_confine_the_copies_and_distill_the_ensemble(
    deme: CommandLine, first_report: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    distill = {"num_steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    report = deme.report("run", write_recipe(merge={"method": "regmean", "weights": [1.0, 1.0]}, distill=distill))
    assert set(report["rows"]) == ROWS | {"distilled"}
    assert report["scores"]["pretrained"] != report["scores"]["merged"] != report["scores"]["distilled"]
    assert set(report["distilled"]["verdict"].values()) <= VERDICTS
    distilled_from = _manifest(deme, "distilled", report["distilled"]["digest"])["inputs"]
    assert _segments(deme, distilled_from, "expert") == [[0, 500], [500, 1000]]
    assert distilled_from["merged"] == report["merged"]["digest"]
    client = MlflowClient(f"sqlite:///{deme.home / 'mlflow.db'}")
    parent = client.get_run(report["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    steps = {run.info.run_name: run.data.params.get("num_steps") for run in children}
    assert steps["finetune/all"] == str(2 * 8 + 3), "the control takes the steps of the distillation, too"
    assert steps["finetune/segment-0"] == "8"
    page = Path(report["page"]["path"]).read_text()
    assert "The distilled model" in page

    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    exported = {row: tmp_path / row for row in ("merged", "distilled")}
    for row, out in exported.items():
        done = deme.run("export", report["mlflow_run_id"], "--row", row, "--out", str(out))
        assert done.returncode == 0, done.stderr
    distilled, merged = (load_file(exported[row] / weights) for row in ("distilled", "merged"))
    assert distilled.keys() == merged.keys()
    assert any((distilled[name] != merged[name]).any() for name in merged)


def _model_folders(deme: CommandLine) -> dict[str, str]:
    folders = {}
    for path in deme.home.glob("store/*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        # What `deme evaluate` imported is a pretrained model, too.
        if manifest["stage"] == "finetune" or "training" in manifest["settings"]:
            key = json.dumps(manifest["settings"].get("segment", "pretrained"), separators=(",", ":")).strip('"')
            folders[key] = str(next(path.parent.glob("upload-*")))
    return folders


@pytest.fixture
def spoilt(write_recipe: WriteRecipe) -> str:
    """A recipe whose copies are worse than the pretrained model."""
    return write_recipe(finetune={"num_steps": 4, "batch_size": 8, "learning_rate": 0.3})


@pytest.mark.long
def test_copies_from_elsewhere_are_searched_merged_and_compared(
    deme: CommandLine, evaluated: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    source, copies = evaluated["model"], [tmp_path / name for name in ("low", "high")]
    for seed, copy in enumerate(copies):
        shutil.copytree(source, copy)
        (weights,) = copy.rglob("*.safetensors")
        rng = torch.Generator().manual_seed(seed)
        moved = {k: t + 0.01 * torch.randn(t.shape, generator=rng) for k, t in load_file(weights).items()}
        save_file(moved, weights)
    sections = {"pretrained": {"source": source}, "copies": list(map(str, copies))}
    merge = {"on_bad_expert": "keep", "search": {"max_candidates": 3, "num_images": 8}}
    report = deme.report("run", write_recipe(**sections, merge=merge))
    assert set(report["rows"]) == ROWS
    assert [expert["merged"] for expert in report["experts"]] == [True, True]
    client = MlflowClient(f"sqlite:///{deme.home / 'mlflow.db'}")
    parent = client.get_run(report["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    trained = {run.info.run_name for run in children if run.info.run_name.startswith("finetune/")}
    assert trained == {"finetune/all"}
    page = Path(report["page"]["path"]).read_text()
    assert "training of segment 0" in page


def test_copies_that_are_no_better_are_left_out(deme: CommandLine, first_report: dict[str, Any], spoilt: str) -> None:
    report = deme.report("run", spoilt)
    assert [expert["merged"] for expert in report["experts"]] == [False, False]
    assert report["rows"]["merged"] == report["rows"]["pretrained"] == first_report["rows"]["pretrained"]
    assert Path(report["page"]["path"]).is_file()


@pytest.mark.long
def test_copies_that_are_no_better_end_the_run_if_asked(deme: CommandLine, spoilt: str) -> None:
    failed = deme.run("run", spoilt, "--set", "merge.on_bad_expert=fail")
    assert failed.returncode == 1
    assert "merge.on_bad_expert" in failed.stderr.strip().splitlines()[-1]
    assert "Traceback" not in failed.stderr
