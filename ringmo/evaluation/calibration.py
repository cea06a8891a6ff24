"""Calibration: whether a model that is 80 % sure is right 8 times in 10.

Answers are put into bins of equal width by how sure the model was. The expected calibration error
is the difference between how sure and how right, averaged over the answers (Naeini et al., AAAI
2015; with 15 bins Guo et al., ICML 2017).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringmo.evaluation.average_precision import IGNORED
from ringmo.tasks.base import Evidence

BINS = 15  # from 0 to 1


@dataclass(frozen=True)
class Reliability:
    """Answers by how sure the model was, one value a bin, float64 (BINS,).

    count: how many. confidence, right: sums over them. of: what an answer is: tiles, pixels …
    """

    count: NDArray[np.float64]
    confidence: NDArray[np.float64]
    right: NDArray[np.float64]
    of: str

    @property
    def error(self) -> float:
        """The expected calibration error, a share; NaN of no answers."""
        if not self.count.sum():
            return float("nan")
        return float(np.abs(self.confidence - self.right).sum() / self.count.sum())


def reliability(evidence: Evidence, weights: NDArray[np.int64] | None = None) -> Reliability | None:
    """What the evidence says of how sure the model was; None where it says nothing (heights).

    By which names are there: `confidence` and `right` of tiles (one class each), `scores` and
    `truth` of tiles (several classes: whether each is there), `reliability_…` of pixels, already
    in bins, `object_score` and `object_right` of objects (answers; the truth has NaN there).

    Args:
        weights: (tiles,), how often each counts; None: once.
    """
    if "reliability_count" in evidence:
        sums = [
            evidence[f"reliability_{name}"].astype(np.float64)
            for name in ("count", "confidence", "right")
        ]
        count, confidence, hits = (of.sum(0) if weights is None else weights @ of for of in sums)
        return Reliability(count, confidence, hits, "pixels")
    tile: NDArray[np.int64] | None = None
    if "object_score" in evidence and "object_right" in evidence:
        sure, right = evidence["object_score"], evidence["object_right"]
        answers = ~np.isnan(sure)
        if "object_outcome" in evidence:  # what found a difficult object is neither right nor wrong
            answers &= evidence["object_outcome"][:, 0, 0] != IGNORED
        tile, of = evidence["object_tile"][answers], "objects"
        sure, right = sure[answers], right[answers]
    elif "confidence" in evidence and "right" in evidence:
        sure, right, of = evidence["confidence"], evidence["right"], "tiles"
        tile = np.arange(len(sure))
    elif "scores" in evidence and "truth" in evidence:
        sure = evidence["scores"]
        # A class that the model does not know was never answered.
        right, of = evidence["truth"][:, : sure.shape[1]].ravel(), "tiles' classes"
        tile = np.repeat(np.arange(len(sure)), sure.shape[1])
        sure = sure.ravel()
    else:
        return None
    weight = np.ones(len(sure)) if weights is None else weights[tile].astype(np.float64)
    bins = np.clip((sure * BINS).astype(np.int64), 0, BINS - 1)
    # Of no answers at all bincount makes integers.
    count, confidence, hits = (
        np.bincount(bins, weight * of_each, BINS).astype(np.float64) for of_each in (1, sure, right)
    )
    return Reliability(count, confidence, hits, of)
