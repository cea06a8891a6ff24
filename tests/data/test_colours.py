"""What is shown of a tile: its colours, whatever the sensor."""

import numpy as np

from ringmo.config import Sensor
from ringmo.data.colours import stretched, visible

S2 = ["B01", "B02", "B03", "B04", "B08"]


def sensor(bands: list[str], dtype: str) -> Sensor:
    ones = [1.0] * len(bands)
    return Sensor.model_validate({"bands": bands, "dtype": dtype, "mean": ones, "std": ones})


def test_bytes_are_shown_as_they_are() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert (visible(tile, sensor(["red", "green", "blue"], "uint8")) == tile).all()


def test_colours_are_found_by_their_bands_names() -> None:
    tile = np.zeros((10, 10, 5), np.int16)
    tile[:5, :, 3] = 3000  # red above
    tile[:, :5, 1] = 500  # blue on the left
    shown = visible(tile, sensor(S2, "int16"))
    assert shown.shape == (10, 10, 3)
    assert (shown[:5, :, 0] == 255).all() and (shown[5:, :, 0] == 0).all()
    assert (shown[:, :5, 2] == 255).all() and (shown[:, 5:, 2] == 0).all()
    assert not shown[:, :, 1].any()


def test_a_reconstruction_is_stretched_as_its_original() -> None:
    original = np.linspace(-20, 0, 100, dtype=np.float32).reshape(10, 10, 1)
    radar = sensor(["VV"], "float32")
    assert np.ptp(visible(original, radar)) == 255
    flat = stretched(np.full_like(original, -10), radar, original)
    assert flat.shape == (10, 10, 1) and np.ptp(flat) == 0 and 127 <= flat.flat[0] <= 128


def test_power_is_shown_in_decibels_and_scaled_bytes_as_bytes() -> None:
    radar = Sensor.model_validate(
        {"bands": ["HH"], "dtype": "complex64", "decibels": True, "mean": [0], "std": [1]}
    )
    decades = np.logspace(0, 8, 81, dtype=np.float32).reshape(9, 9, 1)
    assert np.median(visible(decades, radar)) in (127, 128)
    scaled = Sensor.model_validate(
        {"bands": ["grey"], "dtype": "uint8", "scale": 1 / 255, "mean": [0], "std": [1]}
    )
    tile = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    assert (visible(tile, scaled) == tile).all()
    # A reconstruction comes in the units of the mean, here 0 to 1.
    assert np.ptp(stretched(tile / np.float32(255), scaled)) == 255
