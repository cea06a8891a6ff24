"""Measures of a classifier and how sure they are, in NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def confusion_matrix(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts (classes, classes): row true, column predicted."""
    pairs = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes).astype(np.int64)


@dataclass(frozen=True)
class PerClass:
    """One value a class: shares from 0 to 1; support is the number of true tiles."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: NDArray[np.int64]

    @property
    def mean_f1(self) -> float:
        """Over the classes that have tiles."""
        present = self.support > 0
        return float(self.f1[present].mean()) if present.any() else 0.0


def per_class(matrix: NDArray[np.int64]) -> PerClass:
    """Precision, recall and F1 from a confusion matrix; 0 where a class was never predicted."""
    right = matrix.diagonal().astype(np.float64)
    support, claimed = matrix.sum(1), matrix.sum(0)
    return PerClass(
        right / np.maximum(claimed, 1),
        right / np.maximum(support, 1),
        2 * right / np.maximum(support + claimed, 1),
        support,
    )


def average_precision(
    truth: NDArray[np.float64], scores: NDArray[np.float32], weights: NDArray[np.float64]
) -> float:
    """Area under precision over recall, in steps, of one class: the mean precision at its tiles.

    Args:
        truth: (N,) of 0 and 1. weights: how often each tile counts.

    Returns:
        NaN where no tile of the class counts.
    """
    order = np.argsort(-scores, kind="stable")
    hits, counted = (truth * weights)[order], weights[order]
    if not hits.sum():
        return float("nan")
    precision = np.cumsum(hits) / np.maximum(np.cumsum(counted), 1e-12)
    return float((precision * hits).sum() / hits.sum())


def bootstrap_mean(
    values: NDArray[np.float64], places: Sequence[str], samples: int, seed: int = 0
) -> Interval:
    """The mean of `values` (N,) and its interval when whole places are drawn with replacement.

    Tiles of one place are much alike: drawing single tiles would claim more certainty than there
    is. With 0 and 1 for wrong and right it is the accuracy; with the difference of two models'
    the paired difference.

    Values (S, N) of S trainings with seeds of their own are drawn both ways, trainings and places
    (the pigeonhole bootstrap, Owen 2007, arXiv:0712.1111): the interval then holds for another
    training and other tiles, and errs on the wide side.
    """
    if not values.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    _, place = np.unique(np.asarray(places, dtype=str), return_inverse=True)
    trainings = np.atleast_2d(values)
    sums = np.stack([np.bincount(place, weights=row) for row in trainings])
    counts = np.bincount(place)
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    for i in range(samples):
        drawn = random.integers(0, len(counts), len(counts))
        of = sums
        if len(sums) > 1:
            of = sums[random.integers(0, len(sums), len(sums))]
        means[i] = of[:, drawn].mean(0).sum() / counts[drawn].sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
