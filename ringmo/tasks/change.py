"""Change: which pixels differ between two dates. Both pass one encoder; their features' difference
goes through UPerNet."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.errors import BadInput
from ringmo.evaluation import dense
from ringmo.tasks.base import UNKNOWN, Evidence, Figures, Sample
from ringmo.tasks.dense import NOBODY_KNOWS, MaskTask, coloured, fitted

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles
    from ringmo.models.backbone import Encoder

CLASSES = ["unchanged", "changed"]
CHANGED = 1  # in masks
# What the answer is beside the truth: found, false, missed (green, orange, blue of Okabe and Ito).
FOUND, FALSE, MISSED = (0, 158, 115), (213, 94, 0), (86, 180, 233)


class Change(MaskTask):
    name = "change"
    parts = ("mask", "second")
    metric = "f1"
    shows = "before, after, truth, answer, and of it right (green), false (orange), missed (blue)"
    columns: ClassVar[dict[str, str]] = {**MaskTask.columns, "second": "string"}

    def usable(self, tiles: "pd.DataFrame") -> "pd.Series[bool]":
        return (tiles["mask_size"] > 0) & tiles["second"].notna()

    def classes(self, train: "SelectedTiles", settings: "Finetune") -> list[str]:
        if not len(train):
            raise BadInput(
                "no pair of two dates with a mask to train on: put both dates and masks of what "
                "changed into three folders (A, B, label), and ingest again"
            )
        table = train.table[["key", "mask_coding", "mask_names"]]
        for _, (key, coding, names) in table.iterrows():
            if len(names) != 2:
                raise BadInput(
                    f"tile {key}: its mask, coded `{coding}`, has {len(names)} classes: one of "
                    f"change has two, unchanged and changed: see ingest.mask_codings"
                )
        return list(CLASSES)

    def mask_names(self, tiles: "SelectedTiles") -> list[list[str]]:
        """A change is one whatever its coding calls it."""
        return [CLASSES] * len(tiles)

    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        from ringmo.models.upernet import Siamese

        return Siamese(encoder, classes)

    def figures(
        self, evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
    ) -> Figures:
        """Of what changed: f1, iou, precision, recall, boundary_f1; and the accuracy."""
        both = dense.mask_figures(evidence, classes, weights)
        return Figures(dense.object_figures(evidence, CHANGED, weights), both.classes)

    def trivial(
        self,
        train: "SelectedTiles",
        sample: Sample,
        classes: Sequence[str],
        settings: "Finetune",
    ) -> Tensor:
        """Nothing changed."""
        return self.always(1 - CHANGED, sample, classes)

    def shown(
        self,
        images: Sequence[NDArray[np.uint8]],
        answer: Any,
        sample: Sample,
        at: int,
        classes: Sequence[str],
    ) -> list[NDArray[np.uint8]]:
        """Both dates, the mask, the answer, and what of it is right.

        In the last, green is found, orange said but false, blue missed, grey unknown.
        """
        assert sample.mask is not None
        truth, said = sample.mask[at].cpu().numpy(), answer[at].argmax(0).cpu().numpy()
        dates = [fitted(image, sample.size) for image in images]
        return [*dates, coloured(truth), coloured(said), hits(truth, said)]

    def quality(self, evidence: Evidence, classes: Sequence[str]) -> NDArray[np.float64]:
        """Each tile's F1 of what changed, smoothed: 1 where nothing did and nothing was said."""
        return dense.tile_f1(evidence, CHANGED)


def hits(truth: NDArray[Any], said: NDArray[Any]) -> NDArray[np.uint8]:
    """Where the answer is right and wrong: (H, W, 3)."""
    picture = np.full((*truth.shape, 3), 255, np.uint8)
    picture[(truth == CHANGED) & (said == CHANGED)] = FOUND
    picture[(truth != CHANGED) & (said == CHANGED)] = FALSE
    picture[(truth == CHANGED) & (said != CHANGED)] = MISSED
    picture[truth == UNKNOWN] = NOBODY_KNOWS
    return picture


TASK = Change()
