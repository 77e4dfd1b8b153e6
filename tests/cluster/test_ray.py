"""`execution.runner: ray` on two nodes: `make test-cluster`."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from tasks.progress import Event, subscribe
from tests.cluster.conftest import RayCluster
from tests.cluster.trainings import CHECKPOINT_EVERY, NUM_STEPS, Trained, train, training_recipe
from tests.integration.conftest import S3Server

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]


class Watcher:
    """Hears what all tasks tell, and ends the second node, once a segment there has passed a step.

    Args:
        end_node: does that.
        after: that step.
    """

    def __init__(self, end_node: Callable[[], None], *, after: int) -> None:
        self._end_node, self._after = end_node, after
        self.ended: dict[str, int] = {}
        self.nodes: dict[str, list[str]] = defaultdict(list)
        self.steps: dict[str, list[int]] = defaultdict(list)
        self.resumed: dict[str, int] = {}
        self.num_told_before: dict[str, int] = {}
        self.without_gpu: set[str] = set()

    def __call__(self, event: Event) -> None:
        if "the cluster shows no GPU" in event.record.get("message", ""):
            self.without_gpu.add(event.task)
        if node := re.fullmatch(r"on (.*)", event.record.get("message", "")):
            self.nodes[event.task].append(node[1])
        if step := re.fullmatch(r"resumed at step (\d+)", event.record.get("message", "")):
            self.resumed[event.task] = int(step[1])
            self.num_told_before[event.task] = len(self.steps[event.task])
        if "global_step" in event.record:
            self.steps[event.task].append(event.record["global_step"])
        step = event.record.get("global_step", 0)
        if self.ended or not event.task.startswith("finetune segment") or step <= self._after:
            return
        if _second_node() in self.nodes[event.task][-1]:
            self.ended[event.task] = step
            self._end_node()


@pytest.mark.long
def test_trainings_are_spread_over_both_nodes_and_one_that_is_taken_away_leaves_a_checkpoint_of_that_step(
    cluster: RayCluster, flow_machine: S3Server, expected: Trained, tmp_path: Path
) -> None:
    cluster.second_node_is_there(tmp_path / "node")
    shows_key: list[psutil.Process] = []

    def take_away() -> None:
        # While both work: nobody without the keys may read them off the machine.
        shows_key.extend(
            p for p in psutil.process_iter(["cmdline"]) if flow_machine.secret_key in str(p.info["cmdline"])
        )
        cluster.take_second_node_away()

    watcher = Watcher(take_away, after=20)
    unsubscribe = subscribe(watcher)
    # As from a laptop outside of the cluster. Checkpoints of its own would be made at steps 10000, 20000, …: never.
    _, results = train(training_recipe(10_000, runner="ray", ray_address=cluster.client_address, device="auto"))
    unsubscribe()

    nodes = {task: each for task, each in watcher.nodes.items() if task.startswith("finetune")}
    assert len(nodes) == 5
    assert len({node for each in nodes.values() for node in each}) == 2
    assert nodes.keys() <= watcher.without_gpu
    (segment,) = watcher.ended
    assert len(watcher.nodes[segment]) == 2
    assert watcher.resumed[segment] >= watcher.ended[segment]
    assert Trained.of(results) == expected
    assert not shows_key
    logs = [path for path in cluster.logs.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in logs)
    assert not [path for path in logs if flow_machine.secret_key.encode() in path.read_bytes()]


def test_a_segment_of_a_killed_node_goes_on_from_its_last_checkpoint_on_the_other(
    cluster: RayCluster, flow_machine: S3Server, expected: Trained, tmp_path: Path
) -> None:
    cluster.second_node_is_there(tmp_path / "node")
    watcher = Watcher(cluster.kill_second_node, after=2 * CHECKPOINT_EVERY)
    unsubscribe = subscribe(watcher)
    flow_run_id, results = train(training_recipe(runner="ray", ray_address=cluster.address))
    unsubscribe()

    assert len({node for each in watcher.nodes.values() for node in each}) == 2
    (segment,) = watcher.ended
    lost, found = watcher.nodes[segment]
    assert lost != found
    assert watcher.resumed[segment] % CHECKPOINT_EVERY == 0
    assert watcher.resumed[segment] >= 2 * CHECKPOINT_EVERY
    # Nothing before the checkpoint was done again. What was told before may end at that very checkpoint.
    steps = watcher.steps[segment][watcher.num_told_before[segment] :]
    assert min(steps) > watcher.resumed[segment]
    assert steps[-1] == NUM_STEPS
    assert Trained.of(results) == expected
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
