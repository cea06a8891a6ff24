"""What a task says of a scene, block by block: maps, cells, or boxes.

A block is a square of the scene's own pixels. Each kind says which windows a block needs, and
makes of their answers what the block's file holds.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ringmo.data.resampling import Side
from ringmo.inference.reading import Box, Scene
from ringmo.inference.windows import Blend, Span, Windows, stride_of
from ringmo.tasks.base import UNKNOWN
from ringmo.tasks.dense import DenseTask, MaskTask
from ringmo.tasks.objects import TOLD, Found, ObjectTask, own_boxes

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle

TILE = 512  # pixels of an output's tiles; blocks are whole ones
LARGEST = 2048  # pixels a side of a block
BLEND_BYTES, READ_BYTES = 128e6, 64e6  # that a block may need to blend, and of pixels to read
ROWS = 256  # of a block that are resampled together
PICTURE = 1024  # pixels along the longer side of a preview
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Block:
    """A square of a scene's own pixels, smaller at its right and lower edge."""

    number: int
    rows: Span
    cols: Span

    @property
    def pixels(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


def blocks(height: int, width: int, side: int) -> list[Block]:
    """All of a scene, in rows from the top left."""
    tops, lefts = range(0, height, side), range(0, width, side)
    places = [(top, left) for top in tops for left in lefts]
    return [
        Block(i, (top, min(top + side, height)), (left, min(left + side, width)))
        for i, (top, left) in enumerate(places)
    ]


def block_side(scene: Scene, outputs: int) -> int:
    """Pixels a side of the blocks of a scene: as large as memory allows, the same for everybody.

    Args:
        outputs: values that a pixel's answer has.
    """
    bytes_read = sum(raster.scene.layout.pixel_bytes + 1 for raster in scene.rasters.values())
    side = LARGEST
    while side > TILE:
        cells = side / scene.scale
        blended = cells**2 * (outputs + 1) * 4
        if blended <= BLEND_BYTES and (cells + 2 * scene.size) ** 2 * bytes_read <= READ_BYTES:
            break
        side -= TILE
    return side


class Kind(ABC):
    """How a task answers for a scene. outputs: values that a pixel's answer has."""

    outputs = 1

    def __init__(self, bundle: "Bundle", scene: Scene, shift: tuple[int, int] = (0, 0)) -> None:
        assert bundle.task is not None
        self.bundle, self.scene, self.task = bundle, scene, bundle.task
        size = scene.size
        self.grid = Windows(scene.rows, scene.cols, size, self.stride(size), shift)

    def stride(self, size: int) -> int:
        return stride_of(size)

    def spans(self, block: Block) -> tuple[Span, Span]:
        """The model's pixels of which a block's own are made."""
        scene = self.scene
        return scene.model_span(block.rows, scene.rows), scene.model_span(block.cols, scene.cols)

    def windows(self, block: Block) -> list[tuple[int, int]]:
        """Rows and columns of the grid whose windows a block needs; by default those that begin
        in it."""
        scene = self.scene
        return self.grid.beginning(
            self._begins(block.rows, scene.height, scene.rows),
            self._begins(block.cols, scene.width, scene.cols),
        )

    def around(self, block: Block, some: Sequence[tuple[int, int]]) -> tuple[Span, Span]:
        """The box that a block and these windows cover, in the model's pixels."""
        own = self.spans(block)
        if not some:
            return own
        rows, cols = (
            (min(a[0], b[0]), max(a[1], b[1]))
            for a, b in zip(own, self.grid.around(some), strict=True)
        )
        return rows, cols

    @abstractmethod
    def collector(self, block: Block, box: Box) -> "Collector":
        """What makes a block's answer of those of its windows."""

    def _begins(self, span: Span, side: int, cells: int) -> Span:
        """Model pixels that begin in a span of own ones; those beyond the edge are the last's."""
        low = math.ceil(span[0] / self.scene.scale - 1e-9)
        high = cells if span[1] >= side else math.ceil(span[1] / self.scene.scale - 1e-9)
        return low, high


class Collector(ABC):
    """The answers of a block's windows as they come. grid: the windows'."""

    grid: Windows

    @abstractmethod
    def add(self, some: Sequence[tuple[int, int]], answer: Any) -> None:
        """Take what `Task.answer` says of these windows."""

    @abstractmethod
    def finish(self) -> Arrays:
        """What the block's file holds."""


# Maps: classes or heights of each pixel


class Maps(Kind):
    """Of mask tasks `mask`, uint8, and if wanted `probabilities`, float32 (classes, H, W); of
    heights `height`, float32. And `counts`, pixels a class, or `metres`: count, lowest, sum,
    highest."""

    def __init__(
        self,
        bundle: "Bundle",
        scene: Scene,
        shift: tuple[int, int] = (0, 0),
        probabilities: bool = False,
    ) -> None:
        super().__init__(bundle, scene, shift)
        self.outputs = max(1, len(bundle.classes))
        self.probabilities = probabilities

    def windows(self, block: Block) -> list[tuple[int, int]]:
        return self.grid.touching(*self.spans(block))

    def collector(self, block: Block, box: Box) -> "Collector":
        rows, cols = self.spans(block)
        if self.scene.scale == 1:
            at = tuple(
                slice(span[0] - of[0], span[1] - of[0])
                for span, of in ((block.rows, box.rows), (block.cols, box.cols))
            )
            valid = box.valid[at]
        else:
            valid = self.scene.own_valid(block.rows, block.cols)
        return _Blended(self, block, Blend(rows, cols, self.grid.size), valid)


class _Blended(Collector):
    def __init__(self, kind: Maps, block: Block, blend: Blend, valid: NDArray[np.bool_]) -> None:
        self.kind, self.block, self.blend, self.valid = kind, block, blend, valid
        self.grid = kind.grid

    def add(self, some: Sequence[tuple[int, int]], answer: Any) -> None:
        grid = self.grid
        maps = answer if answer.ndim == 4 else answer[:, None]
        for (row, col), one in zip(some, maps, strict=True):
            self.blend.add(int(grid.rows[row]), int(grid.cols[col]), one)

    def finish(self) -> Arrays:
        mean = self.blend.mean()
        if mean is None or not self.valid.any():
            return {}
        shape = self.valid.shape
        masks = isinstance(self.kind.task, MaskTask)
        made: Arrays = {"mask" if masks else "height": np.empty(shape, "u1" if masks else "f4")}
        if self.kind.probabilities:
            made["probabilities"] = np.empty((len(mean), *shape), np.float32)
        valid = self.valid & self._own_known()
        for top in range(0, shape[0], ROWS):
            at = slice(top, min(top + ROWS, shape[0]))
            values, has = self._own_rows(mean, at), valid[at]
            if masks:
                made["mask"][at] = np.where(has, values.argmax(0), UNKNOWN)
                if self.kind.probabilities:
                    made["probabilities"][:, at] = np.where(has, values, np.nan)
            else:
                made["height"][at] = np.where(has, values[0], np.nan)
        if masks:
            counts = np.bincount(made["mask"].ravel(), minlength=UNKNOWN + 1)
            made["counts"] = counts[: self.kind.outputs].astype(np.int64)
        else:
            some = made["height"][valid].astype(np.float64)
            if some.size:
                made["metres"] = np.array([some.size, some.min(), some.sum(), some.max()])
        return made

    def _side(self, first: int, count: int, cells: int) -> Side:
        return Side(first, count, 1 / self.kind.scene.scale, cells)

    def _own_rows(self, mean: torch.Tensor, at: slice) -> NDArray[Any]:
        """Rows of the block at the scene's own pixels: (C, h, W)."""
        scene = self.kind.scene
        if scene.scale == 1:
            return mean[:, at].numpy()
        down = self._side(self.block.rows[0] + at.start, at.stop - at.start, scene.rows)
        across = self._side(self.block.cols[0], self.block.cols[1] - self.block.cols[0], scene.cols)
        cut = [
            slice(side.source.start - of[0], side.source.stop - of[0])
            for side, of in ((down, self.blend.rows), (across, self.blend.cols))
        ]
        values = mean[:, cut[0], cut[1]].numpy().transpose(1, 2, 0)
        own = across.made_of(down.made_of(values).swapaxes(0, 1))
        return own.transpose(2, 1, 0)

    def _own_known(self) -> NDArray[np.bool_]:
        """Which of the block's own pixels a window had: by the nearest pixel of the model."""
        known, scale = self.blend.known, self.kind.scene.scale
        if scale == 1:
            return known
        at = [
            np.minimum(((np.arange(*span) + 0.5) / scale).astype(np.int64), of[1] - 1) - of[0]
            for span, of in (
                (self.block.rows, self.blend.rows),
                (self.block.cols, self.blend.cols),
            )
        ]
        own: NDArray[np.bool_] = known[at[0][:, None], at[1]]
        return own


# Cells: what each window shows


class Cells(Kind):
    """Windows side by side. `row`, `col`: of the cells that have an answer; `scores`: float32
    (n, classes)."""

    def stride(self, size: int) -> int:
        return size

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.grid.rows), len(self.grid.cols)

    def collector(self, block: Block, box: Box) -> "Collector":
        return _Listed(self.grid)


