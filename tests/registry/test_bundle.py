import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder
from ringmo.models.classifier import Classifier
from ringmo.registry import bundle

SMALL = Model(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
RGB = {
    "bands": ["red", "green", "blue"],
    "dtype": "uint8",
    "mean": [120.0, 110.0, 100.0],
    "std": [58.0, 57.0, 56.0],
}
# Sentinel-2 reflectance, elevation in metres, radar in decibels.
OTHERS = {
    "s2": {
        "bands": ["B2", "B3", "B4", "B8"],
        "dtype": "uint16",
        "mean": [1e3] * 4,
        "std": [500] * 4,
    },
    "dem": {"bands": ["height"], "dtype": "int16", "mean": [200.0], "std": [300.0]},
    "sar": {"bands": ["vv", "vh"], "dtype": "float32", "mean": [-12.0, -19.0], "std": [5.0, 6.0]},
}
# Whose pixels are no values yet.
STEPPED = {
    "landsat": {
        "bands": ["B4", "B5"],
        "dtype": "uint16",
        "scale": 2.75e-5,
        "offset": -0.2,
        "clip": [0.0, 1.0],
        "mean": [0.1, 0.3],
        "std": [0.05, 0.1],
    },
    "slc": {
        "bands": ["hh"],
        "dtype": "complex64",
        "decibels": True,
        "clip": [0.0, 90.0],
        "mean": [50.0],
        "std": [9.0],
    },
}
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


def meta(kind: str = "scene") -> dict[str, Any]:
    return {
        "kind": kind,
        "architecture": SMALL.model_dump(mode="json"),
        "image_size": 32,
        "sensors": {"rgb": RGB},
        "sensor": "rgb" if kind == "scene" else None,
        "classes": ["Beach", "Forest", "Port"] if kind == "scene" else None,
        "generated": True,
        "lineage": {"selection": "ab"},
        "figures": {"val_accuracy": 0.5},
    }


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    bundle.write(tmp_path / "model", Classifier(encoder(SMALL, {"rgb": 3}), 3), meta(), PICTURE)
    return tmp_path / "model"


def test_loaded_model_answers_as_the_written_one(tmp_path: Path) -> None:
    model = Classifier(encoder(SMALL, {"rgb": 3}), 3)
    bundle.write(tmp_path, model, meta(), PICTURE)
    loaded = bundle.load(tmp_path)
    assert all(
        torch.equal(value, loaded.model.state_dict()[name])
        for name, value in model.state_dict().items()
    )
    loaded.check_example()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert loaded.meta["lineage"] == {"selection": "ab"} and loaded.meta["schema"] == 3


def test_probabilities_for_images_of_any_size(scene: Path) -> None:
    loaded = bundle.load(scene)
    images = [PICTURE, PICTURE[:32, :32], PICTURE[:20, :10], np.tile(PICTURE, (3, 2, 1))]
    answers = loaded.predict(images)
    assert answers.shape == (4, 3) and answers.dtype == np.float32
    assert np.allclose(answers.sum(1), 1, atol=1e-5)
    one_by_one = np.concatenate([loaded.predict([image]) for image in images])
    assert np.allclose(answers, one_by_one, atol=1e-5)
    assert loaded.predict([]).shape == (0, 3)


def test_image_with_other_bands_is_refused(scene: Path) -> None:
    loaded = bundle.load(scene)
    for wrong, says in (
        (PICTURE[:, :, :1], "1 bands, the model reads 3"),
        (PICTURE[:, :, 0], "2 dimensions"),
        (PICTURE.astype("u2"), "pixels of uint16, the model reads uint8"),
        (PICTURE / 255, "pixels of float64, the model reads uint8"),
    ):
        with pytest.raises(BadInput, match=says):
            loaded.predict([wrong])


def test_an_encoder_embeds_and_does_not_classify(tmp_path: Path) -> None:
    bundle.write(tmp_path, encoder(SMALL, {"rgb": 3}), meta("encoder"))
    loaded = bundle.load(tmp_path)
    loaded.check_example()
    assert loaded.embed([PICTURE, PICTURE]).shape == (2, 32)
    assert loaded.embed([]).shape == (0, 32)
    with pytest.raises(BadInput, match="fine-tune"):
        loaded.predict([PICTURE])


def pixels(sensor: dict[str, Any], side: int = 40) -> Any:
    shape = (side, side, len(sensor["bands"]))
    noise = np.random.default_rng(1).normal(sensor["mean"], sensor["std"], shape)
    if sensor["dtype"] == "uint16":
        noise = noise.clip(0)
    return noise.astype(sensor["dtype"])


def test_an_encoder_of_several_sensors_embeds_each_as_its_own(tmp_path: Path) -> None:
    sensors = {"rgb": RGB, **OTHERS}
    trunk = encoder(SMALL, {name: len(sensor["bands"]) for name, sensor in sensors.items()})
    bundle.write(tmp_path, trunk, {**meta("encoder"), "sensors": sensors}, PICTURE)
    loaded = bundle.load(tmp_path)
    loaded.check_example()
    for name, sensor in sensors.items():
        image = pixels(sensor, 32)
        got = loaded.embed([image], sensor=name)
        normal = (image.astype("f4") - np.float32(sensor["mean"])) / np.float32(sensor["std"])
        with torch.inference_mode():
            features = trunk(torch.from_numpy(normal).permute(2, 0, 1)[None], name)
        assert np.allclose(got, features.mean((1, 2)).numpy(), atol=1e-5)
    with pytest.raises(BadInput, match="name the sensor"):
        loaded.embed([PICTURE])
    with pytest.raises(BadInput, match="`lidar` is unknown"):
        loaded.embed([PICTURE], sensor="lidar")
    with pytest.raises(BadInput, match="3 bands, the model reads 4"):
        loaded.embed([PICTURE], sensor="s2")


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_16_bits_and_of_floats_come_back_whole(tmp_path: Path, name: str) -> None:
    sensor = OTHERS[name]
    model = Classifier(encoder(SMALL, {name: len(sensor["bands"])}), 3)
    about = {**meta(), "sensors": {name: sensor}, "sensor": name}
    for example in (None, pixels(sensor)):
        bundle.write(tmp_path, model, about, example)
        loaded = bundle.load(tmp_path)
        loaded.check_example()
        assert loaded.example[bundle.EXAMPLE_IMAGE].dtype == getattr(torch, str(sensor["dtype"]))
    answers = loaded.predict([pixels(sensor), pixels(sensor, 32), pixels(sensor, 25)])
    assert np.allclose(answers.sum(1), 1, atol=1e-5)
    with pytest.raises(BadInput, match=f"pixels of uint8, the model reads {sensor['dtype']}"):
        loaded.predict([pixels(sensor).astype("u1")])
    if name == "sar":
        holes = pixels(sensor)
        assert np.allclose(loaded.predict([holes.astype("f8")]), answers[:1], atol=1e-5)
        holes[3, 4, 1] = np.nan
        with pytest.raises(BadInput, match="NaN"):
            loaded.predict([holes])


@pytest.mark.parametrize("name", STEPPED)
def test_a_bundle_knows_how_pixels_become_values(tmp_path: Path, name: str) -> None:
    sensor = STEPPED[name]
    model = Classifier(encoder(SMALL, {name: len(sensor["bands"])}), 3)
    bundle.write(tmp_path, model, {**meta(), "sensors": {name: sensor}, "sensor": name})
    loaded = bundle.load(tmp_path)
    loaded.check_example()
    assert loaded.meta["sensors"][name] == sensor
    random = np.random.default_rng(2)
    shape = (32, 32, len(sensor["bands"]))
    if name == "slc":
        image = (random.normal(0, 300, shape) + 1j * random.normal(0, 300, shape)).astype("c8")
        values = (10 * np.log10(np.abs(image) ** 2)).clip(0, 90)
    else:
        image = random.integers(7000, 44_000, shape, np.uint16)
        values = (image * 2.75e-5 - 0.2).clip(0, 1)
    normal = ((values - sensor["mean"]) / sensor["std"]).astype("f4")
    with torch.inference_mode():
        expected = model(torch.from_numpy(normal).permute(2, 0, 1)[None]).softmax(1)
    assert np.allclose(loaded.predict([image]), expected.numpy(), atol=1e-5)
    example = loaded.example[bundle.EXAMPLE_IMAGE].float()
    assert float(example.std()) > 0 and bool(torch.isfinite(example).all())


def test_a_model_of_int16_reads_uint16_that_fits(tmp_path: Path) -> None:
    model = Classifier(encoder(SMALL, {"dem": 1}), 3)
    bundle.write(tmp_path, model, {**meta(), "sensors": {"dem": OTHERS["dem"]}, "sensor": "dem"})
    loaded = bundle.load(tmp_path)
    heights = np.abs(pixels(OTHERS["dem"]))
    both = loaded.predict([heights, heights.astype(np.uint16)])
    assert (both[0] == both[1]).all()
    with pytest.raises(BadInput, match="100 % of its values of uint16 are over 32767"):
        loaded.predict([np.full((40, 40, 1), 50_000, np.uint16)])


def test_model_json_of_the_last_release_still_answers(scene: Path) -> None:
    """Schema 2 knew scenes alone, and no settings; sensors say no scale, offset or clip."""
    about = json.loads((scene / "model.json").read_text())
    assert sorted(about["sensors"]["rgb"]) == ["bands", "dtype", "mean", "std"]
    before = bundle.load(scene).predict([PICTURE])
    for name in ("settings", "tile_pixels"):
        about.pop(name, None)
    (scene / "model.json").write_text(json.dumps({**about, "schema": 2}))
    loaded = bundle.load(scene)
    loaded.check_example()
    assert np.array_equal(loaded.predict([PICTURE]), before)


@pytest.mark.parametrize("position", ["relative", "sincos"])
def test_a_vit_comes_back_whole(tmp_path: Path, position: str) -> None:
    vit = Model(
        backbone="vit", image_size=32, patch_size=8, embed_dim=16, depths=[2], num_heads=[2],
        position=position,  # type: ignore[arg-type]
    )  # fmt: skip
    for kind in ("encoder", "scene"):
        trunk = encoder(vit, {"rgb": 3}, finetuning=kind == "scene")
        model = Classifier(trunk, 3) if kind == "scene" else trunk
        about = {**meta(kind), "architecture": vit.model_dump(mode="json")}
        bundle.write(tmp_path / kind, model, about, PICTURE)
        bundle.load(tmp_path / kind).check_example()


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ({"embed_dim": 32}, "has another shape"),
        ({"depths": [1, 2]}, "missing"),
        ({"depths": [1], "num_heads": [2]}, "no place"),
        ({"image_size": 16}, "is not of the model"),
        ({"window_size": 2}, "is not of the model"),
        ({"stem": "patch"}, "missing"),
        ({"backbone": "vit", "depths": [2], "num_heads": [2]}, "missing"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    scene: Path, architecture: dict[str, Any], says: str
) -> None:
    path = scene / "model.json"
    about = json.loads(path.read_text())
    about["architecture"] |= architecture
    path.write_text(json.dumps(about))
    with pytest.raises(BadInput, match=says) as refused:
        bundle.load(scene)
    assert "\n" not in str(refused.value) and "model.safetensors" in str(refused.value)


def test_same_model_same_bytes_and_hash(tmp_path: Path) -> None:
    model = Classifier(encoder(SMALL, {"rgb": 3}), 3)
    for name in ("a", "b"):
        bundle.write(tmp_path / name, model, meta(), PICTURE)
    a, b = bundle.load(tmp_path / "a"), bundle.load(tmp_path / "b")
    assert a.hash == b.hash
    bundle.write(tmp_path / "b", model, {**meta(), "generated": False}, PICTURE)
    assert bundle.load(tmp_path / "b").hash != a.hash


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(scene: Path, share: float) -> None:
    weights = scene / "model.safetensors"
    os.truncate(weights, int(weights.stat().st_size * share))
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        bundle.load(scene)


def test_flipped_bit_is_refused(scene: Path) -> None:
    weights = scene / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadInput, match="damaged"):
        bundle.load(scene)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 1}, "this version reads 3, found 1"),
        ({"kind": "segmentatoin"}, "kind: .*did you mean `segmentation`"),
        ({"classes": None}, "classes"),
        ({"sensors": {"rgb": {**RGB, "mean": [1.0]}}}, "mean"),
        ({"sensors": {"rgb": {**RGB, "bands": "__import__('os')"}}}, "bands"),
        ({"sensors": {"rgb": {**RGB, "dtype": "object"}}}, "dtype"),
        ({"sensors": {"rgb": {**RGB, "mean": None, "std": None}}}, "a model needs their numbers"),
        ({"sensors": {"rgb": {**RGB, "scale": 0}}}, "scale"),
        ({"sensors": {}}, "sensors"),
        ({"sensor": "s2"}, "sensor"),
        ({"sensor": None}, "sensor"),
        ({"example": {}}, "example"),
        ({"architecture": {"depths": [1], "num_heads": [3]}}, "architecture"),
    ],
)
def test_model_json_that_makes_no_sense_is_refused_in_one_line(
    scene: Path, change: dict[str, Any], says: str
) -> None:
    path = scene / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadInput, match=says) as refused:
        bundle.load(scene)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_model_json_that_is_none_is_refused(scene: Path, text: str) -> None:
    (scene / "model.json").write_text(text)
    with pytest.raises(BadInput, match=r"model\.json"):
        bundle.load(scene)


def test_missing_files_are_refused(scene: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no bundle"):
        bundle.load(tmp_path)
    (scene / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="safetensors"):
        bundle.load(scene)


def test_pickle_in_place_of_weights_is_never_executed(scene: Path, tmp_path: Path) -> None:
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    data = pickle.dumps(Evil())
    (scene / "model.safetensors").write_bytes(data)
    path = scene / "model.json"
    changed = {**json.loads(path.read_text()), "weights_sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(changed))
    with pytest.raises(BadInput):
        bundle.load(scene)
    assert not (tmp_path / "executed").exists()


def test_example_tells_a_model_that_answers_otherwise(scene: Path) -> None:
    loaded = bundle.load(scene)
    with torch.no_grad():
        loaded.model.head.bias[0] += 0.01  # type: ignore[union-attr, operator, index]
    with pytest.raises(BadInput, match="example"):
        loaded.check_example()
    with torch.no_grad():
        loaded.model.head.bias[0] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(BadInput, match="example"):
        loaded.check_example()
