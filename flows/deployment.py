"""The schedules of params.yaml as deployments in Prefect, created again and again without twins."""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import DeploymentEventTrigger
from prefect.types.entrypoint import EntrypointType

from flows import pool
from flows.drift import EVENT, WORKSPACE, ringmo_drift
from flows.retrain import retrain
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.workspace import Workspace


def deploy(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Create or update the deployments; returns one row each: deployment, schedule, url.

    Flows are deployed by module path, so that an installed package serves any workspace.
    """
    crons = {"retrain": config.schedule.retrain, "ringmo-drift": config.monitoring.cron}
    schedules = {
        "retrain": _schedules(config, "schedule.retrain", crons["retrain"]),
        "ringmo-drift": _schedules(config, "monitoring.cron", crons["ringmo-drift"]),
    }
    with get_client(sync_client=True) as client:
        name = workspace.root.name
        place: dict[str, Any] = {
            "name": name,
            "work_pool_name": pool.ensure(client),
            # One at a time in a workspace; a second one waits.
            "concurrency_limit": 1,
            "entrypoint_type": EntrypointType.MODULE_PATH,
            "job_variables": {"working_dir": str(workspace.root)},
        }
        root = str(workspace.root)
        made: dict[str, Any] = {
            "retrain": retrain.to_deployment(
                schedules=schedules["retrain"],
                triggers=[_on_drift(root)] if config.monitoring.retrain else [],
                parameters={"workspace": root, "reason": "schedule"},
                **place,
            ),
            "ringmo-drift": ringmo_drift.to_deployment(
                schedules=schedules["ringmo-drift"],
                parameters={"workspace": root},
                **place | {"job_variables": place["job_variables"] | pool.LIGHT},
            ),
        }
        ids = {flow: deployment.apply() for flow, deployment in made.items()}
        url = str(client.api_url).removesuffix("/").removesuffix("/api")
    return [
        {
            "deployment": f"{flow}/{name}",
            "schedule": cron,
            "url": f"{url}/deployments/deployment/{ids[flow]}",
        }
        for flow, cron in crons.items()
    ]


def _schedules(config: Config, key: str, cron: str | None) -> list[Any]:
    if not cron:
        return []
    try:
        return [CronSchedule(cron=cron, timezone=config.schedule.timezone)]
    except ValueError as error:
        raise BadInput(f"{key}: {cron!r}: {error}") from None


def _on_drift(root: str) -> Any:
    """A retraining for each event that tells of a drift in this workspace."""
    return DeploymentEventTrigger(
        name=f"retrain {root} after a drift",
        expect={EVENT},
        match={WORKSPACE: root},
        parameters={"workspace": root, "reason": "drift"},
    )
