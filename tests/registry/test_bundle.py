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
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


def meta(kind: str = "scene") -> dict[str, Any]:
    return {
        "kind": kind,
        "architecture": SMALL.model_dump(mode="json"),
        "image_size": 32,
        "sensor": "rgb",
        "bands": ["red", "green", "blue"],
        "mean": [120.0, 110.0, 100.0],
        "std": [58.0, 57.0, 56.0],
        "classes": ["Beach", "Forest", "Port"] if kind == "scene" else None,
        "generated": True,
        "lineage": {"selection": "ab"},
        "figures": {"val_accuracy": 0.5},
    }


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    bundle.write(tmp_path / "model", Classifier(encoder(SMALL, 3), 3), meta(), PICTURE)
    return tmp_path / "model"


def test_loaded_model_answers_as_the_written_one(tmp_path: Path) -> None:
    model = Classifier(encoder(SMALL, 3), 3)
    bundle.write(tmp_path, model, meta(), PICTURE)
    loaded = bundle.load(tmp_path)
    assert all(
        torch.equal(value, loaded.model.state_dict()[name])
        for name, value in model.state_dict().items()
    )
    loaded.check_example()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert loaded.meta["lineage"] == {"selection": "ab"} and loaded.meta["schema"] == 1


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
    for wrong in (PICTURE[:, :, :1], PICTURE[:, :, 0]):
        with pytest.raises(BadInput, match="shape"):
            bundle.load(scene).predict([wrong])


def test_an_encoder_embeds_and_does_not_classify(tmp_path: Path) -> None:
    bundle.write(tmp_path, encoder(SMALL, 3), meta("encoder"))
    loaded = bundle.load(tmp_path)
    loaded.check_example()
    assert loaded.embed([PICTURE, PICTURE]).shape == (2, 32)
    with pytest.raises(BadInput, match="fine-tune"):
        loaded.predict([PICTURE])


def test_same_model_same_bytes_and_hash(tmp_path: Path) -> None:
    model = Classifier(encoder(SMALL, 3), 3)
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
        ({"schema": 2}, "this version reads 1, found 2"),
        ({"kind": "segmentation"}, "kind"),
        ({"classes": None}, "classes"),
        ({"mean": [1.0]}, "mean"),
        ({"architecture": {"depths": [1], "num_heads": [3]}}, "architecture"),
        ({"bands": "__import__('os')"}, "bands"),
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
