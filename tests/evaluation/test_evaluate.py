import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_store
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference
from torch.nn.functional import one_hot

from ringmo import config
from ringmo.config import Config
from ringmo.data.ingest import ingest
from ringmo.data.selection import select
from ringmo.errors import BadInput
from ringmo.evaluation import average_precision, dense
from ringmo.evaluation.average_precision import Instances
from ringmo.evaluation.evaluate import (
    _curve,
    _curves,
    _groups,
    evaluate,
    gsd_band,
    score,
    sheets,
)
from ringmo.registry import bundle
from ringmo.stage import Report, run_stage
from ringmo.tasks import find
from ringmo.tasks.base import UNKNOWN, joined
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
    assert figures["trivial_accuracy"] == pytest.approx(1 / 3, abs=1e-3)
    assert (figures["metric"], figures["unit"]) == ("accuracy", "%")
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
    both = reports["evaluate"].tables
    assert both["per_sensor"] == [
        {
            "sensor": "rgb",
            "tiles": 12,
            "accuracy": 1.0,
            "accuracy_low": 1.0,
            "accuracy_high": 1.0,
            "mean_f1": 1.0,
        }
    ]
    assert [row["gsd"] for row in both["per_gsd"]] == ["unknown"]
    changes = [row["change"] for row in both["behaviour"]]
    assert changes == [
        *("mirrored", "turned 90", "turned 180", "turned 270"),
        *("brighter", "darker", "noise", "band lost"),
    ]
    for name in changes:
        assert f"drop_{name.replace(' ', '_')}_low" in figures
    # What is on disk is what the figures come from, and can be read without running anything.
    with np.load(folder / "evidence.npz", allow_pickle=False) as evidence:
        assert evidence["key"].tolist() == predictions["key"].tolist()
        assert evidence["right"].mean() == figures["test_accuracy"]
        confidence, right = evidence["confidence"], evidence["right"]
    assert 0 <= figures["test_ece_low"] <= figures["test_ece_high"]
    assert figures["test_ece"] == pytest.approx(abs(confidence.mean() - right.mean()), abs=0.05)
    json.dumps(reports["evaluate"].figures, allow_nan=False)
    # What production is compared with says the same, and of the validation tiles too.
    expected = pd.read_parquet(folder / "reference.parquet")
    assert expected["split"].value_counts().to_dict() == {"val": 12, "test": 12}
    expected = expected[expected["split"] == "test"].set_index("key").loc[predictions["key"]]
    said = expected[[f"class:{name}" for name in made_store.COLOURS]].idxmax(axis=1)
    assert said.str.removeprefix("class:").tolist() == predictions["predicted"].tolist()
    assert expected["confidence"].to_numpy() == pytest.approx(confidence, abs=1e-4)
    assert {path.name for path in folder.glob("*.png")} == {
        *("best.png", "typical.png", "worst.png", "confusion.png", "precision_recall.png"),
        *("reliability.png", "behaviour.png"),
    }
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 200 and picture.height > 30

    # The gate's question: the same bundle, the same tiles; and a class that it never saw.
    selection = filled.work("select") / "scene.parquet"
    model = bundle.load(filled.work("finetune@scene") / "model")
    answer = score(model, filled, selection)
    assert answer == {"accuracy": 1.0, "mean_f1": 1.0, "n": 12}
    table = pd.read_parquet(selection)
    table.loc[table["label"] == "Port", "label"] = "Harbour"
    table.to_parquet(selection, index=False)
    renamed = score(model, filled, selection)
    assert renamed["accuracy"] == pytest.approx(2 / 3)
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


def test_answers_of_several_positions_are_asked_for(filled: Any) -> None:
    config.edit(filled.params_file, {"evaluate.flips": 8, "finetune.scene.epochs": 2})
    figures = chain(filled)["evaluate"].figures
    # All eight positions together: turning the tile changes nothing.
    for name in ("mirrored", "turned_90", "turned_180", "turned_270"):
        assert figures[f"drop_{name}"] == figures[f"drop_{name}_high"] == 0


