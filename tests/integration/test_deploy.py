"""`deme deploy` on a real Prefect server: what people set there since stays."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events.schemas.automations import Automation, AutomationCore

from deme_core.errors import DemeError
from flows.deploy import deploy

WATCH, FULL = "deme-watch/new-checkpoints", "deme/full"
EVENT = "look for new checkpoints"
SECRET = "{{ prefect.blocks.secret.token }}"


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        for found in client.read_deployments():
            client.delete_deployment(found.id)
            client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
        deploy()
        yield client


def content(client: SyncPrefectClient, name: str) -> dict[str, Any]:
    return client.read_deployment_by_name(name).model_dump(exclude={"last_polled", "status"})


def change(client: SyncPrefectClient, name: str, **changes: Any) -> DeploymentResponse:
    client.update_deployment(client.read_deployment_by_name(name).id, DeploymentUpdate(**changes))
    return client.read_deployment_by_name(name)


def change_automation(client: SyncPrefectClient, automation: Automation, **changes: Any) -> None:
    content = automation.model_dump(exclude={"id", "owner_resource"}) | changes
    client.update_automation(automation.id, AutomationCore.model_validate(content))


def test_nothing_changes_when_nothing_is_new(client: SyncPrefectClient) -> None:
    names = deploy()
    assert len(names) == 7 and WATCH in names
    before = [content(client, name) for name in names]
    automations = {each.id: each for each in client.read_automations()}
    assert deploy() == names
    assert [content(client, name) for name in names] == before
    assert {each.id: each for each in client.read_automations()} == automations


def test_what_people_set_stays(client: SyncPrefectClient) -> None:
    parameters = {"recipe": "digits", "overrides": [], "prefix": "s3://deme/team"}
    found = change(
        client,
        WATCH,
        paused=True,
        tags=["deme", "team"],
        description="Ours.",
        parameters=parameters,
        concurrency_limit=2,
        job_variables={"env": {"TOKEN": SECRET}},
    )
    [ours] = found.schedules
    client.update_deployment_schedule(found.id, ours.id, active=False)
    hourly = DeploymentScheduleCreate(
        schedule=IntervalSchedule(interval=timedelta(hours=1)), parameters={"recipe": "a"}
    )
    client.create_deployment_schedules(found.id, [hourly])
    nightly = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), slug="nightly")
    client.create_deployment_schedules(client.read_deployment_by_name(FULL).id, [nightly])
    [event] = client.read_automations_by_name(EVENT)
    change_automation(client, event, enabled=False)
    before = content(client, WATCH), content(client, FULL), client.read_automations_by_name(EVENT)
    deploy()
    assert (content(client, WATCH), content(client, FULL), client.read_automations_by_name(EVENT)) == before
    after = client.read_deployment_by_name(WATCH)
    assert after.paused and len(after.schedules) == 2
    assert after.job_variables == {"env": {"TOKEN": SECRET}}


def test_a_schedule_that_was_removed_stays_removed(client: SyncPrefectClient) -> None:
    found = client.read_deployment_by_name(WATCH)
    client.delete_deployment_schedule(found.id, found.schedules[0].id)
    deploy()
    assert client.read_deployment_by_name(WATCH).schedules == []


def test_code_of_an_older_version_is_brought_up_to_date(client: SyncPrefectClient) -> None:
    new = client.read_deployment_by_name(WATCH)
    [event] = client.read_automations_by_name(EVENT)
    change(
        client,
        WATCH,
        paused=True,
        tags=["team"],
        version="old",
        entrypoint="flows.old.watch",
        parameters={"overrides": ["seed=1"]},
        parameter_openapi_schema={"type": "object", "properties": {"overrides": {"type": "array"}}},
    )
    change_automation(client, event, description="old")
    deploy()
    found = client.read_deployment_by_name(WATCH)
    assert (found.version, found.entrypoint) == (new.version, new.entrypoint)
    assert found.parameter_openapi_schema == new.parameter_openapi_schema
    assert found.parameters == {"recipe": "digits", "overrides": ["seed=1"]}
    assert found.paused and found.tags == ["team", "deme"]
    assert client.read_automations_by_name(EVENT) == [event]


def test_parameters_that_the_flow_does_not_take_any_more_are_named(client: SyncPrefectClient) -> None:
    change(client, WATCH, parameters={"recipe": 3}, parameter_openapi_schema={"type": "object", "properties": {}})
    with pytest.raises(DemeError, match=rf"Deployment {WATCH} has parameters on the server .* correct them there"):
        deploy()


def test_the_automation_of_a_deployment_that_was_deleted_goes_with_the_next_one(client: SyncPrefectClient) -> None:
    [left] = client.read_automations_by_name(EVENT)
    other = left.model_dump(exclude={"id", "owner_resource", "actions"}) | {"actions": [{"type": "do-nothing"}]}
    ours = client.create_automation(AutomationCore.model_validate(other))
    client.delete_deployment(client.read_deployment_by_name(WATCH).id)
    assert left in client.read_automations_by_name(EVENT), "Prefect deletes it by itself now"
    deploy()
    found = {each.id: each for each in client.read_automations_by_name(EVENT)}
    client.delete_automation(ours)
    assert left.id not in found and ours in found and len(found) == 2
    [new] = [each for each in found.values() if each.id != ours]
    assert [action.deployment_id for action in new.actions] == [client.read_deployment_by_name(WATCH).id]
