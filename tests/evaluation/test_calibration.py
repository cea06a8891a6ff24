"""How sure and how right: against torchmetrics, and against what a hand computes."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from ringmo.evaluation.calibration import BINS, reliability
from ringmo.tasks.base import Evidence


def scenes(count: int = 200) -> tuple[Evidence, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    scores = (3 * torch.randn(count, 5)).softmax(1)
    truth = torch.where(torch.rand(count) < 0.5, scores.argmax(1), torch.randint(0, 5, (count,)))
    evidence: Evidence = {
        "confidence": scores.max(1).values.numpy(),
        "right": (scores.argmax(1) == truth).numpy(),
    }
    return evidence, scores, truth


def test_error_of_scenes_agrees_with_torchmetrics() -> None:
    evidence, scores, truth = scenes()
    found = reliability(evidence)
    assert found is not None and found.of == "tiles"
    wanted = MulticlassCalibrationError(num_classes=5, n_bins=BINS)(scores, truth).item()
    assert 0.02 < found.error == pytest.approx(wanted, abs=1e-6)
    assert found.count.sum() == 200


def test_a_tile_counted_twice_is_a_tile_that_is_there_twice() -> None:
    evidence, *_ = scenes()
    weights = np.random.default_rng(0).integers(0, 3, 200)
    copied = {name: np.repeat(of, weights) for name, of in evidence.items()}
    weighted, repeated = reliability(evidence, weights), reliability(copied)
    assert weighted is not None and repeated is not None
    assert weighted.error == pytest.approx(repeated.error)


def test_pixels_come_in_bins_and_objects_by_their_tile() -> None:
    def bins(*values: float) -> np.ndarray:
        return np.array([values + (0.0,) * (BINS - len(values))])

    pixels = {
        "reliability_count": np.concatenate((bins(0, 10), bins(0, 30))),
        "reliability_confidence": np.concatenate((bins(0, 1), bins(0, 3))),
        "reliability_right": np.concatenate((bins(0, 1), bins(0, 7))),
    }
    found = reliability(pixels)
    assert found is not None and found.of == "pixels"
    assert found.error == pytest.approx(4 / 40)
    only_first = reliability(pixels, np.array([1, 0]))
    assert only_first is not None and only_first.error == 0

    # Two answers of the first tile, one of the second, and an object that has no answer.
    objects = {
        "object_tile": np.array([0, 0, 1, 1]),
        "object_score": np.array([0.9, 0.6, 0.8, np.nan]),
        "object_right": np.array([1, 0, 1, 0]),
    }
    found = reliability(objects)
    assert found is not None and (found.of, found.count.sum()) == ("objects", 3)
    assert found.error == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    # What found a difficult object says nothing.
    outcome = np.array([1, 0, 2, 1], np.int8)[:, None, None]
    found = reliability({**objects, "object_outcome": outcome})
    assert found is not None and found.error == pytest.approx((0.1 + 0.6) / 2)
    only_second = reliability(objects, np.array([0, 5]))
    assert only_second is not None and only_second.error == pytest.approx(0.2)


def test_several_classes_a_tile_are_answers_each() -> None:
    evidence = {
        "scores": np.array([[0.9, 0.1], [0.7, 0.7]]),
        "truth": np.array([[1, 0, 1], [1, 0, 0]]),  # the model does not know the third class
    }
    found = reliability(evidence)
    assert found is not None and found.count.sum() == 4
    # 0.9 right, 0.1 not, and of two answers of 0.7 one is right: 1.4 - 1.
    assert found.error == pytest.approx((0.1 + 0.1 + 0.4) / 4)


def test_heights_have_no_confidence_and_nothing_no_error() -> None:
    assert reliability({"height_error": np.ones(3)}) is None
    found = reliability({"confidence": np.zeros(0), "right": np.zeros(0, bool)})
    assert found is not None and np.isnan(found.error)
