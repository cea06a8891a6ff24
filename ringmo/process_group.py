"""Children in process groups of their own: ended politely, waited for, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ringmo import console

POLL_S = 0.1
_running: dict[int, float] = {}  # group → its grace period, seconds
_lock = threading.Lock()
_ending = threading.Event()


class GroupEnded(Exception):
    """All groups were told to end: this one was not started, or did not end by itself."""


def run_group(
    command: list[str],
    cwd: Path,
    env: dict[str, str],
    grace_s: float,
    follow: Callable[[str], None] | None = None,
    started: Callable[[int], None] | None = None,
) -> int:
    """Run a command and wait for it and all it started; returns its exit status.

    Whatever interrupts the wait (a cancelled run, a time limit, Ctrl-C) sends SIGTERM to the
    group, waits until the group is empty, and kills what is left after `grace_s` seconds: DVC
    itself dies at once on SIGTERM, the training it started saves its checkpoint first.

    On a terminal the command draws its progress there; elsewhere `follow` hears its lines too.
    `started` is told the process number, which is the group's too.

    Raises:
        GroupEnded: `end_all` was called, before it began or while it ran.
    """
    piped = console.log_is_json() or (follow is not None and not sys.stderr.isatty())
    # Standard output is kept for results: what a child says is progress.
    with _lock:  # what is not in the list when all are ended is not started afterwards
        if _ending.is_set():
            raise GroupEnded
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else sys.stderr.fileno(),
            stderr=subprocess.STDOUT if piped else None,
            start_new_session=True,
        )
        _running[process.pid] = grace_s
    reader = threading.Thread(target=_read, args=(process.stdout, follow), daemon=True)
    try:
        if started is not None:
            started(process.pid)
        if piped:
            reader.start()
        # In short waits: what is raised in a thread from outside arrives between two of them.
        while (status := process.poll()) is None:
            time.sleep(POLL_S)
    finally:
        end_group(process.pid, grace_s)
        with _lock:
            del _running[process.pid]
    if piped:
        reader.join(10)
    if status and _ending.is_set():
        raise GroupEnded
    return status


def begin() -> None:
    """Groups may be started again, after `end_all`."""
    _ending.clear()


def end_all() -> None:
    """End the groups that other threads wait for, side by side, each within its grace period.

    None is started any more until `begin`.
    """
    with _lock:
        _ending.set()
        running = dict(_running)
    enders = [threading.Thread(target=end_group, args=group) for group in running.items()]
    for ender in enders:
        ender.start()
    for ender in enders:
        ender.join()


def _read(stream: IO[bytes], follow: Callable[[str], None] | None) -> None:
    for raw in stream:
        line = raw.decode(errors="replace").rstrip()
        console.relay(line)
        if line and follow is not None:
            with contextlib.suppress(Exception):  # a log that fails must not stop the reading
                follow(line)


def end_group(group: int, grace_s: float) -> None:
    """SIGTERM to a process group, SIGKILL after the grace period; returns when it is empty."""
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if not _members(group):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        limit = time.monotonic() + patience
        while _members(group) and time.monotonic() < limit:
            time.sleep(0.1)


def _members(group: int) -> list[int]:
    """Living processes of a group; dead ones that nobody has reaped do not count."""
    import psutil

    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members
