"""Places and splits: tiles that overlap or nearly do are one place, and a place has one split.

A place's split is decided when it is first seen and never changes: the promise that no test tile,
nor one that resembles it, has ever trained anything.

Millions of tiles are known when a few thousand come: whatever looks at all of them is done on
whole columns, and only what the newcomers may touch is looked at one by one.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.footprints import overlaps
from ringmo.data.grouping import Index, join, stars
from ringmo.data.lookalikes import look_alikes, perceptual
from ringmo.data.partners import SIDES, grids
from ringmo.data.tables import SEPARATOR, by_class, classes_of

if TYPE_CHECKING:
    import pandas

# Which split a newcomer takes where it could take several: what must stay unseen goes first.
STRONGEST = ("test", "val", "train", "unused")


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

    The tiles of one scene are of one group, also where it was cut otherwise before, as are the
    two dates of a change pair, and what several sensors saw of one place: by its footprint, or
    without coordinates by its name.
    """
    import pandas as pd

    codes, places = pd.factorize(known["place"])
    scenes = new.groupby(["source_root", "source"], sort=False, dropna=False).ngroup().to_numpy()
    group = np.concatenate([codes, len(places) + scenes]).astype(np.int64)
    group, _ = join(group, _known_scenes(known, new))
    group, _ = join(group, second_dates(known, new))
    footprints = pd.concat([t[["crs", *SIDES]] for t in (known, new)], ignore_index=True)
    fresh = np.arange(len(footprints)) >= len(known)
    group, overlapping = join(group, overlaps(footprints, fresh))
    group, _ = join(group, _partners(known, new))
    return group, overlapping


def _known_scenes(known: "pandas.DataFrame", new: "pandas.DataFrame") -> Index:
    """Pairs of rows, known ones counted first, of one scene."""
    import pandas as pd

    scene = ["source_root", "source"]
    old = np.flatnonzero(known["source"].isin(new["source"]))
    both = pd.concat([known[scene].iloc[old], new[scene]], ignore_index=True)
    codes = both.groupby(scene, sort=False, dropna=False).ngroup().to_numpy().astype(np.int64)
    codes[~np.isin(codes, codes[len(old) :])] = -1
    at = np.concatenate([old, len(known) + np.arange(len(new))])
    return at[stars(codes)]


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
