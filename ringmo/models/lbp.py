"""Local binary patterns: RingMo's optional second target, the texture round each pixel."""

import itertools
import math

import torch
from torch import Tensor

POINTS, RADIUS = 8, 2
LARGEST = POINTS + 1  # the value of all patterns that are not uniform


def local_binary_pattern(images: Tensor) -> Tensor:
    """Uniform, rotation-invariant patterns of 8 points on a circle of radius 2, for each band.

    A pixel's value is how many of the points are not darker than it, 0 to 8, where round the
    circle that changes twice at most, and 9 elsewhere. Points between pixels are bilinear. Beyond
    the border an image goes on as its nearest pixel.

    Args:
        images: (B, C, H, W) of any type; a scale or an offset of a band changes nothing.

    Returns:
        float32 (B, C, H, W) of whole numbers, on the images' device.

    Source: Ojala et al., TPAMI 2002 (LBP riu2).
    """
    height, width = images.shape[-2:]
    centre = images.float()
    padded = torch.nn.functional.pad(centre, (RADIUS,) * 4, mode="replicate")

    def difference(down: int, right: int) -> Tensor:
        top, left = RADIUS + down, RADIUS + right
        return padded[..., top : top + height, left : left + width] - centre

    above = []
    for point in range(POINTS):
        angle = 2 * math.pi * point / POINTS
        y, x = round(-RADIUS * math.sin(angle), 9), round(RADIUS * math.cos(angle), 9)
        down, right = math.floor(y), math.floor(x)
        vertical, horizontal = (1 - (y - down), y - down), (1 - (x - right), x - right)
        # Of differences, not of values: where an image is flat they are 0, not a rounding error.
        between = torch.zeros_like(centre)
        for i, j in itertools.product((0, 1), (0, 1)):
            weight = vertical[i] * horizontal[j]
            if weight > 0:
                between += weight * difference(down + i, right + j)
        above.append(between >= 0)
    bits = torch.stack(above)
    changes = (bits != bits.roll(1, 0)).sum(0)
    return torch.where(changes <= 2, bits.sum(0), LARGEST).float()
