"""What the rules ask of every tile, as columns; `class_facts` has those of classes and bands.

A store may hold millions of tiles, so columns are computed whole, by Arrow and NumPy, and only
those of the manifest are read that a rule needs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Config
from ringmo.data import footprints, lookalikes, store, tables
from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pandas
    import pyarrow

TAUGHT = ("train", "val", "test")  # the splits between which nothing may be shared
SPLITS = (*TAUGHT, "unused")
NEEDED = [
    *("key", "shard", "offset", "size", "source", "row", "col", "width", "height", "sensor"),
    *("bands", "crs", "minx", "miny", "maxx", "maxy", "nodata_share", "saturated_share", "mean"),
    *("std", "entropy", "sharpness", "content_hash", "phash", "place", "split", "label"),
    *("cloud_share", "band_means", "band_stds", "second", "mask_shard", "mask_offset"),
    *("mask_size", "mask_width", "mask_height", "mask_coding", "mask_counts", "boxes_shard"),
    *("boxes_offset", "boxes_size", "boxes_count", "boxes_outside", "boxes_classes"),
    *("height_shard", "height_offset", "height_size", "height_width", "height_height"),
    *("height_known", "height_min", "height_max", "height_mean", "height_std"),
]
# Text of few values, read as numbers and a list of what they stand for.
FEW = [
    *("shard", "sensor", "crs", "split", "label", "mask_shard", "mask_coding", "boxes_shard"),
    "height_shard",
]
UNKNOWN = 255  # in a mask, where the class is not known

Codings = Mapping[str, Sequence[str]]
Texts = NDArray[np.object_]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]


def read(path: Path) -> "pyarrow.Table":
    """The manifest's columns that the rules need.

    Raises:
        BadInput: no manifest, a damaged one, or one of another schema.
    """
    remedy = "run `ringmo ingest`, or `dvc checkout` for the version before"
    return store.read_some(path, {name: store.COLUMNS[name] for name in NEEDED}, FEW, remedy)


def as_table(manifest: "pandas.DataFrame | pyarrow.Table") -> "pyarrow.Table":
    """A manifest as the columns that the rules need, however it was read."""
    import pyarrow as pa

    if isinstance(manifest, pa.Table):
        return manifest.select(NEEDED).unify_dictionaries()
    schema = store.arrow_schema({name: store.COLUMNS[name] for name in NEEDED})
    return pa.Table.from_pandas(manifest[NEEDED], schema=schema, preserve_index=False)


def codings(root: Path) -> dict[str, list[str]]:
    """What the numbers in masks mean: coding → names of its classes, the first is number 0's.

    Raises:
        BadInput: the store's file of them is damaged.
    """
    path = root / store.CLASSES
    try:
        known = json.loads(path.read_text())
        return {str(name): [str(each) for each in classes] for name, classes in known.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        raise BadInput(f"{path} is damaged: bring it back with `dvc checkout`") from None


def numbers(tiles: "pyarrow.Table", name: str) -> NDArray[Any]:
    """A column of numbers; NaN where one is missing."""
    import pyarrow.compute as pc

    column = tiles[name]
    if column.null_count:
        column = pc.cast(column, "float64")
    values: NDArray[Any] = column.to_numpy()
    return values


def encoded(tiles: "pyarrow.Table", name: str) -> tuple[NDArray[np.int64], "pyarrow.Array"]:
    """A column of text as numbers (N,), -1 where there is none, and what they stand for."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = tiles[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no rows
        column = pa.array([], column.type)
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    indices = pc.fill_null(column.indices, -1)
    return indices.to_numpy(zero_copy_only=False).astype(np.int64), column.dictionary


def few(tiles: "pyarrow.Table", name: str) -> tuple[NDArray[np.int64], list[str]]:
    """`encoded`, for columns of few different texts."""
    codes, values = encoded(tiles, name)
    return codes, values.to_pylist()


def flat(
    tiles: "pyarrow.Table", name: str
) -> Iterator[tuple[Rows, NDArray[np.int64], NDArray[np.int64], "pyarrow.Array"]]:
    """A column of lists, in parts: row, place in its list, length of that list, value."""
    start = 0
    for chunk in tiles[name].chunks:
        lengths = np.asarray(chunk.value_lengths().fill_null(0), np.int64)
        values = chunk.flatten()
        rows = np.repeat(np.arange(len(chunk)), lengths)
        first = np.cumsum(lengths) - lengths
        yield rows + start, np.arange(len(values)) - first[rows], lengths[rows], values
        start += len(chunk)


