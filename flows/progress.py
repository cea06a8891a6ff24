"""How far a training is, as a progress bar in the flow run's artifacts, with the time left."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from ringmo.stage import announcement
from ringmo.workspace import Workspace

POLL_S = 5.0
RECENT = 20  # lines of figures that the speed is taken from: an interruption lies before them


@contextlib.contextmanager
def shown(workspace: Workspace, stage: str) -> Iterator[None]:
    """Follow the stage that runs inside, where it announces a training. Nothing here raises."""
    ended = threading.Event()
    began = time.time()
    thread = threading.Thread(
        target=copy_context().run, args=(_follow, workspace, stage, began, ended), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=30)


def _follow(workspace: Workspace, stage: str, began: float, ended: threading.Event) -> None:
    artifact: Any = None
    told: tuple[float, str] | None = None
    last = False
    while not last:
        last = ended.wait(POLL_S)
        with contextlib.suppress(Exception):  # a bar that cannot be drawn stops no training
            now = progress(workspace, stage, began)
            if now is None or now == told:
                continue
            share, said = told = now
            if artifact is None:
                artifact = create_progress_artifact(
                    progress=100 * share, key=key("progress", stage), description=said
                )
            else:
                update_progress_artifact(artifact, progress=100 * share, description=said)


def key(what: str, stage: str) -> str:
    """An artifact's key, of which there are fewer letters than in a stage's name."""
    return f"{what}-{stage.replace('@', '-')}"


def progress(workspace: Workspace, stage: str, began: float) -> tuple[float, str] | None:
    """Share of a training that is done, and that in words; None before its first figures.

    began: an announcement from before that, in Unix seconds, is of an earlier execution.
    """
    announced = announcement(workspace, stage)
    try:
        if announced.stat().st_mtime < began:
            return None
        folder = workspace.root / json.loads(announced.read_text())["run_dir"]
        epochs = json.loads((folder / "params.json").read_text())["training.epochs"]
        lines = _lines(folder / "figures.jsonl")
    except (OSError, ValueError, KeyError):
        return None
    if not lines:
        return None
    first, last = lines[max(0, len(lines) - RECENT)], lines[-1]
    share = min(1.0, last["epoch"] / epochs)
    said = f"{stage}: epoch {last['epoch']:.1f} of {epochs}"
    for name in ("train/loss", "val/loss"):
        value = next((line[name] for line in reversed(lines) if name in line), None)
        if value is not None:
            said += f", {name.replace('/', ' ')} {value:.4g}"
    gone = last["epoch"] - first["epoch"]
    if share < 1 and gone > 0:
        seconds = (last["time"] - first["time"]) / gone * (epochs - last["epoch"])
        said += f", {_duration(seconds)} left"
    return share, said


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else "less than a minute"


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last one is being written
            figures = json.loads(line)
            if "epoch" in figures and "time" in figures:
                found.append(figures)
    return found
