"""Places and splits: tiles that overlap or nearly do are one place, and a place has one split.

A place's split is decided when it is first seen and never changes: the promise that no test tile,
nor one that resembles it, has ever trained anything.

Millions of tiles are known when a few thousand come: whatever looks at all of them is done on
whole columns, and only what the newcomers may touch is looked at one by one.
"""

import hashlib
from binascii import unhexlify
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.decode import decode
from ringmo.data.measures import grey, thumbnail
from ringmo.data.partners import SIDES, grids
from ringmo.data.tables import SEPARATOR, by_class, classes_of

if TYPE_CHECKING:
    import pandas

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]
Boxes = NDArray[np.float64]  # (N, 4): minx, miny, maxx, maxy

# Which split a newcomer takes where it could take several: what must stay unseen goes first.
STRONGEST = ("test", "val", "train", "unused")
# Below this correlation of their thumbnails two tiles with near hashes are still two places.
SAME_CORRELATION = 0.9
# A product of matrices rounds otherwise than one of vectors: so near the limit, the latter decides.
ROUNDING = 1e-4
# Neighbours on a grid share an edge, no ground: less than this share of a side is rounding.
TOUCHING = 0.005

# Hashes that agree in the same bits are compared each with each up to this number, more are sorted
# by further bits. So many distinct ones differ in 12 bits or more, which ends the sorting.
CROWD = 4096
THUMBNAILS = 250_000  # kept at a time: 1 GB
PORTION = 100_000  # pairs of hashes at a time
BLOCK, COLUMNS = 256, 4096  # thumbnails compared each with each at a time
POINTS = 1_000_000  # transformed at a time
QUERIES = 200_000  # footprints looked up at a time
FEW = 20_000  # footprints, of which it is not worth the while to ask which are within reach
LATTICE = 64  # cells a side in which a reference system is taken to be straight
RASTER = 1024  # cells a side, over the ground that newcomers cover


def near_duplicates(hashes: NDArray[np.uint64], bits: int, new: Flags) -> Index:
    """Pairs whose hashes differ in at most `bits` (0 to 3) of 64 bits, one of them new at least.

    Complete up to identical hashes, whose pairs are the square of their number. They are linked
    as a star about the first new one of them, and have one pair with those of another hash (if
    all of them are known, each has a pair with the first new one of some other hash). So what
    all pairs would join these pairs join; and where two tiles of any pair bear different names,
    the tiles of one of these do.

    Returns:
        (N, 2) row numbers, i < j, each pair once.
    """
    values, classes = np.unique(hashes, return_inverse=True)
    fresh = np.zeros(len(values), np.bool_)
    fresh[classes[new]] = True
    return _links(classes, _near(values, bits, fresh, list(range(64))), new)


def _near(values: NDArray[np.uint64], bits: int, new: Flags, free: list[int]) -> Index:
    """All pairs (N, 2) of distinct `values`, which differ in the bits `free` only.

    The bits are dealt into bits + 3 blocks. Two values that differ in so few bits agree in three
    blocks at least, whichever: only values that share three are compared. 32 bits that agree part
    two million hashes well, also where some bits tell little.
    """
    found = [np.empty((0, 2), np.int64)]
    if bits == 0 or not new.any():
        return found[0]
    blocks = [free[i :: bits + 3] for i in range(bits + 3)]
    masks = [np.uint64(sum(1 << bit for bit in block)) for block in blocks]
    for chosen in combinations(range(len(blocks)), 3):
        mask = masks[chosen[0]] | masks[chosen[1]] | masks[chosen[2]]
        others = [masks[i] for i in range(chosen[2]) if i not in chosen]
        keys = values & mask
        rows = np.arange(len(values)) if new.all() else _sharing(keys, new)
        rows = rows[np.argsort(keys[rows])]
        starts = np.flatnonzero(np.diff(keys[rows], prepend=~keys[rows[:1]]))
        sizes = np.diff(starts, append=len(rows))
        crowded = sizes > CROWD
        pairs = list(_each_with_each(rows[np.repeat(~crowded, sizes)], keys))
        for start, size in zip(starts[crowded], sizes[crowded], strict=True):
            crowd = rows[start : start + size]
            rest = [bit for i, block in enumerate(blocks) if i not in chosen for bit in block]
            pairs.append(crowd[_near(values[crowd], bits, new[crowd], rest)])
        for a, b in (pair.T for pair in pairs):
            apart = values[a] ^ values[b]
            near = (np.bitwise_count(apart) <= bits) & (new[a] | new[b])
            # What agrees in more than three blocks is found again, and told the first time only.
            for other in others:
                near &= (apart & other) != 0
            found.append(np.stack([a[near], b[near]], axis=1))
    return np.concatenate(found)


