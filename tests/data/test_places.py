"""Places and splits: no test tile beside a train tile, now or after any later ingest."""

import hashlib
import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_imagery import class_folders, encoded, geotiff, pixels, sensed, write_bands

from ringmo.config import Config
from ringmo.data import places
from ringmo.data.measures import measure
from ringmo.workspace import template


def row(key: str, label: str | None = None, box: tuple[float, ...] | None = None, **more: Any):
    nan = float("nan")
    minx, miny, maxx, maxy = box or (nan,) * 4
    digits = hashlib.sha256(key.encode()).hexdigest()[:16]
    return {
        "key": key, "label": label, "crs": "EPSG:32631" if box else None, "minx": minx,
        "miny": miny, "maxx": maxx, "maxy": maxy, "std": 20.0, "phash": digits,
        "source": key, "source_root": "r", "sensor": "rgb", **more,
    }  # fmt: skip


def assign(known: list[Any], rows: list[Any], fetch: Any = None) -> dict[str, int]:
    return places.assign(
        known, rows, shares={"test": 0.2, "val": 0.1}, near_bits=3, blank_std=2.0, seed=42,
        fetch=fetch or (lambda row: pytest.fail("no pair to look at")),
    )  # fmt: skip


def meet(a: Any, b: Any) -> bool:
    """Whether more is shared than the half metre in 90 that counts as touching."""
    return bool(
        min(a["maxx"], b["maxx"]) > max(a["minx"], b["minx"]) + 0.5
        and min(a["maxy"], b["maxy"]) > max(a["miny"], b["miny"]) + 0.5
    )


@pytest.mark.parametrize("seed", range(8))
def test_overlapping_tiles_never_teach_and_test(seed):
    rng = random.Random(seed)
    known: list[Any] = []
    frozen: dict[str, tuple[str, str]] = {}
    for batch in range(4):
        rows = []
        for i in range(60):
            x, y = rng.uniform(3e5, 3.02e5), rng.uniform(4e6, 4.002e6)
            box = (x, y, x + 90, y + 90)
            rows.append(row(f"{seed}-{batch}-{i}", rng.choice("ab"), box))
        assign(known, rows)
        known += rows
        frozen |= {r["key"]: (r["place"], r["split"]) for r in rows if r["key"] not in frozen}
        assert {r["key"]: (r["place"], r["split"]) for r in known} == frozen
        for i, a in enumerate(known):
            for b in known[:i]:
                if meet(a, b) and "unused" not in (a["split"], b["split"]):
                    assert a["split"] == b["split"]
        splits: dict[str, set[str]] = {}
        for r in known:
            splits.setdefault(r["place"], set()).add(r["split"])
        assert all(len(s - {"unused"}) <= 1 for s in splits.values())


@pytest.mark.parametrize("count", [8, 9, 13, 40, 120])
def test_every_class_has_test_and_val(count):
    rows = [row(f"{label}{i}", label) for label in "abc" for i in range(count)]
    assign([], rows)
    for label in "abc":
        splits = [r["split"] for r in rows if r["label"] == label]
        assert splits.count("test") >= 1
        assert splits.count("val") >= 1
        assert abs(splits.count("test") - 0.2 * count) <= 1
        assert abs(splits.count("val") - 0.1 * count) <= 1


def test_splits_do_not_depend_on_the_order():
    rows = [row(f"{i}", "ab"[i % 2]) for i in range(50)]
    again = [dict(r) for r in rows]
    random.Random(1).shuffle(again)
    assign([], rows)
    assign([], again)
    assert {r["key"]: r["split"] for r in rows} == {r["key"]: r["split"] for r in again}


def test_newcomer_between_two_splits_is_used_by_neither():
    a = row("a", box=(0.0, 0, 10, 10), place="p1", split="train")
    b = row("b", box=(15.0, 0, 25, 10), place="p2", split="test")
    bridge = row("c", box=(5.0, 0, 20, 10))
    assert assign([a, b], [bridge])["unused"] == 1
    assert (bridge["place"], bridge["split"]) == ("p2", "unused")


def test_tiles_that_only_touch_are_two_places():
    rows = [row("a", box=(0.0, 0, 10, 10)), row("b", box=(10.0, 0, 20, 10))]
    assign([], rows)
    assert rows[0]["place"] != rows[1]["place"]