class _Listed(Collector):
    def __init__(self, grid: Windows) -> None:
        self.grid = grid
        self.places: list[tuple[int, int]] = []
        self.scores: list[NDArray[np.float32]] = []

    def add(self, some: Sequence[tuple[int, int]], answer: Any) -> None:
        self.places += some
        self.scores.append(answer.numpy())

    def finish(self) -> Arrays:
        if not self.places:
            return {}
        row, col = np.array(self.places, np.int64).T
        return {"row": row, "col": col, "scores": np.concatenate(self.scores)}


# Boxes


class Boxes(Kind):
    """`corners`: float64 (n, 4, 2), x and y in the scene's own pixels; `scores`, `labels`."""

    def collector(self, block: Block, box: Box) -> "Collector":
        return _Found(self, box)


class _Found(Collector):
    def __init__(self, kind: Boxes, box: Box) -> None:
        self.kind, self.box, self.grid = kind, box, kind.grid
        self.parts: list[Found] = []

    def add(self, some: Sequence[tuple[int, int]], answer: Any) -> None:
        grid = self.grid
        sides = ((1, grid.rows.tolist()), (0, grid.cols.tolist()))
        for place, found in zip(some, answer, strict=True):
            row, col = (int(starts[at]) for at, (_, starts) in zip(place, sides, strict=True))
            found = Found(
                found.corners.cpu() + torch.tensor([col, row]),
                found.scores.cpu(),
                found.labels.cpu(),
                found.size,
            )
            own = found.scores >= TOLD
            for at, (axis, starts) in zip(place, sides, strict=True):
                boxes = found.boxes
                own &= own_boxes(boxes[:, axis], boxes[:, axis + 2], starts, at, grid.size)
            self.parts.append(found.taken(own & self._on_data(found)))

    def _on_data(self, found: Found) -> torch.Tensor:
        """Which boxes have their middle where the scene has data."""
        middle = found.corners.mean(1).floor().long()
        x, y = middle[:, 0] - self.box.cols[0], middle[:, 1] - self.box.rows[0]
        height, width = self.box.valid.shape
        inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        on = torch.zeros_like(inside)
        on[inside] = torch.from_numpy(self.box.valid[y[inside].numpy(), x[inside].numpy()])
        return on

    def finish(self) -> Arrays:
        if not self.parts:
            return {}
        # Answers are of windows that one block alone has: what two say is merged in the end.
        corners = torch.cat([part.corners for part in self.parts]).double().numpy()
        return {
            "corners": corners * self.kind.scene.scale,
            "scores": torch.cat([part.scores for part in self.parts]).numpy(),
            "labels": torch.cat([part.labels for part in self.parts]).numpy(),
        }