def _sharing(keys: NDArray[np.uint64], new: Flags) -> Index:
    """Row numbers of the new, and of nearly only those known ones that share a new one's key."""
    scattered = (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(42)
    there = np.zeros(1 << 22, np.bool_)
    there[scattered[new]] = True
    return np.flatnonzero(there[scattered])


def _each_with_each(rows: Index, keys: NDArray[np.uint64]) -> Iterator[Index]:
    """Pairs of rows, sorted by their keys, that share one."""
    ordered = keys[rows]
    left, step = np.arange(len(rows)), 1
    while True:
        left = left[left + step < len(rows)]
        left = left[ordered[left] == ordered[left + step]]
        if not len(left):
            return
        yield np.stack([rows[left], rows[left + step]], axis=1)
        step += 1


def _links(classes: Index, pairs: Index, new: Flags) -> Index:
    """Pairs of rows that join what all pairs of the rows in those classes would join.

    Args:
        classes: of each row, 0 to n - 1; the rows of one belong together, if one of them is new.
        pairs: (M, 2) of classes; in one class of each pair is a new row.

    Returns:
        (N, 2), i < j, each pair once, one of the two new.
    """
    order = np.lexsort((~new, classes))
    head = order[np.flatnonzero(np.diff(classes[order], prepend=-1))]  # a new one, if there is any
    fresh = new[head]
    rest = np.ones(len(classes), np.bool_)
    rest[head] = False
    star = np.flatnonzero(rest & fresh[classes])
    links = [head[pairs], np.stack([head[classes[star]], star], axis=1)]
    # Rows of a class without a new one are joined by what is near to all of them.
    first, second = pairs.T
    partner = np.full(len(head), -1)
    for old, other in ((first, second), (second, first)):
        partner[old[~fresh[old]]] = other[~fresh[old]]
    stray = np.flatnonzero(rest & ~fresh[classes] & (partner[classes] >= 0))
    links.append(np.stack([head[partner[classes[stray]]], stray], axis=1))
    found = np.concatenate(links)
    return np.stack([found.min(axis=1), found.max(axis=1)], axis=1)


def overlaps(tiles: "pandas.DataFrame", new: Flags) -> Index:
    """Pairs of tiles whose footprints share ground, one of them new at least.

    Candidates are found by longitude and latitude; tiles of one CRS are compared in it, where
    footprints are exact rectangles. Pairs are complete up to identical footprints, which are
    linked as identical hashes are (`near_duplicates`).

    Args:
        tiles: crs, minx, miny, maxx, maxy; tiles without a CRS or an area share no ground.

    Returns:
        (N, 2) row numbers, i < j, each pair once.
    """
    import pandas as pd

    codes, crs = pd.factorize(tiles["crs"])
    native = tiles[list(SIDES)].to_numpy(np.float64)
    area = (native[:, 2] > native[:, 0]) & (native[:, 3] > native[:, 1])
    usable = (codes >= 0) & area & np.isfinite(native).all(axis=1)
    rows = np.flatnonzero(usable)
    if not new[rows].any():
        return np.empty((0, 2), np.int64)
    names = [str(name) for name in crs]
    if len(rows) > FEW and not new[rows].all():
        rows = rows[_within_reach(native[rows], codes[rows], names, new[rows])]

    order = np.lexsort((*native[rows].T, codes[rows]))
    rows = rows[order]
    differs = (np.diff(native[rows], axis=0) != 0).any(axis=1) | (np.diff(codes[rows]) != 0)
    starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
    classes = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rows)))
    fresh = np.zeros(len(starts), np.bool_)
    fresh[classes[new[rows]]] = True
    native, codes = native[rows[starts]], codes[rows[starts]]

    number, boxes, shifted = _degrees(native, codes, names)
    found = [np.empty((0, 2), np.int64)]
    for i, j in _meeting(boxes, fresh[number]):
        a, b = number[i], number[j]
        hit = (a != b) & (shifted[i] | shifted[j] | _share_ground(native, codes, a, b))
        found.append(np.stack([a[hit], b[hit]], axis=1))
    pairs = np.concatenate(found)
    if shifted.any():  # two footprints can meet on either side of the map
        pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    # Off the Earth nothing meets, not even the same footprint.
    there = np.zeros(len(starts), np.bool_)
    there[number] = True
    kept = np.flatnonzero(there[classes])
    renumbered = np.cumsum(there) - 1
    links = _links(renumbered[classes[kept]], renumbered[pairs], new[rows[kept]])
    return np.sort(rows[kept][links], axis=1)


def _meeting(boxes: Boxes, new: Flags) -> Iterator[tuple[Index, Index]]:
    """Numbers of boxes that share an inner point, one of two new at least, in portions."""
    import shapely

    # Of an index of boxes a diagonal is enough.
    diagonals = shapely.linestrings(boxes.reshape(-1, 2, 2))
    targets = np.flatnonzero(new)
    tree = shapely.STRtree(diagonals[targets])
    west, south, east, north = boxes.T
    for start in range(0, len(boxes), QUERIES):
        i, j = tree.query(diagonals[start : start + QUERIES])
        i, j = i + start, targets[j]
        once = ~new[i] | (i < j)
        i, j = i[once], j[once]
        hit = (west[i] < east[j]) & (west[j] < east[i])
        hit &= (south[i] < north[j]) & (south[j] < north[i])
        yield i[hit], j[hit]


