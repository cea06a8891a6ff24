"""A map of footprints in longitude and latitude, as SVG that needs no network: no ground below it,
lines of the grid, and every tile where it lies."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = {"train": "#0072b2", "val": "#e69f00", "test": "#d55e00", "unused": "#999999"}
WIDE, HIGH = 1060, 620  # pixels at most


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most so many of `count` positions, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def degrees(tiles: "pandas.DataFrame") -> NDArray[np.float64]:
    """west, south, east, north (N, 4) of footprints; NaN where they are nowhere on Earth.

    Args:
        tiles: the manifest's crs, minx, miny, maxx, maxy.
    """
    from rasterio.errors import RasterioError
    from rasterio.warp import transform_bounds

    bounds = np.full((len(tiles), 4), np.nan)
    edges = tiles[["minx", "miny", "maxx", "maxy"]].to_numpy()
    for i, crs in enumerate(tiles["crs"]):
        try:
            bounds[i] = transform_bounds(crs, "EPSG:4326", *edges[i], densify_pts=3)
        except (RasterioError, ValueError):
            continue
    outside = (np.abs(bounds[:, [0, 2]]) > 360).any(1) | (np.abs(bounds[:, [1, 3]]) > 90).any(1)
    bounds[outside] = np.nan
    return bounds


def key(splits: Sequence[str]) -> str:
    """HTML: what the colours mean, of the splits that are drawn."""
    return "".join(
        f"<span class='key'><span style='color:{colour}'>■</span> {split}</span>"
        for split, colour in COLOURS.items()
        if split in splits
    )


def drawn(bounds: NDArray[np.float64], splits: Sequence[str], titles: Sequence[str]) -> str:
    """The map, true to scale at its middle; as wide as there is room, up to WIDE pixels.

    Args:
        bounds: west, south, east, north (N, 4) in degrees, N of 1 or more, all finite. splits: of
            each, its colour. titles: of each, what shows when the pointer rests on it.
    """
    west, south = (float(low) for low in bounds[:, :2].min(0))
    east, north = (float(high) for high in bounds[:, 2:].max(0))
    stretch = max(math.cos(math.radians((south + north) / 2)), 0.05)
    edge = 0.06 * max((east - west) * stretch, north - south, 1e-4)
    west, east = west - edge / stretch, east + edge / stretch
    south, north = max(south - edge, -90), min(north + edge, 90)
    scale = min(WIDE / ((east - west) * stretch), HIGH / (north - south))
    wide, high = (east - west) * stretch * scale, (north - south) * scale

    def x(longitude: float) -> float:
        return float((longitude - west) * stretch * scale)

    def y(latitude: float) -> float:
        return float((north - latitude) * scale)

    lines = []
    for low, top, across in ((west, east, True), (south, north, False)):
        step = _step(top - low)
        for value in np.arange(math.ceil(low / step) * step, top, step):
            words = f"{round(float(value), 6):g}°"
            if across:
                lines.append(f"<path d='M{x(value):.1f} 0V{high:.1f}' stroke='#e5e5e5'/>")
                lines.append(f"<text x='{x(value) + 2:.1f}' y='{high - 3:.1f}'>{words}</text>")
            else:
                lines.append(f"<path d='M0 {y(value):.1f}H{wide:.1f}' stroke='#e5e5e5'/>")
                lines.append(f"<text x='2' y='{y(value) - 2:.1f}'>{words}</text>")
    marks = []
    for (left, bottom, right, top), split, title in zip(bounds, splits, titles, strict=True):
        colour = COLOURS.get(split, "#000")
        about = f"<title>{escape(title)}</title>"
        wider, taller = x(right) - x(left), y(bottom) - y(top)
        if max(wider, taller) < 3:  # too small to see
            middle = f"cx='{x((left + right) / 2):.1f}' cy='{y((bottom + top) / 2):.1f}'"
            marks.append(
                f"<circle {middle} r='4' fill='{colour}' fill-opacity='.5'>{about}</circle>"
            )
        else:
            place = f"x='{x(left):.1f}' y='{y(top):.1f}' width='{wider:.1f}' height='{taller:.1f}'"
            marks.append(
                f"<rect {place} fill='{colour}' fill-opacity='.25' stroke='{colour}'>{about}</rect>"
            )
    return (
        f"<svg viewBox='0 0 {wide:.0f} {high:.0f}' width='{wide:.0f}' "
        f"style='border:1px solid #ccc;max-width:100%'>{''.join(lines)}{''.join(marks)}</svg>"
    )


def _step(extent: float) -> float:
    """Degrees between lines: 1, 2 or 5 times a power of ten, some six of them."""
    power = 10.0 ** math.floor(math.log10(extent / 6))
    return float(next(power * times for times in (1, 2, 5, 10) if power * times >= extent / 6))
