"""Tiles that nearly are one: by perceptual hashes that differ in few bits, and a look at both."""

from binascii import unhexlify
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.decode import decode
from ringmo.data.grouping import Flags, Groups, Index, join, links
from ringmo.data.measures import grey, thumbnail

if TYPE_CHECKING:
    import pandas

# Below this correlation of their thumbnails two tiles with near hashes are still two places.
SAME_CORRELATION = 0.9
# A product of matrices rounds otherwise than one of vectors: so near the limit, the latter decides.
ROUNDING = 1e-4

# Hashes that agree in the same bits are compared each with each up to this number, more are sorted
# by further bits. So many distinct ones differ in 12 bits or more, which ends the sorting.
CROWD = 4096
THUMBNAILS = 250_000  # kept at a time: 1 GB
PORTION = 100_000  # pairs of hashes at a time
BLOCK, COLUMNS = 256, 4096  # thumbnails compared each with each at a time


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
    return links(classes, _near(values, bits, fresh, list(range(64))), new)


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