def test_footprints_meet_across_reference_systems_and_the_180th_meridian():
    one = row("a", box=(179.9, -0.1, 180.1, 0.1), crs="EPSG:4326")
    two = row("b", box=(-180.0, -0.05, -179.95, 0.05), crs="EPSG:4326")
    far = row("c", box=(10.0, 0, 10.2, 0.2), crs="EPSG:4326")
    pairs = set(places.overlaps([one, two, far], np.ones(3, bool)))
    assert pairs == {(0, 1)}
    # UTM 31N: 500 km east is 3 degrees east, on the equator.
    metric = row("d", box=(499_000.0, 0, 501_000, 2_000), crs="EPSG:32631")
    degrees = row("e", box=(2.99, 0.0, 3.01, 0.02), crs="EPSG:4326")
    assert set(places.overlaps([metric, degrees], np.ones(2, bool))) == {(0, 1)}


def test_near_hashes_are_all_found():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for i in range(200):  # the second half: the first with up to five bits flipped
        flips = rng.choice(64, i % 6, replace=False).astype(np.uint64)
        hashes[200 + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
    new = rng.random(400) < 0.5
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    wanted = {
        (i, j) for i in range(400) for j in range(i + 1, 400)
        if apart[i, j] <= 3 and (new[i] or new[j])
    }  # fmt: skip
    assert len(wanted) > 50
    assert set(places.near_duplicates(hashes, 3, new)) == wanted


def test_recompressed_copy_is_found_and_another_scene_is_not(aid):
    files = sorted(aid.glob("*/*"))[::40]
    hits = 0
    for file in files:
        with Image.open(file) as image:
            original = np.asarray(image.convert("RGB"))
        copy = np.asarray(Image.open(io.BytesIO(encoded(original, "JPEG"))))
        apart = int(measure(original).phash, 16) ^ int(measure(copy).phash, 16)
        hits += apart.bit_count() <= 3
        assert places.look_alike(encoded(original), encoded(copy))
    assert hits >= 0.9 * len(files)
    assert not places.look_alike(files[0].read_bytes(), files[1].read_bytes())


def test_near_duplicate_joins_the_place_and_split_of_its_twin(run, manifest, tmp_path):
    source = class_folders(tmp_path / "in", classes=2, each=20)
    run(source)
    before = manifest().set_index("source")
    for file in sorted(source.glob("*/*.jpg")):
        with Image.open(file) as image:
            image.save(file.with_name(f"z{file.name}"), "JPEG", quality=93)
    report = run(source)
    after = manifest().set_index("source")
    assert report.figures["near_duplicates"] >= 30
    same = [
        after["place"][name.replace("/", "/z")] == before["place"][name] for name in before.index
    ]
    assert sum(same) == report.figures["near_duplicates"]
    assert (after["split"][before.index] == before["split"]).all()
    assert after.groupby("place")["split"].nunique().max() == 1


def test_blank_tiles_are_not_one_place(run, manifest, tmp_path):
    for i in range(12):
        flat = np.full((40, 40, 3), 30 + 10 * i, np.uint8)
        path = tmp_path / "in" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(flat))
    run(tmp_path / "in")
    assert manifest()["place"].nunique() == 12


def test_georeferenced_neighbours_share_a_split(run, manifest, tmp_path):
    for i in range(6):
        geotiff(tmp_path / "in" / f"a{i}.tif", i, 1000.0 * i, 5e6)
        geotiff(tmp_path / "in" / f"b{i}.tif", 90 + i, 1000.0 * i + 24, 5e6)
    report = run(tmp_path / "in")
    tiles = manifest().set_index("source")
    assert report.figures["places"] == 6
    for i in range(6):
        assert tiles["split"][f"a{i}.tif"] == tiles["split"][f"b{i}.tif"]


def test_one_place_seen_by_three_sensors_has_one_split(run, manifest, tmp_path):
    for i in range(12):
        for sensor in ("rgb", "s2l2a", "s1"):
            path = tmp_path / "in" / sensor / f"{i}.tif"
            # Not the same numbers: their footprints join them, nothing they look like.
            write_bands(path, sensed(sensor, 50 * i + len(sensor)), 1000 * i)
    report = run(tmp_path / "in")
    tiles = manifest()
    assert report.figures["places"] == 12
    assert report.figures["near_duplicates"] == 0
    assert (tiles.groupby("place")["sensor"].nunique() == 3).all()
    assert (tiles.groupby("place")["split"].nunique() == 1).all()
    assert set(tiles["split"]) == {"train", "val", "test"}
    before = tiles.set_index("key")["split"]
    # A fourth comes later, and shares half the ground only.
    write_bands(tmp_path / "in" / "s2l1c" / "0.tif", sensed("s2l1c", 999), 240)
    assert run(tmp_path / "in").figures["new_tiles"] == 1
    tiles = manifest().set_index("key")
    first = tiles[tiles["source"].str.endswith("/0.tif")]
    assert len(first) == 4
    assert first["split"].nunique() == first["place"].nunique() == 1
    assert (tiles["split"][before.index] == before).all()


