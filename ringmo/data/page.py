"""`ringmo data show`: the tile store as one HTML page, which needs no server and no network.

Counts, a contact sheet by sensor and class, footprints on a map, and histograms of the measures.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmo.config import Config
from ringmo.data import class_facts, footprint_map, heights, store, tables, versions
from ringmo.data.colours import visible
from ringmo.data.decode import decode
from ringmo.data.footprint_map import COLOURS
from ringmo.errors import BadInput
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas

SHOWN = 8  # tiles of a class and sensor
ROWS = 400  # of classes and sensors on the contact sheet
SIDE = 96  # pixels a tile is shown at
FOOTPRINTS = 3000  # on the map, evenly chosen
BINS = 30
MEASURES = (
    *("mean", "std", "entropy", "sharpness", "nodata_share", "saturated_share", "gsd_m"),
)  # fmt: skip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15em .9em .15em 0; text-align: left }
td.number, th.number { text-align: right } th { font-weight: 600 } .note { color: #666 }
.sheet { display: flex; flex-wrap: wrap; gap: 4px; margin: .2em 0 .8em }
.sheet img { width: 96px; height: 96px; background: #eee; image-rendering: auto }
.made-up { background: #fff3cd; padding: .5em 1em } svg text { font-size: 11px; fill: #555 }
.small { display: inline-block; margin: 0 1.2em 1em 0 } .key { margin-right: 1.2em }
"""


def write(config: Config, workspace: Workspace, out: Path) -> dict[str, Any]:
    """The page of the store as it is, to `out`, whole or not at all; returns what it shows.

    Raises:
        BadInput: no store, a damaged one, or `out` cannot be written.
    """
    tiles = store.TileStore(workspace.store)
    manifest = tiles.manifest()
    version = versions.data_version(workspace)
    sections = [
        _head(manifest, version),
        _counts(manifest),
        _labels(manifest),
        _heights(config, tiles, manifest),
        _aside(workspace),
        _contact_sheet(config, tiles, manifest),
        _map(manifest),
        _histograms(manifest),
    ]
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>Tile store {escape(str(version or ''))[:12]}</title><style>{STYLE}</style>"
        f"{''.join(sections)}</html>"
    )
    save(out, page)
    return {
        "page": str(out),
        "data_version": version,
        "tiles": len(manifest),
        "sensors": int(manifest["sensor"].nunique()),
        "classes": len(_classes(manifest)),
        "with_footprint": int(manifest["crs"].notna().sum()),
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str = "td", number: bool = False) -> str:
        numeric = number or isinstance(value, (int, float))
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        return f"<{tag}{' class=number' if numeric else ''}>{escape(shown)}</{tag}>"

    body = [list(row) for row in rows]
    numbers = [isinstance(value, (int, float)) for value in body[0]] if body else []
    numbers = numbers or [False] * len(header)
    top = "".join(cell(name, "th", number) for name, number in zip(header, numbers, strict=True))
    lines = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in body)
    return f"<table><tr>{top}</tr>{lines}</table>"


