import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from ringmo.evaluation import histogram
from ringmo.evaluation.metrics import (
    Interval,
    Measure,
    average_precision,
    confusion_matrix,
    drawn,
    draws,
    interval,
    mean_drawn,
    over_trainings,
)
from ringmo.tasks import find
from ringmo.tasks.base import Sample


def test_measures_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, 300)
    truth[truth == 4] = 3  # class 4 has no tiles but is predicted
    predicted = np.where(random.random(300) < 0.6, truth, random.integers(0, 5, 300))
    predicted[predicted == 1] = 0  # class 1 is never predicted
    matrix = confusion_matrix(truth, predicted, 6)
    assert np.array_equal(matrix, reference.confusion_matrix(truth, predicted, labels=range(6)))


def share(values: np.ndarray) -> Measure:
    """The mean over tiles, as any figure is given to the bootstrap."""

    def measure(weights: np.ndarray | None) -> dict[str, float]:
        return {"share": float(np.average(values, weights=weights))}

    return measure


def of_share(values: np.ndarray, places: list[str], samples: int) -> Interval:
    return interval(drawn(share(values), places, samples)["share"])


def test_interval_of_independent_tiles_is_the_binomial_one() -> None:
    values = (np.arange(400) % 4 > 0).astype(float)
    found = of_share(values, [str(i) for i in range(400)], 2000)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - half, abs=0.01)
    assert found.high == pytest.approx(0.75 + half, abs=0.01)


