"""Detection: upright boxes around objects.

Figures are COCO's: precision at 101 recalls, objects by their area in pixels.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.evaluation.average_precision import Curves, mean
from ringmo.tasks.base import Objects, spans
from ringmo.tasks.objects import Found, ObjectTask

if TYPE_CHECKING:
    from ringmo.config import Finetune
    from ringmo.models.backbone import Encoder

OVERLAP = 0.5  # from which on two answers of a class are one, as in Faster R-CNN


class Detection(ObjectTask):
    name = "detection"
    matching: ClassVar[Literal["coco", "voc"]] = "coco"

    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        from ringmo.models.detector import Detector

        return Detector(encoder, classes)

    def corners(self, boxes: Tensor) -> Tensor:
        left, top, right, bottom = boxes.unbind(-1)
        around = (left, top, right, top, right, bottom, left, bottom)
        return torch.stack(around, -1).view(-1, 4, 2)

    def true(self, objects: Objects, size: int) -> Objects:
        """What the corners span within the image; what has no area there cannot be found."""
        boxes = objects.boxes.clamp(0, size)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return Objects(self.corners(boxes[seen]), objects.labels[seen], objects.difficult[seen])

    def overlap(self, first: Tensor, second: Tensor) -> Tensor:
        from torchvision.ops import box_iou

        overlap: Tensor = box_iou(spans(first), spans(second))
        return overlap

    @property
    def double(self) -> float:
        return OVERLAP

    def paired_overlap(self, first: Tensor, second: Tensor) -> Tensor:
        one, other = spans(first), spans(second)
        low, high = torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])
        both = (high - low).clamp(min=0).prod(1)
        return both / (self.areas(first) + self.areas(second) - both)

    def single(self, found: Found) -> Tensor:
        from torchvision.ops import batched_nms

        kept: Tensor = batched_nms(found.boxes, found.scores, found.labels, self.double)
        return kept

    def areas(self, corners: Tensor) -> Tensor:
        boxes = spans(corners)
        return (boxes[:, 2:] - boxes[:, :2]).prod(1)

    def whole(self, curves: Curves) -> tuple[dict[str, float], NDArray[np.float64]]:
        precise = curves.average_precision("coco")
        figures = {
            "map50": mean(precise[0, 0]),
            "map50_95": mean(precise[0]),
            **{
                f"map50_{size}": mean(precise[number, 0])
                for number, size in enumerate(("small", "medium", "large"), 1)
            },
        }
        return figures, precise[0, 0]


TASK = Detection()
