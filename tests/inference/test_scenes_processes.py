"""Scenes and processes: killed ones, several at once, and how much memory one takes."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import rasterio
from pixelwise import bundle_of, pixels, write_scene
from rasterio.transform import from_origin

from ringmo.errors import BadInput, Unreachable
from ringmo.inference import progress_folder, scenes, stac
from ringmo.inference.given import Given
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
@pytest.mark.long
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
@pytest.mark.long
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
    assert first.finished() == 1 and set(first.read(0, "x", "z")) == {"x"}
    assert first.read(0, "x")["x"].tolist() == [0, 1, 2]
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


def test_blocks_are_packed_in_a_hurry(tmp_path: Path) -> None:
    """At level 1: the default takes several times as long."""
    values = (np.arange(300_000) // 7 % 251).astype(np.uint8)
    folder = ProgressFolder(tmp_path / "work", {}, 1)
    folder.write(0, {"x": values})
    folder.close()
    with zipfile.ZipFile(tmp_path / "work" / "0000000.npz") as file:
        entry, raw = file.getinfo("x.npy"), file.read("x.npy")
    sizes = {level: len(zlib.compress(raw, level)) for level in (1, 6)}
    assert abs(entry.compress_size - sizes[1]) < abs(entry.compress_size - sizes[6])


def test_first_comers_with_other_settings_do_not_share_a_folder(tmp_path: Path) -> None:
    """Of many that come at once to what another model left, those of one model alone stay."""
    ProgressFolder(tmp_path / "work", {"model": "old"}, 3).close()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from ringmo.errors import BadInput\n"
        "from ringmo.inference.progress_folder import ProgressFolder\n"
        "Path(sys.argv[1] + '.' + sys.argv[3]).touch()\n"
        "while not Path(sys.argv[1]).exists(): pass\n"
        "try: folder = ProgressFolder(Path(sys.argv[2]), {'model': sys.argv[3][0]}, 3)\n"
        "except BadInput: print('refused')\n"
        "else: time.sleep(1); print(folder._read()['model'])\n"
    )
    go, names = tmp_path / "go", ["a1", "a2", "b1", "b2"]
    command = [sys.executable, "-c", code, str(go), str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    processes = [
        subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    limit = time.monotonic() + LIMIT_S
    while len(list(tmp_path.glob("go.*"))) < len(names) and time.monotonic() < limit:
        time.sleep(0.02)
    go.touch()
    said = [process.communicate(timeout=LIMIT_S)[0].strip() for process in processes]
    first = next(word for word in said if word != "refused")
    assert said == [first if name[0] == first else "refused" for name in names]


def test_who_comes_while_a_folder_goes_gets_a_new_one(tmp_path: Path, monkeypatch: Any) -> None:
    """Between the folder and the file in it, and between the file and its lock."""
    place, flock, going = tmp_path / "place", fcntl.flock, ["file", "folder"]
    opened = Path.open

    def open_late(path: Path, *how: Any) -> Any:
        if going and going[-1] == "folder" and path.name == "users.lock":
            going.pop()
            place.rmdir()
        return opened(path, *how)

    def lock_late(file: Any, how: int) -> None:
        if going and going[-1] == "file":
            going.pop()
            shutil.rmtree(place)
        flock(file, how)

    monkeypatch.setattr(Path, "open", open_late)
    monkeypatch.setattr(fcntl, "flock", lock_late)
    with progress_folder.joined(place) as users:
        assert not going and progress_folder.there(users, place)


def test_an_object_that_does_not_come_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def fetch(self, path: str, target: Path) -> None:
            target.write_bytes(b"half")
            raise Unreachable("no answer")

    class Whole:
        fetched = 0

        def fetch(self, path: str, target: Path) -> None:
            self.fetched += 1
            target.write_bytes(b"all")

    of: Any = SimpleNamespace(path="a.tif", size=3, mark=7)
    broken = Given("s3://b/a.tif", Path("a.tif"), cast(Any, Broken()), of)
    with pytest.raises(Unreachable), broken.here(tmp_path):
        raise AssertionError("nothing came")
    assert not list(tmp_path.iterdir())
    bucket = Whole()
    given = Given("s3://b/a.tif", Path("a.tif"), cast(Any, bucket), of)
    with given.here(tmp_path) as one, given.here(tmp_path) as other:  # nobody waits for another
        assert one == other and one.read_bytes() == b"all" and bucket.fetched == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_so_at_the_end_too(tmp_path: Path, monkeypatch: Any) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(60, 60))
    bundle = bundle_of()
    about = scenes.about(bundle, "segmentation/7")
    job = scenes.SceneJob(bundle, about, {"rgb": scene}, tmp_path / "out", "s")
    job.work()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "s.stac.json")

    monkeypatch.setattr(stac, "write", full)
    with pytest.raises(BadInput, match=r"s\.stac\.json: No space left on device"):
        job.deliver()
    job.close()
