"""Images in, labels out; what is no image is set aside with its reason."""

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
