"""How pixels become model input: one order, the same for arrays and tensors, and the way back."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from ringmo.config import Sensor
from ringmo.data.measures import cloud_share, eight_bit, measure
from ringmo.data.values import decoded_pixels, input_values
from ringmo.models.normal import Normal


def sensor(dtype: str, **changes: Any) -> Sensor:
    values = {"bands": ["a", "b"], "dtype": dtype, "mean": [1.0, 2.0], "std": [3.0, 4.0], **changes}
    return Sensor.model_validate(values)


STEPS = {
    "landsat": sensor("uint16", scale=2.75e-5, offset=-0.2, clip=[0, 1]),
    "power": sensor("float32", decibels=True),
    "slc": sensor("complex64", scale=1e-3, offset=1e-9, decibels=True, clip=[-40, 30]),
    "bytes": sensor("uint8", scale=1 / 255),
    "plain": sensor("int16"),
}


def pixels(one: Sensor, side: int = 16) -> Any:
    random = np.random.default_rng(3)
    if one.decoded == "float32":
        values = random.exponential(1e3, (side, side, 2))
        values[0] = 0
        return values.astype(np.float32)
    top = np.iinfo(one.dtype).max
    return random.integers(0, top, (side, side, 2), endpoint=True).astype(one.dtype)


def test_scale_offset_decibels_clip_in_this_order() -> None:
    one = sensor("uint16", scale=2.0, offset=-100.0, decibels=True, clip=[-50, 25])
    found = input_values(np.array([[[50, 55], [100, 1000]]], np.uint16), one)
    assert found.dtype == np.float32
    assert found.ravel() == pytest.approx([-50, 10, 20, 25])


def test_landsats_published_example() -> None:
    """USGS: 18,639 is a reflectance of 0.313."""
    found = input_values(np.full((1, 1, 2), 18_639, np.uint16), STEPS["landsat"])
    assert found.ravel() == pytest.approx([0.3126, 0.3126], abs=1e-4)


def test_zero_and_less_have_a_floor_in_decibels_and_no_infinity() -> None:
    found = input_values(np.array([[[0.0, -5.0]]], np.float32), STEPS["power"])
    assert found.ravel() == pytest.approx([-100, -100])


@pytest.mark.parametrize("name", STEPS)
def test_tensors_are_as_arrays_and_normalised_after_it(name: str) -> None:
    one = STEPS[name]
    stored = pixels(one)
    values = input_values(stored, one)
    images = torch.from_numpy(stored).permute(2, 0, 1)[None]
    assert torch.allclose(
        input_values(images, one).float(),
        torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None],
        atol=1e-5,
    )
    normal = Normal(one, "cpu")
    assert torch.equal(normal(images)[0, 1], (input_values(images.float(), one)[0, 1] - 2) / 4)
    again = normal.back(normal(images))[0].permute(1, 2, 0).numpy()
    assert np.allclose(again, values, rtol=1e-5, atol=1e-4)


def test_a_plain_sensor_costs_nothing_and_changes_no_bit() -> None:
    one = STEPS["plain"]
    stored = pixels(one)
    assert input_values(stored, one) is stored
    images = torch.from_numpy(stored).permute(2, 0, 1)[None].float()
    assert input_values(images, one) is images
    mean, std = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert torch.equal(Normal(one, "cpu")(images), (images - mean) / std)


@pytest.mark.parametrize("name", STEPS)
def test_the_way_back_gives_pixels_of_these_values(name: str) -> None:
    one = STEPS[name]
    values = input_values(pixels(one), one)
    found = decoded_pixels(values, one)
    assert found.dtype == one.decoded
    assert np.allclose(input_values(found, one), values, rtol=1e-5, atol=1e-4)


def test_null_normalisation_is_refused_where_numbers_are_needed() -> None:
    with pytest.raises(ValueError, match="null"):
        Normal(sensor("uint8", mean=None, std=None), "cpu")


def test_measures_of_bands_are_of_what_a_model_reads() -> None:
    for name, one in STEPS.items():
        stored = pixels(one)
        found, values = measure(stored, None, one), input_values(stored, one).astype(np.float64)
        assert found.band_means == pytest.approx(list(values.mean((0, 1))), rel=1e-5), name
        assert found.band_stds == pytest.approx(list(values.std((0, 1))), rel=1e-5), name
    # Of bytes all other measures stay those of the bytes, whatever the model reads.
    stored = pixels(STEPS["bytes"])
    known, scaled = measure(stored), measure(stored, None, STEPS["bytes"])
    assert (known.mean, known.std, known.phash) == (scaled.mean, scaled.std, scaled.phash)
    assert known.band_means != scaled.band_means


def test_small_values_keep_their_digits() -> None:
    one = sensor("uint16", scale=1e-6, clip=[0, 1], mean=None, std=None)
    stored = np.full((16, 16, 2), 37, np.uint16)
    assert measure(stored, None, one).band_means == pytest.approx([3.7e-5, 3.7e-5], rel=1e-5)


def test_gaps_count_in_no_mean() -> None:
    one, stored = STEPS["power"], pixels(STEPS["power"])
    valid = np.ones(stored.shape[:2], bool)
    valid[0] = False  # where it is 0, so -100 dB
    found = measure(stored, valid, one)
    assert found.band_means == pytest.approx(list(input_values(stored, one)[1:].mean((0, 1))), 1e-5)


def test_8_bits_of_a_sensor_with_null_are_its_clip() -> None:
    one = sensor("uint16", scale=2.75e-5, offset=-0.2, clip=[0, 1], mean=None, std=None)
    levels = decoded_pixels(np.array([[[-0.1, 0.0], [0.5, 1.0], [0.25, 1.4]]]), one)
    assert eight_bit(levels, one).ravel().tolist() == [0, 0, 128, 255, 64, 255]
    assert eight_bit(levels, sensor("uint16", scale=2.75e-5)).ravel().tolist() != [0, 0, 128, 255]


def test_clouds_are_looked_for_in_values_and_where_null_in_the_clip() -> None:
    bands = {"bands": ["B1", "B2", "B3", "B4"], "mean": None, "std": None}
    one = sensor("uint16", scale=2.75e-5, offset=-0.2, clip=[0, 1], **bands)
    values = np.full((16, 32, 4), 0.1)
    values[:, 16:] = 0.7
    assert cloud_share(input_values(decoded_pixels(values, one), one), None, one) == 0.5
    assert measure(decoded_pixels(values, one), None, one).cloud_share == 0.5
    assert math.isnan(measure(pixels(STEPS["power"]), None, STEPS["power"]).cloud_share)


def test_reading_changes_with_what_ingest_writes_and_with_nothing_else() -> None:
    plain = sensor("int16")
    assert plain.reading == [["a", "b"], "int16", [1.0, 2.0], [3.0, 4.0]]
    changes: list[dict[str, Any]] = [
        {"scale": 2.0}, {"offset": 1.0}, {"decibels": True}, {"clip": [0, 9]}, {"mean": [0.0, 0.0]},
    ]  # fmt: skip
    readings = [sensor("int16", **change).reading for change in [{}, *changes]]
    assert all(one not in readings[:i] for i, one in enumerate(readings))
    rgb = sensor("uint8")
    assert rgb.reading == [["a", "b"], "uint8"] == sensor("uint8", mean=[9.0, 9.0]).reading
    assert sensor("uint8", scale=2.0).reading != rgb.reading


def test_what_a_bundle_holds_of_a_plain_sensor_is_what_it_always_held() -> None:
    assert sorted(STEPS["plain"].described()) == ["bands", "dtype", "mean", "std"]
    for one in STEPS.values():
        assert Sensor.model_validate(one.described()) == one
