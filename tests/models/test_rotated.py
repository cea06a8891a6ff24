import math

import numpy as np
import pytest
import shapely
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.ops import nms as upright_nms
from torchvision.ops import roi_align as upright_roi_align

from ringmo.models import rotated

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random_boxes(count: int, span: float = 100, longest: float = 40, seed: int = 0) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    draw = torch.rand((count, 5), generator=dice, dtype=torch.float64)
    sides = 0.5 + draw[:, 2:4] * longest
    return torch.cat((draw[:, :2] * span, sides, (draw[:, 4:] - 0.5) * 4 * math.pi), 1)


def polygons(boxes: Tensor) -> NDArray[np.object_]:
    found: NDArray[np.object_] = shapely.polygons(rotated.to_corners(boxes.double()).numpy())
    return found


def independent_iou(first: Tensor, second: Tensor) -> NDArray[np.float64]:
    one, other = polygons(first), polygons(second)
    both = shapely.area(shapely.intersection(one, other))
    union = shapely.area(one) + shapely.area(other) - both
    ratio: NDArray[np.float64] = both / np.where(union > 0, union, 1)
    return ratio


def related_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of boxes that are hard in ways of their own."""
    boxes = random_boxes(3000)
    turned, along, inside, touching, thin = (boxes.clone() for _ in range(5))
    turned[:, 4] += math.pi / 2
    along[:, 4] += 1e-9
    inside[:, 2:4] *= 0.5
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    touching[:, :2] += boxes[:, 2:3] * torch.stack((cos, sin), 1)
    half = boxes.clone()
    half[:, :2] += boxes[:, 2:3] / 2 * torch.stack((cos, sin), 1)
    thin[:, 3] = 1e-3
    return {
        "random": (boxes, random_boxes(3000, seed=1)),
        "identical": (boxes, boxes),
        "a quarter turned": (boxes, turned),
        "nearly parallel": (boxes, along),
        "nested": (boxes, inside),
        "touching side by side": (boxes, touching),
        "half covered": (boxes, half),
        "thin": (boxes, thin),
        "both thin": (thin, thin.roll(1, 0)),
        "far from the origin": (
            boxes + torch.tensor([1e5, 1e5, 0, 0, 0]),
            turned + torch.tensor([1e5, 1e5, 0, 0, 0]),
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", related_pairs())
def test_overlap_is_that_of_an_independent_library(kind: str, device: str) -> None:
    first, second = related_pairs()[kind]
    found = rotated.paired_iou(first.to(device), second.to(device)).cpu()
    assert np.abs(found.numpy() - independent_iou(first, second)).max() < 1e-7
    # As detectors hold them: coordinates of float32 move the boxes themselves a little.
    first, second = first.float(), second.float()
    single = rotated.paired_iou(first.to(device), second.to(device)).cpu()
    wanted = independent_iou(first, second)
    assert np.abs(single.numpy() - wanted).max() < 1e-5


def test_overlap_of_boxes_known_by_hand() -> None:
    square = torch.tensor([[10.0, 10, 4, 4, 0]])
    for box, wanted in (
        ([10, 10, 4, 4, math.pi / 4], 1 / math.sqrt(2)),  # octagon: 8(√2-1)·4 of 32 - that
        ([12, 10, 4, 4, 0], 1 / 3),
        ([10, 10, 2, 2, 1.0], 1 / 4),
        ([14, 10, 4, 4, 0], 0),
        ([10, 10, 4, 4, -math.pi / 2], 1),
        ([30, 10, 4, 4, 0], 0),
    ):
        found = rotated.paired_iou(square, torch.tensor([box])).item()
        assert found == pytest.approx(wanted, abs=1e-6), box


def test_boxes_without_area_overlap_nothing_and_give_no_nan() -> None:
    point, line, square = [5.0, 5, 0, 0, 0.3], [5.0, 5, 10, 0, 0.3], [5.0, 5, 4, 4, 0]
    negative, no_number = [5.0, 5, -3, 4, 0], [math.nan, 5, 4, 4, 0]
    odd = torch.tensor([point, line, negative, no_number])
    every = torch.cat((odd, torch.tensor([square])))
    assert rotated.pairwise_iou(odd, every).abs().max() == 0
    assert rotated.pairwise_iou(every, odd).abs().max() == 0
    assert rotated.paired_iou(odd, odd).abs().max() == 0
    assert rotated.pairwise_iou(every[:0], every).shape == (0, 5)
    assert rotated.pairwise_iou(every, every[:0]).shape == (5, 0)
    assert rotated.nms(every[:0], torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize("device", DEVICES)
def test_pairwise_overlap_loses_no_pair(device: str) -> None:
    first, second = random_boxes(300), random_boxes(200, seed=1)
    every = rotated.paired_iou(first.repeat_interleave(200, 0), second.repeat(300, 1))
    found = rotated.pairwise_iou(first.to(device), second.to(device)).cpu()
    assert torch.allclose(found, every.reshape(300, 200), atol=1e-12)
    assert 0 < (found > 0).float().mean() < 0.5


def test_overlap_does_not_depend_on_how_many_are_computed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boxes = random_boxes(120)
    whole, stay = rotated.pairwise_iou(boxes, boxes), rotated.nms(boxes, boxes[:, 0], 0.2)
    monkeypatch.setattr(rotated, "PAIRS", 250)
    monkeypatch.setattr(rotated, "EXACT", 7)
    assert torch.equal(whole, rotated.pairwise_iou(boxes, boxes))
    assert torch.equal(stay, rotated.nms(boxes, boxes[:, 0], 0.2))


def test_upright_boxes_overlap_as_torchvision_says() -> None:
    boxes = random_boxes(200)
    boxes[:, 4] = 0
    spans = rotated.to_spans(boxes)
    assert torch.allclose(rotated.pairwise_iou(boxes, boxes), box_iou(spans, spans), atol=1e-12)
    scores = torch.rand(200, generator=torch.Generator().manual_seed(3))
    kept = upright_nms(spans, scores.double(), 0.3)
    assert torch.equal(rotated.nms(boxes, scores, 0.3), kept)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5])
def test_nms_keeps_what_one_box_after_the_other_would(threshold: float, device: str) -> None:
    boxes, labels = random_boxes(600, span=60), torch.arange(600) % 3
    scores = torch.randint(0, 200, (600,), generator=torch.Generator().manual_seed(1)) / 200
    overlap = rotated.pairwise_iou(boxes, boxes)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap[i, j] <= threshold or labels[i] != labels[j] for j in kept):
            kept.append(i)
    found = rotated.nms(boxes.to(device), scores.to(device), threshold, labels.to(device))
    assert found.tolist() == kept
    assert 5 < len(kept) < 500
    mixed = rotated.nms(boxes.to(device), scores.to(device), threshold)
    assert len(mixed) < len(kept)


def test_a_removed_box_removes_none() -> None:
    chain = torch.tensor([[float(10 + 4 * i), 10, 10, 4, 0] for i in range(40)])
    scores = torch.linspace(1, 0.1, 40)
    # Neighbours overlap by 6 of 14, those after them by 2 of 18.
    assert rotated.nms(chain, scores, 0.3).tolist() == list(range(0, 40, 2))


def test_corners_and_boxes_are_two_ways_to_say_one_thing() -> None:
    boxes = rotated.canonical(random_boxes(2000))
    corners = rotated.to_corners(boxes)
    assert torch.allclose(rotated.from_corners(corners), boxes, atol=1e-9)
    for order in ([3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1]):
        again = rotated.from_corners(corners[:, order])
        assert torch.allclose(again, boxes, atol=1e-9), order
    single = rotated.from_corners(corners.float())
    assert single.dtype == torch.float32
    assert rotated.paired_iou(single.double(), boxes).min() > 1 - 1e-4


def test_corners_go_clockwise_on_the_screen_from_left_top() -> None:
    upright = rotated.to_corners(torch.tensor([20.0, 10, 8, 4, 0]))
    assert upright.tolist() == [[16, 8], [24, 8], [24, 12], [16, 12]]
    turned = rotated.to_corners(torch.tensor([20.0, 10, 8, 4, math.pi / 2]))
    assert torch.allclose(turned, torch.tensor([[22.0, 6], [22, 14], [18, 14], [18, 6]]))


def test_canonical_boxes_have_their_longer_side_first_and_half_a_turn() -> None:
    boxes = random_boxes(500)
    made = rotated.canonical(boxes)
    assert (made[:, 2] >= made[:, 3]).all()
    assert (made[:, 4] >= -math.pi / 2).all() and (made[:, 4] < math.pi / 2).all()
    assert rotated.paired_iou(boxes, made).min() > 1 - 1e-9
    edge = torch.tensor([math.pi / 2, -math.pi / 2, 1.5 * math.pi, math.pi, 0, -1e-12])
    for angle in (rotated.half_turn(edge), rotated.half_turn(edge.double())):
        assert (angle >= -math.pi / 2).all() and (angle < math.pi / 2).all()


def test_a_quadrilateral_becomes_the_smallest_rectangle_around_it() -> None:
    shapes = torch.rand((500, 4, 2), generator=torch.Generator().manual_seed(0)).double() * 50
    boxes = rotated.from_corners(shapes)
    for shape, box, rectangle in zip(shapes, boxes, polygons(boxes), strict=True):
        points = shapely.multipoints(shape.numpy())
        farthest = shapely.distance(shapely.get_parts(points), rectangle).max()
        assert farthest < 1e-9
        wanted = shapely.oriented_envelope(points)
        assert float(box[2] * box[3]) <= wanted.area * (1 + 1e-9)


def test_repeated_corners_make_lines_points_and_triangles() -> None:
    point = rotated.from_corners(torch.full((4, 2), 7.0))
    assert point.tolist() == [7, 7, 0, 0, 0]
    line = rotated.from_corners(torch.tensor([[0.0, 0], [3, 4], [3, 4], [0, 0]]))
    wanted = torch.tensor([1.5, 2, 5, 0, math.atan2(4, 3)])
    assert torch.allclose(line, wanted, atol=1e-6)
    triangle = rotated.from_corners(torch.tensor([[0.0, 0], [8, 0], [8, 0], [0, 6]]))
    assert triangle[2] * triangle[3] == pytest.approx(48, abs=1e-4)
    assert rotated.from_corners(torch.zeros((0, 4, 2))).shape == (0, 5)


def test_spans_there_and_back() -> None:
    spans = torch.tensor([[2.0, 3, 12, 9], [5, 1, 6, 30]])
    boxes = rotated.from_spans(spans)
    assert torch.allclose(rotated.to_spans(boxes), spans, atol=1e-5)
    assert (boxes[:, 2] >= boxes[:, 3]).all()
    corners = rotated.to_corners(random_boxes(50))
    found = rotated.to_spans(rotated.from_corners(corners))
    assert torch.allclose(found, torch.cat((corners.amin(1), corners.amax(1)), 1), atol=1e-9)


def test_upright_features_are_those_of_torchvision() -> None:
    features = torch.randn(2, 3, 16, 16)
    spans = [torch.tensor([[0.0, 0, 64, 64], [3, 5, 40, 22]]), torch.tensor([[10.0, 1, 13, 63]])]
    boxes = [
        torch.cat(((s[:, :2] + s[:, 2:]) / 2, s[:, 2:] - s[:, :2], s.new_zeros(len(s), 1)), 1)
        for s in spans
    ]
    found = rotated.roi_align(features, boxes, 7, 4)
    wanted = upright_roi_align(features, spans, 7, 1 / 4, sampling_ratio=2, aligned=True)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_features_turn_with_their_box() -> None:
    size, angle = 64, 0.6
    middle = torch.tensor([30.0, 34.0])
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    # A ramp along the box and one across it: bilinear places of a ramp are exact.
    along = (x - middle[0]) * math.cos(angle) + (y - middle[1]) * math.sin(angle)
    across = (y - middle[1]) * math.cos(angle) - (x - middle[0]) * math.sin(angle)
    box = torch.tensor([[*middle.tolist(), 20, 10, angle]])
    found = rotated.roi_align(torch.stack((along, across))[None], [box], 5, 1)
    assert torch.allclose(found[0, 0], torch.tensor([-8.0, -4, 0, 4, 8]).expand(5, 5), atol=1e-4)
    assert torch.allclose(found[0, 1], torch.tensor([-4.0, -2, 0, 2, 4])[:, None], atol=1e-4)


def test_features_have_gradients_and_images_may_have_no_box() -> None:
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    boxes = [torch.zeros(0, 5), torch.tensor([[16.0, 16, 8, 4, 0.5]])]
    found = rotated.roi_align(features, boxes, 7, 4)
    assert found.shape == (1, 3, 7, 7)
    found.sum().backward()
    assert features.grad is not None
    assert features.grad[0].abs().sum() == 0 < features.grad[1].abs().sum()
    none = rotated.roi_align(features, [torch.zeros(0, 5)] * 2, 7, 4)
    assert none.shape == (0, 3, 7, 7)
