"""Boxes at any angle around objects: Oriented R-CNN on a feature pyramid of the encoder.

    maps ─oriented RPN─▶ rotated proposals ─rotated RoIAlign─▶ head ─▶ rotated boxes

A proposal is an upright anchor's six numbers: where the box's span lies, and how far its top corner
and its right corner lie from the middles of that span's sides (midpoint offsets). The head corrects
it by five. Boxes are canonical: see `rotated`.

Source: Xie et al., ICCV 2021 (arXiv:2108.05699).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from ringmo.models import rotated
from ringmo.models.backbone import Encoder
from ringmo.models.detector import (
    LEAST,
    MOST,
    POOLED,
    PROPOSALS,
    SCORE_FLOOR,
    Maps,
    Proposals,
    fixed_places,
    head_losses,
    image_list,
    looked_over,
)
from ringmo.tasks.base import Images, Objects

LARGEST = math.log(1000 / 16)  # how much a side may be scaled, as a logarithm
UPRIGHT = 0.1  # pixels by which a box's longer side may lean and still count as upright
# By which what is learnt is divided, so that all of it is of about one size.
MIDPOINTS, CORRECTIONS = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5), (0.1, 0.1, 0.2, 0.2, 0.1)
OVERLAP = 0.1  # of answers of one class; boxes at an angle fit their objects closely
FINEST = 14  # strides of the finest map from whose size on boxes are seen on the next one


def midpoint_offsets(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (n, 5) as anchors (n, 4) would have to say them: (n, 6)."""
    corners, spans = rotated.to_corners(boxes), rotated.to_spans(boxes)
    middle, sides = _middles(spans)
    own, lengths = _middles(anchors)
    first = corners[..., 1].argmin(1)
    each = torch.arange(len(boxes), device=boxes.device)
    # Clockwise, the right corner follows the top one.
    top, right = corners[each, first], corners[each, (first + 1) % 4]
    offsets = torch.stack((top[:, 0], right[:, 1]), 1) - middle
    offsets = offsets / sides.clamp_min(1e-6)
    # Of an upright box, rounding would choose the top corner: it is the right one always.
    tilt = torch.minimum(boxes[:, 4].sin().abs(), boxes[:, 4].cos().abs())
    upright = boxes[:, 2:4].amax(1) * tilt <= UPRIGHT
    offsets = torch.where(upright[:, None], 0.5, offsets)
    values = torch.cat(
        ((middle - own) / lengths, (sides.clamp_min(1e-6) / lengths).log(), offsets), 1
    )
    return values / values.new_tensor(MIDPOINTS)


def from_midpoint_offsets(values: Tensor, anchors: Tensor) -> Tensor:
    """What anchors (..., 4) say with (..., 6): canonical boxes (..., 5).

    The four corners make a parallelogram; its shorter diagonal is drawn out, so that it becomes a
    rectangle.
    """
    values = values * values.new_tensor(MIDPOINTS)
    own, lengths = _middles(anchors)
    middle = own + values[..., :2] * lengths
    half = lengths * values[..., 2:4].clamp(max=LARGEST).exp() / 2
    offsets = values[..., 4:].clamp(-0.5, 0.5) * 2 * half
    top = torch.stack((offsets[..., 0], -half[..., 1]), -1)
    right = torch.stack((half[..., 0], offsets[..., 1]), -1)
    lengths_of = [corner.norm(dim=-1, keepdim=True).clamp_min(1e-6) for corner in (top, right)]
    longer = torch.maximum(*lengths_of)
    top, right = top * longer / lengths_of[0], right * longer / lengths_of[1]
    # From the top corner to the right one, and on to the bottom one, opposite the top one.
    first, second = right - top, -top - right
    sides = torch.stack((first.norm(dim=-1), second.norm(dim=-1)), -1)
    angle = torch.atan2(first[..., 1], first[..., 0])
    return rotated.canonical(torch.cat((middle, sides, angle[..., None]), -1))


def corrections(boxes: Tensor, proposals: Tensor) -> Tensor:
    """What is to be said of proposals (n, 5) so that they become boxes (n, 5): (n, 5).

    Of the two ways to say a box, sides swapped or not, the one that turns less: by 45 degrees at
    most.
    """
    cos, sin = proposals[:, 4].cos(), proposals[:, 4].sin()
    apart = boxes[:, :2] - proposals[:, :2]
    along = (apart[:, 0] * cos + apart[:, 1] * sin) / proposals[:, 2]
    across = (apart[:, 1] * cos - apart[:, 0] * sin) / proposals[:, 3]
    turn = rotated.half_turn(boxes[:, 4] - proposals[:, 4])
    swap = turn.abs() > math.pi / 4
    turn = torch.where(swap, rotated.half_turn(turn + math.pi / 2), turn)
    sides = torch.where(swap[:, None], boxes[:, [3, 2]], boxes[:, 2:4]).clamp_min(1e-6)
    scale = (sides / proposals[:, 2:4]).log()
    values = torch.cat((torch.stack((along, across), 1), scale, turn[:, None]), 1)
    return values / values.new_tensor(CORRECTIONS)


