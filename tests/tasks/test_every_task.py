"""What holds for every task: it goes in, trains, goes on after a kill, is measured, answers."""

import json
from pathlib import Path
from typing import Any

import made_tasks
import numpy as np
import pytest
import rasterio
from stages import taught

from ringmo import tasks
from ringmo.evaluation.evaluate import score
from ringmo.inference.predict import predict
from ringmo.registry import bundle, pyfunc
from ringmo.stage import run_stage
from ringmo.training import engine
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Stands for a death between two steps: nothing below catches it."""


@pytest.fixture(params=tasks.names())
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_task_trains_is_measured_and_answers(workspace: Any, tmp_path: Path, task: str) -> None:
    values = made_tasks.selected(workspace, tmp_path / "in", task)
    report = taught(values, workspace, task)
    kind, figures = tasks.find(task), report.figures
    assert figures["metric"] == kind.metric
    value = figures[f"test_{kind.metric}"]
    assert figures[f"test_{kind.metric}_low"] <= value <= figures[f"test_{kind.metric}_high"]
    assert {f"scratch_{kind.metric}", f"trivial_{kind.metric}", "drop_mirrored"} <= figures.keys()
    folder = workspace.work(f"evaluate@{task}")
    for name in ("best.png", "typical.png", "worst.png", "behaviour.png", "evidence.npz"):
        assert (folder / name).stat().st_size > 0

    model = bundle.load(workspace.work(f"finetune@{task}") / "model")
    model.check_example()
    gate = score(model, workspace, workspace.work("select") / f"{task}.parquet")
    assert gate[kind.metric] == pytest.approx(value, abs=1e-4)

    source = tmp_path / "in"
    images = {"change": source / "A", "scene": source / "ships"}.get(task, source / "images")
    beside = {"second": str(source / "B")} if task == "change" else None
    out = tmp_path / "answers"
    answers = predict(workspace, [str(images)], str(model.folder), out=out, beside=beside)
    assert not [answer for answer in answers if "error" in answer]
    if task == "scene":
        assert answers[0]["label"] in model.classes
        return
    files = [Path(name) for answer in answers for name in answer["files"]]
    assert len(set(files)) == len(files) >= len(answers)
    for file in files:
        if file.suffix == ".tif":
            with rasterio.open(file) as opened:
                assert opened.shape == (made_tasks.SIDE, made_tasks.SIDE)
        else:
            assert json.loads(file.read_text())["type"] == "FeatureCollection"
    if task != "change":
        (first, *_) = sorted(images.iterdir())
        said = pyfunc._load_pyfunc(str(model.folder)).predict([str(first)])
        assert len(said) == 1 and set(said.columns) <= {"mask", "confidence", "height", "boxes"}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.long
def test_a_killed_training_ends_as_if_never_killed(
    workspace: Any, tmp_path: Path, task: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"epochs": 3, "checkpoint_every_s": 0} | ({"early_stop": 1} if early else {})
    values = made_tasks.selected(workspace, tmp_path / "in", task, **changes)

    def train(out: Path) -> bytes:
        out.mkdir()
        finetune(values, workspace, out, task, from_scratch=True)
        return (out / "model" / "model.safetensors").read_bytes()

    save = engine.Trainer.save_if_due

    def dying(trainer: engine.Trainer, *given: Any, **named: Any) -> None:
        save(trainer, *given, **named)
        if trainer.step == trainer.steps_per_epoch + 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.Trainer, "save_if_due", dying)
        train(tmp_path / "killed")
    resumed = train(tmp_path / "resumed")
    made_tasks.forget(workspace)
    assert train(tmp_path / "whole") == resumed


def test_a_frozen_encoder_stays_as_it_came(workspace: Any, tmp_path: Path) -> None:
    values = made_tasks.selected(workspace, tmp_path / "in", "segmentation", freeze=True, epochs=2)
    run_stage(workspace, "pretrain", lambda out: pretrain(values, workspace, out))
    before = bundle.load(workspace.work("pretrain") / "encoder").model.state_dict()
    finetune(values, workspace, tmp_path, "segmentation")
    after = bundle.load(tmp_path / "model").encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
