"""What is kept of a tile that a model answered: statistics, its embedding, its answer.

The same of production and of the reference, so that the two can be compared. A row a tile:

    mean:SENSOR:BAND …   deviation, p2, p50, p98 likewise, in the units of the sensor's mean
    nodata:SENSOR        share of pixels that are 0 in every band, or no number
    embedding            the encoder's features, their mean over all positions (float32)
    class:CLASS          of the answer: 1 or 0 (scene), share of pixels (masks), objects (boxes)
    answer:mean, answer:deviation   of heights, in metres
    confidence           0 to 1: how sure the model is; not of heights, nor where nothing is found
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo.config import Sensor
from ringmo.data.values import input_values
from ringmo.tasks.base import SECOND
from ringmo.tasks.dense import window_starts
from ringmo.tasks.objects import SURE, TOLD

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle

PERCENTILES = (2, 50, 98)
LOOKED_AT = 4096  # pixels of a tile, evenly spread, of which statistics are taken
REMEMBERED = 512  # passes of the encoder that wait to be asked for
HALF = 0.5  # probability from which on a tile has one of several classes

Columns = dict[str, NDArray[Any]]


class Embeddings:
    """Takes an encoder's features as they pass, so that nobody computes them twice.

    Each thread has its own: whoever asks the model asks here, in the same thread, right after it.
    The hook stands on the trunk's last LayerNorm, which every way through an encoder passes.
    """

    def __init__(self, bundle: "Bundle") -> None:
        self.size = bundle.encoder.image_size
        self.task = bundle.task
        self._passed = threading.local()
        self._hook = bundle.encoder.trunk.norm.register_forward_hook(self._take)

    def _take(self, module: Any, given: Any, features: Tensor) -> None:
        # (B, h, w, C) of a Swin; (B, 1 + positions, C) of a ViT, whose first token is no position.
        with torch.no_grad():
            places = features.flatten(1, 2) if features.ndim == 4 else features[:, 1:]
            self._calls().append(places.mean(1))

    def _calls(self) -> "deque[Tensor]":
        calls: deque[Tensor] | None = getattr(self._passed, "calls", None)
        if calls is None:
            calls = self._passed.calls = deque(maxlen=REMEMBERED)
        return calls

    def taken(self, count: int, side: int) -> Tensor | None:
        """The features (count, C) of the images that this thread asked the model for last.

        The mean over an image's windows, and of a pair of dates over both. None where what passed
        is not what these images cost: then somebody else's pass was in between.

        Args:
            side: pixels of the images' sides.
        """
        calls = self._calls()
        dense = self.task is not None and self.task.padded
        windows = len(window_starts(side, self.size)) ** 2 if dense else 1
        dates = 2 if self.task is not None and SECOND in self.task.parts else 1
        wanted, found = count * windows * dates, []
        while wanted > 0 and calls:
            found.append(calls.pop())
            wanted -= len(found[-1])
        calls.clear()
        if wanted or not found:
            return None
        found.reverse()
        if dates == 2:
            if len(found) % 2:
                return None
            found = [(one + other) / 2 for one, other in zip(found[::2], found[1::2], strict=True)]
        return torch.cat(found).view(count, windows, -1).mean(1)

    def close(self) -> None:
        self._hook.remove()


def of_tiles(
    bundle: "Bundle",
    pixels: Mapping[str, Tensor],
    answer: Any,
    rows: Sequence[int],
    embeddings: Tensor | None,
) -> Columns:
    """The columns of these rows of a batch.

    Args:
        pixels: sensor (or `second`) → (N, bands, S, S), as decoded. answer: the task's, of all N.
        embeddings: (N, C), or None where there are none: then the column is missing.
    """
    chosen = torch.as_tensor(list(rows))
    columns: Columns = {}
    for name, images in pixels.items():
        of = bundle.meta["sensor"] if name == SECOND else name
        sensor = Sensor.model_validate(bundle.meta["sensors"][of])
        some = images[chosen.to(images.device)].cpu()
        columns |= _statistics(name, some.flatten(2).numpy(), sensor)
    if embeddings is not None:
        taken = embeddings[chosen.to(embeddings.device)].float().cpu().numpy()
        columns["embedding"] = taken
    return columns | _answered(bundle, answer, rows)


def _statistics(name: str, pixels: NDArray[Any], sensor: Sensor) -> Columns:
    """Of pixels (n, bands, positions)."""
    # An odd step, so that it is not the same few columns in every row.
    step = -(-pixels.shape[2] // LOOKED_AT) | 1
    pixels = pixels[:, :, ::step]
    known = np.isfinite(pixels).all(1) & (pixels != 0).any(1)
    columns: Columns = {f"nodata:{name}": 1 - known.mean(1)}
    values = input_values(pixels.astype(np.float32), sensor)
    # Of a tile without any pixel that counts all pixels count: a dead sensor must be seen.
    known[~known.any(1)] = True
    if known.all():
        few = np.percentile(values, PERCENTILES, axis=2)
        table = np.stack([values.mean(2), values.std(2), *few], 1)
    else:
        table = np.stack([_measured(*one) for one in zip(values, known, strict=True)])
    table = table.astype(np.float32)  # (n, measures, bands)
    measures = ("mean", "deviation", *(f"p{share}" for share in PERCENTILES))
    for i, measure in enumerate(measures):
        columns |= {f"{measure}:{name}:{b}": table[:, i, j] for j, b in enumerate(sensor.bands)}
    return columns


def _measured(tile: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[Any]:
    """Of one tile (bands, positions): (measures, bands)."""
    whole = np.nan_to_num(tile[:, known], posinf=0, neginf=0)
    few = np.percentile(whole, PERCENTILES, axis=1)
    return np.stack([whole.mean(1), whole.std(1), *few])


def _answered(bundle: "Bundle", answer: Any, rows: Sequence[int]) -> Columns:
    """What the answer has of each class, and how sure it is."""
    classes = bundle.classes
    if isinstance(answer, list):
        shares = np.zeros((len(rows), len(classes)), np.float32)
        sure = np.full(len(rows), np.nan, np.float32)
        for i, row in enumerate(rows):
            scores = answer[row].scores.float().cpu().numpy()
            labels = answer[row].labels.cpu().numpy()
            shares[i] = np.bincount(labels[scores >= SURE], minlength=len(classes))
            if (told := scores >= TOLD).any():
                sure[i] = scores[told].mean()
        return _named(classes, shares) | {"confidence": sure}
    some = answer[torch.as_tensor(list(rows)).to(answer.device)].float()
    if not classes:
        flat = some.flatten(1)
        means, deviations = flat.mean(1).cpu().numpy(), flat.std(1).cpu().numpy()
        return {"answer:mean": means, "answer:deviation": deviations}
    if some.ndim == 2:
        if bundle.settings.multi_label:
            shares = (some >= HALF).float().cpu().numpy()
            sure = torch.maximum(some, 1 - some).mean(1).cpu().numpy()
        else:
            shares = torch.nn.functional.one_hot(some.argmax(1), len(classes)).float().cpu().numpy()
            sure = some.amax(1).cpu().numpy()
    else:
        confidence, said = some.max(1)
        shares = np.stack(
            [np.bincount(of.ravel(), minlength=len(classes)) / of.size for of in said.cpu().numpy()]
        ).astype(np.float32)
        sure = confidence.flatten(1).mean(1).cpu().numpy()
    return _named(classes, shares) | {"confidence": sure}


def _named(classes: Sequence[str], shares: NDArray[Any]) -> Columns:
    return {f"class:{name}": shares[:, i] for i, name in enumerate(classes)}
