"""Places and splits: no test tile beside a train tile, now or after any later ingest."""

import hashlib
import io
import random
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rasterio._err import CPLE_BaseError
from rasterio.warp import transform
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from small_imagery import class_folders, encoded, geotiff, pixels, sensed, write_bands

from ringmo.config import Config
from ringmo.data import footprints, lookalikes, places
from ringmo.data.measures import measure
from ringmo.workspace import template


def row(key: str, label: str | None = None, box: tuple[float, ...] | None = None, **more: Any):
    nan = float("nan")
    minx, miny, maxx, maxy = box or (nan,) * 4
    digits = hashlib.sha256(key.encode()).hexdigest()[:16]
    return {
        "key": key, "label": label, "crs": "EPSG:32631" if box else None, "minx": minx,
        "miny": miny, "maxx": maxx, "maxy": maxy, "std": 20.0, "phash": digits, "second": None,
        "source": key, "source_root": "r", "sensor": "rgb", "shard": "0", "offset": 0, "size": 0,
        "row": 0, "col": 0, "width": 64, "height": 64,
        **more,
    }  # fmt: skip


def assign(known: list[Any], rows: list[Any], fetch: Any = None, bits: int = 3) -> dict[str, int]:
    """Sets place and split of the rows, from tables whose index says nothing."""
    tables = [pd.DataFrame(table, index=[7] * len(table)) for table in (known, rows)]
    placed, counts = places.assign(
        *tables, shares={"test": 0.2, "val": 0.1}, near_bits=bits, blank_std=2.0, seed=42,
        fetch=fetch or (lambda *where: pytest.fail("no pair to look at")),
    )  # fmt: skip
    for one, place, split in zip(rows, placed["place"], placed["split"], strict=True):
        one |= {"place": place, "split": split}
    return counts


def overlaps(rows: list[Any], new: Any = None) -> set[tuple[int, int]]:
    fresh = np.ones(len(rows), bool) if new is None else new
    pairs = [(i, j) for i, j in footprints.overlaps(pd.DataFrame(rows), fresh).tolist()]
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


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
    assert overlaps([one, two, far]) == {(0, 1)}
    # UTM 31N: 500 km east is 3 degrees east, on the equator.
    metric = row("d", box=(499_000.0, 0, 501_000, 2_000), crs="EPSG:32631")
    degrees = row("e", box=(2.99, 0.0, 3.01, 0.02), crs="EPSG:4326")
    assert overlaps([metric, degrees]) == {(0, 1)}


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
    assert {tuple(pair) for pair in lookalikes.near_duplicates(hashes, 3, new)} == wanted


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_crowded_hashes_are_compared_no_less(bits, monkeypatch):
    """Thousands of hashes that differ in a few of their bits only, as of smooth shading."""
    monkeypatch.setattr(lookalikes, "CROWD", 256)
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**22, 3000, dtype=np.uint64) << np.uint64(20)
    new = rng.random(3000) < 0.3
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    wanted = np.argwhere((apart <= bits) & (new[:, None] | new[None, :]))
    found = lookalikes.near_duplicates(hashes, bits, new)
    assert {tuple(pair) for pair in found} <= {tuple(pair) for pair in wanted}
    assert (found[:, 0] < found[:, 1]).all()
    assert len(np.unique(found, axis=0)) == len(found) > 0
    assert components(3000, found) == components(3000, wanted)


def test_identical_hashes_are_linked_and_not_squared():
    hashes = np.full(100_000, 7, np.uint64)
    new = np.ones(len(hashes), bool)
    assert len(lookalikes.near_duplicates(hashes, 3, new)) == len(hashes) - 1
    new[:-1] = False  # known ones are joined by what is new only
    found = lookalikes.near_duplicates(hashes, 3, new)
    assert len(found) == len(hashes) - 1
    assert (found[:, 1] == len(hashes) - 1).all()
    hashes[-1] = 5  # a bit from all of them
    assert len(lookalikes.near_duplicates(hashes, 3, new)) == len(hashes) - 1
    new[-1] = False
    assert not len(lookalikes.near_duplicates(hashes, 3, new))


