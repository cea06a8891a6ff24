"""From complex radar to a model that answers for it; what is null becomes numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning

from ringmo import config
from ringmo.config import Config, Sensor
from ringmo.data.ingest import ingest
from ringmo.data.selection import select
from ringmo.errors import BadInput
from ringmo.evaluation.evaluate import evaluate
from ringmo.inference.predict import predict
from ringmo.registry import bundle
from ringmo.stage import Report, run_stage
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain

SAR = {"bands": ["HH"], "dtype": "complex64", "decibels": True, "clip": [0, 90]}
SAR |= {"mean": None, "std": None}


def speckle(number: int, bright: bool) -> Any:
    """Circular Gaussian values over a coarse pattern: 40 or 60 dB of power, speckled."""
    random = np.random.default_rng(number)
    pattern = np.kron(random.uniform(0.3, 1, (6, 6)), np.ones((8, 8)))
    level = 10 ** ((60 if bright else 40) / 20)
    noise = random.normal(0, 1, (2, 48, 48))
    return (level * pattern * (noise[0] + 1j * noise[1])).astype(np.complex64)


def folders(root: Path, each: int = 16) -> Path:
    for number in range(2 * each):
        name = "town" if number % 2 else "lake"
        path = root / name / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            pytest.warns(NotGeoreferencedWarning),
            rasterio.open(
                path, "w", driver="GTiff", width=48, height=48, count=1, dtype="complex64"
            ) as target,
        ):
            target.write(speckle(number, bool(number % 2)), 1)
    return root


@pytest.fixture
def prepared(workspace: Any, tmp_path: Path) -> Config:
    changes = {
        "ingest.sources": [str(folders(tmp_path / "in"))],
        "sensors.sar": SAR,
        "select.sensor": "sar",
        "pretrain.mix": {"sar": 1.0},
        "pretrain.picture_every": 1,
    }
    config.edit(workspace.params_file, changes)
    values = Config.load(workspace.params_file)
    ingest(values, workspace)
    run(workspace, "select", values)
    return values


def run(workspace: Any, stage: str, values: Config) -> Report:
    does: dict[str, Any] = {
        "select": lambda out: select(values, workspace, out),
        "pretrain": lambda out: pretrain(values, workspace, out),
        "finetune@scene": lambda out: finetune(values, workspace, out, "scene"),
        "scratch@scene": lambda out: finetune(values, workspace, out, "scene", True),
        "evaluate@scene": lambda out: evaluate(values, workspace, out, "scene"),
    }
    return run_stage(workspace, stage, does[stage])


def test_a_sensor_without_numbers_trains_and_its_bundle_answers_alone(
    workspace: Any, prepared: Config, tmp_path: Path
) -> None:
    found = json.loads((workspace.work("select") / "normalisation.json").read_text())["sar"]
    for stage in ("pretrain", "finetune@scene", "scratch@scene"):
        run(workspace, stage, prepared)
    report = run(workspace, "evaluate@scene", prepared)
    assert report.figures["histogram_accuracy"] == 1
    known = {**SAR, "mean": found["mean"], "std": found["std"]}
    for place in ("pretrain/encoder", "finetune-scene/model", "scratch-scene/model"):
        meta = bundle.load_meta(workspace.root / "work" / place)
        assert meta["sensors"] == {"sar": known}

    workspace.params_file.write_text("schema: nothing of it is needed\n")
    model = bundle.load(workspace.work("finetune@scene") / "model")
    model.check_example()
    answers = predict(workspace, [str(tmp_path / "in" / "town")], str(model.folder))
    path = Path(answers[0]["image"])
    with rasterio.open(path) as scene:
        values = scene.read(1)
    # What the network saw, step by step: power, decibels, clip, normalised.
    power = np.abs(values.astype(np.complex128)) ** 2
    small = torch.from_numpy(power)[None, None].float()
    small = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear", antialias=True)
    decibels = (10 * small.log10()).clip(0, 90)
    normal = (decibels - found["mean"][0]) / found["std"][0]
    with torch.inference_mode():
        expected = model.model(normal).softmax(1)[0]
    asked = model.meta["classes"].index(answers[0]["label"])
    assert answers[0]["confidence"] == pytest.approx(float(expected[asked]), abs=1e-5)
    as_array = model.predict([values[..., None]])[0]
    assert as_array == pytest.approx(expected.numpy(), abs=1e-5)


def test_what_select_found_must_be_of_the_sensor_as_it_is(workspace: Any, prepared: Config) -> None:
    path = workspace.work("select") / "normalisation.json"
    config.edit(workspace.params_file, {"sensors.sar.clip": [10, 80]})
    changed = Config.load(workspace.params_file)
    with pytest.raises(BadInput, match=r"nothing of sensor `sar` as it is: run `ringmo select`"):
        run(workspace, "pretrain", changed)
    path.write_text("{")
    with pytest.raises(BadInput, match="damaged: run `ringmo select`"):
        run(workspace, "pretrain", prepared)
    path.unlink()
    with pytest.raises(BadInput, match="No such file or directory: run `ringmo select`"):
        run(workspace, "scratch@scene", prepared)


def test_an_encoder_of_other_steps_is_refused(workspace: Any, prepared: Config) -> None:
    run(workspace, "pretrain", prepared)
    config.edit(workspace.params_file, {"sensors.sar.decibels": False})
    with pytest.raises(BadInput, match="scale, offset, decibels and clip of sensor sar are") as no:
        run(workspace, "finetune@scene", Config.load(workspace.params_file))
    assert "\n" not in str(no.value)


def test_a_sensor_with_null_and_no_clip_is_told_so() -> None:
    for changes, said in (
        ({"clip": None}, "null, so that pixels of complex64 need clip"),
        ({"mean": [1.0]}, "both given, or both null"),
        ({"clip": [3, 3]}, "clip is"),
        ({"scale": 0}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Sensor.model_validate({**SAR, **changes})
