"""Run as a script beside a group of processes: ends it when whoever started it is no more.

A killed process cannot end its children, and the kernel's signal for that reaches only the first of
them. So the parent holds the other end of this script's standard input, on which it writes the
group's number, and `done` when it has ended the group itself: without that, the end of the input
means that the parent died. Imports nothing but the standard library, so that it starts at once.

Argument: the grace period, seconds.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    # A supervisor may tell all processes at once to end: this one goes last.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    group = sys.stdin.readline().strip()
    if not group or sys.stdin.read().strip() == "done":
        return
    end(int(group), float(sys.argv[1]))


def end(group: int, grace_s: float) -> None:
    """SIGTERM to a process group, SIGKILL after the grace period; returns when it is empty."""
    for numbers, patience in (
        ((signal.SIGTERM, signal.SIGCONT), grace_s),  # one that was stopped must go on to hear it
        ((signal.SIGKILL,), 10.0),
    ):
        if not members(group):
            return
        for number in numbers:
            try:
                os.killpg(group, number)
            except (ProcessLookupError, PermissionError):
                return
        limit = time.monotonic() + patience
        while members(group) and time.monotonic() < limit:
            time.sleep(0.1)


def members(group: int) -> list[int]:
    """Living processes of a group; dead ones that nobody has reaped do not count."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # After the name, which may hold anything: state, parent, group.
            state, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(own) == group and state not in "ZX":
            found.append(int(folder.name))
    return found


if __name__ == "__main__":
    main()
