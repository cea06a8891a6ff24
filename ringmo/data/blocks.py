"""Splits inside a scene: strips of its tiles, so that one chip can be trained and tested on.

Along its longer side a scene is train, a gap, val, a gap, test; tiles of a gap are unused. Between
two splits lies ground that no tile of either covers: one tile at least where tiles do not overlap.
Whatever has seen the same ground (other sensors, other dates) has the same strips.

A strip is a place of its own. What is decided never changes: a tile on the grid of a known one,
or in its window, takes what that one has. And no strip gets a tile that looks like one of another
split: that tile is unused.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ringmo.data import places
from ringmo.data.grouping import Index, join, stars
from ringmo.data.lookalikes import look_alikes, perceptual
from ringmo.data.partners import WINDOW, grids

if TYPE_CHECKING:
    import pandas

Words = NDArray[np.object_]

LEAST = 5  # tiles along a scene: train, gap, val, gap, test
TAUGHT = places.STRONGEST[:3]
STRIPS = ("train", "unused", "val", "unused", "test")
LOW, HIGH = ["minx", "miny"], ["maxx", "maxy"]
PIXELS = (("col", "row"), ("width", "height"))
ROUNDING = 1e-3  # of a tile's side


def assign(
    known: "pandas.DataFrame",
    new: "pandas.DataFrame",
    *,
    shares: dict[str, float],
    near_bits: int,
    blank_std: float,
    seed: int,
    fetch: Callable[[str, int, int], bytes],
    tell: Callable[[str], None],
) -> tuple["pandas.DataFrame", dict[str, int]]:
    """As `places.assign`, with scenes in strips; those too small for it are places as there.

    Args:
        tell: is given a note where scenes are not in strips, and why.
    """
    import pandas as pd

    index, new = new.index, new.reset_index(drop=True)
    known = known if len(known) else new.iloc[:0].assign(place="", split="")
    place, split = np.full(len(new), "", object), np.full(len(new), "", object)
    group, overlapping = places.ground(known, new)
    ours = group[len(known) :]
    _inherit(known, new, place, split)
    elders = np.isin(ours, group[: len(known)]) | np.isin(ours, ours[split != ""])
    _strips(new, ours, np.flatnonzero(~elders), shares, place, split, tell)
    settled = np.flatnonzero(split != "")
    decided = new.iloc[settled].assign(place=place[settled], split=split[settled])
    if len(settled):
        look = (near_bits, blank_std, fetch)
        split[settled] = decided["split"] = _kept_apart(known, decided, *look)
    rest = np.flatnonzero(split == "")
    counts = {"overlapping": 0, "near_duplicates": 0, "unused": 0}
    if len(rest):
        others = pd.concat([known, decided]) if len(settled) else known
        placed, counts = places.assign(
            others, new.iloc[rest], shares=shares, near_bits=near_bits, blank_std=blank_std,
            seed=seed, fetch=fetch,
        )  # fmt: skip
        place[rest], split[rest] = placed["place"], placed["split"]
    counts |= {"overlapping": overlapping, "unused": int((split == "unused").sum())}
    done = new.assign(place=place, split=split).astype({"place": "str", "split": "str"})
    return done.set_index(index), counts


def _inherit(
    known: "pandas.DataFrame", new: "pandas.DataFrame", place: Words, split: Words
) -> None:
    """Tile by tile, place and split of the known one on the same grid or in the same window."""
    import pandas as pd

    first = len(known)
    if not first:
        return
    both = pd.concat([known, new], ignore_index=True)
    where = both.groupby(["source_root", "source", *WINDOW], sort=False, dropna=False).ngroup()
    links = [_links(codes, first) for codes in (grids(both), np.asarray(where, np.int64))]
    dates = places.second_dates(known, new)
    dates = np.sort(dates[(dates < first).sum(axis=1) == 1], axis=1)
    pairs = np.unique(np.concatenate([*links, dates]), axis=0)
    found = pd.DataFrame({"new": pairs[:, 1] - first, "old": pairs[:, 0]})
    for name in ("place", "split"):
        found[name] = known[name].to_numpy(object)[found["old"]]
    found["rank"] = found["split"].map(places.STRONGEST.index)
    found = found.sort_values(["new", "rank", "place"])
    torn = found["new"].map(found.groupby("new")["split"].nunique()) > 1
    found.loc[torn, "split"] = "unused"
    found = found.drop_duplicates("new")
    at = found["new"].to_numpy(np.int64)
    place[at], split[at] = found["place"], found["split"]
    # What else a scene has that is partly known belongs to its place, where it has but one.
    scene = new.groupby(["source_root", "source"], sort=False, dropna=False).ngroup().to_numpy()
    for one in np.intersect1d(scene[at], scene[split == ""]):
        members = np.flatnonzero(scene == one)
        left = members[split[members] == ""]
        names = set(place[members]) - {""}
        alone = len(names) == 1
        whole = members[place[members] != ""][0]
        place[left] = place[whole] if alone else _name(new, left)
        split[left] = split[whole] if alone else "unused"


def _links(codes: Index, first: int) -> Index:
    """Pairs (known, new) of the same code, of all known ones that have it."""
    import pandas as pd

    rows = pd.DataFrame({"code": codes, "row": np.arange(len(codes))})
    rows = rows[rows["code"] >= 0]
    old, new = rows[rows["row"] < first], rows[rows["row"] >= first]
    pairs: Index = old.merge(new, on="code")[["row_x", "row_y"]].to_numpy(np.int64)
    return pairs


def _strips(
    new: "pandas.DataFrame",
    group: Index,
    rows: Index,
    shares: dict[str, float],
    place: Words,
    split: Words,
    tell: Callable[[str], None],
) -> None:
    """Place and split of the tiles of each group that is large enough."""
    order = rows[np.argsort(group[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    small: list[int] = []
    for members in np.split(order, starts[1:]) if len(order) else []:
        strips = _strips_of(new, members, shares) if len(members) >= LEAST else None
        if strips is None:
            small.append(int(members[0]))
            continue
        split[members] = np.array(STRIPS, object)[strips]
        for strip in np.unique(strips):
            some = members[strips == strip]
            place[some] = _name(new, some)
    if small:
        tell(
            f"split.by: block: {len(small)} scenes are split by place: fewer than {LEAST} tiles "
            f"along their longer side (first: {new['source'].iloc[min(small)]})"
        )


def _name(new: "pandas.DataFrame", rows: Index) -> str:
    return f"p{new['key'].iloc[rows].min()}"


def _strips_of(
    new: "pandas.DataFrame", members: Index, shares: dict[str, float]
) -> NDArray[np.int64] | None:
    """The strip (its number in STRIPS) of each tile of one ground; None where it is too small.

    The scene of the largest tiles says where the strips are. Tiles of others, on whatever grid,
    are in one where they lie wholly in it.
    """
    tiles = new.iloc[members]
    if tiles["crs"].notna().all() and tiles["crs"].nunique() == 1:
        low, high = (tiles[names].to_numpy(np.float64) for names in (LOW, HIGH))
        # From the top, as pixels are.
        low, high = np.stack([low[:, 0], -high[:, 1]]), np.stack([high[:, 0], -low[:, 1]])
    elif tiles["crs"].isna().all():
        corner, size = (tiles[list(names)].to_numpy(np.float64).T for names in PIXELS)
        low, high = corner, corner + size
    else:
        return None
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return None
    scene = tiles.groupby(["source_root", "source"], dropna=False).ngroup().to_numpy()
    counts = np.bincount(scene)
    sides = np.bincount(scene, (high - low).prod(axis=0)) / counts
    for one in np.lexsort((-counts, -sides.round(6))):
        chosen = scene == one
        extent = (high[:, chosen].max(axis=1) - low[:, chosen].min(axis=1)).round(6)
        axis = int(extent[1] > extent[0])
        start, end = low[axis], high[axis]
        slack = ROUNDING * float((end - start)[chosen].min())
        edges = _edges(start[chosen], end[chosen], slack, shares)
        if edges is not None:
            break
    else:
        return None
    train, val, val_end, test = edges
    strips = np.where(start < val - slack, 1, 3)
    strips[end <= train + slack] = 0
    strips[(start >= val - slack) & (end <= val_end + slack)] = 2
    strips[start >= test - slack] = 4
    return strips


def _edges(
    start: NDArray[np.float64], end: NDArray[np.float64], slack: float, shares: dict[str, float]
) -> tuple[float, float, float, float] | None:
    """Where train ends, val begins and ends, and test begins, along one side of a scene."""
    order = np.argsort(start)
    first = np.flatnonzero(np.diff(start[order], prepend=-np.inf) > slack)
    low = start[order][first]
    high = np.maximum.accumulate(np.maximum.reduceat(end[order], first))
    count = len(low)
    if count < LEAST:
        return None

    def before(i: int) -> int:
        """The last tile with a tile between it and i, and ground that neither covers; or -1."""
        return min(int(np.searchsorted(high, low[i] - slack)) - 1, i - 2) if i > 1 else -1

    gaps = 2 * (count - 2 - before(count - 1))
    wanted = [max(1, round(shares[name] * (count - gaps))) for name in ("test", "val")]
    for tests, vals in (wanted, [1, 1]):
        test = count - tests
        val_end = before(test)
        val = val_end - vals + 1
        train = before(val) if val >= 0 else -1
        if train >= 0:
            return float(high[train]), float(low[val]), float(high[val_end]), float(low[test])
    return None


def _kept_apart(
    known: "pandas.DataFrame",
    decided: "pandas.DataFrame",
    near_bits: int,
    blank_std: float,
    fetch: Callable[[str, int, int], bytes],
) -> Words:
    """The splits of decided tiles, `unused` where one looks like a tile of another split."""
    import pandas as pd

    both = pd.concat([known, decided], ignore_index=True)
    first = len(known)
    fresh = np.arange(len(both)) >= first
    textured = both["std"].to_numpy(np.float64) >= blank_std
    hashes = perceptual(both["phash"], textured)
    where = [both[name].array for name in ("shard", "offset", "size")]
    pairs = [np.empty((0, 2), np.int64)]
    for sensor in decided["sensor"].unique():
        rows = np.flatnonzero(textured & (both["sensor"] == sensor).to_numpy())

        def look(i: int, rows: Index = rows) -> bytes:
            shard, offset, size = (column[rows[int(i)]] for column in where)
            return fetch(str(shard), int(offset), int(size))

        each = np.arange(len(rows))
        alike = look_alikes(hashes[rows], near_bits, fresh[rows], each, look)
        pairs.append(rows[alike])
    alone = np.arange(len(both))
    alike, _ = join(alone, np.concatenate(pairs))
    rank = np.array([places.STRONGEST.index(word) for word in both["split"]])
    taught = rank < len(TAUGHT)
    has = np.zeros((int(alike.max()) + 1, len(TAUGHT)), np.bool_)
    has[alike[~fresh & taught], rank[~fresh & taught]] = True
    old = has.sum(axis=1)
    may = np.where(old == 1, has.argmax(axis=1), -1)
    has[alike[taught], rank[taught]] = True
    may = np.where(old == 0, has.argmax(axis=1), may)
    out = fresh & taught & (may[alike] != rank)
    # What has seen the same ground goes with it.
    same = stars(grids(both)), places.second_dates(both.iloc[:0], both)
    cells, _ = join(alone, np.concatenate(same))
    spoilt = np.zeros(int(cells.max()) + 1, np.bool_)
    spoilt[cells[out]] = True
    split: Words = both["split"].to_numpy(object)
    split[fresh & spoilt[cells]] = "unused"
    return split[first:]
