"""Images in, labels out; what is no image is set aside with its reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from ringmo.config import Config
from ringmo.errors import BadInput, Unreachable
from ringmo.inference.predict import find_images, predict, text
from ringmo.models.backbone import encoder
from ringmo.models.classifier import Classifier
from ringmo.registry import bundle
from ringmo.workspace import Workspace

CLASSES = ["airport", "forest", "river", "square", "stadium", "school"]


@pytest.fixture
def model(workspace: Workspace, tmp_path: Path) -> str:
    return str(write_model(workspace, tmp_path / "bundle"))


def write_model(workspace: Workspace, folder: Path, classes: list[str] | None = CLASSES) -> Path:
    config = Config.load(workspace.params_file)
    torch.manual_seed(3)
    trunk = encoder(config.model, {"rgb": 3}, finetuning=bool(classes))
    meta = {
        "kind": "scene" if classes else "encoder",
        "architecture": config.model.model_dump(),
        "image_size": config.model.image_size,
        "sensors": {"rgb": config.sensors["rgb"].model_dump()},
        "sensor": "rgb",
        "classes": classes,
        "generated": False,
        "lineage": {},
        "figures": {},
    }
    made = Classifier(trunk, len(classes)) if classes else trunk
    bundle.write(folder, made, meta, pixels(0))
    return folder


def pixels(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A JPEG, a PNG with alpha and a GeoTIFF, and beside them a text and a broken file."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(pixels(1)).save(folder / "a.jpg")
    Image.fromarray(np.dstack([pixels(2), np.full((40, 50), 255, np.uint8)])).save(folder / "b.PNG")
    profile = {"driver": "GTiff", "width": 50, "height": 40, "count": 3, "dtype": "uint8"}
    with rasterio.open(folder / "deeper" / "c.tif", "w", photometric="RGB", **profile) as scene:
        scene.write(pixels(3).transpose(2, 0, 1))
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_every_image_of_a_folder_is_labelled(
    workspace: Workspace, model: str, images: Path
) -> None:
    answers = predict(workspace, [str(images)], model, top=3, batch_size=2)
    assert [Path(a["image"]).name for a in answers] == ["a.jpg", "b.PNG", "c.tif"]
    for answer in answers:
        assert answer["label"] in CLASSES and answer["label"] == answer["top"][0]["label"]
        probabilities = [row["probability"] for row in answer["top"]]
        assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
        assert answer["confidence"] == probabilities[0] <= 1
    assert "a.jpg" in text(answers)


def test_answers_are_the_bundle_s_own(workspace: Workspace, model: str, images: Path) -> None:
    (answer,) = predict(workspace, [str(images / "deeper" / "c.tif")], model, top=6)
    expected = bundle.load(Path(model)).predict([pixels(3)])[0]
    got = {row["label"]: row["probability"] for row in answer["top"]}
    assert np.allclose([got[name] for name in CLASSES], expected)


def test_what_cannot_be_read_is_set_aside_with_its_reason(
    workspace: Workspace, model: str, images: Path, capsys: Any
) -> None:
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:300])
    Image.fromarray(pixels(1)[:, :, 0]).save(images / "grey.png")
    answers = predict(workspace, [str(images)], model)
    errors = {Path(a["image"]).name: a["error"] for a in answers if "error" in a}
    assert set(errors) == {"broken.jpg", "grey.png"}
    assert errors["grey.png"] == "1 bands, the model reads 3"
    assert sum("label" in answer for answer in answers) == 3
    assert "2 of 5 images" in capsys.readouterr().err
    assert "not read: " in text(answers)


def test_when_nothing_can_be_read_it_is_bad_input(
    workspace: Workspace, model: str, images: Path
) -> None:
    with pytest.raises(BadInput, match="not an image"):
        predict(workspace, [str(images / "notes.txt")], model)


def test_files_folders_and_globs_are_each_taken_once(images: Path) -> None:
    given = [str(images / "a.jpg"), str(images), str(images / "**" / "*.tif")]
    assert [path.name for path in find_images(given)] == ["a.jpg", "b.PNG", "c.tif"]
    for nothing in ("missing.jpg", str(images / "*.bmp")):
        with pytest.raises(BadInput, match="no such file"):
            find_images([nothing])


def test_answers_are_written_where_asked(
    workspace: Workspace, model: str, images: Path, tmp_path: Path
) -> None:
    predict(workspace, [str(images / "a.jpg")], model, out=tmp_path / "out")
    assert '"label"' in (tmp_path / "out" / "predictions.json").read_text()


def test_an_encoder_has_no_labels_to_give(
    workspace: Workspace, images: Path, tmp_path: Path
) -> None:
    folder = write_model(workspace, tmp_path / "encoder", classes=None)
    with pytest.raises(BadInput, match="encoder"):
        predict(workspace, [str(images)], str(folder))


def test_a_registry_out_of_reach_is_said_so(
    workspace: Workspace, images: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Unreachable):
        predict(workspace, [str(images)], "scene@champion")


@pytest.mark.parametrize("crs", [None, "EPSG:32631", "EPSG:32601"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rings_of_boxes_run_counter_clockwise(tmp_path: Path, crs: Any, mirrored: bool) -> None:
    import shapely
    from rasterio.transform import from_origin

    from ringmo.inference.answers import _write_boxes

    points = [[10.0, 20.0], [30.0, 25.0], [28.0, 40.0], [8.0, 35.0]]
    box = {"class": "ship", "score": 0.9, "points": points[::-1] if mirrored else points}
    # At the western edge of zone 1 the longitudes go from 180 to -180.
    place = None if crs is None else from_origin(301_500, 6e6, 100, 100)
    path = tmp_path / "boxes.geojson"
    _write_boxes(path, [box], crs, place)
    [feature] = json.loads(path.read_text())["features"]
    [ring] = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1] and len(ring) == 5
    if crs == "EPSG:32601":
        assert {x > 0 for x, _ in ring} == {True, False}
        ring = [(x % 360, y) for x, y in ring]
    polygon = shapely.Polygon(ring)
    assert polygon.is_valid and polygon.exterior.is_ccw


def test_objects_are_counted_from_a_score_of_one_half() -> None:
    from ringmo.inference.answers import summed_up

    def box(name: str, score: float) -> dict[str, Any]:
        return {"class": name, "score": score, "points": []}

    boxes = [box("ship", 0.9), box("ship", 0.5), box("tank", 0.7), box("tank", 0.06)]
    told = summed_up({"boxes": boxes}, ["ship", "tank"])
    assert told["objects"] == {"ship": 2, "tank": 1} and told["boxes"] == 4
    assert told["said"] == "2 ship, 1 tank (score from 0.5; 1 more below)"
    assert summed_up({"boxes": boxes[3:]}, [])["said"].startswith("no objects (score from 0.5; 1")
