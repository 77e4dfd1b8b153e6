import json
import mmap
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import claim, claim_cell, conditioning_cache, demo, features, finetune_step, merge_child, search, shapes
from benchmarks.gpu import parted_state
from benchmarks.laboratory import Laboratory
from benchmarks.measurement import median_ratio, take_turns
from deme_core.denoiser_size import measure_denoiser
from deme_core.manifest import ArtifactRef
from deme_core.model_folder import write_model_folder
from deme_core.recipe_file import load_recipe
from deme_core.verdict import Interval, interval
from tasks.jobs import JobResult
from tests.tiny_models import randomize, tiny_unet

BASELINE = [[10.0, 11.0, 12.5], [20.0, 19.0, 21.0], [15.0, 14.0, 15.5]]  # training seeds x sampling seeds


def last_line(output: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert {"name", "ratio", "goal", "holds"} <= result.keys()
    return result


def test_contestants_take_turns_and_each_begins_in_turn() -> None:
    calls: list[str] = []
    contestants = {name: partial(calls.append, name) for name in "ab"}
    assert take_turns(contestants, num_rounds=3) == {"a": [None] * 3, "b": [None] * 3}
    assert "".join(calls) == "abbaab"


def test_a_disturbed_round_does_not_move_the_median_ratio() -> None:
    assert median_ratio([2.0, 40.0, 6.0], [1.0, 2.0, 3.0]) == 2.0


def test_the_finetuning_benchmark_ends_with_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    finetune_step.main(["--quick", "--rounds", "1", "--batch-size", "1"])
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] == max(result["ratio_channel_projection_off"], result["ratio_channel_projection_on"]) > 0
    # All draw the same noise and timesteps; projections begin as the identity.
    losses = list(result["mean_losses"].values())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-2)
    # Three passes for the forward and the backward pass of each, one for the frozen model's: 4 to 4.5 of one.
    config = shapes.cifar10(tiny=True)
    size = measure_denoiser(shapes.adapter_of(config), channel_projection=True)
    expected = 3 * size.trained_forward_flops + size.forward_flops
    assert result["step_flops"] == pytest.approx(expected, rel=0.02)


def test_the_features_benchmark_compares_equal_features(capsys: pytest.CaptureFixture[str]) -> None:
    # Inception's network and clean-fid's distance take a minute each.
    features.main(["--quick", "--features-only", "--extractor", "efficientnet_lite0", "--num-images", "9"])
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] > 0
    assert result["largest_difference"] < 1e-5


def test_the_cache_benchmark_ends_with_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    conditioning_cache.main(["--quick", "--rounds", "1", "--batch-size", "1", "--num-images", "4"])
    result = last_line(capsys.readouterr().out)
    assert result["ratio"] > 0
    # Four channels of 8 x 8 in float32, and as many of the mirror image; 77 tokens of width 64; sizes and headers.
    assert 0 < result["bytes_per_image"] - 2 * 4 * 8 * 8 * 4 < 250
    assert 0 < result["bytes_per_caption"] - 77 * 64 * 4 < 50


def test_a_search_is_done_when_a_full_score_is_as_good_as_the_grids() -> None:
    steps = [search.Step(1.0, 75.0, None), search.Step(2.0, 300.0, 5.0), search.Step(3.0, 600.0, 4.0)]
    assert search.cost_to_reach(steps, 4.0) == steps[2]
    assert search.cost_to_reach(steps, 3.9) is None


def test_both_contestants_of_the_merging_benchmark_write_the_same_merge(tmp_path: Path) -> None:
    for index in range(3):
        model = tiny_unet()
        randomize(model, seed=index)
        config = {"_class_name": "UNet2DModel"} | dict(model.config)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        write_model_folder(tmp_path / str(index), denoiser_config=config, scheduler_config={}, tensors=tensors)
    written = []
    for method in ("deme", "load_all"):
        out = tmp_path / method
        merge_child.METHODS[method](tmp_path / "0", [tmp_path / "1", tmp_path / "2"], [0.3, 0.5], out)()
        written.append(load_file(out / merge_child.WEIGHTS_PATH))
    torch.testing.assert_close(*written)


