"""Normalisation: a sensor's decoded pixels to what its model reads, and back, on the device."""

from typing import Any

import torch
from torch import Tensor, nn

from ringmo.config import Sensor
from ringmo.data.values import input_values


class Normal(nn.Module):
    """A sensor's values, mean and deviation on a device; not among a model's weights.

    Raises:
        ValueError: the sensor's mean and std are null: resolve them first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, sensor: Sensor, device: torch.device | str) -> None:
        super().__init__()
        if sensor.mean is None or sensor.std is None:
            raise ValueError("mean and std are null")
        self.sensor = sensor
        shape: Any = (1, -1, 1, 1)
        for name, numbers in (("mean", sensor.mean), ("std", sensor.std)):
            values = torch.tensor(numbers, device=device).view(shape)
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Decoded pixels (B, bands, H, W) → float32 of mean 0 and deviation 1 a band."""
        return (input_values(pixels.float(), self.sensor) - self.mean) / self.std

    def back(self, images: Tensor) -> Tensor:
        """Normalised images → values as `input_values` gives them, in the units of the mean."""
        return images * self.std + self.mean
