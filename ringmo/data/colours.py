"""Pixels of any sensor as colours that people see."""

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data.decode import Pixels


def visible(image: Pixels, sensor: Sensor, like: Pixels | None = None) -> NDArray[np.uint8]:
    """What is shown of a tile (H, W, bands): (H, W, 3), or one band as grey (H, W, 1).

    8-bit pixels are shown as they are; others are stretched, each band from the 2nd to the 98th
    percentile of `like`, by default of the tile itself.
    """
    chosen = image[:, :, sensor.shown]
    if sensor.dtype == "uint8":
        return np.clip(np.rint(chosen), 0, 255).astype(np.uint8)
    reference = chosen if like is None else like[:, :, sensor.shown]
    low, high = np.percentile(reference, (2, 98), axis=(0, 1))
    stretched: NDArray[np.float64] = 255 * (chosen - low) / np.maximum(high - low, 1e-6)
    return np.rint(np.clip(stretched, 0, 255)).astype(np.uint8)
