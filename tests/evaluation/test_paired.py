"""Whether one model is worse than another on the same tiles, and how sure that is said to be."""

from typing import Any

import numpy as np
import pytest

from benchmarks import gate as injected
from ringmo import tasks
from ringmo.evaluation import average_precision, metrics, paired
from ringmo.evaluation.paired import Answers, Tiles, chance_of, compared, lower_bound


def test_the_bound_of_few_places_is_students_and_not_the_normals() -> None:
    """Of 1,000 samples of six values with mean 0 one in twenty lies above 0 by its bound."""
    random, wrong, plain = np.random.default_rng(0), 0, 0
    names = [str(i) for i in range(6)]
    for _ in range(1_000):
        drawn = metrics.mean_drawn(random.normal(0, 1, 6), names, 300)
        wrong += lower_bound(drawn, 6) > 0
        plain += metrics.lower_bound(drawn) > 0
    assert wrong / 1_000 == pytest.approx(0.05, abs=0.02)
    assert plain > 1.5 * wrong


def test_a_fall_of_few_places_is_never_sure() -> None:
    fallen = np.full(1_001, -1.0)  # every draw says so
    assert chance_of(fallen, 3) == 1 / 8 and chance_of(fallen, 20) == 1 / 1_001
    assert chance_of(-fallen, 20) == chance_of(np.zeros(1_001), 20) == 1
    # As many fell as a coin would say: about what the sign test has.
    values = np.zeros(200)
    values[:6] = -1
    drawn = metrics.mean_drawn(values, [str(i) for i in range(200)], 4_000)
    assert chance_of(drawn, 200) == pytest.approx(0.5**6, abs=0.01)


def test_scenes_drawn_at_once_are_scenes_drawn_one_by_one() -> None:
    kind, split = tasks.find("scene"), injected.Split("", "scene", 300, 40, 7)
    answers, _, tiles = split.pair(0.0, np.random.default_rng(0))
    answers = Answers(answers.evidence, [*answers.classes, "of no tile"])

    def measure(weights: Any) -> dict[str, float]:
        found = kind.figures(answers.evidence, answers.classes, weights)
        return {"": found.whole["accuracy"]} | {
            f"class {row['class']}": row["f1"] for row in found.classes
        }

    slow = metrics.drawn(measure, tiles.places, 40)
    fast = paired._of_scenes(answers, tiles.places, 40)
    assert fast.keys() == slow.keys()
    for name in slow:
        np.testing.assert_allclose(fast[name], slow[name], atol=1e-12)


def test_objects_at_one_overlap_have_the_figures_that_they_had() -> None:
    kind, split = tasks.find("detection"), injected.Split("", "detection", 12, 12, 3)
    answers, _, _ = split.pair(0.0, np.random.default_rng(0))
    lean = average_precision.at_half(answers.evidence)
    for weights in (None, np.random.default_rng(1).poisson(1, 12)):
        whole, half = (kind.figures(of, split.names, weights) for of in (answers.evidence, lean))
        assert half.whole["map50"] == pytest.approx(whole.whole["map50"])
        for lean_row, row in zip(half.classes, whole.classes, strict=True):
            assert lean_row["ap50"] == pytest.approx(row["ap50"])


@pytest.mark.parametrize("task", ["scene", "segmentation", "detection"])
def test_present_classes_are_those_that_figures_have_rows_for(task: str) -> None:
    split = injected.Split("", task, 6, 6, 9)
    answers, _, _ = split.pair(0.0, np.random.default_rng(3))
    evidence = answers.evidence
    for tile in range(6):
        weights = (np.arange(6) == tile).astype(np.int64)
        rows = tasks.find(task).figures(evidence, split.names, weights).classes
        there = {name for name, where in paired.present(answers) if where[tile]}
        assert there == {row["class"] for row in rows}


def test_a_slice_that_fell_is_found_and_one_of_few_places_is_not_tested() -> None:
    split = injected.Split("", "scene", 400, 400, 4)
    champion, _, tiles = split.pair(0.0, np.random.default_rng(0))
    right = champion.evidence["right"].copy()
    sensor = np.where(np.arange(400) < 60, "s1", "rgb")
    right[:60] = False
    evidence = champion.evidence | {"right": right}
    groups = {"sensor": sensor.tolist(), "source": ["a"] * 397 + ["b"] * 3}
    found = compared(
        tasks.find("scene"), "accuracy", Answers(evidence, split.names), champion,
        Tiles(tiles.places, groups), 400,
    )  # fmt: skip
    assert "sensor s1" in {fall.what for fall in found.falls if fall.surely}
    assert "sensor rgb" not in {fall.what for fall in found.falls if fall.surely}
    assert {fall.what for fall in found.falls} >= {"sensor rgb", "source a", "class c0"}
    assert "source b" not in {fall.what for fall in found.falls} and found.untested == 1


def test_tiles_are_drawn_where_places_are_too_few() -> None:
    assert Tiles(["a"] * 8, {}).drawn == list("01234567")
    many = Tiles(list("abcdeabc"), {})
    assert many.drawn is many.places
