"""How often the gate is right: models of known worth, injected. More of it: benchmarks/gate.py."""

import numpy as np
import pytest

from benchmarks import gate as injected
from benchmarks.gate import MARGIN, SPLITS, Split, hardness, passes
from ringmo import tasks
from ringmo.config import Gate
from ringmo.evaluation.paired import Answers, Tiles
from ringmo.registry import rules

AID, LARGE = SPLITS[0], Split("scene, large", "scene", 6_000, 6_000, 10)


@pytest.mark.parametrize("split", [AID, SPLITS[3], SPLITS[5]], ids=lambda split: split.task)
def test_worse_models_are_refused_at_the_size_of_real_splits(split: Split) -> None:
    assert passes(split, -2 * MARGIN, 12, 200)[0] <= 1 / 12


def test_at_the_margin_one_in_twenty_passes() -> None:
    """60 models as much worse as is allowed: more than 8 pass once in a hundred such tests."""
    small = Split("", "scene", 720, 720, 2)
    assert passes(small, -MARGIN, 60, 200)[0] <= 8 / 60


def test_better_models_pass_and_on_a_large_split_equal_ones_too() -> None:
    assert passes(AID, 2 * MARGIN, 12, 200)[0] >= 11 / 12
    assert passes(LARGE, 0.0, 12, 200)[0] >= 11 / 12


def test_few_equal_models_are_said_to_have_lost_a_class() -> None:
    """Of 60 with 10 classes each; at one in twenty more than 8 are blamed once in a hundred."""
    assert passes(Split("", "scene", 400, 400, 10), 0.0, 60, 200)[1] <= 8 / 60


def test_losses_of_two_points_each_end_with_the_margin() -> None:
    """Ten candidates, each two points worse than the champion then, on 6,000 scenes."""
    rule, kind = Gate(max_drop=MARGIN), tasks.find("scene")
    tiles = Tiles([str(i) for i in range(LARGE.tiles)], {})
    place = np.arange(LARGE.tiles)

    def drifted(remembering: bool) -> float:
        random = np.random.default_rng(5)
        truth = random.integers(0, 2, LARGE.tiles)
        right = random.random(LARGE.tiles) < hardness(random, place)
        first, champions = right.mean(), {"scene/1": float(right.mean())}
        for number in range(2, 12):
            candidate = right.copy()  # loses 300 tiles and wins 180: two points of 6,000
            candidate[random.choice(np.flatnonzero(right), 300, replace=False)] = False
            candidate[random.choice(np.flatnonzero(~right), 180, replace=False)] = True
            both = [answers(truth, of) for of in (candidate, right)]
            names = f"scene/{number}", next(reversed(champions))
            value = float(candidate.mean())
            checks = rules.against_champion(
                rule, kind, "accuracy", both[0], both[1], tiles, 200, names
            )[:1]
            if remembering:
                best = rules.against_best(rule, kind, "accuracy", value, champions, [], names)
                checks += [best] if best else []
            if all(check["ok"] for check in checks):
                right = candidate
                champions[names[0]] = value
        return float(first - right.mean())

    assert drifted(remembering=True) <= MARGIN
    assert drifted(remembering=False) == pytest.approx(0.2)


def answers(truth: np.ndarray, right: np.ndarray) -> Answers:
    said = np.where(right, truth, 1 - truth)
    scores = np.eye(2, dtype=np.float32)[said]
    return Answers(
        {
            "truth": np.eye(2, dtype=np.int64)[truth],
            "scores": scores,
            "label": truth,
            "predicted": said,
            "right": right,
            "confidence": scores.max(1),
        },
        ["a", "b"],
    )


def test_injected_models_are_as_much_better_as_is_said() -> None:
    for task, classes in (("segmentation", 6), ("detection", 5)):
        net = injected.calibrated(task, classes, -MARGIN)
        split, kind = Split("", task, 3_000, 3_000, classes), tasks.find(task)
        pair = injected._DRAW[task](split, np.arange(3_000), net, np.random.default_rng(9))
        lean = [injected.average_precision.at_half(e) if task == "detection" else e for e in pair]
        worse, as_was = (kind.figures(e, split.names).whole[kind.metric] for e in lean)
        assert worse - as_was == pytest.approx(-MARGIN, abs=0.006)
