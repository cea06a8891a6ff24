"""Boxes at any angle: corners, overlap, suppression of double answers, and their features.

A rotated box is cx, cy, w, h, angle: its middle and sides in pixels, and how far its first side is
turned from the x axis, in radians. y points down, so a positive angle turns clockwise on the
screen. Canonical boxes have w ≥ h and an angle from -π/2 up to, but not, π/2. Corners go clockwise
on the screen: for an angle of 0 left top, right top, right bottom, left bottom.

Plain tensor arithmetic: it runs on any device. Overlaps are computed in float64 and are exact but
for rounding, and every result of a box with a coordinate that is no number is 0.
"""

import math

import torch
from torch import Tensor

PAIRS = 1 << 18  # of boxes that are looked at together: their bounds stay in a CPU's cache
EXACT = 1 << 17  # pairs whose overlap is computed together: 4 MB a value


def to_corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 5) → corners (..., 4, 2), clockwise on the screen."""
    middle, angle = boxes[..., None, :2], boxes[..., 4]
    along = torch.stack((angle.cos(), angle.sin()), -1) * boxes[..., 2:3] / 2
    across = torch.stack((-angle.sin(), angle.cos()), -1) * boxes[..., 3:4] / 2
    return middle + torch.stack(
        (-along - across, along - across, along + across, across - along), -2
    )


def from_corners(corners: Tensor) -> Tensor:
    """The smallest rectangles around corners (..., 4, 2): canonical boxes (..., 5).

    The corners may come in any order, and may coincide: a side is then 0. One side of the smallest
    rectangle lies on a side of the points' hull, thus on one of the six lines through two of them.

    Source: Freeman and Shapira, CACM 1975.
    """
    points = corners.double()
    start, end = (0, 1, 2, 3, 0, 1), (1, 2, 3, 0, 2, 3)
    lines = points[..., end, :] - points[..., start, :]  # (..., 6, 2)
    length = lines.norm(dim=-1, keepdim=True)
    lines = torch.where(length > 0, lines / length, lines.new_tensor([1.0, 0.0]))
    normals = torch.stack((-lines[..., 1], lines[..., 0]), -1)
    # Extents along each line and across it, from the first corner: small numbers stay exact.
    offsets = points - points[..., :1, :]
    axes = torch.stack((lines, normals), -2)  # (..., 6, 2, 2)
    at = torch.einsum("...pc,...lac->...lap", offsets, axes)
    low, high = at.amin(-1), at.amax(-1)
    sides = high - low
    area = torch.where(length[..., 0] > 0, sides.prod(-1), math.inf)
    best = area.argmin(-1, keepdim=True)[..., None]
    sides, middle = (
        value.gather(-2, best.expand(*best.shape[:-1], 2))[..., 0, :]
        for value in (sides, (low + high) / 2)
    )
    axes = axes.gather(-3, best[..., None].expand(*best.shape[:-1], 2, 2))[..., 0, :, :]
    centre = points[..., 0, :] + torch.einsum("...a,...ac->...c", middle, axes)
    angle = torch.atan2(axes[..., 0, 1], axes[..., 0, 0])
    return canonical(torch.cat((centre, sides, angle[..., None]), -1)).to(corners.dtype)


def from_spans(spans: Tensor) -> Tensor:
    """Upright boxes (..., 4), left, top, right, bottom → rotated ones (..., 5), canonical."""
    middle, sides = (spans[..., :2] + spans[..., 2:]) / 2, spans[..., 2:] - spans[..., :2]
    return canonical(torch.cat((middle, sides, torch.zeros_like(sides[..., :1])), -1))


def to_spans(boxes: Tensor) -> Tensor:
    """What boxes (..., 5) span: upright ones (..., 4), left, top, right, bottom."""
    half = _half_spans(boxes)
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def canonical(boxes: Tensor) -> Tensor:
    """The same rectangles (..., 5) with w ≥ h and an angle in [-π/2, π/2)."""
    cx, cy, w, h, angle = boxes.unbind(-1)
    upright = w < h
    angle = torch.where(upright, angle + math.pi / 2, angle)
    return torch.stack((cx, cy, torch.maximum(w, h), torch.minimum(w, h), half_turn(angle)), -1)


def half_turn(angle: Tensor) -> Tensor:
    """The same direction of a line, in [-π/2, π/2)."""
    turned = torch.remainder(angle + math.pi / 2, math.pi) - math.pi / 2
    # Rounding may make a remainder as large as its divisor.
    return torch.where(turned >= math.pi / 2, turned - math.pi, turned)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Overlap of each of boxes (N, 5) with each of (M, 5): (N, M), from 0 to 1."""
    overlap = first.new_zeros((len(first), len(second)))
    rows, columns = _near(first, second)
    overlap[rows, columns] = paired_iou(first[rows], second[columns])
    return overlap


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Overlap of each of boxes (N, 5) with its partner in (N, 5): (N,), from 0 to 1.

    Intersection over union; 0 where neither has an area.
    """
    ratios = []
    for start in range(0, len(first), EXACT):
        one, other = (boxes[start : start + EXACT].double() for boxes in (first, second))
        area, others = (box[:, 2].clamp(min=0) * box[:, 3].clamp(min=0) for box in (one, other))
        both = torch.minimum(_intersection(one, other), torch.minimum(area, others))
        union = area + others - both
        ratio = both / torch.where(union > 0, union, 1)
        ratios.append(torch.where(union > 0, ratio, 0).clamp(0, 1))
    return torch.cat(ratios).to(first.dtype) if ratios else first.new_zeros(0)


def nms(boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None = None) -> Tensor:
    """Which boxes stay when each removes those of lower score that overlap it by more.

    Args:
        boxes: (N, 5). scores: (N,); of equals the earlier comes first. labels: (N,), of classes,
            each for itself.

    Returns:
        int64, numbers of the boxes that stay, by falling score.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    better, worse = _near(boxes, boxes, None if labels is None else labels[order], threshold)
    over = paired_iou(boxes[better], boxes[worse]) > threshold
    return order[greedy(better[over], worse[over], len(boxes))]


