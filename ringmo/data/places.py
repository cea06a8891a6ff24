"""Places and splits: tiles that overlap or nearly do are one place, and a place has one split.

A place's split is decided when it is first seen and never changes: the promise that no test tile,
nor one that resembles it, has ever trained anything.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.decode import decode
from ringmo.data.measures import grey, thumbnail

Row = dict[str, Any]

SPLITS = ("train", "val", "test")
# Which split a newcomer takes where it could take several: what must stay unseen goes first.
STRONGEST = ("test", "val", "train", "unused")
# Below this correlation of their thumbnails two tiles with near hashes are still two places.
SAME_CORRELATION = 0.9
# Neighbours on a grid share an edge, no ground: less than this share of a side is rounding.
TOUCHING = 0.005


class Groups:
    """Union-find over the numbers 0 to n - 1."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = i = self._parent[self._parent[i]]
        return i

    def join(self, i: int, j: int) -> bool:
        """Whether the two were apart."""
        i, j = sorted((self.find(i), self.find(j)))
        self._parent[j] = i
        return i != j


def near_duplicates(
    hashes: NDArray[np.uint64], bits: int, new: NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """Pairs whose hashes differ in at most `bits` (0 to 3) of 64 bits, one of them new at least.

    Two hashes that differ in three bits agree in one of four 16-bit bands: only tiles that share
    a band are compared.
    """
    for band in range(4):
        values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[order])) + 1
        for group in np.split(order, edges):
            fresh = group[new[group]]
            if len(group) < 2 or not len(fresh):
                continue
            for i in fresh:
                apart = np.bitwise_count(hashes[group] ^ hashes[i])
                for j in group[(apart <= bits) & ((group > i) | ~new[group])]:
                    yield int(min(i, j)), int(max(i, j))


