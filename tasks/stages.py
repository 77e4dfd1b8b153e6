"""One Prefect task per stage. Each has its job done by a worker, records the outcome, returns a small reference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from deme_core.errors import StoreUnavailableError, WorkerDiedError
from deme_core.manifest import ArtifactRef
from tasks.few_images import few_images_warning
from tasks.jobs import (
    CheckJob,
    ConfineJob,
    DistillJob,
    EmbeddingsJob,
    EvaluateJob,
    FinetuneJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    GramsJob,
    HeldoutJob,
    ImportCopyJob,
    ImportJob,
    Job,
    JobResult,
    LatentsJob,
    MergeJob,
    PretrainJob,
    RealFeaturesJob,
    ReferenceJob,
    SearchJob,
    pretrained_job,
)
from tasks.prefect_artifacts import progress_bar
from tasks.progress import Event, Record, Report, tell
from tasks.run_results import EXPERTS
from tasks.runtime import current_runtime, was_stopped
from tasks.training_log import TrainingLog
from tasks.weight_search import search_artifact


def _is_passing(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failure may pass by itself: the store was away, or a worker process died."""
    return _failed_with(state, StoreUnavailableError, WorkerDiedError)


def _is_store_away(_task: Any, _run: Any, state: Any) -> bool:
    """Whether the store was away."""
    return _failed_with(state, StoreUnavailableError)


def _failed_with(state: Any, *errors: type[Exception]) -> bool:
    try:
        state.result()
    except errors:
        return True
    except Exception:  # Whatever else a task raised: trying again would raise it again.
        return False
    return False


# Stages find their own results by digest, in the store; Prefect's cache would be a second truth.
_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_condition_fn": _is_passing,
}


@task(name="pretrained", task_run_name="pretrained model", **_OPTIONS)
def obtain_pretrained() -> JobResult:
    """Trains theta_0, or brings it into the store."""
    runtime = current_runtime()
    job = pretrained_job(runtime.recipe)
    if isinstance(job, ImportJob):
        return runtime.run(job, task="pretrained model")
    return _train(job, task_name="pretrained model", child_name="pretrain")


@task(name="check", task_run_name="what the model can do", **_OPTIONS)
def check_model(job: CheckJob) -> JobResult:
    """Ends the run here if the pretrained model cannot do what the recipe asks."""
    return current_runtime().run(job, task="what the model can do")


@task(name="encode", task_run_name="{job.stage} from {job.low} to {job.high}", **_OPTIONS)
def encode(job: LatentsJob | EmbeddingsJob) -> JobResult:
    """Encodes a slice of the data set's images or captions, so that no training has to."""
    return current_runtime().run(job, task=f"{job.stage} from {job.low}")


@task(name="finetune", task_run_name="finetune {job.label}", **_OPTIONS)
def finetune(job: FinetuneJob, child_name: str) -> JobResult:
    """Finetunes one copy of theta_0."""
    return _train(job, task_name=f"finetune {job.label}", child_name=child_name)


@task(name="import copy", task_run_name="import {job.label}", **_OPTIONS)
def import_copy(job: ImportCopyJob) -> JobResult:
    """Brings a copy of theta_0 that was finetuned elsewhere into the store."""
    return current_runtime().run(job, task=f"import {job.label}")


@task(name="distill", task_run_name="distill {job.label}", **_OPTIONS)
def distill(job: DistillJob) -> JobResult:
    """Trains the merged model to predict what the ensemble predicts."""
    return _train(job, task_name=f"distill {job.label}", child_name="distill")


def _train(job: PretrainJob | FinetuneJob | DistillJob, *, task_name: str, child_name: str) -> JobResult:
    with progress_bar(task_name) as move_bar:
        result = _follow_training(job, task_name, child_name, move_bar)
        move_bar(1.0)
    return result