def _share_ground(native: Boxes, codes: Index, a: Index, b: Index) -> Flags:
    """Whether footprints a and b, which meet in degrees, do in the CRS if they have one."""
    hit = np.ones(len(a), np.bool_)
    for low, high in ((0, 2), (1, 3)):
        common = np.minimum(native[a, high], native[b, high])
        common -= np.maximum(native[a, low], native[b, low])
        sides = native[:, high] - native[:, low]
        hit &= common > TOUCHING * np.minimum(sides[a], sides[b])
    return np.asarray(hit | (codes[a] != codes[b]))


def _degrees(native: Boxes, codes: Index, names: Sequence[str]) -> tuple[Index, Boxes, Flags]:
    """Row numbers, their footprints as (west, south, east, north) in EPSG:4326, and which of
    these are copies: a footprint across the 180th meridian appears on either side of the map.
    """
    numbers: list[Index] = [np.empty(0, np.int64)]
    boxes: list[Boxes] = [np.empty((0, 4))]
    shifted: list[Flags] = [np.empty(0, np.bool_)]
    for code, crs in sorted(enumerate(names), key=lambda named: named[1]):
        number = np.flatnonzero(codes == code)
        corners = native[number][:, [0, 1, 0, 3, 2, 1, 2, 3]].reshape(-1, 4, 2)
        if crs != "EPSG:4326":
            corners = _project(crs, corners)
        corners[~np.isfinite(corners).all(axis=(1, 2))] = np.inf
        with np.errstate(invalid="ignore"):
            span = np.ptp(corners[..., 0], axis=1)
        wraps = (span > 180) & (span < 360)
        corners[wraps, :, 0] %= 360
        box = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        usable = np.isfinite(box).all(axis=1)
        beyond = usable & (box[:, 2] > 180)
        numbers += [number[usable], number[beyond]]
        boxes += [box[usable], box[beyond] - [360.0, 0.0, 360.0, 0.0]]
        shifted += [np.zeros(usable.sum(), np.bool_), np.ones(beyond.sum(), np.bool_)]
    return np.concatenate(numbers), np.concatenate(boxes), np.concatenate(shifted)


def _project(crs: str, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (N, K, 2) to longitude and latitude; all K are infinite where one is off the Earth
    or cannot be told apart from such."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    if points.size > 2 * POINTS and len(points) > 1:
        half = len(points) // 2
        return np.concatenate([_project(crs, points[:half]), _project(crs, points[half:])])
    xs, ys = points[..., 0].ravel(), points[..., 1].ravel()
    try:
        projected = np.stack(transform(crs, "EPSG:4326", xs, ys), axis=-1)
    except CPLE_BaseError:
        # One point beyond the horizon of a geostationary view spoils the whole call.
        if len(points) == 1:
            return np.full_like(points, np.inf)
        half = len(points) // 2
        return np.concatenate([_project(crs, points[:half]), _project(crs, points[half:])])
    return projected.reshape(points.shape)


def _within_reach(native: Boxes, codes: Index, names: Sequence[str], new: Flags) -> Flags:
    """The new, and known footprints that may meet one of them: all that do and some others.

    To transform a million footprints for the few beside the newcomers takes seconds. In a
    small cell a reference system is nearly straight: nine points of each cell tell where its
    tiles lie, and how far from there at most. Where they do not (a pole, the 180th meridian,
    beyond a horizon), tiles count as within reach.
    """
    reach = new.copy()
    _, boxes, _ = _degrees(native[new], codes[new], names)
    if not len(boxes):
        return reach
    touched = _covered(boxes)
    for code, crs in enumerate(names):
        members = np.flatnonzero((codes == code) & ~new)
        if not len(members):
            continue
        known = native[members]
        if crs == "EPSG:4326":
            low, high, sure = known[:, :2], known[:, 2:], known[:, 2] - known[:, 0] <= 180
        else:
            low, high, sure = _about(known, crs)
        over = np.array([360.0, 0.0])
        hit = touched(low, high) | ((high[:, 0] > 180) & touched(low - over, high - over))
        reach[members] = hit | ~sure
    return reach


def _covered(boxes: Boxes) -> Callable[[Boxes, Boxes], Flags]:
    """A function of lower and upper corners (N, 2) that is true where one of `boxes` may be met.

    The boxes are drawn into a raster; sums over all cells to the lower left tell whether any
    cell of a rectangle is drawn.
    """
    lowest, highest = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    step = np.maximum((highest - lowest) / RASTER, 1e-12)

    def cell(points: Boxes) -> tuple[Index, Index]:
        x, y = np.clip((points - lowest) / step, 0, RASTER - 1).astype(np.int64).T
        return x, y

    (left, bottom), (right, top) = cell(boxes[:, :2]), cell(boxes[:, 2:])
    edges = np.zeros((RASTER + 1, RASTER + 1), np.int32)
    for x, y, sign in ((left, bottom, 1), (right + 1, bottom, -1), (left, top + 1, -1)):
        np.add.at(edges, (x, y), sign)
    np.add.at(edges, (right + 1, top + 1), 1)
    drawn = edges.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32) > 0
    sums = np.zeros((RASTER + 1, RASTER + 1), np.int32)
    sums[1:, 1:] = drawn[:-1, :-1].cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)

    def touched(low: Boxes, high: Boxes) -> Flags:
        hit: Flags = np.asarray(((low <= highest) & (high >= lowest)).all(axis=1))
        (left, bottom), (right, top) = cell(low[hit]), cell(high[hit])
        inside = sums[right + 1, top + 1] - sums[left, top + 1]
        hit[hit] = inside - sums[right + 1, bottom] + sums[left, bottom] > 0
        return hit

    return touched


