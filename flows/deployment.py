"""The schedules of params.yaml as deployments in Prefect, created again and again without twins.

Each flow has one deployment a workspace, of the workspace's name; what params.yaml no longer wants
loses its schedule, its trigger or, where it is nothing without one, its deployment.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.types.entrypoint import EntrypointType

from flows import drift, pages, pool, turns, uploads, watch
from flows.check import ringmo_check
from flows.retrain import retrain
from flows.scenes import ringmo_scenes
from ringmo import notify
from ringmo.config import Config, digest
from ringmo.errors import BadInput
from ringmo.registry import outbox
from ringmo.registry.tracker import Tracker
from ringmo.services import PATIENCE
from ringmo.workspace import Workspace

TAG = "ringmo"
DEBOUNCE_S = 60  # a thousand objects that a bucket tells of are one look


def deploy(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Create or update the deployments; returns one row for each schedule of each: deployment,
    schedule, does, url. A deployment that was removed has `removed` for its schedule.

    Flows are deployed by module path, so that an installed package serves any workspace.

    Raises:
        BadInput: a cron that is none, or somebody is to be told by a server that is not named.
    """
    outbox.check(config.promotion)
    notify.check(config.notify)
    rows: list[dict[str, Any]] = []
    with get_client(sync_client=True) as client:
        work_pool = pool.ensure(client)
        name = _name(client, workspace)
        wanted = list(_wanted(config, workspace, name, work_pool))
        kept = set()
        for deployment in wanted:
            identifier = deployment.apply()
            kept.add(identifier)
            _forget_schedules(client, identifier, deployment)
            rows += _rows(deployment, pages.of_deployment(identifier))
        for old in _deployed(client, workspace):
            if old.id not in kept:
                flow = client.read_flow(old.flow_id).name
                row = {"deployment": f"{flow}/{old.name}", "url": None}
                rows.append(row | {"schedule": "removed", "does": _remove(client, old)})
    watch.ensure()
    return rows


def _wanted(
    config: Config, workspace: Workspace, name: str, work_pool: str
) -> Iterator[RunnerDeployment]:
    crons, root = config.schedule, str(workspace.root)

    def made(
        flow: Any, overlap: str = "queue", light: bool = False, **more: Any
    ) -> RunnerDeployment:
        deployment: RunnerDeployment = flow.to_deployment(
            name=name,
            work_pool_name=work_pool,
            concurrency_limit=turns.options(overlap),
            entrypoint_type=EntrypointType.MODULE_PATH,
            # A worker that somebody else started does not know our times.
            job_variables={
                "working_dir": root,
                "env": dict(PATIENCE),
                **(pool.LIGHT if light else {}),
            },
            tags=[TAG],
            **{"parameters": {"workspace": root}, "triggers": [], **more},
        )
        return deployment

    signals = [_trigger(root, "new imagery", uploads.EVENT, {uploads.WORKSPACE: root})]
    if config.monitoring.retrain:
        signals.append(_trigger(root, "drift", drift.EVENT, {drift.WORKSPACE: root}))
    yield made(
        retrain,
        crons.overlap,
        schedules=[
            *_schedules(config, "schedule.retrain", crons.retrain),
            *_schedules(config, "schedule.pretrain", crons.pretrain, reason="monthly", anew=True),
        ],
        parameters={"workspace": root, "reason": "schedule"},
        triggers=signals,
    )
    # They look, and look again soon: one that waits would find what the one before it found.
    checks = _schedules(config, "schedule.check", crons.check)
    yield made(ringmo_check, "skip", light=True, schedules=checks)
    yield made(
        drift.ringmo_drift,
        light=True,
        schedules=_schedules(config, "monitoring.cron", config.monitoring.cron),
    )
    if crons.uploads:
        buckets = [s.removeprefix("s3://").partition("/")[0] for s in _buckets(config)]
        resources = sorted({f"{uploads.BUCKET}.{bucket}" for bucket in buckets})
        yield made(
            uploads.ringmo_uploads,
            "skip",
            light=True,
            schedules=_schedules(config, "schedule.uploads", crons.uploads),
            triggers=[
                DeploymentEventTrigger(
                    name=f"look into {root} when its bucket says so",
                    expect={uploads.BUCKET},
                    match={"prefect.resource.id": resources},
                    within=timedelta(seconds=DEBOUNCE_S),
                    parameters={"workspace": root},
                )
            ]
            if resources
            else [],
        )
    if config.scenes.sources:
        task = config.scenes.model.partition("@")[0]
        resource: dict[str, Any] = {"prefect.resource.id": f"ringmo.model.{task}"}
        registry: dict[str, Any] = {outbox.REGISTRY: outbox.registry(Tracker(workspace))}
        yield made(
            ringmo_scenes,
            schedules=_schedules(config, "scenes.cron", config.scenes.cron),
            triggers=[
                DeploymentEventTrigger(
                    name=f"scenes of {root} after a promotion",
                    expect={outbox.EVENT},
                    match=resource | registry,
                    parameters={"workspace": root},
                )
            ],
        )


