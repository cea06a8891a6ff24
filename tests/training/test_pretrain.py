"""What pre-training does beside the loss: sensors, methods, starting weights, figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ringmo import config
from ringmo.config import Config
from ringmo.data.store import COLUMNS, MANIFEST, write_table
from ringmo.models.backbone import encoder, timm_weights
from ringmo.registry import bundle
from ringmo.stage import run_stage
from ringmo.training import engine
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain


def filled(workspace: Any, **values: Any) -> Config:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    config.edit(workspace.params_file, {k.replace("__", "."): v for k, v in values.items()})
    return Config.load(workspace.params_file)


def train(workspace: Any, values: Config) -> Any:
    return run_stage(workspace, "pretrain", lambda out: pretrain(values, workspace, out))


def figures(workspace: Any) -> list[dict[str, Any]]:
    (path,) = (workspace.state / "runs").glob("pretrain-*/figures.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_of_a_training(workspace: Any) -> None:
    report = train(workspace, filled(workspace, pretrain__knn_every=1, pretrain__picture_every=1))
    lines = figures(workspace)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert 0 < line["train/mfu"] < 1 and 0 <= line["train/data_wait_share"] <= 1
        assert line["train/images_per_s"] > 0 and 0.05 < line["train/memory_gb"] < 100
        assert line["train/skipped"] == 0 and line["train/grad_norm"] > 0
    # Three colours, which any features tell apart.
    assert [line["knn/accuracy"] for line in lines if "knn/accuracy" in line] == [1.0, 1.0]
    assert report.figures["knn_accuracy"] == 1.0
    (pictures,) = (workspace.state / "runs").glob("pretrain-*/pictures")
    assert sorted(p.name for p in pictures.iterdir()) == ["epoch-001.png", "epoch-002.png"]
    picture = np.asarray(Image.open(pictures / "epoch-001.png"))
    assert picture.std() > 20


def test_how_often_the_neighbours_are_asked_is_no_part_of_the_training(workspace: Any) -> None:
    first = train(workspace, filled(workspace, pretrain__knn_every=1)).run_dir
    config.edit(workspace.params_file, {"pretrain.knn_every": 2})
    (workspace.work("select") / "scene.parquet").unlink()
    second = train(workspace, Config.load(workspace.params_file))
    assert second.run_dir == first


@pytest.mark.parametrize(
    "values",
    [
        {"pretrain__method": "simmim"},
        {"pretrain__lbp": True},
        {
            "pretrain__method": "mae",
            "model__backbone": "vit",
            "model__position": "sincos",
            "model__depths": [2],
            "model__num_heads": [2],
            "pretrain__drop_path": 0.1,
        },
    ],
    ids=["simmim", "lbp", "mae"],
)
def test_methods_and_targets_train_and_resume(
    workspace: Any, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    chosen = filled(workspace, **values, pretrain__checkpoint_every_s=0, pretrain__base_lr=0.02)
    save = engine.Trainer.save_if_due

    def dying(trainer: engine.Trainer, **given: Any) -> None:
        save(trainer, **given)
        if trainer.step == 4:
            raise Killed

    train(workspace, chosen)
    encoder_file = workspace.work("pretrain") / "encoder" / "model.safetensors"
    whole = encoder_file.read_bytes()
    for path in (workspace.state / "runs").glob("*/checkpoints/*"):
        path.unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.Trainer, "save_if_due", dying)
        train(workspace, chosen)
    train(workspace, chosen)
    assert encoder_file.read_bytes() == whole


def test_weights_of_timm_are_where_it_starts(workspace: Any, tmp_path: Path) -> None:
    """At a rate of next to nothing the encoder ends as it was given."""
    import timm

    given = tmp_path / "timm.safetensors"
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32,
        patch_size=4,
        num_classes=5,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 4),
        window_size=4,
    )
    save_file({n: t.contiguous() for n, t in swin.state_dict().items()}, given)
    values = filled(
        workspace,
        model__stem="patch",
        model__patch_size=4,
        pretrain__init=str(given),
        pretrain__base_lr=1e-12,
        pretrain__min_lr=0,
    )
    report = train(workspace, values)
    assert str(given) in report.notes[0]
    wanted = timm_weights(given, values.model, "rgb")
    found = load_file(workspace.work("pretrain") / "encoder" / "model.safetensors")
    compared = [name for name in found if name in wanted and wanted[name].is_floating_point()]
    assert len(compared) > 20
    for name in compared:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def two_sensors(workspace: Any, **values: Any) -> Config:
    """Every second tile of the store becomes one of s1, a radar: two bands of float32."""
    import io

    import rasterio

    from ringmo.data.store import ShardWriter, sha256

    manifest = made_store.make_store(workspace)
    writer = ShardWriter(workspace.store, 1, 64)
    dice, rows = np.random.default_rng(1), manifest.to_dict("records")
    for row in rows[::2]:
        stream = io.BytesIO()
        pixels = dice.normal(-12, 4, (2, 48, 48)).astype(np.float32)
        profile = {"driver": "GTiff", "width": 48, "height": 48, "count": 2, "dtype": "float32"}
        with rasterio.open(stream, "w", **profile) as file:
            file.write(pixels)
        data = stream.getvalue()
        digest = sha256(data)
        shard, offset = writer.add(f"{digest[:16]}.tif", data)
        row |= {"key": digest[:16], "shard": shard, "member": f"{digest[:16]}.tif"}
        row |= {"offset": offset, "size": len(data), "content_hash": digest}
        row |= {"sensor": "s1", "bands": 2, "dtype": "float32"}
    writer.commit()
    write_table(workspace.store / MANIFEST, rows, COLUMNS)
    import pandas as pd

    made_store.make_selections(workspace, pd.DataFrame(rows))
    changes = {"pretrain.mix": {"rgb": 1.0, "s1": 3.0}, "pretrain.batch_size": 6}
    changes |= {"finetune.scene.batch_size": 6, **values}
    config.edit(workspace.params_file, changes)
    return Config.load(workspace.params_file)


def test_two_sensors_share_a_trunk_and_their_mix_of_the_steps(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = two_sensors(workspace, **{"pretrain.epochs": 8})
    update, steps, rows = engine.Trainer.update, Counter[str](), dict[str, list[int]]()

    def counted(trainer: engine.Trainer, loss: Any, batch: engine.MicroBatch) -> None:
        steps[batch.sensor] += 1
        rows.setdefault(batch.sensor, []).extend(batch.rows)
        assert batch.images.shape[1] == {"rgb": 3, "s1": 2}[batch.sensor]
        update(trainer, loss, batch)

    monkeypatch.setattr(engine.Trainer, "update", counted)
    report = train(workspace, values)
    assert steps.total() == report.figures["steps"] == 48
    assert 0.5 < steps["s1"] / 48 < 0.95
    # Each sensor goes through all its tiles before it sees one again.
    for seen in rows.values():
        assert len(set(seen[:18])) == 18
    made = bundle.load(workspace.work("pretrain") / "encoder")
    assert list(made.meta["sensors"]) == ["rgb", "s1"]
    image = np.full((48, 48, 2), -12, np.float32)
    assert made.embed([image], sensor="s1").shape == (1, 32)
    (pictures,) = (workspace.state / "runs").glob("pretrain-*/pictures")
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["epoch-008-rgb.png", "epoch-008-s1.png"]

    report = run_stage(
        workspace, "finetune@scene", lambda out: finetune(values, workspace, out, "scene")
    )
    assert any(note.startswith("left out: stems.s1.") for note in report.notes)
    made = bundle.load(workspace.work("finetune@scene") / "model")
    assert made.meta["sensor"] == "rgb" and list(made.meta["sensors"]) == ["rgb"]


def test_fine_tuning_at_another_size_resizes_position_tables(workspace: Any) -> None:
    values = filled(workspace, finetune__scene__image_size=64, finetune__scene__window_size=8)
    train(workspace, values)
    report = run_stage(
        workspace, "finetune@scene", lambda out: finetune(values, workspace, out, "scene")
    )
    assert "2 position tables were resized" in report.notes
    made = bundle.load(workspace.work("finetune@scene") / "model")
    assert made.meta["image_size"] == made.meta["architecture"]["image_size"] == 64
    made.check_example()


def test_another_encoder_and_another_selection(workspace: Any, tmp_path: Path) -> None:
    import pandas as pd

    values = filled(workspace)
    train(workspace, values)
    moved = workspace.work("pretrain").rename(tmp_path / "elsewhere")
    table = pd.read_parquet(workspace.work("select") / "scene.parquet")
    chosen = table[(table["split"] != "train") | (table["label"] != "Port")]
    chosen.to_parquet(tmp_path / "fewer.parquet", index=False)
    report = finetune(
        values,
        workspace,
        tmp_path / "out",
        "scene",
        encoder=moved / "encoder",
        selection=tmp_path / "fewer.parquet",
    )
    assert report.figures["classes"] == 2 and report.figures["tiles"] == 24


def test_lower_levels_learn_slower(workspace: Any) -> None:
    from ringmo.models.classifier import Classifier

    values = filled(workspace)
    trunk = encoder(values.model, {"rgb": 3}, finetuning=True)
    model = Classifier(trunk, 3)
    groups = engine.parameter_groups(model, trunk, 0.05, 0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    levels = trunk.levels()
    assert scale[id(model.head.weight)] == 1
    for at, members in enumerate(levels):
        assert {scale[id(p)] for p in members} == {0.5 ** (len(levels) - at)}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "bias_table" in name
        assert decay[id(parameter)] == (0 if plain else 0.05), name


@pytest.mark.long
def test_a_model_that_cannot_be_compiled_is_trained_as_it_is(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/c++",))
    train(workspace, filled(workspace, hardware__compile=True))
    said = [line for line in capsys.readouterr().err.splitlines() if "uncompiled" in line]
    assert len(said) == 1 and said[0].startswith("hardware.compile: the model is trained")
