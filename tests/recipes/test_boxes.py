"""The recipes for boxes on real imagery, all stages, with trainings of seconds; and the generated
car parks that one of them trains beside."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from real import REAL, REPOSITORY
from stages import prepared, taught

from ringmo import config
from ringmo.config import Config
from ringmo.data.boxes import read
from ringmo.inference.predict import predict
from ringmo.models.rotated import from_corners, pairwise_iou
from ringmo.workspace import init, template

RSOD, DOTA = REAL / "detection" / "rsod", REAL / "detection" / "dota"
GENERATOR = REPOSITORY / "docs" / "fields" / "generated_vehicles.py"
SHORT = {"pretrain.epochs": 2, "pretrain.warmup_epochs": 1, "evaluate.bootstrap_samples": 100}


def parks(folder: Path, count: int) -> Path:
    """Generated car parks, made as the page says."""
    subprocess.run([sys.executable, GENERATOR, folder, str(count)], check=True)
    return folder


def run(tmp_path: Path, recipe: str, task: str, **changes: Any) -> tuple[Any, Config, Any]:
    """All stages of a recipe with two epochs of each training; and the evaluation's report."""
    workspace = init(tmp_path / "workspace")
    given = config.recipe(template("recipes") / f"{recipe}.yaml")
    given |= SHORT | {f"finetune.{task}.epochs": 2, f"finetune.{task}.warmup_epochs": 1}
    config.edit(workspace.params_file, given | changes)
    values = Config.load(workspace.params_file)
    assert values.tasks == [task]
    prepared(values, workspace)
    report = taught(values, workspace, task)
    assert report.figures["trivial_map50"] == 0
    assert 0 <= report.figures["test_map50"] <= 1
    folder = workspace.work(f"evaluate@{task}")
    assert all((folder / name).stat().st_size for name in ("best.png", "precision_recall.png"))
    return workspace, values, report


def found(workspace: Any, task: str, image: Path) -> list[dict[str, Any]]:
    """The features of the answer's GeoJSON, each a polygon of four corners."""
    model = workspace.work(f"finetune@{task}") / "model"
    out = workspace.root / "answers"
    [answer] = predict(workspace, [str(image)], str(model), out=out)
    [file] = answer["files"]
    assert file.endswith(".geojson")
    said = json.loads(Path(file).read_text())
    assert said["type"] == "FeatureCollection"
    for feature in said["features"]:
        [ring] = feature["geometry"]["coordinates"]
        assert len(ring) == 5 and ring[0] == ring[-1]
    assert answer["boxes"] == len(said["features"]) >= sum(answer["objects"].values())
    features: list[dict[str, Any]] = said["features"]
    return features


@pytest.mark.slow
@pytest.mark.long
def test_the_chain_of_upright_boxes_runs_on_real_imagery(tmp_path: Path) -> None:
    if not RSOD.is_dir():
        pytest.skip("no real imagery beside the checkout")
    # Small images and large batches: what is seen here is the chain, not what it learns.
    short = {"image_size": 128, "batch_size": 8}
    changes = {f"finetune.detection.{name}": value for name, value in short.items()}
    changes["ingest.sources"] = [str(RSOD)]
    workspace, _, report = run(tmp_path, "aircraft-tanks", "detection", **changes)
    assert {row["class"] for row in report.tables["per_class"]} <= {
        *("aircraft", "oiltank", "overpass", "playground")
    }
    # A part of it that is no scene yet.
    image, (wide, high) = tmp_path / "aircraft.png", (1000, 800)
    Image.open(RSOD / "images" / "aircraft_139.jpg").crop((0, 0, wide, high)).save(image)
    for feature in found(workspace, "detection", image):
        corners = np.array(feature["properties"]["pixels"])
        assert (corners >= 0).all() and (corners <= [wide, high]).all()


@pytest.mark.slow
@pytest.mark.long
def test_the_chain_of_turned_boxes_runs_on_blocks_of_a_scene_beside_generated_ones(
    tmp_path: Path,
) -> None:
    import pandas as pd

    if not DOTA.is_dir():
        pytest.skip("no real imagery beside the checkout")
    sources = [str(DOTA), str(parks(tmp_path / "parks", 16))]
    more = {"ingest.sources": sources, "ingest.exclude": ["P0004*"]}
    more |= {"finetune.oriented.image_size": 64}
    workspace, _, report = run(tmp_path, "oriented-vehicles", "oriented", **more)
    tiles = pd.read_parquet(workspace.root / "data" / "store" / "manifest.parquet")
    real = tiles[tiles["source"].str.contains("P1888")]
    # Training, a tile that nobody uses, validation, another one, test.
    order = real.groupby("split")["col"].agg(["min", "max"])
    assert order.loc["train", "max"] + 128 < order.loc["val", "min"]
    assert order.loc["val", "max"] + 128 < order.loc["test", "min"]
    assert {row["class"] for row in report.tables["per_class"]} == {
        *("large-vehicle", "small-vehicle")
    }
    found(workspace, "oriented", DOTA / "images" / "P1888.png")


def test_generated_vehicles_are_where_their_labels_say(tmp_path: Path) -> None:
    folder = parks(tmp_path / "parks", 12)
    again = parks(tmp_path / "again", 12)
    differ = []
    for image in sorted((folder / "images").iterdir()):
        assert image.read_bytes() == (again / "images" / image.name).read_bytes()
        boxes = read(folder / "labelTxt" / f"{image.stem}.txt", (128, 128))
        corners = torch.tensor([box.points for box in boxes]).view(-1, 4, 2)
        assert ((corners > 0) & (corners < 128)).all()
        shapes = from_corners(corners)
        apart = pairwise_iou(shapes, shapes).fill_diagonal_(0)
        assert apart.numel() == 0 or apart.max() < 1e-3
        pixels = np.asarray(Image.open(image), np.float32)
        for box, shape in zip(boxes, shapes.tolist(), strict=True):
            long, wide = max(shape[2:4]), min(shape[2:4])
            least, most = {"small-vehicle": (15, 26), "large-vehicle": (36, 61)}[box.name]
            assert least < long < most and wide < 14
            mask = Image.new("L", (128, 128))
            ImageDraw.Draw(mask).polygon([tuple(point) for point in box.points], fill=1)
            inside = pixels[np.asarray(mask) > 0].mean(0)
            differ.append(np.abs(inside - np.median(pixels, (0, 1))).max())
    assert len(differ) > 20
    assert np.mean(np.array(differ) > 15) > 0.8
