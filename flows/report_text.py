"""The report in the terminal: the table of the rows, the verdict, and where everything lies."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deme_core.metrics import direction
from deme_core.rows import BASELINES, ROWS
from deme_core.settings import Settings
from deme_core.verdict import Interval, differences_in_words, score_in_words
from flows.terminal import printable, say

_ORDER = (*ROWS, "model")


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints what a run found; a report may come from elsewhere, so nothing in it is markup."""
    console.print(_table(report), markup=False)
    _print_verdicts("merged", report, report["metric"], console)
    if "distilled" in report:
        _print_verdicts("distilled", report["distilled"], report["metric"], console)
    weights = ", ".join(f"{weight + 0.0:g}" for weight in report["merged"]["weights"])  # No -0.
    if not any(report["merged"]["weights"]):
        say(console, "merged is the pretrained model: all merge weights are 0")
    lines = [
        f"merge weights  {weights}  (scale of the control: {report['finetuned']['scale']:g})",
        f"merged model   {report['merged']['uri']}",
        *([f"distilled      {report['distilled']['uri']}"] if "distilled" in report else []),
        f"registry       {_registration(report['registry'])}",
        f"take it out    deme export {report['mlflow_run_id'][:8]} --out merged-model",
        f"page           {_page(report)}",
        *_pictures(report),
        f"compare runs   {mlflow_command(Settings())}",
        f"took           {_duration(report['seconds'])}",
    ]
    say(console, "\n".join(lines))


def _print_verdicts(row: str, comparison: dict[str, Any], metric: str, console: Console) -> None:
    for baseline in BASELINES:
        verdict, gains = comparison["verdict"][f"vs_{baseline}"], comparison["gain_by"][f"vs_{baseline}"]
        bold = (printable(verdict), "bold")
        console.print(
            Text.assemble(f"{row} is ", bold, f" than {baseline}")
            if verdict != "too close to call"
            else Text.assemble(f"{row} against {baseline}: ", bold),
            f"({differences_in_words(printable(metric), {over: Interval(**gain) for over, gain in gains.items()})})",
            markup=False,
            highlight=False,
        )


def print_scores(report: dict[str, Any], console: Console) -> None:
    """Prints the scores of one model."""
    console.print(_table(report), markup=False)
    lines = [
        f"run            {report['mlflow_run_id']}",
        f"fingerprint    {report['fingerprint']}",
        f"page           {_page(report)}",
    ]
    say(console, "\n".join(lines))


def print_model(report: dict[str, Any], console: Console) -> None:
    """Prints where a pretrained model lies."""
    say(console, f"pretrained model  {report['uri']}")


def print_comparison(rows: dict[str, dict[str, str]], console: Console) -> None:
    """Prints runs side by side."""
    columns = list(next(iter(rows.values())))
    # That of `tasks.comparison.comparison_table`: all others stand between these.
    deciding = next((name for name in columns if name not in ("recipe", "model", "verdict")), None)
    decides = f"; {deciding} decides" if deciding else ""
    table = Table(
        "run",
        *map(printable, columns),
        title=_title(f"mean and 95 % interval over sampling seeds, {direction(columns)}{decides}"),
        title_justify="left",
    )
    for run, row in rows.items():
        table.add_row(run[:8], *map(printable, row.values()))
    console.print(table, markup=False)


def _page(report: dict[str, Any]) -> str:
    """Returns where the page is, or the command that fetches it from another machine."""
    path: str = report["page"]["path"]
    return path if Path(path).exists() else f"deme report {report['mlflow_run_id'][:8]}"


def _pictures(report: dict[str, Any]) -> list[str]:
    here = [path for path in report["figures"].values() if Path(path).exists()]
    if not here:  # Another machine drew them.
        return [f"pictures       artifacts of MLflow run {report['mlflow_run_id']}"]
    return [f"{'' if i else 'pictures':<15}{path}" for i, path in enumerate(here)]


def _registration(registry: dict[str, Any]) -> str:
    version = f" version {registry['version']}" if registry["version"] else ""
    return f"{registry['model']}{version}, {registry['decision']}: {registry['reason']}"


def mlflow_command(settings: Settings) -> str:
    """Returns how to look at the runs in MLflow."""
    if settings.tracking_uri.startswith("sqlite:"):
        return f"MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri {settings.tracking_uri}"
    return settings.tracking_place


def _table(report: dict[str, Any]) -> Table:
    metrics = list(next(iter(report["rows"].values())))
    counts = f"{report['num_images']} images for each of {len(report['seeds'])} seeds"
    title = _title(f"{report['recipe']}: {counts}; mean and 95 % interval over sampling seeds, {direction(metrics)}")
    table = Table("row", *map(printable, metrics), title=title, title_justify="left")
    for row in sorted(report["rows"], key=_ORDER.index):  # JSON that came through MLflow is sorted by name.
        scores = report["rows"][row]
        table.add_row(row, *(score_in_words(scores[metric]) for metric in metrics))
    return table


def _title(text: str) -> Text:
    """A string would be read as markup whatever `Console.print` is told."""
    return Text(printable(text), style="table.title")


def _duration(seconds: dict[str, float]) -> str:
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    return f"{seconds['total']:.0f} s ({stages})"