def test_a_state_comes_back_from_its_parts_and_a_damaged_part_is_named(tmp_path: Path) -> None:
    root, state, again = tmp_path / "root", tmp_path / "state", tmp_path / "again"
    (root / "deep").mkdir(parents=True)
    again.mkdir()
    assert not parted_state.unpack(state, again)
    files = {root / "a": b"1" * 5000, root / "deep" / "b": bytes(range(256)) * 30}
    for path, content in files.items():
        path.write_bytes(content)
    for _ in range(2):  # The second replaces the first.
        num_parts = parted_state.pack(root, files, state, part_bytes=4096)
    assert num_parts > 3
    assert all(path.stat().st_size <= 4096 for path in state.iterdir())
    assert parted_state.unpack(state, again)
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == {
        path.relative_to(root): content for path, content in files.items()
    }
    (state / "part-001").write_bytes(b"other")
    with pytest.raises(ValueError, match="part-001"):
        parted_state.unpack(state, again)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_counts_anonymous_memory_and_no_page_cache(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    idle = merge_child.anonymous_bytes()
    with merge_child.PeakAnonymousMemory() as memory, (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        assert not any(mapped[::4096])
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[::4096] = bytes(range(256)) * (size // 4096 // 256)
    assert 0.9 * size < memory.peak_bytes - idle < 1.5 * size


def cell(merged: list[float], baseline: list[float]) -> claim_cell.Cell:
    rows = {"pretrained": baseline, "finetuned": baseline, "ensemble": baseline, "merged, cma_es": merged}
    return claim_cell.Cell("fid", rows, weights={"merged, cma_es": [0.5, 0.5]}, heldout={"pretrained": 0.1})


@pytest.mark.parametrize(
    ("gains", "holds"),
    [
        ([1.0, 1.1, 0.9], True),
        ([1.0, 1.1, -0.1], False),  # Better for two training seeds out of three is no claim.
        ([-1.0, -1.1, -0.9], False),
    ],
)
def test_the_claim_is_judged_over_training_seeds(
    gains: list[float], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [cell([score - gain for score in scores], scores) for scores, gain in zip(BASELINE, gains, strict=True)]
    claim.print_setting("none", cells, [0, 1, 2])
    claim.print_claim({"none": cells}, {"recipe": "toy"})
    result = last_line(capsys.readouterr().out)
    assert result["holds"] is holds
    against = Interval(**result["differences"]["none"]["merged, cma_es"]["finetuned"])
    assert vars(against) == pytest.approx(vars(interval([-gain for gain in gains])))
    assert result["ratio"] == pytest.approx(1 - sum(gains) * 3 / sum(map(sum, BASELINE)))


def test_the_deciding_metric_is_the_recipes_first_whatever_order_a_manifest_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("digits", ["evaluate.metrics=[kid,fid]", "evaluate.seeds=[1,2,3]"])
    ref = ArtifactRef("file:///any/any/" + "0" * 64, "0" * 64)
    done = JobResult(ref, {"scores": {"fd_efficientnet_lite0": 5.0, "kd_efficientnet_lite0": 0.1}}, True, 0.0, 0.0)
    monkeypatch.setattr(Laboratory, "__init__", lambda self: setattr(self, "recipe", recipe))
    monkeypatch.setattr(Laboratory, "do", lambda _self, _job: done)
    found = Laboratory().scores_by_metric((ref,))  # type: ignore[call-arg]
    assert list(found.items()) == [("kd_efficientnet_lite0", [0.1] * 3), ("fd_efficientnet_lite0", [5.0] * 3)]
    assert Laboratory().scores((ref,)) == [0.1] * 3  # type: ignore[call-arg]


def test_an_ablation_of_the_number_of_segments_keeps_the_steps_of_all_together() -> None:
    recipe = load_recipe("digits", [])
    for name in claim_cell.ABLATIONS:
        changed = load_recipe("digits", claim_cell.ablation_overrides(recipe, name))
        in_all = changed.finetune.num_steps * changed.segments.num_segments
        assert in_all == recipe.finetune.num_steps * recipe.segments.num_segments, name
    assert load_recipe("digits", claim_cell.ablation_overrides(recipe, "N=8")).segments.num_segments == 8


def test_the_demo_benchmark_runs_what_the_makefile_runs() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (recipe,) = re.findall(r"^demo: install\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert tuple(re.findall(r"\$\(BIN\)/([a-z]+(?: [a-z/]+)*)", recipe)) == demo.COMMANDS


def test_the_parts_of_the_demo_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    ends = {"begin": 100.0, demo.UP: 110.0, demo.ENV: 110.5, demo.RUN: 112.0, demo.FOLLOW: 272.0}
    moments = {name: demo.Moment(epoch, 2 * (epoch - 100)) for name, epoch in ends.items()}
    report = {"seconds": {"finetune": 150.0, "idle": 4.0, "storage": 1.0, "total": 154.0}}
    run = demo.Demo(Path(), moments, report, flow_began=115.0, first_task_began=116.0)
    parts = demo.split(run)
    assert parts == {"stack": 10, "until_first_task": 6, "work": 149, "idle": 3, "storage": 1, "end": 3}
    demo.print_demo(run, peak_gb=2.0)
    result = last_line(capsys.readouterr().out)
    assert result["seconds"]["total"] == 172
    assert result["ratio"] == pytest.approx(23 / 172)
    assert result["cpu_seconds"][demo.UP] == 20
    assert not result["holds"]