def save(out: Path, page: str) -> None:
    """A page in a file, whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror}") from None


def _head(manifest: "pandas.DataFrame", version: str | None) -> str:
    found = class_facts.labelled(manifest)
    labels = f"labelled: {class_facts.said(found)}" if found else "none labelled"
    if classes := len(_classes(manifest)):
        labels += f"; {classes} classes of tiles"
    places = manifest["place"].nunique()
    made_up = (
        "<p class='made-up'>With generated imagery: it shows that everything works, and says "
        "nothing about real imagery.</p>"
        if manifest["generated"].any()
        else ""
    )
    return (
        f"<h1>Tile store</h1>{made_up}"
        f"<p>{len(manifest):,} tiles of {places:,} places, {labels}.<br>"
        f"<span class='note'>Data version {escape(version or 'not versioned yet')}</span></p>"
    )


def _counts(manifest: "pandas.DataFrame") -> str:
    splits = [split for split in COLOURS if (manifest["split"] == split).any()]
    parts = ["<h2>Classes, sensors, splits</h2>"]
    for name, table in (("class", _a_class_each(manifest, "(none)")), ("sensor", manifest)):
        column = "label" if name == "class" else name
        counts = table.groupby([column, "split"]).size().unstack(fill_value=0)
        rows = [
            [str(value), *(int(row.get(split, 0)) for split in splits), int(row.sum())]
            for value, row in counts.iterrows()
        ]
        parts.append(f"<p>{_table([name, *splits, 'tiles'], rows)}</p>")
    return "".join(parts)


def _classes(manifest: "pandas.DataFrame") -> dict[str, int]:
    """Tiles of each class; of several, a tile counts for each."""
    counts = manifest["label"].value_counts()
    return tables.by_class({str(label): int(count) for label, count in counts.items()})


def _a_class_each(manifest: "pandas.DataFrame", none: str) -> "pandas.DataFrame":
    """Rows once for each of their classes, in `label`; `none` where there is none."""
    labels = manifest["label"].fillna(none).map(tables.classes_of)
    return manifest.assign(label=labels).explode("label")


def _labels(manifest: "pandas.DataFrame") -> str:
    """Tiles with each kind of label, by sensor and split."""
    kinds = (("masks", "mask_size"), ("boxes", "boxes_size"), ("heights", "height_size"))
    rows = []
    for sensor, group in manifest.groupby("sensor"):
        for kind, column in kinds:
            has = group[group[column] > 0]
            if len(has):
                splits = has["split"].value_counts()
                each = [int(splits.get(split, 0)) for split in COLOURS]
                objects = int(has["boxes_count"].sum()) if kind == "boxes" else ""
                rows.append([kind, str(sensor), *each, len(has), objects])
    if not rows:
        return ""
    return f"<h2>Labels</h2>{_table(['kind', 'sensor', *COLOURS, 'tiles', 'objects'], rows)}"


def _heights(config: Config, tiles: store.TileStore, manifest: "pandas.DataFrame") -> str:
    """Some tiles beside their heights, each from black, its lowest, to white."""
    has = manifest[manifest["height_size"] > 0]
    if has.empty:
        return ""
    parts = [
        "<h2>Heights</h2>"
        f"<p>{has['height_min'].min():.4g} to {has['height_max'].max():.4g} m; "
        f"{(1 - has['height_known']).mean():.1%} of the pixels unknown (blue).</p>"
    ]
    for sensor, group in has.groupby("sensor"):
        rows = group.iloc[np.unique(np.linspace(0, len(group) - 1, SHOWN // 2).astype(int))]
        images = "".join(
            tile_image(config, tiles, row) + _height_image(tiles, row) for _, row in rows.iterrows()
        )
        parts.append(f"<b>{escape(str(sensor))}</b><div class='sheet'>{images}</div>")
    for name in ("height_min", "height_mean", "height_max", "height_std"):
        parts.append(_histogram(f"{name} (m)", has[name].dropna().to_numpy()))
    return "".join(parts)


def _height_image(tiles: store.TileStore, row: "pandas.Series[Any]") -> str:
    from PIL import Image

    place = row["height_shard"], int(row["height_offset"]), int(row["height_size"])
    values = heights.decoded(tiles.read(*place))
    low, high = row["height_min"], row["height_max"]
    grey = np.nan_to_num((values - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
    shown = np.stack([grey] * 3, axis=-1)
    shown[np.isnan(values)] = (0, 90, 200)
    about = escape(f"{row['source']}: {low:.4g} to {high:.4g} m")
    address = inline_jpeg(Image.fromarray(shown), (2 * SIDE, 2 * SIDE))
    return f"<img loading='lazy' title='{about}' src='{address}'>"


def _aside(workspace: Workspace) -> str:
    import pandas as pd

    path = workspace.store / store.QUARANTINE
    aside = pd.read_parquet(path) if path.exists() else pd.DataFrame({"reason": []})
    if aside.empty:
        return "<h2>Set aside</h2><p>Nothing.</p>"
    reasons = aside.groupby("reason")["source"].agg(["size", "first"]).sort_values("size")
    rows = [
        [str(reason), int(row["size"]), str(row["first"])]
        for reason, row in reasons[::-1][:50].iterrows()
    ]
    more = f"<p class='note'>and {len(reasons) - 50} more reasons</p>" if len(reasons) > 50 else ""
    return f"<h2>Set aside</h2>{_table(['reason', 'images', 'for example'], rows)}{more}"


def _contact_sheet(config: Config, tiles: store.TileStore, manifest: "pandas.DataFrame") -> str:
    parts = ["<h2>Tiles by sensor and class</h2>"]
    groups = list(_a_class_each(manifest, "(no class)").groupby(["sensor", "label"]))
    for (sensor, label), group in groups[:ROWS]:
        rows = group.iloc[np.unique(np.linspace(0, len(group) - 1, SHOWN).astype(int))]
        images = "".join(tile_image(config, tiles, row) for _, row in rows.iterrows())
        parts.append(
            f"<b>{escape(str(label))}</b> <span class='note'>{escape(str(sensor))}, "
            f"{len(group):,} tiles</span><div class='sheet'>{images}</div>"
        )
    if len(groups) > ROWS:
        parts.append(f"<p class='note'>and {len(groups) - ROWS} more</p>")
    return "".join(parts)


def tile_image(config: Config, tiles: store.TileStore, row: "pandas.Series[Any]") -> str:
    """One tile as an inline JPEG; what it is shows when the pointer rests on it."""
    from PIL import Image

    about = f"{row['source']} at {row['row']}, {row['col']}; {row['split']}; {row['key']}"
    sensor = config.sensors.get(row["sensor"])
    if sensor is None or len(sensor.bands) != row["bands"]:
        return f"<img alt='of a sensor that params.yaml no longer has' title='{escape(about)}'>"
    pixels = decode(tiles.read(row["shard"], row["offset"], row["size"]))
    shown = visible(pixels, sensor)
    picture = Image.fromarray(shown[:, :, 0] if shown.shape[2] == 1 else shown)
    address = inline_jpeg(picture, (2 * SIDE, 2 * SIDE))
    return f"<img loading='lazy' title='{escape(about)}' src='{address}'>"


def inline_jpeg(picture: Any, box: tuple[int, int]) -> str:
    """A picture of Pillow's, made to fit a box (pixels), as the address of itself."""
    picture = picture.convert("RGB")
    picture.thumbnail(box)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _map(manifest: "pandas.DataFrame") -> str:
    """Footprints in longitude and latitude."""
    located = manifest[manifest["crs"].notna()]
    title = "<h2>Footprints</h2>"
    if located.empty:
        return f"{title}<p>No tile has coordinates.</p>"
    rows = footprint_map.evenly(len(located), FOOTPRINTS)
    chosen = located.iloc[rows.tolist()]
    bounds = footprint_map.degrees(chosen)
    known = np.isfinite(bounds).all(1)
    if not known.any():
        return f"{title}<p>No tile has coordinates on Earth.</p>"
    chosen, bounds = chosen[known], bounds[known]
    splits = chosen["split"].astype(str).tolist()
    titles = [
        f"{source}, {sensor}, {split}"
        for source, sensor, split in zip(chosen["source"], chosen["sensor"], splits, strict=True)
    ]
    fewer = "" if len(chosen) == len(located) else f" ({len(chosen):,} of them drawn)"
    return (
        f"{title}<p>{len(located):,} of {len(manifest):,} tiles have coordinates{fewer}. "
        f"{footprint_map.key(splits)}</p>{footprint_map.drawn(bounds, splits, titles)}"
    )


