"""The platform as a team uses it: a real Prefect server and worker, MLflow and S3, all on free loopback ports."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import mlflow
import psutil
import pytest
from diffusers import DDPMPipeline
from mlflow import MlflowClient

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe
from tests.e2e.stack_platform import FINAL, Platform, belongs
from tests.e2e.waiting import wait_for

METRIC = "fd_efficientnet_lite0"
CRASH = "deme - crash flow runs without heartbeat"


def test_status_names_every_service_and_its_process(platform: Platform) -> None:
    found = json.loads(platform.deme.run("status", "--json").stdout)
    assert list(found) == ["s3", "prefect", "mlflow", "worker"]
    for service in found.values():
        assert service["state"] == "ready"
        assert psutil.pid_exists(service["pid"])


def test_both_servers_have_pages_for_people(platform: Platform) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        page = httpx.get(platform.variables[name].removesuffix("/api"), timeout=30, follow_redirects=True)
        assert page.status_code == 200 and "<title>" in page.text, name


def test_nothing_listens_beyond_loopback(platform: Platform) -> None:
    ours = {p.pid for p in psutil.process_iter() if belongs(p, platform.deme.home)}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    assert len(listening) >= 3
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1"}


def test_without_a_key_nothing_of_the_object_store_is_read_or_deleted(platform: Platform) -> None:
    ports = json.loads((platform.deme.home / "stack" / "state.json").read_text())["ports"]
    for name in ("s3", "s3_master", "s3_filer", "s3_volume"):
        for path in ("buckets/deme/", "deme/", "col/delete?collection=deme", "vol/grow?count=1", "1,0123456789"):
            answer = httpx.get(f"http://127.0.0.1:{ports[name]}/{path}", timeout=30)
            assert answer.status_code >= 400, (name, path)


def test_what_was_set_on_the_server_stays_when_all_is_deployed_again(platform: Platform) -> None:
    watch = platform.api("GET", "deployments/name/deme-watch/new-checkpoints")
    assert watch["parameters"] == {"recipe": "digits", "overrides": []}
    assert watch["global_concurrency_limit"]["limit"] == 1
    (automation,) = platform.api("POST", "automations/filter", {"automations": {"name": {"any_": [CRASH]}}})
    ours = {"recipe": "digits", "overrides": [], "prefix": "s3://deme/team"}
    changes = {
        "parameters": ours,
        "concurrency_limit": 2,
        "paused": True,
        "job_variables": {"env": {"HTTPS_PROXY": "a"}},
    }
    platform.api("PATCH", f"deployments/{watch['id']}", changes)
    [schedule] = watch["schedules"]
    platform.api("PATCH", f"deployments/{watch['id']}/schedules/{schedule['id']}", {"active": False})
    platform.api("PATCH", f"automations/{automation['id']}", {"enabled": False})
    try:
        done = platform.deme.run("deploy", extra=platform.variables)
        assert done.returncode == 0, done.stderr
        assert "keeps its base job template" not in done.stderr
        again = platform.api("GET", "deployments/name/deme-watch/new-checkpoints")
        assert (again["parameters"], again["global_concurrency_limit"]["limit"]) == (ours, 2)
        assert (again["paused"], again["job_variables"]) == (True, changes["job_variables"])
        assert [(each["id"], each["active"]) for each in again["schedules"]] == [(schedule["id"], False)]
        assert not platform.api("GET", f"automations/{automation['id']}")["enabled"]
    finally:
        before = {"parameters": watch["parameters"], "concurrency_limit": 1, "paused": False, "job_variables": {}}
        platform.api("PATCH", f"deployments/{watch['id']}", before)
        platform.api("PATCH", f"deployments/{watch['id']}/schedules/{schedule['id']}", {"active": True})
        platform.api("PATCH", f"automations/{automation['id']}", {"enabled": True})


def test_credentials_are_private_and_in_no_command_line(platform: Platform) -> None:
    kept = platform.deme.home / "stack" / "credentials.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    for secret in (platform.variables["AWS_SECRET_ACCESS_KEY"], platform.variables["PREFECT_API_AUTH_STRING"]):
        assert not [p for p in psutil.process_iter() if secret in " ".join(_cmdline(p))]
        for log in (platform.deme.home / "stack" / "logs").iterdir():
            assert secret not in log.read_text(errors="replace")


@pytest.mark.parametrize("command", [["follow"], ["deploy"], ["run", "digits"]])
def test_a_missing_log_in_is_one_sentence(command: list[str], platform: Platform) -> None:
    done = platform.deme.run(*command, extra={"PREFECT_API_URL": platform.variables["PREFECT_API_URL"]})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "PREFECT_API_AUTH_STRING is missing or wrong" in done.stderr.splitlines()[-1]


def test_a_web_page_can_have_prefect_do_nothing(platform: Platform) -> None:
    """It can send requests without asking first, and by a name of its own for this machine; it knows no password."""
    foreign = {"Origin": "https://evil.example", "Host": "evil.example"}
    url = f"{platform.variables['PREFECT_API_URL']}/flows/"
    asked = httpx.options(url, headers={**foreign, "Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in asked.headers
    for headers in (foreign, {**foreign, "Authorization": "Basic ZGVtZTo="}):
        answer = httpx.post(url, headers=headers, content=b'{"name": "evil"}')
        assert answer.status_code == 401, answer.text
        assert "access-control-allow-origin" not in answer.headers


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_prefect_shows_rows_pictures_verdict_and_progress(platform: Platform, full_report: dict[str, Any]) -> None:
    found = platform.api(
        "POST", "artifacts/filter", {"flow_runs": {"id": {"any_": [full_report["flow_run_id"]]}}, "limit": 100}
    )
    by_key = {artifact["key"]: artifact for artifact in found}
    rows = json.loads(by_key["toy-rows"]["data"])
    assert [row["row"] for row in rows] == ["pretrained", "finetuned", "ensemble", "merged"]
    assert full_report["mlflow_run_id"] in by_key["toy-verdict"]["data"]
    picture = httpx.get(by_key["toy-samples"]["data"], timeout=30)
    assert picture.content.startswith(b"\x89PNG")
    assert by_key["finetune-segment-1-500-1000"]["data"] == 100.0


def test_workers_log_into_the_run(platform: Platform, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    absent = str(tmp_path / "no model")
    flow_run = platform.start_deployment("deme-evaluate/default", model=absent, recipe=write_recipe())
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL)["type"] == "FAILED"

    def traceback_of_worker() -> list[str]:
        logs = platform.api("POST", "logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})
        lines = [log["message"] for log in logs]
        return [line for line in lines if line.startswith("worker: Traceback") and absent in line]

    wait_for(traceback_of_worker, 30)  # Prefect sends what was logged some seconds late.


def test_the_champion_loads_in_stock_diffusers(
    platform: Platform, full_report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full_report["registry"]["model"] == "deme-toy"
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    challenger = client.get_model_version_by_alias("deme-toy", "challenger")
    assert challenger.version == full_report["registry"]["version"]
    assert challenger.tags["deme.reason"]
    for name, value in platform.variables.items():
        monkeypatch.setenv(name, value)
    folder = mlflow.artifacts.download_artifacts("models:/deme-toy@challenger", dst_path=str(tmp_path))
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert sum(each.numel() for each in pipeline.unet.parameters()) > 1000


def test_the_same_run_again_computes_nothing_and_registers_nothing(
    platform: Platform, full_report: dict[str, Any], second_report: dict[str, Any]
) -> None:
    for same in ("merged", "rows", "fingerprint"):
        assert second_report[same] == full_report[same]
    assert second_report["registry"]["version"] == full_report["registry"]["version"]
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    children = client.search_runs(
        [platform.experiment("toy")], f"tags.mlflow.parentRunId = '{second_report['mlflow_run_id']}'"
    )
    assert len(children) > 8
    assert {child.data.tags["deme.cached"] for child in children} == {"true"}


def test_every_deployment_for_people_runs(
    platform: Platform, full_report: dict[str, Any], second_report: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe()
    started = [
        platform.start_deployment("deme-pretrain/default", recipe=recipe),
        platform.start_deployment("deme-evaluate/default", model=full_report["merged"]["uri"], recipe=recipe),
        platform.start_deployment(
            "deme-compare/default", runs=[full_report["mlflow_run_id"], second_report["mlflow_run_id"]]
        ),
    ]
    ends = [platform.wait(flow_run, lambda state: state["type"] in FINAL) for flow_run in started]
    assert [(end["type"], end["message"]) for end in ends] == [("COMPLETED", None)] * 3


@pytest.mark.long
def test_cancelling_ends_every_process_within_half_a_minute(platform: Platform, write_recipe: WriteRecipe) -> None:
    endless = write_recipe(finetune={"num_steps": 100_000, "batch_size": 8, "learning_rate": 1e-3})
    flow_run = platform.start(endless)
    engine = platform.wait_for_work(flow_run, "finetune segment 0 [0, 500)")
    family = [engine, *engine.children(recursive=True)]
    platform.prefect("flow-run", "cancel", flow_run)
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL, seconds=60)["type"] == "CANCELLED"


def test_bad_parameters_fail_with_a_sentence(platform: Platform) -> None:
    expected = {
        platform.start("no-such-recipe"): "There is no recipe 'no-such-recipe'",
        platform.start("digits", "execution.device=cuda"): "this machine shows no GPU",
    }
    for flow_run, sentence in expected.items():
        state = platform.wait(flow_run, lambda state: state["type"] in FINAL)
        assert state["type"] == "FAILED"
        assert sentence in state["message"]


def test_a_service_that_died_is_told_and_started_again(platform: Platform) -> None:
    before = json.loads(platform.deme.run("status", "--json").stdout)
    for process in psutil.Process(before["mlflow"]["pid"]).children(recursive=True):
        process.kill()
    os.kill(before["mlflow"]["pid"], signal.SIGKILL)
    told = platform.deme.run("status", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["mlflow"]["state"] == "died"
    assert platform.deme.run("up").returncode == 0
    after = json.loads(platform.deme.run("status", "--json").stdout)
    assert after["mlflow"]["state"] == "ready"
    assert after["prefect"] == before["prefect"]
    assert after["mlflow"]["url"] == before["mlflow"]["url"]


def test_a_taken_port_is_said_and_nothing_stays_behind(fresh_deme: CommandLine, platform: Platform) -> None:
    taken = platform.variables["MLFLOW_TRACKING_URI"].rpartition(":")[2]
    done = fresh_deme.run("up", "--mlflow-port", taken)
    assert done.returncode == 2
    assert f"Port {taken} for mlflow is taken by" in done.stderr
    assert not [p for p in psutil.process_iter() if belongs(p, fresh_deme.home)]
