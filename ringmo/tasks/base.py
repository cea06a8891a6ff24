"""What a task is: which tiles it learns from, its model, its loss, its figures and its pictures.

    tiles → Sample ─▶ model ─▶ loss                          training
                        └────▶ answer ─▶ evidence ─▶ figures  evaluation, gate, comparison

Evidence is what the metrics need of each test tile, as plain arrays. Figures come from it for
any weighting of the tiles: all of them, those of one sensor, or a bootstrap's draw.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles
    from ringmo.models.backbone import Encoder

UNKNOWN = 255  # in masks

# Sensor → float32 (B, bands, S, S), normalised; the later date of a change pair is `second`.
Images = dict[str, Tensor]
SECOND = "second"

# Name → array with a row a tile. Under a name that begins with `object_` a row is an object
# (a box, an answer): `object_tile` says of which tile, by its position among these tiles.
Evidence = dict[str, NDArray[Any]]


@dataclass
class Objects:
    """The objects of one image.

    corners: float32 (n, 4, 2), x and y in pixels, in order around each object, clockwise on the
    screen. labels: int64 (n,), numbers of the task's classes. difficult: bool (n,).
    """

    corners: Tensor
    labels: Tensor
    difficult: Tensor

    @property
    def boxes(self) -> Tensor:
        return spans(self.corners)


def spans(corners: Tensor) -> Tensor:
    """What corners (n, 4, 2) span: (n, 4), left, top, right, bottom."""
    if not len(corners):
        return corners.new_zeros((0, 4))
    return torch.cat((corners.amin(1), corners.amax(1)), 1)


@dataclass
class Sample:
    """Some tiles and their truth, on the device, as a model reads them.

    rows: positions of the tiles in their selection. What a task does not read is None.
    labels: float32 (B, classes), shares (of one class: 1 and 0s). mask: int64 (B, S, S), numbers
    of the task's classes, UNKNOWN where nobody knows. height: float32 (B, S, S), metres, NaN
    where nobody knows. objects: one a tile.
    """

    images: Images
    rows: NDArray[np.int64]
    labels: Tensor | None = None
    mask: Tensor | None = None
    height: Tensor | None = None
    objects: list[Objects] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return int(next(iter(self.images.values())).shape[-1])


@dataclass
class Figures:
    """What a task's metrics say: shares from 0 to 1, or metres.

    whole: name → value. classes: a row a class (`class`, its figures, its count of samples), of
    those that the test tiles have. NaN where there is nothing to measure.
    """

    whole: dict[str, float]
    classes: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """A task: see the module. Stateless; the one of a file is its TASK.

    name: as in params.yaml. parts: what of a tile's labels it reads: mask, height, second, boxes
    or label. padded: tiles that are not square are padded to squares; else their middle is cut.
    metric: the figure that chooses the best epoch, compares models and feeds the gate. lower: the
    figures of which less is better; metres: those in metres, not shares. shows: what the pictures
    of `shown` are, from the left. columns: of its selection, beside key, content_hash and split.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    padded: ClassVar[bool] = True
    metric: ClassVar[str]
    lower: ClassVar[frozenset[str]] = frozenset()
    metres: ClassVar[frozenset[str]] = frozenset()
    shows: ClassVar[str] = "image, truth, answer"
    columns: ClassVar[dict[str, str]]

    @abstractmethod
    def usable(self, tiles: "pd.DataFrame") -> "pd.Series[bool]":
        """Which rows of the manifest it can learn from, or be tested on."""

    @abstractmethod
    def classes(self, train: "SelectedTiles", settings: "Finetune") -> list[str]:
        """The names of its classes, by number; of a regression none.

        Raises:
            BadInput: nothing can be learnt from these tiles: what is missing, and what to do.
        """

    @abstractmethod
    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        """An untrained model, its encoder under the name `encoder`.

        Reads `Images` of the encoder's own image size.
        """

    def mask_names(self, tiles: "SelectedTiles") -> list[list[str]]:
        """The classes of each tile's mask, by the mask's own numbers."""
        return [[str(name) for name in names] for names in tiles.table["mask_names"]]

    def prepare(  # noqa: B027  # most tasks have nothing to do
        self, model: Any, train: "SelectedTiles", classes: Sequence[str], settings: "Finetune"
    ) -> None:
        """Give an untrained model what it takes from the training tiles: weights, a unit."""

    @abstractmethod
    def loss(self, model: Any, sample: Sample, settings: "Finetune") -> Tensor:
        """The mean over the sample's tiles of what each costs: a scalar.

        So that a batch in parts costs what it costs as a whole.
        """

    @abstractmethod
    def answer(self, model: nn.Module, images: Images) -> Any:
        """What a model in evaluation mode says of images, on their device.

        Images may be larger than the encoder's: then of windows, put together.
        """

    @abstractmethod
    def turned_back(self, answers: Sequence[Any], turns: Sequence[int]) -> Any:
        """One answer from those on turned images, each turned back.

        Args:
            turns: of each answer, the number of `training.augmentation.turned` (0: as it was).
        """

    @abstractmethod
    def evidence(self, answer: Any, sample: Sample) -> Evidence:
        """What the metrics need of these tiles."""

    @abstractmethod
    def figures(
        self, evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
    ) -> Figures:
        """The metrics.

        Args:
            classes: names by number; the model's, and then those that only these tiles have.
            weights: (tiles,), how often each tile counts; None: once.
        """

    @abstractmethod
    def trivial(
        self,
        train: "SelectedTiles",
        sample: Sample,
        classes: Sequence[str],
        settings: "Finetune",
    ) -> Any:
        """The answer of somebody who has seen the training labels and never looks at the image.

        The commonest class, no change, no object, the mean height.
        """

    @abstractmethod
    def told(self, answer: Any, classes: Sequence[str]) -> Any:
        """What a user gets: for scene an array (B, classes), else a list with one dict an image."""

    @abstractmethod
    def shown(
        self,
        images: Sequence[NDArray[np.uint8]],
        answer: Any,
        sample: Sample,
        at: int,
        classes: Sequence[str],
    ) -> list[NDArray[np.uint8]]:
        """Pictures (H, W, 3) of one tile side by side: what it is, and what the model says.

        Args:
            images: the tile, and its later date where it has one: (S, S, 3), for people. at: which
                of the sample's tiles.
        """

    def legend(self, classes: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
        """In what colours (red, green, blue) its pictures show classes; none, if they do not."""
        return []

    @abstractmethod
    def quality(self, evidence: Evidence, classes: Sequence[str]) -> NDArray[np.float64]:
        """How well each tile was answered (tiles,): higher is better; NaN: nothing to say."""

    def gain(self, figure: str, value: float) -> float:
        """A figure's value so that more is better; what is no number is worst."""
        if np.isnan(value):
            return -np.inf
        return -value if figure in self.lower else value

    def unit(self, figure: str) -> str:
        """m or %, in which `console.figure` says it."""
        return "m" if figure in self.metres else "%"

    def signature(self, model: Any, images: Images) -> Tensor:
        """Numbers (B, n) by which a model is known again: its answers, coarsely."""
        answer = self.answer(model, images)
        if answer.ndim > 2:
            maps = answer if answer.ndim == 4 else answer[:, None]
            answer = nn.functional.adaptive_avg_pool2d(maps, 8).flatten(1)
        said: Tensor = answer.float()
        return said


def joined(parts: Sequence[Evidence]) -> Evidence:
    """Evidence of several batches of tiles as one."""
    whole: dict[str, list[NDArray[Any]]] = {}
    before = 0
    for part in parts:
        for name, rows in part.items():
            whole.setdefault(name, []).append(rows + before if name == "object_tile" else rows)
        before += tiles_of(part)
    return {name: np.concatenate(rows) for name, rows in whole.items()}


def tiles_of(evidence: Mapping[str, NDArray[Any]]) -> int:
    """How many tiles there is evidence of."""
    return len(next(rows for name, rows in evidence.items() if not name.startswith("object_")))