def _about(native: Boxes, crs: str) -> tuple[Boxes, Boxes, Flags]:
    """Corners (N, 2) of boxes in degrees around footprints of one CRS, and which can be trusted."""
    centre, size = (native[:, :2] + native[:, 2:]) / 2, native[:, 2:] - native[:, :2]
    side = int(np.clip(np.sqrt(len(native) / 64), 1, LATTICE))
    low = centre.min(axis=0)
    step = np.maximum((centre.max(axis=0) - low) / side, 1e-12)
    column, row = np.minimum((centre - low) / step, side - 1).astype(np.int64).T
    cells = np.flatnonzero(np.bincount(column * side + row, minlength=side**2))
    where = np.zeros(side**2, np.int64)
    where[cells] = np.arange(len(cells))
    cell = where[column * side + row]

    half = (step + size.max(axis=0)) / 2  # every tile of the cell lies within, wholly
    middle = low + (np.stack([cells // side, cells % side], axis=1) + 0.5) * step
    nine = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)], np.float64)
    seen = _project(crs, middle[:, None] + nine * half)
    sure = np.isfinite(seen).all(axis=(1, 2))
    seen[~sure] = 0
    mean = seen.mean(axis=1)
    slopes = np.einsum("cpd,px->cxd", seen, nine) / 6  # least squares; (cells, x or y, degrees)
    bend = np.abs(seen - mean[:, None] - np.einsum("px,cxd->cpd", nine, slopes)).max(axis=1)
    sure &= (bend < 1).all(axis=1)

    at = (centre - middle[cell]) / half
    slopes = slopes[cell]
    about = mean[cell] + slopes[:, 0] * at[:, :1] + slopes[:, 1] * at[:, 1:]
    size /= 2 * half
    extent = np.abs(slopes[:, 0]) * size[:, :1] + np.abs(slopes[:, 1]) * size[:, 1:]
    extent += 4 * bend[cell] + 1e-9
    return about - extent, about + extent, sure[cell]


def assign(
    known: "pandas.DataFrame",
    new: "pandas.DataFrame",
    *,
    shares: dict[str, float],
    near_bits: int,
    blank_std: float,
    seed: int,
    fetch: Callable[[str, int, int], bytes],
) -> tuple["pandas.DataFrame", dict[str, int]]:
    """Places and splits of `new` tiles; `known` ones keep theirs.

    Args:
        known: tiles that have a place and a split, also those that left the store.
        new: newcomers; tiles of one scene bear the same source and source_root, and `second` is
            the key of a tile of the same ground at another date. Both tables have the manifest's
            columns; their index does not matter.
        shares: of test and val.
        blank_std: tiles with a smaller deviation look alike without being near.
        fetch: the encoded bytes of a tile, of its shard, offset and size.

    Returns:
        `new` with place and split; and counts: overlapping, near_duplicates (pairs that joined
        two groups), unused tiles.
    """
    import pandas as pd

    if known.empty:
        known = new.iloc[:0].assign(place="", split="")
    first, fresh = len(known), np.repeat([False, True], [len(known), len(new)])

    def both(name: str) -> "pandas.Series[Any]":
        return pd.concat([known[name], new[name]]) if first else new[name]

    counts = {"overlapping": 0, "near_duplicates": 0, "unused": 0}

    place_codes, places = pd.factorize(known["place"])
    group, counts["overlapping"] = ground(known, new)

    textured = both("std").to_numpy(np.float64) >= blank_std
    hashes = perceptual(both("phash"), textured)
    sensors, _ = pd.factorize(both("sensor"))
    addresses = [
        [table[name].array for name in ("shard", "offset", "size")] for table in (known, new)
    ]

    alike = [np.empty((0, 2), np.int64)]
    # One place seen twice has one footprint; what looks like it to another sensor proves nothing.
    for sensor in np.unique(sensors[first:]):
        rows = np.flatnonzero(textured & (sensors == sensor))

        def look(i: int, rows: Index = rows) -> bytes:
            i = int(rows[i])
            shard, offset, size = addresses[i >= first]
            i -= first * (i >= first)
            return fetch(str(shard[i]), int(offset[i]), int(size[i]))

        alike.append(rows[look_alikes(hashes[rows], near_bits, fresh[rows], group[rows], look)])
    group, counts["near_duplicates"] = join(group, np.concatenate(alike))

    name, split = _inherit(known, place_codes, places, group)
    unseen = np.flatnonzero(split == "")
    ours = group[first:][unseen]
    name[unseen], split[unseen] = _split(new.iloc[unseen], ours, known, shares, seed)
    counts["unused"] = int((split == "unused").sum())
    return new.assign(place=name, split=split).astype({"place": "str", "split": "str"}), counts


