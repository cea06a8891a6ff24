"""A model's answers for images of any size, each for the image's own pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo.data.decode import Pixels
from ringmo.data.loading import padded, square
from ringmo.errors import BadInput
from ringmo.registry.bundle import read_size
from ringmo.tasks.base import Task

if TYPE_CHECKING:
    from ringmo.monitoring.record import Recorder
    from ringmo.registry.bundle import Bundle, Image


@dataclass
class Prepared:
    """One image as a model reads it, and what brings an answer back to its own pixels.

    tensors: (bands, S, S), as decoded, by what they are of. height, width: of the image. factor:
    pixels of the image that one of the tensors' stands for.
    """

    tensors: dict[str, Tensor]
    height: int
    width: int
    factor: float

    @property
    def side(self) -> int:
        """S; images of one side can be answered for together."""
        return int(next(iter(self.tensors.values())).shape[-1])

    def same_as(self, other: "Prepared") -> bool:
        """Whether a model would read the very same."""
        mine, its = self.tensors, other.tensors
        return mine.keys() == its.keys() and all(torch.equal(mine[n], its[n]) for n in mine)


def predict(
    bundle: "Bundle",
    task: Task,
    images: Sequence["Image"],
    batch_size: int,
    recorder: "Recorder | None" = None,
    names: Sequence[str] = (),
) -> Any:
    """`Bundle.predict`: of scenes an array (N, classes), else one dict an image.

    Args:
        recorder: is shown each batch, under the images' names.
    """
    named = [_named(bundle, image) for image in images]
    size = 1 if task.padded else batch_size
    told: list[Any] = []
    for start in range(0, len(named), size):
        chunk = [_prepared(bundle, task, one) for one in named[start : start + size]]
        said = raw_answers(bundle, task, chunk, recorder, names[start : start + size])
        told += [at_own_pixels(one, image) for one, image in zip(said, chunk, strict=True)]
    if task.padded:
        return told
    return np.stack(told) if told else np.zeros((0, len(bundle.classes)), np.float32)


def prepared(bundle: "Bundle", task: Task, image: "Image") -> Prepared:
    """An image at the scale that the model learnt at, ready to be stacked with others.

    Raises:
        BadInput: as `Bundle.predict`.
    """
    return _prepared(bundle, task, _named(bundle, image))


@torch.inference_mode()
def raw_answers(
    bundle: "Bundle",
    task: Task,
    images: Sequence[Prepared],
    recorder: "Recorder | None" = None,
    names: Sequence[str] = (),
) -> Any:
    """What the task says of images of one side, for the pixels that the model read."""
    batch = {
        name: torch.stack([image.tensors[name] for image in images]) for name in images[0].tensors
    }
    answer = task.answer(bundle.model, bundle.normalised(batch))
    if recorder is not None:
        recorder.add(batch, answer, names)
    return task.told(answer, bundle.classes)


def at_own_pixels(told: Any, image: Prepared) -> Any:
    """One image's raw answer, for the pixels of the image; of a scene as it is."""
    if not isinstance(told, dict):
        return told
    return {
        name: _of_boxes(value, image.factor, image.height, image.width)
        if name == "boxes"
        else _of_map(value, image.factor, image.height, image.width)
        for name, value in told.items()
    }


def _named(bundle: "Bundle", image: "Image") -> dict[str, Pixels]:
    """An image's pixels by what they are of, checked.

    Raises:
        BadInput: a sensor or the second date is missing, or they differ in size.
    """
    wanted = list(bundle.reads)
    if not isinstance(image, Mapping):
        if len(wanted) > 1:
            raise BadInput(
                f"this model reads {' and '.join(wanted)} of the same ground: give each image as "
                f"a mapping with these names"
            )
        image = {wanted[0]: image}
    if missing := [name for name in wanted if name not in image]:
        raise BadInput(f"this model reads {' and '.join(wanted)}: {missing[0]} is missing")
    fitted = {name: bundle.fit(image[name], name) for name in wanted}
    check_sizes(fitted)
    return fitted


def check_sizes(images: Mapping[str, Pixels]) -> None:
    """That images of one ground, (H, W, bands), are of one size.

    Raises:
        BadInput: they are not.
    """
    if len({pixels.shape[:2] for pixels in images.values()}) > 1:
        found = ", ".join(f"{n} {p.shape[1]}x{p.shape[0]}" for n, p in images.items())
        raise BadInput(f"images of one ground are of one size, found {found} pixels")


def _prepared(bundle: "Bundle", task: Task, image: Mapping[str, Pixels]) -> Prepared:
    """Of a scene model the largest centred square; of others all of it, padded to a square."""
    height, width = next(iter(image.values())).shape[:2]
    resize = read_size(bundle.meta)
    if not task.padded:
        middles = {name: square(pixels, resize) for name, pixels in image.items()}
        return Prepared(middles, height, width, min(height, width) / resize)
    scale = resize / int(bundle.meta.get("tile_pixels") or resize)
    side = max(round(max(height, width) * scale), bundle.encoder.image_size)
    least = bundle.encoder.image_size / scale
    tensors = {name: square(padded(_at_least(of, least)), side) for name, of in image.items()}
    return Prepared(tensors, height, width, max(height, width, least) / side)


def _at_least(image: Pixels, side: float) -> Pixels:
    """An image with as many rows and columns more as a model needs to read it at its scale."""
    height, width = image.shape[:2]
    least = int(np.ceil(side))
    more = ((0, max(0, least - height)), (0, max(0, least - width)), (0, 0))
    return np.pad(image, more, mode="edge") if any(m[1] for m in more) else image


def _of_map(values: NDArray[Any], factor: float, height: int, width: int) -> NDArray[Any]:
    """A map (S, S) at the image's own pixels: numbers by the nearest, measures in between."""
    if factor == 1:
        return values[:height, :width]
    side = max(height, width, round(values.shape[0] * factor))
    if np.issubdtype(values.dtype, np.integer):
        at = np.minimum(((np.arange(side) + 0.5) / factor).astype(np.int64), values.shape[0] - 1)
        taken: NDArray[Any] = values[at[:height, None], at[None, :width]]
        return taken
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=(side, side), mode="bilinear"
    )
    return resized[0, 0, :height, :width].numpy()


def _of_boxes(
    boxes: list[dict[str, Any]], factor: float, height: int, width: int
) -> list[dict[str, Any]]:
    """Boxes in the image's own pixels, without those in what was padded.

    Upright ones end at the image's edge; what is left there of a turned one is no rectangle.
    """
    kept = []
    for box in boxes:
        points = np.array(box["points"], np.float64) * factor
        x, y = points.mean(0)
        if x < width and y < height:
            span = np.array(box["box"], np.float64) * factor
            if np.isin(points, span).all():
                limit = np.array([width, height], np.float64)
                points, span = points.clip(0, limit), span.clip(0, np.tile(limit, 2))
            kept.append({**box, "points": points.tolist(), "box": span.tolist()})
    return kept
