"""Footprints that share ground, across reference systems and the 180th meridian.

Millions are known when a few thousand come: whatever looks at all of them is done on whole
columns.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.grouping import Flags, Index, links
from ringmo.data.partners import SIDES

if TYPE_CHECKING:
    import pandas

Boxes = NDArray[np.float64]  # (N, 4): minx, miny, maxx, maxy

# Neighbours on a grid share an edge, no ground: less than this share of a side is rounding.
TOUCHING = 0.005
ROUNDING = 1e-9  # of a shape's area: less than this beyond 180 degrees is none
POINTS = 1_000_000  # transformed at a time
QUERIES = 200_000  # footprints looked up at a time
FEW = 20_000  # footprints, of which it is not worth the while to ask which are within reach
LATTICE = 64  # cells a side in which a reference system is taken to be straight
RASTER = 1024  # cells a side, over the ground that newcomers cover


def overlaps(tiles: "pandas.DataFrame", new: Flags) -> Index:
    """Pairs of tiles whose footprints share ground, one of them new at least.

    Candidates are found by longitude and latitude; tiles of one CRS are compared in it, where
    footprints are exact rectangles. Pairs are complete up to identical footprints, which are
    linked as identical hashes are (`lookalikes.near_duplicates`).

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
    meet = links(renumbered[classes[kept]], renumbered[pairs], new[rows[kept]])
    return np.sort(rows[kept][meet], axis=1)


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
            corners = project(crs, corners)
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


def project(crs: str, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (N, K, 2) to longitude and latitude; all K are infinite where one is off the Earth
    or cannot be told apart from such."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    if points.size > 2 * POINTS and len(points) > 1:
        half = len(points) // 2
        return np.concatenate([project(crs, points[:half]), project(crs, points[half:])])
    xs, ys = points[..., 0].ravel(), points[..., 1].ravel()
    try:
        projected = np.stack(transform(crs, "EPSG:4326", xs, ys), axis=-1)
    except CPLE_BaseError:
        # One point beyond the horizon of a geostationary view spoils the whole call.
        if len(points) == 1:
            return np.full_like(points, np.inf)
        half = len(points) // 2
        return np.concatenate([project(crs, points[:half]), project(crs, points[half:])])
    return projected.reshape(points.shape)


def outline(ring: NDArray[np.float64], geographic: bool) -> Any | None:
    """A closed ring (K, 2) of longitudes and latitudes as a shape within -180 to 180.

    Its points, joined by straight lines; in two parts where it lies across 180 degrees, and all
    longitudes where a pole is inside. None where it is no place on Earth.

    Args:
        geographic: whether the ring is of degrees from the start, so that a step may be more than
            half way around; from one point to the next of others it is the short way.
    """
    import shapely

    x, y = ring.T
    if not np.isfinite(ring).all() or np.abs(y).max() > 90:
        return None
    steps = np.diff(x)
    if not geographic:
        steps = (steps + 180) % 360 - 180
    if abs(steps.sum()) > 180:
        south, north = (y.min(), 90) if y.mean() > 0 else (-90, y.max())
        return shapely.box(-180, south, 180, north)
    x = x[0] + np.concatenate([[0], steps[:-1].cumsum(), [0]])  # closed to the last bit
    if np.abs(x).max() > 360:
        return None
    return _within(shapely.Polygon(np.stack((x, y), 1)))


def _within(shape: Any) -> Any | None:
    """A shape of longitudes from -540 to 540 as one within -180 to 180; None: it has no area."""
    import shapely
    from shapely.affinity import translate

    west, _, east, _ = shape.bounds
    if west >= -180 and east <= 180:
        return shape
    shape, parts = shapely.make_valid(shape), []
    for turn in (-360, 0, 360):
        part = shapely.intersection(shape, shapely.box(turn - 180, -90, turn + 180, 90))
        if part.area > ROUNDING * shape.area:
            parts.append(translate(part, -turn))
    return shapely.union_all(parts) if parts else None


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
    seen = project(crs, middle[:, None] + nine * half)
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
