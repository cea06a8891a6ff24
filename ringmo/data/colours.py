"""Pixels of any sensor as colours that people see."""

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data.decode import Pixels
from ringmo.data.values import input_values


def visible(pixels: Pixels, sensor: Sensor) -> NDArray[np.uint8]:
    """What is shown of a decoded tile (H, W, bands): (H, W, 3), or one band as grey (H, W, 1).

    8-bit pixels are shown as they are, others as `stretched`.
    """
    if sensor.dtype == "uint8":
        return pixels[:, :, sensor.shown].astype(np.uint8)
    return stretched(input_values(pixels, sensor), sensor)


def stretched(values: Pixels, sensor: Sensor, like: Pixels | None = None) -> NDArray[np.uint8]:
    """What is shown of values as a model reads them, before normalisation.

    Each band from the 2nd to the 98th percentile of `like`, by default of the tile itself; those
    that are 8-bit pixels as they are.
    """
    chosen = values[:, :, sensor.shown]
    if sensor.dtype == "uint8" and sensor.plain:
        return np.clip(np.rint(chosen), 0, 255).astype(np.uint8)
    reference = chosen if like is None else like[:, :, sensor.shown]
    low, high = np.percentile(reference, (2, 98), axis=(0, 1))
    shown: NDArray[np.float64] = 255 * (chosen - low) / np.maximum(high - low, 1e-6)
    return np.rint(np.clip(shown, 0, 255)).astype(np.uint8)
