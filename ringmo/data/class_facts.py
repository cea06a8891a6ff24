"""What the rules ask of every class and of every band of a sensor, and what the history keeps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmo.config import Config
from ringmo.data import store, tables
from ringmo.data.facts import SPLITS, UNKNOWN, Codings, Flags, few, flat

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from numpy.typing import NDArray


def labelled(manifest: "pandas.DataFrame") -> dict[str, int]:
    """How many tiles have labels of each kind that there is: classes, masks, boxes, heights; a
    change's mask counts as such."""
    kinds = {
        "a class": manifest["label"].notna(),
        "masks": (manifest["mask_size"] > 0) & manifest["second"].isna(),
        "masks of change": (manifest["mask_size"] > 0) & manifest["second"].notna(),
        "boxes": manifest["boxes_size"] > 0,
        "heights": manifest["height_size"] > 0,
    }
    counts = {name: int(there.sum()) for name, there in kinds.items()}
    return {name: count for name, count in counts.items() if count}


def said(labels: Mapping[str, int]) -> str:
    """What `labelled` counted, in words."""
    return ", ".join(f"{count:,} with {name}" for name, count in labels.items()) or "none"


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
