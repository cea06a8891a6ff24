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


def augment(
    images: Tensor, size: int, crop_scale: tuple[float, float], random: np.random.Generator
) -> Tensor:
    """Random resized crops, each turned and mirrored, bilinear.

    Args:
        images: uint8 (B, C, S, S).
        crop_scale: smallest and largest share of the area.
        random: decides everything, on the CPU, so that any device sees the same crops.

    Returns:
        float32 (B, C, size, size), in the images' units.
    """
    count = len(images)
    area = random.uniform(*crop_scale, count)
    aspect = np.exp(random.uniform(np.log(ASPECT[0]), np.log(ASPECT[1]), count))
    width = np.minimum(np.sqrt(area * aspect), 1)
    height = np.minimum(np.sqrt(area / aspect), 1)
    # In grid_sample's coordinates the image reaches from -1 to 1.
    extent = np.stack([width, height], 1).astype(np.float32)
    centre = random.uniform(-1, 1, (count, 2)).astype(np.float32) * (1 - extent)
    turn = _EIGHT[random.integers(0, 8, count)]
    affine = np.concatenate([turn * extent[:, :, None], centre[:, :, None]], 2)
    theta = torch.from_numpy(affine).to(images.device)
    grid = torch.nn.functional.affine_grid(
        theta, [count, images.shape[1], size, size], align_corners=False
    )
    return torch.nn.functional.grid_sample(
        images.float(), grid, padding_mode="reflection", align_corners=False
    )
