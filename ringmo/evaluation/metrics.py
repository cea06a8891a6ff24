"""Measures of classes, and how sure any figure is, in NumPy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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


# Weights of the tiles → figures by name; None: every tile once.
Measure = Callable[[NDArray[np.int64] | None], Mapping[str, float]]


def draws(places: Sequence[str], samples: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """How often each tile counts, (N,), when as many places as there are are drawn again.

    Whole places, with replacement: tiles of one place are much alike, and drawing single tiles
    would claim more certainty than there is. The same places and seed give the same draws.
    """
    _, place = np.unique(np.asarray(places, dtype=str), return_inverse=True)
    for times in place_draws(int(place.max()) + 1, samples, seed):
        yield times[place]


def place_draws(count: int, samples: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """How often each of so many places is drawn when as many are drawn again: (count,)."""
    random = np.random.default_rng(seed)
    for _ in range(samples):
        yield np.bincount(random.integers(0, count, count), minlength=count)


def drawn(
    measure: Measure, places: Sequence[str], samples: int, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Figures of all tiles and then of each draw, by name: (1 + samples,).

    On the same places and seed those of two models belong together, draw by draw: `interval` of
    their difference is the paired one. Without tiles all are NaN; of a single place all draws are,
    since it says nothing of how much places differ.
    """
    whole = dict(measure(None))
    values = {name: np.full(1 + samples, np.nan) for name in whole}
    for name, value in whole.items():
        values[name][0] = value
    if len(set(places)) > 1:
        for i, weights in enumerate(draws(places, samples, seed), 1):
            for name, value in measure(weights).items():
                if name in values:
                    values[name][i] = value
    return values


def mean_drawn(
    values: NDArray[np.float64], places: Sequence[str], samples: int, seed: int = 0
) -> NDArray[np.float64]:
    """`drawn` for the mean of one value a tile, (N,), all draws at once: (1 + samples,).

    Source of the speed: a mean needs the places' sums alone.
    """
    means = np.full(1 + samples, np.nan)
    if not len(values):
        return means
    means[0] = values.mean()
    _, place = np.unique(np.asarray(places, dtype=str), return_inverse=True)
    sums, counts = np.bincount(place, weights=values), np.bincount(place)
    if len(counts) < 2:
        return means
    random = np.random.default_rng(seed)
    for i in range(1, 1 + samples):
        chosen = random.integers(0, len(counts), len(counts))
        means[i] = sums[chosen].sum() / counts[chosen].sum()
    return means


def interval(values: NDArray[np.float64]) -> Interval:
    """The 95 % interval of a figure from `drawn`: (1 + samples,).

    Draws in which it is no number are left out: without a tile of the class, say.
    """
    known = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(known):
        return Interval(float(values[0]), float("nan"), float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high))


def lower_bound(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> float:
    """The one-sided bound that a figure from `drawn`, (1 + samples,), is not below.

    Draws in which it is no number are left out; NaN where none is left.
    """
    known = values[1:][~np.isnan(values[1:])]
    return float(np.quantile(known, 1 - confidence)) if len(known) else float("nan")


def over_trainings(values: Sequence[NDArray[np.float64]], seed: int = 0) -> NDArray[np.float64]:
    """The mean over S trainings with seeds of their own, which are drawn with replacement too.

    The interval then holds for another training and other tiles, and errs on the wide side (the
    pigeonhole bootstrap, Owen 2007, arXiv:0712.1111).

    Args:
        values: of each training what `drawn` gives, on the same draws: S of (1 + samples,).
    """
    stacked = np.stack(list(values))
    trainings, columns = stacked.shape
    chosen = np.random.default_rng((seed, trainings)).integers(0, trainings, stacked.shape)
    chosen[:, 0] = np.arange(trainings)
    mean: NDArray[np.float64] = stacked[chosen, np.arange(columns)].mean(0)
    return mean