def ground(known: "pandas.DataFrame", new: "pandas.DataFrame") -> tuple[Index, int]:
    """Groups of tiles, known ones first, that share ground or a place, and how many pairs of
    groups overlap.

    The tiles of one scene are of one group, as are the two dates of a change pair, and what
    several sensors saw of one place: by its footprint, or without coordinates by its name.
    """
    import pandas as pd

    codes, places = pd.factorize(known["place"])
    scenes = new.groupby(["source_root", "source"], sort=False, dropna=False).ngroup().to_numpy()
    group = np.concatenate([codes, len(places) + scenes]).astype(np.int64)
    group, _ = join(group, second_dates(known, new))
    footprints = pd.concat([t[["crs", *SIDES]] for t in (known, new)], ignore_index=True)
    fresh = np.arange(len(footprints)) >= len(known)
    group, overlapping = join(group, overlaps(footprints, fresh))
    group, _ = join(group, _partners(known, new))
    return group, overlapping


def _partners(known: "pandas.DataFrame", new: "pandas.DataFrame") -> Index:
    """Pairs of rows without coordinates, known ones counted first, that are of one ground by
    their names."""
    import pandas as pd

    wanted = ["crs", *SIDES, "sensor", "source", "source_root", "row", "col", "width", "height"]
    rows = [np.flatnonzero(table["crs"].isna()) for table in (known, new)]
    some = [table[wanted].iloc[at] for table, at in zip((known, new), rows, strict=True)]
    if not len(rows[1]):
        return np.empty((0, 2), np.int64)
    # Newcomers first: what joins known ones is always one of them.
    codes = grids(pd.concat(some[::-1], ignore_index=True))
    codes[~np.isin(codes, codes[: len(rows[1])])] = -1
    at = np.concatenate([rows[1] + len(known), rows[0]])
    return at[stars(codes)]


def stars(codes: Index) -> Index:
    """Pairs of rows that join all rows of a code; -1 is none."""
    rows = np.flatnonzero(codes >= 0)
    _, heads, inverse = np.unique(codes[rows], return_index=True, return_inverse=True)
    return np.stack([rows[heads[inverse]], rows], axis=1)


def join(group: Index, pairs: Index) -> tuple[Index, int]:
    """Groups (N,), numbered from 0, once those of each pair of rows are one; and how many fewer."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = group[pairs[:, 0]], group[pairs[:, 1]]
    apart = a != b
    if not apart.any():
        return group, 0
    before = int(group.max()) + 1
    ones = np.ones(int(apart.sum()), np.bool_)
    graph = coo_array((ones, (a[apart], b[apart])), shape=(before, before))
    after, labels = connected_components(graph, directed=False)
    return labels[group].astype(np.int64), before - int(after)


def second_dates(known: "pandas.DataFrame", new: "pandas.DataFrame") -> Index:
    """Pairs of rows, known ones counted first, of which one is the other's second date."""
    import pandas as pd

    pairs = [np.empty((0, 2), np.int64)]
    if "second" not in new.columns:
        return pairs[0]

    def link(table: "pandas.DataFrame", start: int, rows: Any, keys: "pandas.Series[Any]") -> None:
        """Pairs of `rows` with the rows of the table that have these keys."""
        there = np.flatnonzero(table["key"].isin(keys))
        found = pd.Index(table["key"].iloc[there]).get_indexer(pd.Index(keys))
        pairs.append(np.stack([rows[found >= 0], start + there[found[found >= 0]]], axis=1))

    dated = np.flatnonzero(new["second"].notna())
    if len(dated):
        link(new, len(known), len(known) + dated, new["second"].iloc[dated])
        link(known, 0, len(known) + dated, new["second"].iloc[dated])
    if "second" in known.columns:
        dated = np.flatnonzero(known["second"].notna())
        link(new, len(known), dated, known["second"].iloc[dated])
    return np.concatenate(pairs)


