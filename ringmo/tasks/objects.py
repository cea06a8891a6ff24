"""What tasks that look for objects share: answers, windows, turns, figures and pictures.

An answer is found objects, image by image. All of them have four corners: those of an upright box
are its span's. So windows, turns and pictures are the same for upright boxes and rotated ones.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo.errors import BadInput
from ringmo.evaluation import average_precision
from ringmo.evaluation.average_precision import RIGHT, WRONG, Curves
from ringmo.tasks.base import Evidence, Figures, Images, Objects, Sample, Task, spans
from ringmo.tasks.dense import colour, window_starts, windows

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles

TOLD = 0.05  # score from which on a user gets an object; below, one in twenty would be right
SURE = 0.5  # score from which on pictures show an answer, and a tile's quality counts it
AT_EDGE = 2.0  # pixels from a window's edge within which a box is taken to go on beyond it
SHOWN = 256  # pixels a side that a picture has, or up to twice as many
INK = (255, 255, 255)


@dataclass
class Found:
    """What a model says of one image.

    corners: float32 (n, 4, 2), x and y in pixels, clockwise on the screen. scores: float32 (n,),
    from 0 to 1, falling. labels: int64 (n,). size: pixels of the image's sides.
    """

    corners: Tensor
    scores: Tensor
    labels: Tensor
    size: int

    @property
    def boxes(self) -> Tensor:
        return spans(self.corners)

    def taken(self, which: Tensor) -> "Found":
        return Found(self.corners[which], self.scores[which], self.labels[which], self.size)


Answer = list[Found]


class ObjectTask(Task):
    """Answers are a list with one `Found` an image."""

    parts: ClassVar[tuple[str, ...]] = ("boxes",)
    metric = "map50"
    shows = "truth (crossed out: missed), answer (crossed out: wrong)"
    columns: ClassVar[dict[str, str]] = {"boxes_hash": "string", "boxes_classes": "strings"}
    matching: ClassVar[Literal["coco", "voc"]]

    @abstractmethod
    def corners(self, boxes: Tensor) -> Tensor:
        """The model's boxes (n, …) as corners (n, 4, 2)."""

    @abstractmethod
    def true(self, objects: Objects, size: int) -> Objects:
        """The objects of an image as they can be found: with the corners of a perfect answer."""

    @abstractmethod
    def overlap(self, first: Tensor, second: Tensor) -> Tensor:
        """Of corners (n, 4, 2) and (m, 4, 2), intersection over union: (n, m)."""

    @property
    @abstractmethod
    def double(self) -> float:
        """Overlap beyond which two answers of a class are one."""

    @abstractmethod
    def paired_overlap(self, first: Tensor, second: Tensor) -> Tensor:
        """Of each of corners (n, 4, 2) with its partner, intersection over union: (n,)."""

    @abstractmethod
    def single(self, found: Found) -> Tensor:
        """Which objects stay when double ones of a class go: int64, by falling score."""

    @abstractmethod
    def whole(self, curves: Curves) -> tuple[dict[str, float], NDArray[np.float64]]:
        """The metrics, and each class's average precision at an overlap of 0.5: (classes,)."""

    @abstractmethod
    def areas(self, corners: Tensor) -> Tensor:
        """Square pixels of corners (n, 4, 2): (n,)."""

    def usable(self, tiles: "pd.DataFrame") -> "pd.Series[bool]":
        # Also tiles without an object, where somebody has looked for them.
        return tiles["boxes_size"] > 0

    def classes(self, train: "SelectedTiles", settings: "Finetune") -> list[str]:
        names = {str(name) for names in train.table["boxes_classes"] for name in names}
        if not names:
            raise BadInput(
                f"{len(train)} tiles with boxes to train on, and no object in any: ingest images "
                f"with boxes (VOC or FAIR1M XML, DOTA text) beside them"
            )
        return sorted(names)

    def loss(self, model: Any, sample: Sample, settings: "Finetune") -> Tensor:
        assert sample.objects is not None
        # By `forward`, which is what joins the gradients of several processes.
        losses = model(sample.images, sample.objects)
        return torch.stack(list(losses.values())).sum()

    def answer(self, model: Any, images: Images) -> Answer:
        size, side = int(model.encoder.image_size), next(iter(images.values())).shape[-1]
        if side == size:
            return [self._found(said, side) for said in model(images)]
        return self._windowed(model, images, size, side)

    def _found(self, said: Mapping[str, Tensor], size: int) -> Found:
        return Found(self.corners(said["boxes"]), said["scores"], said["labels"], size)

    def _windowed(self, model: Any, images: Images, size: int, side: int) -> Answer:
        """From windows that overlap; what two of them found goes once.

        What a window's edge cuts and its neighbour sees whole is the neighbour's to say.
        """
        starts = window_starts(side, size)
        parts: list[list[Found]] = [[] for _ in next(iter(images.values()))]
        for some, cut in windows(images, size):
            for (image, row, column), said in zip(some, model(cut), strict=True):
                found = self._found(said, side)
                corner = found.corners.new_tensor([starts[column], starts[row]])
                found.corners = found.corners + corner
                boxes = found.boxes
                own = [
                    own_boxes(boxes[:, axis], boxes[:, axis + 2], starts, step, size)
                    for axis, step in ((0, column), (1, row))
                ]
                parts[image].append(found.taken(own[0] & own[1]))
        return [self._together(part) for part in parts]

    def _together(self, parts: Sequence[Found]) -> Found:
        every = Found(
            torch.cat([part.corners for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.labels for part in parts]),
            parts[0].size,
        )
        return every.taken(self.single(every))

    def turned_back(self, answers: Sequence[Answer], turns: Sequence[int]) -> Answer:
        back = [
            [corners_turned_back(found, turn) for found in answer]
            for answer, turn in zip(answers, turns, strict=True)
        ]
        return [self._together(parts) for parts in zip(*back, strict=True)]

    def evidence(self, answer: Answer, sample: Sample) -> Evidence:
        """As `average_precision` has it."""
        assert sample.objects is not None
        tiles = []
        for found, objects in zip(answer, sample.objects, strict=True):
            true = self.true(objects, found.size)
            ours = average_precision.Instances(
                found.labels.cpu().numpy(),
                self.areas(found.corners).double().cpu().numpy(),
                found.scores.double().cpu().numpy(),
            )
            theirs = average_precision.Instances(
                true.labels.cpu().numpy(),
                self.areas(true.corners).double().cpu().numpy(),
                difficult=true.difficult.cpu().numpy(),
            )
            overlap = self.overlap(found.corners, true.corners).double().cpu().numpy()
            tiles.append((ours, theirs, overlap))
        return average_precision.evidence(tiles, self.matching)

    def figures(
        self, evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
    ) -> Figures:
        """A class's best F1 is at an overlap of 0.5; `threshold` is the score that gives it."""
        ranked = average_precision.ranked(evidence)
        curves = ranked.curves(weights)
        whole, precise = self.whole(curves)
        f1, threshold = curves.best_f1()
        rows = [
            {
                "class": classes[number] if number < len(classes) else f"class {number}",
                "ap50": float(precise[i]),
                "best_f1": float(f1[i]),
                "threshold": float(threshold[i]),
                "objects": int(curves.wanted[0, 0, i]),
            }
            for i, number in enumerate(ranked.classes)
            if curves.wanted[0, 0, i] > 0
        ]
        return Figures(whole, rows)

    def trivial(
        self,
        train: "SelectedTiles",
        sample: Sample,
        classes: Sequence[str],
        settings: "Finetune",
    ) -> Answer:
        """No object anywhere: what may be where cannot be known without a look."""
        like = next(iter(sample.images.values()))
        none = Found(
            like.new_zeros((0, 4, 2)),
            like.new_zeros(0),
            like.new_zeros(0, dtype=torch.int64),
            sample.size,
        )
        return [none] * len(sample)

    def told(self, answer: Answer, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Of each image its `boxes` by falling score, from TOLD on, in pixels of the image:
        `class`, `score`, `points` (four corners, clockwise) and `box`, which they span."""
        said = []
        for found in answer:
            sure = found.taken(found.scores >= TOLD)
            rows = zip(
                sure.labels.tolist(),
                sure.scores.tolist(),
                sure.corners.tolist(),
                sure.boxes.tolist(),
                strict=True,
            )
            said.append(
                {
                    "boxes": [
                        {
                            "class": classes[label],
                            "score": round(score, 4),
                            "points": [[round(x, 2), round(y, 2)] for x, y in corners],
                            "box": [round(value, 2) for value in box],
                        }
                        for label, score, corners, box in rows
                    ]
                }
            )
        return said

    def shown(
        self,
        images: Sequence[NDArray[np.uint8]],
        answer: Answer,
        sample: Sample,
        at: int,
        classes: Sequence[str],
    ) -> list[NDArray[np.uint8]]:
        """True objects, and answers from SURE on, in their classes' colours.

        Crossed out is what was missed on the left, what is wrong on the right.
        """
        assert sample.objects is not None
        found = answer[at].taken(answer[at].scores >= SURE)
        true = self.true(sample.objects[at], found.size)
        evidence = self.evidence([found], Sample(sample.images, sample.rows[:1], objects=[true]))
        wrong = evidence["object_outcome"][: len(found.labels), 0, 0] == WRONG
        right = torch.from_numpy(evidence["object_right"][: len(found.labels)])
        over = self.overlap(true.corners, found.corners).cpu() >= 0.5
        over &= true.labels.cpu()[:, None] == found.labels.cpu()
        missed = ~(over & right).any(1).numpy() & ~true.difficult.cpu().numpy()
        return [
            drawn(images[0], true.corners, true.labels, missed, found.size),
            drawn(images[0], found.corners, found.labels, wrong, found.size),
        ]

    def legend(self, classes: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
        return [(name, colour(number + 1)) for number, name in enumerate(classes)]

    def quality(self, evidence: Evidence, classes: Sequence[str]) -> NDArray[np.float64]:
        """F1 of the answers from SURE on, at an overlap of 0.5; 1 where rightly nothing is said."""
        tiles, tile = len(evidence["objects"]), evidence["object_tile"]
        with np.errstate(invalid="ignore"):
            sure = evidence["object_score"] >= SURE
        settled = evidence["object_outcome"][:, 0, 0]
        right = np.bincount(tile[sure & (settled == RIGHT)], minlength=tiles)
        said = right + np.bincount(tile[sure & (settled == WRONG)], minlength=tiles)
        both = said + evidence["objects"]
        f1: NDArray[np.float64] = np.where(both > 0, 2 * right / np.maximum(both, 1), 1.0)
        return f1

    def signature(self, model: Any, images: Images) -> Tensor:
        size = int(model.encoder.image_size)
        said: Tensor = model.signature({name: of[..., :size, :size] for name, of in images.items()})
        return said


def own_boxes(low: Tensor, high: Tensor, starts: list[int], step: int, size: int) -> Tensor:
    """Which boxes are a window's to say, by where they begin and end along one axis."""
    own = torch.ones_like(low, dtype=torch.bool)
    if step + 1 < len(starts):
        cut = high >= starts[step] + size - AT_EDGE
        own &= ~(cut & (low >= starts[step + 1] + AT_EDGE))
    if step > 0:
        cut = low <= starts[step] + AT_EDGE
        # Not where the one before has it as cut: of two windows one keeps it.
        own &= ~(cut & (high < starts[step - 1] + size - AT_EDGE))
    return own


def corners_turned_back(found: Found, number: int) -> Found:
    """What was found on an image that `training.augmentation.turned` turned, on the image."""
    corners = found.corners
    for _ in range(number % 4):
        x, y = corners.unbind(-1)
        corners = torch.stack((found.size - y, x), -1)
    if number >= 4:
        x, y = corners.unbind(-1)
        # A mirror turns clockwise into counter-clockwise.
        corners = torch.stack((found.size - x, y), -1)[:, [1, 0, 3, 2]]
    return Found(corners, found.scores, found.labels, found.size)


def drawn(
    image: NDArray[np.uint8], corners: Tensor, labels: Tensor, crossed: NDArray[np.bool_], size: int
) -> NDArray[np.uint8]:
    """A picture with outlines of corners (n, 4, 2) in an image, a square, of so many pixels."""
    from PIL import Image, ImageDraw

    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    # Large images are shrunk first, so that lines are as wide on all.
    side = image.shape[0]
    shown = SHOWN if side > SHOWN else side * -(-SHOWN // side)
    how = Image.Resampling.LANCZOS if side > SHOWN else Image.Resampling.NEAREST
    sheet = Image.fromarray(np.ascontiguousarray(image)).resize((shown, shown), how)
    pen = ImageDraw.Draw(sheet)
    number = labels.cpu().numpy()
    for shape, label, cross in zip(
        (corners.cpu() * (shown / size)).tolist(), number, crossed, strict=True
    ):
        a, b, c, d = (tuple(point) for point in shape)
        # Light around, so that it is seen on ground of its own colour.
        for ink, width in ((INK, 4), (colour(int(label) + 1), 2)):
            pen.line([a, b, c, d, a], fill=ink, width=width)
        if cross:  # thin, so that the object is seen
            pen.line([a, c], fill=ink, width=2)
            pen.line([b, d], fill=ink, width=2)
    return np.asarray(sheet)
