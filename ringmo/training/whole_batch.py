"""Layers that look at the whole batch, made so that several ranks compute what one would.

BatchNorm takes its statistics over all ranks; drop path draws for the global batch and each rank
takes its own images' draws. Both are converted after a model is built, names of weights stay.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """Σ over ranks. Every rank's loss depends on every rank's term: gradients are summed too."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class RanksBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks, of which each has the same number.

    For CPUs; on GPUs torch's SyncBatchNorm does it.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        ranks, over = dist.get_world_size(), (0, 2, 3)
        mean = _sum(images.mean(over)) / ranks
        centred = images - mean[None, :, None, None]
        variance = _sum(centred.square().mean(over)) / ranks
        count = images.numel() // images.shape[1] * ranks
        with torch.no_grad():
            momentum = cast("float", self.momentum)
            cast("Tensor", self.running_mean).lerp_(mean, momentum)
            cast("Tensor", self.running_var).lerp_(variance * count / (count - 1), momentum)
            cast("Tensor", self.num_batches_tracked).add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[None, :, None, None] + self.bias[None, :, None, None]


def _sum(value: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(value)
    return total


class ToldDropPath(DropPath):  # type: ignore[misc]
    """Drop path that is told, before each forward pass, by how much to scale each image."""

    scale: Tensor | None = None  # (B,): 0, or 1 / (1 - drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        if self.scale is None:
            return cast("Tensor", super().forward(x))  # nothing was told: it draws by itself
        kept: Tensor = x * self.scale.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
        return kept


def convert(model: nn.Module, ranks: int) -> None:
    """Make BatchNorm and drop path those of all ranks; weights and their names stay."""
    if ranks > 1 and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    for module in list(model.modules()):
        if ranks > 1 and type(module) is nn.BatchNorm2d:
            module.__class__ = RanksBatchNorm  # the same parameters and buffers, another forward
        elif type(module) is DropPath:
            module.__class__ = ToldDropPath


def drop_paths(model: nn.Module) -> list[ToldDropPath]:
    return [module for module in model.modules() if isinstance(module, ToldDropPath)]


def drop_path_scales(
    paths: list[ToldDropPath], batch: int, images: slice, random: np.random.Generator
) -> Tensor:
    """A scale for each path and each of these images of the global batch: float32 (paths, n)."""
    kept = 1 - np.array([path.drop_prob for path in paths], np.float32)[:, None]
    draws = random.random((len(paths), batch), np.float32)[:, images]
    return torch.from_numpy(np.ascontiguousarray((draws < kept) / kept, np.float32))


def statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass in training changes."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [b for m in model.modules() if isinstance(m, kinds) for b in m.buffers()]
