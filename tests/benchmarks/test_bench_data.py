"""The rows of imagery at scale: each runs, and none can be won by leaving work out."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imagery as made
import numpy as np
import pytest

from benchmarks import duplicates, growth
from benchmarks.imagery import BESIDE, ROOT, Source, prepare, scene
from benchmarks.ingest import Clock, timed
from ringmo.workspace import Workspace

ROWS = "ingest,cut,growth,validate,duplicates,versioning,dask"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = made.write_class_folders(tmp_path_factory.mktemp("images"), each=12)
    return Source.find(folder, folder)


@pytest.fixture
def grown(source: Source, tmp_path: Path) -> dict[str, Any]:
    """A store of 300 tiles made from six real ones, and six new images for it."""
    images = prepare(source, tmp_path / "images", 64, 12).train
    spec = {"workspace": str(tmp_path / "grown"), "from": str(images), "seed": 6}
    growth.make({**spec, "tiles": 300, "files": True})
    return spec


def test_the_generated_store_is_one_that_ingest_knows(grown: dict[str, Any]) -> None:
    workspace = Workspace(Path(grown["workspace"]))
    before = (workspace.store / "manifest.parquet").read_bytes()
    figures = timed(workspace)["figures"]
    assert (figures["tiles"], figures["new_tiles"], figures["unchanged"]) == (300, 0, True)
    assert (workspace.store / "manifest.parquet").read_bytes() == before


def test_growth_counts_only_where_every_new_image_came_in(grown: dict[str, Any]) -> None:
    spec = {**grown, "workers": 1}
    assert growth.grow(spec)["figures"]["tiles"] == 306
    for path in Path(grown["workspace"], "source").rglob("new-*"):
        path.unlink()
    # The scan cache knows these bytes now: nothing of them is read.
    with pytest.raises(SystemExit, match="new, came to"):
        growth.grow(spec)


def test_flipped_bits_are_as_many_as_asked_for() -> None:
    flipped = growth.flips(np.random.default_rng(0), 150_001, 0.1)
    assert len(flipped) == 150_001 and len(np.unique(flipped)) > 140_000
    assert np.bitwise_count(flipped).mean() == pytest.approx(6.4, abs=0.05)


def test_a_search_that_misses_a_pair_is_no_measurement(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringmo.data import lookalikes

    listed = tmp_path / "files.txt"
    listed.write_text("\n".join(map(str, source.files[:10])))
    spec = {"listed": str(listed), "hashes": 2000}
    found = duplicates.search(spec)
    assert found["checked"] >= 90 and found["pairs"] >= found["checked"]
    true = lookalikes.near_duplicates

    def all_but_one(*given: Any) -> Any:
        pairs = np.unique(np.array(list(true(*given))), axis=0)  # each from one band or more
        return pairs[1:]

    monkeypatch.setattr(lookalikes, "near_duplicates", all_but_one)
    with pytest.raises(SystemExit, match="missed"):
        duplicates.search(spec)


def test_a_function_is_charged_for_its_own_time_alone() -> None:
    clock = Clock()
    inner = clock.timing("inner", lambda: time.sleep(0.05))

    def outer() -> None:
        inner()
        time.sleep(0.01)
        inner()

    clock.timing("outer", outer)()
    assert 0.1 <= clock.seconds["inner"] < 0.2
    assert 0.01 <= clock.seconds["outer"] < 0.05


def test_scenes_are_made_of_real_pixels(source: Source, tmp_path: Path) -> None:
    import rasterio

    path = tmp_path / "scene.tif"
    scene(source, path, 1100)  # more than a strip high
    with rasterio.open(path) as opened:
        assert opened.shape == (1100, 1100) and opened.block_shapes[0] == (512, 512)
        pixels = opened.read()
    assert all(band[row : row + 100].std() > 5 for band in pixels for row in (0, 1000))


@pytest.mark.slow
@pytest.mark.long
def test_every_row_of_the_data_is_measured(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    data = str(source.files[0].parents[1])
    command = [sys.executable, "-m", "benchmarks", "--only", ROWS, "--images", "40"]
    command += ["--rounds", "1", "--data", data, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["failures"] == [] and len(found["rows"]) == 8
    for row in found["rows"]:
        if "13 bands" in row["what"] and not (BESIDE / "geotiff").is_dir():
            assert row["note"].startswith("not measured")
            continue
        assert row["ours"] > 0 and row["reached"] is not None, row
        if row["baseline"] is not None:
            assert math.isclose(row["ratio"], row["ours"] / row["baseline"])
        assert row["what"] in done.stdout
    assert sum(found["shares"].values()) == pytest.approx(100)
    assert {"decoding", "histograms", "perceptual hash", "cloud"} <= found["shares"].keys()
    assert "40 new JPEGs beside 4000 files" in done.stdout
