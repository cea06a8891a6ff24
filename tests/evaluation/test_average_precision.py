import math
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from ringmo.evaluation import average_precision as ap
from ringmo.evaluation.average_precision import Instances
from ringmo.models import rotated
from ringmo.tasks.base import Evidence, joined

Tile = tuple[Instances, Instances, NDArray[np.float64]]


def boxes_tile(
    answers: NDArray[np.float64],
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    truth: NDArray[np.float64],
    true_labels: NDArray[np.int64],
    difficult: NDArray[np.bool_] | None = None,
) -> Tile:
    """A tile of upright boxes (n, 4)."""

    def areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        return (boxes[:, 2:] - boxes[:, :2]).prod(1)

    overlap = box_iou(torch.from_numpy(answers), torch.from_numpy(truth)).numpy()
    ours = Instances(labels, areas(answers), scores)
    return ours, Instances(true_labels, areas(truth), difficult=difficult), overlap


def random_tiles(count: int, classes: int, seed: int = 0, answers: float = 1.5) -> list[Tile]:
    """Tiles of true boxes of all sizes, found more or less well, missed, made up, confused."""
    dice = np.random.default_rng(seed)
    tiles = []
    for _ in range(count):
        many = int(dice.integers(0, 9))
        corner = dice.uniform(0, 300, (many, 2))
        truth = np.concatenate([corner, corner + np.exp(dice.uniform(2, 5.3, (many, 2)))], 1).round(
            2
        )
        true_labels = dice.integers(0, classes, many)
        picked = dice.integers(0, max(many, 1), int(many * answers))
        near = truth[picked] + dice.normal(0, 0.06, (len(picked), 4)) * np.tile(
            truth[picked, 2:] - truth[picked, :2], 2
        )
        labels = np.where(
            dice.random(len(picked)) < 0.9,
            true_labels[picked],
            dice.integers(0, classes, len(picked)),
        )
        false = dice.uniform(0, 300, (int(dice.integers(0, 4)), 2))
        false = np.concatenate([false, false + dice.uniform(5, 150, (len(false), 2))], 1)
        near = np.concatenate([near, false])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        labels = np.concatenate([labels, dice.integers(0, classes, len(false))])
        scores = dice.permutation(1000)[: len(near)] / 1000  # no two alike on a tile
        tiles.append(boxes_tile(near, scores, labels, truth, true_labels))
    return tiles