@pytest.mark.parametrize(
    ("gsd_m", "band"),
    [
        (0.3, "0 to 0.5 m"),
        (0.5, "0.5 to 1 m"),
        (2.9, "1 to 3 m"),
        (10, "10 m and more"),
        (float("nan"), "unknown"),
        (None, "unknown"),
    ],
)
def test_tiles_are_told_apart_by_their_ground_sampling_distance(gsd_m: Any, band: str) -> None:
    assert gsd_band(gsd_m) == band


def test_each_group_of_tiles_has_its_own_figures() -> None:
    right = np.array([1, 1, 0, 0, 0, 1])
    evidence = {
        "truth": np.eye(2, dtype=int)[np.zeros(6, int)],
        "scores": np.eye(2)[1 - right],
        "label": np.zeros(6, int),
        "predicted": 1 - right,
        "right": right == 1,
        "confidence": np.ones(6),
    }
    table = pd.DataFrame(
        {
            "gsd_m": [0.2, 0.3, 20.0, 20.0, None, None],
            "place": list("aabcde"),
            "key": list("abcdef"),
        }
    )
    tiles: Any = SimpleNamespace(table=table)
    rows = _groups(find("scene"), evidence, ["a", "b"], tiles, "gsd_m", 200)
    assert [(row["gsd"], row["tiles"], row["accuracy"]) for row in rows] == [
        ("0 to 0.5 m", 2, 1.0),
        ("10 m and more", 2, 0.0),
        ("unknown", 2, 0.5),
    ]
    assert (rows[2]["accuracy_low"], rows[2]["accuracy_high"]) == (0, 1)


def test_precision_over_recall_is_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    right = (random.random(80) < 0.4).astype(int)
    scores = np.round(right * 0.3 + random.random(80), 1)  # with ties
    curve = _curve(scores, right, int(right.sum()))
    precision, recall, _ = reference.precision_recall_curve(right, scores)
    assert curve.recall == pytest.approx(recall[:-1][::-1])
    assert curve.precision == pytest.approx(precision[:-1][::-1])
    assert curve.average == pytest.approx(reference.average_precision_score(right, scores))
    # Of objects that were never answered the curve ends before all are found.
    assert _curve(scores, right, 2 * int(right.sum())).recall[-1] == 0.5


def test_scenes_of_several_classes_are_evaluated_class_by_class(filled: Any) -> None:
    config.edit(filled.params_file, {"finetune.scene.multi_label": True})
    path = filled.work("select") / "scene.parquet"
    table = pd.read_parquet(path)
    names = {"Beach": "Sand;Water", "Forest": "Trees", "Port": "Water"}
    table["label"] = table["label"].map(names)
    table.to_parquet(path, index=False)
    report = chain(filled)["evaluate"]
    figures, folder = report.figures, filled.work("evaluate@scene")
    assert figures["test_map"] > 0.9 and figures["test_map_low"] <= figures["test_map_high"]
    # Without looking: each class as often as it is, so only Water, in two of three, is ever said.
    assert figures["trivial_accuracy"] == pytest.approx((1 / 2 + 0 + 1) / 3, abs=1e-3)
    assert "histogram_accuracy" not in figures and "test_ece" in figures
    assert [row["class"] for row in report.tables["per_class"]] == ["Sand", "Trees", "Water"]
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert list(predictions.columns[4:]) == [
        "scratch_predicted",
        *(f"{of}:{name}" for of in ("model", "scratch") for name in ("Sand", "Trees", "Water")),
    ]
    said = predictions[[f"model:{name}" for name in ("Sand", "Trees", "Water")]].to_numpy() >= 0.5
    by_hand = [";".join(np.array(["Sand", "Trees", "Water"])[row]) for row in said]
    assert predictions["predicted"].tolist() == by_hand
    assert (folder / "precision_recall.png").exists() and (folder / "reliability.png").exists()
    assert not (folder / "confusion.png").exists()