def perceptual(column: "pandas.Series[Any]", wanted: Flags) -> NDArray[np.uint64]:
    """Perceptual hashes of 16 hex digits as numbers; 0 where none is wanted."""
    import pyarrow as pa

    hashes = np.zeros(len(column), np.uint64)
    if not wanted.any():
        return hashes
    text = pa.array(column[wanted])
    if isinstance(text, pa.ChunkedArray):
        text = pa.concat_arrays(text.chunks)
    digits = text.cast(pa.binary(16))
    ends = 16 * digits.offset, 16 * (digits.offset + len(digits))
    hashes[wanted] = np.frombuffer(unhexlify(digits.buffers()[1][slice(*ends)]), ">u8")
    return hashes


class Groups:
    """Union-find over numbers; one that was never joined is a group of its own."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def find(self, i: int) -> int:
        parent = self._parent
        while (above := parent.get(i, i)) != i:
            parent[i] = i = parent.get(above, above)
        return i

    def join(self, i: int, j: int) -> bool:
        """Whether the two were apart."""
        i, j = sorted((self.find(i), self.find(j)))
        if i == j:
            return False
        self._parent[j] = i
        return True


class Thumbnails:
    """Thumbnails about their mean, and their norms; a tile is decoded when first asked for."""

    def __init__(self, fetch: Callable[[int], bytes]) -> None:
        self._fetch = fetch
        self._seen: dict[int, tuple[NDArray[np.float32], np.float32]] = {}

    def __getitem__(self, i: int) -> tuple[NDArray[np.float32], np.float32]:
        found = self._seen.get(i)
        if found is None:
            if len(self._seen) >= THUMBNAILS:
                self._seen.clear()
            found = self._seen[i] = _centred(self._fetch(i))
        return found

    def forget(self) -> None:
        self._seen.clear()

    def alike(self, i: int, j: int) -> bool:
        return _alike(*self[i], *self[j])

    def each_alike(self, rows: Index, columns: Index) -> Flags:
        """(rows, columns)."""
        one, ones = zip(*(self[int(i)] for i in rows), strict=True)
        two, twos = zip(*(self[int(j)] for j in columns), strict=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.stack(one) @ np.stack(two).T / np.outer(ones, twos)
        same: Flags = correlation > SAME_CORRELATION
        for i, j in np.argwhere(np.abs(correlation - SAME_CORRELATION) < ROUNDING):
            same[i, j] = _alike(one[i], ones[i], two[j], twos[j])
        return same


def look_alike(a: bytes, b: bytes) -> bool:
    """Whether the thumbnails of two encoded tiles correlate as only the same ground does."""
    return _alike(*_centred(a), *_centred(b))


def _centred(data: bytes) -> tuple[NDArray[np.float32], np.float32]:
    shade = thumbnail(grey(decode(data))).ravel()
    shade = shade - shade.mean()
    return shade, np.linalg.norm(shade)


def _alike(
    one: NDArray[np.float32], norm: np.float32, two: NDArray[np.float32], other: np.float32
) -> bool:
    scale = float(norm * other)
    return scale > 0 and float(one @ two) / scale > SAME_CORRELATION


def look_alikes(
    hashes: NDArray[np.uint64], bits: int, new: Flags, group: Index, fetch: Callable[[int], bytes]
) -> Index:
    """Pairs (N, 2) of near hashes that look alike, as many as join all groups that such pairs do.

    Only tiles still apart are looked at, so that a thousand copies cost a thousand looks. What
    hangs together by near hashes is judged in one go, and its thumbnails are forgotten then.
    """
    values, classes = np.unique(hashes, return_inverse=True)
    fresh = np.zeros(len(values), np.bool_)
    fresh[classes[new]] = True
    alone = np.flatnonzero(fresh & (np.bincount(classes, minlength=len(values)) > 1))
    near = np.sort(_near(values, bits, fresh, list(range(64))), axis=1)
    pairs = np.concatenate([np.stack([alone, alone], axis=1), near])
    # Of millions of hashes few are near another.
    there, renumbered = np.unique(pairs, return_inverse=True)
    pairs = renumbered.reshape(-1, 2)
    number = np.full(len(values), -1)
    number[there] = np.arange(len(there))
    members = np.flatnonzero(number[classes] >= 0)
    classes = number[classes[members]]
    members = members[np.argsort(classes, kind="stable")]
    sizes = np.bincount(classes, minlength=len(there))
    starts = np.cumsum(sizes) - sizes
    cluster = join(np.arange(len(there)), pairs)[0][pairs[:, 0]]
    # Identical ones first: that leaves the fewest apart.
    order = np.lexsort((pairs[:, 1], pairs[:, 0], pairs[:, 0] != pairs[:, 1], cluster))
    pairs, cluster = pairs[order], cluster[order]
    single = (sizes[pairs] == 1).all(axis=1)
    heads = members[starts[pairs]]

    thumbnails, groups = Thumbnails(fetch), Groups()
    found: list[tuple[int, int]] = []
    for portion in range(0, len(pairs), PORTION):
        some = slice(portion, portion + PORTION)
        begins = np.diff(cluster[some], prepend=-1) != 0
        names = zip(*(x.tolist() for x in (*heads[some].T, *group[heads[some]].T)), strict=True)
        for begin, alone_both, (u, v), (i, j, one, two) in zip(
            begins.tolist(), single[some].tolist(), pairs[some], names, strict=True
        ):
            if begin:
                thumbnails.forget()
            if alone_both:
                if groups.find(one) != groups.find(two) and thumbnails.alike(i, j):
                    groups.join(one, two)
                    found.append((i, j))
            else:
                rows = members[starts[u] : starts[u] + sizes[u]]
                columns = members[starts[v] : starts[v] + sizes[v]]
                found += _compare(rows, columns, new, group, groups, thumbnails)
    return np.array(found, np.int64).reshape(-1, 2)


def _compare(
    rows: Index, columns: Index, new: Flags, group: Index, groups: Groups, thumbnails: Thumbnails
) -> list[tuple[int, int]]:
    """Join the groups of all rows and columns that look alike; the pairs that joined two.

    First one row, then two, then four: where all look alike, the first joins them.
    """
    found: list[tuple[int, int]] = []

    def roots(names: Index) -> Index:
        some, where = np.unique(names, return_inverse=True)
        return np.array([groups.find(name) for name in some.tolist()], np.int64)[where]

    names, others = roots(group[rows]), roots(group[columns])
    start, step = 0, 1
    while start < len(rows):
        block = slice(start, start + step)
        start, step = start + step, min(2 * step, BLOCK)
        own = names[block]
        mixed = (own != own[0]).any()
        apart = np.arange(len(others)) if mixed else np.flatnonzero(others != own[0])
        for portion in range(0, len(apart), COLUMNS):
            some = apart[portion : portion + COLUMNS]
            wanted = names[block][:, None] != others[some]
            wanted &= new[rows[block]][:, None] | new[columns[some]]
            high, wide = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
            if not len(high):
                continue
            left, top = rows[block][high], columns[some[wide]]
            hits = wanted[np.ix_(high, wide)]
            hits &= thumbnails.each_alike(left, top)
            for y, x in np.argwhere(hits).tolist():
                i, j = int(left[y]), int(top[x])
                if groups.join(int(group[i]), int(group[j])):
                    found.append((i, j))
            if hits.any():
                names, others = roots(names), roots(others)
    return found


def _inherit(
    known: "pandas.DataFrame", place: Index, places: Any, group: Index
) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Place and split of each newcomer in a group with known tiles, "" for all others.

    Args:
        place: of each known tile, as its number among the names `places`.
        group: of each known tile, then of each newcomer.
    """
    import pandas as pd

    groups, ours = group[: len(known)], group[len(known) :]
    name, split = np.full(len(ours), "", np.object_), np.full(len(ours), "", np.object_)
    count = int(group.max(initial=-1)) + 1
    touched = np.zeros(count, np.bool_)
    touched[ours] = True
    elders = np.flatnonzero(touched[groups])
    rank = _ranks(known["split"].iloc[elders])
    has = np.zeros((count, len(STRONGEST)), np.bool_)
    has[groups[elders], rank] = True

    # The strongest split's first place by name.
    strongest: Index = np.asarray(has.argmax(axis=1))
    best = elders[rank == strongest[groups[elders]]]
    pairs = pd.DataFrame({"group": groups[best], "place": place[best]}).drop_duplicates()
    pairs["name"] = np.asarray(places.take(pairs["place"].to_numpy()), np.object_)
    names = pairs.sort_values("name").drop_duplicates("group").set_index("group")["name"]
    heirs = np.flatnonzero(np.asarray(has.any(axis=1))[ours])
    name[heirs] = names.reindex(ours[heirs]).to_numpy(np.object_)
    # Between a place of one split and one of another, it belongs to neither.
    taught = has[:, :3]
    only = np.where(taught.sum(axis=1) == 1, taught.argmax(axis=1), STRONGEST.index("unused"))
    split[heirs] = np.array(STRONGEST, np.object_)[only[ours[heirs]]]
    return name, split


