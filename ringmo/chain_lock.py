"""One chain at a time in a workspace, whoever starts it: a person, a schedule, a second try.

The lock is the kernel's: it is free as soon as its holder is gone, however it went, and the stages
that it had started are gone too (`process_group.shared`). What the file says tells the next one
whom it waits for, or who died before.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from ringmo import console
from ringmo.errors import Unreachable
from ringmo.process_group import born, shared
from ringmo.workspace import Workspace

POLL_S = 1.0
STOPPED_S = 60.0  # that an earlier try of the same run may stand still before it counts as dead


class Before(NamedTuple):
    """What is known of the run before this one.

    dead: its flow run, where it died without an end; it may be this very one, begun again.
    awaited: the flow run for whose end this one waited, "" for none.
    """

    dead: str | None
    awaited: str


@contextlib.contextmanager
def alone(workspace: Workspace, flow_run: str) -> Iterator[Before]:
    """Wait for whoever runs a chain here, and be the only one within the block.

    flow_run: Prefect's id of this run.

    Raises:
        Unreachable: another run's process holds the lock and is stopped (Ctrl-Z), so that waiting
            may be for ever.
    """
    workspace.state.mkdir(parents=True, exist_ok=True)
    with (workspace.state / "chain.lock").open("a+") as lock:
        before = Before(awaited=_wait(lock, flow_run), dead=_holder(lock).get("flow_run"))
        me = {"pid": os.getpid(), "born": born(os.getpid()), "host": socket.gethostname()}
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        _write(lock, json.dumps(me | {"flow_run": flow_run, "since": since}))
        try:
            with shared(lock.fileno()):
                yield before
        finally:
            _write(lock, "")


def _wait(lock: IO[str], flow_run: str) -> str:
    """Returns the flow run of who held it last, "" where nobody did."""
    told, stopped, awaited = False, time.monotonic(), ""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return awaited
        except BlockingIOError:
            pass
        holder = _holder(lock)
        awaited = holder.get("flow_run", awaited)
        if not told:
            told = True
            console.note(f"{_said(holder)} is at work in this workspace: waiting for its end")
        if not _stopped(holder):
            stopped = time.monotonic()
        elif holder["flow_run"] != flow_run:
            pid = holder["pid"]
            raise Unreachable(
                f"{_said(holder)} holds this workspace and is stopped: let it go on with "
                f"`kill -CONT {pid}`, or end it with `kill -KILL {pid}`"
            )
        elif time.monotonic() - stopped > STOPPED_S:
            console.note(f"{_said(holder)}, an earlier try of this run, stands still: ended")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(holder["pid"], 9)
        time.sleep(POLL_S)


def _stopped(holder: dict[str, Any]) -> bool:
    """Whether it is a process of this machine that was stopped."""
    pid = holder.get("pid", 0)
    if born(pid) is None or born(pid) != holder.get("born"):
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _said(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    return f"process {holder['pid']} on {holder['host']} (a run since {holder['since']})"


def _holder(lock: IO[str]) -> dict[str, Any]:
    lock.seek(0)
    try:
        found: dict[str, Any] = json.loads(lock.read() or "{}")
    except ValueError:  # half written
        return {}
    return found


def _write(lock: IO[str], text: str) -> None:
    lock.seek(0)
    lock.truncate(0)
    lock.write(text)
    lock.flush()
