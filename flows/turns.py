"""Whose turn it is: runs that were missed, and runs of one deployment that meet.

Prefect makes a run for each time of a schedule, also while no worker is up, and a worker that comes
back starts them all. Each flow here asks `take` first: the first of those that are due goes on and
ends the others as `Missed` (schedule.missed: once), or all of them end so (skip).

Meeting runs are Prefect's business where they queue or are skipped (`options`); where a new one is
to replace the one that goes on, `take` ends that one and waits until it has saved its checkpoint.
"""

import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    StateType,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from flows import watch
from ringmo import console
from ringmo.config import Config
from ringmo.errors import Unreachable

LATE_S = 900.0  # a run that starts so long after its time was missed
WAITED = "AwaitingConcurrencySlot"  # it came in time, and waited for another
DUE = [StateType.SCHEDULED, StateType.PENDING]
PAGE = 200  # runs that Prefect lists at a time
NO_LIMIT = 1000  # runs of a deployment at a time, where a new one replaces the one before


def options(overlap: str) -> ConcurrencyLimitConfig:
    """Of a deployment, one run at a time: what becomes of the next, as schedule.overlap says.

    Where it is to replace the one before, both go on for a while. They have a limit all the same:
    were it taken from the deployment while a run goes on, Prefect's server could not give back the
    run's slot, and would refuse whatever state that run ends in.
    """
    skip, queue = ConcurrencyLimitStrategy.CANCEL_NEW, ConcurrencyLimitStrategy.ENQUEUE
    return ConcurrencyLimitConfig(
        limit=NO_LIMIT if overlap == "replace" else 1,
        collision_strategy=skip if overlap == "skip" else queue,
    )


def take(config: Config, *, replace: bool = False) -> Any:
    """Take this flow run's turn among those of its deployment.

    replace: one that goes on is ended first.

    Returns:
        The state in which this run is to end at once, or None: it is its turn. A run without a
        deployment has its turn always.

    Raises:
        Unreachable: one that is to be replaced does not end.
    """
    watch.go_on_unheard()  # whoever asks is the flow's own process
    if not flow_run.id:
        return None
    with get_client(sync_client=True) as client:
        me = client.read_flow_run(UUID(str(flow_run.id)))
        if me.deployment_id is None:
            return None
        # One that crashed and is begun again (`watch`) has had its turn.
        if (
            me.auto_scheduled
            and me.run_count < 2
            and (missed := _missed(client, config, me)) is not None
        ):
            return missed
        if replace:
            _take_over(client, config, me)
    return None


def _missed(client: Any, config: Config, me: Any) -> Any:
    """What ends this run, if it was missed; the others that are due are ended with it, or by it."""
    now = datetime.now(UTC)
    others = [
        run
        for run in _runs(client, me, [*DUE, StateType.RUNNING])
        if run.auto_scheduled and run.parameters == me.parameters and _when(run) <= now
    ]
    # Where they do not queue all may have begun: the last of them it is, then.
    later = [r for r in others if (_when(r), r.id) > (_when(me), me.id)]
    if any(run.state.type == StateType.RUNNING for run in later):
        return _as_missed("the next one goes on already")
    late = (now - _when(me)).total_seconds() > LATE_S
    waited = late and any(s.name == WAITED for s in client.read_flow_run_states(me.id))
    leave = late and not waited and config.schedule.missed == "skip"
    why = "schedule.missed: skip" if leave else f"made up for by {me.name}"
    for run in others:
        if run.state.type in DUE:
            client.set_flow_run_state(run.id, _as_missed(why), force=True)
    return _as_missed(why) if leave else None


def _as_missed(why: str) -> Any:
    said: Any = Cancelled(name="Missed", message=f"It was due while no worker took it up: {why}.")
    return said


def _take_over(client: Any, config: Config, me: Any) -> None:
    """End the runs of this deployment that go on, and wait until they have."""
    going = [r.id for r in _runs(client, me, [StateType.PENDING, StateType.RUNNING])]
    if not going:
        return
    console.note(f"ending {len(going)} that go on (schedule.overlap: replace)")
    for run in going:
        client.set_flow_run_state(run, Cancelling(message=f"replaced by {me.name}"))
    limit = time.monotonic() + config.run.grace_s + 120
    while going:
        if time.monotonic() > limit:
            raise Unreachable(f"the run {going[0]} that is to be replaced does not end")
        time.sleep(2)
        states = {run: client.read_flow_run(run).state for run in going}
        going = [run for run, state in states.items() if state and not state.is_final()]


def running(flow: str, workspace: str) -> bool:
    """Whether a flow runs in this workspace just now."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            flow_run_filter=_in_states([StateType.RUNNING]),
            limit=PAGE,
        )
    return any(run.parameters.get("workspace") == workspace for run in found)


def goes_on(client: Any, deployment: UUID) -> bool:
    """Whether a run of a deployment has begun and not ended."""
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=_in_states([StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]),
        limit=1,
    )
    return bool(found)


def _runs(client: Any, me: Any, states: list[StateType]) -> list[Any]:
    """The other runs of a run's deployment that are in one of these states."""
    found: list[Any] = []
    while True:
        page = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[me.deployment_id])),
            flow_run_filter=_in_states(states),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return [run for run in found if run.id != me.id]


def _in_states(states: list[StateType]) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))


def _when(run: Any) -> datetime:
    """When it should have begun."""
    when: datetime = run.expected_start_time
    return when
