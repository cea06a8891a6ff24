"""RandAugment of a whole batch at once, on the training device: 8-bit RGB alone.

Each image gets two of fifteen changes, or one, or none: each is done with a chance of one half, at
a strength about the one asked for, in either direction. Which and how strong is drawn on the CPU
for the global batch, so that any number of devices sees the same images.

Source: Cubuk et al., CVPRW 2020; changes and their ranges as `rand-mX-mstd0.5-inc1` of timm, which
RingMo's fine-tuning names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional

LAYERS, CHANCE, DEVIATION = 2, 0.5, 0.5
STRONGEST = 10.0
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
NONE = -1
FILL = 124.0  # what lies beyond a turned or shifted image: ImageNet's mean


@dataclass(frozen=True)
class Changes:
    """What happens to each image, change after change.

    which: int (count, LAYERS), positions in CHANGES, or NONE. strength: float32 (count, LAYERS),
    0 to 1. sign: float32 (count, LAYERS), 1 or -1.
    """

    which: NDArray[np.int64]
    strength: NDArray[np.float32]
    sign: NDArray[np.float32]

    def __getitem__(self, part: slice) -> "Changes":
        return Changes(self.which[part], self.strength[part], self.sign[part])


def changes(count: int, magnitude: float, random: np.random.Generator) -> Changes:
    """The changes of `count` images, of strengths about `magnitude` of 10."""
    shape = (count, LAYERS)
    which = random.integers(0, len(CHANGES), shape)
    which[random.random(shape) >= CHANCE] = NONE
    strength = random.normal(magnitude, DEVIATION, shape).clip(0, STRONGEST) / STRONGEST
    sign = random.choice([-1.0, 1.0], shape)
    return Changes(which, strength.astype(np.float32), sign.astype(np.float32))


def rand_augment(
    images: Tensor, chosen: Changes, upload: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """Images (B, 3, H, W), float32 of 0 to 255, changed as `chosen`; the same shape and range.

    Args:
        upload: brings a CPU tensor to the images' device.
    """
    images = images.round().clamp(0, 255)
    for layer in range(LAYERS):
        which, strength, sign = (a[:, layer] for a in (chosen.which, chosen.strength, chosen.sign))
        for number, change in enumerate(CHANGES):
            rows = np.flatnonzero(which == number)
            if len(rows):
                index, level, direction = (
                    upload(torch.from_numpy(a)) for a in (rows, strength[rows], sign[rows])
                )
                wide = (-1, 1, 1, 1)
                changed = change(images[index], level.view(wide), direction.view(wide))
                images = images.index_copy(0, index, changed.clamp(0, 255))
    return images


# Each takes images (n, 3, H, W), strengths and signs (n, 1, 1, 1).


def _auto_contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    stretched: Tensor = functional.autocontrast(images.byte())
    return stretched.float()


def _equalize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    flat: Tensor = functional.equalize(images.byte())
    return flat.float()


def _invert(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    step = 2 ** (4 + (4 * level).floor())
    return (images / step).floor() * step


def _solarize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(images >= 256 - (256 * level).floor(), 255 - images, images)


def _solarize_add(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return torch.where(images < 128, images + (110 * level).floor(), images)


def _blend(base: Tensor, images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Away from `base` or towards it."""
    return base + (images - base) * (1 + 0.9 * level * sign)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _colour(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(_grey(images), images, level, sign)


def _contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(_grey(images).mean((2, 3), keepdim=True), images, level, sign)


def _brightness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, level, sign)


def _sharpness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(3, 1, 3, 3)
    smooth = torch.nn.functional.conv2d(images, kernel, groups=3)
    smooth = torch.nn.functional.pad(smooth, (1, 1, 1, 1))
    inside = torch.zeros_like(images[:, :1])
    inside[:, :, 1:-1, 1:-1] = 1  # the outermost pixels have no neighbours, and stay
    return _blend(torch.where(inside > 0, smooth, images), images, level, sign)


def _moved(
    images: Tensor, rows: tuple[tuple[Tensor | float, ...], tuple[Tensor | float, ...]]
) -> Tensor:
    """Each image seen through its affine map of coordinates from -1 to 1."""
    like = torch.zeros(len(images), device=images.device)
    where = torch.stack([torch.stack([like + one for one in row], 1) for row in rows], 1)
    grid = torch.nn.functional.affine_grid(where, list(images.shape), align_corners=False)
    # Outside is 0, so what is shown must be the difference to the fill.
    cut = torch.nn.functional.grid_sample(images - FILL, grid, align_corners=False)
    return cut + FILL


def _rotate(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    angle = torch.deg2rad(30 * level * sign).flatten()
    tall = images.shape[2] / images.shape[3]
    cos, sin = angle.cos(), angle.sin()
    return _moved(images, ((cos, -sin * tall, 0.0), (sin / tall, cos, 0.0)))


def _shear_x(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, ((1.0, 0.3 * (level * sign).flatten(), 0.0), (0.0, 1.0, 0.0)))


def _shear_y(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, ((1.0, 0.0, 0.0), (0.3 * (level * sign).flatten(), 1.0, 0.0)))


def _shift_x(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, ((1.0, 0.0, 2 * 0.45 * (level * sign).flatten()), (0.0, 1.0, 0.0)))


def _shift_y(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, ((1.0, 0.0, 0.0), (0.0, 1.0, 2 * 0.45 * (level * sign).flatten())))


CHANGES = (
    _auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _solarize_add, _colour,
    _contrast, _brightness, _sharpness, _shear_x, _shear_y, _shift_x, _shift_y,
)  # fmt: skip
