"""Pictures people look at: reconstructions, a confusion matrix, mistakes, a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ringmo.evaluation.metrics import Interval

TILE = 128  # pixels a tile is shown at
GAP = 8
INK, PAPER, MASKED = (20, 20, 20), (255, 255, 255), 128


def _shown(pixels: NDArray[np.uint8]) -> Image.Image:
    """A tile (H, W, 3) or (H, W, 1) at the size tiles are shown."""
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    larger = min(pixels.shape[:2]) >= TILE
    how = Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((TILE, TILE), how)


def reconstructions(
    path: Path,
    originals: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    reconstructed: NDArray[np.uint8],
) -> None:
    """Original, masked and reconstructed side by side, two tiles a row.

    Args:
        originals, reconstructed: (N, H, W, 3), or 1 for grey. masks: (N, H, W, 1), True = masked.
    """
    titles = ("original", "masked", "reconstructed")
    font = ImageFont.load_default(14)
    across = 2 if len(originals) > 1 else 1
    rows = -(-len(originals) // across)
    block = len(titles) * (TILE + GAP) + 2 * GAP
    sheet = Image.new("RGB", (across * block, rows * (TILE + GAP) + 28), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i in range(across):
        for j, title in enumerate(titles):
            draw.text((GAP + i * block + j * (TILE + GAP), 6), title, INK, font)
    for n in range(len(originals)):
        masked = np.where(masks[n], np.uint8(MASKED), originals[n])
        for j, image in enumerate((originals[n], masked, reconstructed[n])):
            left = GAP + n % across * block + j * (TILE + GAP)
            sheet.paste(_shown(image), (left, 28 + n // across * (TILE + GAP)))
    _save(sheet, path)


def contact_sheet(
    path: Path, images: Sequence[NDArray[np.uint8]], captions: Sequence[Sequence[str]], title: str
) -> None:
    """Tiles (H, W, 3), or 1 for grey, with the lines of their captions under them, six a row."""
    font, across, line = ImageFont.load_default(12), 6, 15
    lines = max((len(caption) for caption in captions), default=0)
    cell = (TILE + GAP + 24, TILE + GAP + lines * line + 4)
    rows = max(1, -(-len(images) // across))
    sheet = Image.new("RGB", (across * cell[0] + GAP, rows * cell[1] + 32), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, INK, ImageFont.load_default(15))
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + n % across * cell[0], 32 + n // across * cell[1]
        sheet.paste(_shown(image), (left, top))
        for i, text in enumerate(caption):
            while draw.textlength(text, font) > cell[0] - 4 and len(text) > 1:
                text = text[:-2] + "…"
            draw.text((left, top + TILE + 3 + i * line), text, INK, font)
    _save(sheet, path)


def confusion(path: Path, matrix: NDArray[np.int64], classes: Sequence[str]) -> None:
    """A confusion matrix, rows true and columns predicted: colour is the share of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(classes)
    side = 3 + 0.32 * max(count, 6)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(count), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("test tiles by true and predicted class")
    for row, column in np.argwhere(matrix):
        ink = "white" if share[row, column] > 0.55 else "black"
        number = str(matrix[row, column])
        axes.text(column, row, number, ha="center", va="center", fontsize=7, color=ink)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


# Okabe and Ito's colours, which colour-blind people can tell apart; grey is the yardstick's.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
YARDSTICK = "#666666"


def accuracy_by_labels(
    path: Path,
    labels: Sequence[int],
    lines: Mapping[str, Sequence[Interval]],
    yardstick: str,
    title: str,
) -> None:
    """Accuracy over labels per class: a line a method with error bars, the yardstick's dashed.

    Args:
        lines: name → one interval for each of `labels`; shares from 0 to 1.
        yardstick: the one of the names that is drawn dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    colours = iter(LINES)
    for n, (name, intervals) in enumerate(lines.items()):
        values = 100 * np.array([[i.value, i.low, i.high] for i in intervals])
        dashed = name == yardstick
        axes.errorbar(
            # Side by side, so that bars of close methods do not hide each other.
            np.array(labels) * 1.025 ** (n - (len(lines) - 1) / 2),
            values[:, 0],
            # A bootstrap's interval need not hold the mean when few tiles were drawn.
            np.maximum(0, [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]),
            label=name,
            color=YARDSTICK if dashed else next(colours, "black"),
            linestyle="--" if dashed else "-",
            marker="s" if dashed else "o",
            markersize=5,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.set_xticks(labels, [str(count) for count in labels])
    axes.minorticks_off()
    axes.set_xlim(min(labels) * 0.8, max(labels) * 1.25)
    axes.set_xlabel("labels per class (logarithmic)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    sheet.save(temporary, "PNG")
    temporary.replace(path)
