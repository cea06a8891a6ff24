"""What Prefect knows of a workspace's flow runs, in a moment.

Through its REST interface: to import Prefect takes seconds, and this is for a glance.
"""

from datetime import UTC, datetime
from typing import Any

from ringmo.errors import Unreachable
from ringmo.registry import outbox
from ringmo.workspace import Workspace

ACTIVE = ["RUNNING", "PENDING", "CANCELLING", "PAUSED"]
ENDED = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]


def flow_runs(workspace: Workspace) -> list[dict[str, Any]] | None:
    """Runs that are at work, wait, or come next, and the last that ended; None without a server.

    Keys: flow, name, state (as Prefect says it), what (runs, waits, next, ended), when (ISO, UTC).
    Of scheduled ones the next of each flow, and those that are late.

    Raises:
        Unreachable: the server does not answer, or refuses.
    """
    api = outbox.prefect_api(workspace)
    if api is None:
        return None
    try:
        active = _asked(api, workspace, ACTIVE, "EXPECTED_START_TIME_ASC", 50)
        scheduled = _asked(api, workspace, ["SCHEDULED"], "EXPECTED_START_TIME_ASC", 100)
        ended = _asked(api, workspace, ENDED, "END_TIME_DESC", 20)[:1]
        ids = list({run["flow_id"] for run in (*active, *scheduled, *ended)})
        flows = outbox.ask_prefect(api, "flows/filter", {"flows": {"id": {"any_": ids}}})
    except (OSError, ValueError) as error:
        raise Unreachable(f"Prefect at {api} does not answer: {error}") from None
    names = {flow["id"]: flow["name"] for flow in flows}
    rows, coming = [], set()
    now = datetime.now(UTC).isoformat()
    for run in active:
        waits = run["state_type"] in ("PENDING", "PAUSED")
        rows.append(_row(run, names, "waits" if waits else "runs", run["start_time"]))
    for run in scheduled:
        late = run["expected_start_time"] <= now
        if late or run["flow_id"] not in coming:
            rows.append(_row(run, names, "waits" if late else "next", run["expected_start_time"]))
        if not late:
            coming.add(run["flow_id"])
    return rows + [_row(run, names, "ended", run["end_time"]) for run in ended]


def _asked(
    api: str, workspace: Workspace, states: list[str], order: str, limit: int
) -> list[dict[str, Any]]:
    body = {
        "flow_runs": {"state": {"type": {"any_": states}}},
        "sort": order,
        "limit": limit,
    }
    found: list[dict[str, Any]] = outbox.ask_prefect(api, "flow_runs/filter", body)
    own = str(workspace.root)
    return [run for run in found if run.get("parameters", {}).get("workspace", own) == own]


def _row(run: dict[str, Any], names: dict[str, str], what: str, when: str | None) -> dict[str, Any]:
    return {
        "flow": names.get(run["flow_id"], "?"),
        "name": run["name"],
        "state": run["state_name"],
        "what": what,
        "when": when or run["expected_start_time"],
    }
