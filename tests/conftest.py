"""Workspaces of their own for tests, and nothing that reaches outside the machine."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real import REAL
from tiny import TINY

# Started in the background a shell lets Ctrl-C be ignored, by us and by all we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests side by side share the cores; models this small only wait for a second thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before anything imports them: no telemetry, and no state in the home folder.
os.environ.update(
    DO_NOT_TRACK="true",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DVC_NO_ANALYTICS="1",
    HF_HUB_OFFLINE="1",
)


# Files that take longest begin first: one that began last would run on alone.
LONGEST = (
    "deploy/test_composed.py",
    "faults/test_services_killed.py",
    "flows/test_chain.py",
    "flows/test_deployments.py",
    "flows/test_watch.py",
    "training/test_resume.py",
    "tasks/test_every_task.py",
    "test_cleaning.py",
    "registry/test_promotion.py",
    "data/test_validation.py",
    "flows/test_approval.py",
    "flows/test_drift_flow.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = item.path.relative_to(here).as_posix()
        return item.path not in slow, LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture
def workspace(tmp_path: Path) -> Any:
    """A fresh workspace with tiny parameters."""
    from ringmo import config
    from ringmo.workspace import init

    made = init(tmp_path / "workspace")
    config.edit(made.params_file, TINY)
    return made


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of tests are slower on more threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def aid() -> Path:
    """Real aerial scenes in class folders, where this machine has them."""
    folder = REAL / "scene" / "aid"
    if not folder.is_dir():
        pytest.skip("no real imagery beside the checkout")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A test that could not run has not passed: only missing real imagery excuses a skip."""
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "no real imagery" not in reason:
            terminalreporter.write_line(f"skipped, so failed: {report.nodeid}: {reason}", red=True)
            terminalreporter._session.exitstatus = 1
