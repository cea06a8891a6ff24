"""What the rules ask for, as columns: of every tile, every class and every band of a sensor.

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
from ringmo.data import places, store, tables
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
        pairs = places.near_duplicates(hashes[starts], bits, torn > 1)
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
    pairs = places.overlaps(ground, torn > 1)
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


# Of every class, and of every band


def summary_of(
    manifest: "pandas.DataFrame | pyarrow.Table", known: Codings | None = None
) -> dict[str, Any]:
    """What the history keeps of a data version, for the next one to be compared with.

    bands: sensor → n (tiles), means and stds, one a band: the mean of the tiles' means, and the
    deviation pooled within tiles. mask_classes: class → pixels; box_classes: class → boxes.

    Args:
        manifest: a DataFrame or an Arrow table with the manifest's columns.
        known: what the numbers of masks mean; without, a class is named by coding and number.
    """
    columns = ["sensor", "band_means", "band_stds", "mask_coding", "mask_counts", "boxes_classes"]
    import pyarrow as pa

    if isinstance(manifest, pa.Table):
        tiles = manifest.select(columns).unify_dictionaries()
    else:
        schema = store.arrow_schema({name: store.COLUMNS[name] for name in columns})
        tiles = pa.Table.from_pandas(manifest[columns], schema=schema, preserve_index=False)
    return {
        "bands": _bands(tiles),
        "mask_classes": dict(sorted(_mask_pixels(tiles, known or {}).items())),
        "box_classes": dict(sorted(_boxes(tiles).items())),
    }


def _bands(tiles: "pyarrow.Table") -> dict[str, dict[str, Any]]:
    codes, names = few(tiles, "sensor")
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for column, power in (("band_means", 1), ("band_stds", 2)):
        sums[column] = np.zeros((len(names), 1))
        counts[column] = np.zeros((len(names), 1), np.int64)
        for rows, band, _, values in flat(tiles, column):
            value = values.to_numpy(zero_copy_only=False)
            usable = np.isfinite(value) & (codes[rows] >= 0)
            if not usable.any():
                continue
            wide = max(int(band.max()) + 1, sums[column].shape[1])
            more = ((0, 0), (0, wide - sums[column].shape[1]))
            at = codes[rows][usable] * wide + band[usable]
            size = len(names) * wide
            total = np.bincount(at, value[usable] ** power, size).reshape(-1, wide)
            sums[column] = np.pad(sums[column], more) + total
            number = np.bincount(at, minlength=size).reshape(-1, wide)
            counts[column] = np.pad(counts[column], more) + number
    found = {}
    for sensor, name in enumerate(names):
        seen = counts["band_means"][sensor]
        bands = int((seen > 0).sum())
        if not bands or not (counts["band_stds"][sensor, :bands] > 0).all():
            continue
        means = sums["band_means"][sensor, :bands] / seen[:bands]
        squares = sums["band_stds"][sensor, :bands] / counts["band_stds"][sensor, :bands]
        found[name] = {
            "n": int(seen.max()),
            "means": [float(f"{value:.9g}") for value in means],
            "stds": [float(f"{value:.9g}") for value in np.sqrt(squares)],
        }
    return dict(sorted(found.items()))


def _mask_sums(
    tiles: "pyarrow.Table", known: Codings, chosen: Flags | None, weigh: bool
) -> dict[str, int]:
    """Pixels of every class of masks (or tiles that have it), of the rows `chosen`."""
    codes, names = few(tiles, "mask_coding")
    wide = UNKNOWN + 1
    total = np.zeros(len(names) * wide, np.int64)
    for rows, number, length, values in flat(tiles, "mask_counts"):
        pixels = np.asarray(values)
        usable = (number < length - 1) & (pixels > 0) & (codes[rows] >= 0)
        if chosen is not None:
            usable &= chosen[rows]
        at = codes[rows][usable] * wide + number[usable]
        # Sums of whole numbers below 2 ** 53 are exact in floats as well.
        weights = pixels[usable] if weigh else None
        total += np.bincount(at, weights, len(total)).astype(np.int64)
    sums: dict[str, int] = {}
    for coding, value in np.argwhere(total.reshape(-1, wide)).tolist():
        classes = known.get(names[coding], ())
        name = classes[value] if value < len(classes) else f"{names[coding]} {value}"
        sums[name] = sums.get(name, 0) + int(total[coding * wide + value])
    return sums


def _mask_pixels(tiles: "pyarrow.Table", known: Codings) -> dict[str, int]:
    return _mask_sums(tiles, known, None, weigh=True)


def _boxes(tiles: "pyarrow.Table") -> dict[str, int]:
    import pyarrow.compute as pc

    counts: dict[str, int] = {}
    for _, _, _, classes in flat(tiles, "boxes_classes"):
        for pair in pc.value_counts(classes).to_pylist():
            if pair["values"] is not None:
                counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
    return counts


def _box_tiles(tiles: "pyarrow.Table", chosen: Flags) -> dict[str, int]:
    """Tiles that have a box of each class."""
    import pyarrow.compute as pc

    counts: dict[str, int] = {}
    for rows, _, _, classes in flat(tiles, "boxes_classes"):
        encoded = pc.dictionary_encode(classes)
        names = encoded.dictionary.to_pylist()
        codes = np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64)
        usable = (codes >= 0) & chosen[rows]
        met = np.unique(rows[usable] * max(len(names), 1) + codes[usable]) % max(len(names), 1)
        for code, count in zip(*np.unique(met, return_counts=True), strict=True):
            counts[names[code]] = counts.get(names[code], 0) + int(count)
    return counts


def of_classes(
    config: Config,
    tiles: "pyarrow.Table",
    summary: Mapping[str, Any],
    earlier: Sequence[Mapping[str, Any]],
    known: Codings,
) -> "pandas.DataFrame":
    """A row for each class of scenes, of masks and of boxes, also for those that an earlier
    version had and this one has not. What is not asked of a class is NaN.

    Counts are of the tiles that the tasks see, those of select.sensor: a place that three sensors
    have seen is one sample of its class.

    Args:
        summary: `summary_of` these tiles.
        earlier: entries of the history before this version, oldest first.
    """
    import pandas as pd

    rule = config.validate_
    sensors, sensor_names = few(tiles, "sensor")
    seen = np.array([*(name == config.select.sensor for name in sensor_names), False])[sensors]
    labels, label_names = few(tiles, "label")
    splits, split_names = few(tiles, "split")

    def count(chosen: Flags) -> dict[str, int]:
        found = np.bincount(labels[(labels >= 0) & chosen], minlength=len(label_names))
        there = {n: int(c) for n, c in zip(label_names, found, strict=True) if c}
        return tables.by_class(there)

    every = count(np.ones(len(tiles), np.bool_))
    number = {name: i for i, name in enumerate(split_names)}
    counts = {part: count(seen & (splits == number.get(part, -2))) for part in SPLITS}
    samples = count(seen)
    largest = max(samples.values(), default=0)
    kinds = [
        ("scene", "classes", every),
        ("masks", "mask_classes", summary["mask_classes"]),
        ("boxes", "box_classes", summary["box_classes"]),
    ]
    tiles_of = {
        "masks": _mask_sums(tiles, known, seen, weigh=False),
        "boxes": _box_tiles(tiles, seen),
    }
    rows: list[dict[str, Any]] = []
    for kind, entry, now in kinds:
        before = [_counts(version.get(entry, {})) for version in earlier]
        # What may not vanish is asked of every ingest, not of the last: a second ingest must not
        # hide what the first has lost. A class with fewer samples than the rule asks for never
        # passed, so that taking it out again loses nothing.
        least = rule.min_per_class if kind == "scene" else 1
        had = {n for version in before for n, count in version.items() if count >= least}
        lost = had - set(rule.retired_classes) - set(now)
        moved = _share_changes(now, before[-1] if before else {})
        for name in sorted(set(now) | lost):
            row: dict[str, Any] = {
                "name": name if kind == "scene" else f"{name} ({kind})",
                "class": name,
                "kind": kind,
                "vanished": name in lost,
                "share_change": moved.get(name),
            }
            if kind == "scene" and name not in lost:
                if name not in samples:
                    continue  # of another sensor's tiles alone, which no task sees
                row |= {part: counts[part].get(name, 0) for part in SPLITS}
                row |= {"samples": samples[name], "imbalance": largest / samples[name]}
            elif name not in lost:
                row[f"{kind}_tiles"] = tiles_of[kind].get(name)
            rows.append(row)
    figures = ["samples", *SPLITS, "imbalance", "masks_tiles", "boxes_tiles", "share_change"]
    frame = pd.DataFrame(rows, columns=["name", "class", "kind", "vanished", *figures])
    return frame.astype(dict.fromkeys(figures, float) | {"vanished": bool})


def _counts(found: Any) -> dict[str, int]:
    return {str(name): int(count) for name, count in dict(found).items()}


def _share_changes(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, float]:
    """By how much each class's share has moved, among the classes of both versions."""
    common = [name for name in now if before.get(name)]
    whole, whole_before = sum(now[name] for name in common), sum(before[name] for name in common)
    return {name: abs(now[name] / whole - before[name] / whole_before) for name in common}