def _split(
    new: "pandas.DataFrame",
    group: Index,
    known: "pandas.DataFrame",
    shares: dict[str, float],
    seed: int,
) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Name and split of each tile's place: the split that lacks most of its share of the label.

    Large places come first, then by hash: the same places give the same splits in any order.
    Ties go to test, then val, so that the smallest class has samples in each.
    """
    import pandas as pd

    place, groups = pd.factorize(group)
    sizes = np.bincount(place, minlength=len(groups))
    lowest = pd.DataFrame({"key": new["key"].to_numpy(np.object_), "place": place})
    lowest = lowest.sort_values("key").drop_duplicates("place").sort_values("place")
    names = ("p" + lowest["key"]).to_numpy(np.object_)

    digests = b"".join(hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names)
    words_of = np.frombuffer(digests, ">u8").reshape(-1, 4)
    wanted = [shares["test"], shares["val"]]
    wanted.append(1 - sum(wanted))

    # Where one sensor's tiles have labels, the others' beside them are not to outvote them.
    labels, words = pd.factorize(_labels(new["label"]), sort=True)
    codes, known_words = pd.factorize(known["label"])
    if any(SEPARATOR in word for word in (*words, *known_words)):
        chosen = _of_many_classes(place, labels, words, known, sizes, words_of, wanted)
        return names[place], np.array(STRONGEST, np.object_)[chosen][place]
    votes = pd.DataFrame({"place": place, "label": labels})
    votes = votes.groupby(["place", "label"], sort=False).size().rename("votes").reset_index()
    nameless = np.array([word == "" for word in words], np.bool_)
    votes["nameless"] = nameless[votes["label"]]
    votes["votes"] *= -1
    votes = votes.sort_values(["place", "nameless", "votes", "label"])
    label = votes.drop_duplicates("place")["label"].to_numpy()

    have = np.bincount(4 * (codes + 1) + _ranks(known["split"]), minlength=4 * len(known_words) + 4)
    counts = {word: [0, 0, 0] for word in words}
    for word, of_word in zip(["", *known_words], have.reshape(-1, 4).tolist(), strict=True):
        if word in counts:
            counts[word] = [a + b for a, b in zip(counts[word], of_word[:3], strict=True)]
    order = np.lexsort((*words_of.T[::-1], -sizes))

    chosen = np.empty(len(names), np.int64)
    for i, size, of in zip(
        order.tolist(), sizes[order].tolist(), words[label[order]].tolist(), strict=True
    ):
        count = counts[of]
        total = sum(count) + size
        split = _lacks_most(wanted, count, total)
        count[split] += size
        chosen[i] = split
    return names[place], np.array(STRONGEST, np.object_)[chosen][place]


def _lacks_most(wanted: list[float], count: list[int], total: int) -> int:
    lack = [round(share * total - has, 9) for share, has in zip(wanted, count, strict=True)]
    return lack.index(max(lack))


def _of_many_classes(
    place: Index,
    labels: Index,
    words: Any,
    known: "pandas.DataFrame",
    sizes: Index,
    digests: NDArray[Any],
    wanted: list[float],
) -> Index:
    """The split of each place where tiles have several classes.

    Labels are too many to be parted one by one: a place goes where the rarest of its classes lacks
    most, those of rare classes first (iterative stratification, Sechidis et al. 2011).
    """
    import pandas as pd

    several = [classes_of(word) for word in words]
    votes = pd.DataFrame({"place": place, "class": [several[label] for label in labels]})
    votes = votes.explode("class").groupby(["place", "class"]).size().rename("votes").reset_index()
    before = []
    for split in STRONGEST[:3]:
        found = known["label"][known["split"] == split].value_counts()
        before.append(by_class({str(label): int(n) for label, n in found.items()}))
    total = votes.groupby("class")["votes"].sum()
    counts = {str(name): [of.get(str(name), 0) for of in before] for name in total.index}
    rarity = {str(name): float(n) + sum(counts[str(name)]) for name, n in total.items()}
    votes["rarity"] = votes["class"].map(rarity | {"": np.inf})
    votes = votes.sort_values(["place", "rarity", "class"])
    starts = [*np.flatnonzero(np.diff(votes["place"], prepend=-1)).tolist(), len(votes)]
    classes, numbers = votes["class"].tolist(), votes["votes"].tolist()
    rarest = votes["rarity"].to_numpy()[starts[:-1]]
    chosen = np.empty(len(sizes), np.int64)
    for i in np.lexsort((*digests.T[::-1], -sizes, rarest)).tolist():
        first, last = starts[i], starts[i + 1]
        count = counts[classes[first]]
        chosen[i] = to = _lacks_most(wanted, count, sum(count) + numbers[first])
        for name, number in zip(classes[first:last], numbers[first:last], strict=True):
            counts[name][to] += number
    return chosen


def _ranks(splits: "pandas.Series[Any]") -> Index:
    """Of each split its place in STRONGEST."""
    import pandas as pd

    codes, words = pd.factorize(splits)
    ranks: Index = np.array([STRONGEST.index(word) for word in words], np.int64)[codes]
    return ranks


def _labels(column: "pandas.Series[Any]") -> "pandas.Series[Any]":
    """Labels, "" where there is none."""
    return column.astype("str").where(column.notna(), "")
