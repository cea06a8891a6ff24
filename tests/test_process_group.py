"""A cancelled stage saves what it has, and nobody of its group is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ringmo.process_group import GroupEnded, begin, end_all, end_group, run_group

# A parent that dies of SIGTERM at once, as DVC does, and a child that first saves for a second.
CHILD = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(1)
    Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1] + ".up").write_text("")
time.sleep(60)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.02)


def test_the_group_is_waited_for_when_its_leader_dies_first(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    leader = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(saved)], start_new_session=True
    )
    wait_for(tmp_path / "saved.up")
    end_group(leader.pid, grace_s=15)
    assert saved.read_text() == "saved"
    leader.wait(5)


def test_who_does_not_end_within_the_grace_period_is_killed(tmp_path: Path) -> None:
    stubborn = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); Path(sys.argv[1]).write_text(''); "
        "time.sleep(60)"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", stubborn, str(tmp_path / "up")], start_new_session=True
    )
    wait_for(tmp_path / "up")
    end_group(leader.pid, grace_s=0.5)
    assert leader.wait(5) == -signal.SIGKILL


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as at a terminal: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_ends_the_group(tmp_path: Path) -> None:
    saved = tmp_path / "saved"

    def interrupt() -> None:
        wait_for(tmp_path / "saved.up")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_group([sys.executable, "-c", CHILD, str(saved)], tmp_path, dict(os.environ), 15)
    assert saved.read_text() == "saved"
    assert not any("time.sleep(60)" in " ".join(c.cmdline()) for c in psutil.Process().children())


def test_the_exit_status_is_the_command_s(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    assert run_group(command, tmp_path, dict(os.environ), 1) == 7


def test_once_all_are_ended_none_begins(tmp_path: Path) -> None:
    """Neither one that waits in another thread, nor a second try of one that was ended."""
    saved, told = tmp_path / "saved", []
    command = [sys.executable, "-c", CHILD, str(saved)]

    def wait() -> None:
        for _ in range(2):
            try:
                told.append(run_group(command, tmp_path, dict(os.environ), 15))
            except GroupEnded:
                told.append("ended")

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(tmp_path / "saved.up")
    try:
        end_all()
        thread.join(20)
        assert told == ["ended", "ended"] and saved.read_text() == "saved"
    finally:
        begin()
    assert run_group([sys.executable, "-c", ""], tmp_path, dict(os.environ), 1) == 0
