import json
from typing import Any

import made_store
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ringmo import config
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.evaluation.evaluate import evaluate, score
from ringmo.registry import bundle
from ringmo.stage import Report, run_stage
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain

LONG_ENOUGH = {
    "finetune.scene.epochs": 12,
    "finetune.scene.base_lr": 0.1,
    "finetune.scene.layer_decay": 1.0,
    "finetune.scene.drop_path": 0.0,
    "evaluate.bootstrap_samples": 200,
}


@pytest.fixture
def filled(workspace: Any) -> Any:
    config.edit(workspace.params_file, LONG_ENOUGH)
    made_store.make_selections(workspace, made_store.make_store(workspace))
    return workspace


def chain(workspace: Any) -> dict[str, Report]:
    values = Config.load(workspace.params_file)
    return {
        "pretrain": run_stage(workspace, "pretrain", lambda o: pretrain(values, workspace, o)),
        "finetune": run_stage(
            workspace, "finetune@scene", lambda o: finetune(values, workspace, o, "scene")
        ),
        "scratch": run_stage(
            workspace, "scratch@scene", lambda o: finetune(values, workspace, o, "scene", True)
        ),
        "evaluate": run_stage(
            workspace, "evaluate@scene", lambda o: evaluate(values, workspace, o, "scene")
        ),
    }


def test_three_colours_are_learnt_and_told(filled: Any) -> None:
    reports = chain(filled)
    assert reports["finetune"].figures["val_accuracy"] == 1.0
    assert reports["pretrain"].figures["val_loss"] < 1.5

    figures = reports["evaluate"].figures
    assert figures["test_tiles"] == 12
    assert figures["test_accuracy"] == figures["test_mean_f1"] == 1.0
    assert figures["majority_accuracy"] == pytest.approx(1 / 3, abs=1e-3)
    assert figures["histogram_accuracy"] == 1.0
    for name in ("test_accuracy", "scratch_accuracy", "difference_to_scratch"):
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]

    folder = filled.work("evaluate@scene")
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert list(predictions.columns[:4]) == ["key", "label", "predicted", "confidence"]
    columns = [f"model:{name}" for name in made_store.COLOURS]
    assert np.allclose(predictions[columns].sum(axis=1), 1, atol=1e-5)
    rows = json.loads((folder / "per_class.json").read_text())
    assert rows == reports["evaluate"].tables["per_class"]
    assert [row["class"] for row in rows] == sorted(made_store.COLOURS)
    for name in ("confusion.png", "worst.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.width > 200 and picture.height > 30

    # The gate's question: the same bundle, the same tiles; and a class that it never saw.
    selection = filled.work("select") / "scene.parquet"
    model = bundle.load(filled.work("finetune@scene") / "model")
    answer = score(model, filled, selection)
    assert (answer["accuracy"], answer["mean_f1"], answer["n"]) == (1.0, 1.0, 12)
    assert answer["keys"] == predictions["key"].tolist() and all(answer["correct"])
    table = pd.read_parquet(selection)
    table.loc[table["label"] == "Port", "label"] = "Harbour"
    table.to_parquet(selection, index=False)
    renamed = score(model, filled, selection)
    assert renamed["accuracy"] == pytest.approx(2 / 3)
    assert sum(renamed["correct"]) == 8
    assert model.meta["generated"] is True
    assert model.meta["lineage"]["encoder"] == bundle.load(filled.work("pretrain") / "encoder").hash


def test_scratch_and_finetune_differ_by_the_encoder_alone(filled: Any) -> None:
    config.edit(filled.params_file, {"finetune.scene.epochs": 2})
    chain(filled)
    tuned = bundle.load_meta(filled.work("finetune@scene") / "model")
    scratch = bundle.load_meta(filled.work("scratch@scene") / "model")
    assert scratch["lineage"]["encoder"] is None
    for same in ("architecture", "classes", "sensors", "sensor", "image_size"):
        assert tuned[same] == scratch[same]


def test_no_labels_and_no_tiles_are_refused(filled: Any) -> None:
    values = Config.load(filled.params_file)
    folder = filled.work("select")
    for name in ("pretrain", "scene"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        table.iloc[:0].to_parquet(folder / f"{name}.parquet", index=False)
    with pytest.raises(BadInput, match="0 tiles"):
        run_stage(filled, "pretrain", lambda o: pretrain(values, filled, o))
    with pytest.raises(BadInput, match="0 labelled tiles"):
        run_stage(filled, "scratch@scene", lambda o: finetune(values, filled, o, "scene", True))
    with pytest.raises(BadInput, match="test tiles"):
        run_stage(filled, "evaluate@scene", lambda o: evaluate(values, filled, o, "scene"))
    (folder / "scene.parquet").unlink()
    with pytest.raises(BadInput, match=r"scene\.parquet"):
        run_stage(filled, "scratch@scene", lambda o: finetune(values, filled, o, "scene", True))


def test_one_batch_can_be_pretrained_on(filled: Any) -> None:
    path = filled.work("select") / "pretrain.parquet"
    values = Config.load(filled.params_file)
    train = pd.read_parquet(path).query("split == 'train'")
    train.iloc[: values.pretrain.batch_size].to_parquet(path, index=False)
    report = run_stage(filled, "pretrain", lambda o: pretrain(values, filled, o))
    assert report.figures["steps"] == 2 and report.figures["val_loss"] is None