def components(n: int, pairs: Any) -> list[int]:
    a, b = np.asarray(pairs).reshape(-1, 2).T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(n, n))
    return connected_components(graph, directed=False)[1].tolist()


def footprint(rng: random.Random) -> dict[str, Any]:
    """Somewhere where footprints are odd: two zones' border, the 180th meridian, a pole, a limb."""
    crs = rng.choice(["EPSG:32631", "EPSG:32632", "EPSG:3857", "EPSG:4326", "EPSG:32660",
                      "EPSG:3413", "+proj=geos +h=35785831 +lon_0=-75 +sweep=x", ""])  # fmt: skip
    x, y = rng.choice([50 * rng.randrange(40), rng.uniform(0, 2000)]), 50 * rng.randrange(30)
    side = rng.choice([90, 100, 400])
    if crs == "EPSG:4326":
        west = rng.choice([5.55, 179.998, -180.0005, 359.0]) + x * 1e-5
        box = (west, 45.12 + y * 1e-5, west + 0.001, 45.121 + y * 1e-5)
    elif crs == "EPSG:3413":
        box = (x - 700, y - 700.0, x - 700 + side, y - 700 + side)
    elif crs.startswith("+"):
        box = (rng.choice([-5.4e6, 5.3e6, 0]), 20.0 * y, 0, 20.0 * y + 3000)
        box = (box[0], box[1], box[0] + 2e5, box[3])
    else:
        east, north = {"EPSG:32631": (7e5, 5e6), "EPSG:32632": (2.6e5, 5e6),
                       "EPSG:3857": (618e3, 564e4)}.get(crs, (833_000, 0))  # fmt: skip
        box = (east + x, north + y, east + x + side, north + y + side)
    return {"crs": crs or None, **dict(zip(("minx", "miny", "maxx", "maxy"), box, strict=True))}


@cache
def degrees(crs: str | None, *box: float) -> list[tuple[float, ...]]:
    """West, south, east, north, and by how much it was turned to the other side of the map."""
    if crs is None:
        return []
    x, y, right, top = box
    xs, ys = [x, x, right, right], [y, top, y, top]
    if crs != "EPSG:4326":
        try:
            xs, ys = transform(crs, "EPSG:4326", xs, ys)
        except CPLE_BaseError:
            return []
    if not np.isfinite([xs, ys]).all():
        return []
    if 180 < max(xs) - min(xs) < 360:
        xs = [x % 360 for x in xs]
    turns = [0, 360] if max(xs) > 180 else [0]
    return [(min(xs) - turn, min(ys), max(xs) - turn, max(ys), turn) for turn in turns]


def share_ground(a: Any, b: Any) -> bool:
    """Whether two tiles meet in degrees, and in their CRS if they have one, a copy aside."""
    sides = ("minx", "miny", "maxx", "maxy")
    one, two = ([tile[side] for side in sides] for tile in (a, b))
    touch = a["crs"] == b["crs"] and any(
        min(one[high], two[high]) - max(one[low], two[low])
        <= 0.005 * min(one[high] - one[low], two[high] - two[low])
        for low, high in ((0, 2), (1, 3))
    )
    return any(
        w1 < e2 and w2 < e1 and s1 < n2 and s2 < n1 and (turn or other or not touch)
        for w1, s1, e1, n1, turn in degrees(a["crs"], *one)
        for w2, s2, e2, n2, other in degrees(b["crs"], *two)
    )


@pytest.mark.parametrize("seed", range(4))
def test_footprints_meet_as_they_do_two_at_a_time(seed, monkeypatch):
    rng = random.Random(seed)
    rows = [footprint(rng) for _ in range(240)]
    rows += [dict(rng.choice(rows)) for _ in range(40)]
    rng.shuffle(rows)
    new = np.array([rng.random() < (0.1, 0.5, 0.9, 1)[seed] for _ in rows])
    pairs = [(i, j) for j in range(len(rows)) for i in range(j) if new[i] or new[j]]
    wanted = {(i, j) for i, j in pairs if share_ground(rows[i], rows[j])}
    found = overlaps(rows, new)
    assert found <= wanted
    assert len(found) > 20
    assert components(len(rows), list(found)) == components(len(rows), list(wanted))
    # Known footprints out of reach are passed over when there are many.
    monkeypatch.setattr(footprints, "FEW", 0)
    monkeypatch.setattr(footprints, "RASTER", 64)
    assert overlaps(rows, new) == found


