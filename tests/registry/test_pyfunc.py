"""MLflow's own loader answers with a champion, in a process that knows nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import promotion, pyfunc
from ringmo.registry.register import register
from ringmo.registry.tracker import tracking_uri
from ringmo.workspace import Workspace


def picture(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)


def test_arrays_paths_bytes_and_tables_give_the_same_answers(
    make_model: Any, tmp_path: Path
) -> None:
    model = pyfunc._load_pyfunc(str(make_model()))
    images = np.stack([picture(1), picture(2)])
    paths = [str(tmp_path / f"{i}.png") for i in (1, 2)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    encoded = [Path(path).read_bytes() for path in paths]
    expected = model.predict(images)
    assert list(expected.columns) == ["label", "confidence", "airport", "forest", "river"]
    assert np.allclose(expected[["airport", "forest", "river"]].sum(axis=1), 1)
    for same in (
        list(images),
        paths,
        pd.DataFrame({"image": paths}),
        pd.DataFrame({"image": encoded}),
    ):
        pd.testing.assert_frame_equal(model.predict(same), expected)
    assert len(model.predict(images[0])) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (pd.DataFrame({"file": ["x"]}), "column `image`"),
        (["missing.png"], "missing.png"),
        ([b"not an image"], "not an image"),
        (np.zeros((2, 8, 8, 3)), "image 0: pixels of float64, the model reads uint8"),
        ([np.zeros((8, 8), np.uint8)], "2 dimensions"),
        ([np.zeros((8, 8, 4), np.uint8)], "reads"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(make_model: Any, given: Any, says: str) -> None:
    model = pyfunc._load_pyfunc(str(make_model()))
    with pytest.raises(BadInput, match=says) as caught:
        model.predict(given)
    assert "\n" not in str(caught.value)


def test_an_encoder_has_no_classes_to_answer_with(make_model: Any) -> None:
    model = pyfunc._load_pyfunc(str(make_model(kind="encoder")))
    with pytest.raises(BadInput, match="encoder"):
        model.predict(picture(1))


@pytest.mark.slow
def test_a_fresh_process_loads_the_champion_by_alias(
    tracked: Workspace, config: Config, make_model: Any, tmp_path: Path
) -> None:
    make_model()
    register(config, tracked, "scene", {"verdict": "passed"})
    promotion.promote(tracked, "scene", by="ada", reason="")
    code = (
        "import json, mlflow, numpy as np\n"
        "model = mlflow.pyfunc.load_model('models:/scene@champion')\n"
        "answer = model.predict(np.zeros((2, 64, 64, 3), np.uint8))\n"
        "print(json.dumps(answer.to_dict('list')))"
    )
    env = os.environ | {
        "MLFLOW_TRACKING_URI": tracking_uri(tracked),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert len(answer["label"]) == 2 and set(answer) >= {"airport", "forest", "river"}