def told(bad: Flags, tell: Callable[[int], str]) -> Texts:
    """What is wrong with each row, in words; None where nothing is."""
    texts = np.full(len(bad), None, object)
    for row in np.flatnonzero(bad):
        texts[row] = tell(int(row))
    return texts


# Of every tile


def of_tiles(
    config: Config,
    tiles: "pyarrow.Table",
    shard_sizes: Mapping[str, int],
    known: Codings,
    alike: Callable[[int, int], bool] | None,
) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Columns that the rules about tiles name, and partners.

    Args:
        tiles: the columns NEEDED of the manifest.
        shard_sizes: bytes of each shard; one that is not there is missing.
        known: what the numbers of masks mean.
        alike: whether two tiles, whose hashes are near, also look it; None: the hash decides.

    Returns:
        Columns by name; a column of text says what is wrong with a tile, and is None where
        nothing is. Partners by column: the row of another tile that a row is bad for, or -1.
    """
    facts: dict[str, Any] = {}
    facts |= _structure(tiles, shard_sizes)
    facts |= {
        name: numbers(tiles, name)
        for name in ("nodata_share", "saturated_share", "std", "cloud_share")
    }
    shared, partners = _shared(config, tiles, alike)
    facts |= shared
    facts |= _labels(tiles, shard_sizes, known)
    facts |= _heights(config, tiles)
    return facts, partners


def _structure(tiles: "pyarrow.Table", shard_sizes: Mapping[str, int]) -> dict[str, Any]:
    import pandas as pd
    import pyarrow.compute as pc

    facts: dict[str, Any] = {}
    for name in ("sensor", "split"):
        codes, values = few(tiles, name)
        facts[name] = pd.Categorical.from_codes(codes, pd.Index(values, dtype=object))
    facts["has_place"] = np.asarray(pc.greater(pc.utf8_length(tiles["place"]).fill_null(0), 0))
    facts["smallest_side"] = np.minimum(numbers(tiles, "width"), numbers(tiles, "height"))
    for name in ("size", "offset"):
        facts[name] = numbers(tiles, name)
    facts["beyond_shard"] = _beyond(tiles, ("shard", "offset", "size"), shard_sizes, always=True)

    shares = {name: numbers(tiles, name) for name in ("nodata_share", "saturated_share")}
    wrong = {name: ~((values >= 0) & (values <= 1)) for name, values in shares.items()}
    facts["bad_shares"] = told(
        np.logical_or.reduce(list(wrong.values())),
        lambda row: ", ".join(f"{n} {shares[n][row]}" for n in shares if wrong[n][row]),
    )
    lacking = {n: np.isnan(numbers(tiles, n)) for n in ("mean", "std", "entropy", "sharpness")}
    lacking["phash"] = ~_hashed(tiles)
    lacking["content_hash"] = np.asarray(tiles["content_hash"].is_null())
    facts["unmeasured"] = told(
        np.logical_or.reduce(list(lacking.values())),
        lambda row: ", ".join(name for name, missing in lacking.items() if missing[row]),
    )
    # Tables of schema 1 have none; a tile without data has NaN in each.
    bands = numbers(tiles, "bands")
    lengths = {
        name: numbers_of(pc.list_value_length(tiles[name])) for name in ("band_means", "band_stds")
    }
    facts["bands_unmeasured"] = told(
        np.logical_or.reduce([(n >= 0) & (n != bands) for n in lengths.values()]),
        lambda row: (
            f"{bands[row]} bands, "
            + ", ".join(f"{int(n[row])} {name}" for name, n in lengths.items())
        ),
    )
    for name in ("key", "content_hash"):
        facts[name] = tiles[name].to_pandas()
    return facts


def numbers_of(column: Any) -> NDArray[np.float64]:
    """Arrow's whole numbers as floats, NaN where one is missing."""
    import pyarrow.compute as pc

    values: NDArray[np.float64] = pc.cast(column, "float64").to_numpy()
    return values


def _hashed(tiles: "pyarrow.Table") -> Flags:
    """Which tiles have a perceptual hash of 16 hexadecimal digits."""
    import pyarrow.compute as pc

    return np.asarray(pc.match_substring_regex(tiles["phash"], "^[0-9a-f]{16}$").fill_null(False))