def _remove(client: Any, old: Any) -> str:
    """Take a deployment away with its schedules and triggers; its flow runs stay. Says why.

    One whose run goes on stays without schedule and trigger until the next `deploy`: Prefect's
    server could not give back that run's slot, and would refuse whatever state it ends in.
    """
    client.delete_resource_owned_automations(f"prefect.deployment.{old.id}")
    if turns.goes_on(client, old.id):
        for schedule in client.read_deployment_schedules(old.id):
            client.delete_deployment_schedule(old.id, schedule.id)
        return "params.yaml no longer wants it; a run of it goes on"
    client.delete_deployment(old.id)
    return "params.yaml no longer wants it"


def _forget_schedules(client: Any, identifier: Any, deployment: RunnerDeployment) -> None:
    """Delete the schedules that are wanted no more: Prefect only adds to those it has."""
    wanted = {schedule.slug for schedule in deployment.schedules or []}
    for schedule in client.read_deployment_schedules(identifier):
        if schedule.slug not in wanted:
            client.delete_deployment_schedule(identifier, schedule.id)


def _buckets(config: Config) -> list[str]:
    return [source for source in config.ingest.sources if source.startswith("s3://")]


def _schedules(
    config: Config, key: str, cron: str | None, **parameters: Any
) -> list[DeploymentScheduleCreate]:
    """The schedule of a cron, known by its key in params.yaml; none without one."""
    if not cron:
        return []
    try:
        schedule = CronSchedule(cron=cron, timezone=config.schedule.timezone)
    except ValueError as error:
        raise BadInput(f"{key}: {cron!r}: {error}") from None
    slug = key.replace(".", "-")
    return [DeploymentScheduleCreate(schedule=schedule, slug=slug, parameters=parameters)]


def _trigger(root: str, reason: str, event: str, match: dict[str, Any]) -> DeploymentEventTrigger:
    """A retraining for each event that tells of something in this workspace."""
    return DeploymentEventTrigger(
        name=f"retrain {root} after {reason}",
        expect={event},
        match=match,
        parameters={"workspace": root, "reason": reason},
    )


def _rows(deployment: RunnerDeployment, url: str | None) -> Iterator[dict[str, Any]]:
    about = {"deployment": f"{deployment.flow_name}/{deployment.name}", "url": url}
    triggers = [str(getattr(trigger, "name", "")) for trigger in deployment.triggers]
    for schedule in deployment.schedules or []:
        yield about | {
            "schedule": getattr(schedule.schedule, "cron", None),
            "does": str(schedule.slug).replace("-", ".", 1),
        }
    for trigger in triggers:
        yield about | {"schedule": None, "does": trigger}
    if not deployment.schedules and not triggers:
        yield about | {"schedule": None, "does": None}


def _deployed(client: Any, workspace: Workspace) -> list[Any]:
    """The deployments that an earlier `deploy` made of this workspace."""
    made = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[Any] = []
    while len(page := client.read_deployments(deployment_filter=made, offset=len(found))) > 0:
        found += page
    return [one for one in found if one.parameters.get("workspace") == str(workspace.root)]


def _name(client: Any, workspace: Workspace) -> str:
    """The workspace's own; with some digits where another one of that name has deployed."""
    name = workspace.root.name
    with contextlib.suppress(ObjectNotFound):
        there = client.read_deployment_by_name(f"retrain/{name}")
        if there.parameters.get("workspace") != str(workspace.root):
            return f"{name}-{digest(str(workspace.root))[:6]}"
    return name