@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_is_that_of_an_independent_library(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    dice = np.random.default_rng(seed)
    classes, tiles = 4, []
    dataset: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    dataset["categories"] = [{"id": c + 1, "name": str(c)} for c in range(classes)]
    found = []
    for image in range(60):
        many = int(dice.integers(0, 9))
        corner = dice.uniform(0, 300, (many, 2))
        side = np.exp(dice.uniform(2, 5.3, (many, 2)))
        labels = dice.integers(0, classes - 1, many)  # one class has no true object
        picked = dice.integers(0, max(many, 1), many * 2)
        shift = dice.normal(0, 0.08, (len(picked), 4)) * np.tile(side[picked], 2)
        own = np.concatenate([corner[picked], side[picked]], 1) + shift
        lost = np.concatenate([dice.uniform(0, 300, (3, 2)), dice.uniform(5, 150, (3, 2))], 1)
        own = np.concatenate([own, lost])
        own[:, 2:] = np.maximum(own[:, 2:], 1)
        says = np.concatenate([labels[picked], dice.integers(0, classes, 3)])
        scores = dice.integers(1, 60, len(own)) / 60  # many alike
        dataset["images"].append({"id": image + 1, "width": 600, "height": 600})
        for n in range(many):
            box = [*corner[n].tolist(), *side[n].tolist()]
            dataset["annotations"].append(
                {
                    "id": len(dataset["annotations"]) + 1,
                    "image_id": image + 1,
                    "category_id": int(labels[n]) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        for n in range(len(own)):
            found.append(
                {
                    "image_id": image + 1,
                    "category_id": int(says[n]) + 1,
                    "bbox": own[n].tolist(),
                    "score": float(scores[n]),
                }
            )
        spans = [
            np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1)
            for b in (own, np.concatenate([corner, side], 1))
        ]
        tiles.append(boxes_tile(spans[0], scores, says, spans[1], labels))
    truth = COCO(dataset)
    theirs = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    theirs.run()
    ours = ap.Ranked(ap.evidence(tiles, "coco")).curves().average_precision("coco")
    wanted = theirs.stats[:6]  # AP, AP50, AP75, small, medium, large
    got = [
        ap.mean(ours[0]),
        ap.mean(ours[0, 0]),
        ap.mean(ours[0, 5]),
        *(ap.mean(ours[size]) for size in (1, 2, 3)),
    ]
    assert got == pytest.approx(list(wanted), abs=1e-9)
    assert 0.2 < got[0] < 0.9


def one_class(outcomes: str, wanted: int) -> ap.Curves:
    """Answers by falling score, R right and W wrong, on a tile each; `wanted` objects in all."""
    square = np.array([[0.0, 0, 10, 10]])
    away = square + 50
    tiles = []
    for n, letter in enumerate(outcomes):
        score, label = np.array([1 - n / 100]), np.zeros(1, np.int64)
        true = square if letter == "R" else square[:0]
        answer = square if letter == "R" else away
        tiles.append(boxes_tile(answer, score, label, true, label[: len(true)]))
    missed = wanted - outcomes.count("R")
    none = np.zeros(0, np.int64)
    every = np.repeat(square, missed, 0)
    tiles.append(boxes_tile(square[:0], np.zeros(0), none, every, np.zeros(missed, np.int64)))
    return ap.Ranked(ap.evidence(tiles, "voc")).curves()


def test_all_styles_of_a_curve_computed_by_hand() -> None:
    # Precision 1, 1/2, 2/3, 3/4, 3/5 at recall 1/4, 1/4, 2/4, 3/4, 3/4; best from there on: 1,
    # then 3/4.
    curves = one_class("RWRRW", wanted=4)
    area = 1 / 4 * 1 + 2 / 4 * 3 / 4
    assert curves.average_precision("area")[0, 0, 0] == pytest.approx(area)
    eleven = (3 * 1 + 5 * 3 / 4) / 11  # at 0, .1, .2; at .3 to .7; none beyond
    assert curves.average_precision("voc07")[0, 0, 0] == pytest.approx(eleven)
    coco = (26 * 1 + 50 * 3 / 4) / 101  # at 0 to .25; at .26 to .75
    assert curves.average_precision("coco")[0, 0, 0] == pytest.approx(coco)
    f1, score = curves.best_f1()
    assert f1[0] == pytest.approx(2 * 3 / (4 + 4)) and score[0] == pytest.approx(0.97)


def test_perfect_and_empty_answers() -> None:
    for style in ap.GRIDS:
        assert one_class("RRR", 3).average_precision(style)[0, 0, 0] == pytest.approx(1)
        assert one_class("WW", 3).average_precision(style)[0, 0, 0] == 0
        assert one_class("", 3).average_precision(style)[0, 0, 0] == 0
        assert math.isnan(one_class("WW", 0).average_precision(style)[0, 0, 0])


def test_difficult_objects_are_neither_missed_nor_wrong() -> None:
    truth = np.array([[0.0, 0, 40, 40], [100, 100, 140, 140]])
    answers = np.array([[0.0, 0, 40, 40], [2, 0, 40, 40], [100, 100, 140, 140], [200, 0, 240, 40]])
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4, np.int64)
    difficult = np.array([True, False])
    for matching in ("coco", "voc"):
        tile = boxes_tile(answers, scores, labels, truth, labels[:2], difficult)
        made = ap.evidence([tile], matching)
        assert made["objects"].tolist() == [1]
        assert made["object_outcome"][:, 0, 0].tolist() == [2, 2, 1, 0, 2, 1]
        area = ap.Ranked(made).curves().average_precision("area")
        assert area[0, 0, 0] == pytest.approx(1)


def test_a_second_answer_is_wrong_and_voc_looks_only_at_the_nearest() -> None:
    truth = np.array([[0.0, 0, 40, 40], [0, 10, 40, 50]])
    answers = np.array([[0.0, 0, 40, 40], [0, 3, 40, 43]])
    scores, labels = np.array([0.9, 0.8]), np.zeros(2, np.int64)
    tile = boxes_tile(answers, scores, labels, truth, labels)
    # The second overlaps the taken one by 37/43, the free one by 33/47.
    assert ap.outcomes(*tile, "voc")[0][:, 0, 0].tolist() == [1, 0]
    assert ap.outcomes(*tile, "coco")[0][:, 0, 0].tolist() == [1, 1]
    single = boxes_tile(answers, scores, labels, truth[:1], labels[:1])
    assert ap.outcomes(*single, "coco")[0][:, 0, 0].tolist() == [1, 0]
    other_class = boxes_tile(answers, scores, labels, truth, labels + 1)
    assert (ap.outcomes(*other_class, "voc")[0] != ap.RIGHT).all()


def test_rotated_overlap_decides_by_hand() -> None:
    # A square and the same turned by 45 degrees overlap by 1/√2: right up to 0.7.
    square, turned = (
        torch.tensor([[50.0, 50, 20, 20, 0]]),
        torch.tensor([[50.0, 50, 20, 20, 0.7854]]),
    )
    overlap = rotated.pairwise_iou(turned, square).numpy().astype(np.float64)
    label, area = np.zeros(1, np.int64), np.array([400.0])
    ours, _ = ap.outcomes(
        Instances(label, area, np.ones(1)), Instances(label, area), overlap, "voc"
    )
    assert ours[0, 0].tolist() == [1] * 5 + [0] * 5


def repeated(evidence: list[Evidence], times: NDArray[np.int64]) -> Evidence:
    return joined([one for one, count in zip(evidence, times, strict=True) for _ in range(count)])


def test_weights_are_copies_of_tiles() -> None:
    tiles = random_tiles(25, 3)
    each = [ap.evidence([tile], "coco") for tile in tiles]
    whole = ap.Ranked(joined(each))
    dice = np.random.default_rng(5)
    for _ in range(5):
        times = dice.integers(0, 4, len(tiles))
        weighted = whole.curves(times)
        copies = ap.Ranked(repeated(each, times)).curves()
        for style in ap.GRIDS:
            ours, theirs = weighted.average_precision(style), copies.average_precision(style)
            assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True), style
        assert weighted.best_f1()[0] == pytest.approx(copies.best_f1()[0], nan_ok=True)
    none = whole.curves(np.zeros(len(tiles), np.int64))
    assert np.isnan(none.average_precision("coco")).all()
    assert math.isnan(ap.mean(none.average_precision("coco")))


