"""Oriented detection: boxes at any angle around objects.

Figures are DOTA's: VOC's matching, the whole area below the curve, and for old tables 11 recalls.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.evaluation.average_precision import Curves, mean
from ringmo.tasks.base import Objects
from ringmo.tasks.objects import Found, ObjectTask

if TYPE_CHECKING:
    from ringmo.config import Finetune
    from ringmo.models.backbone import Encoder


class Oriented(ObjectTask):
    name = "oriented"
    matching: ClassVar[Literal["coco", "voc"]] = "voc"

    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        from ringmo.models.oriented import OrientedDetector

        return OrientedDetector(encoder, classes)

    def corners(self, boxes: Tensor) -> Tensor:
        from ringmo.models.rotated import to_corners

        return to_corners(boxes)

    def true(self, objects: Objects, size: int) -> Objects:
        """Smallest rectangles around the corners.

        One without area cannot be found; one whose middle lies outside need not be.
        """
        from ringmo.models.rotated import from_corners, to_corners

        boxes = from_corners(objects.corners)
        there = (boxes[:, 2:4] > 0).all(1)
        outside = ((boxes[:, :2] < 0) | (boxes[:, :2] > size)).any(1)
        return Objects(
            to_corners(boxes[there]),
            objects.labels[there],
            (objects.difficult | outside)[there],
        )

    def overlap(self, first: Tensor, second: Tensor) -> Tensor:
        from ringmo.models.rotated import from_corners, pairwise_iou

        return pairwise_iou(from_corners(first), from_corners(second))

    @property
    def double(self) -> float:
        from ringmo.models.oriented import OVERLAP

        return OVERLAP

    def paired_overlap(self, first: Tensor, second: Tensor) -> Tensor:
        from ringmo.models.rotated import from_corners, paired_iou

        return paired_iou(from_corners(first), from_corners(second))

    def single(self, found: Found) -> Tensor:
        from ringmo.models.rotated import from_corners, nms

        return nms(from_corners(found.corners), found.scores, self.double, found.labels)

    def areas(self, corners: Tensor) -> Tensor:
        from ringmo.models.rotated import from_corners

        return from_corners(corners)[:, 2:4].prod(1)

    def whole(self, curves: Curves) -> tuple[dict[str, float], NDArray[np.float64]]:
        precise = curves.average_precision("area")[0, 0]
        older = curves.average_precision("voc07")[0, 0]
        return {"map50": mean(precise), "map50_voc07": mean(older)}, precise


TASK = Oriented()
