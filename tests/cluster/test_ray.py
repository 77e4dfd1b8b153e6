"""`execution.runner: ray` on two nodes: `make test-cluster`."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from deme_core.artifacts import ArtifactStore
from deme_core.recipe import Recipe
from deme_core.segments import recipe_segments
from deme_core.settings import Settings
from deme_core.store import open_store
from flows.encodings import encode_dataset
from flows.flow_runtime import flow_runtime
from flows.trainings import Trainings
from tasks.jobs import JobResult
from tasks.progress import Event, subscribe
from tasks.stages import obtain_pretrained
from tests.cluster.conftest import RayCluster
from tests.e2e.conftest import TOY_RECIPE
from tests.integration.conftest import S3Server

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(280)]

_CHECKPOINT_EVERY = 20


def _recipe(num_steps: int, **execution: Any) -> Recipe:
    finetune = {"num_steps": num_steps, "batch_size": 4, "checkpoint_every": _CHECKPOINT_EVERY}
    execution = {"device": "cpu", "num_workers": 2, **execution}
    return Recipe.model_validate(
        TOY_RECIPE
        | {"segments": {"count": 4}, "merge": {"weights": [0.25] * 4}, "finetune": finetune, "execution": execution}
    )


@flow(task_runner=ThreadPoolTaskRunner(max_workers=16))  # type: ignore[arg-type]
def train(recipe: Recipe) -> tuple[str, dict[str, JobResult]]:
    """The pretrained model, the control and the four copies of a recipe."""
    with flow_runtime(recipe):
        pretrained = obtain_pretrained()
        segments = recipe_segments(recipe.segments, pretrained.metrics["num_train_timesteps"])
        trainings = Trainings(recipe, pretrained.ref, encode_dataset(recipe, pretrained), segments)
        futures = {"control": trainings.control()} | dict(zip("0123", trainings.copies(), strict=True))
        return str(flow_run.id), {"pretrained": pretrained} | {name: each.result() for name, each in futures.items()}


def _weights(results: dict[str, JobResult]) -> dict[str, list[tuple[str, str]]]:
    """Returns name and SHA-256 of every file of every model."""
    artifacts = ArtifactStore(open_store(Settings().store_uri), Settings().cache_folder)
    manifests = {name: artifacts.manifest(result.ref) for name, result in results.items()}
    return {name: [(file.name, file.sha256) for file in each.files] for name, each in manifests.items()}


def _expected(
    recipe: Recipe, bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, JobResult], dict[str, list[tuple[str, str]]]]:
    """What the local runner makes of it, with a store of its own."""
    with monkeypatch.context() as patch:
        patch.setenv("DEME_HOME", str(tmp_path / "local"))
        patch.setenv("DEME_STORE_URI", (tmp_path / "local" / "store").as_uri())
        local = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"runner": "local"})})
        _, results = train(local)
        return results, _weights(results)


class Watcher:
    """Hears what all tasks tell, and kills the second node when told to."""

    def __init__(self) -> None:
        self.nodes: dict[str, list[str]] = defaultdict(list)
        self.steps: dict[str, list[int]] = defaultdict(list)
        self.resumed: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        if node := re.fullmatch(r"on (.*)", event.record.get("message", "")):
            self.nodes[event.task].append(node[1])
        if step := re.fullmatch(r"resumed at step (\d+)", event.record.get("message", "")):
            self.resumed[event.task] = int(step[1])
        if "global_step" in event.record:
            self.steps[event.task].append(event.record["global_step"])


def _training_nodes(watcher: Watcher) -> dict[str, list[str]]:
    return {task: nodes for task, nodes in watcher.nodes.items() if task.startswith("finetune")}


def test_trainings_are_spread_over_both_nodes_and_give_the_weights_of_the_local_runner(
    cluster: RayCluster, flow_machine: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As from a laptop outside of the cluster.
    recipe = _recipe(_CHECKPOINT_EVERY, runner="ray", ray_address=cluster.client_address)
    watcher = Watcher()
    unsubscribe = subscribe(watcher)
    _, results = train(recipe)
    unsubscribe()

    nodes = _training_nodes(watcher)
    assert len(nodes) == 5
    assert len({node for each in nodes.values() for node in each}) == 2
    weights = _weights(results)
    expected, expected_weights = _expected(recipe, flow_machine, tmp_path, monkeypatch)
    assert {k: v.ref.digest for k, v in results.items()} == {k: v.ref.digest for k, v in expected.items()}
    assert weights == expected_weights
    # Nobody without the keys may read them off the machine.
    assert not [p for p in psutil.process_iter(["cmdline"]) if flow_machine.secret_key in str(p.info["cmdline"])]
    logs = [path for path in cluster.logs.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in logs)
    assert not [path for path in logs if flow_machine.secret_key.encode() in path.read_bytes()]


def test_a_segment_of_a_killed_node_goes_on_from_its_last_checkpoint_on_the_other(
    cluster: RayCluster, flow_machine: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(6 * _CHECKPOINT_EVERY, runner="ray", ray_address=cluster.address)
    killed: dict[str, int] = {}

    class Killer(Watcher):
        """Kills the second node once a segment there has passed its second checkpoint."""

        def __call__(self, event: Event) -> None:
            super().__call__(event)
            step = event.record.get("global_step", 0)
            if killed or not event.task.startswith("finetune segment") or step <= 2 * _CHECKPOINT_EVERY:
                return
            if _second_node() in self.nodes[event.task][-1]:
                killed[event.task] = step
                cluster.kill_second_node()

    watcher = Killer()
    unsubscribe = subscribe(watcher)
    flow_run_id, results = train(recipe)
    unsubscribe()

    (segment,) = killed
    lost, found = watcher.nodes[segment]
    assert lost != found
    assert watcher.resumed[segment] % _CHECKPOINT_EVERY == 0
    assert watcher.resumed[segment] >= 2 * _CHECKPOINT_EVERY
    # Nothing before the checkpoint was done again: the first step told after it was resumed is beyond it.
    steps = watcher.steps[segment]
    turn = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    assert steps[turn] > watcher.resumed[segment]
    assert steps[-1] == 6 * _CHECKPOINT_EVERY
    weights = _weights(results)
    assert weights == _expected(recipe, flow_machine, tmp_path, monkeypatch)[1]
    assert _states(flow_run_id) <= {"Completed", "Crashed", "Failed"}


def _second_node() -> str:
    """Returns the beginning of the id of the node that is not the head."""
    import ray

    (second,) = [n for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"]]
    return str(second["NodeID"])[:8]


def _states(flow_run_id: str) -> set[str]:
    """Returns the names of the states of all task runs."""
    by_id = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))  # type: ignore[list-item]
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=by_id)
    assert runs
    return {str(json.loads(run.state.model_dump_json())["name"]) for run in runs if run.state}