def kind_of(
    bundle: "Bundle", scene: Scene, probabilities: bool = False, shift: tuple[int, int] = (0, 0)
) -> Kind:
    """How a bundle's task answers for this scene."""
    if isinstance(bundle.task, DenseTask):
        return Maps(bundle, scene, shift, probabilities and bool(bundle.classes))
    return (Boxes if isinstance(bundle.task, ObjectTask) else Cells)(bundle, scene, shift)


def picture(scene: Scene, block: Block, box: Box) -> NDArray[Any] | None:
    """The block's share of a preview of the scene: its pixels nearest to a grid over it all.

    (h, w, bands) of the first raster, decoded.
    """
    step = picture_step(scene.height, scene.width)
    at = []
    for span, of in ((block.rows, box.rows), (block.cols, box.cols)):
        first = -(-span[0] // step)
        own = np.arange(first, -(-span[1] // step)) * step
        at.append(np.minimum((own / scene.scale).astype(np.int64), of[1] - 1) - of[0])
    if not len(at[0]) or not len(at[1]):
        return None
    taken: NDArray[Any] = box.pixels[scene.name][at[0][:, None], at[1]]
    return taken


def picture_step(height: int, width: int) -> int:
    """Own pixels from one of a preview to the next."""
    return max(1, -(-max(height, width) // PICTURE))
