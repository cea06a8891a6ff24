"""Small scenes of bright rectangles, upright or turned, and their corners."""

import math

import torch
from torch import Tensor

from ringmo.config import Model
from ringmo.models import rotated
from ringmo.tasks.base import Objects

TINY = Model(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
TINY_VIT = Model(
    backbone="vit", image_size=64, patch_size=8, embed_dim=32, depths=[2], num_heads=[2]
)  # fmt: skip


def scene(
    dice: torch.Generator, size: int = 64, count: int = 3, turned: bool = False
) -> tuple[Tensor, Objects]:
    """An image (3, size, size) about 0, and its objects, of two classes by colour and shape.

    Class 0 is red and long, 1 is blue and nearly square; none overlaps another.
    """
    image = torch.randn((3, size, size), generator=dice) * 0.1
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    boxes: list[Tensor] = []
    labels: list[int] = []
    while len(boxes) < count:
        draw = torch.rand(5, generator=dice)
        label = int(torch.randint(2, (1,), generator=dice))
        long = 14 + 12 * float(draw[0])
        wide = long * (0.45 if label == 0 else 0.85)
        angle = (float(draw[4]) - 0.5) * math.pi if turned else 0.0
        middle = 16 + draw[1:3] * (size - 32)
        box = torch.tensor([*middle.tolist(), long, wide, angle])
        grown = box + torch.tensor([0, 0, 4, 4, 0])
        if boxes and rotated.pairwise_iou(grown[None], torch.stack(boxes)).max() > 0:
            if float(torch.rand(1, generator=dice)) < 0.05:
                count -= 1  # no room
            continue
        boxes.append(box)
        labels.append(label)
        across, down = x - middle[0], y - middle[1]
        along = across * math.cos(angle) + down * math.sin(angle)
        beside = down * math.cos(angle) - across * math.sin(angle)
        inside = (along.abs() <= long / 2) & (beside.abs() <= wide / 2)
        image[0 if label == 0 else 2][inside] += 2.0
        image[1][inside] -= 1.0
    corners = rotated.to_corners(torch.stack(boxes)) if boxes else torch.zeros(0, 4, 2)
    return image, Objects(corners, torch.tensor(labels, dtype=torch.int64),
                          torch.zeros(len(labels), dtype=torch.bool))  # fmt: skip


def scenes(
    count: int, seed: int = 0, size: int = 64, turned: bool = False, empty: int = 0
) -> tuple[dict[str, Tensor], list[Objects]]:
    """A batch of scenes; the last `empty` have no object."""
    dice = torch.Generator().manual_seed(seed)
    made = [scene(dice, size, 0 if i >= count - empty else 3, turned) for i in range(count)]
    return {"rgb": torch.stack([image for image, _ in made])}, [objects for _, objects in made]