def overlaps(rows: Sequence[Row], new: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Pairs of tiles whose footprints share ground, one of them new at least.

    Candidates are found by longitude and latitude; tiles of one CRS are compared in it, where
    footprints are exact rectangles.
    """
    index, boxes, shifted = _degrees(rows)
    if not len(index) or not new[index].any():
        return
    order = np.argsort(boxes[:, 0], kind="stable")
    index, boxes, shifted = index[order], boxes[order], shifted[order]
    west, south, east, north = boxes.T
    ends = np.searchsorted(west, east, side="left")
    fresh = new[index]
    for i in range(len(index)):
        later = slice(i + 1, ends[i])
        hit = (south[later] < north[i]) & (north[later] > south[i])
        if not fresh[i]:
            hit &= fresh[later]
        for j in np.flatnonzero(hit) + i + 1:
            a, b = int(index[i]), int(index[j])
            if a != b and (shifted[i] or shifted[j] or _share_ground(rows[a], rows[b])):
                yield min(a, b), max(a, b)


def _share_ground(a: Row, b: Row) -> bool:
    if a["crs"] != b["crs"]:
        return True
    for low, high in (("minx", "maxx"), ("miny", "maxy")):
        common = min(a[high], b[high]) - max(a[low], b[low])
        if common <= TOUCHING * min(a[high] - a[low], b[high] - b[low]):
            return False
    return True


def _degrees(
    rows: Sequence[Row],
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.bool_]]:
    """Row numbers, their footprints as (west, south, east, north) in EPSG:4326, and which of
    these are copies: a footprint across the 180th meridian appears on either side of the map.
    """
    by_crs: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if isinstance(row["crs"], str) and math.isfinite(row["minx"]):
            by_crs[row["crs"]].append(i)
    numbers: list[NDArray[np.intp]] = [np.empty(0, np.intp)]
    boxes: list[NDArray[np.float64]] = [np.empty((0, 4))]
    shifted: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]
    for crs, members in sorted(by_crs.items()):
        native = np.array([[rows[i][n] for n in ("minx", "miny", "maxx", "maxy")] for i in members])
        corners = native[:, [0, 1, 0, 3, 2, 1, 2, 3]].reshape(-1, 4, 2)
        if crs != "EPSG:4326":
            corners = _project(crs, corners)
        corners[~np.isfinite(corners).all(axis=(1, 2))] = np.inf
        with np.errstate(invalid="ignore"):
            span = np.ptp(corners[..., 0], axis=1)
        wraps = (span > 180) & (span < 360)
        corners[wraps, :, 0] %= 360
        box = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        number = np.array(members, np.intp)
        usable = np.isfinite(box).all(axis=1)
        beyond = usable & (box[:, 2] > 180)
        numbers += [number[usable], number[beyond]]
        boxes += [box[usable], box[beyond] - [360.0, 0.0, 360.0, 0.0]]
        shifted += [np.zeros(usable.sum(), np.bool_), np.ones(beyond.sum(), np.bool_)]
    return np.concatenate(numbers), np.concatenate(boxes), np.concatenate(shifted)


def _project(crs: str, corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners (N, 4, 2) to longitude and latitude; infinite where they lie off the Earth."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    xs, ys = corners[..., 0].ravel(), corners[..., 1].ravel()
    try:
        projected = np.stack(transform(crs, "EPSG:4326", xs, ys), axis=-1)
    except CPLE_BaseError:
        # One point beyond the horizon of a geostationary view spoils the whole call.
        if len(corners) == 1:
            return np.full_like(corners, np.inf)
        return np.concatenate([_project(crs, corner[None]) for corner in corners])
    return projected.reshape(corners.shape)


def assign(
    known: Sequence[Row],
    rows: Sequence[Row],
    *,
    shares: dict[str, float],
    near_bits: int,
    blank_std: float,
    seed: int,
    fetch: Callable[[Row], bytes],
) -> dict[str, int]:
    """Set `place` and `split` of new `rows`; `known` rows keep theirs.

    Args:
        known: tiles that have a place and a split, also those that left the store.
        rows: newcomers; tiles of one scene bear the same source and source_root.
        shares: of test and val.
        blank_std: tiles with a smaller deviation look alike without being near.
        fetch: the encoded bytes of a tile.

    Returns:
        Counts: overlapping, near_duplicates (pairs that joined two groups), unused tiles.
    """
    every = [*known, *rows]
    first = len(known)
    new = np.arange(len(every)) >= first
    groups = Groups(len(every))
    counts = {"overlapping": 0, "near_duplicates": 0, "unused": 0}

    by_place: dict[str, int] = {}
    for i, row in enumerate(known):
        groups.join(by_place.setdefault(row["place"], i), i)
    by_scene: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows, first):
        groups.join(by_scene.setdefault((row["source_root"], row["source"]), i), i)
    for i, j in overlaps(every, new):
        counts["overlapping"] += groups.join(i, j)

    textured = np.array([i for i, row in enumerate(every) if row["std"] >= blank_std], np.intp)
    hashes = np.array([int(every[i]["phash"], 16) for i in textured], np.uint64)
    for i, j in near_duplicates(hashes, near_bits, new[textured]):
        a, b = int(textured[i]), int(textured[j])
        if every[a]["sensor"] != every[b]["sensor"]:
            continue  # one place seen twice has one footprint; what looks like it proves nothing
        if groups.find(a) != groups.find(b) and look_alike(fetch(every[a]), fetch(every[b])):
            counts["near_duplicates"] += groups.join(a, b)

    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(every)):
        members[groups.find(i)].append(i)
    unseen: list[list[Row]] = []
    for group in members.values():
        newcomers = [every[i] for i in group if i >= first]
        if not newcomers:
            continue
        elders = [every[i] for i in group if i < first]
        if not elders:
            unseen.append(newcomers)
            continue
        splits = {row["split"] for row in elders} & set(SPLITS)
        strongest = min(elders, key=lambda row: (STRONGEST.index(row["split"]), row["place"]))
        for row in newcomers:
            row["place"] = strongest["place"]
            # Between a place of one split and one of another, it belongs to neither.
            row["split"] = next(iter(splits)) if len(splits) == 1 else "unused"
            counts["unused"] += row["split"] == "unused"
    _split(unseen, known, shares, seed)
    return counts


def look_alike(a: bytes, b: bytes) -> bool:
    """Whether the thumbnails of two encoded tiles correlate as only the same ground does."""
    one, two = (thumbnail(grey(decode(data))).ravel() for data in (a, b))
    one, two = one - one.mean(), two - two.mean()
    scale = float(np.linalg.norm(one) * np.linalg.norm(two))
    return scale > 0 and float(one @ two) / scale > SAME_CORRELATION


def _split(
    places: list[list[Row]], known: Sequence[Row], shares: dict[str, float], seed: int
) -> None:
    """Give each new place the split that lacks most of its share of the place's label.

    Large places come first, then by hash: the same places give the same splits in any order.
    Ties go to test, then val, so that the smallest class has samples in each.
    """
    wanted = {"test": shares["test"], "val": shares["val"]}
    wanted["train"] = 1 - sum(wanted.values())
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0))
    for row in known:
        if row["split"] in SPLITS:
            counts[_label(row)][row["split"]] += 1

    def order(named: tuple[str, list[Row]]) -> tuple[int, str]:
        name, rows = named
        return -len(rows), hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    for name, rows in sorted((("p" + min(r["key"] for r in g), g) for g in places), key=order):
        every = sorted(_label(row) for row in rows)
        # Where one sensor's tiles have labels, the others' beside them are not to outvote them.
        labels = [label for label in every if label] or every
        have = counts[max(labels, key=labels.count)]
        total = sum(have.values()) + len(rows)
        lack = {split: share * total - have[split] for split, share in wanted.items()}
        split = max(lack, key=lambda name: (round(lack[name], 9), STRONGEST[::-1].index(name)))
        have[split] += len(rows)
        for row in rows:
            row["place"], row["split"] = name, split


def _label(row: Row) -> str:
    return row["label"] if isinstance(row["label"], str) else ""