def test_labels_of_one_sensor_decide_the_split_of_its_places():
    rows = []
    for label in "ab":
        for i in range(20):
            left = (100.0 if label == "a" else 9000) + 100 * i
            box = (left, 0.0, left + 50, 50.0)
            rows.append(row(f"{label}{i}", label, box))
            rows += [row(f"{label}{i}{s}", None, box, sensor=s) for s in ("s1", "s2l2a")]
    assign([], rows)
    for label in "ab":
        splits = [r["split"] for r in rows if r["label"] == label]
        assert (splits.count("test"), splits.count("val")) == (4, 2)


def test_only_tiles_of_one_sensor_are_near_duplicates():
    twins = [row(name, phash="0" * 16, sensor=s) for name, s in (("a", "rgb"), ("b", "s1"))]
    counts = assign([], twins)  # its fetch fails the test where a pair is looked at
    assert counts["near_duplicates"] == 0
    assert twins[0]["place"] != twins[1]["place"]


def test_recognised_again_in_pixels_of_more_than_8_bits(tmp_path):
    from ringmo.data.decode import decode

    values = sensed("s2l2a", 3, 96, 96)
    one = write_bands(tmp_path / "one.tif", values).read_bytes()
    noise = np.random.default_rng(1).normal(0, 30, values.shape)
    two = write_bands(tmp_path / "two.tif", (values + noise).astype("int16")).read_bytes()
    other = write_bands(tmp_path / "other.tif", sensed("s2l2a", 4, 96, 96)).read_bytes()
    sensor = Config.load(template("params.yaml")).sensors["s2l2a"]
    hashes = [int(measure(decode(data), None, sensor).phash, 16) for data in (one, two, other)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 3
    assert (hashes[0] ^ hashes[2]).bit_count() > 12
    assert places.look_alike(one, two)
    assert not places.look_alike(one, other)


def test_measures_of_8_bit_pixels_are_what_they_always_were():
    """Stores keep these: a change would part what is new from what is there."""
    colour = measure(pixels(1))
    assert (colour.mean, colour.std, colour.entropy) == (125.2877, 65.128, 7.518)
    assert (colour.sharpness, colour.phash) == (287.0741, "d3b4f42033969769")
    six = measure(np.dstack([pixels(5), pixels(6)]))
    assert (six.mean, six.std, six.entropy) == (124.3276, 62.0392, 6.521)
    assert (six.sharpness, six.phash) == (114.6001, "b7fcf2c4f0c70038")


def test_band_statistics_are_of_the_values_as_they_are():
    sensors = Config.load(template("params.yaml")).sensors
    rgb = np.dstack([np.full((40, 48), level, np.uint8) for level in (10, 20, 30)])
    rgb[:20] += 2
    found = measure(rgb, None, sensors["rgb"])
    assert (found.band_means, found.band_stds) == ([11, 21, 31], [1, 1, 1])
    valid = np.ones((40, 48), bool)
    valid[:20] = False
    assert measure(rgb, valid, sensors["rgb"]).band_means == [10, 20, 30]
    radar = np.random.default_rng(1).normal(-11, 3, (40, 48, 2)).astype(np.float32)
    found = measure(radar, None, sensors["s1"])
    assert found.band_means == pytest.approx(radar.mean((0, 1)), abs=1e-3)
    assert found.band_stds == pytest.approx(radar.std((0, 1)), abs=1e-3)
    assert np.isnan(found.cloud_share)  # radar sees through


def test_cloud_is_broad_and_white():
    sensors = Config.load(template("params.yaml")).sensors
    field = np.full((64, 64, 3), (70, 110, 60), np.uint8)
    cloudy = field.copy()
    cloudy[:32] = 230
    roofs = field.copy()
    roofs[4::16, 4::16] = 250
    sand = np.full((64, 64, 3), (250, 230, 195), np.uint8)
    shares = [measure(p, None, sensors["rgb"]).cloud_share for p in (field, cloudy, roofs, sand)]
    assert shares == [0, 0.5, 0, 0]
    optical = np.full((64, 64, 12), 900, np.int16)
    optical[:16] = 6000
    assert measure(optical, None, sensors["s2l2a"]).cloud_share == 0.25
    valid = np.zeros((64, 64), bool)
    valid[:32] = True
    assert measure(optical, valid, sensors["s2l2a"]).cloud_share == 0.5


def test_measures_know_blank_saturated_and_missing():
    flat = measure(np.full((20, 20, 3), 7, np.uint8))
    assert (flat.std, flat.entropy, flat.sharpness, flat.mean) == (0, 0, 0, 7)
    half = pixels(1)
    half[:20] = 255
    assert measure(half).saturated_share == 0.5
    valid = np.ones((40, 48), bool)
    valid[:10] = False
    assert measure(pixels(1), valid).nodata_share == 0.25
