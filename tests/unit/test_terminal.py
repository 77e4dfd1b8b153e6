"""Names and messages of others in the terminal: rich's markup and control characters in them do nothing."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deme_core.errors import InputError, ModelFolderError
from flows import cli, model_commands
from flows.doctor import run_checks
from flows.ending import run_to_its_end
from flows.model_commands import new_folder
from flows.progress_display import ProgressDisplay
from flows.report_text import _print_verdicts, _table, print_comparison, print_model, print_scores
from flows.terminal import printable
from tasks.progress import Event, tell

# No tag of rich's closes what none has opened: it raises a MarkupError.
BRACKETS = "og[/b] [red]x"
COPY = "\x1b]52;c;aGk=\a"


def printed(show: Callable[[Console], Any], *, is_terminal: bool = False) -> str:
    console = Console(file=StringIO(), width=200, force_terminal=is_terminal)
    show(console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_what_cannot_be_printed_is_spelled_out() -> None:
    assert printable(f"{COPY}ü 模型\n\u202e\udcff") == r"\x1b]52;c;aGk=\x07ü 模型" + "\n" + r"\u202e\udcff"


def test_what_an_error_repeats_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ModelFolderError(f"config.json describes a {COPY}; {BRACKETS}.")

    with pytest.raises(SystemExit) as ended:
        run_to_its_end(fail)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert r"a \x1b]52;c;aGk=\x07; og[/b] [red]x." in told
    assert "\a" not in told


def test_what_doctor_found_does_nothing_to_the_terminal() -> None:
    def fail() -> str:
        raise InputError(f"{COPY}{BRACKETS}")

    assert r"\x1b]52;c;aGk=\x07og[/b] [red]x" in printed(lambda console: run_checks(console, [("model", fail)]))


def test_a_folder_with_brackets_is_named_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_commands, "generate_images", lambda *_, **__: None)
    monkeypatch.setattr(model_commands, "export_model", lambda _run, out, _row: out)
    monkeypatch.setattr(model_commands, "merge_models", lambda _pretrained, _experts, _weights, out, **_: out)
    out = Path(BRACKETS)
    cli.generate("model", out)
    cli.export(out)
    cli.merge(Path("base"), [Path("expert")], out)
    assert capsys.readouterr().out.splitlines() == [f"wrote 16 images to {out}", f"wrote {out}", f"wrote {out}"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_names_of_tasks_are_no_markup(is_terminal: bool) -> None:
    def show(console: Console) -> None:
        with ProgressDisplay(console):
            tell(Event(BRACKETS, "progress", {"message": BRACKETS}))
            tell(Event(BRACKETS, "warning", {"message": COPY}))
            tell(Event(BRACKETS, "finished", {"seconds": 1.0}))

    told = printed(show, is_terminal=is_terminal)
    assert BRACKETS in told and r"\x1b]52" in told


def test_nothing_in_a_report_is_markup() -> None:
    score = {"mean": 1.0, "low": 0.5, "high": 1.5}
    report = {
        "recipe": BRACKETS,
        "rows": {"model": {"fid": score}},
        "num_images": 4,
        "seeds": [1, 2, 3],
        "mlflow_run_id": BRACKETS,
        "fingerprint": BRACKETS,
        "page": {"path": BRACKETS},
    }
    scores = printed(lambda console: print_scores(report, console))
    assert scores.count(BRACKETS) == 3
    assert "95 % interval over sampling seeds" in " ".join(scores.split())
    assert BRACKETS in printed(lambda console: print_model({"uri": BRACKETS}, console))
    assert BRACKETS in printed(lambda console: print_comparison({"run": {"fid": BRACKETS}}, console))
    assert "\x1b" not in printed(lambda console: print_comparison({"run": {COPY: COPY}}, console))


def test_tables_say_what_their_intervals_are_of() -> None:
    rows = {"row": {"model": "merged", "fid": "1 (0.5 to 1.5)"}}
    told = " ".join(printed(lambda console: print_comparison(rows, console)).split())
    assert told.startswith("mean and 95 % interval over sampling seeds, lower is better; fid decides")


def test_rows_come_in_their_order_though_mlflow_sorts_them() -> None:
    score = {"fid": {"mean": 1.0, "low": 0.5, "high": 2.0}}
    rows = {"ensemble": score, "finetuned": score, "merged": score, "pretrained": score}
    report = {"recipe": "toy", "rows": rows, "num_images": 4, "seeds": [1, 2, 3]}
    told = printed(lambda console: console.print(_table(report)))
    assert [word for word in told.split() if word in rows] == ["pretrained", "finetuned", "ensemble", "merged"]


def test_each_verdict_stands_beside_its_baseline() -> None:
    gain = {"seeds": {"mean": -1.0, "low": -2.0, "high": -0.5}}
    verdict = {"vs_pretrained": "better", "vs_finetuned": "worse"}
    comparison = {"verdict": verdict, "gain_by": dict.fromkeys(verdict, gain)}
    told = printed(lambda console: _print_verdicts("merged", comparison, "fid", console))
    assert "merged is better than pretrained" in told
    assert "merged is worse than finetuned" in told


def test_a_name_that_no_folder_can_have_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"File name too long.*choose another --out"),
        new_folder(tmp_path / ("a" * 300)),
    ):
        pass