def test_what_is_out_of_reach_is_hardly_ever_transformed():
    side = np.arange(200.0) * 1000
    x, y = (corner.ravel() for corner in np.meshgrid(3e5 + side, 5e6 + side))
    native = np.concatenate([np.stack([x, y, x + 1500, y + 1500], axis=1)] * 2)
    codes = np.repeat([0, 1], 40_000)
    new = np.zeros(80_000, bool)
    new[10_050:10_070] = True
    reach = footprints._within_reach(native, codes, ["EPSG:32631", "EPSG:32632"], new)
    assert 60 < reach.sum() < 1000


def test_many_dates_of_one_footprint_are_linked_and_not_squared():
    rows = pd.DataFrame([row("a", box=(0.0, 0, 10, 10))] * 5000)
    assert len(footprints.overlaps(rows, np.ones(5000, bool))) == 4999


def drawn(ground: int, copy: int) -> bytes:
    """A tile of one of many grounds, so noisy that copies are alike, doubtful or another place."""
    squares = np.random.default_rng(ground).integers(0, 255, (8, 8))
    noise = np.random.default_rng(1000 + copy).normal(0, (4, 25, 55)[copy % 3], (40, 40))
    pixels = np.kron(squares, np.ones((5, 5))) + noise
    return encoded(np.clip(pixels, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2))


def one_by_one(known: list[Any], rows: list[Any], bits: int) -> tuple[list[Any], dict[str, int]]:
    """What `assign` is to find, looking at every pair of tiles."""
    every, first = known + rows, len(known)
    group = list(range(len(every)))

    def join(i: int, j: int) -> bool:
        a, b = sorted((group[i], group[j]))
        group[:] = [a if g == b else g for g in group]
        return a != b

    pairs = [(i, j) for j in range(len(every)) for i in range(j)]
    for i, j in pairs:
        a, b = every[i], every[j]
        scene = j >= first and a["source"] == b["source"]
        dates = a["second"] == b["key"] or b["second"] == a["key"]
        if scene or dates or (j < first and a["place"] == b["place"]):
            join(i, j)
    counts = {"overlapping": 0, "near_duplicates": 0, "unused": 0}
    pairs = [(i, j) for i, j in pairs if j >= first]
    for i, j in pairs:
        if share_ground(every[i], every[j]):
            counts["overlapping"] += join(i, j)
    for i, j in pairs:
        a, b = every[i], every[j]
        apart = (int(a["phash"], 16) ^ int(b["phash"], 16)).bit_count()
        seen = min(a["std"], b["std"]) >= 2 and a["sensor"] == b["sensor"]
        if seen and apart <= bits and lookalikes.look_alike(drawn(*a["tile"]), drawn(*b["tile"])):
            counts["near_duplicates"] += join(i, j)

    answer: dict[str, tuple[str, str]] = {}
    unseen = []
    for g in sorted(set(group[first:])):
        ours = [r for r, other in zip(rows, group[first:], strict=True) if other == g]
        elders = [r for r, other in zip(known, group[:first], strict=True) if other == g]
        if not elders:
            unseen.append(("p" + min(r["key"] for r in ours), ours))
            continue
        splits = {r["split"] for r in elders} - {"unused"}
        best = min(elders, key=lambda r: (places.STRONGEST.index(r["split"]), r["place"]))
        split = splits.pop() if len(splits) == 1 else "unused"
        answer |= {r["key"]: (best["place"], split) for r in ours}
        counts["unused"] += len(ours) * (split == "unused")
    have = Counter((r["label"], r["split"]) for r in known)
    shares = {"test": 0.2, "val": 0.1, "train": 1 - (0.2 + 0.1)}
    digest = {name: hashlib.sha256(f"42:{name}".encode()).hexdigest() for name, _ in unseen}
    for name, ours in sorted(unseen, key=lambda place: (-len(place[1]), digest[place[0]])):
        every_label = sorted(r["label"] for r in ours if r["label"]) or [None]
        label = max(every_label, key=every_label.count)
        total = sum(have[label, split] for split in shares) + len(ours)
        lack = {s: round(share * total - have[label, s], 9) for s, share in shares.items()}
        split = max(lack, key=lambda s: lack[s])  # the first of equals: test, val, train
        have[label, split] += len(ours)
        answer |= {r["key"]: (name, split) for r in ours}
    return [answer[r["key"]] for r in rows], counts


