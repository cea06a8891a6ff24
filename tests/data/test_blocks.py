"""Splits inside a scene: strips with gaps, for ever, the same for all that saw the ground."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_imagery import geotiff, pixels, sensed, write, write_bands

from ringmo.config import Config
from ringmo.data.blocks import _edges
from ringmo.data.validation import validate
from ringmo.errors import AnswerIsNo
from ringmo.stage import run_stage

SHARES = {"test": 0.2, "val": 0.1}
BLOCK: dict[str, Any] = {"split__by": "block", "ingest__tile_size": 32}
TAUGHT = ("train", "val", "test")


def textured(number: int, width: int, height: int) -> Any:
    """Nowhere alike: a new texture every 32 pixels."""
    rows = []
    for y in range(height // 32):
        here = [pixels(number * 10_000 + y * 100 + x, 32, 32) for x in range(width // 32)]
        rows.append(np.concatenate(here, axis=1))
    return np.concatenate(rows)


def judged(workspace: Any) -> list[str]:
    """The rules about splits that are broken."""
    config = Config.load(workspace.params_file)
    try:
        report = run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
        rows = report.tables["rules"]
    except AnswerIsNo:
        import json

        text = (workspace.work("validate") / "verdict.json").read_text()
        rows = json.loads(text)["rules"]
    return [r["rule"] for r in rows if not r["ok"] and (r.get("suite") == "splits")]


def by_position(rows: Any, axis: str = "col") -> dict[int, str]:
    """Position → split of all tiles there, which must agree."""
    splits = rows.groupby(axis)["split"].agg(set)
    assert all(len(found) == 1 for found in splits)
    return {int(at): next(iter(found)) for at, found in splits.items()}


@pytest.mark.parametrize(
    ("count", "size", "stride", "expected"),
    [
        (5, 10, 10, (1, 1, 1)),
        (10, 10, 10, (5, 1, 2)),
        (24, 10, 10, (16, 2, 4)),
        (100, 10, 10, (68, 10, 20)),
    ],
)
def test_shares_are_those_of_what_the_gaps_leave(count, size, stride, expected):
    start = np.arange(count) * float(stride)
    train, val, val_end, test = _edges(start, start + size, 0.01, SHARES)
    end = start + size
    parts = (end <= train, (start >= val) & (end <= val_end), start >= test)
    assert tuple(int(part.sum()) for part in parts) == expected
    assert count - sum(expected) == 2  # one tile in each gap


@pytest.mark.parametrize("stride", [3, 5, 7, 10, 13])
@pytest.mark.parametrize("count", range(5, 40, 3))
def test_between_two_splits_lie_a_tile_and_ground_that_neither_covers(count, stride):
    start = np.arange(count) * float(stride)
    start = np.append(start, start[-1] + stride / 3)  # the last is shifted inward
    end = start + 10
    edges = _edges(start, end, 0.01, SHARES)
    if edges is None:
        assert stride < 10 and count < 20  # so few that overlap have no room for two gaps
        return
    train, val, val_end, test = edges
    parts = [end <= train, (start >= val) & (end <= val_end), start >= test]
    assert all(part.any() for part in parts)
    for one, two in pairwise(parts):
        assert end[one].max() < start[two].min()
        between = np.flatnonzero(two)[0] - np.flatnonzero(one)[-1] - 1
        assert between >= 1


def test_one_scene_is_trained_validated_and_tested_on(run, workspace, manifest, tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.fromarray(textured(1, 320, 128)).save(tmp_path / "in" / "scene.png")
    report = run(tmp_path / "in", **BLOCK)
    rows = manifest()
    assert len(rows) == 40
    splits = by_position(rows)
    assert [splits[col] for col in range(0, 320, 32)] == [
        *["train"] * 5, "unused", "val", "unused", *["test"] * 2
    ]  # fmt: skip
    assert report.figures["unused"] == 8
    assert rows[rows["split"].isin(TAUGHT)].groupby("place")["split"].nunique().eq(1).all()
    assert judged(workspace) == []
    # Decided once: other shares, another rule and the same bytes under another name change nothing.
    (tmp_path / "in" / "scene.png").rename(tmp_path / "in" / "renamed.png")
    run(tmp_path / "in", **{**BLOCK, "split__by": "place", "split__test": 0.5})
    assert dict(zip(manifest()["key"], manifest()["split"], strict=True)) == dict(
        zip(rows["key"], rows["split"], strict=True)
    )


def test_a_corrected_scene_keeps_the_strips_of_the_first(run, manifest, tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    picture = textured(1, 320, 64)
    Image.fromarray(picture).save(tmp_path / "in" / "scene.png")
    run(tmp_path / "in", **BLOCK)
    first = by_position(manifest())
    picture[5, 5:300:7] ^= 1
    Image.fromarray(picture).save(tmp_path / "in" / "scene.png")
    report = run(tmp_path / "in", **{**BLOCK, "split__test": 0.5})
    assert report.figures["new_tiles"] == 20
    assert by_position(manifest()) == first


def ground(folder: Path, sensor: str, number: int, wide: int, high: int, **more: Any) -> Path:
    values = np.concatenate(
        [sensed(sensor, number * 100 + i, 32, high) for i in range(wide // 32)], axis=1
    )
    return write_bands(folder, values, **more)


def test_all_that_saw_the_ground_has_the_same_strips_tile_by_tile(
    run, workspace, manifest, tmp_path
):
    ground(tmp_path / "s2" / "chip.tif", "s2l2a", 1, 64, 320, left=0)
    ground(tmp_path / "s1" / "chip.tif", "s1", 2, 64, 320, left=0)
    run(tmp_path / "s2", **BLOCK)
    before = manifest()
    # Radar comes a week later, as does another date on another grid, shifted by half a tile.
    ground(tmp_path / "later" / "chip.tif", "s2l2a", 5, 64, 320, left=0, top=5e6 - 160)
    run(tmp_path / "s2", tmp_path / "s1", tmp_path / "later", **BLOCK)
    rows = manifest()
    kept = rows[rows["key"].isin(before["key"])].set_index("key")["split"]
    assert kept.equals(before.set_index("key")["split"])
    optical = rows[rows["source_root"] == str(tmp_path / "s2")]
    radar = rows[rows["source_root"] == str(tmp_path / "s1")]
    assert by_position(optical, "row") == by_position(radar, "row")
    assert set(optical["split"]) == {"train", "val", "test", "unused"}
    # What lies across strips that others have is nobody's.
    later = rows[rows["source_root"] == str(tmp_path / "later")]
    assert set(later["split"]) == {"unused"}
    assert judged(workspace) == []


def test_sensors_that_come_together_share_strips_on_whatever_grid(
    run, workspace, manifest, tmp_path
):
    ground(tmp_path / "in" / "s2" / "chip.tif", "s2l2a", 1, 320, 64, gsd=10.0)
    ground(tmp_path / "in" / "rgb" / "chip.tif", "rgb", 2, 640, 128, gsd=5.0)
    run(tmp_path / "in", **BLOCK)
    rows = manifest()
    assert set(rows["sensor"]) == {"rgb", "s2l2a"}
    for _, here in rows.groupby("sensor"):
        assert set(here["split"]) == {"train", "val", "test", "unused"}
    assert judged(workspace) == []
    for split in TAUGHT:
        here = rows[rows["split"] == split]
        others = rows[rows["split"].isin(set(TAUGHT) - {split})]
        for low, high in zip(here["minx"], here["maxx"], strict=True):
            assert ((others["minx"] > high) | (others["maxx"] < low)).all()


def test_two_dates_of_one_scene_share_their_strips(run, workspace, manifest, tmp_path):
    from PIL import Image

    for date, number in (("A", 1), ("B", 2)):
        (tmp_path / "in" / date).mkdir(parents=True)
        Image.fromarray(textured(number, 192, 64)).save(tmp_path / "in" / date / "s.png")
    run(tmp_path / "in", **BLOCK)
    rows = manifest()
    keyed = rows.set_index("key")["split"]
    first = rows[rows["second"].notna()]
    assert len(first) == 12 and set(keyed) == {"train", "val", "test", "unused"}
    assert (keyed[first["second"]].to_numpy() == first["split"].to_numpy()).all()
    assert judged(workspace) == []


def test_a_strip_gets_nothing_that_looks_like_another_split(run, workspace, manifest, tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    picture = textured(1, 320, 64).astype(int)
    # The first tile of train once more at the end, in test: brighter by a little.
    picture[:32, 288:] = np.clip(picture[:32, :32] + 3, 0, 255)
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "in" / "scene.png")
    run(tmp_path / "in", **BLOCK)
    rows = manifest().set_index(["row", "col"])["split"]
    assert (rows[0, 0], rows[0, 288]) == ("unused", "test")
    assert (rows[32, 0], rows[0, 32]) == ("train", "train")
    assert judged(workspace) == []


def test_scenes_too_small_are_places_as_ever_and_say_so(run, manifest, tmp_path):
    for i in range(6):
        write(tmp_path / "in" / f"{i}.png", i, "PNG", width=120, height=64)
    geotiff(tmp_path / "in" / "map.tif", 77, 0, 5e6, side=64, width=192)
    report = run(tmp_path / "in", **BLOCK)
    assert any(
        "split.by: block: 6 scenes are split by place: fewer than 5 tiles along their longer side "
        "(first: 0.png)" in note
        for note in report.notes
    )
    rows = manifest()
    small = rows[rows["source"] != "map.tif"]
    assert small.groupby("source")["split"].nunique().eq(1).all()
    assert set(rows[rows["source"] == "map.tif"]["split"]) == {"train", "unused", "val", "test"}