def test_evidence_of_batches_joined_is_evidence_of_all() -> None:
    tiles = random_tiles(9, 3)
    whole = ap.evidence(tiles, "coco")
    parts = joined([ap.evidence(tiles[:4], "coco"), ap.evidence(tiles[4:], "coco")])
    assert whole.keys() == parts.keys()
    for name in whole:
        assert np.array_equal(whole[name], parts[name], equal_nan=name == "object_score"), name
    assert ap.evidence([], "coco")["object_outcome"].shape == (0, 4, 10)


def test_no_object_anywhere_gives_no_figure_and_no_error() -> None:
    none = (
        np.zeros((0, 4)),
        np.zeros(0),
        np.zeros(0, np.int64),
        np.zeros((0, 4)),
        np.zeros(0, np.int64),
    )
    curves = ap.Ranked(ap.evidence([boxes_tile(*none)], "coco")).curves()
    assert math.isnan(ap.mean(curves.average_precision("coco")))
    assert curves.best_f1()[0].size == 0


def test_what_is_sorted_is_kept_for_the_next_draw_of_the_same_evidence() -> None:
    first, second = (ap.evidence(random_tiles(5, 2, seed), "coco") for seed in (0, 1))
    assert ap.ranked(first) is ap.ranked(first)
    assert ap.ranked(second) is not ap.ranked(first)
    assert ap.ranked(first).tiles == 5


@pytest.mark.slow
def test_a_bootstrap_of_a_thousand_draws_takes_seconds() -> None:
    made = ap.evidence(random_tiles(1000, 10, answers=4), "coco")
    kept = ap.ranked(made)
    dice = np.random.default_rng(0)
    started = time.perf_counter()
    for _ in range(100):
        weights = np.bincount(dice.integers(0, 1000, 1000), minlength=1000)
        kept.curves(weights).average_precision("coco")
    # A thousand within a minute on a busy core; 16,000 answers, 40 curves a class.
    assert time.perf_counter() - started < 6
