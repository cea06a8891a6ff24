"""The work pool that every deployment goes to, in which a worker on this machine looks for work."""

from typing import Any

from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound

from ringmo.services import WORK_POOL

# Job variables of a flow that trains nothing: on Kubernetes (deploy/kubernetes/pool.json) its job
# waits for no GPU. Other kinds of pools know no such variable, and pass it over.
LIGHT = {"gpus": "0"}


def ensure(client: Any) -> str:
    """Its name, once it is there."""
    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process"))
    return WORK_POOL