def _follow_training(
    job: PretrainJob | FinetuneJob | DistillJob, task_name: str, child_name: str, move_bar: Callable[[float], None]
) -> JobResult:
    runtime = current_runtime()
    # MLflow may still be starting the run of the flow.
    training_log = TrainingLog(lambda: (runtime.tracker, runtime.tracker.child(child_name)))

    def on_record(record: Record) -> None:
        if "global_step" in record:
            training_log.add(record)
            move_bar(record["global_step"] / record["num_steps"])

    try:
        result = runtime.run(job, task=task_name, on_record=on_record)
    except BaseException as error:
        training_log.abandon("KILLED" if was_stopped(error) else "FAILED")
        raise
    child, tracker = training_log.complete(result.metrics["history"]), runtime.tracker
    runtime.note_results(child, result)
    tracker.log_params(child, job.model_dump(mode="json", include={"low", "high", "num_steps", "label"}))
    tracker.log_text(child, _histogram_text(result.metrics["timestep_histogram"]), "timestep_histogram.csv")
    tracker.finish(child)
    return result


def _histogram_text(counts: Sequence[int]) -> str:
    lines = [f"{index},{count}" for index, count in enumerate(counts)]
    return "\n".join([f"bin (of {len(counts)} equal ones over all timesteps),drawn", *lines]) + "\n"


@task(name="features", task_run_name="features of real images {job.low} to {job.high} for the {job.part}", **_OPTIONS)
def real_features(job: RealFeaturesJob) -> JobResult:
    """Extracts the features of a slice of real images."""
    return current_runtime().run(job, task=f"features of real images from {job.low} for the {job.part}")


@task(name="reference", task_run_name="reference for the {part}", **_OPTIONS)
def build_reference(
    part: Literal["search", "report"], num_for_search: int | None, features: Sequence[JobResult | Exception]
) -> JobResult:
    """Reduces the features of one part's real images to what scores need.

    Args:
        part: which images.
        num_for_search: images set aside for a search; None for half of the data set.
        features: the slices, in order; the first one that failed is raised.
    """
    runtime = current_runtime()
    job = ReferenceJob(
        dataset=runtime.recipe.reference_dataset,
        evaluate=runtime.recipe.evaluate_for(part),
        part=part,
        num_for_search=num_for_search,
        features=_refs(features),
    )
    task_name = f"reference for the {part}"
    result = runtime.run(job, task=task_name)
    search = runtime.recipe.merge.search
    num_images = search.num_images if part == "search" and search else job.evaluate.num_images
    if warning := few_images_warning(job.evaluate, result.metrics, num_images=num_images):
        tell(Event(task_name, "warning", {"message": warning}))
    return result


@task(name="heldout loss", task_run_name="held-out loss of {what}", **_OPTIONS)
def heldout_loss(model: ArtifactRef, edges: tuple[int, ...], what: str) -> JobResult:
    """Measures the denoising loss by timestep on images that no training saw."""
    runtime = current_runtime()
    child = runtime.tracker.child(f"heldout/{what}")
    job = HeldoutJob(model=model, dataset=runtime.recipe.dataset, edges=edges)
    result = runtime.run(job, task=f"held-out loss of {what}", child=child)
    by_timestep = {low: {"heldout_loss": loss} for low, loss in zip(edges, result.metrics["bins"], strict=False)}
    runtime.tracker.log_steps(child, by_timestep)
    runtime.tracker.finish(child)
    return result


@task(name="candidate", task_run_name="{what}", **_OPTIONS)
def measure_candidate(job: Job, what: str) -> JobResult:
    """Does one job of a search, such as the score of one candidate."""
    return current_runtime().do(job)


# Jobs of a search are tried again on their own; what is left to pass is an object store that is away.
@task(name="search", task_run_name="search {what}", **(_OPTIONS | {"retry_condition_fn": _is_store_away}))
def search(job: SearchJob, what: str) -> JobResult:
    """Searches merge weights, or the control's scale; its jobs are tasks of their own, side by side."""
    runtime = current_runtime()
    child = runtime.tracker.child(f"search/{what}")

    def work(report: Report, start: Callable[[], None]) -> JobResult:
        start()
        return search_artifact(job, runtime.artifacts, lambda jobs: _do_all(jobs, what), report)

    result = runtime.follow(work, task=f"search {what}", child=child)
    runtime.tracker.log_steps(child, dict(enumerate(map(_candidate_metrics, result.metrics["candidates"]))))
    correlations = {f"rank_correlation/{name}": rho for name, rho in result.metrics["rank_correlation"].items()}
    cost = {name: result.metrics[name] for name in ("num_images", "num_losses")}
    runtime.tracker.log_metrics(child, correlations | cost)
    runtime.tracker.finish(child)
    return result


