import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pytest
import torch

from ringmo import config
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.stage import run_stage
from ringmo.training import checkpoint, engine
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain
from ringmo.workspace import init

PRETRAIN, FINETUNE = "pretrain", "finetune@scene"


class Killed(BaseException):
    """Stands for a death between two steps: nothing below catches it."""


@pytest.fixture
def filled(workspace: Any) -> Any:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    return workspace


def settings(workspace: Any, **values: Any) -> Config:
    config.edit(workspace.params_file, {k.replace("__", "."): v for k, v in values.items()})
    return Config.load(workspace.params_file)


def train(workspace: Any, values: Config) -> tuple[bytes, bytes]:
    run_stage(workspace, PRETRAIN, lambda out: pretrain(values, workspace, out))
    run_stage(workspace, FINETUNE, lambda out: finetune(values, workspace, out, "scene"))
    return weights(workspace)


def weights(workspace: Any) -> tuple[bytes, bytes]:
    return (
        (workspace.work(PRETRAIN) / "encoder" / "model.safetensors").read_bytes(),
        (workspace.work(FINETUNE) / "model" / "model.safetensors").read_bytes(),
    )


def figures(workspace: Any, stage: str) -> list[dict[str, Any]]:
    (path,) = (workspace.state / "runs").glob(f"{stage.replace('@', '-')}-*/figures.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Make the training die in the middle of an epoch, after its checkpoint at this step."""
    save = engine.Trainer.save_if_due

    def dying(trainer: engine.Trainer, *given: Any, **named: Any) -> None:
        save(trainer, *given, **named)
        if trainer.step == step:
            raise error

    monkeypatch.setattr(engine.Trainer, "save_if_due", dying)


def forget(workspace: Any) -> None:
    """Remove the checkpoints of finished trainings, as the flow does once DVC has their outputs."""
    for folder in (workspace.state / "runs").glob("*/checkpoints"):
        shutil.rmtree(folder)


def test_a_finished_training_is_not_trained_again(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(filled)
    run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    encoder = filled.work(PRETRAIN) / "encoder" / "model.safetensors"
    whole = encoder.read_bytes()
    shutil.rmtree(filled.work(PRETRAIN))  # a kill before DVC had recorded it
    monkeypatch.setattr(engine.Trainer, "update", lambda *_: pytest.fail("trained again"))
    run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    assert encoder.read_bytes() == whole


@pytest.mark.parametrize(
    "step", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4, 5))]
)
def test_resumed_training_ends_in_the_same_bytes(
    filled: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    values = settings(filled, pretrain__checkpoint_every_s=0, finetune__scene__checkpoint_every_s=0)
    whole = train(filled, values)
    kept = figures(filled, PRETRAIN)
    forget(filled)
    for stage, run in (
        (PRETRAIN, lambda out: pretrain(values, filled, out)),
        (FINETUNE, lambda out: finetune(values, filled, out, "scene")),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, step, Killed())
            run_stage(filled, stage, run)
        (folder,) = (filled.state / "runs").glob(f"{stage.replace('@', '-')}-*/checkpoints")
        assert checkpoint.found(folder)[0].name == f"step-{step:08d}.safetensors"
        assert len(checkpoint.found(folder)) == 2
        run_stage(filled, stage, run)
    assert weights(filled) == whole
    resumed = figures(filled, PRETRAIN)
    timeless = [
        [{k: v for k, v in f.items() if "loss" in k or k in ("step", "train/lr")} for f in fs]
        for fs in (kept, resumed)
    ]
    assert timeless[0] == timeless[1]


def test_truncated_checkpoint_is_passed_over_for_the_one_before(
    filled: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(filled, pretrain__checkpoint_every_s=0)
    run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    encoder = filled.work(PRETRAIN) / "encoder" / "model.safetensors"
    whole = encoder.read_bytes()
    forget(filled)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 4, Killed())
        run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    (folder,) = (filled.state / "runs").glob("pretrain-*/checkpoints")
    newest = checkpoint.found(folder)[0]
    os.truncate(newest, newest.stat().st_size // 2)
    run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    said = capsys.readouterr().err
    assert "step-00000004.safetensors cannot be read" in said and "from step 3 of 6" in said
    assert encoder.read_bytes() == whole


def test_checkpoint_of_other_parameters_is_left_alone(
    filled: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(filled, pretrain__checkpoint_every_s=0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3, Killed())
        run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    other = settings(filled, pretrain__base_lr=0.002)
    run_stage(filled, PRETRAIN, lambda out: pretrain(other, filled, out))
    assert "goes on" not in capsys.readouterr().err
    run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    assert "goes on from step 3" in capsys.readouterr().err


def test_sigterm_saves_and_exits_143(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(filled, pretrain__checkpoint_every_s=1000)
    update = engine.Trainer.update

    def interrupted(trainer: engine.Trainer, *given: Any) -> None:
        update(trainer, *given)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(engine.Trainer, "update", interrupted)
        run_stage(filled, PRETRAIN, lambda out: pretrain(values, filled, out))
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    (folder,) = (filled.state / "runs").glob("pretrain-*/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000000.safetensors",
        "step-00000002.safetensors",
    ]
    assert not filled.work(PRETRAIN).exists()


def test_figures_after_the_checkpoint_and_half_lines_are_cut(tmp_path: Path) -> None:
    log = engine.Figures(tmp_path / "figures.jsonl")
    for step in (1, 2, 3):
        log.add(step, step / 2, train__loss=1 / step)
    with log.path.open("a") as file:
        file.write('{"step": 4, "tra')
    log.cut(2)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["train/loss"] == 0.5


def test_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer, other = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(twin.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    best = {"a": torch.arange(4)}
    checkpoint.write(tmp_path, 1, model, optimizer, {"best": 0.5}, best)
    read = checkpoint.read(tmp_path)
    assert read is not None and read.step == 1 and read.state == {"best": 0.5}
    assert torch.equal(read.part(checkpoint.EXTRA)["a"], best["a"])
    read.into(twin, other, tmp_path)
    assert torch.equal(model.weight, twin.weight)
    for ours, theirs in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.read(tmp_path / "none") is None


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        checkpoint.write(tmp_path, step, model, optimizer, {}, {}, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000002.safetensors",
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]


def test_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, wider = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.write(tmp_path, 1, model, optimizer, {}, {})
    read, before = checkpoint.read(tmp_path), wider.weight.clone()
    assert read is not None
    said = r"weight weight is of shape \(2, 3\), the model's of shape \(2, 4\): .* another arch"
    with pytest.raises(BadInput, match=said):
        read.into(wider, torch.optim.AdamW(wider.parameters()), tmp_path)
    assert torch.equal(wider.weight, before)


@pytest.mark.slow
def test_killed_twenty_times_ends_as_if_never_killed(filled: Any, tmp_path: Path) -> None:
    from tiny import TINY

    longer = {"pretrain.epochs": 10, "finetune.scene.epochs": 10}
    eager = {"pretrain.checkpoint_every_s": 0, "finetune.scene.checkpoint_every_s": 0}
    config.edit(filled.params_file, {**longer, **eager})
    calm = init(tmp_path / "calm")
    config.edit(calm.params_file, {**TINY, **longer, **eager})
    made_store.make_selections(calm, made_store.make_store(calm))

    seed = int(np.random.SeedSequence().entropy) % 10**6  # type: ignore[arg-type]
    print(f"seed {seed}")
    script = Path(__file__).with_name("killed.py")
    outcomes = []
    for workspace, kills in ((calm, 0), (filled, 20)):
        command = [sys.executable, str(script), str(workspace.root), str(seed), str(kills)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        outcomes.append(json.loads(done.stdout))
        print(outcomes[-1])
    assert outcomes[0] == {"killed": 0, "inside": 0, "finished": 0, "code": 0}
    assert outcomes[1]["killed"] == 20 and outcomes[1]["code"] == 0
    assert outcomes[1]["inside"] >= 1, "no kill fell into the writing of a checkpoint"
    assert weights(filled) == weights(calm)
    assert not list(filled.root.glob("work/.*.tmp"))