def test_copies_of_a_place_make_nothing_surer() -> None:
    random = np.random.default_rng(1)
    values = (random.random(40) < 0.7).astype(float)
    alone = of_share(values, [str(i) for i in range(40)], 1000)
    copied = of_share(np.repeat(values, 10), [str(i // 10) for i in range(400)], 1000)
    assert copied.value == pytest.approx(alone.value)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, abs=1e-9)


def test_one_place_says_nothing_of_how_sure_a_figure_is() -> None:
    def measure(weights: object) -> dict[str, float]:
        return {"figure": 0.8}

    found = interval(drawn(measure, ["strip"] * 8, 100)["figure"])
    assert found.value == 0.8 and np.isnan([found.low, found.high]).all()
    of_mean = interval(mean_drawn(np.array([0.0, 1.0]), ["strip", "strip"], 100))
    assert of_mean.value == 0.5 and np.isnan([of_mean.low, of_mean.high]).all()


def test_whole_places_are_drawn_as_many_as_there_are() -> None:
    places = ["a", "b", "a", "c", "b", "b"]
    seen = set()
    for weights in draws(places, 200):
        a, b, c = weights[0], weights[1], weights[3]
        assert weights.tolist() == [a, b, a, c, b, b] and a + b + c == 3
        seen.add((a, b, c))
    assert len(seen) == 10  # every way to draw three of three
    first, again = (np.stack(list(draws(places, 5, seed=4))) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.stack(list(draws(places, 5, seed=5))))


def test_the_mean_at_once_is_the_mean_draw_by_draw() -> None:
    random = np.random.default_rng(3)
    values, places = random.random(60), [str(i % 23) for i in range(60)]
    slow = drawn(share(values), places, 50, seed=7)["share"]
    assert mean_drawn(values, places, 50, seed=7) == pytest.approx(slow, abs=1e-12)


def test_paired_difference_is_much_surer_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    hard = random.random(500)
    first, second = (hard < 0.70).astype(float), (hard < 0.67).astype(float)
    places = [str(i) for i in range(500)]
    one, other = (mean_drawn(values, places, 1000) for values in (first, second))
    paired = interval(one - other)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.low > 0  # never worse on any tile
    assert interval(one).low < interval(other).high  # which the two alone do not show


def test_draws_without_a_number_are_left_out() -> None:
    """The accuracy on one class, of which some draws have no tile."""
    right = np.array([1.0, 0.0, 1.0, 1.0])
    of_class = np.array([1, 1, 0, 0])

    def measure(weights: np.ndarray | None) -> dict[str, float]:
        counted = of_class * (1 if weights is None else weights)
        whole = float((counted * right).sum() / counted.sum()) if counted.sum() else float("nan")
        return {"accuracy": whole, "nothing": float("nan")}

    values = drawn(measure, ["a", "b", "c", "d"], 500)
    share_without = np.isnan(values["accuracy"]).mean()
    assert share_without == pytest.approx(1 / 16, abs=0.03)  # (2 / 4) ** 4
    found = interval(values["accuracy"])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert all(np.isnan([(none := interval(values["nothing"])).value, none.low, none.high]))


def test_same_values_same_interval_and_none_is_no_number() -> None:
    values, places = np.array([0.0, 1.0, 1.0]), ["a", "b", "c"]
    assert of_share(values, places, 100) == of_share(values, places, 100)
    assert np.isnan(mean_drawn(np.array([]), [], 100)).all()
    assert np.isnan(interval(drawn(lambda _: {"share": float("nan")}, [], 100)["share"]).value)


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
    mean = mean_drawn(right.mean(0), places, 2000)
    each = [mean_drawn(row, places, 2000) for row in right]
    single, both = interval(mean), interval(over_trainings(each))
    assert both.value == pytest.approx(right.mean()) == single.value
    assert both.low < single.low - 0.02 and both.high > single.high + 0.02
    assert over_trainings([mean] * 3) == pytest.approx(mean)
    assert over_trainings(each[:1]) == pytest.approx(each[0])


def test_average_precision_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = (random.random(200) < 0.3).astype(float)
    scores = (truth * 0.5 + random.random(200)).astype(np.float32)
    weights = random.integers(0, 3, 200).astype(float)
    wanted = reference.average_precision_score(truth, scores, sample_weight=weights)
    assert average_precision(truth, scores, weights) == pytest.approx(wanted)
    assert np.isnan(average_precision(truth * 0, scores, weights))


def test_figures_of_scenes_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, 300)
    truth[truth == 4] = 3  # class 4 has no tiles but is predicted
    scores = random.random((300, 5)).astype(np.float32)
    scores[np.arange(300), truth] += 0.5
    scores[:, 1] = 0  # class 1 is never predicted
    scores /= scores.sum(1, keepdims=True)
    sample = Sample({}, np.arange(300), labels=torch.eye(5)[torch.from_numpy(truth)])
    evidence = find("scene").evidence(torch.from_numpy(scores), sample)
    for weights in (None, random.integers(0, 4, 300)):
        figures = find("scene").figures(evidence, list("abcde"), weights)
        predicted, how = scores.argmax(1), {"sample_weight": weights}
        accuracy = reference.accuracy_score(truth, predicted, **how)
        assert figures.whole["accuracy"] == pytest.approx(accuracy)
        precision, recall, f1, support = reference.precision_recall_fscore_support(
            truth, predicted, labels=range(5), zero_division=0, **how
        )
        assert [row["class"] for row in figures.classes] == list("abcd")
        for name, wanted in (
            ("precision", precision),
            ("recall", recall),
            ("f1", f1),
            ("tiles", support if weights is None else np.bincount(truth, weights)),
        ):
            assert [row[name] for row in figures.classes] == pytest.approx(list(wanted[:4]))
        assert figures.whole["mean_f1"] == pytest.approx(f1[:4].mean())


def test_figures_of_several_classes_a_scene_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(1)
    truth = (random.random((200, 4)) < 0.4).astype(np.float32)
    scores = (0.6 * random.random((200, 4)) + 0.4 * truth).astype(np.float32)
    sample = Sample({}, np.arange(200), labels=torch.from_numpy(truth))
    evidence = find("scene").evidence(torch.from_numpy(scores), sample)
    assert "predicted" not in evidence
    for weights in (None, random.integers(0, 4, 200)):
        whole = find("scene").figures(evidence, list("abcd"), weights).whole
        how = {"sample_weight": weights}
        said = scores >= 0.5
        f1 = reference.f1_score(truth, said, average="macro", **how)
        assert whole["mean_f1"] == pytest.approx(f1)
        mean = reference.average_precision_score(truth, scores, average="macro", **how)
        assert whole["map"] == pytest.approx(mean)
        jaccard = reference.jaccard_score(truth, said, average="samples", zero_division=1, **how)
        assert whole["accuracy"] == pytest.approx(jaccard)
