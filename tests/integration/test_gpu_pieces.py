"""CIFAR-10's whole way in pieces, at toy size on a CPU: what one piece leaves is all that the next one has."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu import cifar10


@pytest.mark.long
def test_pieces_go_on_from_each_other_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, state = tmp_path / "images", tmp_path / "state"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(96):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{number}.png")
    # A piece clears these; so they are put back after the test.
    for name in [name for name in os.environ if name.startswith(("AWS_", "DEME_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DEME_HOME", "")
    # With --flat 1 any second piece of pretraining ends it.
    piece = ["--images", str(images), "--state", str(state), "--device", "cpu", "--toy", "--flat", "1"]
    piece += ["--merges", "uniform"]

    with pytest.raises(SystemExit) as left:
        cifar10.main(piece)
    assert left.value.code == 3
    assert "Not done yet" in capsys.readouterr().out
    assert not (state / "result.json").exists()

    cifar10.main(piece)
    assert "differences, with 95 % intervals" in capsys.readouterr().out
    result = json.loads((state / "result.json").read_text())
    assert [entry["num_steps"] for entry in result["pretraining"]] == [4, 4]
    assert result["scores"].keys() == {"pretrained", "finetuned", "ensemble", "merged, uniform"}
    assert all(len(scores) == 3 for scores in result["scores"].values())
    assert result["differences"]["merged, uniform"]["finetuned"].keys() == {"sampling seeds", "images"}
    assert result["holds"] is False, "one training seed holds nothing"

    written = (state / "result.json").stat().st_mtime_ns
    cifar10.main(piece)
    assert json.loads(capsys.readouterr().out) == result
    assert (state / "result.json").stat().st_mtime_ns == written
