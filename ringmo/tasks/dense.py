"""What tasks with an answer for each pixel share: windows, turns, a loss and pictures of masks."""

import colorsys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.evaluation import dense
from ringmo.tasks.base import UNKNOWN, Evidence, Images, Sample, Task
from ringmo.training.augmentation import turned_back

if TYPE_CHECKING:
    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles

OVERLAP = 1 / 4  # of a window's side, at least
TOGETHER = 32  # windows a model is given at a time
# Okabe and Ito's colours, which colour-blind people can tell apart; black, the first, is mostly
# the background's. From the ninth on hues a golden angle apart.
COLOURS = (
    *((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)),
    *((240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
GOLDEN = 0.618034
NOBODY_KNOWS = (160, 160, 160)


class DenseTask(Task):
    """Answers are float32 (B, …, S, S) at the size of the images."""

    @abstractmethod
    def said(self, output: Tensor) -> Tensor:
        """What the model's output means: (B, …, S, S) float32."""

    def answer(self, model: Any, images: Images) -> Tensor:
        size = int(model.encoder.image_size)
        if next(iter(images.values())).shape[-1] == size:
            return self.said(model(images))
        return windowed(lambda cut: self.said(model(cut)), images, size)

    def turned_back(self, answers: Sequence[Tensor], turns: Sequence[int]) -> Tensor:
        back = [turned_back(answer, turn) for answer, turn in zip(answers, turns, strict=True)]
        return torch.stack(back).mean(0)


def weight(size: int) -> Tensor:
    """How much each pixel of a window counts, float32 (size, size): little at its edge, where the
    model sees half of what is around, so that no window ends in a seam."""
    rise = torch.sin((torch.arange(size) + 0.5) / size * torch.pi) ** 2
    return rise[:, None] * rise


def windowed(answer: Any, images: Mapping[str, Tensor], size: int) -> Tensor:
    """Answers (B, …, S, S) to images of S ≥ size, from windows that overlap by OVERLAP or more.

    Where windows overlap, each counts by how far in it a pixel lies, so that none ends in a seam.

    Args:
        answer: images (n, bands, size, size) by sensor → (n, …, size, size).
    """
    count, side = len(next(iter(images.values()))), next(iter(images.values())).shape[-1]
    starts = window_starts(side, size)
    total: Tensor | None = None
    weights: Tensor | None = None
    for some, cut in windows(images, size):
        said = answer(cut)
        if total is None or weights is None:
            total = said.new_zeros((count, *said.shape[1:-2], side, side))
            weights = said.new_zeros((count, side, side))
            rise = weight(size).to(said.device)
        for (i, row, column), each in zip(some, said, strict=True):
            top, left = starts[row], starts[column]
            place = (..., slice(top, top + size), slice(left, left + size))
            total[i][place] += each * rise
            weights[i][place] += rise
    assert total is not None and weights is not None
    middle = (1,) * (total.ndim - 3)
    return total / weights.view(count, *middle, side, side)


def windows(
    images: Mapping[str, Tensor], size: int
) -> Iterator[tuple[list[tuple[int, int, int]], Images]]:
    """Windows of images (B, bands, S, S), TOGETHER at a time, as images of `size`.

    Yields:
        Of each window its image, and its row and column among `window_starts`; and the windows.
    """
    first = next(iter(images.values()))
    starts = window_starts(first.shape[-1], size)
    steps = range(len(starts))
    places = [(i, row, column) for i in range(len(first)) for row in steps for column in steps]
    for begin in range(0, len(places), TOGETHER):
        some = places[begin : begin + TOGETHER]
        yield (
            some,
            {
                name: torch.stack(
                    [
                        of[i, :, starts[r] : starts[r] + size, starts[c] : starts[c] + size]
                        for i, r, c in some
                    ]
                )
                for name, of in images.items()
            },
        )


def window_starts(side: int, size: int) -> list[int]:
    """Where windows of `size` begin along a side, evenly, with OVERLAP or more between two."""
    steps = -(-(side - size) // max(1, round(size * (1 - OVERLAP))))
    return [round(i * (side - size) / max(1, steps)) for i in range(steps + 1)]


class MaskTask(DenseTask):
    """Answers are probabilities: float32 (B, classes, S, S)."""

    parts: ClassVar[tuple[str, ...]] = ("mask",)
    columns: ClassVar[dict[str, str]] = {
        "mask_hash": "string",
        "mask_coding": "string",
        "mask_names": "strings",
    }

    def pixels(self, train: "SelectedTiles", classes: Sequence[str]) -> NDArray[np.int64]:
        """How many pixels of the training tiles each class has: (classes,)."""
        number = {name: i for i, name in enumerate(classes)}
        total = np.zeros(len(classes), np.int64)
        for names, counts in zip(self.mask_names(train), train.table["mask_counts"], strict=True):
            # Its last count is of what nobody knows.
            for name, count in zip(names, counts[:-1], strict=False):
                total[number[name]] += int(count)
        return total

    def class_weights(self, train: "SelectedTiles", classes: Sequence[str]) -> Tensor:
        """What a pixel of each class counts so that all classes count the same; 1 on average.

        A class without a pixel has 0.
        """
        pixels = self.pixels(train, classes)
        there = pixels > 0
        weights = np.where(there, pixels.sum() / (max(1, there.sum()) * np.maximum(pixels, 1)), 0)
        return torch.tensor(weights, dtype=torch.float32)

    def prepare(
        self, model: Any, train: "SelectedTiles", classes: Sequence[str], settings: "Finetune"
    ) -> None:
        if settings.class_weights == "balanced":
            model.class_weights = self.class_weights(train, classes)

    def loss(self, model: Any, sample: Sample, settings: "Finetune") -> Tensor:
        assert sample.mask is not None
        logits = model(sample.images).float()
        weights = model.class_weights
        return mask_loss(logits, sample.mask, weights, settings.label_smoothing)

    def said(self, output: Tensor) -> Tensor:
        return output.float().softmax(1)

    def evidence(self, answer: Tensor, sample: Sample) -> Evidence:
        assert sample.mask is not None
        return dense.mask_evidence(answer, sample.mask)

    def told(self, answer: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """mask: uint8 (S, S), numbers of the classes. confidence: float32 (S, S), 0 to 1."""
        confidence, said = (each.cpu().numpy() for each in answer.max(1))
        return [
            {"mask": mask.astype(np.uint8), "confidence": sure}
            for mask, sure in zip(said, confidence, strict=True)
        ]

    def always(self, number: int, sample: Sample, classes: Sequence[str]) -> Tensor:
        """The answer that every pixel is of this class."""
        one = torch.zeros(len(classes), device=next(iter(sample.images.values())).device)
        one[number] = 1
        return one[None, :, None, None].expand(len(sample), -1, sample.size, sample.size)


def mask_loss(
    logits: Tensor, mask: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Cross-entropy, its mean over an image's known pixels, and soft Dice; the mean over images.

    Dice (Milletari et al., 3DV 2016) looks at a class as a whole, of those that an image has:
    roads and changes, rare ones, are then found by models that have seen few. An image of which
    nobody knows a pixel costs nothing.

    Args:
        logits: float32 (B, classes, H, W). mask: int64 (B, H, W). weights: (classes,), of the
            cross-entropy. label_smoothing: likewise.
    """
    # A class that the model does not have (in validation tiles) cannot be learnt.
    known = mask < logits.shape[1]
    cost = nn.functional.cross_entropy(
        logits,
        torch.where(known, mask, UNKNOWN),
        weights,
        ignore_index=UNKNOWN,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return known_mean(cost, known) + _dice(logits, torch.where(known, mask, -1)).mean()


def _dice(logits: Tensor, mask: Tensor) -> Tensor:
    """What each image's overlap lacks, on average over the classes that it has: (B,).

    Args:
        mask: int64 (B, H, W), -1 where nobody knows.
    """
    numbers = torch.arange(logits.shape[1], device=mask.device)[:, None, None]
    truth = mask[:, None] == numbers
    said = logits.softmax(1) * (mask >= 0)[:, None]
    pixels = truth.sum((2, 3))
    overlap = 2 * (said * truth).sum((2, 3)) / (said.sum((2, 3)) + pixels).clamp(min=1)
    there = pixels > 0
    return ((1 - overlap) * there).sum(1) / there.sum(1).clamp(min=1)


def known_mean(cost: Tensor, known: Tensor) -> Tensor:
    """The mean of (B, H, W) over an image's known pixels, then over images; of none it is 0."""
    each = (cost * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    return each.mean()


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class, whatever others there are."""
    if number < len(COLOURS):
        return COLOURS[number]
    beyond = number - len(COLOURS)
    value = 0.9 if beyond % 2 else 0.6
    red, green, blue = colorsys.hsv_to_rgb((beyond + 0.5) * GOLDEN % 1, 0.65, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def coloured(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """A mask (H, W) as a picture (H, W, 3); grey where nobody knows."""
    palette = np.array([colour(number) for number in range(UNKNOWN)] + [NOBODY_KNOWS], np.uint8)
    picture: NDArray[np.uint8] = palette[mask]
    return picture


def fitted(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3) at the size of its answer."""
    from PIL import Image

    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
