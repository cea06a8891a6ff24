"""How a sensor's pixels become model input, up to normalisation: scale, offset, decibels, clip.

The order is written here once, for NumPy's arrays, of which ingest takes its measures, and for
PyTorch's tensors, which stay on their device.
"""

from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ringmo.config import Sensor
from ringmo.data.decode import Pixels

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-10  # -100 dB: far below what a radar hears, and no -inf where it heard nothing


@overload
def input_values(pixels: Pixels, sensor: Sensor) -> Pixels: ...
@overload
def input_values(pixels: "Tensor", sensor: Sensor) -> "Tensor": ...
def input_values(pixels: Any, sensor: Sensor) -> Any:
    """Decoded pixels in the units of the sensor's mean and std.

    Each value by itself, so the bands may lie in any dimension. float32; of a sensor that asks for
    no step, the pixels themselves.
    """
    if sensor.plain:
        return pixels
    array = isinstance(pixels, np.ndarray)
    values = pixels.astype(np.float32) if array else pixels.float()
    if (sensor.scale, sensor.offset) != (1, 0):
        values = values * sensor.scale + sensor.offset
    if sensor.decibels:
        values = values.clip(min=FLOOR)
        values = 10 * (np.log10(values) if array else values.log10())
    return values if sensor.clip is None else values.clip(*sensor.clip)


def decoded_pixels(values: Pixels, sensor: Sensor) -> Pixels:
    """The way back: pixels of the sensor's decoded dtype that have these values, or the nearest."""
    pixels = np.asarray(values, np.float64)
    if sensor.clip is not None:
        pixels = pixels.clip(*sensor.clip)
    if sensor.decibels:
        pixels = 10 ** (pixels / 10)
    pixels = (pixels - sensor.offset) / sensor.scale
    dtype = np.dtype(sensor.decoded)
    if dtype.kind in "iu":
        pixels = pixels.round().clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return pixels.astype(dtype)
