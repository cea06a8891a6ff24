"""Average precision of objects found, for any weighting of the tiles.

Each answer is right or wrong within its own tile, so that is settled once (`outcomes`). What is
left is sorted once (`Ranked`), and each weighting then costs a few passes over the answers.

Evidence has a row an object, be it an answer or true:

    object_tile      int64, position of its tile
    object_class     int64
    object_score     float32, NaN of a true object
    object_right     bool: right at an overlap of 0.5; False of a true object
    object_outcome   int8 (objects, sizes, thresholds): of an answer WRONG, RIGHT or IGNORED; of
                     a true object RIGHT where it counts as one to be found, else IGNORED

and `objects`, float64 (tiles,): how many a tile has to be found.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ringmo.tasks.base import Evidence

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # of overlap, as COCO has them
# Areas in pixels, as COCO has them: its limits belong to both sides.
SIZES: dict[str, tuple[float, float]] = {
    "all": (0, np.inf),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, np.inf),
}
WRONG, RIGHT, IGNORED = 0, 1, 2

Floats = NDArray[np.float64]
Style = Literal["voc07", "area", "coco"]
# Recalls at which precision is read; of `area` none: all of them.
GRIDS: dict[Style, Floats] = {
    "voc07": np.arange(11) / 10,
    "area": np.zeros(0),
    "coco": np.linspace(0, 1, 101),
}


@dataclass
class Instances:
    """The answers on a tile, or its true objects. areas in square pixels, (n,)."""

    labels: NDArray[np.int64]
    areas: Floats
    scores: Floats | None = None
    difficult: NDArray[np.bool_] | None = None


def evidence(
    tiles: Sequence[tuple[Instances, Instances, Floats]], matching: Literal["coco", "voc"]
) -> Evidence:
    """What average precision needs of tiles: see the module.

    Args:
        tiles: answers, true objects and their overlap (answers, true). matching: see `outcomes`.
    """
    shape = (0, len(SIZES), len(THRESHOLDS))
    rows: dict[str, list[Any]] = {
        "object_tile": [np.zeros(0, np.int64)],
        "object_class": [np.zeros(0, np.int64)],
        "object_score": [np.zeros(0, np.float32)],
        "object_right": [np.zeros(0, np.bool_)],
        "object_outcome": [np.zeros(shape, np.int8)],
    }
    counts = np.zeros(len(tiles))
    for tile, (answers, truth, overlap) in enumerate(tiles):
        ours, true = outcomes(answers, truth, overlap, matching)
        assert answers.scores is not None
        counts[tile] = (true[:, 0, 0] == RIGHT).sum()
        both = len(ours) + len(true)
        rows["object_tile"].append(np.full(both, tile, np.int64))
        rows["object_class"].append(np.concatenate([answers.labels, truth.labels]))
        unscored = np.full(len(true), np.nan)
        rows["object_score"].append(np.concatenate([answers.scores, unscored]).astype(np.float32))
        right = np.concatenate([ours[:, 0, 0] == RIGHT, np.zeros(len(true), np.bool_)])
        rows["object_right"].append(right)
        rows["object_outcome"].append(np.concatenate([ours, true]))
    return {"objects": counts, **{name: np.concatenate(parts) for name, parts in rows.items()}}


def outcomes(
    answers: Instances, truth: Instances, overlap: Floats, matching: Literal["coco", "voc"]
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Which answers are right, at each size and threshold: see the module.

    By falling score, of equals the earlier first; only within a class. `coco`: an answer takes
    the true object that it overlaps most of those not taken. `voc`: it looks at the true object
    that it overlaps most of all, and is wrong where that is taken. An overlap that equals the
    threshold is enough. What only a difficult object excuses is ignored, however often, and so is
    an answer without a true object whose area is of another size.

    Source: pycocotools, and VOC's and DOTA's development kits, whose boxes are a pixel wider.
    """
    low, high = (np.array(side)[:, None] for side in zip(*SIZES.values(), strict=True))
    many, few = len(answers.labels), len(truth.labels)
    difficult = np.zeros(few, np.bool_) if truth.difficult is None else truth.difficult
    elsewhere = (truth.areas < low) | (truth.areas > high) | difficult  # (sizes, true)
    true = np.where(elsewhere.T, IGNORED, RIGHT).astype(np.int8)
    shape = (len(SIZES), len(THRESHOLDS))
    outside = (answers.areas < low) | (answers.areas > high)  # (sizes, answers)
    found = np.repeat(np.where(outside.T, IGNORED, WRONG).astype(np.int8)[:, :, None], shape[1], 2)
    true = np.repeat(true[:, :, None], shape[1], 2)
    if not few or not many:
        return found, true
    assert answers.scores is not None
    limits = np.minimum(np.array(THRESHOLDS), 1 - 1e-10)
    same = np.where(answers.labels[:, None] == truth.labels, overlap, 0.0)
    taken = np.zeros((*shape, few), np.bool_)
    order = np.argsort(-answers.scores, kind="stable")
    for answer in order[same.max(1)[order] >= limits[0]]:
        if matching == "coco":
            # Those that count come before those that do not; of equals COCO takes the last.
            near = np.flatnonzero(same[answer] >= limits[0])[::-1]
            over = same[answer, near]
            can = (over >= limits[:, None]) & (~taken[:, :, near] | difficult[near])
            rank = np.where(can, over + 2 * ~elsewhere[:, None, near], -1.0)
            best = rank.argmax(-1)
            hit = np.take_along_axis(can, best[..., None], -1)[..., 0]
            at = near[best]
            excused = np.take_along_axis(elsewhere, at, 1)
        else:
            at = np.full(shape, same[answer].argmax())
            hit = np.broadcast_to(same[answer, at[0, 0]] >= limits, shape)
            excused = np.take_along_axis(elsewhere, at, 1)
        sizes, thresholds = np.nonzero(hit)
        which = at[hit]
        again = taken[sizes, thresholds, which] & ~difficult[which]
        found[answer, sizes, thresholds] = np.where(
            excused[hit], IGNORED, np.where(again, WRONG, RIGHT)
        )
        taken[sizes, thresholds, which] = True
    return found, true