def corrected(values: Tensor, proposals: Tensor) -> Tensor:
    """Proposals (n, 5) with what is said of them (n, 5): canonical boxes."""
    values = values * values.new_tensor(CORRECTIONS)
    cos, sin = proposals[:, 4].cos(), proposals[:, 4].sin()
    along, across = values[:, 0] * proposals[:, 2], values[:, 1] * proposals[:, 3]
    middle = proposals[:, :2] + torch.stack(
        (along * cos - across * sin, along * sin + across * cos), 1
    )
    sides = proposals[:, 2:4] * values[:, 2:4].clamp(max=LARGEST).exp()
    angle = (proposals[:, 4] + values[:, 4])[:, None]
    return rotated.canonical(torch.cat((middle, sides, angle), 1))


def _middles(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Middles and sides of upright boxes (..., 4)."""
    return (spans[..., :2] + spans[..., 2:]) / 2, spans[..., 2:] - spans[..., :2]


class OrientedProposals(Proposals):
    """Anchors are matched by spans, as double proposals are; what they say is a rotated box."""

    def __init__(self, maps: Maps) -> None:
        anchors = maps.anchors().num_anchors_per_location()[0]
        head = RPNHead(maps.channels, anchors)
        head.bbox_pred = nn.Conv2d(maps.channels, 6 * anchors, 1)
        nn.init.normal_(head.bbox_pred.weight, std=0.01)
        nn.init.zeros_(head.bbox_pred.bias)
        super().__init__(maps, head, overlap=0.8)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = list(features.values())
        objectness, values = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        counts = [each[0].numel() for each in objectness]
        likely = torch.cat([_listed(each, 1) for each in objectness], 1)[..., 0].float()
        said = torch.cat([_listed(each, 6) for each in values], 1).float()
        with torch.no_grad():
            boxes = from_midpoint_offsets(said.detach(), torch.stack(anchors))
            proposals = self._chosen(boxes, likely.detach(), counts, images.image_sizes[0])
        if targets is None:
            return proposals, {}
        upright = [{"boxes": target["spans"]} for target in targets]
        labels, _ = self.assign_targets_to_anchors(anchors, upright)
        wanted = [
            self._wanted(own, target, label)
            for own, target, label in zip(anchors, targets, labels, strict=True)
        ]
        first, second = self.compute_loss(likely, said.flatten(0, 1), labels, wanted)
        return proposals, {"objectness": first, "proposal": second}

    def _wanted(self, anchors: Tensor, target: dict[str, Tensor], label: Tensor) -> Tensor:
        """What each anchor should say (n, 6); of those without an object 0."""
        if not len(target["boxes"]):
            return anchors.new_zeros((len(anchors), 6))
        matched = self.proposal_matcher(self.box_similarity(target["spans"], anchors))
        wanted = midpoint_offsets(target["boxes"][matched.clamp_min(0)], anchors)
        return torch.where((label > 0)[:, None], wanted, 0)

    def _chosen(
        self, boxes: Tensor, objectness: Tensor, counts: list[int], size: tuple[int, int]
    ) -> list[Tensor]:
        """Of each image the likeliest proposals whose middle lies in it, without doubles."""
        top = self._get_top_n_idx(objectness, counts)
        levels = torch.repeat_interleave(
            torch.arange(len(counts), device=boxes.device),
            torch.tensor(counts, device=boxes.device),
        )
        chosen = []
        for own, likely, at in zip(boxes, objectness, top, strict=True):
            own, likely, level = own[at], likely[at], levels[at]
            inside = (own[:, 2:4] >= 1e-2).all(1) & (own[:, :2] >= 0).all(1)
            inside &= (own[:, 0] < size[1]) & (own[:, 1] < size[0])
            own, likely, level = own[inside], likely[inside], level[inside]
            kept = batched_nms(rotated.to_spans(own), likely, level, self.nms_thresh)
            chosen.append(own[kept[: self.post_nms_top_n()]])
        return chosen


def _listed(maps: Tensor, values: int) -> Tensor:
    """(B, anchors · values, H, W) → (B, H · W · anchors, values), in the order of the anchors."""
    count, _, height, width = maps.shape
    split = maps.view(count, -1, values, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(count, -1, values)


class OrientedHeads(nn.Module):
    """Rotated proposals → classes, and five corrections for all classes alike."""

    def __init__(self, maps: Maps, classes: int) -> None:
        super().__init__()
        self.strides = list(maps.pyramid.strides)
        hidden = 4 * maps.channels
        self.box_head = TwoMLPHead(maps.channels * POOLED**2, hidden)
        self.cls_score = nn.Linear(hidden, classes + 1)
        self.bbox_pred = nn.Linear(hidden, 5)
        self.matcher = Matcher(0.5, 0.5, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(maps.drawn, PROPOSALS[1])

    def said(self, maps: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (boxes of all images, classes + 1), the first no object, and (…, 5)."""
        seen = self.box_head(self._pooled(maps, boxes))
        return self.cls_score(seen).float(), self.bbox_pred(seen).float()

    def losses(
        self, maps: dict[str, Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        drawn, labels, wanted = [], [], []
        for own, target in zip(proposals, targets, strict=True):
            own = torch.cat((own, target["boxes"]))
            label = torch.zeros(len(own), dtype=torch.int64, device=own.device)
            true = own
            if len(target["boxes"]):
                matched = self.matcher(rotated.pairwise_iou(target["boxes"], own))
                label = torch.where(matched >= 0, target["labels"][matched.clamp_min(0)], 0)
                true = target["boxes"][matched.clamp_min(0)]
            [positive], [negative] = self.sampler([label])
            at = (positive | negative).nonzero()[:, 0]
            drawn.append(own[at])
            labels.append(label[at])
            wanted.append(corrections(true[at], own[at]))
        logits, values = self.said(maps, drawn)
        return head_losses(logits, values, labels, torch.cat(wanted))

    def answers(self, maps: dict[str, Tensor], proposals: list[Tensor]) -> list[dict[str, Tensor]]:
        logits, values = self.said(maps, proposals)
        counts = [len(own) for own in proposals]
        every = torch.split(corrected(values, torch.cat(proposals)), counts)
        likely = torch.split(logits.softmax(-1)[:, 1:], counts)
        found = []
        for boxes, scores in zip(every, likely, strict=True):
            row, label = (scores > SCORE_FLOOR).nonzero().unbind(1)
            best = scores[row, label].argsort(descending=True, stable=True)[: 4 * MOST]
            row, label = row[best], label[best]
            boxes, scores = boxes[row], scores[row, label]
            kept = rotated.nms(boxes, scores, OVERLAP, label)[:MOST]
            found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": label[kept]})
        return found

    def _pooled(self, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """What the map that suits each box's size shows within it: (boxes, C, 7, 7)."""
        parts, places, before = [], [], 0
        finest = FINEST * self.strides[0]
        levels = []
        for own in boxes:
            side = (own[:, 2] * own[:, 3]).clamp_min(1e-6).sqrt()
            levels.append((side / finest).log2().floor().clamp(0, len(self.strides) - 1))
        for number, stride in enumerate(self.strides):
            mine = [(level == number).nonzero()[:, 0] for level in levels]
            cut = [own[at] for own, at in zip(boxes, mine, strict=True)]
            parts.append(rotated.roi_align(maps[str(number)], cut, POOLED, stride))
            before = 0
            for own, at in zip(boxes, mine, strict=True):
                places.append(at + before)
                before += len(own)
        return torch.cat(parts)[torch.cat(places).argsort()]


class OrientedDetector(nn.Module):
    """Images of the encoder's size → rotated boxes; or the losses of images and their objects."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = classes
        self.maps = Maps(encoder)
        self.rpn = OrientedProposals(self.maps)
        self.heads = OrientedHeads(self.maps, classes)

    def forward(self, images: Images, objects: list[Objects] | None = None) -> Any:
        """Answers of each image: boxes (n, 5), scores (n,) and labels (n,), by falling score.

        With the images' objects what it costs to learn them (`losses`).
        """
        if objects is not None:
            return self.losses(images, objects)
        maps = self.maps(self.encoder.stages(images))
        proposals, _ = self.rpn(image_list(images), maps)
        return self.heads.answers(maps, proposals)

    def losses(self, images: Images, objects: list[Objects]) -> dict[str, Tensor]:
        """What the images cost on average, in training mode: scalars.

        Objects are their smallest rectangles, which may reach beyond the image. Those whose middle
        lies outside, or of which a side is shorter than LEAST, are left out. Difficult ones are
        learnt like all others.
        """
        listed, maps = image_list(images), self.maps(self.encoder.stages(images))
        targets = [_target(one, listed.image_sizes[0]) for one in objects]
        proposals, first = self.rpn(listed, maps, targets)
        return {**first, **self.heads.losses(maps, proposals, targets)}

    def signature(self, images: Images) -> Tensor:
        """What the parts say of fixed places, (B, n): nothing in it is chosen or sorted."""
        listed, maps = image_list(images), self.maps(self.encoder.stages(images))
        places = fixed_places(listed.image_sizes[0], listed.tensors)
        boxes = rotated.from_spans(places)
        logits, _ = self.heads.said(maps, [boxes] * len(listed.tensors))
        return looked_over(self.rpn, maps, logits)


def _target(objects: Objects, size: tuple[int, int]) -> dict[str, Tensor]:
    boxes = rotated.from_corners(objects.corners.float())
    limit = boxes.new_tensor([size[1], size[0]])
    inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, :2] <= limit).all(1)
    kept = inside & (boxes[:, 2:4] >= LEAST).all(1)
    boxes = boxes[kept]
    return {
        "boxes": boxes,
        "spans": rotated.to_spans(boxes),
        "labels": objects.labels[kept] + 1,
    }
