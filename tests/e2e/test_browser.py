"""The two web pages that people look at, in a real browser."""

import json
from typing import Any
from urllib.parse import quote

from selenium import webdriver

from tests.e2e.browser import click, wait_until
from tests.e2e.stack_platform import Platform


def test_prefect_shows_the_table_on_the_page_of_the_run(
    browser: webdriver.Chrome, platform: Platform, full_report: dict[str, Any]
) -> None:
    server = platform.variables["PREFECT_API_URL"].removesuffix("/api")
    browser.get(server)
    wait_until(lambda: "Login" in browser.page_source, "the page asks for no log-in")
    password = "return document.querySelector('input')"
    browser.execute_script(password).send_keys(platform.variables["PREFECT_API_AUTH_STRING"])
    click(browser, "//button[contains(., 'Login')]", "there is no way to log in")
    wait_until(lambda: "Login" not in browser.page_source, "the log-in is refused")
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
    click(browser, "//*[text()='samples_merged.png']", "the artifacts are not there")
    images = "[...document.images].filter(i => i.src.startsWith('blob:') && i.naturalWidth > 100)"
    loaded = f"return new Set({images}.map(i => i.src)).size"
    wait_until(lambda: browser.execute_script(loaded) == len(runs), "the pictures of both runs are not there")
