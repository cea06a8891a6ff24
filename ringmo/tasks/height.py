"""Height: metres of each pixel. The encoder's features through UPerNet, one number a pixel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.errors import BadInput
from ringmo.evaluation import dense
from ringmo.tasks.base import Evidence, Figures, Sample
from ringmo.tasks.dense import NOBODY_KNOWS, DenseTask, fitted, known_mean

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles
    from ringmo.models.backbone import Encoder

LEAST_UNIT_M = 0.1  # of tiles that are flat
LEAST_SPAN_M = 1.0  # of a picture's colours: where all is flat, an error of centimetres is no peak
# Colours of heights from low to high, at even steps: matplotlib's viridis (CC0).
VIRIDIS = (
    *((68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139)),
    *((51, 99, 141), (44, 114, 142), (38, 130, 142), (33, 145, 140)),
    *((31, 160, 136), (40, 174, 128), (63, 188, 115), (94, 201, 98)),
    *((132, 212, 75), (173, 220, 48), (216, 226, 25), (253, 231, 37)),
)


class Height(DenseTask):
    """Answers are metres: float32 (B, S, S)."""

    name = "height"
    parts = ("height",)
    metric = "mae"
    lower = frozenset({"mae", "rmse"})
    metres = frozenset({"mae", "rmse"})
    columns: ClassVar[dict[str, str]] = {"height_hash": "string"}

    def usable(self, tiles: "pd.DataFrame") -> "pd.Series[bool]":
        if "height_size" not in tiles:  # of a store before there were heights
            return tiles["key"].isna()
        return tiles["height_size"] > 0

    def classes(self, train: "SelectedTiles", settings: "Finetune") -> list[str]:
        if not len(train):
            raise BadInput(
                "no tile with heights to train on: put a height model beside images, and ingest "
                "again"
            )
        return []

    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        from ringmo.models.upernet import Heights

        return Heights(encoder)

    def prepare(
        self, model: Any, train: "SelectedTiles", classes: Sequence[str], settings: "Finetune"
    ) -> None:
        """Mean and deviation of the training tiles' heights: what the model's numbers mean."""
        mean, deviation = spread(train, settings.heights)
        model.mean_m.fill_(mean)
        model.unit_m.fill_(max(deviation, LEAST_UNIT_M))

    def loss(self, model: Any, sample: Sample, settings: "Finetune") -> Tensor:
        """The absolute error, in the model's unit."""
        assert sample.height is not None
        known = ~sample.height.isnan()
        error = (model(sample.images) - torch.nan_to_num(sample.height)).abs()
        return known_mean(error / model.unit_m, known)

    def said(self, output: Tensor) -> Tensor:
        return output.float()

    def evidence(self, answer: Tensor, sample: Sample) -> Evidence:
        assert sample.height is not None
        return dense.heights(sample.height, answer)

    def figures(
        self, evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
    ) -> Figures:
        return Figures(dense.height_figures(evidence, weights))

    def trivial(
        self,
        train: "SelectedTiles",
        sample: Sample,
        classes: Sequence[str],
        settings: "Finetune",
    ) -> Tensor:
        """The mean of the training tiles' heights."""
        assert sample.height is not None
        mean, _ = spread(train, settings.heights)
        return torch.full_like(sample.height, mean)

    def told(self, answer: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """height: float32 (S, S), metres."""
        return [{"height": height} for height in answer.cpu().numpy()]

    def shown(
        self,
        images: Sequence[NDArray[np.uint8]],
        answer: Any,
        sample: Sample,
        at: int,
        classes: Sequence[str],
    ) -> list[NDArray[np.uint8]]:
        """The image, its heights and the answer, from low (violet) to high (yellow)."""
        assert sample.height is not None
        truth, said = sample.height[at].cpu().numpy(), answer[at].cpu().numpy()
        known = truth[~np.isnan(truth)]
        low, high = np.percentile(known if known.size else said, (2, 98))
        return [
            fitted(images[0], sample.size),
            *(coloured(each, low, high) for each in (truth, said)),
        ]

    def quality(self, evidence: Evidence, classes: Sequence[str]) -> NDArray[np.float64]:
        """Each tile's mean absolute error, in metres, below 0."""
        pixels = evidence["height_pixels"]
        error = -evidence["height_error"] / np.maximum(pixels, 1)
        return np.where(pixels > 0, error, np.nan)


def spread(train: "SelectedTiles", heights: str) -> tuple[float, float]:
    """Mean and deviation, in metres, of the training tiles' heights; a tile counts as any other.

    Args:
        heights: `above_lowest`: above the lowest of each tile.
    """
    table = train.table
    mean, std = (table[name].to_numpy(np.float64) for name in ("height_mean", "height_std"))
    if heights == "above_lowest":
        mean = mean - table["height_min"].to_numpy(np.float64)
    known = ~np.isnan(mean)
    if not known.any():
        return 0.0, 1.0
    mean, std = mean[known], std[known]
    return float(mean.mean()), float(np.sqrt((std**2).mean() + mean.var()))


def coloured(heights: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Heights (H, W) as a picture (H, W, 3); grey where nobody knows."""
    share = np.clip((heights - low) / max(high - low, LEAST_SPAN_M), 0, 1)
    steps = np.linspace(0, 1, len(VIRIDIS))
    bands = [np.interp(np.nan_to_num(share), steps, [c[i] for c in VIRIDIS]) for i in range(3)]
    picture = np.rint(np.stack(bands, 2)).astype(np.uint8)
    picture[np.isnan(heights)] = NOBODY_KNOWS
    return picture


TASK = Height()
