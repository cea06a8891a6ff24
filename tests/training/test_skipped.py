"""A step whose loss or gradient is no number changes nothing; too many of them are acted on."""

import json
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
from ringmo.training import engine
from ringmo.training.pretrain import pretrain


@pytest.fixture
def filled(workspace: Any) -> Any:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    config.edit(workspace.params_file, {"pretrain.epochs": 12, "pretrain.checkpoint_every_s": 0})
    return workspace


def train(workspace: Any) -> Any:
    values = Config.load(workspace.params_file)
    return run_stage(workspace, "pretrain", lambda out: pretrain(values, workspace, out))


def everything(trainer: engine.Trainer) -> list[torch.Tensor]:
    moments = trainer.optimizer.state_dict()["state"]
    flat = [moments[i][name] for i in sorted(moments) for name in sorted(moments[i])]
    return [t.clone() for t in [*trainer._bare.state_dict().values(), *flat]]


def spoil(monkeypatch: pytest.MonkeyPatch, how: Any) -> list[tuple[int, bool]]:
    """Let `how(step, loss)` change losses; returns, a step each, whether it changed anything."""
    update, begin = engine.Trainer.update, engine.Trainer._begin_step
    before: list[torch.Tensor] = []
    seen: list[tuple[int, bool]] = []

    def beginning(trainer: engine.Trainer) -> None:
        before[:] = everything(trainer)  # the forward pass already changes BatchNorm's statistics
        begin(trainer)

    def spoiled(trainer: engine.Trainer, loss: torch.Tensor, batch: Any) -> None:
        step = trainer.step
        update(trainer, how(step, loss), batch)
        if trainer.step == step + 1:
            after = everything(trainer)
            same = len(before) == len(after) and all(
                torch.equal(a, b) for a, b in zip(before, after, strict=True)
            )
            seen.append((step, not same))

    monkeypatch.setattr(engine.Trainer, "_begin_step", beginning)
    monkeypatch.setattr(engine.Trainer, "update", spoiled)
    return seen


def figures(workspace: Any) -> list[dict[str, Any]]:
    (path,) = (workspace.state / "runs").glob("pretrain-*/figures.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "how",
    [
        lambda step, loss: loss * (torch.nan if step in (5, 6) else 1),
        lambda step, loss: loss * (torch.inf if step in (5, 6) else 1),
        # The loss is a number, its gradient is none: the root's slope at 0 is infinite.
        lambda step, loss: loss + ((loss * 0).sqrt() if step in (5, 6) else 0),
        lambda step, loss: loss * (1000 if step in (5, 6) else 1),
    ],
    ids=["nan", "inf", "gradient", "exploded"],
)
def test_a_bad_step_is_skipped_bit_for_bit_and_counted(
    filled: Any, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    seen = spoil(monkeypatch, how)
    report = train(filled)
    assert [step for step, changed in seen if not changed] == [5, 6]
    assert len(seen) == 36 and report.figures["skipped_steps"] == 2
    assert np.isfinite(
        [line["train/loss"] for line in figures(filled) if "train/loss" in line]
    ).all()


def test_too_many_in_a_row_return_once_at_a_lower_rate(
    filled: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = {"left": engine.ROW}

    def how(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step >= 10 and calm["left"]:
            calm["left"] -= 1
            return loss * torch.nan
        return loss

    seen = spoil(monkeypatch, how)
    report = train(filled)
    said = capsys.readouterr().err
    assert "8 steps in a row were skipped, up to step 18" in said
    assert "returns to step 10, at 0.5 times the rate" in said
    # The eighth is not seen here: the step number went back with it.
    steps = [step for step, _ in seen]
    assert steps == [*range(10), *range(10, 17), *range(10, 36)]
    assert report.figures["steps"] == 36
    rates = {line["step"]: line["train/lr"] for line in figures(filled) if "train/lr" in line}
    settings = Config.load(filled.params_file).pretrain
    for step in (9, 10, 11, 20):
        whole = engine.learning_rate(step - 1, 36, 3, settings)
        assert rates[step] == pytest.approx(whole * (1 if step <= 10 else 0.5), rel=1e-5)


def test_the_second_time_stops_with_the_tiles_named(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda step, loss: loss * torch.nan if step >= 10 else loss)
    with pytest.raises(BadInput) as stopped:
        train(filled)
    said = str(stopped.value)
    assert "also at 0.5 times the rate; lower pretrain.base_lr" in said and "\n" not in said
    keys = set(said.split("tiles: ")[1].split(" (and ")[0].split(", "))
    import pandas as pd

    known = set(pd.read_parquet(filled.work("select") / "pretrain.parquet")["key"])
    assert len(keys) == 4 and keys <= known
    assert not Path(filled.work("pretrain")).exists()


def test_a_loss_that_never_was_a_number_stops_too(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.edit(filled.params_file, {"pretrain.epochs": 2})  # 6 steps: fewer than a row
    spoil(monkeypatch, lambda step, loss: loss * torch.nan)
    with pytest.raises(BadInput, match="6 steps in a row were skipped, up to step 6"):
        train(filled)


def test_counts_survive_a_kill(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    save = engine.Trainer.save_if_due

    def dying(trainer: engine.Trainer, **given: Any) -> None:
        save(trainer, **given)
        if trainer.step == 12:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.Trainer, "save_if_due", dying)
        spoil(patch, lambda step, loss: loss * (torch.nan if step in (5, 6) else 1))
        train(filled)
    assert train(filled).figures["skipped_steps"] == 2