def _histograms(manifest: "pandas.DataFrame") -> str:
    parts = [
        "<h2>Measures</h2><p class='note'>In 8-bit steps; pixels of more than 8 bits are scaled, "
        "the sensor's mean ± 3 deviations (where these are null, its clip) to 0 to 255.</p>"
    ]
    for sensor, group in manifest.groupby("sensor"):
        parts.append(f"<p><b>{escape(str(sensor))}</b></p>")
        parts += [_histogram(name, group[name].dropna().to_numpy()) for name in MEASURES]
    return "".join(parts)


def _histogram(name: str, values: "np.ndarray[Any, Any]") -> str:
    if not len(values):
        return ""
    # Long tails of sharpness would leave one bar: what lies beyond counts in the last.
    top = float(np.quantile(values, 0.99)) or float(values.max())
    low = float(min(values.min(), top))
    counts, edges = np.histogram(np.clip(values, low, top), BINS, (low, max(top, low + 1e-9)))
    wide, high = 230, 90
    bar = wide / BINS
    bars = []
    for i, count in enumerate(counts):
        tall = high * count / counts.max()
        about = f"<title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:,}</title>"
        place = f"x='{i * bar:.1f}' y='{high - tall:.1f}' width='{bar - 0.6:.1f}'"
        bars.append(f"<rect {place} height='{tall:.1f}' fill='#0072b2'>{about}</rect>")
    return (
        f"<span class='small'><svg width='{wide}' height='{high + 30}'>{''.join(bars)}"
        f"<path d='M0 {high}H{wide}' stroke='#999'/>"
        f"<text x='0' y='{high + 12}'>{low:.3g}</text>"
        f"<text x='{wide}' y='{high + 12}' text-anchor='end'>{top:.3g}</text>"
        f"<text x='{wide / 2}' y='{high + 26}' text-anchor='middle'>{escape(name)}</text>"
        f"</svg></span>"
    )
