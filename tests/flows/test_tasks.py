"""Several tasks on one encoder, as a user runs them: the real command, real servers."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import made_tasks
import psutil
import pytest
from prefect_api import api
from servers import free_port
from tiny import TINY

from ringmo import config
from ringmo.training import checkpoint
from ringmo.workspace import Workspace, init

# The second test interrupts the tasks that the first one chose.
pytestmark = [pytest.mark.slow, pytest.mark.long]
TASKS = ("segmentation", "height")


def command(place: Workspace, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ringmo", *arguments, "--workspace", str(place.root)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace with its own servers and imagery for two tasks."""
    root = tmp_path_factory.mktemp("tasks")
    made = init(root / "workspace")
    changes = {"services.mlflow_port": free_port(), "services.prefect_port": free_port()}
    changes |= {f"finetune.{t}.{n}": v for t in TASKS for n, v in made_tasks.SHORT.items()}
    for task in TASKS:  # the same images, with masks and with heights beside them
        made_tasks.write(root / "in", task)
    config.edit(made.params_file, TINY | changes | {"ingest.sources": [str(root / "in")]})
    yield made
    subprocess.run(command(made, "down"), check=True, capture_output=True)


def task_runs(place: Workspace) -> dict[str, dict[str, Any]]:
    """The newest run of each step, as Prefect's server has it."""
    found = api(place, "task_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    return {one["name"]: one for one in found}


def test_tasks_train_side_by_side_and_each_has_its_champion(place: Workspace) -> None:
    done = subprocess.run(
        command(place, "run", "--json", "--task", *TASKS, "--set", "run.side_by_side=2"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    answer = json.loads(done.stdout)
    for task, metric, unit in (("segmentation", "miou", "%"), ("height", "mae", "m")):
        made = answer["tasks"][task]
        assert made["champion"] == made["model"] == f"{task}/1"
        assert (made["metric"], made["unit"]) == (metric, unit)
        assert made[f"test_{metric}_low"] <= made[f"test_{metric}"] <= made[f"test_{metric}_high"]

    def span(name: str) -> tuple[datetime, datetime]:
        run = task_runs(place)[name]
        return datetime.fromisoformat(run["start_time"]), datetime.fromisoformat(run["end_time"])

    (begun, ended), (other_begun, other_ended) = (span(f"finetune@{task}") for task in TASKS)
    assert begun < other_ended and other_begun < ended, "one waited for the other"

    listed = subprocess.run(command(place, "models"), capture_output=True, text=True).stdout
    assert "height/1" in listed and " m (" in listed and "segmentation/1" in listed

    again = subprocess.run(
        command(place, "run", "--json"), capture_output=True, text=True, timeout=600
    )
    assert json.loads(again.stdout)["outcome"] == "Unchanged"


def test_an_interrupted_run_leaves_no_training_behind(place: Workspace) -> None:
    """Ctrl-C while two train side by side: both end, and have saved all that they did."""
    longer = [f"finetune.{task}.epochs=4000" for task in TASKS]
    process = subprocess.Popen(
        command(place, "run", "--set", *longer), stderr=subprocess.PIPE, text=True
    )
    runs, limit = place.state / "runs", time.monotonic() + 240

    def training() -> list[Path]:
        return [
            figures.parent
            for task in TASKS
            for figures in runs.glob(f"scratch-{task}-*/figures.jsonl")  # these two come first
            if "4000" in (figures.parent / "params.json").read_text()
            and len(figures.read_text()) > 2000
        ]

    while len(training()) < 2:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[1]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    left = [
        one
        for one in psutil.process_iter()
        if "finetune" in _line(one) and str(place.root) in _line(one)
    ]
    assert not left, left
    for folder in training():
        saved = checkpoint.read(folder / "checkpoints")
        logged = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
        assert saved is not None and saved.step >= logged[-1]["step"] > 0


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
