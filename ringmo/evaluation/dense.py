"""Measures of an answer for each pixel, as counts and sums a tile: any weighting adds them up.

Masks have numbers of classes: first those that a model knows, then those that only the tiles it
is tested on have. The latter count as one, `others`, in a tile's confusion matrix, and are told
apart where figures need it (`others`). What is UNKNOWN counts nowhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.evaluation.calibration import BINS
from ringmo.tasks.base import UNKNOWN, Evidence, Figures

# Pixels that two boundaries may lie apart, centre to centre, and still be the same one.
TOLERANCE = 2
RATIO = 1.25
SCORES, LOG_ODDS = 64, 10.0


def confusion(truth: Tensor, said: Tensor, classes: int) -> Tensor:
    """Pixels of each tile by true and said class: int64 (B, classes + 1, classes).

    The last row is of true classes that the model does not know.

    Args:
        truth, said: int64 (B, H, W).
    """
    tiles, cells = len(truth), (classes + 1) * classes
    tile = torch.arange(tiles, device=truth.device)[:, None, None]
    cell = (tile * (classes + 1) + truth.clamp(max=classes)) * classes + said
    cell = torch.where(truth == UNKNOWN, tiles * cells, cell)  # one bin more for what is unknown
    counts = cell.flatten().bincount(minlength=tiles * cells + 1)[:-1]
    return counts.view(tiles, classes + 1, classes)


def others(truth: Tensor, classes: int) -> Evidence:
    """Pixels of each class that the model does not know, a row a tile and class.

    Returns:
        object_tile, object_class, object_pixels, object_boundary: int64 (n,).
    """
    border = boundary(truth)
    rows = []
    rest = truth[(truth >= classes) & (truth != UNKNOWN)]  # mostly none
    for number in np.unique(rest.cpu().numpy()).tolist():
        there = truth == number
        counts = torch.stack((there.sum((1, 2)), (there & border).sum((1, 2))))
        rows += [
            (tile, number, pixels, edge)
            for tile, (pixels, edge) in enumerate(counts.T.tolist())
            if pixels
        ]
    table = np.array(sorted(rows), np.int64).reshape(-1, 4)
    names = ("object_tile", "object_class", "object_pixels", "object_boundary")
    return dict(zip(names, table.T.copy(), strict=True))


def boundary(mask: Tensor) -> Tensor:
    """Pixels that touch one of another class at a side: bool (B, H, W).

    The image's edge and pixels that are UNKNOWN make no boundary.
    """
    found = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (1, 2):
        count = mask.shape[axis] - 1
        one, other = mask.narrow(axis, 0, count), mask.narrow(axis, 1, count)
        between = (one != other) & (one != UNKNOWN) & (other != UNKNOWN)
        found.narrow(axis, 0, count).logical_or_(between)
        found.narrow(axis, 1, count).logical_or_(between)
    return found


def boundaries(truth: Tensor, said: Tensor, classes: int, tolerance: int = TOLERANCE) -> Tensor:
    """How well the classes' boundaries lie: int64 (B, classes, 4).

    Of each class: said boundary pixels that have a true one within the tolerance, said ones, true
    ones that have a said one within it, true ones.

    Args:
        truth, said: int64 (B, H, W). tolerance: pixels, the radius of a disk.

    Source: Csurka et al., BMVC 2013, "What is a good evaluation measure for semantic
    segmentation?"; theirs is a mean over images, where these are counts to be added up.
    """
    said = torch.where(truth == UNKNOWN, UNKNOWN, said)
    true_edges, said_edges = boundary(truth), boundary(said)
    counts = []
    for number in range(classes):  # one at a time: of 16 classes, large tiles fill the memory
        true, claimed = true_edges & (truth == number), said_edges & (said == number)
        each = (
            claimed & _near(true, tolerance),
            claimed,
            true & _near(claimed, tolerance),
            true,
        )
        counts.append(torch.stack([pixels.sum((1, 2)) for pixels in each], 1))
    return torch.stack(counts, 1)


def _near(edges: Tensor, tolerance: int) -> Tensor:
    """Pixels with one of `edges` (B, H, W) in the disk around them."""
    height, width = edges.shape[1:]
    wide = nn.functional.pad(edges, (tolerance,) * 4)
    found = torch.zeros_like(edges)
    # Shifted and put together: a fifth of the time that a convolution takes.
    for row in range(-tolerance, tolerance + 1):
        for column in range(-tolerance, tolerance + 1):
            if row**2 + column**2 <= tolerance**2:
                top, left = tolerance + row, tolerance + column
                found |= wide[:, top : top + height, left : left + width]
    return found


def reliability(confidence: Tensor, right: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Pixels of each tile by confidence, in BINS of the same width: each (B, BINS).

    Args:
        confidence: (B, H, W), 0 to 1. right, known: bool (B, H, W).

    Returns:
        reliability_count, reliability_confidence (its sum), reliability_right.
    """
    tiles = len(confidence)
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    bins = bins + BINS * torch.arange(tiles, device=bins.device)[:, None, None]
    sums = {"count": torch.ones_like(confidence), "confidence": confidence, "right": right}
    return {
        f"reliability_{name}": torch.zeros(tiles * BINS, dtype=torch.float64, device=bins.device)
        .index_add_(0, bins.flatten(), (values * known).flatten().double())
        .view(tiles, BINS)
        for name, values in sums.items()
    }


