"""Upright boxes around objects: Faster R-CNN on a feature pyramid of the encoder.

    images ─encoder─▶ stages ─Pyramid─▶ scales ─FPN─▶ maps ─RPN─▶ proposals ─RoI heads─▶ boxes

torchvision's parts, made for small objects: anchors are from 4 strides long, and the pyramid goes
on until one spans the image. What a loss takes from an image is weighted so that each image counts
the same, however many samples it had.

Source: Ren et al., NeurIPS 2015; Lin et al., CVPR 2017.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from ringmo.models.backbone import Encoder
from ringmo.models.pyramid import Pyramid
from ringmo.tasks.base import Images, Objects

ANCHOR = 4  # strides of its map that an anchor is long; and √2 as many
RATIOS = (0.5, 1.0, 2.0)  # of its height and width
POOLED = 7  # places a side at which a head sees a box
SCORE_FLOOR = 0.01  # average precision is of all answers, not only of the sure ones
MOST = 500  # answers an image; tiles of parked cars and ships have hundreds
LEAST = 1.0  # pixels of a side that an object must have to be learnt
ANCHORS = 256, 0.5  # of an image that are learnt from, and how many of them at most are objects
PROPOSALS = 512, 0.25  # the same of proposals
BEFORE, AFTER = 2000, 1000  # proposals of a map, and of an image once doubles are gone


class Maps(nn.Module):
    """Images → the encoder's pyramid as maps of one width, finest first, with names.

    Maps of twice the last one's stride follow until ANCHOR strides span the image.

    channels: of each map. strides: in pixels. drawn: proposals of an image that are learnt from;
    proposals: of an image that there are. A small image has room for fewer.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.pyramid = Pyramid(encoder)
        # As wide as usual (256) on a usual encoder, narrower on a narrow one.
        self.channels = min(256, max(64, encoder.num_features // 2))
        norm = partial(nn.GroupNorm, 16)
        self.fpn = FeaturePyramidNetwork(self.pyramid.channels, self.channels, norm_layer=norm)
        self.drawn = min(PROPOSALS[0], max(64, encoder.image_size))
        self.proposals = min(AFTER, 4 * self.drawn)
        self.strides = list(self.pyramid.strides)
        while ANCHOR * self.strides[-1] < encoder.image_size:
            self.strides.append(2 * self.strides[-1])

    def forward(self, stages: list[Tensor]) -> "OrderedDict[str, Tensor]":
        scales = self.pyramid(stages)
        maps: OrderedDict[str, Tensor] = self.fpn(
            OrderedDict((str(i), scale) for i, scale in enumerate(scales))
        )
        for i in range(len(maps), len(self.strides)):
            last = maps[str(i - 1)]
            maps[str(i)] = nn.functional.max_pool2d(last, 1, 2)
        return maps

    def anchors(self) -> AnchorGenerator:
        sizes = tuple((ANCHOR * stride, round(ANCHOR * stride * 2**0.5)) for stride in self.strides)
        return AnchorGenerator(sizes, (RATIOS,) * len(sizes))


def image_list(images: Images) -> ImageList:
    """What torchvision asks of images: their size."""
    first = next(iter(images.values()))
    height, width = first.shape[-2:]
    return ImageList(first, [(int(height), int(width))] * len(first))


class Proposals(RegionProposalNetwork):  # type: ignore[misc]  # torchvision has no types
    """torchvision's, with a loss in which each image counts the same."""

    def __init__(self, maps: Maps, head: nn.Module | None = None, overlap: float = 0.7) -> None:
        anchors = maps.anchors()
        if head is None:
            head = RPNHead(maps.channels, anchors.num_anchors_per_location()[0])
        before, after = (
            {"training": count, "testing": count} for count in (BEFORE, maps.proposals)
        )
        super().__init__(anchors, head, 0.7, 0.3, *ANCHORS, before, after, overlap)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        count = len(labels)
        positive, negative = (torch.stack(drawn).bool() for drawn in self.fg_bg_sampler(labels))
        drawn = (positive | negative).float()
        weight = drawn / drawn.sum(1, keepdim=True).clamp_min(1) / count
        wanted = torch.stack(labels)
        said = binary_cross_entropy_with_logits(
            objectness.float().view(count, -1), wanted.clamp_min(0), reduction="none"
        )
        # What has no object has no finite target.
        at = positive[..., None]
        targets = torch.where(at, torch.stack(regression_targets), 0)
        deltas = torch.where(at, pred_bbox_deltas.float().view(targets.shape), 0)
        off = smooth_l1_loss(deltas, targets, beta=1 / 9, reduction="none").sum(-1)
        return (said * weight).sum(), (off * weight).sum()


class Heads(RoIHeads):  # type: ignore[misc]  # torchvision has no types
    """torchvision's, with a loss in which each image counts the same."""

    def __init__(self, maps: Maps, classes: int) -> None:
        names = [str(i) for i in range(len(maps.pyramid.strides))]
        hidden = 4 * maps.channels
        super().__init__(
            MultiScaleRoIAlign(names, POOLED, 2),
            TwoMLPHead(maps.channels * POOLED**2, hidden),
            FastRCNNPredictor(hidden, classes + 1),
            0.5,
            0.5,
            maps.drawn,
            PROPOSALS[1],
            None,
            SCORE_FLOOR,
            0.5,
            MOST,
        )

    def said(
        self,
        maps: dict[str, Tensor],
        boxes: list[Tensor],
        shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """Logits (boxes, classes + 1), the first no object, and deltas (boxes, classes + 1, 4)."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(maps, boxes, shapes)))
        return logits.float(), deltas.float().view(len(logits), -1, 4)

    def losses(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        drawn, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.said(maps, drawn, shapes)
        label = torch.cat(labels)
        own = deltas[torch.arange(len(label), device=label.device), label]
        return head_losses(logits, own, labels, torch.cat(wanted))


def head_losses(
    logits: Tensor, deltas: Tensor, labels: list[Tensor], wanted: Tensor
) -> dict[str, Tensor]:
    """What each image's samples cost on average, and that for all images.

    Args:
        logits: (N, classes + 1). deltas, wanted: (N, values). labels: of each image (n,), 0 where
            there is no object.
    """
    label = torch.cat(labels)
    weight = torch.cat([one.new_full((len(one),), 1, dtype=torch.float32) / max(len(one), 1)
                        for one in labels]) / len(labels)  # fmt: skip
    at = (label > 0)[:, None]
    off = smooth_l1_loss(
        torch.where(at, deltas, 0), torch.where(at, wanted, 0), beta=1 / 9, reduction="none"
    ).sum(-1)
    said = cross_entropy(logits, label, reduction="none")
    return {"class": (said * weight).sum(), "box": (off * weight).sum()}


class Detector(nn.Module):
    """Images of the encoder's size → boxes; or the losses of images and their objects."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = classes
        self.maps = Maps(encoder)
        self.rpn = Proposals(self.maps)
        self.heads = Heads(self.maps, classes)

    def forward(self, images: Images, objects: list[Objects] | None = None) -> Any:
        """Answers of each image: boxes (n, 4), scores (n,) and labels (n,), by falling score.

        With the images' objects what it costs to learn them (`losses`).
        """
        if objects is not None:
            return self.losses(images, objects)
        listed, maps = image_list(images), self.maps(self.encoder.stages(images))
        proposals, _ = self.rpn(listed, maps)
        logits, deltas = self.heads.said(maps, proposals, listed.image_sizes)
        found = self.heads.postprocess_detections(
            logits, deltas.flatten(1), proposals, listed.image_sizes
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": labels - 1}
            for boxes, scores, labels in zip(*found, strict=True)
        ]

    def losses(self, images: Images, objects: list[Objects]) -> dict[str, Tensor]:
        """What the images cost on average, in training mode: scalars.

        Objects are cut off at the image's edge; what is left must be LEAST wide and high. Difficult
        ones are learnt like all others.
        """
        listed, maps = image_list(images), self.maps(self.encoder.stages(images))
        size = listed.image_sizes[0]
        targets = [_target(one, size) for one in objects]
        proposals, first = self.rpn(listed, maps, targets)
        second = self.heads.losses(maps, proposals, listed.image_sizes, targets)
        return {
            "objectness": first["loss_objectness"],
            "proposal": first["loss_rpn_box_reg"],
            **second,
        }

    def signature(self, images: Images) -> Tensor:
        """What the parts say of fixed places, (B, n): nothing in it is chosen or sorted."""
        listed, maps = image_list(images), self.maps(self.encoder.stages(images))
        boxes = fixed_places(listed.image_sizes[0], listed.tensors)
        logits, _ = self.heads.said(maps, [boxes] * len(listed.tensors), listed.image_sizes)
        return looked_over(self.rpn, maps, logits)


def fixed_places(size: tuple[int, int], like: Tensor) -> Tensor:
    """Boxes (5, 4): the whole image and its quarters."""
    height, width = size
    shares = [(0, 0, 1, 1), (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
    scale = like.new_tensor([width, height, width, height], dtype=torch.float32)
    return like.new_tensor(shares, dtype=torch.float32) * scale


def looked_over(rpn: RegionProposalNetwork, maps: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Probabilities of classes at `fixed_places`, and of an object, map by map: (B, n)."""
    objectness, _ = rpn.head(list(maps.values()))
    likely = [each.float().sigmoid().mean((2, 3)) for each in objectness]
    return torch.cat([*likely, logits.softmax(-1).view(len(likely[0]), -1)], 1)


def _target(objects: Objects, size: tuple[int, int]) -> dict[str, Tensor]:
    height, width = size
    boxes = objects.boxes
    limit = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(boxes.clamp_min(0), limit)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(1)
    return {"boxes": boxes[kept], "labels": objects.labels[kept] + 1}
