"""Decoding: content decides, damage is an error, colours come as RGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rasterio.io import MemoryFile
from small_imagery import encoded, geotiff, pixels, write_bands

from ringmo.config import Ingest, Sensor
from ringmo.data import scenes
from ringmo.data.decode import decode, filled, fitted, read
from ringmo.errors import BadInput


def test_lossless_formats_give_the_pixels_back(tmp_path):
    image = pixels(3)
    assert (decode(encoded(image, "PNG")) == image).all()
    assert (decode(encoded(image, "TIFF")) == image).all()
    path = geotiff(tmp_path / "t.tif", 3, 0, 0)
    assert (decode(path.read_bytes()) == pixels(3, width=48, height=48)).all()


def test_jpeg_is_rgb_and_close():
    image = pixels(3)
    found = decode(encoded(image, "JPEG"))
    assert found.dtype == np.uint8
    with Image.open(io.BytesIO(encoded(image, "JPEG"))) as same:
        assert np.abs(found.astype(int) - np.asarray(same)).max() <= 2


def test_alpha_is_dropped():
    rgba = np.dstack([pixels(2), np.full((40, 48), 9, np.uint8)])
    assert (decode(encoded(rgba, "PNG")) == pixels(2)).all()
    assert (decode(encoded(rgba, "TIFF")) == pixels(2)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_truncated_image_is_an_error_not_a_grey_one(form):
    data = encoded(pixels(1, width=200, height=150), form)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BadInput):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"words", b"GIF89a..........", bytes(5000)])
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(BadInput):
        decode(data)


def file(tmp_path: Path, image: Image.Image, name: str) -> Path:
    path = tmp_path / name
    image.save(path)
    return path


def first_tile(path: Path, tile_size: int = 16) -> Any:
    seen = look(path, tile_size)
    windows = seen.windows or [scenes.Window(0, 0, tile_size, tile_size)]
    return next(iter(scenes.cut(path, windows[:1], 1.0)))


def look(path, tile_size):
    """With the bytes at hand, as ingest looks, and without: the same."""
    ingest = Ingest(sources=["."], tile_size=tile_size)
    seen, other = (scenes.look(path, ingest, SENSORS, None, d) for d in (path.read_bytes(), None))
    assert (seen.sensor, seen.windows, seen.size) == (other.sensor, other.windows, other.size)
    assert (seen.tile and seen.tile.data) == (other.tile and other.tile.data)
    return seen


SENSORS = {
    name: Sensor.model_validate({"bands": bands, "dtype": dtype, "mean": None, "std": None} | more)
    for name, bands, dtype, more in (
        ("rgb", ["red", "green", "blue"], "uint8", {}),
        ("grey", ["grey"], "uint8", {}),
        ("deep", ["red", "green", "blue"], "uint16", {"clip": [0, 1]}),
        ("deep_grey", ["grey"], "uint16", {"clip": [0, 1]}),
    )
}


def test_printers_colours_become_rgb_whole_and_cut(tmp_path):
    image = Image.fromarray(np.asarray(Image.fromarray(pixels(4)).resize((80, 64))))
    cmyk = image.convert("CMYK")
    for name, most in (("a.jpg", 40), ("a.tif", 0)):
        path = file(tmp_path, cmyk, name)
        assert (look(path, 16).sensor, look(path, 16).tile) == ("rgb", None)
        found = decode(path.read_bytes())
        assert np.abs(found.astype(int) - np.asarray(image)).max() <= most
        assert np.abs(first_tile(path).pixels.astype(int) - found[:16, :16]).max() <= 2


def test_a_png_palette_is_its_colours_whole_and_cut(tmp_path):
    image = Image.fromarray(pixels(4, width=80, height=64)).quantize(40)
    path, colours = file(tmp_path, image, "a.png"), np.asarray(image.convert("RGB"))
    assert (look(path, 16).sensor, look(path, 16).tile) == ("rgb", None)
    assert (decode(path.read_bytes()) == colours).all()
    assert (first_tile(path).pixels == colours[:16, :16]).all()
    assert (decode(first_tile(path).data) == colours[:16, :16]).all()


def test_a_tiff_of_palette_numbers_is_no_image(tmp_path):
    """A map of classes, nearly always: taken for grey, it would teach a model nonsense."""
    path = file(tmp_path, Image.fromarray(pixels(4)).quantize(40), "a.tif")
    for sees in (decode, lambda _: look(path, 64)):
        with pytest.raises(BadInput, match="of a palette: convert it to RGB"):
            sees(path.read_bytes())


@pytest.mark.parametrize(
    ("bands", "sensor"), [(1, "deep_grey"), (2, "deep_grey"), (3, "deep"), (4, "deep")]
)
def test_png_of_16_bits_is_what_its_header_says(bands, sensor, tmp_path):
    values = np.dstack([pixels(3), pixels(4)])[..., :bands].astype(np.uint16) * 257
    path = tmp_path / "a.png"
    with MemoryFile() as memory:
        shape = {"height": values.shape[0], "width": values.shape[1], "count": bands}
        with memory.open(driver="PNG", dtype="uint16", **shape) as target:
            target.write(values.transpose(2, 0, 1))
        path.write_bytes(memory.read())
    colours = values[..., : 1 if bands < 3 else 3]
    assert look(path, 64).sensor == sensor
    assert (decode(path.read_bytes()) == colours).all()
    assert (first_tile(path).pixels == colours[:16, :16]).all()


def test_grey_with_alpha_is_grey():
    for form in ("PNG", "TIFF"):
        both = np.dstack([pixels(2)[..., 0], np.full((40, 48), 9, np.uint8)])
        stream = io.BytesIO()
        Image.fromarray(both, "LA").save(stream, form)
        assert (decode(stream.getvalue()) == pixels(2)[..., :1]).all()


def spectrum(number: int, side: int = 32) -> Any:
    """Amplitude and phase, as a radar's single-look image has them."""
    random = np.random.default_rng(number)
    real, imaginary = random.normal(0, 900, (2, side, side, 1)).round()
    return (real + 1j * imaginary).astype(np.complex64)


