"""Watching production: `ringmo drift` of every task on a schedule, and an event where it drifted.

The event `ringmo.drift` is of resource `ringmo.model.TASK`; its payload is what `ringmo drift
--json` says of TOLD, and the names of the tests that found it. Whoever wants to act on it takes it
as a trigger; with monitoring.retrain the retraining's deployment does. Once told, a drift of the
same version is not told again for monitoring.quiet_days.
"""

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.states import Completed

from flows import notices, turns
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.stage import write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.monitoring.drift import Drift

EVENT = "ringmo.drift"
WORKSPACE = "ringmo.workspace"  # label of the event's resource
TOLD = ("task", "model", "verdict", "since", "until", "tiles", "scenes", "page")


@flow(
    name="ringmo-drift",
    description=__doc__,
    persist_result=False,
    retries=2,
    on_failure=[notices.failed],
    on_crashed=[notices.failed],
)
def ringmo_drift(workspace: str) -> Any:
    """Compare what production recorded of every task's champion with its reference.

    Args:
        workspace: the workspace's folder on the worker's machine.
    """
    from ringmo.data.page import save
    from ringmo.monitoring import drift, drift_page  # torch: who only deploys needs none of it
    from ringmo.registry import card_page

    place = Workspace.find(workspace)
    config = Config.load(place.params_file)
    if (missed := turns.take(config)) is not None:
        return missed
    lines, drifted, compared = [], [], 0
    for task in config.tasks:
        try:
            found = drift.drift(config, place, task)
        except BadInput as error:
            # No champion yet, or a quiet week: nothing is wrong with the others.
            lines.append(f"{task}: not compared: {error}")
            continue
        compared += 1
        page = place.state / "drift" / f"{task}.html"
        shown = drift_page.card(found, place)
        save(page, card_page.as_html(shown))
        create_markdown_artifact(
            key=f"drift-{task}",
            markdown=card_page.as_markdown(shown),
            description=drift.verdict(found),
        )
        lines.append(drift.verdict(found))
        if found.drifted:
            drifted.append(task)
            told = tell(config, place, found, str(page))
            lines[-1] += "" if told else f" (told less than {config.monitoring.quiet_days:g} d ago)"
    name = "drift" if drifted else "no drift" if compared else "nothing to compare"
    summary: Any = Completed(name=name, message="; ".join(lines), data=lines)
    return summary


def tell(config: Config, place: Workspace, found: "Drift", page: str) -> bool:
    """Emit the event of a drift; False where this version's was told a short while ago."""
    from ringmo.monitoring import drift

    path = place.state / "drift" / f"{found.task}.json"
    now = datetime.now(UTC)
    try:
        last = json.loads(path.read_text())
        when = datetime.fromisoformat(last["told"])
    except (FileNotFoundError, ValueError, KeyError):
        last, when = {}, None
    quiet = timedelta(days=config.monitoring.quiet_days)
    if when is not None and last.get("model") == found.version and now - when < quiet:
        return False
    whole = drift.result(found, page)
    emit_event(
        EVENT,
        resource={
            "prefect.resource.id": f"ringmo.model.{found.task}",
            "prefect.resource.name": found.task,
            WORKSPACE: str(place.root),
        },
        related=[
            {
                "prefect.resource.id": f"ringmo.version.{found.version.replace('/', '.')}",
                "prefect.resource.role": "champion",
            }
        ],
        payload={name: whole[name] for name in TOLD}
        | {"tests": [test["test"] for test in whole["tests"] if test["drift"]]},
    )
    # After the event: whoever is killed in between tells twice, and never not at all.
    write_json(path, {"model": found.version, "told": now.isoformat()})
    return True
