"""Pictures people look at: reconstructions, answers, confusion, reliability, comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ringmo.evaluation.calibration import Reliability
from ringmo.evaluation.metrics import Interval

TILE = 128  # pixels a tile is shown at
GAP = 8
INK, PAPER, MASKED = (20, 20, 20), (255, 255, 255), 128


def _shown(pixels: NDArray[np.uint8], side: int = TILE) -> Image.Image:
    """A tile (H, W, 3) or (H, W, 1) at the size tiles are shown."""
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    larger = min(pixels.shape[:2]) >= side
    how = Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), how)


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
            short = _short(draw, text, cell[0] - 4, font)
            draw.text((left, top + TILE + 3 + i * line), short, INK, font)
    _save(sheet, path)


def answers(
    path: Path,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    captions: Sequence[str],
    title: str,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
    side: int = 176,
) -> None:
    """For each tile its pictures side by side (H, W, 3), under a caption; two tiles a row.

    Args:
        legend: of classes, the names and the colours they have. side: pixels a picture is shown at.
    """
    font, line = ImageFont.load_default(12), 18
    wide = max((len(pictures) for pictures in rows), default=1) * (side + 2) + 2 * GAP
    across = 2 if len(rows) > 1 and wide < 1000 else 1
    cell, width = side + line + GAP, max(across * wide, 400)
    named = _placed(legend, width, font)
    head = 32 + (named[-1][1] + line + GAP if named else 0)
    height = head + max(1, -(-len(rows) // across)) * cell
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, INK, ImageFont.load_default(15))
    for (name, ink), (left, top) in zip(legend, named, strict=True):
        draw.rectangle([left, 34 + top, left + 10, 44 + top], fill=ink, outline=INK)
        draw.text((left + 16, 32 + top), name, INK, font)
    for n, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        left, top = GAP + n % across * wide, head + n // across * cell
        draw.text((left, top), _short(draw, caption, wide - GAP, font), INK, font)
        for i, picture in enumerate(pictures):
            sheet.paste(_shown(picture, side), (left + i * (side + 2), top + line))
    _save(sheet, path)


def _placed(
    legend: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: Any
) -> list[tuple[int, int]]:
    """Where each name of a legend begins, in lines of so many pixels: left, and below the first."""
    left, top, line, places = GAP, 0, 18, []
    for name, _ in legend:
        length = 16 + int(font.getlength(name)) + 2 * GAP
        if left > GAP and left + length > width:
            left, top = GAP, top + line
        places.append((left, top))
        left += length
    return places


def _short(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    """A text that fits so many pixels."""
    while draw.textlength(text, font) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text


def confusion(
    path: Path, matrix: NDArray[Any], true: Sequence[str], predicted: Sequence[str], of: str
) -> None:
    """A confusion matrix, rows true and columns predicted: colour is the share of the row.

    In the cells stand counts; where these are large (pixels), the share in %.

    Args:
        of: what is counted: tiles, pixels.
    """
    side = 3 + 0.32 * max(len(true), len(predicted), 6)
    figure, axes = _axes((side, side))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(predicted)), predicted, rotation=90, fontsize=8)
    axes.set_yticks(range(len(true)), true, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    large = matrix.max(initial=0) > 9999
    unit = "% of the true class's" if large else "test"
    axes.set_title(f"{unit} {of} by true and predicted class", fontsize=10)
    for row, column in np.argwhere(matrix):
        ink = "white" if share[row, column] > 0.55 else "black"
        number = f"{100 * share[row, column]:.0f}" if large else str(int(matrix[row, column]))
        if number != "0":
            axes.text(column, row, number, ha="center", va="center", fontsize=7, color=ink)
    _write(figure, path)


def reliability(path: Path, found: Reliability) -> None:
    """How right answers are over how sure the model was, and how many there are of each."""
    figure, axes = _axes((6, 5.5))
    there = found.count > 0
    middle = (np.arange(len(found.count)) + 0.5) / len(found.count)
    sure = np.divide(found.confidence, found.count, out=middle.copy(), where=there)
    right = np.divide(found.right, found.count, out=np.zeros_like(middle), where=there)
    share = found.count / max(found.count.sum(), 1)
    axes.bar(middle, share, width=0.9 / len(middle), color="#cccccc", label=f"share of {found.of}")
    axes.plot([0, 1], [0, 1], "--", color=YARDSTICK, label="as sure as right")
    axes.plot(sure[there], right[there], "o-", color=LINES[0], label="the model")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="how sure the model is", ylabel="share that is right")
    error = f"{100 * found.error:.1f} points" if found.count.sum() else "-"
    axes.set_title(f"expected calibration error {error}, {found.count.sum():,.0f} {found.of}")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    _write(figure, path)


@dataclass(frozen=True)
class Curve:
    """Precision over recall, from the surest answer on; average precision, a share."""

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    average: float


def precision_recall(path: Path, curves: Mapping[str, Curve]) -> None:
    """Precision over recall, a line a class; of many, the five hardest are named."""
    figure, axes = _axes((7, 5.5))
    order = sorted(curves, key=lambda name: curves[name].average)
    named = order[: len(LINES)]
    for name in reversed(order):
        curve, own = curves[name], name in named
        axes.plot(
            curve.recall,
            curve.precision,
            color=LINES[named.index(name)] if own else "#bbbbbb",
            linewidth=1.6 if own else 0.8,
            zorder=3 if own else 2,
            label=f"{name}: {100 * curve.average:.1f} %" if own else None,
        )
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    mean = np.mean([curve.average for curve in curves.values()]) if curves else float("nan")
    rest = f"; named: the {len(named)} hardest" if len(order) > len(named) else ""
    axes.set_title(
        f"average precision {100 * mean:.1f} %, mean of {len(curves)} classes{rest}", fontsize=10
    )
    axes.grid(alpha=0.3)
    if named:
        axes.legend(loc="best", framealpha=0.9, fontsize=8)
    _write(figure, path)


def drops(path: Path, found: Sequence[tuple[str, Interval]], title: str, label: str) -> None:
    """How much worse each change makes it: a point with its interval a change.

    Args:
        found: name and interval, as they shall be shown. label: of the axis, with the unit.
    """
    figure, axes = _axes((7, 1.4 + 0.38 * max(len(found), 2)))
    at = np.arange(len(found))
    value, low, high = (
        np.array([getattr(one, name) for _, one in found], np.float64)
        for name in ("value", "low", "high")
    )
    axes.axvline(0, color=YARDSTICK, linestyle="--", linewidth=1)
    axes.errorbar(
        value,
        at,
        xerr=np.nan_to_num(np.maximum(0, [value - low, high - value])),
        fmt="o",
        color=LINES[0],
        capsize=3,
    )
    axes.set_yticks(at, [name for name, _ in found])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    _write(figure, path)


# Okabe and Ito's colours, which colour-blind people can tell apart; grey is the yardstick's.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
YARDSTICK = "#666666"


def by_labels(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[int, Interval]]],
    title: str,
    yardstick: str | None = None,
) -> None:
    """A figure over the number of labels: a panel a task, a line a row with error bars.

    Args:
        panels: what stands on a panel's axes ("scene: accuracy, %|labels per class") → row →
            number of labels → interval, as it is to be shown.
        yardstick: the row that is drawn dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = max(1, len(panels))
    across = min(count, 2)
    down = -(-count // across)
    size = (8 if across == 1 else 7 * across, 5.5 if down == 1 else 4.6 * down)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    plain = iter(LINES)
    colours = {
        name: YARDSTICK if name == yardstick else next(plain, f"C{n}")
        for n, name in enumerate(rows)
    }
    for number, (head, lines) in enumerate(panels.items(), 1):
        axes: Any = figure.add_subplot(down, across, number)
        label, _, below = head.partition("|")
        labels = sorted({count for points in lines.values() for count in points})
        for n, (name, points) in enumerate(lines.items()):
            counts = sorted(points)
            values = np.array([[(i := points[c]).value, i.low, i.high] for c in counts])
            axes.errorbar(
                # Side by side, so that bars of close rows do not hide each other.
                np.array(counts) * 1.025 ** (n - (len(lines) - 1) / 2),
                values[:, 0],
                # A bootstrap's interval need not hold the mean when few tiles were drawn.
                np.nan_to_num(
                    np.maximum(0, [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
                ),
                label=name,
                color=colours[name],
                linestyle="--" if name == yardstick else "-",
                marker="s" if name == yardstick else "o",
                markersize=5,
                capsize=3,
            )
        axes.set_xscale("log")
        axes.set_xticks(labels, [str(count) for count in labels])
        axes.minorticks_off()
        if labels:
            axes.set_xlim(min(labels) * 0.8, max(labels) * 1.25)
        axes.set_xlabel(f"{below} (logarithmic)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(loc="best", framealpha=0.9, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes; without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    sheet.save(temporary, "PNG")
    temporary.replace(path)
