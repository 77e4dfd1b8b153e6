"""The two web pages that people look at, in a real browser."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.e2e.platform import Platform

ARGUMENTS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1500,1500
""".split()  # noqa: SIM905
SECONDS = 90.0


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield browser
        browser.quit()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def click(browser: webdriver.Chrome, path: str, what: str) -> None:
    # By script: the element may lie outside of the window.
    wait_until(lambda: bool(browser.find_elements(By.XPATH, path)), what)
    browser.execute_script("arguments[0].click()", browser.find_element(By.XPATH, path))


def test_prefect_shows_the_table_on_the_page_of_the_run(
    browser: webdriver.Chrome, platform: Platform, full_report: dict[str, Any]
) -> None:
    server = platform.variables["PREFECT_API_URL"].removesuffix("/api")
    browser.get(f"{server}/runs/flow-run/{full_report['flow_run_id']}")
    click(browser, "//li[normalize-space(.)='Artifacts']", "the page has no tab for artifacts")
    click(browser, "//*[text()='toy-rows']", "the table is not there")
    wait_until(lambda: all(row in browser.page_source for row in full_report["rows"]), "the table misses rows")


def test_mlflow_compares_two_runs(
    browser: webdriver.Chrome, platform: Platform, full_report: dict[str, Any], second_report: dict[str, Any]
) -> None:
    runs = [full_report["mlflow_run_id"], second_report["mlflow_run_id"]]
    server, experiment = platform.variables["MLFLOW_TRACKING_URI"], platform.experiment("toy")
    query = f"runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"
    browser.get(f"{server}/#/compare-runs?{query}")
    wanted = [*runs, *(f"fd_efficientnet_lite0/{row}" for row in full_report["rows"])]
    wait_until(lambda: all(text in browser.page_source for text in wanted), "runs or metrics are missing")
    click(browser, "//*[text()='samples.png']", "the artifacts are not there")
    images = "[...document.images].filter(i => i.src.startsWith('blob:') && i.naturalWidth > 100)"
    loaded = f"return new Set({images}.map(i => i.src)).size"
    wait_until(lambda: browser.execute_script(loaded) == len(runs), "the pictures of both runs are not there")
