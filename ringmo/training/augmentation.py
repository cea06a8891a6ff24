"""Random crops, flips and quarter turns of a whole batch at once, on the training device.

An aerial view has no up: all eight turns and mirrors of a tile are as good as the tile.
"""

import numpy as np
import torch
from torch import Tensor

ASPECT = (3 / 4, 4 / 3)  # of a crop's sides, as in RingMo's recipes

# Turns by 0, 90, 180 and 270 degrees, then the same mirrored, as 2×2 matrices.
_TURNS = [((1, 0), (0, 1)), ((0, -1), (1, 0)), ((-1, 0), (0, -1)), ((0, 1), (-1, 0))]
_EIGHT = np.array(_TURNS + [((-a, b), (-c, d)) for (a, b), (c, d) in _TURNS], np.float32)


def crops(count: int, crop_scale: tuple[float, float], random: np.random.Generator) -> Tensor:
    """Where to cut `count` images, each turned and mirrored: float32 (count, 2, 3), on the CPU.

    Affine maps from the crop's coordinates to the image's, both from -1 to 1. Drawn on the CPU,
    so that any device, and any number of them, sees the same crops.

    Args:
        crop_scale: smallest and largest share of the area.
    """
    area = random.uniform(*crop_scale, count)
    aspect = np.exp(random.uniform(np.log(ASPECT[0]), np.log(ASPECT[1]), count))
    width = np.minimum(np.sqrt(area * aspect), 1)
    height = np.minimum(np.sqrt(area / aspect), 1)
    extent = np.stack([width, height], 1).astype(np.float32)
    centre = random.uniform(-1, 1, (count, 2)).astype(np.float32) * (1 - extent)
    turn = _EIGHT[random.integers(0, 8, count)]
    return torch.from_numpy(np.concatenate([turn * extent[:, :, None], centre[:, :, None]], 2))


def cut(images: Tensor, where: Tensor, size: int) -> Tensor:
    """Images (B, C, S, S) of any type, cut by `crops` (B, 2, 3) of their device, bilinear.

    Returns:
        float32 (B, C, size, size), in the images' units.
    """
    shape = [len(images), images.shape[1], size, size]
    grid = torch.nn.functional.affine_grid(where, shape, align_corners=False)
    return torch.nn.functional.grid_sample(
        images.float(), grid, padding_mode="reflection", align_corners=False
    )
