"""The plain recipe: pre-training as most people would write it in an afternoon. The baseline.

ImageFolder, PIL transforms and a NumPy mask for each image in the loader's workers; timm's Swin
as it comes, with RingMo's stem and head; AdamW as it comes; autocast where the device has it; the
loss printed, so read, each step. Architecture, rates and number of steps are ours, so that losses
can be compared.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ringmo.config import Config, Model
from ringmo.models.stem import PiConvStem

MEAN, STD = (123.7 / 255, 116.3 / 255, 103.5 / 255), (58.4 / 255, 57.1 / 255, 57.4 / 255)


def images(root: Path, size: int, crop_scale: tuple[float, float]) -> ImageFolder:
    """Random crops of root/CLASS/*, flipped and normalised: float32 (3, size, size), a label."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(size, scale=crop_scale, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return ImageFolder(str(root), transforms.Compose(steps))


def mask_of_one(
    size: int, patch: int, ratio: float, inside: float, dice: np.random.Generator
) -> NDArray[np.bool_]:
    """PIMask for one image: bool (size, size), True = masked."""
    side = size // patch
    mask = np.zeros((size, size), bool)
    for number in dice.permutation(side * side)[: math.ceil(ratio * side * side)]:
        row, column = divmod(int(number), side)
        pixels = np.zeros(patch * patch, bool)
        pixels[dice.permutation(patch * patch)[: math.ceil(inside * patch * patch)]] = True
        place = np.s_[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        mask[place] = pixels.reshape(patch, patch)
    return mask


class Masked(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Each image with a mask of its own."""

    def __init__(self, folder: ImageFolder, config: Config) -> None:
        self.folder, self.size, self.settings = folder, config.model.image_size, config.pretrain
        self.dice = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        of = self.settings
        mask = mask_of_one(self.size, of.mask_patch_size, of.mask_ratio, of.inside_ratio, self.dice)
        return self.folder[index][0], torch.from_numpy(mask)[None]


def _seeded(_: int) -> None:
    info: Any = torch.utils.data.get_worker_info()
    random.seed(info.seed)
    info.dataset.dice = np.random.default_rng(info.seed)


def batches(root: Path, config: Config, workers: int, device: str) -> Iterator[Any]:
    """Images (B, 3, H, W) and masks (B, 1, H, W), pass after pass."""
    dataset = Masked(images(root, config.model.image_size, config.pretrain.crop_scale), config)
    loader = DataLoader(
        dataset,
        config.pretrain.batch_size,
        shuffle=True,
        num_workers=workers,
        worker_init_fn=_seeded,
        persistent_workers=workers > 0,
        pin_memory=device == "cuda",
        drop_last=True,
    )
    while True:
        yield from loader


class Stem(PiConvStem):
    """RingMo's stem, with what timm's Swin asks of a patch embedding."""

    def __init__(self, img_size: int, patch_size: int, **others: Any) -> None:
        super().__init__(patch_size=patch_size, **others)
        self.grid_size = (img_size // patch_size, img_size // patch_size)


class PlainRingMo(nn.Module):
    """timm's Swin with RingMo's stem and head. Images and masks → the loss."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = SwinTransformer(
            img_size=model.image_size,
            patch_size=model.patch_size,
            num_classes=0,
            embed_dim=model.embed_dim,
            depths=tuple(model.depths),
            num_heads=tuple(model.num_heads),
            window_size=model.window_size,
            embed_layer=Stem,
        )
        self.decoder = nn.Conv2d(self.encoder.num_features, model.stride**2 * 3, 1)
        self.stride = model.stride

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        features = self.encoder.forward_features(images * ~mask).permute(0, 3, 1, 2)
        whole = nn.functional.pixel_shuffle(self.decoder(features), self.stride)
        error = (images.float() - whole.float()).abs() * mask
        return error.sum() / (mask.sum() + 1e-5) / 3


def optimiser(model: nn.Module, weight_decay: float, fused: bool | None = None) -> Any:
    """AdamW without decay on vectors and position tables; its rate is set each step."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        vector = parameter.ndim < 2 or name.endswith("relative_position_bias_table")
        (free if vector else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=fused)