def scores(probabilities: Tensor, truth: Tensor) -> Tensor:
    """Known pixels of each tile by the score of each class: int64 (B, classes, SCORES, 2).

    Of the pixels with a score all, then those that are of the class. SCORES bins are as wide in
    log-odds, from -LOG_ODDS to LOG_ODDS: most scores of a trained model are near 0 or 1.

    Args:
        probabilities: (B, classes, H, W). truth: int64 (B, H, W).
    """
    tiles, classes = probabilities.shape[:2]
    known = (truth != UNKNOWN).flatten()
    tile = SCORES * torch.arange(tiles, device=truth.device)[:, None, None]
    counts = []
    for number in range(classes):  # one at a time, as of boundaries
        odds = probabilities[:, number].float().logit(eps=1e-6)
        bins = ((odds / LOG_ODDS + 1) / 2 * SCORES).long().clamp(0, SCORES - 1) + tile
        chosen = known, known & (truth == number).flatten()
        each = [bins.flatten()[of].bincount(minlength=tiles * SCORES) for of in chosen]
        counts.append(torch.stack(each, 1).view(tiles, SCORES, 2))
    return torch.stack(counts, 1)


def heights(truth: Tensor, said: Tensor) -> Evidence:
    """Sums over each tile's pixels with a true height: float64 (tiles,).

    height_pixels, height_error (absolute, metres), height_square, and of those above 0 m, since
    only these have a ratio, height_positive and height_within (truth and answer differ by less
    than a factor of RATIO).

    Args:
        truth, said: (B, H, W), metres; truth is NaN where nobody knows.
    """
    known = ~truth.isnan()
    true, said = torch.nan_to_num(truth).double(), said.double()
    error = (said - true).abs()
    positive = known & (true > 0)
    within = positive & (said < RATIO * true) & (true < RATIO * said)
    sums = {
        "height_pixels": known,
        "height_error": error * known,
        "height_square": error**2 * known,
        "height_positive": positive,
        "height_within": within,
    }
    return {name: each.double().sum((1, 2)).cpu().numpy() for name, each in sums.items()}


def mask_evidence(probabilities: Tensor, truth: Tensor) -> Evidence:
    """What the figures need of each tile's mask: see `confusion`, `boundaries`, `others`,
    `scores`.

    Args:
        probabilities: (B, classes, H, W). truth: int64 (B, H, W).
    """
    classes = probabilities.shape[1]
    confidence, said = probabilities.max(1)
    counts: dict[str, Tensor] = {
        "confusion": confusion(truth, said, classes),
        "boundary": boundaries(truth, said, classes),
        **reliability(confidence, said == truth, truth != UNKNOWN),
    }
    return {
        **{name: each.cpu().numpy() for name, each in counts.items()},
        "scores_pixels": scores(probabilities, truth).cpu().numpy().astype(np.uint32),
        **others(truth, classes),
    }


def mask_figures(
    evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
) -> Figures:
    """Of masks: miou, mean_f1, accuracy (of all pixels) and boundary_f1, means over the classes
    that the tiles have; and a row for each of these.

    A class that the model does not know has 0 everywhere. Its name, and those of others like it,
    follow the model's in `classes`.
    """
    matrix = _weighted(evidence["confusion"], weights)
    edges = _weighted(evidence["boundary"], weights)
    known = matrix.shape[1]
    true, claimed, right = matrix.sum(1), matrix.sum(0), matrix[:known].diagonal()
    matched_said, said_edges, matched_true, true_edges = edges.T
    extra, extra_edges = _other_classes(evidence, len(classes) - known, known, weights)
    rows: list[dict[str, Any]] = [
        {
            "class": classes[i],
            "iou": _share(right[i], true[i] + claimed[i] - right[i]),
            "f1": _share(2 * right[i], true[i] + claimed[i]),
            "precision": _share(right[i], claimed[i], 0.0),
            "recall": _share(right[i], true[i]),
            "boundary_f1": _boundary_f1(matched_said[i], said_edges[i], matched_true[i], edge),
            "pixels": int(true[i]),
        }
        for i, edge in enumerate(true_edges)
        if true[i]
    ]
    rows += [
        {
            "class": classes[known + i] if known + i < len(classes) else f"class {known + i}",
            **dict.fromkeys(("iou", "f1", "precision", "recall"), 0.0),
            "boundary_f1": 0.0 if edge else float("nan"),
            "pixels": int(pixels),
        }
        for i, (pixels, edge) in enumerate(zip(extra, extra_edges, strict=True))
        if pixels
    ]
    whole = {
        "miou": _mean(rows, "iou"),
        "mean_f1": _mean(rows, "f1"),
        "accuracy": _share(right.sum(), matrix.sum()),
        "boundary_f1": _mean(rows, "boundary_f1"),
    }
    return Figures(whole, rows)


