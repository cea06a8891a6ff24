"""Telling people of flow runs (`ringmo.notify`): hooks of the flows, and what the chain calls."""

from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from flows import pages
from ringmo import console, notify
from ringmo.config import Config
from ringmo.workspace import Workspace


def failed(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of a flow with the parameter `workspace`: its run failed, or crashed."""
    place = (flow_run.parameters or {}).get("workspace")
    if not place:
        return
    how = "crashed" if state.is_crashed() else "failed"
    lines = [state.message or f"The run {flow_run.name} {how}."]
    tell(str(place), "failure", f"{flow.name} {how}", lines, pages.of_run(flow_run.id))


def tell(
    workspace: str, about: str, subject: str, lines: list[str], link: str | None = None
) -> None:
    """`notify.tell`, of which neither a full disk nor a broken params.yaml fails the run."""
    try:
        place = Workspace.find(workspace)
        settings = Config.load(place.params_file).notify
        notify.tell(place, settings, about, subject, lines, link)
    except Exception as error:  # whatever it is: the run's own end is said already
        console.note(f"nobody was told that {subject}: {type(error).__name__}: {error}")
