"""Tiles of the same pixels of ground: what one sensor saw where another did.

Tiles with coordinates are on one grid where they have the same reference system, the same number
of pixels, and corners within a thousandth of a pixel. Tiles without are where they are the same
window of images of one name, seen by different sensors: of the same path below two sources
(S1/a/x.tif and S2/a/x.tif as ingest.sources S1 and S2), or below two folders of one source.
Suffixes do not count. Where two tiles of one sensor could be meant, none is.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.grouping import join

if TYPE_CHECKING:
    import pandas

Codes = NDArray[np.int64]

SIDES = ("minx", "miny", "maxx", "maxy")
NEAR = 1e-3  # of a pixel: corners no farther apart are the same
WINDOW = ["row", "col", "width", "height"]


def partners(tiles: "pandas.DataFrame", sensor: str, other: str) -> "pandas.Series[Any]":
    """For each tile of a sensor the key of the other sensor's tile on the identical grid.

    Of several, dates of one ground, it is the one of the same file name (its first part, as the
    names of one place begin alike), then the nearest in time, then the first by key.

    Args:
        tiles: rows of the manifest: key, sensor, source, source_root, row, col, width, height,
            crs, minx, miny, maxx, maxy, acquired.

    Returns:
        As long as `tiles` and with its index; None for tiles of other sensors, and for those
        without a partner.
    """
    import pandas as pd

    found = np.full(len(tiles), None, object)
    table = tiles[["key", "sensor", "source", "acquired"]].reset_index(drop=True)
    table["grid"] = grids(tiles)
    table["stem"] = table["source"].astype("str").str.extract(r"([^/]*?)\.?[^./]*$")[0]
    table["time"] = pd.to_datetime(table["acquired"], errors="coerce", utc=True, format="ISO8601")
    on_a_grid = table["grid"] >= 0
    ours = table[on_a_grid & (table["sensor"] == sensor)]
    theirs = table[on_a_grid & (table["sensor"] == other)]
    both = ours.reset_index().merge(theirs, on="grid", suffixes=("", "_other"))
    both = both[both["key"] != both["key_other"]]
    both["differs"] = both["stem"] != both["stem_other"]
    apart = (both["time"] - both["time_other"]).abs()
    both["apart"] = apart.fillna(pd.Timedelta.max)
    both = both.sort_values(["index", "differs", "apart", "key_other"]).drop_duplicates("index")
    found[both["index"].to_numpy()] = both["key_other"].to_numpy()
    return pd.Series(found, index=tiles.index, name=other, dtype=object)


def grids(tiles: "pandas.DataFrame") -> Codes:
    """A number for each tile, the same for tiles of the same pixels; -1 for one that has neither
    coordinates nor a partner by its name."""
    codes = np.full(len(tiles), -1, np.int64)
    bounds = tiles[list(SIDES)].to_numpy(np.float64)
    located = tiles["crs"].notna().to_numpy() & np.isfinite(bounds).all(axis=1)
    rows = np.flatnonzero(located)
    if len(rows):
        codes[rows] = _on_the_ground(tiles.iloc[rows], bounds[rows])
    rest = np.flatnonzero(~located)
    if len(rest) and tiles["sensor"].iloc[rest].nunique() > 1:
        named = _by_name(tiles.iloc[rest])
        codes[rest] = np.where(named < 0, -1, named + codes.max(initial=-1) + 1)
    return codes


def _on_the_ground(tiles: "pandas.DataFrame", bounds: NDArray[np.float64]) -> Codes:
    import pandas as pd

    sides = tiles[["width", "height"]].to_numpy(np.float64)
    crs = pd.factorize(tiles["crs"])[0]
    pixel = (bounds[:, 2:] - bounds[:, :2]) / np.maximum(sides, 1)
    columns = [crs, *sides.T]
    base = pd.DataFrame(dict(enumerate(columns))).groupby(list(range(3)), sort=False)
    group = base.ngroup().to_numpy()
    labels = [group]
    for side in range(4):
        near = NEAR * pixel[:, side % 2]
        order = np.lexsort((bounds[:, side], group))
        steps = np.diff(bounds[order, side]) > np.minimum(near[order[1:]], near[order[:-1]])
        steps |= np.diff(group[order]) != 0
        label = np.empty(len(order), np.int64)
        label[order] = np.concatenate([[0], np.cumsum(steps)])
        labels.append(label)
    every = pd.DataFrame(dict(enumerate(labels)))
    return every.groupby(list(every.columns), sort=False).ngroup().to_numpy().astype(np.int64)


def _by_name(tiles: "pandas.DataFrame") -> Codes:
    import pandas as pd

    path = tiles["source"].astype("str").str.replace(r"\.[^./]*$", "", regex=True)
    inner = path.str.partition("/")[2]
    table = tiles[["source_root", "sensor", *WINDOW]].reset_index(drop=True)
    table["path"], table["inner"] = path.to_numpy(), inner.to_numpy()
    links = [np.empty((0, 2), np.int64)]
    for name, also in (("path", []), ("inner", ["source_root"])):
        some = table[table[name] != ""]
        keys = [name, *also, *WINDOW]
        group = some.groupby(keys, sort=False, dropna=False).ngroup()
        # A corrected image is the same one, and may stand here twice.
        files = some.assign(group=group)[["group", "source_root", "path"]]
        count = files.drop_duplicates()["group"].value_counts()
        kinds = group.map(some["sensor"].groupby(group).nunique())
        usable = (kinds > 1) & (group.map(count) == kinds)
        rows, group = some.index[usable].to_numpy(), group[usable]
        first = pd.Series(rows, index=group.index).groupby(group).transform("first").to_numpy()
        links.append(np.stack([first, rows], axis=1))
    pairs = np.concatenate(links).astype(np.int64)
    codes = np.full(len(table), -1, np.int64)
    if len(pairs):
        parts, _ = join(np.arange(len(table)), pairs)
        there = np.unique(pairs)
        codes[there] = np.unique(parts[there], return_inverse=True)[1]
    return codes