def _beyond(
    tiles: "pyarrow.Table", names: Sequence[str], sizes: Mapping[str, int], always: bool = False
) -> Texts:
    """Where bytes end behind their shard; `names` are the columns of shard, offset and size.

    always: there must be bytes; otherwise a size of 0 says that there are none to be.
    """
    codes, shards = few(tiles, names[0])
    offset, size = (np.nan_to_num(numbers(tiles, name)) for name in names[1:])
    lengths = np.array([*(sizes.get(shard, -1) for shard in shards), -1], np.int64)[codes]
    ends = offset + size
    bad = (ends > lengths) & (always | (size > 0))

    def tell(row: int) -> str:
        shard = shards[codes[row]] if codes[row] >= 0 else "no shard"
        if lengths[row] < 0:
            return f"{shard} is missing"
        return f"ends at byte {int(ends[row])} of {shard}, which has {lengths[row]}"

    return told(bad, tell)


# What two splits may not share


def _shared(
    config: Config, tiles: "pyarrow.Table", alike: Callable[[int, int], bool] | None
) -> tuple[dict[str, Any], dict[str, Rows]]:
    codes, names = few(tiles, "split")
    order = np.array([*(TAUGHT.index(n) if n in TAUGHT else -1 for n in names), -1], np.int64)
    split = order[codes]  # number in TAUGHT, -1 for others
    place, _ = encoded(tiles, "place")
    content, _ = encoded(tiles, "content_hash")
    partners = {
        "place_elsewhere": _same_elsewhere(place, split),
        "twin_elsewhere": _same_elsewhere(content, split),
        "near_elsewhere": _near_elsewhere(config, tiles, split, alike),
        "overlap_elsewhere": _overlap_elsewhere(tiles, split),
    }
    keys = tiles["key"]

    def named(row: int) -> str:
        return f"{keys[row]} in {TAUGHT[split[row]]}"

    facts: dict[str, Any] = {
        column: told(partner >= 0, lambda row, partner=partner: named(partner[row]))  # type: ignore[misc]  # mypy cannot infer a lambda's default
        for column, partner in partners.items()
    }
    seconds = _seconds(tiles, split)
    facts |= seconds[0]
    partners |= seconds[1]
    return facts, partners


def _same_elsewhere(codes: NDArray[np.int64], split: NDArray[np.int64]) -> Rows:
    """For each row another one of the same code in another split, or -1."""
    partner = np.full(len(codes), -1, np.int64)
    rows = np.flatnonzero((codes >= 0) & (split >= 0))
    if not len(rows):
        return partner
    rows = rows[np.lexsort((split[rows], codes[rows]))]
    starts = np.flatnonzero(np.diff(codes[rows], prepend=-1))
    lengths = np.diff(starts, append=len(rows))
    first, last = np.repeat(rows[starts], lengths), np.repeat(rows[starts + lengths - 1], lengths)
    torn = split[first] != split[last]
    other = np.where(split[rows] != split[first], first, last)
    partner[rows[torn]] = other[torn]
    return partner


def _near_elsewhere(
    config: Config,
    tiles: "pyarrow.Table",
    split: NDArray[np.int64],
    alike: Callable[[int, int], bool] | None,
) -> Rows:
    """For each textured tile another one of its sensor that looks like it in another split.

    Hashes agree by chance where there is little to see, so that ingest joins only what looks
    alike as well; what it left apart is not to be found here.
    """
    partner = np.full(len(split), -1, np.int64)
    textured = (numbers(tiles, "std") >= config.validate_.min_std) & _hashed(tiles) & (split >= 0)
    sensors, names = few(tiles, "sensor")
    for sensor in range(len(names)):
        rows = np.flatnonzero(textured & (sensors == sensor))
        if len(rows) < 2:
            continue
        text = "".join(tiles["phash"].take(rows).to_pylist())
        hashes = np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
        order = np.argsort(hashes, kind="stable")
        rows, hashes = rows[order], hashes[order]
        starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
        torn = _splits_of(split[rows], starts)
        bits = config.split.near_duplicate_bits
        pairs = lookalikes.near_duplicates(hashes[starts], bits, torn > 1)
        _meet(partner, rows, starts, torn, pairs, split, alike)
    return partner


