"""Decoding: content decides, damage is an error, colours come as RGB."""

import io

import numpy as np
import pytest
from PIL import Image
from small_imagery import encoded, geotiff, pixels

from ringmo.data.decode import decode
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
