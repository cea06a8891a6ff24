"""One chain at a time in a workspace, and what is left of one that was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import wait_until

from ringmo import chain_lock, console
from ringmo.errors import Unreachable
from ringmo.process_group import born
from ringmo.workspace import Workspace

# A chain with a stage that saves for half a second when it is told to end.
STAGE = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.5)
    Path(sys.argv[1], "saved").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "up").write_text("")
time.sleep(60)
"""
CHAIN = """
import os, sys
from pathlib import Path
from ringmo import chain_lock, process_group
from ringmo.workspace import Workspace
root, flow_run, stage = sys.argv[1:]
with chain_lock.alone(Workspace(Path(root)), flow_run):
    process_group.run_group([sys.executable, "-c", stage, root], Path(root), dict(os.environ), 20)
"""


@pytest.fixture
def chain(tmp_path: Path) -> Any:
    """A process that runs a chain, in the middle of a stage."""
    process = subprocess.Popen([sys.executable, "-c", CHAIN, str(tmp_path), "first", STAGE])
    wait_until((tmp_path / "up").exists)
    yield process
    process.kill()
    process.wait()
    wait_until(lambda: not _stages(tmp_path))


def _stages(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [one for one in found if one.cmdline()[-1] == str(folder)]


def test_a_killed_chain_leaves_no_stage_and_the_next_begins_when_that_has_saved(
    chain: Any, tmp_path: Path
) -> None:
    """SIGKILL: nobody of the chain is there any more to end its stage."""
    assert _stages(tmp_path)
    chain.kill()
    with chain_lock.alone(Workspace(tmp_path), "second") as before:
        assert (tmp_path / "saved").exists() and not _stages(tmp_path)
        assert before.dead == "first"
    with chain_lock.alone(Workspace(tmp_path), "third") as before:
        assert before.dead is None, "the second one ended by itself"


def test_the_second_waits_and_says_for_whom(
    chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        os.kill(chain.pid, signal.SIGKILL)

    monkeypatch.setattr(console, "note", note)
    with chain_lock.alone(Workspace(tmp_path), "second") as before:
        assert before.awaited == "first"
    (line,) = said
    assert f"process {chain.pid} on " in line and "waiting for its end" in line


def test_a_stopped_run_is_not_waited_for(chain: Any, tmp_path: Path) -> None:
    """Ctrl-Z of somebody who went home: a schedule must not wait behind it."""
    os.kill(chain.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(chain.pid).status() == psutil.STATUS_STOPPED)
    with (
        pytest.raises(Unreachable, match=f"kill -CONT {chain.pid}"),
        chain_lock.alone(Workspace(tmp_path), "second"),
    ):
        pass
    os.kill(chain.pid, signal.SIGCONT)


def test_an_earlier_try_of_the_same_run_that_stands_still_is_ended(
    chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect declared it dead and began it again: only one of the two may go on."""
    monkeypatch.setattr(chain_lock, "STOPPED_S", 1.0)
    os.kill(chain.pid, signal.SIGSTOP)
    with chain_lock.alone(Workspace(tmp_path), "first") as before:
        assert before.dead == "first" and (tmp_path / "saved").exists()
    assert chain.wait(5) == -signal.SIGKILL


def test_a_file_cut_by_a_kill_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / ".ringmo").mkdir()
    (tmp_path / ".ringmo" / "chain.lock").write_text('{"pid": 1')
    with chain_lock.alone(Workspace(tmp_path), "first") as before:
        assert before.dead is None and not before.awaited
        assert json.loads((tmp_path / ".ringmo" / "chain.lock").read_text())["pid"] == os.getpid()


def test_a_process_is_known_by_its_birth_whatever_the_clock_says() -> None:
    mine = born(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert mine == born(os.getpid()) and born(child.pid) not in (None, mine)
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert born(child.pid) is None, "dead, and only not reaped"
    child.wait()
    assert born(child.pid) is None