def greedy(better: Tensor, worse: Tensor, count: int) -> Tensor:
    """Which of `count` boxes no box that stays removes; pairs say who would remove whom.

    Whether a box stays is settled once it is for all better ones that overlap it. So each turn
    settles at least the best that is open, and mostly all of them within a few turns.
    """
    stays = torch.ones(count, dtype=torch.bool, device=better.device)
    while True:
        removed = torch.zeros_like(stays)
        removed[worse[stays[better]]] = True
        if torch.equal(~removed, stays):
            return stays
        stays = ~removed


def roi_align(features: Tensor, boxes: list[Tensor], size: int, stride: float) -> Tensor:
    """What features show within boxes, turned upright: the first side across, the second down.

    Bilinear, the mean of 2×2 places in each of size×size parts. Beyond the image its border goes
    on.

    Args:
        features: (B, C, H, W). boxes: of each image (n, 5), in its pixels.
        stride: pixels a feature stands for.

    Returns:
        (boxes of all images, C, size, size).

    Source: RoIAlign (He et al., ICCV 2017), its places turned with the box.
    """
    height, width = features.shape[-2:]
    fine = 2 * size
    at = (torch.arange(fine, device=features.device, dtype=torch.float32) + 0.5) / fine - 0.5
    inside = []
    for image, own in zip(features, boxes, strict=True):
        own = own.float()
        cos, sin = own[:, 4].cos()[:, None, None], own[:, 4].sin()[:, None, None]
        across, down = (
            at[None, None, :] * own[:, 2, None, None],
            (at[None, :, None] * own[:, 3, None, None]),
        )
        x = own[:, 0, None, None] + across * cos - down * sin
        y = own[:, 1, None, None] + across * sin + down * cos
        # From -1 at the left edge of the first feature to 1 at the right edge of the last.
        grid = torch.stack((x * 2 / (stride * width) - 1, y * 2 / (stride * height) - 1), -1)
        sampled = torch.nn.functional.grid_sample(
            image[None].float(),
            grid.reshape(1, -1, fine, 2),
            padding_mode="border",
            align_corners=False,
        )
        inside.append(sampled[0].reshape(len(image), len(own), fine, fine).transpose(0, 1))
    return torch.nn.functional.avg_pool2d(torch.cat(inside), 2)


