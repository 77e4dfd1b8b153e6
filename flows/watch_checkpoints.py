"""The flow ``deme-watch``: each new checkpoint under a prefix starts one run of ``deme/full``."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for
from pydantic import Field

from deme_core.checkpoint_watch.ledger import Ledger, Look
from deme_core.checkpoint_watch.look import Finding, look, open_prefix
from deme_core.errors import InputError
from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from deme_core.store import ObjectStore, open_store
from flows.environment import make_folders
from flows.parameters import Overrides, RecipeName

make_folders()

Prefix = Annotated[
    str, Field(pattern="^(s3://[^/]+|file:///)", description="What to watch: s3://bucket/prefix or file:///folder.")
]
SettleSeconds = Annotated[
    int, Field(ge=0, description="A folder is read once it has not changed for this long; 0 if uploads are finished.")
]
DeploymentName = Annotated[str, Field(pattern="^[^/]+/[^/]+$", description="The deployment to run: flow/deployment.")]


@flow(name="deme-watch")
def watch(
    prefix: Prefix | None = None,
    recipe: RecipeName = "digits",
    overrides: Overrides = (),
    settle_seconds: SettleSeconds = 60,
    deployment: DeploymentName = "deme/full",
) -> dict[str, Any]:
    """Looks once under a prefix for model folders, and starts a run for each whole one whose weights are new.

    Args:
        prefix: object-store URI under which checkpoints appear, each a diffusers folder; by default incoming/ in
            DeMe's own store.
        recipe: name of a recipe, or path or object-store URI of a YAML file; its pretrained model is replaced.
        overrides: settings such as ``finetune.num_steps=50`` for every run.
        settle_seconds: a folder is read once it has not changed for this long.
        deployment: what to run, ``flow/deployment``.

    Returns:
        What was started, what waits and what is broken, by folder.
    """
    settings = Settings()
    store = open_store(settings.store_uri)
    source: ObjectStore = open_prefix(prefix) if prefix else open_store(f"{store.uri}/incoming")
    load_recipe(recipe, [*overrides, _pretrained_from(source.uri)])  # Else every run that is started would fail.
    ledger = Ledger(store, prefix=source.uri, recipe=recipe)
    findings = look(source, ledger, settle=timedelta(seconds=settle_seconds), home=settings.state_folder)
    looks, news = {finding.look.uri: finding.look for finding in findings}, _News()
    try:
        for finding in findings:
            if finding.look.verdict.outcome != "whole":
                news.tell_of(finding)
                continue
            # As the ledger's entry: watches of other prefixes, which may have other overrides, start runs of their own.
            key = f"deme-watch-{recipe}-{PurePosixPath(ledger.uri).name}-{finding.look.verdict.digest}"
            start = _starter(key, recipe, [*overrides, _pretrained_from(finding.look.uri)], deployment)
            looked, started = ledger.start_once(finding.look, start, claimed_by=f"flow run {flow_run.id}")
            looks[looked.uri] = looked
            news.tell_of(finding, looked, started=started)
    finally:
        ledger.remember(looks.values())
        news.show()
    return {"prefix": source.uri, "recipe": recipe, "num_folders": len(looks), **news.summary}


def _pretrained_from(uri: str) -> str:
    """The override that replaces all of a recipe's ``pretrained``, of which more than the source may be given."""
    return f"pretrained={json.dumps({'source': uri})}"


def _starter(key: str, recipe: str, overrides: list[str], deployment: str) -> Callable[[], str]:
    """Returns what starts the run, once in a Prefect database for each key however often it is called."""

    def start() -> str:
        try:
            run: Any = run_deployment(
                deployment,
                parameters={"recipe": recipe, "overrides": overrides},
                timeout=0,
                # A run of its own: it outlives the watch.
                as_subflow=False,
                idempotency_key=key,
            )
        except ObjectNotFound as error:
            raise InputError(f"There is no deployment {deployment}; register it with deme deploy.") from error
        return str(run.id)

    return start


class _News:
    """What is said of a look: a line in the log for each folder, and an artifact if anything is new."""

    def __init__(self) -> None:
        self.summary: dict[str, dict[str, str]] = {"started": {}, "waiting": {}, "broken": {}}
        self._new: list[str] = []
        self._log = get_run_logger()

    def tell_of(self, finding: Finding, looked: Look | None = None, *, started: bool = False) -> None:
        """Tells of one folder; of one that was known before, nothing."""
        uri, verdict = finding.look.uri, finding.look.verdict
        if started and looked is not None and looked.flow_run_id is not None:
            self.summary["started"][uri] = looked.flow_run_id
            self._log.info("new: %s, weights %s, started flow run %s", uri, verdict.digest, looked.flow_run_id)
            link = url_for("flow-run", looked.flow_run_id)
            run = f"[{looked.flow_run_id}]({link})" if link else f"`{looked.flow_run_id}`"
            self._new.append(f"- new: `{uri}` started flow run {run}")
        elif verdict.outcome == "whole" and (looked is None or looked.flow_run_id is None):
            self.summary["waiting"][uri] = "another watcher is starting its run"
            self._log.info("waiting: %s, for another watcher is starting its run", uri)
        elif verdict.outcome == "whole" and finding.is_new and looked is not None:
            self._log.info("known: %s holds the weights that started flow run %s", uri, looked.flow_run_id)
        elif verdict.outcome == "waiting":
            self.summary["waiting"][uri] = str(verdict.reason)
            self._log.info("waiting: %s, for %s", uri, verdict.reason)
        elif verdict.outcome == "broken" and finding.is_new:
            self.summary["broken"][uri] = str(verdict.reason)
            self._log.warning("broken: %s: %s", uri, verdict.reason)
            self._new.append(f"- broken: `{uri}`: {verdict.reason}")

    def show(self) -> None:
        """Makes the artifact."""
        if self._new:
            create_markdown_artifact("# Checkpoints\n\n" + "\n".join(self._new) + "\n", key="new-checkpoints")
