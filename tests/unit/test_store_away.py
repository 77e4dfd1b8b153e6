"""An object store that is away is said to be, wherever it is asked first: such runs are tried again."""

import socket
from pathlib import Path

import pytest

from deme_core.errors import StoreUnavailableError
from deme_core.extractors.base import local_file
from deme_core.extractors.clip import load_clip
from deme_core.images.remote import fetch_images
from deme_core.model_source import fetch_source
from deme_core.prompts import load_prompts
from deme_core.recipe_file import load_recipe

ASKED = {
    "recipe": lambda cache: load_recipe("s3://bucket/my.yaml"),
    "model": lambda cache: fetch_source("s3://bucket/model", revision=None, cache=cache),
    "images": lambda cache: fetch_images("s3://bucket/images", cache),
    "prompts": lambda cache: load_prompts("s3://bucket/prompts.txt", cache),
    "weights": lambda cache: local_file("s3://bucket/weights.pt", cache, "mend"),
    "folder of weights": lambda cache: load_clip("s3://bucket/clip", None, cache, "cpu"),
}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint at which nobody listens, and a client that does not wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *_, **__: 0.0)


@pytest.mark.parametrize("asked", ASKED)
def test_a_store_that_is_away_is_said_to_be(asked: str, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError):
        ASKED[asked](tmp_path)
