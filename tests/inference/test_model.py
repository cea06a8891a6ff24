"""`ringmo.load`: a module for other people's code, whose normalisation nobody can forget."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import SENSORS, rgb, sar, write_model

import ringmo
from ringmo.errors import BadInput
from ringmo.registry import bundle
from ringmo.workspace import Workspace

CLASSES = ["airport", "forest", "river"]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_model(tmp_path / "scene", classes=CLASSES)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "encoder", sensors=("rgb", "sar"))


def batch(*images: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_importing_ringmo_loads_nothing_heavy() -> None:
    said = "import sys, ringmo; heavy = {'torch', 'timm', 'numpy', 'pydantic'}; "
    said += "print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_predict_and_embed_are_the_bundle_s_own_for_arrays_and_files(
    scene: Path, tmp_path: Path
) -> None:
    model, own = ringmo.load(scene), bundle.load(scene)
    images = [rgb(1), rgb(2, 70, 33)]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    assert np.array_equal(model.predict(images), own.predict(images))
    assert np.array_equal(model.predict([paths[0], str(paths[1])]), own.predict(images))
    assert np.array_equal(model.embed(paths), own.embed(images))
    assert model.classes == CLASSES and model.meta["kind"] == "scene" and not model.training


def test_forward_takes_pixels_as_they_are(scene: Path, encoder: Path) -> None:
    """No other scale, and no normalisation outside: forward and predict agree."""
    images = [rgb(1, 32, 32), rgb(2, 32, 32)]
    logits = ringmo.load(scene)(batch(*images))
    expected = ringmo.load(scene).predict(images)
    assert np.allclose(logits.softmax(-1).detach().numpy(), expected, atol=1e-6)

    model = ringmo.load(str(encoder))
    for name, pixels in (("rgb", images), ("sar", [sar(1), sar(2)])):
        features = model(batch(*pixels), name)
        assert features.shape == (2, 32, 4, 4)
        means = features.mean((2, 3)).detach().numpy()
        assert np.allclose(means, model.embed(pixels, sensor=name), atol=1e-6)
        assert torch.equal(features, model({name: batch(*pixels)}))


def test_the_normalisation_is_the_sensor_s(encoder: Path) -> None:
    power = sar(5)
    value = 10 * np.log10(np.maximum(power * 2.0, 1e-10))
    value = (np.clip(value, -40, 10) - SENSORS["sar"].mean) / SENSORS["sar"].std
    normal = ringmo.load(encoder).normalise(batch(power), "sar")[0].permute(1, 2, 0)
    assert np.allclose(normal.numpy(), value, atol=1e-4)


def test_where_the_module_goes_its_normalisation_goes(scene: Path) -> None:
    model = ringmo.load(scene).to("meta")
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert model(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 3)
    assert model._placed().device == "meta"


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_answers_do_not_depend_on_the_device(scene: Path, device: str) -> None:
    expected = bundle.load(scene).predict([rgb(1)])
    for model in (ringmo.load(scene).to(device), ringmo.load(scene, device=device)):
        assert {tensor.device.type for tensor in model.buffers()} == {device}
        assert np.allclose(model.predict([rgb(1)]), expected, atol=1e-3)


def test_it_trains_as_any_module(encoder: Path) -> None:
    """Gradients reach the stem, weights alone are weights, and a copy is a copy."""
    model = ringmo.load(encoder)
    copy = deepcopy(model)
    before = model.embed([rgb(1)], sensor="rgb")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.features(batch(rgb(1, 32, 32), rgb(2, 32, 32)), "rgb").square().mean().backward()
    assert model.encoder.stems["rgb"].convolutions[0].weight.grad.abs().sum() > 0
    optimizer.step()
    model.eval()
    assert not np.allclose(model.embed([rgb(1)], sensor="rgb"), before)
    assert np.array_equal(copy.embed([rgb(1)], sensor="rgb"), before)
    assert set(model.state_dict()) == {f"model.{name}" for name in model.model.state_dict()}


def test_what_does_not_fit_is_said_in_a_line(
    scene: Path, encoder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model = ringmo.load(scene)
    with pytest.raises(BadInput, match=r"this model reads \(B, 3, 32, 32\) of rgb"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(BadInput, match="name the sensor: this model reads rgb, sar"):
        ringmo.load(encoder)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(BadInput, match="has no classes"):
        ringmo.load(encoder).predict([rgb(1)])
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(BadInput, match=r"notes.txt: not an image"):
        model.predict([tmp_path / "notes.txt"])
    with pytest.raises(BadInput, match="holds no bundle"):
        ringmo.load(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="is no workspace"):
        ringmo.load("scene@champion")


@pytest.mark.slow
def test_a_registered_model_is_loaded_by_its_name(
    workspace: Workspace, monkeypatch: Any, tmp_path: Path
) -> None:
    from ringmo.config import Config
    from ringmo.registry import register

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_model(workspace.work("pretrain") / "encoder")
    register.register(Config.load(workspace.params_file), workspace, "encoder", {})
    for ref in ("encoder@candidate", "encoder/1"):
        model = ringmo.load(ref, workspace=workspace.root)
        assert model.hash == bundle.load(workspace.work("pretrain") / "encoder").hash
    with pytest.raises(BadInput, match="no such version"):
        ringmo.load("encoder/7", workspace=workspace.root)
