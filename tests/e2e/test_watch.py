"""New checkpoints in the bucket start runs by themselves."""

import time
from pathlib import Path
from typing import Any

import boto3

from tests.e2e.conftest import WriteRecipe
from tests.e2e.stack_platform import FINAL, Platform
from tests.tiny_models import randomize, tiny_unet, write_tiny_folder


def upload(platform: Platform, folder: Path, prefix: str) -> None:
    variables = platform.variables
    client = boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_DEFAULT_REGION"],
    )
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "deme", f"{prefix}/{path.relative_to(folder).as_posix()}")


def look(platform: Platform, recipe: str) -> dict[str, Any]:
    """Looks under inbox/ once, as the schedule does, and returns the flow run."""
    flow_run = platform.start_deployment(
        "deme-watch/new-checkpoints",
        prefix="s3://deme/inbox",
        recipe=recipe,
        overrides=["finetune.num_steps=2", "merge={weights: [0.5, 0.5]}"],
        settle_seconds=0,
    )
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL)["type"] == "COMPLETED"
    found: dict[str, Any] = platform.api("GET", f"flow_runs/{flow_run}")
    return found


def started_runs(platform: Platform) -> list[dict[str, Any]]:
    return [run for run in platform.runs("deme") if any("s3://deme/inbox" in o for o in run["parameters"]["overrides"])]


def test_each_new_checkpoint_starts_one_run(platform: Platform, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    whole, broken = (write_tiny_folder(tmp_path / name, randomize(tiny_unet(), seed=3)) for name in ("whole", "broken"))
    weights = next(broken.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    upload(platform, whole, "inbox/monday")
    upload(platform, broken, "inbox/broken")
    look(platform, recipe)
    [run] = started_runs(platform)
    upload(platform, whole, "inbox/the-same-weights-under-another-name")
    second = look(platform, recipe)
    assert [run["id"] for run in started_runs(platform)] == [run["id"]]
    told = platform.api("POST", "artifacts/filter", {"artifacts": {"key": {"any_": ["new-checkpoints"]}}})
    assert len(told) == 1, "a broken checkpoint is reported once"
    assert "inbox/broken" in told[0]["data"]
    assert told[0]["flow_run_id"] != second["id"]
    assert platform.wait(run["id"], lambda state: state["type"] in FINAL)["type"] == "COMPLETED"


def test_an_event_starts_the_watch_at_once(platform: Platform) -> None:
    before = {run["id"] for run in platform.runs("deme-watch")}
    platform.prefect("event", "emit", "deme.checkpoint.uploaded", "--resource-id", "deme.checkpoints")
    deadline = time.monotonic() + 60
    while not (
        new := [
            run for run in platform.runs("deme-watch") if run["id"] not in before and run["auto_scheduled"] is False
        ]
    ):
        assert time.monotonic() < deadline, "no run was started"
        time.sleep(0.5)
    assert platform.wait(new[0]["id"], lambda state: state["type"] in FINAL)["type"] == "COMPLETED"
