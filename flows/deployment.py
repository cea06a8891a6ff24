"""The schedule of params.yaml as deployments in Prefect, created again and again without twins."""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.types.entrypoint import EntrypointType

from flows import pool
from flows.retrain import retrain
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.workspace import Workspace


def deploy(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Create or update the deployments; returns one row each: deployment, schedule, url.

    Flows are deployed by module path, so that an installed package serves any workspace.
    """
    schedules = []
    if config.schedule.retrain:
        try:
            schedules = [
                CronSchedule(cron=config.schedule.retrain, timezone=config.schedule.timezone)
            ]
        except ValueError as error:
            raise BadInput(f"schedule.retrain: {config.schedule.retrain!r}: {error}") from None
    with get_client(sync_client=True) as client:
        name = workspace.root.name
        made: Any = retrain.to_deployment(
            name=name,
            schedules=schedules,
            parameters={"workspace": str(workspace.root), "reason": "schedule"},
            work_pool_name=pool.ensure(client),
            # One retraining at a time in a workspace; a second one waits.
            concurrency_limit=1,
            entrypoint_type=EntrypointType.MODULE_PATH,
            job_variables={"working_dir": str(workspace.root)},
        )
        identifier = made.apply()
        url = str(client.api_url).removesuffix("/").removesuffix("/api")
    return [
        {
            "deployment": f"retrain/{name}",
            "schedule": config.schedule.retrain,
            "url": f"{url}/deployments/deployment/{identifier}",
        }
    ]
