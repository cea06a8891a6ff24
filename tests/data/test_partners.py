"""Which tile of another sensor is of the same pixels of ground."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from real import REAL
from small_imagery import sensed, write, write_bands

from ringmo.data.partners import grids, partners
from ringmo.data.store import TileStore


def tile(key: str, sensor: str, **more: Any) -> dict[str, Any]:
    nan = float("nan")
    return {
        "key": key, "sensor": sensor, "source": f"{sensor}/{key}.tif", "source_root": "r",
        "row": 0, "col": 0, "width": 64, "height": 64, "crs": None, "acquired": None,
        "minx": nan, "miny": nan, "maxx": nan, "maxy": nan, **more,
    }  # fmt: skip


def at(x: float, y: float = 5e6, side: float = 640.0, crs: str = "EPSG:32631") -> dict[str, Any]:
    return {"crs": crs, "minx": x, "miny": y, "maxx": x + side, "maxy": y + side}


def found(tiles: list[dict[str, Any]], sensor: str = "s1", other: str = "s2") -> dict[str, Any]:
    frame = pd.DataFrame(tiles, index=range(100, 100 + len(tiles)))
    series = partners(frame, sensor, other)
    assert series.index.equals(frame.index)
    return dict(zip(frame["key"], series, strict=True))


def test_partners_lie_within_a_thousandth_of_a_pixel():
    pixel = 10.0
    near, far = 0.0009 * pixel, 0.0012 * pixel
    tiles = [
        tile("a", "s1", **at(0)), tile("A", "s2", **at(near)),
        tile("b", "s1", **at(1000)), tile("B", "s2", **at(1000 + far)),
        tile("c", "s1", **at(2000)), tile("C", "s2", **at(2000), width=65),
        tile("d", "s1", **at(3000)), tile("D", "s2", **at(3000, crs="EPSG:32632")),
        tile("e", "s1", **at(4000)), tile("E", "s1", **at(4000)),
        tile("f", "s1", **at(5000, 5e6)), tile("F", "s2", **at(5000, 5e6 - 640)),
    ]  # fmt: skip
    assert found(tiles) == dict.fromkeys((t["key"] for t in tiles), None) | {"a": "A"}
    assert found(tiles, "s2", "s1")["A"] == "a"


def test_as_comparing_all_pairs_finds():
    random = np.random.default_rng(3)
    tiles = []
    for i in range(400):
        x, y = random.integers(0, 8, 2) * 640 + random.choice([0, 0.004, 0.3])
        tiles.append(tile(f"{i:03d}", random.choice(["s1", "s2"]), **at(float(x), float(y))))
    answers = found(tiles)
    by_key = {t["key"]: t for t in tiles}
    for one in tiles:
        near = [
            t["key"]
            for t in tiles
            if t["sensor"] == "s2" and max(abs(one[s] - t[s]) for s in ("minx", "miny")) < 0.01
        ]
        answer = answers[one["key"]]
        if one["sensor"] != "s1" or not near:
            assert answer is None
        else:
            assert answer in near and by_key[answer]["sensor"] == "s2"


def test_of_several_dates_it_is_that_of_the_same_name_then_the_nearest():
    tiles = [
        tile("a", "s1", **at(0), acquired="2024-05-10T10:00:00", source="S1/chip.tif"),
        tile("x", "s2", **at(0), acquired="2024-05-01T10:00:00", source="S2/other.tif"),
        tile("y", "s2", **at(0), acquired="2024-05-11T10:00:00", source="S2/more.tif"),
    ]
    assert found(tiles)["a"] == "y"
    tiles.append(tile("z", "s2", **at(0), source="S2/chip.tif"))
    assert found(tiles)["a"] == "z"
    assert found(tiles[:1])["a"] is None


def test_without_coordinates_names_and_windows_decide():
    tiles = [
        tile("a", "s1", source="S1/x/0.png"), tile("A", "s2", source="S2/x/0.tif"),
        tile("b", "s1", source="S1/x/0.png", row=64), tile("B", "s2", source="S2/x/0.tif", row=64),
        tile("c", "s1", source="S1/1.png"), tile("C", "s2", source="S2/1.png", col=9),
        # Two sources, each with its own folder.
        tile("d", "s1", source="y/2.png", source_root="one"),
        tile("D", "s2", source="y/2.png", source_root="two"),
        tile("e", "s1", source="p/3.png", source_root="one"),
        tile("E", "s2", source="q/3.png", source_root="two"),
        # Two of one sensor could be meant.
        tile("f", "s1", source="S1/4.png"), tile("F", "s2", source="S2/4.png"),
        tile("G", "s2", source="other/4.png"),
    ]  # fmt: skip
    answers = found(tiles)
    assert {key for key, value in answers.items() if value} == {"a", "b", "d"}
    assert all(answers[key] == key.upper() for key in "abd")


def test_classes_folders_are_no_sensors():
    tiles = [tile("a", "rgb", source="Beach/1.jpg"), tile("b", "rgb", source="Port/1.jpg")]
    assert (grids(pd.DataFrame(tiles)) == -1).all()
    assert grids(pd.DataFrame(tiles).iloc[:0]).shape == (0,)


def test_named_pairs_are_of_one_place(run, manifest, tmp_path):
    for i in range(12):
        write(tmp_path / "in" / "S2" / f"{i}.png", i, "PNG", width=48, height=48)
        write_bands(
            tmp_path / "in" / "S1" / f"{i}.tif", sensed("s1", 900 + i), crs=None, transform=None
        )
    run(tmp_path / "in")
    rows = manifest()
    others = partners(rows, "s1", "rgb")
    splits = rows.set_index("key")["split"]
    radar = rows[rows["sensor"] == "s1"]
    assert len(radar) == 12 and others.notna().sum() == 12
    assert (splits[others[radar.index]].to_numpy() == radar["split"].to_numpy()).all()
    assert set(splits) == {"train", "val", "test"}


def test_many_tiles_cost_little():
    import time

    number = 200_000
    x = np.arange(number) % 500 * 640.0
    y = np.arange(number) // 500 * 640.0
    both = []
    for sensor in ("s1", "s2"):
        frame = pd.DataFrame({"key": [f"{sensor}{i}" for i in range(number)], "sensor": sensor})
        frame["source"], frame["source_root"], frame["crs"] = "a.tif", "r", "EPSG:32631"
        frame["minx"], frame["miny"], frame["maxx"], frame["maxy"] = x, y, x + 640, y + 640
        frame["row"] = frame["col"] = 0
        frame["width"] = frame["height"] = 64
        frame["acquired"] = None
        both.append(frame)
    start = time.monotonic()
    answers = partners(pd.concat(both), "s1", "s2")
    assert time.monotonic() - start < 60  # 400,000 tiles: some seconds
    assert answers.notna().sum() == number
    assert answers.iloc[12345] == "s212345"


@pytest.mark.skipif(not REAL.is_dir(), reason="no real imagery beside the checkout")
def test_radar_and_optical_of_a_real_flood_share_its_water_mask(run, workspace, manifest):
    import io

    from PIL import Image

    report = run(REAL / "geotiff" / "sen1floods11")
    rows = manifest().set_index("sensor")
    assert sorted(rows.index) == ["s1", "s2l1c"] and report.figures["masks"] == 2
    assert set(rows["mask_coding"]) == {"sen1floods11"} and rows["mask_hash"].nunique() == 1
    assert rows["place"].nunique() == 1
    row = rows.loc["s1"]
    place = row["mask_shard"], int(row["mask_offset"]), int(row["mask_size"])
    mask = np.asarray(Image.open(io.BytesIO(TileStore(workspace.store).read(*place))))
    import rasterio

    with rasterio.open(REAL / "geotiff/sen1floods11/Spain_7370579_LabelHand.tif") as file:
        label = file.read(1)
    assert np.array_equal(mask, np.where(label < 0, 255, label))
    classes = json.loads((workspace.store / "classes.json").read_text())
    assert classes == {"sen1floods11": ["land", "water"]}
    rows = manifest()
    (radar,) = rows.index[rows["sensor"] == "s1"]
    (optical,) = rows["key"][rows["sensor"] == "s2l1c"]
    assert partners(rows, "s1", "s2l1c")[radar] == optical


@pytest.mark.skipif(not REAL.is_dir(), reason="no real imagery beside the checkout")
def test_a_real_flood_can_be_split_in_blocks(run, manifest):
    run(REAL / "geotiff" / "sen1floods11", split__by="block", ingest__tile_size=64)
    rows = manifest()
    splits = rows.set_index("key")["split"]
    radar = rows[(rows["sensor"] == "s1") & rows["split"].isin(["train", "val", "test"])]
    others = partners(rows, "s1", "s2l1c")[radar.index].dropna()
    assert set(radar["split"]) == {"train", "val", "test"} and len(others) > 30
    assert (splits[others].to_numpy() == radar.loc[others.index, "split"].to_numpy()).all()


def test_real_places_have_partners(terramesh, run, manifest):
    run(terramesh, ingest__exclude=["LULC/*"])
    rows = manifest()
    for sensor in ("s1", "s2l1c", "rgb"):
        others = partners(rows, "s2l2a", sensor).dropna()
        assert len(others) == 3
        there = rows.set_index("key").loc[others]
        own = rows.loc[others.index, "source"].str.rpartition("/")[2]
        assert (there["source"].str.rpartition("/")[2].to_numpy() == own.to_numpy()).all()