def object_figures(
    evidence: Evidence, number: int, weights: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Of one class among the others: f1, iou, precision, recall, boundary_f1 and the accuracy.

    Where there is none, and none was said, only the accuracy is a number.
    """
    matrix = _weighted(evidence["confusion"], weights)
    edges = _weighted(evidence["boundary"], weights)[number]
    right, true, claimed = matrix[number, number], matrix[number].sum(), matrix[:, number].sum()
    return {
        "f1": _share(2 * right, true + claimed),
        "iou": _share(right, true + claimed - right),
        "precision": _share(right, claimed, 0.0 if true else float("nan")),
        "recall": _share(right, true),
        "boundary_f1": _boundary_f1(*edges),
        "accuracy": _share(matrix[: matrix.shape[1]].trace(), matrix.sum()),
    }


def height_figures(
    evidence: Evidence, weights: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """mae and rmse in metres over all pixels with a true height, and within_1.25, a share."""
    sums = {
        name: float(_weighted(each, weights))
        for name, each in evidence.items()
        if name.startswith("height_")
    }
    pixels = sums["height_pixels"]
    return {
        "mae": _share(sums["height_error"], pixels),
        "rmse": _share(sums["height_square"], pixels) ** 0.5,
        "within_1.25": _share(sums["height_within"], sums["height_positive"]),
    }


def tile_miou(evidence: Evidence) -> NDArray[np.float64]:
    """Each tile's mean IoU over the classes that it has; NaN where nobody knows any pixel."""
    matrix = evidence["confusion"].astype(np.float64)
    known = matrix.shape[2]
    true, claimed = matrix.sum(2), matrix.sum(1)
    right = matrix[:, :known].diagonal(axis1=1, axis2=2)
    union = true[:, :known] + claimed - right
    ious = np.zeros_like(true)  # what the model does not know has none
    np.divide(right, union, out=ious[:, :known], where=union > 0)
    there = (true > 0).sum(1)
    return np.where(there > 0, np.where(true > 0, ious, 0).sum(1) / np.maximum(there, 1), np.nan)


def tile_f1(evidence: Evidence, number: int) -> NDArray[np.float64]:
    """Each tile's F1 of one class, with a hundredth of its pixels said and right beside it all.

    So a tile without the class has 1 where none is said, and less the more is. NaN where nobody
    knows any pixel.
    """
    matrix = evidence["confusion"].astype(np.float64)
    pixels = matrix.sum((1, 2))
    right = matrix[:, number, number]
    both = matrix[:, number].sum(1) + matrix[:, :, number].sum(1)
    extra = 2 * np.maximum(pixels, 1) / 100
    return np.where(pixels > 0, (2 * right + extra) / (both + extra), np.nan)


def _other_classes(
    evidence: Evidence, named: int, known: int, weights: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixels, and those of boundaries, of each class that the model does not know."""
    tile = evidence["object_tile"]
    weight = np.ones(len(tile)) if weights is None else weights[tile].astype(np.float64)
    number = evidence["object_class"] - known
    # Of no rows at all bincount makes integers.
    return (
        np.bincount(number, weight * evidence["object_pixels"], named).astype(np.float64),
        np.bincount(number, weight * evidence["object_boundary"], named).astype(np.float64),
    )


def _weighted(rows: NDArray[Any], weights: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """The sum over tiles; exact for counts, as far as float64 is."""
    if weights is None:
        total: NDArray[np.float64] = rows.sum(0).astype(np.float64)
        return total
    return np.tensordot(weights.astype(np.float64), rows.astype(np.float64, copy=False), 1)


def _share(part: float, whole: float, none: float = float("nan")) -> float:
    return float(part / whole) if whole else none


def _boundary_f1(
    matched_said: float, said_edges: float, matched_true: float, true_edges: float
) -> float:
    """NaN where neither has a boundary, as in a tile of one class."""
    if not said_edges and not true_edges:
        return float("nan")
    precision = _share(matched_said, said_edges, 0.0)
    recall = _share(matched_true, true_edges, 0.0)
    return _share(2 * precision * recall, precision + recall, 0.0)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    values = np.array([row[name] for row in rows])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
