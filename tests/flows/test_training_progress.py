"""How far a training is, from the figures that it writes."""

import json
import time
from pathlib import Path

import pytest

from flows.progress import progress
from ringmo.stage import announce
from ringmo.training.engine import Figures
from ringmo.workspace import Workspace


@pytest.fixture
def folder(workspace: Workspace) -> Path:
    """A training's run folder, announced."""
    made = workspace.run_dir("finetune@scene", "f" * 64)
    made.mkdir(parents=True)
    announce(workspace, "finetune@scene", made)
    (made / "params.json").write_text(json.dumps({"training.epochs": 10}))
    return made


def lines(folder: Path, *points: tuple[int, float, float]) -> None:
    """step, epoch, and seconds from now."""
    figures = Figures(folder / "figures.jsonl")
    for step, epoch, _ in points:
        figures.add(step, epoch, train__loss=1 / step)
    written = [json.loads(line) for line in figures.path.read_text().splitlines()]
    for line, (_, _, seconds) in zip(written, points, strict=True):
        line["time"] = time.time() + seconds
    figures.path.write_text("".join(json.dumps(line) + "\n" for line in written))


def test_share_loss_and_time_left_are_told(workspace: Workspace, folder: Path) -> None:
    assert progress(workspace, "finetune@scene", 0) is None  # no figures yet
    lines(folder, (10, 1.0, -360), (20, 2.0, -240), (30, 3.0, -120), (40, 4.0, 0))
    with (folder / "figures.jsonl").open("a") as file:
        file.write('{"step": 50, "ti')  # being written
    told = progress(workspace, "finetune@scene", 0)
    assert told is not None and told[0] == pytest.approx(0.4)
    assert told[1] == "finetune@scene: epoch 4.0 of 10, train loss 0.025, 12 min left"


def test_an_interruption_does_not_count(workspace: Workspace, folder: Path) -> None:
    """A week in the middle: the last twenty lines are from after it."""
    before = [(i, i / 10, -604800 + i * 60) for i in range(1, 20)]
    after = [(i, i / 10, (i - 60) * 60) for i in range(40, 61)]
    lines(folder, *before, *after)
    told = progress(workspace, "finetune@scene", 0)
    assert told is not None and told[1].endswith("40 min left")


def test_what_an_earlier_execution_left_is_not_told(workspace: Workspace, folder: Path) -> None:
    lines(folder, (10, 1.0, 0))
    assert progress(workspace, "finetune@scene", time.time() + 5) is None
    assert progress(workspace, "pretrain", 0) is None
