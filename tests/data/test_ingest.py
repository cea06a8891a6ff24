"""The promises of ingest: whole or not at all, nothing twice, nothing moved between splits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_imagery import class_folders, encoded, geotiff, pixels, tree, write

from ringmo.data.decode import decode
from ringmo.data.store import ADDED, MANIFEST, QUARANTINE, TileStore
from ringmo.errors import BadInput


def reasons(workspace: Any) -> dict[str, str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(workspace.store / QUARANTINE).to_pylist()
    return {row["source"]: row["reason"] for row in rows}


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_tiles_come_back_as_the_bytes_that_went_in(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in")
    report = run(source)
    tiles, shop = manifest(), TileStore(workspace.store)
    assert report.figures["tiles"] == report.figures["new_tiles"] == len(tiles) == 36
    assert report.figures["classes"] == 3
    assert sorted(tiles["label"].unique()) == ["class0", "class1", "class2"]
    for row in tiles.itertuples():
        data = shop.read(row.shard, row.offset, row.size)
        assert data == (source / row.source).read_bytes()
        assert decode(data).shape == (row.height, row.width, row.bands)
    with tarfile.open(workspace.store / tiles["shard"][0]) as tar:
        assert sorted(tar.getnames()) == sorted(tiles["member"])
        assert {member.mtime for member in tar} == {0}


def test_nothing_new_writes_nothing(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in")
    write(source / "class0" / "empty.jpg", 1).write_bytes(b"")
    run(source)
    before, times = tree(workspace.store), stamps(workspace.store)
    assert run(source).figures["unchanged"]
    shutil.rmtree(workspace.state)  # losing the scan cache costs reading again, nothing else
    assert run(source).figures["unchanged"]
    assert tree(workspace.store) == before
    assert stamps(workspace.store) == times


def test_new_images_add_a_shard_and_touch_none(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in")
    run(source)
    first, times, before = tree(workspace.store), stamps(workspace.store), manifest()
    class_folders(source, start=100, each=4)
    report = run(source)
    assert (report.figures["new_tiles"], report.figures["new_shards"]) == (12, 1)
    assert tree(workspace.store)["tiles-000000.tar"] == first["tiles-000000.tar"]
    assert stamps(workspace.store)["tiles-000000.tar"] == times["tiles-000000.tar"]
    after = manifest().set_index("key").loc[before["key"]].reset_index()
    assert after.equals(before)
    history = json.loads((workspace.store / "history.json").read_text())["ingests"]
    assert [entry["tiles"] for entry in history] == [36, 48]


def test_corrected_label_changes_a_row_and_no_shard(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in")
    run(source)
    before, files = manifest().set_index("key"), tree(workspace.store)
    (source / "class0" / "0003.jpg").rename(source / "class1" / "moved.jpg")
    report = run(source)
    after = manifest().set_index("key")
    assert report.figures["new_tiles"] == 0
    changed = [key for key in before.index if after["label"][key] != before["label"][key]]
    assert [after["source"][key] for key in changed] == ["class1/moved.jpg"]
    assert (after["split"][before.index] == before["split"]).all()
    now = tree(workspace.store)
    assert now["tiles-000000.tar"] == files["tiles-000000.tar"]
    assert sorted(now) == sorted(files)


def test_switching_sources_drops_rows_and_coming_back_keeps_their_splits(
    run, workspace, manifest, tmp_path
):
    one = class_folders(tmp_path / "one")
    two = class_folders(tmp_path / "two", start=500)
    run(one)
    before = manifest()
    run(two)
    assert not set(manifest()["key"]) & set(before["key"])
    report = run(one)
    assert report.figures["new_tiles"] == report.figures["new_shards"] == 0
    assert manifest().equals(before)


def test_same_ingests_give_the_same_bytes(run, workspace, tmp_path):
    from ringmo.workspace import init

    source = class_folders(tmp_path / "in", each=5)
    run(source)
    class_folders(source, start=50, each=3)
    run(source)
    first = tree(workspace.store)
    other = init(tmp_path / "elsewhere")
    shutil.copy(workspace.params_file, other.params_file)
    for file in source.glob("*/005?.jpg"):
        file.unlink()
    from ringmo.config import Config
    from ringmo.data.ingest import ingest

    ingest(Config.load(other.params_file), other)
    class_folders(source, start=50, each=3)
    ingest(Config.load(other.params_file), other)
    assert tree(other.store) == first


def test_every_kind_of_bad_file_is_set_aside_with_its_reason(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in", each=12)
    bad = source / "class0"
    whole = (bad / "0001.jpg").read_bytes()
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "cut.jpg").write_bytes(whole[:-200])
    (bad / "half.png").write_bytes(encoded(pixels(9))[:900])
    (bad / "text.jpg").write_text("not an image at all")
    (bad / "archive.png").write_bytes(b"PK\x03\x04\x14\x00\x01\x00" + bytes(200))
    (bad / "copy.jpg").write_bytes(whole)
    (source / "class1" / "other.jpg").write_bytes(whole)
    Image.fromarray(pixels(8)).convert("L").save(bad / "grey.png")
    Image.fromarray(pixels(7).astype(np.uint16)[:, :, 0] * 200).save(bad / "deep.png")
    (bad / "really_jpeg.png").write_bytes(encoded(pixels(777), "JPEG"))
    (bad / "notes.txt").write_text("flown in May")
    (bad / "labels.csv").write_text("a,b")
    geotiff(bad / "broken.tif", 5, 0, 0)
    data = (bad / "broken.tif").read_bytes()
    (bad / "broken.tif").write_bytes(data[: len(data) // 2])
    report = run(source, ingest__max_bad_share=0.5)
    found = reasons(workspace)
    assert found["class0/empty.jpg"] == "empty file"
    assert "Premature end" in found["class0/cut.jpg"]
    assert "damaged" in found["class0/half.png"]
    assert "not an image" in found["class0/text.jpg"]
    assert "not an image" in found["class0/archive.png"]
    assert found["class0/copy.jpg"] == "same pixels as class0/0001.jpg"
    assert found["class1/other.jpg"] == "same image as class0/0001.jpg under another class"
    assert "nearest: rgb" in found["class0/grey.png"]
    assert "uint16" in found["class0/deep.png"]
    assert "damaged" in found["class0/broken.tif"]
    assert len(found) == report.figures["set_aside"] == 10
    assert report.figures["other_files"] == 2
    assert "class0/really_jpeg.png" in set(manifest()["source"])
    assert report.figures["tiles"] == 37


def test_too_many_bad_images_stop_with_the_store_untouched(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in", each=6)
    run(source)
    before, times = tree(workspace.store), stamps(workspace.store)
    class_folders(source, each=3, start=50)
    for i in range(8):
        (source / "class0" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match=r"8 of 35 images cannot be used \(8 of them: empty file"):
        run(source)
    assert tree(workspace.store) == before
    assert stamps(workspace.store) == times


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "only text", "all bad"])
def test_a_source_without_imagery_is_one_line(kind, run, workspace, tmp_path):
    source = tmp_path / "in"
    if kind == "file":
        source.write_text("x")
    elif kind != "missing":
        source.mkdir()
        if kind != "empty":
            (source / ("a.txt" if kind == "only text" else "a.jpg")).write_text("words")
    with pytest.raises(BadInput) as error:
        run(source)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (workspace.store / MANIFEST).exists()


def test_a_bomb_is_set_aside(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in")
    Image.new("RGB", (12_000, 9_000)).save(source / "class0" / "bomb.png", compress_level=9)
    run(source)
    assert "bomb" in reasons(workspace)["class0/bomb.png"]


def test_large_scene_is_cut_losslessly_into_one_place(run, workspace, manifest, tmp_path):
    scene = tmp_path / "in" / "scene.tif"
    geotiff(scene, 1, 500_000, 4_000_000, side=150, width=230, gsd=2.0)
    run(scene.parent, ingest__tile_size=64)
    tiles = manifest()
    assert sorted(set(tiles["row"])) == [0, 64, 86]
    assert sorted(set(tiles["col"])) == [0, 64, 128, 166]
    assert tiles["place"].nunique() == tiles["split"].nunique() == 1
    assert tiles["gsd_m"].unique() == [2.0]
    whole, shop = pixels(1, width=230, height=150), TileStore(workspace.store)
    for t in tiles.itertuples():
        tile = decode(shop.read(t.shard, t.offset, t.size))
        assert (tile == whole[t.row : t.row + 64, t.col : t.col + 64]).all()
        assert (t.minx, t.maxy) == (500_000 + 2 * t.col, 4_000_000 - 2 * t.row)


def test_windows_of_nodata_are_left_out_and_counted(run, manifest, tmp_path):
    geotiff(tmp_path / "in" / "s.tif", 1, 0, 0, side=150, width=256, nodata=0, hole=100)
    report = run(tmp_path / "in", ingest__tile_size=64)
    tiles = manifest()
    assert report.figures["windows_skipped"] == 6
    assert set(tiles["col"]) == {128, 192}
    assert len(tiles) == 6


def test_scene_with_a_damaged_part_leaves_nothing_behind(run, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in")
    scene = geotiff(source / "class0" / "z.tif", 1, 0, 0, side=300, width=300)
    with scene.open("r+b") as file:
        file.truncate(scene.stat().st_size * 2 // 3)
    run(source, ingest__tile_size=64)
    assert "class0/z.tif" in reasons(workspace)
    assert len(manifest()) == 36
    with tarfile.open(workspace.store / "tiles-000000.tar") as tar:
        assert len(tar.getnames()) == 36


def test_folders_of_a_layout_are_no_classes_and_masks_no_imagery(run, manifest, tmp_path):
    for i in range(5):
        write(tmp_path / "in" / "images" / f"{i}.png", i, "PNG")
        write(tmp_path / "in" / "masks" / f"{i}.png", 50 + i, "PNG")
    report = run(tmp_path / "in")
    assert report.figures["tiles"] == 5
    assert report.figures["other_files"] == 5
    assert manifest()["label"].isna().all()


def test_unlabelled_folder_beside_classes_has_no_label(run, manifest, tmp_path):
    source = class_folders(tmp_path / "in")
    write(source / "unlabelled" / "x.jpg", 77)
    run(source)
    tiles = manifest().set_index("source")
    assert tiles["label"].isna().sum() == 1
    assert tiles["label"].isna()["unlabelled/x.jpg"]
    run(source, ingest__labels="none")
    assert manifest()["label"].isna().all()


def test_damaged_manifest_is_one_line_and_left_alone(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in", each=4)
    run(source)
    path = workspace.store / MANIFEST
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:400] + b"\xff" * 64 + whole[464:]):
        path.unlink()
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="damaged"):
            run(source)
        with pytest.raises(BadInput, match="damaged"):
            TileStore(workspace.store).manifest()
        assert path.read_bytes() == damage


INGEST = """
import sys
from pathlib import Path
from ringmo.config import Config
from ringmo.workspace import Workspace
from ringmo.data.ingest import ingest
w = Workspace.find(sys.argv[1])
ingest(Config.load(w.params_file), w)
"""


@pytest.mark.slow
def test_ingest_killed_at_any_moment_ends_as_if_never_killed(run, workspace, tmp_path):
    from ringmo.workspace import init

    source = class_folders(tmp_path / "in", each=150)
    for i in range(2):
        geotiff(source / "unlabelled" / f"{i}.tif", i, 9000 * i, 0, side=600, width=700)
    run(source, ingest__shard_mb=0.2, ingest__tile_size=64)
    whole = tree(workspace.store)
    killed = init(tmp_path / "killed")
    shutil.copy(workspace.params_file, killed.params_file)
    command = [sys.executable, "-c", INGEST, str(killed.root)]
    rng, at_work = random.Random(3), 0
    for _ in range(6):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 60
            while not list(killed.store.glob(".tiles-*")) and process.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.9))
            at_work += process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
        if (killed.store / MANIFEST).exists():
            assert tree(killed.store)[MANIFEST] == whole[MANIFEST]
            shutil.rmtree(killed.store)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert at_work >= 3
    assert tree(killed.store) == whole


@pytest.mark.slow
def test_two_ingests_at_once_do_as_one_after_the_other(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in", each=60)
    run(source)
    whole = tree(workspace.store)
    shutil.rmtree(workspace.store)
    shutil.rmtree(workspace.state)
    command = [sys.executable, "-c", INGEST, str(workspace.root)]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert tree(workspace.store) == whole


def test_real_aerial_scenes_go_in(run, manifest, aid):
    report = run(aid / "Airport", aid / "Beach")
    assert report.figures["tiles"] == 240
    assert report.figures["set_aside"] == 0
    assert manifest()["sharpness"].gt(0).all()


def test_a_list_is_ingested_and_what_it_names_in_vain_is_set_aside(
    run, workspace, manifest, tmp_path
):
    source = class_folders(tmp_path / "in", classes=2)
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*.jpg"))
    listed = source / "these.txt"
    listed.write_text("".join(f"{name}\n" for name in [*names[:20], "class0/gone.jpg"]))
    report = run(listed)
    assert report.figures["tiles"] == 20 and report.figures["classes"] == 2
    assert reasons(workspace) == {"class0/gone.jpg": "cannot be read: No such file or directory"}
    assert run(listed).figures["unchanged"]
    before = manifest().set_index("key")
    # The same images as a folder keep keys, places and splits.
    assert run(source).figures["new_tiles"] == 4
    after = manifest().set_index("key").loc[before.index]
    assert (after[["place", "split", "shard"]] == before[["place", "split", "shard"]]).all(None)


def test_a_store_of_the_first_schema_is_measured_anew_and_keeps_its_splits(
    run, workspace, manifest, tmp_path
):
    import pyarrow.parquet as pq

    source = class_folders(tmp_path / "in", each=4)
    run(source)
    now = manifest()
    path = workspace.store / MANIFEST
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"ringmo.schema": b"1"}
    for columns in ADDED.values():
        table = table.drop_columns([name for name in columns if name != "key"])
    pq.write_table(table.replace_schema_metadata(metadata), path)
    (workspace.state / "scan.parquet").unlink()  # an older one has other settings
    assert list(manifest().columns) == list(now.columns)
    assert manifest()["cloud_share"].isna().all()
    run(source)
    assert manifest().equals(now)
