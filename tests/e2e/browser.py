"""Debian's Chromium without a screen, driven by its own driver."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

ARGUMENTS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1500,1500
""".split()  # noqa: SIM905
SECONDS = 90.0


@contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """Gives a browser that keeps a log of its console and of its network."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield browser
        finally:
            browser.quit()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def click(browser: webdriver.Chrome, path: str, what: str) -> None:
    # By script: the element may lie outside of the window.
    wait_until(lambda: bool(browser.find_elements(By.XPATH, path)), what)
    browser.execute_script("arguments[0].click()", browser.find_element(By.XPATH, path))


def take_offline(browser: webdriver.Chrome) -> None:
    """Cuts the browser's network, and forgets what was logged so far."""
    browser.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
    browser.get("about:blank")  # The page a browser starts with has requests of its own.
    browser.get_log("performance")
    browser.get_log("browser")


def requested_addresses(browser: webdriver.Chrome) -> list[str]:
    """Returns what the browser asked for since it was asked last, files and data: URIs included."""
    events: list[dict[str, Any]] = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def console_errors(browser: webdriver.Chrome) -> list[str]:
    """Returns the errors on the console since it was asked last."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