def at_half(evidence: Evidence) -> Evidence:
    """Evidence for what is measured at an overlap of 0.5, of all sizes: much less to sum up.

    Other overlaps and sizes have nothing in it.
    """
    outcome = np.full_like(evidence["object_outcome"], IGNORED)
    outcome[:, 0, 0] = evidence["object_outcome"][:, 0, 0]
    return {**evidence, "object_outcome": outcome, "object_score": evidence["object_score"].copy()}


class Ranked:
    """Evidence by class and falling score, ready for any weighting of its tiles.

    A curve is one class at one size and threshold; arrays of curves are (sizes, thresholds,
    classes). classes: all that there is evidence of, ascending.
    """

    def __init__(self, evidence: Evidence) -> None:
        score, label = evidence["object_score"], evidence["object_class"]
        tile, outcome = evidence["object_tile"], evidence["object_outcome"]
        self.tiles = len(evidence["objects"])
        self.classes, number = np.unique(label, return_inverse=True)
        self.shape = (len(SIZES), len(THRESHOLDS), len(self.classes))
        is_true = np.isnan(score)
        ours = np.flatnonzero(~is_true)
        ours = ours[np.lexsort((tile[ours], -score[ours], number[ours]))]
        self.score, self.tile, number_of_ours = score[ours], tile[ours], number[ours]
        # Where each class begins: sums up to there are taken off.
        start = np.searchsorted(number_of_ours, np.arange(len(self.classes)))
        settled = outcome[ours].transpose(1, 2, 0).reshape(len(SIZES) * len(THRESHOLDS), len(ours))
        # Many curves count the same answers: each distinct row is summed once.
        self._counts, self._row = _distinct(settled != IGNORED)
        # Right answers alone move recall; precision matters at these.
        curve, self._at = np.nonzero(settled == RIGHT)
        self._of_row = self._row[curve]
        self._start = start[number_of_ours[self._at]]
        self._curve = curve * len(self.classes) + number_of_ours[self._at]
        first = np.ones(len(curve), np.bool_)
        first[1:] = self._curve[1:] != self._curve[:-1]
        self._first = first
        self._begin = np.flatnonzero(first)
        self._segment = np.cumsum(first) - 1
        truth = np.flatnonzero(is_true)
        # True objects a tile and class has to be found, at each size.
        self._wanted_tile, self._wanted_class = tile[truth], number[truth]
        self._wanted = outcome[truth, :, 0] == RIGHT

    def curves(self, weights: NDArray[np.int64] | None = None) -> "Curves":
        """What the weighted tiles say. weights: (tiles,), how often each counts; None: once."""
        weight = np.ones(self.tiles) if weights is None else np.asarray(weights, np.float64)
        own = weight[self.tile]
        sums = np.zeros((len(self._counts), len(own) + 1))
        np.cumsum(self._counts * own, axis=1, out=sums[:, 1:])
        answers = sums[self._of_row, self._at + 1] - sums[self._of_row, self._start]
        gain = own[self._at]
        right = np.cumsum(gain)
        if len(right):
            before = (right - gain)[self._begin]
            right = right - before[self._segment]
        classes = len(self.classes)
        wanted = np.stack(
            [
                np.bincount(
                    self._wanted_class,
                    weight[self._wanted_tile] * self._wanted[:, size],
                    minlength=classes,
                )
                for size in range(len(SIZES))
            ]
        ).reshape(len(SIZES), 1, classes)
        every = np.broadcast_to(wanted.astype(np.float64), self.shape)
        return Curves(self, every, gain, right, answers)