def _half_spans(boxes: Tensor) -> Tensor:
    """Half of what boxes (..., 5) span in x and y: (..., 2)."""
    w, h, angle = boxes[..., 2:].unbind(-1)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    return torch.stack((w * cos + h * sin, w * sin + h * cos), -1) / 2


def _near(
    first: Tensor, second: Tensor, labels: Tensor | None = None, threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of all pairs whose spans touch: (P,) of the first, (P,) of the second.

    Args:
        threshold: the two sets are one, sorted; the first of a pair comes before the second, and
            neither is so small that their overlap cannot pass the threshold. labels: of that set;
            pairs are of one class.
    """
    reach, reaches = _half_spans(first), _half_spans(second)
    area, areas = first[:, 2] * first[:, 3], second[:, 2] * second[:, 3]
    after = torch.arange(len(second), device=second.device)
    found = []
    step = max(1, PAIRS // max(len(second), 1))
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        # A little more than the spans, whose own rounding must not lose a pair.
        near = (first[part, None, 0] - second[:, 0]).abs() <= 1.001 * (
            reach[part, None, 0] + reaches[:, 0]
        )
        near &= (first[part, None, 1] - second[:, 1]).abs() <= 1.001 * (
            reach[part, None, 1] + reaches[:, 1]
        )
        if threshold is not None:
            near &= after[part, None] < after
            least = 0.999 * threshold
            near &= (area[part, None] >= least * areas) & (areas >= least * area[part, None])
            if labels is not None:
                near &= labels[part, None] == labels
        pairs = near.nonzero()
        found.append(torch.stack((pairs[:, 0] + start, pairs[:, 1])))
    if not found:
        empty = torch.zeros(0, dtype=torch.int64, device=first.device)
        return empty, empty
    rows, columns = torch.cat(found, 1)
    return rows, columns


def _intersection(first: Tensor, second: Tensor) -> Tensor:
    """Area that boxes (P, 5) and (P, 5) share: (P,), of their type.

    By Green's theorem along the sides of the first, seen from the second, which is then upright
    about the origin: with y cut off at its top and bottom, -∫ y dx over the part of a side
    between its left and right. On a straight side y cut off is made of up to three straight parts,
    so trapezoids give the integral without an error. Nothing is decided by a comparison of two
    nearly equal numbers, as whether a corner lies inside: boxes that touch or coincide are no
    special case.
    """
    cos, sin = second[:, 4].cos(), second[:, 4].sin()
    apart = first[:, :2] - second[:, :2]
    seen = torch.stack(
        (
            apart[:, 0] * cos + apart[:, 1] * sin,
            apart[:, 1] * cos - apart[:, 0] * sin,
            first[:, 2].clamp(min=0),
            first[:, 3].clamp(min=0),
            first[:, 4] - second[:, 4],
        ),
        1,
    )
    corners = to_corners(seen)  # (P, 4, 2)
    right, bottom = (second[:, 2:4].clamp(min=0) / 2)[:, :, None].unbind(1)  # (P, 1)
    x, y = corners.unbind(-1)
    run, rise = x.roll(-1, 1) - x, y.roll(-1, 1) - y
    run_or_one, rise_or_one = torch.where(run == 0, 1, run), torch.where(rise == 0, 1, rise)

    def share(value: Tensor) -> Tensor:
        return torch.nan_to_num(value, 0.0, 1.0, 0.0).clamp(0, 1)

    # How far along its side, from 0 to 1, the part between left and right begins and ends.
    edges = share((-right - x) / run_or_one), share((right - x) / run_or_one)
    begin, end = torch.minimum(*edges), torch.maximum(*edges)
    bends = share((-bottom - y) / rise_or_one), share((bottom - y) / rise_or_one)
    stops = [
        begin,
        torch.minimum(*bends).clamp(begin, end),
        torch.maximum(*bends).clamp(begin, end),
        end,
    ]
    heights = [(y + stop * rise).clamp(-bottom, bottom) for stop in stops]
    total = torch.zeros_like(x)
    for here, after, low, high in zip(stops, stops[1:], heights, heights[1:], strict=False):
        total = total + (after - here) * (low + high) / 2
    # A side straight down has no run, and adds nothing.
    return torch.nan_to_num(-(total * run).sum(1)).clamp(min=0)
