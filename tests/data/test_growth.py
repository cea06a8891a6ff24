"""A store that grows and shrinks: other processes read, tiles leave, return and are compacted."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_imagery import class_folders, geotiff, pixels, tree, write

from ringmo.cli import main
from ringmo.config import Config
from ringmo.data import decisions, store
from ringmo.data.compact import compact
from ringmo.data.ingest import ingest
from ringmo.data.store import QUARANTINE, TileStore
from ringmo.errors import BadInput, Unreachable
from ringmo.workspace import Workspace, init


def everything(folder: Path) -> Path:
    """What readers can meet: small images, scenes to cut, bad files and files twice."""
    source = class_folders(folder, each=60)
    for i in range(3):
        geotiff(source / "class1" / f"scene{i}.tif", i, 9000 * i, 0, side=700, width=900, nodata=0)
    damaged = geotiff(source / "class1" / "scene9.tif", 9, 0, 90_000, side=500, width=500)
    damaged.write_bytes(damaged.read_bytes()[:-90_000])
    shutil.copy(source / "class1" / "scene1.tif", source / "class2" / "scene-again.tif")
    shutil.copy(source / "class0" / "0003.jpg", source / "class2" / "again.jpg")
    (source / "class0" / "empty.jpg").write_bytes(b"")
    return source


def copied(workspace: Workspace, folder: Path) -> Workspace:
    """A workspace with the same parameters and nothing else."""
    other = init(folder)
    shutil.copy(workspace.params_file, other.params_file)
    return other


def stored(workspace: Any, row: Any) -> bytes:
    return TileStore(workspace.store).read(row.shard, row.offset, row.size)


@pytest.mark.slow
@pytest.mark.long
def test_readers_in_other_processes_change_no_byte(run, workspace, monkeypatch, tmp_path):
    source = everything(tmp_path / "in")
    small: dict[str, Any] = {"ingest__tile_size": 64, "ingest__shard_mb": 0.5}
    # Few images are read by this process alone.
    monkeypatch.setattr("ringmo.data.ingest.FEW", 10_000)
    report = run(source, **small)
    alone = tree(workspace.store)
    assert report.figures["duplicates"] == 2
    assert report.figures["set_aside"] == 4
    assert len(TileStore(workspace.store).manifest()) > 300
    monkeypatch.setattr("ringmo.data.ingest.FEW", 0)
    for workers in (1, 3):
        other = copied(workspace, tmp_path / f"w{workers}")
        from ringmo import config

        config.edit(other.params_file, {"ingest.workers": workers})
        ingest(Config.load(other.params_file), other)
        assert tree(other.store) == alone


@pytest.mark.parametrize("readers", [0, 3])
def test_every_window_of_a_scene_of_many_groups_comes_once(
    readers, run, workspace, manifest, monkeypatch, tmp_path
):
    """Read by this process, and by several whose answers come in any order."""
    import random
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import contextmanager

    from ringmo.data import cluster, scenes

    monkeypatch.setattr(scenes, "GROUP_BYTES", 40_000)
    monkeypatch.setattr(scenes, "STRIP_GROUP_BYTES", 40_000)
    source = class_folders(tmp_path / "in", each=3)
    for i in range(4):
        geotiff(source / "class1" / f"scene{i}.tif", i, 9000 * i, 0, side=500, width=700)
    damaged = source / "class1" / "scene2.tif"
    damaged.write_bytes(damaged.read_bytes()[:-300_000])
    dice = random.Random(1)

    class Threads(cluster.Pool):
        ahead = cluster.AHEAD * readers

        def __init__(self, threads: Any) -> None:
            self.threads = threads

        def submit(self, function: Any, *args: Any, urgent: bool = False) -> Any:
            def later(*args: Any) -> Any:
                time.sleep(dice.random() / 50)
                return function(*args)

            return self.threads.submit(later, *args)

        def wait(self, promises: Any) -> None:
            time.sleep(0.001)

    @contextmanager
    def threads(*_: Any) -> Any:
        with ThreadPoolExecutor(readers) as pool:
            yield Threads(pool)

    if readers:
        monkeypatch.setattr(cluster, "pool", threads)
    report = run(source, ingest__tile_size=64)
    tiles = manifest()
    for i in (0, 1, 3):
        own = tiles[tiles["source"] == f"class1/scene{i}.tif"]
        assert len(own) == len(set(zip(own["row"], own["col"], strict=True))) == 8 * 11
        assert list(zip(own["row"], own["col"], strict=True)) == sorted(
            zip(own["row"], own["col"], strict=True)
        )
    assert list(aside(workspace)) == ["class1/scene2.tif"]
    assert report.figures["tiles"] == 9 + 3 * 88
    assert list(workspace.state.glob("spool/*")) == []


@pytest.fixture
def cluster(tmp_path: Path) -> Any:
    """A Dask scheduler and worker of other processes, as a cluster would have them; its address."""
    begun: list[subprocess.Popen[bytes]] = []
    found = tmp_path / "scheduler.json"

    def begin(*arguments: str) -> None:
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        quiet = subprocess.DEVNULL
        begun.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))

    begin("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
          "--scheduler-file", str(found))  # fmt: skip
    begin("dask_worker", "--scheduler-file", str(found), "--nworkers", "1", "--nthreads", "1",
          "--no-dashboard", "--local-directory", str(tmp_path / "dask"))  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not found.exists() or not found.read_text().strip():
            assert time.monotonic() < until
            time.sleep(0.1)
        yield json.loads(found.read_text())["address"], begun
    finally:
        for process in reversed(begun):
            process.send_signal(signal.SIGTERM)
        for process in begun:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.slow
def test_readers_begin_with_one_thread_each_and_keep_their_memory(tmp_path: Path) -> None:
    """glibc and BLAS look once, when a process begins."""
    from ringmo.data.cluster import MALLOC, THREADS, pool

    with pool(2, None, False, tmp_path) as readers:
        tasks = [readers.submit(Path("/proc/self/environ").read_bytes) for _ in range(2)]
        for task in tasks:
            began = dict(pair.split("=", 1) for pair in task.result().decode().split("\0") if pair)
            assert began.items() >= (MALLOC | dict.fromkeys(THREADS, "1")).items()


@pytest.mark.slow
@pytest.mark.long
def test_a_cluster_reads_by_its_address_and_its_absence_is_one_line(
    run, workspace, cluster, tmp_path
):
    source = class_folders(tmp_path / "in")
    run(source)
    alone = tree(workspace.store)
    address, begun = cluster
    shutil.rmtree(workspace.store)
    shutil.rmtree(workspace.state)
    run(source, ingest__dask=address)
    assert tree(workspace.store) == alone
    for process in begun:
        process.kill()
    class_folders(source, start=100, each=2)
    with pytest.raises(Unreachable) as error:
        run(source)
    assert address in str(error.value) and "\n" not in str(error.value)
    assert tree(workspace.store) == alone


@pytest.mark.slow
@pytest.mark.long
def test_a_reader_killed_at_work_is_replaced(workspace, tmp_path):
    from ringmo import config

    source = class_folders(tmp_path / "in", each=700)
    changes = {"ingest.sources": [str(source)], "ingest.workers": 2}
    config.edit(workspace.params_file, changes)
    command = [sys.executable, "-m", "ringmo", "ingest", "--workspace", str(workspace.root)]
    import psutil

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 90
        while not list(workspace.store.glob(".tiles-*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        readers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
        assert readers
        readers[0].kill()
        assert process.wait(120) == 0
    assert len(TileStore(workspace.store).manifest()) == 2100


def test_moved_and_touched_files_are_hashed_and_no_more(run, workspace, tmp_path, monkeypatch):
    source = class_folders(tmp_path / "in")
    run(source)
    before = tree(workspace.store)
    (source / "class0").rename(source / "classX")
    (source / "classX").rename(source / "class0")
    for path in source.rglob("*.jpg"):
        path.touch()

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("ringmo.data.scenes.look", never)
    report = run(source)
    assert report.figures["unchanged"] and report.figures["images_read"] == 36
    assert tree(workspace.store) == before
    assert run(source).figures["images_read"] == 0


def test_who_waits_is_told_for_whom(run, workspace, tmp_path, capsys):
    source = class_folders(tmp_path / "in", each=3)
    run(source)
    holder = (
        "import sys, time; from ringmo.workspace import Workspace; "
        "from ringmo.data.ingest import alone\n"
        "with alone(Workspace.find(sys.argv[1])): print('held', flush=True); time.sleep(2)"
    )
    command = [sys.executable, "-c", holder, str(workspace.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        run(source)
    assert f"process {other.pid}, since" in capsys.readouterr().err


def test_compacting_drops_what_left_and_keeps_every_live_byte(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in", each=20)
    geotiff(source / "class1" / "scene.tif", 1, 0, 0, side=300, width=300)
    small = {"ingest__tile_size": 64, "ingest__shard_mb": 0.02}
    run(source, **small)
    before = {row.key: stored(workspace, row) for row in manifest().itertuples()}
    splits = manifest().set_index("key")[["place", "split"]]
    gone = sorted((source / "class0").glob("*.jpg"))[:12]
    saved = [(path, path.read_bytes()) for path in gone]
    for path in gone:
        path.unlink()
    run(source, **small)
    size = sum(path.stat().st_size for path in workspace.store.glob("*.tar"))
    kept = sorted(path.name for path in workspace.store.glob("*.tar"))
    report = compact(workspace)
    assert report.figures["shards_removed"] >= 1
    assert sum(path.stat().st_size for path in workspace.store.glob("*.tar")) < size
    left = {path.name for path in workspace.store.glob("*.tar")} & set(kept)
    assert len(left) == len(kept) - report.figures["shards_removed"] > 0
    tiles = manifest()
    assert len(tiles) == len(before) - 12
    for row in tiles.itertuples():
        assert stored(workspace, row) == before[row.key]
        with tarfile.open(workspace.store / row.shard) as tar:
            assert row.member in tar.getnames()
    whole = tree(workspace.store)
    assert compact(workspace).figures["shards_removed"] == 0
    assert run(source, **small).figures["unchanged"]
    assert tree(workspace.store) == whole
    # What returns is read again, and is where it was: a test tile never becomes another.
    for path, data in saved:
        path.write_bytes(data)
    run(source, **small)
    after = manifest().set_index("key")
    assert (after[["place", "split"]].loc[splits.index] == splits).all(None)
    for row in manifest().itertuples():
        assert stored(workspace, row) == before[row.key]


COMPACT = """
import sys
from ringmo.workspace import Workspace
from ringmo.data.compact import compact
compact(Workspace.find(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["commit", "write_table", "unlink"])
def test_compaction_killed_at_any_point_leaves_a_whole_store(
    point, run, workspace, manifest, tmp_path
):
    source = class_folders(tmp_path / "in", each=20)
    run(source, ingest__shard_mb=0.02)
    for path in sorted((source / "class0").glob("*.jpg"))[::2]:
        path.unlink()
    run(source)
    before = {row.key: stored(workspace, row) for row in manifest().itertuples()}
    where = {
        "commit": "from ringmo.data.store import ShardWriter as C",
        "write_table": "import ringmo.data.store as C",
        "unlink": "from pathlib import Path as C",
    }[point]
    kill = f"""
import os, signal
{where}
real = C.{point}
def dies(*a, **k):
    real(*a, **k)
    if "{point}" != "unlink" or str(a[0]).endswith(".tar"):
        os.kill(os.getpid(), signal.SIGKILL)
C.{point} = dies
"""
    command = [sys.executable, "-c", kill + COMPACT, str(workspace.root)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert {row.key: stored(workspace, row) for row in manifest().itertuples()} == before
    compact(workspace)
    run(source)
    assert {row.key: stored(workspace, row) for row in manifest().itertuples()} == before
    named = set(manifest()["shard"])
    assert {path.name for path in workspace.store.glob("*.tar")} == named


def aside(workspace: Any) -> dict[str, tuple[str, str | None]]:
    rows = pq.read_table(workspace.store / QUARANTINE).to_pylist()
    return {row["source"]: (row["reason"], row["key"]) for row in rows}


def test_a_tile_set_aside_by_a_person_leaves_and_returns(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in", each=8)
    run(source)
    before = tree(workspace.store)
    chosen = manifest().set_index("source")["key"]["class1/0003.jpg"]
    decisions.set_aside(workspace.store, [chosen], by="Ada", reason="a wing of the aircraft")
    run(source)
    assert len(manifest()) == 23
    assert aside(workspace) == {
        "class1/0003.jpg": ("set aside by Ada: a wing of the aircraft", chosen)
    }
    assert run(source).figures["unchanged"]
    decisions.put_back(workspace.store, ["class1/*"], by="Bob", reason="it is a crane")
    report = run(source)
    assert report.figures["new_shards"] == 0
    assert tree(workspace.store)["tiles-000000.tar"] == before["tiles-000000.tar"]
    assert len(manifest()) == 24 and aside(workspace) == {}


def test_a_tile_that_lacks_too_much_is_set_aside_and_can_be_put_back(
    run, workspace, manifest, tmp_path
):
    source = class_folders(tmp_path / "in", each=8)
    geotiff(source / "class0" / "edge.tif", 5, 0, 0, side=48, nodata=0, hole=30)
    report = run(source)
    (source_name, (reason, key)) = next(iter(aside(workspace).items()))
    assert source_name == "class0/edge.tif" and reason.startswith("62% of it lacks data")
    assert report.figures["set_aside_reasons"] == {"too little data": 1}
    assert len(manifest()) == 24
    assert run(source).figures["unchanged"]
    decisions.put_back(workspace.store, [str(key)], by="Ada", reason="the coast itself")
    assert run(source).figures["new_shards"] == 0
    row = manifest().set_index("source").loc["class0/edge.tif"]
    assert row["split"] in ("train", "val", "test")
    data = TileStore(workspace.store).read(row["shard"], row["offset"], row["size"])
    assert data == (source / "class0" / "edge.tif").read_bytes()


@pytest.mark.parametrize(
    ("verb", "name", "said"),
    [
        ("set-aside", "nowhere.jpg", "no tile in manifest.parquet"),
        ("put-back", "nowhere.jpg", "no tile in quarantine.parquet"),
        ("put-back", "class0/empty.jpg", "there is no tile to put back"),
    ],
)
def test_a_decision_about_nothing_is_one_line(verb, name, said, run, workspace, tmp_path, capsys):
    source = class_folders(tmp_path / "in", each=8)
    (source / "class0" / "empty.jpg").write_bytes(b"")
    run(source)
    before = tree(workspace.store)
    where = ["--workspace", str(workspace.root)]
    # One wrong name and nothing is decided, also of what is there.
    assert main(["data", verb, "class0/0001.jpg", name, *where]) == 2
    assert main(["data", verb, name, *where]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert tree(workspace.store) == before


def test_the_command_decides_and_says_what_is_next(run, workspace, manifest, tmp_path, capsys):
    source = class_folders(tmp_path / "in", each=8)
    run(source)
    where = ["--workspace", str(workspace.root), "--by", "Ada", "--reason", "blurred"]
    assert main(["data", "set-aside", "class2/000?.jpg", *where]) == 0
    said = capsys.readouterr().out
    assert "8 to be set aside. Next: ringmo ingest" in said
    assert main(["ingest", *where[:2]]) == 0
    assert len(manifest()) == 16
    assert main(["data", "compact", *where[:2]]) == 0
    assert "freed_mb" in capsys.readouterr().out


def test_a_damaged_file_of_decisions_is_one_line(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in", each=4)
    run(source)
    (workspace.store / store.DECISIONS).write_text("{")
    with pytest.raises(BadInput, match=r"decisions.json is damaged"):
        run(source)


def test_a_full_disk_while_reading_stops_and_leaves_the_store(
    run, workspace, tmp_path, monkeypatch
):
    source = class_folders(tmp_path / "in", each=4)
    run(source)
    before = tree(workspace.store)
    class_folders(source, start=50, each=2)

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ringmo.data.store.segment", full)
    with pytest.raises(BadInput, match="No space left"):
        run(source)
    assert tree(workspace.store) == before


def test_the_same_window_twice_in_a_scene_is_one_tile(run, manifest, tmp_path):
    import numpy as np
    from PIL import Image

    path = tmp_path / "in" / "sea.png"
    path.parent.mkdir()
    tile = pixels(1, 64, 64)
    Image.fromarray(np.tile(tile, (3, 4, 1))).save(path)
    write(tmp_path / "in" / "other.png", 3, "PNG")
    report = run(path.parent, ingest__tile_size=64)
    assert len(manifest()) == 2
    assert report.figures["windows_skipped"] == 11
    assert run(path.parent).figures["unchanged"]