def test_curves_of_objects_have_the_task_s_average_precision() -> None:
    random = np.random.default_rng(0)
    tiles = []
    for _ in range(12):
        truth = Instances(
            random.integers(0, 2, 4), np.full(4, 900.0), difficult=random.random(4) < 0.2
        )
        found = Instances(random.integers(0, 2, 6), np.full(6, 900.0), random.random(6))
        tiles.append((found, truth, np.where(random.random((6, 4)) < 0.5, 0.8, 0.0)))
    evidence = average_precision.evidence(tiles, "voc")
    curves = dict(_curves(evidence, ["tank", "ship"]))
    rows = find("oriented").figures(evidence, ["tank", "ship"]).classes
    assert {row["class"] for row in rows} == curves.keys() == {"tank", "ship"}
    for row in rows:
        assert 0.05 < curves[row["class"]].average == pytest.approx(row["ap50"], abs=1e-6)
    hidden = average_precision.evidence(
        [(Instances(*[np.zeros(0, int)] * 3), tiles[0][1], np.zeros((0, 4)))], "voc"
    )
    assert all(not len(curve.recall) for curve in dict(_curves(hidden, ["tank", "ship"])).values())


@pytest.mark.slow
@pytest.mark.long
def test_real_scenes_are_told_apart_surely_better_than_without_looking(
    workspace: Any, aid: Path, tmp_path: Path
) -> None:
    for name in ("Desert", "Forest", "Port", "Beach"):
        (tmp_path / "aid" / name).mkdir(parents=True)
        for path in sorted((aid / name).iterdir())[:40]:
            shutil.copy(path, tmp_path / "aid" / name)
    config.edit(
        workspace.params_file,
        {
            **LONG_ENOUGH,
            "ingest.sources": [str(tmp_path / "aid")],
            "ingest.workers": 1,
            "finetune.scene.base_lr": 0.05,
        },
    )
    values = Config.load(workspace.params_file)
    ingest(values, workspace)
    run_stage(workspace, "select", lambda o: select(values, workspace, o))
    figures = chain(workspace)["evaluate"].figures
    assert figures["test_tiles"] >= 24
    assert figures["test_accuracy_low"] > figures["trivial_accuracy"] + 0.1
    # Deserts are yellow and forests green: whoever loses a band loses accuracy.
    assert figures["drop_band_lost_low"] > 0
    # Tiles seen from above, turned in training: turning them changes little.
    for turn in ("mirrored", "turned_90", "turned_180", "turned_270"):
        assert abs(figures[f"drop_{turn}"]) <= 0.15


@pytest.mark.parametrize(
    ("tiles", "best", "worst"), [(0, 0, 0), (1, 1, 0), (7, 4, 3), (60, 24, 24)]
)
def test_no_tile_is_among_the_best_and_the_worst(tiles: int, best: int, worst: int) -> None:
    found = sheets(np.arange(tiles), 24)
    assert found["best"].tolist() == list(range(best))
    assert found["worst"].tolist() == list(range(tiles - 1, tiles - 1 - worst, -1))
    assert len(found["typical"]) == min(tiles, 24)


def test_curves_of_pixels_are_those_of_every_pixel() -> None:
    torch.manual_seed(0)
    truth = torch.randint(0, 3, (4, 20, 20))
    logits = 2 * torch.randn(4, 3, 20, 20) + 2 * one_hot(truth, 3).permute(0, 3, 1, 2)
    truth[:, :4] = UNKNOWN
    probabilities = logits.softmax(1)
    parts = [dense.mask_evidence(probabilities[i : i + 2], truth[i : i + 2]) for i in (0, 2)]
    evidence = joined(parts)
    assert evidence["scores_pixels"].shape == (4, 3, dense.SCORES, 2)
    curves = dict(_curves(evidence, ["a", "b", "c"]))
    known = (truth != UNKNOWN).numpy()
    for number, name in enumerate(("a", "b", "c")):
        right = (truth == number).numpy()[known]
        scores = probabilities[:, number].numpy()[known]
        exact = reference.average_precision_score(right, scores)
        assert curves[name].average == pytest.approx(exact, abs=0.02)  # of 64 steps
        assert curves[name].recall[-1] == 1
        assert curves[name].precision[-1] == pytest.approx(right.mean())
    # A class that no tile has is no curve; nor is a sure answer lost at either end.
    none = dense.mask_evidence(torch.eye(2)[:, :, None, None], torch.zeros(2, 1, 1).long())
    assert list(dict(_curves(none, ["a", "b"]))) == ["a"]
    assert none["scores_pixels"][..., 0].sum() == 4