@dataclass
class Curves:
    """Precision and recall at each right answer, curve by curve.

    wanted: objects to be found (sizes, thresholds, classes). gain: weight of a right answer;
    right and answers: sums of weights up to it.
    """

    ranked: Ranked
    wanted: Floats
    gain: Floats
    right: Floats
    answers: Floats

    def average_precision(self, style: Style) -> Floats:
        """(sizes, thresholds, classes); NaN where there is nothing to be found.

        voc07: the mean of the best precision at or beyond 11 recalls. coco: at 101. area: the
        whole area below.
        """
        ranked, shape = self.ranked, self.ranked.shape
        wanted = self.wanted.reshape(-1)[ranked._curve]
        precision = self.right / np.maximum(self.answers, 1e-9)
        # The best from here on, curve by curve: later curves lie 2 higher than those before.
        lifted = (
            precision[::-1] + 2.0 * ranked._segment.max(initial=0) - 2.0 * (ranked._segment[::-1])
        )
        lift = 2.0 * (ranked._segment.max(initial=0) - ranked._segment)
        best = np.maximum.accumulate(lifted)[::-1] - lift
        # Wanted by nobody, found all the same: a weighting without these objects' tiles.
        some = np.maximum(wanted, 1e-9)
        recall, before = self.right / some, (self.right - self.gain) / some
        if style == "area":
            width = recall - before
        else:
            grid = GRIDS[style]
            passed = np.searchsorted(grid, recall, side="right")
            earlier = np.searchsorted(grid, before, side="right")
            earlier[ranked._first] = 0  # the recall of 0 is passed by the first
            width = (passed - earlier) / len(grid)
        total = np.bincount(ranked._curve, width * best, minlength=int(np.prod(shape)))
        return np.where(self.wanted > 0, total.reshape(shape), np.nan)

    def best_f1(self) -> tuple[Floats, Floats]:
        """The best F1 of each class at an overlap of 0.5, and the score that gives it: (classes,).

        NaN where there is nothing to be found or nothing was.
        """
        ranked = self.ranked
        classes = len(ranked.classes)
        best, score = np.full(classes, np.nan), np.full(classes, np.nan)
        own = ranked._curve < classes  # of all sizes, the lowest threshold
        wanted = self.wanted[0, 0]
        f1 = 2 * self.right[own] / np.maximum(wanted[ranked._curve[own]] + self.answers[own], 1e-9)
        for number in np.flatnonzero(wanted > 0):
            mine = np.flatnonzero(ranked._curve[own] == number)
            if len(mine):
                top = mine[f1[mine].argmax()]
                best[number], score[number] = f1[top], ranked.score[ranked._at[own][top]]
        return best, score


def mean(values: Floats) -> float:
    """Over the classes that have something to be found; NaN where none has."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _distinct(rows: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The rows that differ, and which of them each is."""
    number: dict[bytes, int] = {}
    which = [number.setdefault(np.packbits(row).tobytes(), len(number)) for row in rows]
    first = [which.index(i) for i in range(len(number))]
    return rows[first], np.array(which, np.int64)


def ranked(evidence: Evidence) -> Ranked:
    """`Ranked` of evidence; that of the last one asked for is kept, for a bootstrap's draws."""
    global _last
    if _last is None or _last[0]() is not evidence["object_score"]:
        _last = weakref.ref(evidence["object_score"]), Ranked(evidence)
    return _last[1]


_last: tuple[Callable[[], NDArray[Any] | None], Ranked] | None = None