def _candidate_metrics(candidate: Mapping[str, Any]) -> dict[str, float]:
    metrics = {f"weight/{index}": weight for index, weight in enumerate(candidate["weights"])}
    if candidate["score"] is not None:
        metrics["rough_score" if candidate["rough"] else "score"] = candidate["score"]
    return metrics


def _do_all(jobs: Sequence[Job], what: str) -> Iterator[JobResult]:
    """Submits all jobs and yields their results in order; when one fails, the others are still waited for."""
    futures = [measure_candidate.submit(job, f"{what}: {getattr(job, 'label', 'problem')}") for job in jobs]
    try:
        yield from (future.result() for future in futures)
    except Exception:
        for future in futures:
            future.wait()
        raise


@task(name="grams", task_run_name="inputs of {what}", **_OPTIONS)
def measure_inputs(job: GramsJob, what: str) -> JobResult:
    """Measures which inputs the linear maps of a copy see on its own segment."""
    return current_runtime().run(job, task=f"inputs of {what}")


@task(name="confine", task_run_name="confine {what}", **_OPTIONS)
def confine(job: ConfineJob, what: str) -> JobResult:
    """Confines the task vector of a copy to the inputs of its own segment."""
    return current_runtime().run(job, task=f"confine {what}")


@task(name="merge", task_run_name="merge {what}", **_OPTIONS)
def merge(job: MergeJob, what: str) -> JobResult:
    """Merges experts into one stock model."""
    runtime = current_runtime()
    child = runtime.tracker.child("merge" if what == EXPERTS else f"merge/{what}")
    result = runtime.run(job, task=f"merge {what}", child=child)
    weights = {f"weight/{index}": weight for index, weight in enumerate(job.weights)}
    runtime.tracker.log_metrics(child, weights)
    runtime.tracker.finish(child)
    return result


@task(name="generate", task_run_name="generate {row} (seed {job.images.seed}, from image {job.low})", **_OPTIONS)
def generated_features(row: str, job: GeneratedFeaturesJob) -> JobResult:
    """Generates a slice of a row's images and extracts their features."""
    return current_runtime().run(job, task=f"generate {row} (seed {job.images.seed}, from image {job.low})")


@task(name="evaluate", task_run_name="evaluate {row}", **_OPTIONS)
def evaluate_row(
    row: str,
    images: Sequence[GeneratedImages],
    features: Sequence[Sequence[JobResult | Exception]],
    reference: ArtifactRef,
) -> list[JobResult]:
    """Scores one row under every seed of the report.

    Args:
        row: its name.
        images: its image sets, one per seed.
        features: the slices of each set; the first one that failed is raised.
        reference: the real images.
    """
    runtime = current_runtime()
    spec = runtime.recipe.evaluate
    child = runtime.tracker.child(f"evaluate/{row}")
    results = []
    with runtime.ended_by_failure(child):
        for image_set, slices in zip(images, features, strict=True):
            job = EvaluateJob(images=image_set, features=_refs(slices), evaluate=spec, reference=reference)
            results.append(runtime.run(job, task=f"evaluate {row} (seed {image_set.seed})"))
    runtime.note_results(child, *results)
    scores = {image_set.seed: result.metrics["scores"] for image_set, result in zip(images, results, strict=True)}
    runtime.tracker.log_steps(child, scores)
    runtime.tracker.log_params(child, {"num_images": spec.num_images, "seeds": list(spec.seeds)})
    runtime.tracker.finish(child)
    return results


def _refs(results: Sequence[JobResult | Exception]) -> tuple[ArtifactRef, ...]:
    """Returns the artifacts of tasks that were waited for with `allow_failure`, or raises what one of them raised.

    Without that Prefect would not start the task that waits, and would say no more than that it did not.
    """
    for result in results:
        if isinstance(result, Exception):
            raise result
    return tuple(result.ref for result in results if isinstance(result, JobResult))
