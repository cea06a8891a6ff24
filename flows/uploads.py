"""New imagery as a signal: sources are listed, and when an upload has ended a retraining starts.

The event `ringmo.new-imagery` is of resource `ringmo.workspace`, with the workspace for a label and
what was found for its payload; the retraining's deployment takes it as its trigger. The same files
are told once, and no others for schedule.cool_down_min after that.

A bucket's own notification makes it look at once: whatever relays it posts the event
`ringmo.bucket` of resource `ringmo.bucket.NAME` to Prefect's API (docs/schedules.md).
"""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow
from prefect.events import emit_event
from prefect.states import Completed

from flows import notices, turns
from ringmo import console
from ringmo.config import Config
from ringmo.data.look import Look, look
from ringmo.stage import write_json
from ringmo.workspace import Workspace

EVENT = "ringmo.new-imagery"
BUCKET = "ringmo.bucket"  # event of a bucket's relay, and with the bucket's name its resource
WORKSPACE = "ringmo.workspace"  # label of the event's resource
PATIENCE_S = 3600.0  # an upload that takes longer is told when it is looked at again


@flow(
    name="ringmo-uploads",
    description=__doc__,
    persist_result=False,
    on_failure=[notices.failed],
    on_crashed=[notices.failed],
)
def ringmo_uploads(workspace: str, settle_s: float = 60) -> Any:
    """Look whether the sources hold more than was taken in.

    Args:
        workspace: the workspace's folder on the worker's machine.
        settle_s: an upload has ended when nothing came for so many seconds.
    """
    place = Workspace.find(workspace)
    config = Config.load(place.params_file)
    if (missed := turns.take(config)) is not None:
        return missed
    seen = look(config, place)
    limit = time.monotonic() + PATIENCE_S
    while seen is not None and seen.new and seen.mark != _told(place).get("mark"):
        console.note(f"{seen.new} new images; have all come?")
        time.sleep(settle_s)
        again = look(config, place)
        if again is None or again.mark == seen.mark:
            seen = again
            break
        seen = again
        if time.monotonic() > limit:
            return Completed(name="an upload goes on", message=f"{seen.new} new images so far")
    if seen is None:
        return Completed(name="skipped", message="an ingest is at work, which finds it")
    if not seen.new:
        # The nightly check fails for a source that does not answer; here it would every minute.
        why = "; ".join(seen.errors)
        return Completed(name="no answer" if why else "nothing new", message=why or None)
    return _signal(config, place, seen)


def _signal(config: Config, place: Workspace, seen: Look) -> Any:
    said = f"{seen.new} new images in {', '.join(r['source'] for r in seen.sources if r['new'])}"
    last, now = _told(place), datetime.now(UTC)
    if last.get("mark") == seen.mark:
        return Completed(name="told before", message=said)
    rest = timedelta(minutes=config.schedule.cool_down_min)
    if last and now - datetime.fromisoformat(last["when"]) < rest:
        minutes = config.schedule.cool_down_min
        return Completed(name="cooling down", message=f"{said}; told less than {minutes:g} min ago")
    emit_event(
        EVENT,
        resource={
            "prefect.resource.id": "ringmo.workspace",
            "prefect.resource.name": place.root.name,
            WORKSPACE: str(place.root),
        },
        payload={"new": seen.new, "sources": seen.sources},
    )
    # After the event: whoever is killed in between tells twice, and never not at all.
    write_json(place.state / "uploads.json", {"mark": seen.mark, "when": now.isoformat()})
    return Completed(name="told", message=said)


def _told(place: Workspace) -> dict[str, Any]:
    """What was told last: its mark, and when."""
    try:
        told = json.loads((place.state / "uploads.json").read_text())
        datetime.fromisoformat(told["when"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(told)
