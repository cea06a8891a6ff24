"""Normalisation: a sensor's decoded pixels to what its model reads, and back, on the device."""

from typing import Any

import torch
from torch import Tensor

from ringmo.config import Sensor
from ringmo.data.values import input_values


class Normal:
    """A sensor's values, mean and deviation on a device.

    Raises:
        ValueError: the sensor's mean and std are null: resolve them first.
    """

    def __init__(self, sensor: Sensor, device: torch.device | str) -> None:
        if sensor.mean is None or sensor.std is None:
            raise ValueError("mean and std are null")
        self.sensor = sensor
        shape: Any = (1, -1, 1, 1)
        self.mean = torch.tensor(sensor.mean, device=device).view(shape)
        self.std = torch.tensor(sensor.std, device=device).view(shape)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Decoded pixels (B, bands, H, W) → float32 of mean 0 and deviation 1 a band."""
        return (input_values(pixels.float(), self.sensor) - self.mean) / self.std

    def back(self, images: Tensor) -> Tensor:
        """Normalised images → values as `input_values` gives them, in the units of the mean."""
        return images * self.std + self.mean
