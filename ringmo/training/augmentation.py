"""Random crops, turns, mixtures and holes of a whole batch at once, on the training device.

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
    return torch.nn.functional.grid_sample(
        images.float(), _grid(where, size), padding_mode="reflection", align_corners=False
    )


def cut_truth(truth: Tensor, where: Tensor, size: int) -> Tensor:
    """Masks or heights (B, 1, S, S), cut as `cut` cuts their images: the nearest pixel's value.

    Returns:
        float32 (B, size, size).
    """
    return torch.nn.functional.grid_sample(
        truth.float(), _grid(where, size), "nearest", "reflection", align_corners=False
    )[:, 0]


def cut_corners(corners: Tensor, where: Tensor) -> Tensor:
    """Where points of an image lie once it is cut.

    Args:
        corners: (n, 4, 2), x and y as shares of the image's side. where: (2, 3), of one image.

    Returns:
        (n, 4, 2), as shares of the crop's side; in the same order around a mirrored object.
    """
    turn, middle = where[:, :2], where[:, 2]
    inside: Tensor = (corners * 2 - 1 - middle) @ torch.linalg.inv(turn).T
    return (inside + 1) / 2


def _grid(where: Tensor, size: int) -> Tensor:
    """Where each pixel of a crop lies in its image: (B, size, size, 2), from -1 to 1.

    As `affine_grid` has it, which takes several times as long on a CPU.
    """
    at = (torch.arange(size, device=where.device) * 2 + 1) / size - 1
    turn, middle = where[:, None, None, :, :2], where[:, None, None, :, 2]
    return at[:, None] * turn[..., 0] + at[:, None, None] * turn[..., 1] + middle


def mixed(
    images: Tensor, answers: Tensor, mixup: float, cutmix: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Each image mixed with its neighbour, or a box of it in its place; answers likewise.

    One draw for the whole batch; where both are wanted, one of them with equal chances. The order
    of a batch is random, and pairs stay on one rank where its share is even (an odd one leaves its
    last image as it is).

    Args:
        images: (B, C, H, W). answers: (B, classes), shares. mixup, cutmix: parameters of the beta
            distributions; 0: never.

    Source: Zhang et al., ICLR 2018; Yun et al., ICCV 2019; their choice by batch as in timm.
    """
    boxes = cutmix > 0 and (not mixup or random.random() < 0.5)
    strength = cutmix if boxes else mixup
    if not strength:
        return images, answers
    share = float(random.beta(strength, strength))
    partner = torch.arange(len(images), device=images.device)
    partner = (partner ^ 1).clamp(max=len(images) - 1)
    if boxes:
        height, width = images.shape[2:]
        top, bottom = _within(height, 1 - share, random)
        left, right = _within(width, 1 - share, random)
        place = (..., slice(top, bottom), slice(left, right))
        images = images.clone()
        images[place] = images[place][partner]  # indexed: a copy
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = share * images + (1 - share) * images[partner]
    return images, share * answers + (1 - share) * answers[partner]


def _within(side: int, area: float, random: np.random.Generator) -> tuple[int, int]:
    """One side of a box of this share of the area about a random middle, cut at the image's."""
    middle, half = int(random.integers(side)), int(side * area**0.5) // 2
    return max(0, middle - half), min(side, middle + half)


HOLE_AREA, HOLE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


def holes(count: int, chance: float, random: np.random.Generator) -> Tensor:
    """Where `count` images are erased: float32 (count, 4), left, top, right, bottom, 0 to 1.

    An image without a hole has one of no size.

    Source: random erasing (Zhong et al., AAAI 2020), with timm's areas and aspects.
    """
    area = random.uniform(*HOLE_AREA, count)
    aspect = np.exp(random.uniform(np.log(HOLE_ASPECT[0]), np.log(HOLE_ASPECT[1]), count))
    size = np.minimum(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1), 1)
    size[random.random(count) >= chance] = 0
    corner = random.random((count, 2)) * (1 - size)
    return torch.from_numpy(np.concatenate([corner, corner + size], 1).astype(np.float32))


def erased(images: Tensor, where: Tensor, noise: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) with `noise` of that shape in their `holes` (B, 4)."""
    height, width = images.shape[2:]
    x = (torch.arange(width, device=images.device) + 0.5) / width
    y = (torch.arange(height, device=images.device) + 0.5) / height
    left, top, right, bottom = where[:, :, None].unbind(1)
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
    return torch.where(inside[:, None], noise, images)


def turned(images: Tensor, number: int) -> Tensor:
    """Images (…, S, S) in one of eight positions: `number` % 4 quarter turns, from 4 on mirrored
    first."""
    return torch.rot90(images.flip(-1) if number >= 4 else images, number % 4, (-2, -1))


def turned_back(images: Tensor, number: int) -> Tensor:
    """What `turned` has turned, as it was."""
    images = torch.rot90(images, -(number % 4), (-2, -1))
    return images.flip(-1) if number >= 4 else images
