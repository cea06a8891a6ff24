"""Children in process groups of their own: ended politely, waited for, and never left behind."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ringmo import console, process_guard

POLL_S = 0.1
_running: dict[int, float] = {}  # group → its grace period, seconds
_shared: list[int] = []  # file descriptors that the groups' guards hold open as well
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

    When this process is killed, a guard beside the group does the same (`process_guard`).

    On a terminal the command draws its progress there; elsewhere `follow` hears its lines too.
    `started` is told the process number, which is the group's too.

    Raises:
        GroupEnded: `end_all` was called, before it began or while it ran.
    """
    piped = console.log_is_json() or (follow is not None and not sys.stderr.isatty())
    guard = _guard(grace_s)
    try:
        with _lock:  # what is not in the list when all are ended is not started afterwards
            if _ending.is_set():
                raise GroupEnded
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                # Standard output is kept for results: what a child says is progress.
                stdout=subprocess.PIPE if piped else sys.stderr.fileno(),
                stderr=subprocess.STDOUT if piped else None,
                start_new_session=True,
            )
            _running[process.pid] = grace_s
    except BaseException:
        _dismiss(guard)
        raise
    reader = threading.Thread(target=_read, args=(process.stdout, follow), daemon=True)
    try:
        _say(guard, f"{process.pid}\n")
        if started is not None:
            started(process.pid)
        if piped:
            reader.start()
        # In short waits: what is raised in a thread from outside arrives between two of them.
        while (status := process.poll()) is None:
            time.sleep(POLL_S)
    finally:
        end_group(process.pid, grace_s)
        _say(guard, "done")
        _dismiss(guard)
        with _lock:
            del _running[process.pid]
    if piped:
        reader.join(10)
    if status and _ending.is_set():
        raise GroupEnded
    return status


def _guard(grace_s: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        # No site, no variables of Python's: it starts in hundredths of a second.
        [sys.executable, "-I", "-S", str(process_guard.__file__), str(grace_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        pass_fds=tuple(_shared),
    )


def _say(guard: "subprocess.Popen[str]", words: str) -> None:
    assert guard.stdin is not None
    with contextlib.suppress(OSError):  # somebody ended it: it guards no more
        guard.stdin.write(words)
        guard.stdin.flush()


def _dismiss(guard: "subprocess.Popen[str]") -> None:
    assert guard.stdin is not None
    with contextlib.suppress(OSError):
        guard.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guard.wait(10)


@contextlib.contextmanager
def shared(descriptor: int) -> Iterator[None]:
    """Within the block, guards hold a file open too: its lock outlives a killed process until the
    groups that this one started are empty."""
    _shared.append(descriptor)
    try:
        yield
    finally:
        _shared.remove(descriptor)


def born(pid: int) -> str | None:
    """What tells a process from every other that has, had or will have its number; None: no such
    process, or a dead one that nobody has reaped.

    Counted from the machine's start: a clock that is set does not change it.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state in "ZX":
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{fields[18]}"
    except OSError:
        return None


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
    process_guard.end(group, grace_s)