@pytest.mark.parametrize("seed", range(4))
def test_places_and_splits_are_those_of_every_pair_looked_at(seed):
    rng = random.Random(seed)
    known: list[Any] = []
    sums: Counter[str] = Counter()
    for batch in range(3):
        rows: list[Any] = []
        for i in range((150, 20, 80)[batch]):
            ground = rng.randrange(30)
            digits = int(hashlib.sha256(str(ground).encode()).hexdigest()[:16], 16)
            for _ in range(rng.choice([0, 0, 0, 1, 2, 3])):
                digits ^= 1 << rng.randrange(64)
            tile = ground, rng.randrange(100)
            one = row(f"{seed}{batch}{i:03d}", rng.choice([None, "a", "b"]), phash=f"{digits:016x}",
                      sensor=rng.choice(["rgb", "rgb", "s1"]), std=rng.choice([20.0, 20.0, 1.0]),
                      shard=str(tile[0]), offset=tile[1], tile=tile)  # fmt: skip
            one |= footprint(rng) if rng.random() < 0.5 else {}
            if rng.random() < 0.1:
                one["source"] = f"scene {rng.randrange(3)}"
            if rng.random() < 0.1:
                one["second"] = rng.choice(known + rows + [one])["key"]
            rows.append(one)
        wanted, figures = one_by_one(known, [dict(r) for r in rows], bits=seed)
        counts = assign(known, rows, lambda shard, at, size: drawn(int(shard), at), bits=seed)
        assert counts == figures
        assert [(r["place"], r["split"]) for r in rows] == wanted
        known += rows
        sums.update(counts)
    assert min(sums.values()) > 0


def test_two_dates_of_one_ground_are_one_place():
    first = row("a", second="b")
    rows = [first, row("b"), row("c", second="lost")]
    assign([], rows)
    assert rows[0]["place"] == rows[1]["place"] != rows[2]["place"]
    later = [row("d", second="c"), row("e")]
    assign(rows, later)
    assert (later[0]["place"], later[0]["split"]) == (rows[2]["place"], rows[2]["split"])
    assert later[1]["place"] not in {r["place"] for r in rows}
    # The first date stays, of the second another picture came.
    newer = [row("f")]
    assign([{**rows[0], "second": "f"}, *rows[1:]], newer)
    assert newer[0]["place"] == rows[0]["place"]


def test_a_thousand_copies_are_decoded_once_each():
    looked: Counter[int] = Counter()

    def fetch(shard: str, offset: int, size: int) -> bytes:
        looked[offset] += 1
        return tiles[offset % 2]

    tiles = [encoded(pixels(1)), encoded(pixels(2))]
    rows = [row(f"{i}", phash="0f" * 8, offset=i) for i in range(1000)]
    counts = assign([], rows, fetch)
    assert counts["near_duplicates"] == 998
    assert len({r["place"] for r in rows}) == 2
    assert set(looked.values()) == {1}
    assert assign(rows, [row("again", phash="0f" * 8, offset=3)], fetch)["near_duplicates"] == 1


def test_recompressed_copy_is_found_and_another_scene_is_not(aid):
    files = sorted(aid.glob("*/*"))[::40]
    hits = 0
    for file in files:
        with Image.open(file) as image:
            original = np.asarray(image.convert("RGB"))
        copy = np.asarray(Image.open(io.BytesIO(encoded(original, "JPEG"))))
        apart = int(measure(original).phash, 16) ^ int(measure(copy).phash, 16)
        hits += apart.bit_count() <= 3
        assert lookalikes.look_alike(encoded(original), encoded(copy))
    assert hits >= 0.9 * len(files)
    assert not lookalikes.look_alike(files[0].read_bytes(), files[1].read_bytes())


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
    assert lookalikes.look_alike(one, two)
    assert not lookalikes.look_alike(one, other)


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
