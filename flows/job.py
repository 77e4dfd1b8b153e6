"""The flow ``deme-job``: one job of another flow run, done on this machine."""

import json
from typing import Any, Literal

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from deme_core.errors import DemeError
from deme_core.recipe import ExecutionSpec
from deme_core.settings import Settings
from deme_core.store import ObjectStore, open_store
from flows.environment import make_folders
from tasks.error_messages import error_message
from tasks.jobs import JOBS, Job, JobResult
from tasks.prefect_artifacts import progress_bar
from tasks.remote_sender import check_sender, outcome_key, while_sender_runs
from tasks.slots import plan_slots
from tasks.worker_pool import WorkerPool

make_folders()


def _job_name() -> str:
    content = flow_run.parameters["content"]
    return f"{JOBS[flow_run.parameters['kind']].stage} {content.get('label', '')}".strip()


@flow(name="deme-job", flow_run_name=_job_name)
def run_job(kind: str, content: dict[str, Any], sender: str, device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
    """Does one job of a recipe with execution.runner: prefect; started by the run that needs it, not by people.

    Args:
        kind: name of the job's class.
        content: the job.
        sender: id of the flow run that needs the job.
        device: execution.device of the recipe; with several GPUs the job takes those that no other has.
    """
    store = open_store(Settings().store_uri)
    check_sender(store, sender)

    def leave(outcome: dict[str, Any]) -> None:
        store.put_bytes(outcome_key(str(flow_run.id)), json.dumps(outcome).encode())

    try:
        result = _run(JOBS[kind].model_validate(content), store, sender, ExecutionSpec(device=device))
    except DemeError as error:
        leave(error_message(error))
        raise
    leave({"result": result.to_dict()})


def _run(job: Job, store: ObjectStore, sender: str, execution: ExecutionSpec) -> JobResult:
    logger = get_run_logger()
    pool = WorkerPool(
        plan_slots(execution, job.num_processes),
        log=lambda line: logger.info("worker: %s", line),
    )
    with progress_bar(_job_name()) as move_bar:

        def report(record: dict[str, Any]) -> None:
            if "global_step" in record:
                move_bar(record["global_step"] / record["num_steps"])

        try:
            with while_sender_runs(store, sender, pool.close):
                result = pool.run(job, report)
        finally:
            pool.close()
        move_bar(1.0)
    return result
