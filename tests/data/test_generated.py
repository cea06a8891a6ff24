"""The generated world: the same again, complete or made again, and not told apart by colour."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_imagery import tree

from ringmo.data import generated
from ringmo.data.decode import decode


@pytest.fixture
def small_world(monkeypatch) -> None:
    monkeypatch.setattr(generated, "PER_CLASS", 4)
    monkeypatch.setattr(generated, "LARGE", ((600, 400),))


def test_same_world_again_and_an_unfinished_one_is_made_again(small_world, tmp_path):
    one = tree(generated.make(tmp_path / "one"))
    two = tmp_path / "two"
    (two / "airport").mkdir(parents=True)
    (two / "airport" / "half.tif").write_bytes(b"x")
    assert tree(generated.make(two)) == one
    times = {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    generated.make(two)
    assert {path: path.stat().st_mtime_ns for path in two.rglob("*")} == times


def test_generated_world_goes_in_with_classes_places_and_unlabelled_windows(
    small_world, run, manifest
):
    report = run("generated")
    tiles = manifest()
    assert report.figures["classes"] == len(generated.CLASSES) >= 6
    assert report.figures["overlapping"] == report.figures["near_duplicates"] == 0
    assert tiles["generated"].all()
    assert set(tiles["source_root"]) == {"generated"}
    assert tiles["crs"].eq("EPSG:32631").all()
    assert np.allclose(tiles["gsd_m"], generated.GSD_M)
    unlabelled = tiles[tiles["label"].isna()]
    assert len(unlabelled) == 6
    assert unlabelled["place"].nunique() == 1
    assert run("generated").figures["unchanged"]


@pytest.mark.slow
@pytest.mark.long
def test_colour_alone_does_not_tell_the_classes_apart(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    folder = generated.make(tmp_path / "world")

    def mean_colour(path: Path) -> Any:
        return decode(path.read_bytes()).mean(axis=(0, 1))

    files = [path for name in generated.CLASSES for path in sorted((folder / name).iterdir())]
    colours = np.array([mean_colour(path) for path in files])
    labels = [path.parent.name for path in files]
    model = LogisticRegression(max_iter=2000)
    share = cross_val_score(model, (colours - 128) / 64, labels, cv=4).mean()
    assert share < 0.5
