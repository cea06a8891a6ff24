"""Measures of masks and heights agree with other people's code, and with what a hand computes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from ringmo.evaluation import dense
from ringmo.tasks.base import UNKNOWN, Evidence, joined

CLASSES = ["field", "road", "house", "water"]


def made(tiles: int = 6, classes: int = 4, size: int = 40) -> tuple[Tensor, Tensor]:
    """Probabilities and a mask in blocks, with unknown pixels and answers that are partly right."""
    torch.manual_seed(0)
    coarse = torch.randint(0, classes, (tiles, size // 8, size // 8))
    truth = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    logits = 2.0 * torch.nn.functional.one_hot(truth.roll(3, 2), classes).permute(0, 3, 1, 2)
    logits = logits + 1.5 * torch.nn.functional.avg_pool2d(torch.randn(logits.shape), 3, 1, 1)
    truth = torch.where(torch.rand(truth.shape) < 0.1, UNKNOWN, truth)
    return logits.softmax(1), truth


def test_figures_agree_with_torchmetrics() -> None:
    probabilities, truth = made()
    evidence = dense.mask_evidence(probabilities, truth)
    figures = dense.mask_figures(evidence, CLASSES)
    how = {"num_classes": 4, "ignore_index": UNKNOWN}
    said = probabilities.argmax(1)
    matrix = MulticlassConfusionMatrix(**how)(said, truth)
    assert np.array_equal(evidence["confusion"].sum(0)[:4], matrix)
    for name, metric in (
        ("iou", MulticlassJaccardIndex(average="none", **how)),
        ("f1", MulticlassF1Score(average="none", **how)),
        ("recall", MulticlassAccuracy(average="none", **how)),
    ):
        assert [row[name] for row in figures.classes] == pytest.approx(metric(said, truth).tolist())
    assert figures.whole["miou"] == pytest.approx(MulticlassJaccardIndex(**how)(said, truth).item())
    assert figures.whole["mean_f1"] == pytest.approx(
        MulticlassF1Score(average="macro", **how)(said, truth).item()
    )
    assert figures.whole["accuracy"] == pytest.approx(
        MulticlassAccuracy(average="micro", **how)(said, truth).item()
    )
    error = MulticlassCalibrationError(n_bins=dense.BINS, **how)(probabilities, truth)
    count, confidence, right = (
        evidence[f"reliability_{name}"].sum(0) for name in ("count", "confidence", "right")
    )
    assert np.abs(confidence - right).sum() / count.sum() == pytest.approx(error.item(), abs=1e-5)


def test_a_matrix_a_hand_can_compute() -> None:
    truth = torch.tensor([[[0, 0, 1], [1, 1, UNKNOWN]]])
    said = torch.tensor([[[0, 1, 1], [1, 0, 0]]])
    matrix = dense.confusion(truth, said, 2)
    assert matrix.tolist() == [[[1, 1], [1, 2], [0, 0]]]
    figures = dense.mask_figures(
        dense.mask_evidence(
            torch.nn.functional.one_hot(said, 2).permute(0, 3, 1, 2).float(), truth
        ),
        ["a", "b"],
    )
    assert [row["iou"] for row in figures.classes] == pytest.approx([1 / 3, 2 / 4])
    assert [row["pixels"] for row in figures.classes] == [2, 3]
    assert figures.whole["accuracy"] == pytest.approx(3 / 5)


def test_weights_are_how_often_a_tile_counts() -> None:
    probabilities, truth = made()
    truth[2, :20] = 6  # two classes that the model does not know
    truth[4, 20:] = 5
    evidence = dense.mask_evidence(probabilities, truth)
    names = [*CLASSES, "tree", "car", "boat"]
    weights = np.array([2, 0, 1, 3, 0, 1])
    rows = np.repeat(np.arange(6), weights)
    again = dense.mask_evidence(probabilities[rows], truth[rows])
    weighted, repeated = (
        dense.mask_figures(evidence, names, weights),
        dense.mask_figures(again, names),
    )
    assert weighted.whole == pytest.approx(repeated.whole)
    assert len(weighted.classes) == len(repeated.classes) == 5
    for one, other in zip(weighted.classes, repeated.classes, strict=True):
        assert one == pytest.approx(other)


def test_batches_joined_are_as_all_at_once() -> None:
    probabilities, truth = made()
    truth[3, :10] = 4
    parts = [dense.mask_evidence(probabilities[i], truth[i]) for i in (slice(2), slice(2, 6))]
    whole = dense.mask_evidence(probabilities, truth)
    for name, rows in joined(parts).items():
        assert np.allclose(rows, whole[name]), name


def test_a_class_that_the_model_does_not_know_is_missed() -> None:
    probabilities, truth = made()
    truth[1, :, :20] = 5
    truth[2, :10] = 4
    figures = dense.mask_figures(
        dense.mask_evidence(probabilities, truth), [*CLASSES, "tree", "car"]
    )
    how = {"num_classes": 6, "ignore_index": UNKNOWN}
    said = probabilities.argmax(1)
    ious = MulticlassJaccardIndex(average="none", **how)(said, truth)
    assert [row["class"] for row in figures.classes] == [*CLASSES, "tree", "car"]
    assert [row["iou"] for row in figures.classes] == pytest.approx(ious.tolist())
    assert figures.classes[5]["pixels"] == 40 * 20
    assert figures.whole["miou"] == pytest.approx(ious.mean().item())
    accuracy = MulticlassAccuracy(average="micro", **how)(said, truth)
    assert figures.whole["accuracy"] == pytest.approx(accuracy.item())


def test_a_class_without_pixels_is_no_row_and_no_part_of_the_mean() -> None:
    probabilities, truth = made()
    truth[truth == 3] = 0
    figures = dense.mask_figures(dense.mask_evidence(probabilities, truth), CLASSES)
    assert [row["class"] for row in figures.classes] == CLASSES[:3]
    assert figures.whole["miou"] == pytest.approx(np.mean([r["iou"] for r in figures.classes]))


def test_where_nobody_knows_a_pixel_nothing_is_a_number() -> None:
    probabilities, truth = made()
    evidence = dense.mask_evidence(probabilities, torch.full_like(truth, UNKNOWN))
    assert not any(rows.any() for rows in evidence.values())
    figures = dense.mask_figures(evidence, CLASSES)
    assert figures.classes == [] and all(np.isnan(value) for value in figures.whole.values())
    assert np.isnan(dense.tile_miou(evidence)).all() and np.isnan(dense.tile_f1(evidence, 1)).all()


@pytest.mark.parametrize("tolerance", [1, 2, 3])
def test_boundaries_agree_with_a_distance_transform(tolerance: int) -> None:
    probabilities, truth = made()
    said = probabilities.argmax(1)
    counts = dense.boundaries(truth, said, 4, tolerance)
    for tile in range(len(truth)):
        true = truth[tile].numpy()
        claimed = np.where(true == UNKNOWN, UNKNOWN, said[tile].numpy())
        for number in range(4):
            edge_true, edge_said = _edge(true, number), _edge(claimed, number)
            wanted = (
                (edge_said & (distance_transform_edt(~edge_true) <= tolerance)).sum(),
                edge_said.sum(),
                (edge_true & (distance_transform_edt(~edge_said) <= tolerance)).sum(),
                edge_true.sum(),
            )
            assert counts[tile, number].tolist() == list(wanted)


def _edge(mask: np.ndarray, number: int) -> np.ndarray:
    """Pixel by pixel: of this class, and beside one that is known to be of another."""
    edge = np.zeros(mask.shape, bool)
    rows, columns = mask.shape
    for row, column in np.argwhere(mask == number):
        for at in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= at[0] < rows and 0 <= at[1] < columns and mask[at] not in (number, UNKNOWN):
                edge[row, column] = True
    return edge


@pytest.mark.parametrize(("shift", "wanted"), [(0, 1.0), (2, 1.0), (3, 0.0), (8, 0.0)])
def test_a_boundary_may_lie_two_pixels_off(shift: int, wanted: float) -> None:
    truth = torch.zeros(1, 32, 32, dtype=torch.int64)
    truth[:, :, 16:] = 1
    said = truth.roll(shift, 2)
    said[:, :, :shift] = 0
    evidence = dense.mask_evidence(
        torch.nn.functional.one_hot(said, 2).permute(0, 3, 1, 2).float(), truth
    )
    found = dense.mask_figures(evidence, ["a", "b"]).whole["boundary_f1"]
    assert found == pytest.approx(wanted)
    assert dense.object_figures(evidence, 1)["boundary_f1"] == pytest.approx(found)


def test_figures_of_one_class_are_those_of_its_row() -> None:
    probabilities, truth = made(classes=2)
    evidence = dense.mask_evidence(probabilities, truth)
    row = dense.mask_figures(evidence, ["unchanged", "changed"]).classes[1]
    figures = dense.object_figures(evidence, 1)
    for name in ("f1", "iou", "precision", "recall", "boundary_f1"):
        assert figures[name] == pytest.approx(row[name])


def one_tile(truth: int, said: int) -> Evidence:
    """A tile of 20 × 20 pixels, all of one class, and one answer for all of them."""
    mask = torch.full((1, 20, 20), truth)
    number = torch.full_like(mask, said)
    return dense.mask_evidence(
        torch.nn.functional.one_hot(number, 2).permute(0, 3, 1, 2).float(), mask
    )


def test_without_change_only_false_alarms_count() -> None:
    quiet, alarm, missed = (
        dense.object_figures(one_tile(*pair), 1) for pair in ((0, 0), (0, 1), (1, 0))
    )
    assert quiet["accuracy"] == 1 and np.isnan(quiet["f1"]) and np.isnan(quiet["precision"])
    assert alarm["f1"] == alarm["precision"] == alarm["accuracy"] == 0
    assert np.isnan(alarm["recall"])
    assert missed["f1"] == missed["recall"] == missed["precision"] == 0
    assert dense.tile_f1(one_tile(0, 0), 1).tolist() == [1.0]
    assert dense.tile_f1(one_tile(0, 1), 1) == pytest.approx([2 * 4 / (400 + 2 * 4)])


def test_a_tile_s_miou_is_the_figure_of_it_alone() -> None:
    probabilities, truth = made()
    truth[2, :9] = 4
    evidence = dense.mask_evidence(probabilities, truth)
    alone = [
        dense.mask_figures(evidence, [*CLASSES, "tree"], np.eye(6, dtype=np.int64)[i]).whole["miou"]
        for i in range(6)
    ]
    assert dense.tile_miou(evidence) == pytest.approx(alone)


def test_confidence_falls_in_bins_of_the_same_width() -> None:
    confidence = torch.tensor([[[0.0, 0.5, 0.999, 1.0]], [[0.07, 0.06, 0.2, 0.2]]])
    right = torch.tensor([[[False, True, True, True]], [[True, True, True, False]]])
    known = torch.tensor([[[True, True, True, True]], [[True, True, True, False]]])
    found = dense.reliability(confidence, right, known)
    counts = found["reliability_count"]
    assert counts[0, [0, 7, 14]].tolist() == [1, 1, 2] and counts[0].sum() == 4
    assert counts[1, [0, 1, 3]].tolist() == [1, 1, 1] and counts[1].sum() == 3
    assert found["reliability_confidence"][0, 14].item() == pytest.approx(1.999)
    assert found["reliability_right"].sum(1).tolist() == [3, 3]


def test_heights_agree_with_torchmetrics_and_unknown_ones_count_nowhere() -> None:
    torch.manual_seed(0)
    truth = 30 * torch.rand(5, 16, 16)
    said = truth + 4 * torch.randn(truth.shape)
    truth[torch.rand(truth.shape) < 0.2] = torch.nan
    figures = dense.height_figures(dense.heights(truth, said))
    known = ~truth.isnan()
    assert figures["mae"] == pytest.approx(MeanAbsoluteError()(said[known], truth[known]).item())
    rmse = MeanSquaredError(squared=False)(said[known], truth[known])
    assert figures["rmse"] == pytest.approx(rmse.item(), rel=1e-5)
    ratio = torch.maximum(said[known] / truth[known], truth[known] / said[known])
    near = (ratio < 1.25) & (said[known] > 0)
    assert figures["within_1.25"] == pytest.approx(near.float().mean().item())


def test_heights_a_hand_can_compute() -> None:
    truth = torch.tensor([[[10.0, 10.0, 0.0, -5.0]], [[torch.nan, 4.0, torch.nan, 8.0]]])
    said = torch.tensor([[[12.0, 13.0, 1.0, -5.0]], [[9.0, -4.0, 9.0, 8.0]]])
    evidence = dense.heights(truth, said)
    assert evidence["height_pixels"].tolist() == [4, 2]
    assert evidence["height_error"].tolist() == [6, 8]
    assert evidence["height_square"].tolist() == [14, 64]
    assert evidence["height_positive"].tolist() == [2, 2]
    assert evidence["height_within"].tolist() == [1, 1]
    figures = dense.height_figures(evidence, np.array([0, 3]))
    assert figures == pytest.approx({"mae": 4.0, "rmse": 32**0.5, "within_1.25": 0.5})
    unknown = dense.height_figures(dense.heights(torch.full_like(said, torch.nan), said))
    assert all(np.isnan(value) for value in unknown.values())
