"""Within a step nothing is read from the device: on a GPU each such read would be a wait."""

from typing import Any

import made_store
import made_tasks
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from ringmo import config
from ringmo.config import Config
from ringmo.training import engine
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain

# What makes the host wait: a value that Python asks for, a shape that depends on values.
WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.steps, self.seen = False, 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Records what is done within steps, but for those at whose end figures are read."""
    recorder = Recorder()
    begin, read, update = (
        engine.Trainer._begin_step,
        engine.Trainer._log_figures,
        engine.Trainer.update,
    )

    def beginning(trainer: engine.Trainer) -> None:
        recorder.inside = True
        begin(trainer)

    def reading(trainer: engine.Trainer, rate: float) -> None:
        recorder.inside = False  # once in a while, it is read
        read(trainer, rate)

    def updating(trainer: engine.Trainer, loss: Any, batch: Any) -> None:
        update(trainer, loss, batch)
        if batch.last:
            recorder.steps += recorder.inside
            recorder.inside = False

    monkeypatch.setattr(engine.Trainer, "_begin_step", beginning)
    monkeypatch.setattr(engine.Trainer, "_log_figures", reading)
    monkeypatch.setattr(engine.Trainer, "update", updating)
    return recorder


@pytest.mark.parametrize("stage", ["ringmo", "mae", "finetune"])
def test_no_step_waits_for_the_device(
    workspace: Any, tmp_path: Any, recorder: Recorder, stage: str
) -> None:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    changes = {"pretrain.batch_size": 4, "finetune.scene.batch_size": 4, "pretrain.accumulate": 2}
    changes |= {"pretrain.drop_path": 0.2, "finetune.scene.mixup": 0.8}
    if stage == "mae":
        changes |= {"model.backbone": "vit", "model.position": "sincos", "model.depths": [2]}
        changes |= {"model.num_heads": [2], "pretrain.method": "mae"}
    config.edit(workspace.params_file, changes)
    values = Config.load(workspace.params_file)
    with recorder:
        if stage == "finetune":
            finetune(values, workspace, tmp_path / "out", "scene", from_scratch=True)
        else:
            pretrain(values, workspace, tmp_path / "out")
    # Of 18 steps every second is read, and each epoch's last, the ninth.
    assert recorder.steps == 18 - 10
    assert "aten::_fused_adamw_" in recorder.seen
    assert not recorder.seen & WAITS


@pytest.mark.parametrize("task", ["segmentation", "change", "height"])
def test_no_step_with_labels_of_pixels_waits_for_the_device(
    workspace: Any, tmp_path: Any, recorder: Recorder, task: str
) -> None:
    changes = {"epochs": 3, "batch_size": 4}
    values = made_tasks.selected(workspace, tmp_path / "in", task, **changes)
    with recorder:
        finetune(values, workspace, tmp_path / "out", task, from_scratch=True)
    assert "aten::_fused_adamw_" in recorder.seen
    assert not recorder.seen & WAITS
