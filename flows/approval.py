"""A person's word before a version goes into production: a flow that waits, and takes no slot.

`ask` starts a flow run that puts the question with a form in Prefect's pages and suspends itself:
its process ends, and no worker's slot is taken while somebody thinks. When the form is filled in, a
worker takes the run up again, and it promotes the version or says why not. `ringmo promote scene/7`
says yes as well: whoever promotes ends the flow runs that wait for it (`registry.outbox`).

A second flow run, scheduled for the end of the waiting, ends the first one as `not promoted`.
Prefect's own limit would end it as failed, and nothing has failed.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, Scheduled
from prefect.types.entrypoint import EntrypointType
from pydantic import Field

from flows import pool
from ringmo import services
from ringmo.config import Config, digest
from ringmo.environment import TRACKING_URI, shown
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.registry import listing, outbox, promotion
from ringmo.registry.tracker import Tracker
from ringmo.services import WORK_POOL
from ringmo.workspace import Workspace

OPEN = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]


class Approval(RunInput):
    """The form."""

    approve: bool = Field(description="Promote it?")
    name: str = Field(description="Who says so", min_length=1)
    reason: str = Field("", description="Why")


def ask(workspace: Workspace, ref: str, reasons: list[str]) -> str | None:
    """Have a person asked whether a version shall be the champion; returns at once.

    Asked again while a flow run waits for an answer on this version, or with the same reasons after
    it was answered, there is no second one. A worker is started if there is none here: it stays
    after the command that asked, until `ringmo down`. As for every flow, the environment names
    Prefect's server before Prefect is imported (`services.environment`).

    Args:
        ref: a version, as scene/7. reasons: what the gate said of it.

    Returns:
        Address of the flow run that waits, or has waited, for the answer; None where no server
        shows it.

    Raises:
        BadInput: no such version. Unreachable: MLflow or Prefect does not answer.
    """
    config = Config.load(workspace.params_file)
    outbox.check(config.promotion)
    tracker = Tracker(workspace)
    version = listing.resolve(workspace, ref, tracker)
    tag = outbox.question(tracker, str(version))
    services.up(config, workspace, worker=True)
    place = {"working_dir": str(workspace.root), "env": _told_to_worker(), **pool.LIGHT}
    with get_client(sync_client=True) as client:
        pool.ensure(client)
        asked = _open_runs(client, tag)
        waiting = [run for run in asked if run.parameters.get("ref")]
        if not waiting:
            made = client.create_flow_run_from_deployment(
                _deployed(approval, workspace),
                name=f"{version}: shall it be champion?",
                parameters={"workspace": str(workspace.root), "ref": ref, "reasons": reasons},
                tags=[tag],
                idempotency_key=digest(tag, reasons),
                job_variables=place,
            )
            if made.state is None or not made.state.is_final():
                waiting = [made]
        question = waiting[0] if waiting else made
        if waiting:
            # Also for a question that was put before a kill came between the two.
            end = (question.created or datetime.now(UTC)) + timedelta(hours=config.promotion.wait_h)
            client.create_flow_run_from_deployment(
                _deployed(end_of_waiting, workspace),
                name=f"{version}: the end of waiting",
                parameters={
                    "question": str(question.id),
                    "wait_h": config.promotion.wait_h,
                },
                state=Scheduled(scheduled_time=end),
                tags=[tag],
                idempotency_key=f"end of {question.id}",
                job_variables=place,
            )
        api = str(client.api_url).rstrip("/")
    shown = api.startswith("http")
    return f"{api.removesuffix('/api')}/runs/flow-run/{question.id}" if shown else None


# Prefect's own way to keep a result is a pickle.
@flow(
    name="approval",
    persist_result=True,
    result_serializer="json",
    retries=3,
    retry_delay_seconds=60,
)
def approval(workspace: str, ref: str, reasons: list[str]) -> Any:
    """Wait for a person's word on a version, and promote it if it is yes.

    Args:
        workspace: the workspace's folder on the worker's machine.
        ref: the version, as scene/7.
        reasons: what the gate said of it.
    """
    place = Workspace.find(workspace)
    model, number = ref.split("/")
    champion = Tracker(place).aliased(model, "champion")
    if champion is not None and champion.version == int(number):
        by = promotion.history(place, model)[0]["who"]
        return Completed(name=f"promoted by {by}", message=f"{ref} is the champion.")
    lines = [f"Shall **{ref}** become the champion in place of {champion or 'none'}?", ""]
    lines += [f"- {reason}" for reason in reasons]
    lines += ["", f"Or: `ringmo promote {ref} --by NAME --reason TEXT`"]
    form: Any = Approval.with_initial_data(description="\n".join(lines), approve=False)
    said: Any = suspend_flow_run(wait_for_input=form, key="question")
    who = (said.reason and f"{said.name}: {said.reason}") or said.name
    if not said.approve:
        return Completed(name="not promoted", message=f"{ref}: refused by {who}")
    try:
        moved = promotion.promote(
            place, model, int(number), by=said.name, reason=said.reason or "approved"
        )
    except (AnswerIsNo, BadInput) as error:
        return Completed(name="not promoted", message=f"approved by {who}, but {error}")
    return Completed(name=f"promoted by {said.name}", message=promotion.move_text(moved))


@flow(name="approval-end", persist_result=False, retries=3, retry_delay_seconds=60)
def end_of_waiting(question: str, wait_h: float) -> Any:
    """End a question that nobody has answered in time.

    Args:
        question: the flow run that waits. wait_h: how long it had, in hours.
    """
    late: Any = Completed(name="not promoted", message=f"nobody answered within {wait_h:g} hours")
    with get_client(sync_client=True) as client:
        for _ in range(24):
            try:
                state = client.read_flow_run(UUID(question)).state
            except ObjectNotFound:
                state = None
            if state is None or state.type not in OPEN:
                return Completed(name="answered", message="somebody did, in time")
            # Answered just now, or not even asked yet: its own process is at it.
            if state.type == StateType.PAUSED:
                break
            time.sleep(5)
        else:
            return Completed(name="answered", message="the answer is being carried out")
        client.set_flow_run_state(UUID(question), late, force=True)
    return Completed(name="ended", message="nobody did")


def _open_runs(client: Any, tag: str) -> list[Any]:
    """Flow runs of a question that have not ended, the oldest first."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )

    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[tag]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN)),
    )
    return sorted(client.read_flow_runs(flow_run_filter=wanted), key=lambda run: run.created)


def _deployed(of: Any, workspace: Workspace) -> UUID:
    """Id of a flow's deployment, made or updated."""
    made: Any = of.to_deployment(
        name=workspace.root.name,
        work_pool_name=WORK_POOL,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    identifier: UUID = made.apply()
    return identifier


def _told_to_worker() -> dict[str, str]:
    """What a worker that was started elsewhere would not know. Secrets it must have itself."""
    uri = TRACKING_URI.read()
    return {TRACKING_URI.name: uri} if uri and shown(uri) == uri else {}
