"""Batches of tiles as a task's samples: images normalised, labels in the task's classes."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.config import Sensor
from ringmo.data.loading import (
    BESIDE,
    BOXES,
    HEIGHT,
    MASK,
    SECOND,
    Batch,
    SelectedTiles,
)
from ringmo.data.tables import classes_of
from ringmo.models.normal import Normal
from ringmo.tasks.base import UNKNOWN, Images, Objects, Sample, Task
from ringmo.training.augmentation import cut, cut_corners, cut_truth

# Of an object, a crop must show this share of what its corners span for it to count there.
SEEN = 0.4


class Samples:
    """Makes samples of a selection's tiles.

    Classes that only these tiles have are numbered after the model's, by name: they are truth
    that the model cannot know.

    Args:
        classes: of the model, by number.
        sensors: those that the model reads, with numbers for mean and std; the tiles' own first.
        upload: brings a CPU tensor to the device; in a training so that the host does not wait.
        heights: `above_lowest`: heights are those above the lowest of their tile.
    """

    def __init__(
        self,
        task: Task,
        tiles: SelectedTiles,
        classes: Sequence[str],
        sensors: Mapping[str, Sensor],
        device: torch.device | str,
        heights: str = "absolute",
        multi_label: bool = False,
        upload: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task, self.tiles = task, tiles
        self.upload = upload or (lambda tensor: tensor.to(device))
        self.normals = {name: Normal(sensor, device) for name, sensor in sensors.items()}
        self.sensor = next(iter(sensors))
        self.heights, self.multi_label = heights, multi_label
        self.classes = [*classes, *sorted(self._names() - set(classes))]
        self.number = {name: number for number, name in enumerate(self.classes)}
        self._labels = self._all_labels() if "label" in task.parts else None
        self._codings = self._all_codings() if MASK in task.parts else None
        self._objects: dict[int, Objects] = {}

    def _names(self) -> set[str]:
        """The classes that these tiles have."""
        table, task = self.tiles.table, self.task
        if "label" in task.parts:
            return {name for label in table["label"] for name in self._split(str(label))}
        if MASK in task.parts:
            return {name for names in task.mask_names(self.tiles) for name in names}
        if BOXES in task.parts:
            return {str(name) for names in table["boxes_classes"] for name in names}
        return set()

    def _split(self, label: str) -> list[str]:
        return classes_of(label) if self.multi_label else [label]

    def _all_labels(self) -> Tensor:
        """(tiles, classes) of 0 and 1, with the classes that the model cannot know."""
        labels = torch.zeros(len(self.tiles), len(self.classes))
        for row, label in enumerate(self.tiles.table["label"]):
            for name in self._split(str(label)):
                labels[row, self.number[name]] = 1
        return labels

    def _all_codings(self) -> tuple[Tensor, NDArray[np.int64]]:
        """For each coding its classes' numbers in the task, (codings, 256); and each tile's."""
        table = self.tiles.table
        codings = list(dict.fromkeys(table["mask_coding"]))
        numbers = torch.full((len(codings), 256), UNKNOWN, dtype=torch.int64)
        of_tile = table["mask_coding"].map({name: i for i, name in enumerate(codings)})
        names = self.task.mask_names(self.tiles)
        for i in range(len(codings)):
            for number, name in enumerate(names[int((of_tile == i).to_numpy().argmax())]):
                numbers[i, number] = self.number[name]
        return self.upload(numbers), of_tile.to_numpy(np.int64)

    def batches(self, size: int, batch_size: int = 64) -> Iterator[Sample]:
        """All tiles, whole, at this size, in the selection's order."""
        for batch in self.tiles.batches(np.arange(len(self.tiles)), batch_size, size):
            yield self.whole(batch)

    def whole(self, batch: Batch) -> Sample:
        """A batch as it is, at its size."""
        size = batch.images.shape[-1]
        parts = {name: self.upload(part) for name, part in batch.parts.items()}
        images = self.normal(self.upload(batch.images), parts)
        sample = Sample(images, batch.rows, self.labels(batch.rows))
        if MASK in parts:
            sample.mask = self.masks(parts[MASK][:, 0], batch.rows)
        if HEIGHT in parts:
            sample.height = self.above(parts[HEIGHT][:, 0])
        if BOXES in self.task.parts:
            sample.objects = [self._shown(self.objects(int(row)), size) for row in batch.rows]
        return sample

    def cropped(
        self,
        images: Tensor,
        parts: Mapping[str, Tensor],
        rows: NDArray[np.int64],
        where: Tensor,
        size: int,
    ) -> Sample:
        """A batch of which the images are cropped already, and all else is still to be.

        Args:
            images: (B, bands, size, size), in the tiles' units. parts: as of a `Batch`, on the
                device. where: (B, 2, 3), of the crops, on the CPU.
        """
        there = self.upload(where) if parts else where
        ready = {n: cut(p, there, size) for n, p in parts.items() if n not in (MASK, HEIGHT)}
        sample = Sample(self.normal(images, ready), rows, self.labels(rows))
        if MASK in parts:
            sample.mask = self.masks(cut_truth(parts[MASK], there, size).long(), rows)
        if HEIGHT in parts:
            sample.height = cut_truth(self.above(parts[HEIGHT]), there, size)
        if BOXES in self.task.parts:
            sample.objects = []
            for row, at in zip(rows, where, strict=True):
                found = self.objects(int(row))
                corners = clockwise(cut_corners(found.corners, at))
                seen = within(Objects(corners, found.labels, found.difficult))
                sample.objects.append(self._shown(seen, size))
        return sample

    def _shown(self, objects: Objects, size: int) -> Objects:
        """Objects on the device, in an image of so many pixels."""
        labels, difficult = self.upload(objects.labels), self.upload(objects.difficult)
        return Objects(self.upload(objects.corners) * size, labels, difficult)

    def normal(self, images: Tensor, parts: Mapping[str, Tensor]) -> Images:
        """Images (B, bands, S, S) and those of their parts, normalised, by what they are of."""
        normal = {self.sensor: self.normals[self.sensor](images)}
        if SECOND in parts:
            normal[SECOND] = self.normals[self.sensor](parts[SECOND])
        for name, part in parts.items():
            if name.startswith(BESIDE):
                sensor = name.removeprefix(BESIDE)
                normal[sensor] = self.normals[sensor](part)
        return normal

    def labels(self, rows: NDArray[np.int64]) -> Tensor | None:
        """float32 (B, classes), shares, with those that the model cannot know; on the device."""
        return None if self._labels is None else self.upload(self._labels[rows])

    def masks(self, numbers: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Numbers of codings (B, S, S) as the task's classes: int64."""
        assert self._codings is not None
        codings, of_tile = self._codings
        known = codings[self.upload(torch.from_numpy(of_tile[rows]))]
        return known.gather(1, numbers.long().flatten(1)).view(numbers.shape)

    def above(self, heights: Tensor) -> Tensor:
        """Heights (B, …) of whole tiles as the task has them."""
        if self.heights == "absolute":
            return heights
        lowest = torch.where(heights.isnan(), torch.inf, heights).flatten(1).amin(1)
        return heights - lowest.view(-1, *[1] * (heights.ndim - 1))

    def objects(self, row: int) -> Objects:
        """A tile's objects; corners are shares of its side, clockwise; on the CPU."""
        kept = self._objects.get(row)
        if kept is None:
            table = self.tiles.table
            side = max(int(table["width"].iloc[row]), int(table["height"].iloc[row]))
            found = self.tiles.boxes(row)
            corners = torch.tensor([b["points"] for b in found]).reshape(-1, 4, 2) / side
            kept = self._objects[row] = Objects(
                clockwise(corners),
                torch.tensor([self.number[b["class"]] for b in found], dtype=torch.int64),
                torch.tensor([bool(b["difficult"]) for b in found], dtype=torch.bool),
            )
        return kept


def clockwise(corners: Tensor) -> Tensor:
    """Corners (n, 4, 2) in clockwise order on the screen (y down), from the same first one."""
    x, y = corners.unbind(2)
    twice = (x * y.roll(-1, 1) - x.roll(-1, 1) * y).sum(1)
    other_way = corners[:, [0, 3, 2, 1]]
    return torch.where((twice < 0)[:, None, None], other_way, corners)


def within(objects: Objects) -> Objects:
    """The objects that an image shows: SEEN of what they span lies in it.

    Their corners are shares of its side, and stay as they are, partly outside.
    """
    if not len(objects.corners):
        return objects
    boxes = objects.boxes
    seen = boxes.clamp(0, 1)
    whole = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-9).prod(1)
    kept = (seen[:, 2:] - seen[:, :2]).prod(1) >= SEEN * whole
    return Objects(objects.corners[kept], objects.labels[kept], objects.difficult[kept])


def made_up(
    task: Task, classes: int, bands: Mapping[str, int], count: int, size: int, device: torch.device
) -> Sample:
    """A sample of noise, with all the truth that the task reads: to try a model with."""
    images = {n: torch.randn(count, b, size, size, device=device) for n, b in bands.items()}
    if SECOND in task.parts:
        images[SECOND] = torch.randn_like(next(iter(images.values())))
    sample = Sample(images, np.arange(count))
    drawn = torch.randint(max(classes, 1), (count, size, size), device=device)
    if "label" in task.parts:
        sample.labels = nn.functional.one_hot(drawn[:, 0, 0], classes).float()
    if MASK in task.parts:
        sample.mask = drawn
    if HEIGHT in task.parts:
        sample.height = torch.rand(count, size, size, device=device)
    if BOXES in task.parts:
        square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], device=device)
        one = Objects(
            square[None] * (size / 4) + size / 4,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.bool, device=device),
        )
        sample.objects = [one] * count
    return sample
