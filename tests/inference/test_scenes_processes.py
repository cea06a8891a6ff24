"""Scenes and processes: killed ones, several at once, and how much memory one takes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pixelwise import pixels, write_scene
from rasterio.transform import from_origin

from ringmo.errors import BadInput
from ringmo.inference.progress_folder import ProgressFolder

TESTS = Path(__file__).parents[1]
LIMIT_S = 180


def started(
    scene: Path, out: Path, seconds: float, side: int = 512, *go: str
) -> "subprocess.Popen[str]":
    command = [sys.executable, str(TESTS / "walked.py"), str(scene), str(out), str(seconds)]
    path = f"{TESTS.parent}{os.pathsep}{TESTS}"
    return subprocess.Popen(
        [*command, str(side), *go],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    told: dict[str, Any] = json.loads(said)
    return told


@pytest.mark.slow
def test_a_killed_walk_goes_on_and_two_share_the_rest(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(1500, 1500))
    alone = ended(started(scene, tmp_path / "alone", 0))
    out = tmp_path / "out"
    first = started(scene, out, 0.2)
    limit = time.monotonic() + LIMIT_S
    while len(list(out.glob(".s.work/*.npz"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [path.name for path in out.iterdir()] == [".s.work"]  # nothing half-written
    done = {path: path.stat().st_mtime_ns for path in out.glob(".s.work/*.npz")}
    assert 2 <= len(done) < 9
    go = tmp_path / "go"
    two = [started(scene, out, 0.2, 512, str(go)) for _ in range(2)]
    while len(list(tmp_path.glob("go.*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    go.touch()
    while two[0].poll() is None and two[1].poll() is None:
        time.sleep(0.05)  # what was done stays as it was, as long as it is there
        for path, moment in done.items():
            try:
                assert path.stat().st_mtime_ns == moment
            except FileNotFoundError:
                break
    told = [ended(process) for process in two]
    assert all(one["pixels"] > 0 for one in told)
    assert sum(one["pixels"] for one in told) <= 1500**2 - len(done) * 476**2
    assert sum(one["windows"] for one in told) < alone["windows"]
    with (
        rasterio.open(tmp_path / "alone" / "s.mask.tif") as one,
        rasterio.open(out / "s.mask.tif") as other,
    ):
        assert (one.read() == other.read()).all()
    assert not (out / ".s.work").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_scene(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels, of which 2 % are there: 1.2 GB as they lie in memory."""
    path, side = tmp_path / "sparse.tif", 20_000
    profile = {
        "driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8",
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate",
        "sparse_ok": True, "interleave": "pixel", "crs": "EPSG:32631",
        "transform": from_origin(300_000, 5_700_000, 0.5, 0.5),
    }  # fmt: skip
    part = pixels(2048, 2048).transpose(2, 0, 1)
    with rasterio.open(path, "w", **profile) as file:
        for row, col in ((5120, 16384), (17408, 9216)):
            file.write(part, window=((row, row + 2048), (col, col + 2048)))
    told = ended(started(path, tmp_path / "out", 0, 2048))
    assert told["peak_mb"] - told["before_mb"] < 1000
    with rasterio.open(tmp_path / "out" / "s.mask.tif") as file:
        assert file.shape == (side, side) and file.overviews(1)[-1] >= 32
        assert (file.read(1, window=((5120, 7168), (16384, 18432))) < 3).all()
        assert (file.read(1, window=((9000, 10000), (0, 1000))) == 255).all()
    assert (tmp_path / "out" / "s.mask.tif").stat().st_size < 40e6


def test_a_folder_of_other_settings_begins_anew_unless_it_is_in_use(tmp_path: Path) -> None:
    first = ProgressFolder(tmp_path / "work", {"model": "a"}, 3)
    assert first.claim(0) and not first.claim(0)
    first.write(0, {"x": np.arange(3), "y": np.ones(2, np.float32)})
    assert first.read(0)["x"].tolist() == [0, 1, 2] and first.finished() == 1
    with pytest.raises(BadInput, match="other settings"):
        ProgressFolder(tmp_path / "work", {"model": "b"}, 3)
    first.close()
    again = ProgressFolder(tmp_path / "work", {"model": "a"}, 3)
    assert again.done(0) and not again.claim(0) and again.claim(1)
    again.close()
    other = ProgressFolder(tmp_path / "work", {"model": "b"}, 3)
    assert not other.done(0)
    other.remove()
    assert not (tmp_path / "work").exists()
