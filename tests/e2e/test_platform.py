"""The platform as a team uses it: a real Prefect server and worker, MLflow and S3, all on free loopback ports."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe
from tests.e2e.stack_platform import FINAL, Platform, belongs

METRIC = "fd_efficientnet_lite0"


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


def test_credentials_are_private_and_in_no_command_line(platform: Platform) -> None:
    kept = platform.deme.home / "stack" / "credentials.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    secret = platform.variables["AWS_SECRET_ACCESS_KEY"]
    assert not [p for p in psutil.process_iter() if secret in " ".join(_cmdline(p))]
    for log in (platform.deme.home / "stack" / "logs").iterdir():
        assert secret not in log.read_text(errors="replace")


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


def test_workers_log_into_the_run(platform: Platform, full_report: dict[str, Any]) -> None:
    assert platform.tasks(full_report["flow_run_id"])["finetune segment 1 [500, 1000)"] == "COMPLETED"


def test_the_champion_loads_in_stock_diffusers(platform: Platform, full_report: dict[str, Any], tmp_path: Path) -> None:
    assert full_report["registry"]["model"] == "deme-toy"
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    challenger = client.get_model_version_by_alias("deme-toy", "challenger")
    assert challenger.version == full_report["registry"]["version"]
    assert challenger.tags["deme.reason"]
    script = (
        "import sys, mlflow\n"
        "from diffusers import DDPMPipeline\n"
        "folder = mlflow.artifacts.download_artifacts('models:/deme-toy@challenger', dst_path=sys.argv[1])\n"
        "print(sum(p.numel() for p in DDPMPipeline.from_pretrained(folder).unet.parameters()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=platform.environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 1000


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
