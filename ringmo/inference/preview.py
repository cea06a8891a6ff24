"""A small picture of a scene with its answer over it, and what its colours mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ringmo.config import Sensor
from ringmo.data.colours import stretched, visible
from ringmo.data.values import input_values
from ringmo.tasks.base import UNKNOWN
from ringmo.tasks.dense import colour, coloured
from ringmo.tasks.height import coloured as coloured_heights

OVER = 0.5  # share of the answer in the picture
MARGIN, LINE, SQUARE = 8, 18, 12  # pixels of the legend
PAPER, INK = (255, 255, 255), (20, 20, 20)
MOST = 40  # classes that a legend lists
Legend = list[tuple[str, tuple[int, int, int]]]


def of_mask(
    path: Path,
    pixels: NDArray[Any],
    sensor: Sensor,
    mask: NDArray[np.uint8],
    classes: Sequence[str],
) -> None:
    """Write a picture of classes.

    Args:
        pixels: (h, w, bands) of the scene, decoded. mask: (h', w'), numbers of classes.
    """
    there = [number for number in np.unique(mask).tolist() if number < len(classes)]
    over = Image.fromarray(coloured(mask))
    legend = [(classes[number], colour(number)) for number in there[:MOST]]
    _save(path, _over(_shown(pixels, sensor), over, mask != UNKNOWN), legend)


def of_heights(path: Path, pixels: NDArray[Any], sensor: Sensor, heights: NDArray[Any]) -> None:
    """Write a picture of heights (h', w') in metres; NaN where nobody knows."""
    known = heights[~np.isnan(heights)]
    low, high = np.percentile(known, (2, 98)) if known.size else (0.0, 1.0)
    over = Image.fromarray(coloured_heights(heights, float(low), float(high)))
    legend: Legend = []
    for share in (0.0, 0.5, 1.0):
        metres = np.array([[low + share * (high - low)]])
        ink = coloured_heights(metres, float(low), float(high))[0, 0].tolist()
        legend.append((f"{metres[0, 0]:.1f} m", (ink[0], ink[1], ink[2])))
    _save(path, _over(_shown(pixels, sensor), over, ~np.isnan(heights)), legend)


def of_boxes(
    path: Path,
    pixels: NDArray[Any],
    sensor: Sensor,
    corners: NDArray[np.float64],
    labels: Sequence[int],
    classes: Sequence[str],
) -> None:
    """Write a picture of boxes: corners (n, 4, 2) in the picture's pixels."""
    sheet = _shown(pixels, sensor)
    pen = ImageDraw.Draw(sheet)
    for points, label in zip(corners.tolist(), labels, strict=True):
        ring = [tuple(point) for point in [*points, points[0]]]
        pen.line(ring, fill=colour(label + 1), width=2)
    legend = [(classes[i], colour(i + 1)) for i in sorted(set(labels))[:MOST]]
    _save(path, sheet, legend)


def _shown(pixels: NDArray[Any], sensor: Sensor) -> Image.Image:
    if sensor.dtype == "uint8":
        shown = visible(pixels, sensor)
    else:  # 0 in all bands is no data, and has no say in how bright the rest is
        values, there = input_values(pixels, sensor), pixels.any(axis=2)
        shown = stretched(values, sensor, values[there][None] if there.any() else None)
    return Image.fromarray(shown[:, :, 0] if shown.shape[2] == 1 else shown).convert("RGB")


def _over(sheet: Image.Image, over: Image.Image, known: NDArray[np.bool_]) -> Image.Image:
    alpha = Image.fromarray((known * round(255 * OVER)).astype(np.uint8))
    how = Image.Resampling.NEAREST
    return Image.composite(over.resize(sheet.size, how), sheet, alpha.resize(sheet.size, how))


def _save(path: Path, sheet: Image.Image, legend: Legend) -> None:
    """The picture with its legend below it."""
    font: Any = ImageFont.load_default()
    wide = max([int(font.getlength(name)) for name, _ in legend] or [0]) + SQUARE + 2 * MARGIN
    width = max(sheet.width, wide + MARGIN)
    across = max(1, (width - MARGIN) // wide)
    lines = -(-len(legend) // across)
    page = Image.new(
        "RGB", (width, sheet.height + (2 * MARGIN + lines * LINE) * bool(lines)), PAPER
    )
    page.paste(sheet, (0, 0))
    pen = ImageDraw.Draw(page)
    for i, (name, ink) in enumerate(legend):
        x, y = MARGIN + i % across * wide, sheet.height + MARGIN + i // across * LINE
        pen.rectangle((x, y + 2, x + SQUARE, y + 2 + SQUARE), fill=ink, outline=INK)
        pen.text((x + SQUARE + MARGIN // 2, y), name, fill=INK, font=font)
    temporary = path.with_name(f".{path.name}.tmp")
    page.save(temporary, "PNG")
    temporary.replace(path)
