"""A model's answers for images of any size, each for the image's own pixels."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ringmo.data.decode import Pixels
from ringmo.data.loading import padded, square
from ringmo.errors import BadInput
from ringmo.registry.bundle import read_size
from ringmo.tasks.base import SECOND, Task

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle, Image


@torch.inference_mode()
def predict(bundle: "Bundle", task: Task, images: Sequence["Image"], batch_size: int) -> Any:
    """`Bundle.predict`: of scenes an array (N, classes), else one dict an image."""
    named = [_named(bundle, task, image) for image in images]
    if task.padded:
        return [_of_one(bundle, task, image) for image in named]
    told = [np.zeros((0, len(bundle.classes)), np.float32)]
    for start in range(0, len(named), batch_size):
        chunk = named[start : start + batch_size]
        size = read_size(bundle.meta)
        batch = {
            name: torch.stack([square(image[name], size) for image in chunk]) for name in chunk[0]
        }
        told.append(task.told(task.answer(bundle.model, bundle.normalised(batch)), bundle.classes))
    return np.concatenate(told)


def _named(bundle: "Bundle", task: Task, image: "Image") -> dict[str, Pixels]:
    """An image's pixels by what they are of, checked.

    Raises:
        BadInput: a sensor or the second date is missing, or they differ in size.
    """
    wanted = list(bundle.sensors) + [SECOND] * (SECOND in task.parts)
    if not isinstance(image, Mapping):
        if len(wanted) > 1:
            raise BadInput(
                f"this model reads {' and '.join(wanted)} of the same ground: give each image as "
                f"a mapping with these names"
            )
        image = {wanted[0]: image}
    if missing := [name for name in wanted if name not in image]:
        raise BadInput(f"this model reads {' and '.join(wanted)}: {missing[0]} is missing")
    fitted = {n: bundle.fit(image[n], wanted[0] if n == SECOND else n) for n in wanted}
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


def _of_one(bundle: "Bundle", task: Task, image: Mapping[str, Pixels]) -> dict[str, Any]:
    """One image at the scale that the model learnt at, padded to a square, and back."""
    height, width = next(iter(image.values())).shape[:2]
    resize = read_size(bundle.meta)
    scale = resize / int(bundle.meta.get("tile_pixels") or resize)
    side = max(round(max(height, width) * scale), bundle.encoder.image_size)
    batch = {}
    for name, pixels in image.items():
        whole = padded(_at_least(pixels, bundle.encoder.image_size / scale))
        batch[name] = square(whole, side)[None]
    (told,) = task.told(task.answer(bundle.model, bundle.normalised(batch)), bundle.classes)
    factor = max(height, width, bundle.encoder.image_size / scale) / side
    return {
        name: _of_boxes(value, factor, height, width)
        if name == "boxes"
        else _of_map(value, factor, height, width)
        for name, value in told.items()
    }


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