def _overlap_elsewhere(tiles: "pyarrow.Table", split: NDArray[np.int64]) -> Rows:
    """For each tile another one whose footprint shares ground with it in another split."""
    import pandas as pd

    partner = np.full(len(split), -1, np.int64)
    crs, names = few(tiles, "crs")
    edges = {name: numbers(tiles, name) for name in ("minx", "miny", "maxx", "maxy")}
    located = (split >= 0) & (crs >= 0) & np.isfinite(np.stack(list(edges.values()))).all(axis=0)
    rows = np.flatnonzero(located)
    if len(rows) < 2:
        return partner
    frame = pd.DataFrame({"crs": crs[rows]} | {name: edge[rows] for name, edge in edges.items()})
    # Dates and sensors of one place have one footprint: it is asked for once.
    group = frame.groupby(list(frame.columns), sort=False).ngroup().to_numpy()
    order = np.argsort(group, kind="stable")
    rows, group = rows[order], group[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    torn = _splits_of(split[rows], starts)
    ground = frame.iloc[order[starts]].reset_index(drop=True)
    ground["crs"] = np.array(names, object)[ground["crs"].to_numpy()]
    pairs = footprints.overlaps(ground, torn > 1)
    _meet(partner, rows, starts, torn, pairs, split, None)
    return partner


def _splits_of(split: NDArray[np.int64], starts: Rows) -> NDArray[np.int64]:
    """The splits that each group has, as bits: 1 of train, 2 of val, 4 of test."""
    found: NDArray[np.int64] = np.bitwise_or.reduceat(1 << split, starts)
    return found


def _meet(
    partner: Rows,
    rows: Rows,
    starts: Rows,
    torn: NDArray[np.int64],
    pairs: NDArray[np.int64],
    split: NDArray[np.int64],
    alike: Callable[[int, int], bool] | None,
) -> None:
    """Write to `partner` which rows of paired groups meet in different splits.

    Args:
        rows: of the groups, one after the other; `starts` says where each begins.
        torn: the splits of each group, as bits.
        pairs: numbers of groups, (N, 2); each group is paired with itself as well.
    """
    ends = np.append(starts[1:], len(rows))
    both = torn[pairs[:, 0]] | torn[pairs[:, 1]]
    itself = np.flatnonzero(np.bitwise_count(torn) > 1)
    crossing = pairs[np.bitwise_count(both) > 1]
    for a, b in np.concatenate([np.stack([itself, itself], axis=1), crossing]):
        for i in rows[starts[a] : ends[a]]:
            for j in rows[starts[b] : ends[b]]:
                if split[i] == split[j] or (partner[i] >= 0 and partner[j] >= 0):
                    continue
                if alike is None or alike(int(i), int(j)):
                    partner[i] = j if partner[i] < 0 else partner[i]
                    partner[j] = i if partner[j] < 0 else partner[j]


def _seconds(
    tiles: "pyarrow.Table", split: NDArray[np.int64]
) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Tiles whose later date is missing or of another size, or trains where they test."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = len(split)
    other = np.full(count, -1, np.int64)
    has = np.asarray(tiles["second"].is_valid())
    seconds = tiles["second"].filter(pa.array(has))
    if len(seconds):
        found = pc.index_in(seconds, value_set=tiles["key"].combine_chunks())
        other[has] = np.asarray(found.fill_null(-1))
    sides = numbers(tiles, "width"), numbers(tiles, "height")
    lost = has & (other < 0)
    unlike = (other >= 0) & np.logical_or.reduce([side != side[other] for side in sides])
    apart = (other >= 0) & (split != split[other])

    def tell(row: int) -> str:
        if lost[row]:
            return f"{tiles['second'][row]} is not in the store"
        wide, high = (int(side[other[row]]) for side in sides)
        return f"{sides[0][row]}x{sides[1][row]}, its second date {wide}x{high}"

    names = [*TAUGHT, "unused"]
    facts = {
        "lost_second": told(lost | unlike, tell),
        "second_elsewhere": told(
            apart, lambda row: f"{names[split[row]]}, its second date {names[split[other[row]]]}"
        ),
    }
    partners = {
        "lost_second": np.where(unlike, other, -1),
        "second_elsewhere": np.where(apart, other, -1),
    }
    return facts, partners


# Labels


def _labels(
    tiles: "pyarrow.Table", shard_sizes: Mapping[str, int], known: Codings
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    codes, names = few(tiles, "label")
    blank = np.array([*(_nameless(name) for name in names), False])
    facts["label_named"] = ~blank[codes]

    masked = numbers(tiles, "mask_size") > 0
    facts["mask_unlike"] = _unlike(tiles, "mask")
    beyond = np.full(len(tiles), None, object)
    for kind in store.LABELS:
        names = [f"{kind}_{part}" for part in ("shard", "offset", "size")]
        of_kind = _beyond(tiles, names, shard_sizes)
        beyond = np.where(beyond == None, of_kind, beyond)  # noqa: E711
    facts["labels_beyond_shard"] = beyond
    facts["mask_strange"] = _strange(tiles, masked, known)
    facts["boxes_outside"] = np.nan_to_num(numbers(tiles, "boxes_outside"))
    facts["boxes_unnamed"] = _unnamed(tiles)
    return facts


def _nameless(label: str) -> bool:
    """Whether a label, or one of its classes, is blank, or they are not in order."""
    return tables.joined(tables.classes_of(label)) != label.strip()


def _unlike(tiles: "pyarrow.Table", kind: str) -> Texts:
    """Tiles whose mask, or heights, are of another size."""
    sides = [numbers(tiles, name) for name in ("width", "height", f"{kind}_width")]
    wide, high, own_wide = sides
    own_high = numbers(tiles, f"{kind}_height")
    has = numbers(tiles, f"{kind}_size") > 0
    return told(
        has & ((own_wide != wide) | (own_high != high)),
        lambda row: (
            f"{kind} {own_wide[row]:.0f}x{own_high[row]:.0f}, tile {wide[row]:.0f}x{high[row]:.0f}"
        ),
    )


def _heights(config: Config, tiles: "pyarrow.Table") -> dict[str, Any]:
    has = numbers(tiles, "height_size") > 0
    known, low, high, mean, std = (
        numbers(tiles, f"height_{name}") for name in ("known", "min", "max", "mean", "std")
    )
    with np.errstate(invalid="ignore"):
        slack = 1e-6 * np.maximum(np.abs(low), np.abs(high))  # a mean is rounded
        sound = (known > 0) & (known <= 1) & (std >= 0) & np.isfinite(std)
        sound &= (low - slack <= mean) & (mean <= high + slack) & np.isfinite(low + high)
        least, most = config.validate_.height_range
        beyond = has & ((low < least) | (high > most))
    return {
        "height_unlike": _unlike(tiles, "height"),
        "height_unmeasured": told(
            has & ~sound,
            lambda row: (
                f"{known[row]:.1%} known, {low[row]:g} to {high[row]:g} m, mean {mean[row]:g}, "
                f"deviation {std[row]:g}"
            ),
        ),
        "height_beyond": told(beyond, lambda row: f"{low[row]:g} to {high[row]:g} m"),
    }


def _strange(tiles: "pyarrow.Table", masked: Flags, known: Codings) -> Texts:
    """Masks whose coding is not known, or with numbers that it does not have."""
    codes, names = few(tiles, "mask_coding")
    # A coding without names has whatever numbers there are.
    many = np.array(
        [*((len(known[name]) or UNKNOWN) if name in known else 0 for name in names), 0], np.int64
    )
    texts = told(
        masked & (many[codes] == 0),
        lambda row: (
            f"no coding is called {names[codes[row]]}" if codes[row] >= 0 else "without a coding"
        ),
    )
    for rows, number, length, pixels in flat(tiles, "mask_counts"):
        beyond = (number >= many[codes[rows]]) & (number < length - 1) & (many[codes[rows]] > 0)
        for at in np.flatnonzero(beyond & (np.asarray(pixels) > 0) & masked[rows]):
            row = rows[at]
            before = "" if texts[row] is None else f"{texts[row]}, "
            texts[row] = f"{before}{number[at]} in {pixels[int(at)]} pixels"
    return texts


def _unnamed(tiles: "pyarrow.Table") -> Texts:
    """Tiles with boxes that have no class."""
    import pyarrow.compute as pc

    boxes = np.nan_to_num(numbers(tiles, "boxes_count"))
    named = np.zeros(len(boxes), np.int64)
    for rows, _, _, classes in flat(tiles, "boxes_classes"):
        clear = np.asarray(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(classes)), 0))
        named += np.bincount(rows[clear], minlength=len(boxes))
    return told(boxes != named, lambda row: f"{boxes[row]:.0f} boxes, {named[row]} with a class")
