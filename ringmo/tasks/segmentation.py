"""Segmentation: the class of each pixel. The encoder's features through UPerNet."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.errors import BadInput
from ringmo.evaluation import dense
from ringmo.tasks.base import Evidence, Figures, Sample
from ringmo.tasks.dense import MaskTask, colour, coloured, fitted

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles
    from ringmo.models.backbone import Encoder


class Segmentation(MaskTask):
    name = "segmentation"
    metric = "miou"

    def usable(self, tiles: "pd.DataFrame") -> "pd.Series[bool]":
        return (tiles["mask_size"] > 0) & tiles["second"].isna()

    def classes(self, train: "SelectedTiles", settings: "Finetune") -> list[str]:
        """Those that the training masks' codings have, in the order of the first, then new ones."""
        names = list(dict.fromkeys(name for names in self.mask_names(train) for name in names))
        if len(names) < 2:
            raise BadInput(
                f"{len(train)} tiles with a mask to train on, of {len(names)} classes: put masks "
                f"of two or more classes beside images, and ingest again"
            )
        return names

    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        from ringmo.models.upernet import Dense

        return Dense(encoder, classes)

    def figures(
        self, evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
    ) -> Figures:
        return dense.mask_figures(evidence, classes, weights)

    def trivial(
        self,
        train: "SelectedTiles",
        sample: Sample,
        classes: Sequence[str],
        settings: "Finetune",
    ) -> Tensor:
        """The class of most training pixels everywhere."""
        return self.always(int(self.pixels(train, classes).argmax()), sample, classes)

    def shown(
        self,
        images: Sequence[NDArray[np.uint8]],
        answer: Any,
        sample: Sample,
        at: int,
        classes: Sequence[str],
    ) -> list[NDArray[np.uint8]]:
        """The image, its mask, the answer."""
        assert sample.mask is not None
        truth, said = sample.mask[at].cpu().numpy(), answer[at].argmax(0).cpu().numpy()
        return [fitted(images[0], sample.size), coloured(truth), coloured(said)]

    def legend(self, classes: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
        return [(name, colour(number)) for number, name in enumerate(classes)]

    def quality(self, evidence: Evidence, classes: Sequence[str]) -> NDArray[np.float64]:
        """Each tile's mean IoU over the classes that it has."""
        return dense.tile_miou(evidence)


TASK = Segmentation()
