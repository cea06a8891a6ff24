"""PIMask, RingMo's patch incomplete masking: single pixels inside picked patches are hidden.

Small, dense objects vanish when whole patches are masked; the pixels left keep a trace of them.
"""

import math

import numpy as np
import torch
from torch import Tensor


def share_of(ratio: float, count: int) -> int:
    """ceil(ratio · count), as exact arithmetic has it."""
    # 1e-9: 0.6 · 5 is a hair over 3 in binary, and ceil would make it 4.
    return math.ceil(ratio * count - 1e-9)


def pimask(
    batch: int,
    height: int,
    width: int,
    *,
    mask_patch_size: int = 32,
    mask_ratio: float = 0.6,
    inside_ratio: float = 0.6,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """One mask an image, the same for all bands; True = masked.

    Of the image's patches ceil(mask_ratio · patches) are picked, and in each of them
    ceil(inside_ratio · pixels) single pixels are masked, both uniformly without replacement.
    `inside_ratio=1` masks whole patches: SimMIM's mask.

    Args:
        height, width: pixels, multiples of `mask_patch_size`.
        generator: of the same device; with it the mask is a function of its seed.

    Returns:
        bool (batch, 1, height, width).

    Raises:
        ValueError: a size that the patches do not divide, or a ratio outside (0, 1].

    Source: RingMo (Sun et al., TGRS 2022) and its open framework.
    """
    size = mask_patch_size
    if size < 1 or height < 1 or width < 1 or height % size or width % size:
        raise ValueError(f"{height}×{width} pixels cannot be cut into patches of {size}")
    for name, ratio in (("mask_ratio", mask_ratio), ("inside_ratio", inside_ratio)):
        if not 0 < ratio <= 1:
            raise ValueError(f"{name} must lie above 0 and be at most 1, found {ratio}")
    rows, columns = height // size, width // size
    patches, pixels = rows * columns, size * size

    picked = torch.rand(batch, patches, generator=generator, device=device).argsort(-1)
    picked = picked[:, : share_of(mask_ratio, patches), None]
    shape = (batch, picked.shape[1], pixels)
    inside = _exactly(share_of(inside_ratio, pixels), shape, generator, device)
    mask = torch.zeros(batch, patches, pixels, dtype=torch.bool, device=device)
    mask.scatter_(1, picked.expand(shape), inside)
    mask = mask.view(batch, rows, columns, size, size)
    return mask.permute(0, 1, 3, 2, 4).reshape(batch, 1, height, width)


def _exactly(
    count: int,
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """True in `count` random places of the last dimension: bool, of this shape.

    Those of the smallest draws. A draw's lowest bits are its place, so that no two are equal, and
    a threshold, which is several times as fast as an order, leaves exactly so many.
    """
    places = shape[-1]
    draws = torch.randint(
        2**31 - 1, shape, generator=generator, device=device, dtype=torch.int32
    ).bitwise_and_(-(1 << (places - 1).bit_length()))
    draws.bitwise_or_(torch.arange(places, device=device, dtype=torch.int32))
    if draws.is_cpu:  # NumPy selects ten times as fast as PyTorch here
        smallest = np.partition(draws.numpy(), count - 1, axis=-1)[..., count - 1 : count]
        return draws <= torch.from_numpy(smallest)
    return draws <= draws.kthvalue(count, -1, keepdim=True).values
