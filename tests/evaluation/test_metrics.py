import numpy as np
import pytest
from sklearn import metrics as reference

from ringmo.evaluation import histogram
from ringmo.evaluation.metrics import bootstrap_mean, confusion_matrix, per_class


def test_measures_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, 300)
    truth[truth == 4] = 3  # class 4 has no tiles but is predicted
    predicted = np.where(random.random(300) < 0.6, truth, random.integers(0, 5, 300))
    predicted[predicted == 1] = 0  # class 1 is never predicted
    matrix = confusion_matrix(truth, predicted, 6)
    assert np.array_equal(matrix, reference.confusion_matrix(truth, predicted, labels=range(6)))
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        truth, predicted, labels=range(6), zero_division=0
    )
    ours = per_class(matrix)
    assert np.allclose(ours.precision, precision)
    assert np.allclose(ours.recall, recall)
    assert np.allclose(ours.f1, f1)
    assert np.array_equal(ours.support, support)
    assert ours.mean_f1 == pytest.approx(f1[support > 0].mean())


def test_interval_of_independent_tiles_is_the_binomial_one() -> None:
    values = (np.arange(400) % 4 > 0).astype(float)
    interval = bootstrap_mean(values, [str(i) for i in range(400)], 2000)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert interval.value == 0.75
    assert interval.low == pytest.approx(0.75 - half, abs=0.01)
    assert interval.high == pytest.approx(0.75 + half, abs=0.01)


def test_copies_of_a_place_make_nothing_surer() -> None:
    random = np.random.default_rng(1)
    values = (random.random(40) < 0.7).astype(float)
    alone = bootstrap_mean(values, [str(i) for i in range(40)], 1000)
    copied = bootstrap_mean(np.repeat(values, 10), [str(i // 10) for i in range(400)], 1000)
    assert copied.value == pytest.approx(alone.value)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, abs=1e-9)


def test_same_values_same_interval_and_none_is_no_number() -> None:
    values, places = np.array([0.0, 1.0, 1.0]), ["a", "b", "c"]
    assert bootstrap_mean(values, places, 100) == bootstrap_mean(values, places, 100)
    assert np.isnan(bootstrap_mean(np.array([]), [], 100).value)


def test_histograms_tell_colours_and_directions_apart() -> None:
    random = np.random.default_rng(2)

    def tile(kind: int) -> np.ndarray:
        noise = random.integers(0, 40, (32, 32, 3))
        if kind == 0:
            return (noise + np.array([160, 0, 0])).astype(np.uint8)
        stripes = np.broadcast_to(np.arange(32)[:, None, None] % 8 * 20, (32, 32, 3))
        turned = stripes.transpose(1, 0, 2) if kind == 1 else stripes
        return (noise + turned).astype(np.uint8)

    labels = np.arange(90) % 3
    features = np.stack([histogram.describe(tile(kind)) for kind in labels])
    predicted = histogram.fit_predict(features[:60], labels[:60], features[60:])
    assert (predicted == labels[60:]).mean() > 0.9


def test_histograms_take_any_number_of_bands() -> None:
    for bands in (1, 2, 4):
        image = np.full((16, 16, bands), 255, np.uint8)
        assert np.isfinite(histogram.describe(image)).all()


def test_several_trainings_widen_the_interval_by_their_spread() -> None:
    random = np.random.default_rng(0)
    right = (random.random((3, 400)) < np.array([[0.5], [0.6], [0.7]])).astype(float)
    places = [str(i) for i in range(400)]
    alike = np.repeat(right.mean(0, keepdims=True), 3, axis=0)
    single = bootstrap_mean(right.mean(0), places, 2000)
    both = bootstrap_mean(right, places, 2000)
    assert both.value == pytest.approx(right.mean()) == single.value
    assert both.low < single.low - 0.02 and both.high > single.high + 0.02
    same = bootstrap_mean(alike, places, 2000)
    assert (same.low, same.high) == pytest.approx((single.low, single.high), abs=0.01)
    assert bootstrap_mean(right[:1], places, 200) == bootstrap_mean(right[0], places, 200)