@pytest.mark.parametrize("dtype", ["complex_int16", "complex64", "complex128"])
def test_complex_is_decoded_to_its_power(dtype, tmp_path):
    values = spectrum(1)
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", width=32, height=32, count=1, dtype=dtype) as target:
            stored = values.astype(np.complex128) if dtype == "complex128" else values
            target.write(stored.transpose(2, 0, 1))
        data = bytes(memory.read())
    found = decode(data)
    assert found.dtype == np.float32
    assert np.allclose(found, np.abs(values) ** 2, rtol=1e-6)


def test_complex_gaps_are_nan_infinite_beyond_float32_or_nodata_in_both_parts(tmp_path):
    values = spectrum(2)
    bad = (np.nan + 1j, complex(1, np.inf), 1e30 + 0j, 0j)
    values[0, :4, 0] = bad
    values[0, 4, 0] = 7j  # of which GDAL says that it has no data
    path = write_bands(tmp_path / "a.tif", values, nodata=0)
    found = decode(path.read_bytes())
    assert np.isfinite(found).all()
    assert found[0, 4, 0] == 49
    has = np.ones(values.shape, bool)
    has[0, :4] = False
    power = np.abs(values[has].astype(np.complex128)) ** 2
    assert found[has] == pytest.approx(power, rel=1e-6)
    assert found[~has] == pytest.approx([power.mean()] * 4, rel=1e-5)


def test_uint16_is_int16_for_a_sensor_that_is():
    values = np.full((20, 20, 2), 4000, np.uint16)
    values[0, :8, 0] = 65_535  # 1 % of both bands
    found = fitted(values, "int16")
    assert found.dtype == np.int16
    assert found[0, 0].tolist() == [32_767, 4000] and found[0, 8].tolist() == [4000, 4000]
    values[0, 8, 0] = 40_000
    with pytest.raises(BadInput, match="1 % of its values of uint16 are over 32767"):
        fitted(values, "int16")
    with pytest.raises(BadInput, match="pixels of uint16, the model reads float32"):
        fitted(values, "float32")


def test_a_sensor_of_int16_has_its_own_whether_whole_or_cut(tmp_path):
    import rasterio

    values = (pixels(3).astype(np.uint16) * 40).clip(100)
    values[:5] = 0
    path = write_bands(tmp_path / "a.tif", values, nodata=0)
    whole = decode(path.read_bytes(), "int16")
    with rasterio.open(path) as scene:
        assert (filled(*read(scene), "int16") == whole).all()
    assert whole.dtype == np.int16
    assert (whole[5:] == values[5:]).all()
    assert np.abs(whole[:5] - values[5:].mean((0, 1))).max() <= 0.5


def test_real_odd_files_are_decoded_or_refused_in_one_line(terramesh):
    files = sorted(terramesh.parent.glob("*/*.tif"))
    assert len(files) > 20
    for path in files:
        found = decode(path.read_bytes())
        assert found.ndim == 3 and np.isfinite(found).all()
        assert str(found.dtype) in ("uint8", "uint16", "int16", "float32")
