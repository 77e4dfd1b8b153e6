"""The MLflow model registry: each merged model is a version, and the best one so far the champion.

MLflow is imported late, as in `tasks.tracking`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from deme_core.metrics import higher_is_better
from deme_core.settings import Settings
from deme_core.verdict import RowScores, compare, differences, differences_in_words, lacks_images
from tasks.patient_client import patient_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"
_LONGEST_TAG = 100_000  # Of MLflow's.


@dataclass(frozen=True)
class Registration:
    """What became of a merged model in the registry.

    Attributes:
        model: name of the registered model, ``deme-<recipe>``.
        version: its version; None if the tracking server does not take it.
        decision: promoted (it is the champion now), kept (the champion stays), or not registered.
        reason: why, in a sentence.
    """

    model: str
    version: str | None
    decision: Literal["promoted", "kept", "not registered"]
    reason: str


def register(
    settings: Settings, report: Mapping[str, Any], scores: RowScores, *, source: str, metric: str
) -> Registration:
    """Registers the merged model of a run as challenger, and promotes it if it beats the champion.

    Args:
        settings: where MLflow is.
        report: the run's report.
        scores: what the merged model scored by the metric that decides.
        source: URI of the folder of the merged model, which stock diffusers loads.
        metric: name of the metric that decides.
    """
    from mlflow.exceptions import MlflowException

    client = patient_client(settings)
    name = f"deme-{report['recipe']}"
    try:
        version = _find_version(client, name, report) or _create_version(
            client, name, report, scores, source=source, metric=metric
        )
    except MlflowException as error:
        refusal = f"MLflow at {settings.tracking_place} refused: {error.message}"
        return Registration(name, None, "not registered", refusal)
    _write(client.set_registered_model_alias, name, CHALLENGER, version.version)
    decision, reason = _decide(_champion(client, name), version, report, scores, metric)
    if decision == "promoted":
        _write(client.set_registered_model_alias, name, CHAMPION, version.version)
    for key, value in {"deme.decision": decision, "deme.reason": reason}.items():
        _write(client.set_model_version_tag, name, version.version, key, value)
    # A database gives a number, a server text.
    return Registration(name, str(version.version), decision, reason)


def _write(call: Callable[..., object], *arguments: object) -> None:
    """Calls twice if need be: of two runs that add one row at once MLflow refuses one, which then finds it."""
    from mlflow.exceptions import MlflowException

    try:
        call(*arguments)
    except MlflowException:
        call(*arguments)


def _find_version(client: "MlflowClient", name: str, report: Mapping[str, Any]) -> "ModelVersion | None":
    """Returns the version of the same model under the same evaluation: a run served from the store makes no new one."""
    for version in client.search_model_versions(f"name = '{name}'"):
        same_model = version.tags.get("deme.digest") == report["merged"]["digest"]
        if same_model and version.tags.get("deme.fingerprint") == report["fingerprint"]:
            return version
    return None


def _create_version(
    client: "MlflowClient", name: str, report: Mapping[str, Any], scores: RowScores, *, source: str, metric: str
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Merged models of the recipe {report['recipe']}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    merged = report["merged"]
    tags = {
        "deme.digest": merged["digest"],
        "deme.uri": merged["uri"],
        "deme.weights": json.dumps(merged["weights"]),
        "deme.fingerprint": report["fingerprint"],
        "deme.metric": metric,
        "deme.scores": json.dumps(scores.by_seed),
        "deme.replicates": _fitting(scores.replicates),
    }
    return client.create_model_version(name, source=source, run_id=report["mlflow_run_id"], tags=tags)


def _fitting(replicates: Sequence[Sequence[float]]) -> str:
    """Returns as JSON the resamples of each seed, the first ones if MLflow takes no more: two rows share the first."""
    kept = [list(seed) for seed in replicates]
    while len(text := json.dumps(kept)) > _LONGEST_TAG:
        kept = [seed[: len(seed) * 9 // 10] for seed in kept]
    return text


def _champion(client: "MlflowClient", name: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # No such model, no such alias. Whatever else it says must not dethrone a champion.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _decide(
    champion: "ModelVersion | None", version: "ModelVersion", report: Mapping[str, Any], scores: RowScores, metric: str
) -> tuple[Literal["promoted", "kept"], str]:
    if champion is None:
        verdict = report["verdict"]["vs_pretrained"]
        if verdict == "better":
            return "promoted", "there was no champion, and it is better than its pretrained model"
        return "kept", f"there is no champion, and against its pretrained model it is {verdict}"
    if str(champion.version) == str(version.version):
        return "promoted", "it is the champion already"
    if champion.tags.get("deme.fingerprint") != report["fingerprint"]:
        return (
            "kept",
            f"champion version {champion.version} was evaluated under other conditions; scores cannot be compared",
        )
    theirs = RowScores(json.loads(champion.tags["deme.scores"]), json.loads(champion.tags.get("deme.replicates", "[]")))
    verdict = compare(scores, theirs, higher_is_better=higher_is_better(metric))
    numbers = differences_in_words(metric, differences(scores, theirs))
    if lacks_images(scores, theirs):
        numbers += "; only one of the two has resamples, so run it with the champion's evaluate.num_bootstrap"
    return ("promoted" if verdict == "better" else "kept"), (
        f"against champion version {champion.version} it is {verdict} ({numbers})"
    )


def registration_tags(registration: Registration) -> dict[str, str]:
    """Returns the outcome as tags of the run."""
    return {f"deme.registry.{key}": str(value) for key, value in asdict(registration).items()}
