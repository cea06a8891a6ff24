"""What becomes of a run whose process, worker or machine died: nothing stays "Running" for ever.

Prefect's server does the looking, by automations that lie in its database, so that it goes on after
a restart and no process of ours has to live for it:

- a flow that gives no sign of life for SILENCE_S is Crashed, and gives back the slot that it held;
- a crashed run of a deployment is begun again after AGAIN_S, TRIES times in all, by the next worker
  that is free.
  What was done is not done again, and a training goes on from its checkpoint;
- a run that was to be cancelled and whose worker is gone is Cancelled after CANCEL_S;
- a run that a worker took and did not start within START_S is given to the next one.

A run that was declared dead and was not (a machine that slept, a server that was away) holds the
workspace's lock (`ringmo.chain_lock`): its second try waits for it, and ends as it did.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed
from rich.console import Console

FLOWS = ["retrain", "ringmo-check", "ringmo-drift", "ringmo-scenes", "ringmo-uploads"]
# Four signs of life (services.PATIENCE) are missing: three may be late when a server starts again.
SILENCE_S = 120
# A worker tells of a crash twice, and of a process that ended long after it: by then the run must
# not have begun again, or it would crash once more.
AGAIN_S = 60
START_S = 600
TRIES = 3
OBEY_S = 30.0
HEARD_S = 10.0  # that the last words of steps may be on their way
BEAT = "prefect.flow-run.heartbeat"
CANCEL_S = 90  # less than SILENCE_S: what was to be cancelled is not begun again
ENDED = {
    f"prefect.flow-run.{state}"
    for state in (
        *("Completed", "Unchanged", "Refused", "Failed", "Cancelled", "Crashed"),
        *("Suspended", "Paused", "AwaitingRetry"),  # and it need not give a sign of life
    )
}


def ensure() -> None:
    """The automations are on the server, as they are here, once each."""
    with get_client(sync_client=True) as client:
        for automation in automations():
            known = client.read_automations_by_name(automation.name)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)


def automations() -> list[AutomationCore]:
    return [
        _unless(
            "a run without a sign of life has crashed",
            f"No heartbeat for {SILENCE_S} s: its process or machine is gone",
            {BEAT},
            {BEAT, *ENDED},
            SILENCE_S,
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"no sign of life for {SILENCE_S} s: its process is gone",
                force=False,
            ),
        ),
        _unless(
            "a crashed run is begun again",
            f"It goes on from where it was; {TRIES} tries in all",
            {"prefect.flow-run.Crashed"},
            {f"prefect.flow-run.{state}" for state in ("AwaitingRetry", "Scheduled")},
            AGAIN_S,
            _again("crashed: begun again"),
            {"prefect.run-count": [str(count) for count in range(1, TRIES)]},
        ),
        _unless(
            "a run that nobody is left to cancel is cancelled",
            f"It was to be cancelled, and had not ended after {CANCEL_S} s",
            {"prefect.flow-run.Cancelling"},
            ENDED,
            CANCEL_S,
            ChangeFlowRunState(
                state=StateType.CANCELLED,
                name="Cancelled",
                message="nobody was left to end it",
                force=False,
            ),
        ),
        _unless(
            "a run that no worker started is given away again",
            f"It was taken, and did not run within {START_S} s",
            {"prefect.flow-run.Pending"},
            {"prefect.flow-run.*"},
            START_S,
            _again("not started: given away again"),
        ),
    ]


def _unless(
    name: str,
    description: str,
    after: set[str],
    expect: set[str],
    within_s: float,
    action: ChangeFlowRunState,
    only: dict[str, list[str]] | None = None,
) -> AutomationCore:
    """What becomes of a run of ours when nothing of `expect` comes so long `after` an event."""
    ours = ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": FLOWS})
    return AutomationCore(
        name=f"ringmo: {name}",
        description=description,
        trigger=EventTrigger(
            match=ResourceSpecification(
                {"prefect.resource.id": "prefect.flow-run.*", **(only or {})}
            ),
            match_related=ours,
            for_each={"prefect.resource.id"},
            after=after,
            expect=expect,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=within_s),
        ),
        actions=[action],
    )


def _again(why: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(
        state=StateType.SCHEDULED, name="AwaitingRetry", message=why, force=False
    )


def end_of(flow_run: str) -> State[Any] | None:
    """How an earlier try of a run ended that counted as dead and was not; None where it failed, or
    says nothing: it gives its end to the server just after it gives up the workspace's lock."""
    limit = time.monotonic() + HEARD_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < limit:
            state = client.read_flow_run(UUID(flow_run)).state
            if state is not None and state.is_completed():
                return Completed(name=state.name or "Completed", message=state.message)
            time.sleep(0.5)
    return None


def bury(flow_run: str, this: str) -> None:
    """Say of a run whose process is surely gone, and of the steps it was in, that they crashed.

    this: the run that found it, which may be the same, begun again.
    """
    gone: State[Any] = Crashed(message="its process is gone")
    with get_client(sync_client=True) as client:
        try:
            dead = client.read_flow_run(UUID(flow_run))
        except (ObjectNotFound, ValueError):
            return  # it was known to another server
        for step in _unended(client, dead.id):
            client.set_task_run_state(step.id, gone, force=True)
        if flow_run != this and dead.state is not None and dead.state.is_running():
            client.set_flow_run_state(dead.id, gone)


def go_on_unheard() -> None:
    """Let this process outlive the worker that started it, and that reads what it prints.

    Rich, with which Prefect writes its log, would end the process at the next line, and in a thread
    that reads what a stage prints only the thread: the stage would wait for a reader for ever.
    """

    def fall_silent(console: Console) -> None:
        console.quiet = True

    # Meant for a subclass, but the consoles are Prefect's to make.
    Console.on_broken_pipe = fall_silent  # type: ignore[method-assign,assignment]


@contextmanager
def followed(flow_run: str) -> Iterator[None]:
    """While a run goes on, end its process once it counts as cancelled (after CANCEL_S).

    Prefect's worker ends it before that, but listens no more when the server was away for a while;
    and nobody listens for `ringmo run`. At the end, steps whose last word the server did not hear
    while it was away are told it as ended.
    """
    over = threading.Event()
    where = copy_context()  # whose server Prefect's client asks
    watcher = threading.Thread(target=where.run, args=(_obey, flow_run, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
    with suppress(Exception), get_client(sync_client=True) as client:
        limit = time.monotonic() + HEARD_S
        while (unended := _unended(client, UUID(flow_run))) and time.monotonic() < limit:
            time.sleep(0.5)
        for step in unended:
            unheard: State[Any] = Completed(message="it ended while the server was away")
            client.set_task_run_state(step.id, unheard, force=True)


def _obey(flow_run: str, over: threading.Event) -> None:
    while not over.wait(OBEY_S):
        with suppress(Exception), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
            if state is not None and state.is_cancelled():
                # At once, without a last word: that would be a crash. Its stage is told to end and
                # saves (ringmo.process_guard).
                os.kill(os.getpid(), signal.SIGKILL)


def _unended(client: SyncPrefectClient, flow_run: UUID) -> list[TaskRun]:
    steps = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    )
    return [step for step in steps if step.state is not None and not step.state.is_final()]
