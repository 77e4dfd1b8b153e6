"""The page of a run, and of several, in a real browser without a network."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.e2e.browser import console_errors, requested_addresses, take_offline, wait_until
from tests.e2e.command_line import CommandLine

ROWS = ("pretrained", "finetuned", "ensemble", "merged")
_CHARTS = """
    return [...document.querySelectorAll("[data-chart]")].map(place => ({
        name: place.dataset.chart,
        marks: place.querySelectorAll(".main-svg .scatterlayer path").length,
        width: place.querySelector(".main-svg")?.getBoundingClientRect().width ?? 0,
        height: place.querySelector(".main-svg")?.getBoundingClientRect().height ?? 0,
    }))
"""


@pytest.fixture(scope="module")
def offline(browser: webdriver.Chrome) -> webdriver.Chrome:
    take_offline(browser)
    return browser


def charts(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = browser.execute_script(_CHARTS)
    return found


def show(browser: webdriver.Chrome, page: Path) -> None:
    """Opens a page from disk and waits until every chart is drawn."""
    browser.get(page.as_uri())
    wait_until(lambda: all(chart["marks"] > 0 for chart in charts(browser)), "a chart is empty")


def assert_it_asked_for_nothing(browser: webdriver.Chrome, page: Path) -> None:
    addresses = requested_addresses(browser)
    assert page.as_uri() in addresses, "the log does not show what was asked for"
    assert not [address for address in addresses if not address.startswith(("file:", "data:", "blob:", "about:"))]
    assert console_errors(browser) == []


def table(browser: webdriver.Chrome, section: str) -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, f"#{section} tbody tr")
    return [" ".join(row.text.split()) for row in rows]


def test_the_page_of_a_run_shows_everything_without_a_network(
    offline: webdriver.Chrome, first_report: dict[str, Any]
) -> None:
    page = Path(first_report["page"]["path"])
    show(offline, page)
    assert [chart["name"] for chart in charts(offline)] == [
        "chart-scores",
        "chart-heldout",
        "chart-search-0",
        "chart-search-1",
        "chart-training",
    ]
    assert all(chart["width"] > 600 and chart["height"] > 150 for chart in charts(offline)), charts(offline)
    scores = table(offline, "scores")
    assert [row.split()[0] for row in scores[:4]] == list(ROWS)
    assert all("over seeds" in row and "over images" in row for row in scores[:4])
    verdicts = offline.find_elements(By.CSS_SELECTOR, ".tiles .badge")
    assert [badge.text for badge in verdicts] == list(first_report["verdict"].values())
    loaded = "return [...document.images].map(i => i.complete && i.naturalWidth > 100)"
    assert offline.execute_script(loaded) == [True] * len(ROWS)
    assert any(row.startswith("images and their features") for row in table(offline, "cost"))
    assert "name: toy" in offline.find_element(By.CSS_SELECTOR, "pre.recipe").text
    assert_it_asked_for_nothing(offline, page)


def test_a_request_would_be_seen_and_so_would_an_error(offline: webdriver.Chrome, tmp_path: Path) -> None:
    page = tmp_path / "curious.html"
    page.write_text('<img src="http://127.0.0.1:9/picture.png"><script>throw new Error("oops")</script>')
    offline.get(page.as_uri())
    assert "http://127.0.0.1:9/picture.png" in requested_addresses(offline)
    assert any("oops" in message for message in console_errors(offline))


def test_a_click_on_a_name_hides_its_curve(offline: webdriver.Chrome, first_report: dict[str, Any]) -> None:
    show(offline, Path(first_report["page"]["path"]))
    hidden = """
        return document.querySelector("[data-chart='chart-heldout']").data
            .filter(trace => trace.visible === "legendonly").map(trace => trace.name)
    """
    assert offline.execute_script(hidden) == []
    toggle = offline.find_element(By.CSS_SELECTOR, "[data-chart='chart-heldout'] .legendtoggle")
    offline.execute_script("arguments[0].scrollIntoView({block: 'center'})", toggle)
    try:
        webdriver.ActionChains(offline).move_to_element(toggle).click().perform()
        wait_until(lambda: "finetuned" in offline.execute_script(hidden), "the curve is still there", seconds=10)
    except AssertionError:  # A click whose press and release a busy browser sees far apart is none to Plotly.
        webdriver.ActionChains(offline).move_to_element(toggle).click().perform()
        wait_until(lambda: "finetuned" in offline.execute_script(hidden), "the curve is still there")


def test_charts_fit_a_sheet_of_paper_and_the_window_again(
    offline: webdriver.Chrome, first_report: dict[str, Any]
) -> None:
    show(offline, Path(first_report["page"]["path"]))
    before = [chart["width"] for chart in charts(offline)]
    offline.execute_script("dispatchEvent(new Event('beforeprint'))")
    wait_until(lambda: all(chart["width"] < 700 for chart in charts(offline)), "a chart is wider than the paper")
    offline.execute_script("dispatchEvent(new Event('afterprint'))")
    wait_until(lambda: [chart["width"] for chart in charts(offline)] == before, "a chart stays narrow")


def test_a_model_that_was_evaluated_alone_has_a_page_too(offline: webdriver.Chrome, evaluated: dict[str, Any]) -> None:
    page = Path(evaluated["page"]["path"])
    show(offline, page)
    assert [row.split()[0] for row in table(offline, "scores")] == ["model"]
    assert f"deme evaluate '{evaluated['model']}' --recipe toy.yaml" in offline.page_source
    assert_it_asked_for_nothing(offline, page)


def test_a_comparison_is_such_a_page_beside_its_table(
    offline: webdriver.Chrome,
    deme: CommandLine,
    first_report: dict[str, Any],
    evaluated: dict[str, Any],
    tmp_path: Path,
) -> None:
    runs = [first_report["mlflow_run_id"], evaluated["mlflow_run_id"]]
    page = tmp_path / "new folder" / "both.html"
    done = deme.run("compare", *runs, "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout
    show(offline, page)
    assert [row.split()[1] for row in table(offline, "scores")[:2]] == [run[:8] for run in runs]
    assert len(offline.find_elements(By.CSS_SELECTOR, "#samples img")) == 2
    differing = [row.split()[0] for row in table(offline, "runs")]
    assert "pretrained.source" in differing
    assert "evaluate.num_images" not in differing
    assert_it_asked_for_nothing(offline, page)

    in_json = deme.run("compare", *runs, "--json")
    compared = json.loads(in_json.stdout.splitlines()[-1])
    assert {run: row["verdict"] for run, row in compared.items()} == {runs[0]: "baseline", runs[1]: "too close to call"}
    written = max((deme.home / "reports").glob("comparison-*.html"), key=lambda page: page.stat().st_mtime)
    assert str(written) in in_json.stderr


def test_a_page_is_an_artifact_with_a_manifest(deme: CommandLine, first_report: dict[str, Any]) -> None:
    assert first_report["page"]["uri"] == f"{(deme.home / 'store').as_uri()}/report/{first_report['mlflow_run_id']}"
    folder = deme.home / "store" / "report" / first_report["mlflow_run_id"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {file["name"] for file in manifest["files"]} >= {"report.html", "samples.png", "samples_merged.png"}
    assert manifest["metrics"]["rows"] == first_report["rows"]
    assert len(manifest["inputs"]) == len(ROWS) * len(first_report["seeds"])


def test_the_page_of_a_run_that_was_done_elsewhere_is_fetched(
    deme: CommandLine, first_report: dict[str, Any], tmp_path: Path
) -> None:
    run, page = first_report["mlflow_run_id"], Path(first_report["page"]["path"])
    assert deme.run("report", run[:12]).stdout.strip() == str(page)
    where = {"MLFLOW_TRACKING_URI": f"sqlite:///{deme.home / 'mlflow.db'}"}
    elsewhere = CommandLine(tmp_path / "laptop")
    fetched = elsewhere.home / "reports" / run / "report.html"
    opened, script = tmp_path / "opened", tmp_path / "browser.py"
    script.write_text(f"import pathlib, sys; pathlib.Path({str(opened)!r}).write_text(sys.argv[1])")
    done = elsewhere.run("report", run[:12], "--open", extra=where | {"BROWSER": f"{sys.executable} {script} %s"})
    assert (done.returncode, done.stdout.strip()) == (0, str(fetched)), done.stderr
    assert fetched.read_bytes() == page.read_bytes()
    assert opened.read_text() == fetched.as_uri()

    # MLflow may have lost it: the object store has it as well.
    fetched.unlink()
    (lost,) = (deme.home / "mlartifacts" / run).rglob("report.html")
    lost.rename(lost.with_suffix(".away"))
    try:
        done = elsewhere.run("report", run[:12], extra=where)
    finally:
        lost.with_suffix(".away").rename(lost)
    assert (done.returncode, done.stdout.strip()) == (0, str(fetched)), done.stderr
    assert fetched.read_bytes() == page.read_bytes()

    unknown = elsewhere.run("report", "nowhere", extra=where)
    assert unknown.returncode == 2
    assert "no run whose id begins with 'nowhere'" in unknown.stderr