def of_bands(
    config: Config, summary: Mapping[str, Any], before: Mapping[str, Any]
) -> "pandas.DataFrame":
    """A row for each band of each sensor that is in this version and in the one before it.

    `shift` is how far the mean has moved, in units of the deviation that the band had within
    tiles. Nothing is compared with a version that did not keep these figures.
    """
    import pandas as pd

    rows = []
    earlier: Mapping[str, Any] = before.get("bands") or {}
    for sensor, now in summary["bands"].items():
        was = earlier.get(sensor)
        if was is None or len(was["means"]) != len(now["means"]):
            continue
        known = config.sensors.get(sensor)
        for band, (mean, old, deviation) in enumerate(
            zip(now["means"], was["means"], was["stds"], strict=True)
        ):
            moved = abs(mean - old)
            name = known.bands[band] if known and band < len(known.bands) else str(band + 1)
            rows.append(
                {
                    "name": f"{sensor} {name}",
                    "sensor": sensor,
                    "band": band,
                    "mean": mean,
                    "mean_before": old,
                    "shift": moved / deviation if deviation else np.inf if moved else 0.0,
                }
            )
    columns = ["name", "sensor", "band", "mean", "mean_before", "shift"]
    return pd.DataFrame(rows, columns=columns)


def rows_of_class(
    config: Config, tiles: "pyarrow.Table", kind: str, name: str, known: Codings
) -> list[int]:
    """Tiles of a class: of scenes those that the tasks see, of masks and boxes all that have it."""
    import pyarrow.compute as pc

    if kind == "scene":
        codes, labels = few(tiles, "label")
        of_class = np.array([*(name in tables.classes_of(label) for label in labels), False])
        seen = pc.equal(pc.cast(tiles["sensor"], "string"), config.select.sensor)
        return _chosen(of_class[codes] & np.asarray(seen.fill_null(False)))
    has = np.zeros(len(tiles), np.bool_)
    if kind == "boxes":
        for rows, _, _, classes in flat(tiles, "boxes_classes"):
            has[rows[np.asarray(pc.equal(classes, name).fill_null(False))]] = True
        return _chosen(has)
    codes, names = few(tiles, "mask_coding")
    meant = [list(known.get(coding, ())) for coding in names]
    number_of = np.array([*(m.index(name) if name in m else -1 for m in meant), -1], np.int64)
    for rows, number, length, pixels in flat(tiles, "mask_counts"):
        met = (number == number_of[codes[rows]]) & (number < length - 1)
        has[rows[met & (np.asarray(pixels) > 0)]] = True
    return _chosen(has)


def _chosen(flags: Flags) -> list[int]:
    """Some of the rows, evenly spread."""
    rows = np.flatnonzero(flags)
    if not len(rows):
        return []
    return [int(row) for row in rows[np.unique(np.linspace(0, len(rows) - 1, 8).astype(int))]]


def rows_far_off(tiles: "pyarrow.Table", sensor: str, band: int, mean: float) -> list[int]:
    """The tiles of a sensor whose mean in a band is farthest from `mean`, farthest first."""
    codes, names = few(tiles, "sensor")
    off = np.full(len(tiles), -1.0)
    for rows, number, _, values in flat(tiles, "band_means"):
        at = (number == band) & (codes[rows] == names.index(sensor))
        off[rows[at]] = np.abs(
            np.nan_to_num(values.to_numpy(zero_copy_only=False)[at], nan=mean) - mean
        )
    farthest = np.argsort(-off, kind="stable")[:8]
    return [int(row) for row in farthest if off[row] > 0]
