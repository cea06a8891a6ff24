"""Encoded tiles to pixels: JPEG by libjpeg-turbo, PNG by Pillow, TIFF by GDAL.

The content decides, never a file's name. Decoding is strict: a truncated image is an error, not
a picture that is grey from the middle on.
"""

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.errors import BadInput

Pixels = NDArray[np.uint8]


def kind(data: bytes) -> str | None:
    """`jpg`, `png` or `tif` by the first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    return None


def decode(data: bytes) -> Pixels:
    """Pixels of an encoded tile, uint8 (H, W, C): RGB for the sensor rgb, an alpha band dropped.

    Raises:
        BadInput: not an image, truncated, or not 8-bit; the reason without the file's name.
    """
    form = kind(data)
    if form == "jpg":
        return _jpeg(data)
    if form == "png":
        return _pillow(data)
    if form == "tif":
        return _tiff(data)
    raise BadInput("not an image" if data else "empty file")


def _jpeg(data: bytes) -> Pixels:
    import simplejpeg

    try:
        _, _, colourspace, _ = simplejpeg.decode_jpeg_header(data)
        if colourspace in ("CMYK", "YCCK"):
            return _pillow(data)
        form = "GRAY" if colourspace == "Gray" else "RGB"
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace=form)
    except ValueError as error:
        raise BadInput(f"damaged JPEG: {_short(error)}") from None
    return pixels


def _pillow(data: bytes) -> Pixels:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            image: Image.Image = opened
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise BadInput("more than 8 bits a band")
            image.load()
            if image.mode in ("1", "LA"):
                image = image.convert("L")
            elif image.mode in ("P", "CMYK", "RGBA", "PA"):
                image = image.convert("RGB")
            pixels = np.asarray(image)
    except BadInput:
        raise
    except Image.DecompressionBombError:
        raise BadInput("decompression bomb: far more pixels than its bytes account for") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadInput(f"damaged image: {_short(error)}") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _tiff(data: bytes) -> Pixels:
    from rasterio.errors import RasterioError, RasterioIOError
    from rasterio.io import MemoryFile

    expect_no_coordinates()
    try:
        with MemoryFile(data) as memory, memory.open(driver="GTiff") as scene:
            if scene.dtypes[0] != "uint8":
                raise BadInput(f"bands of {scene.dtypes[0]}, not uint8")
            bands: Any = scene.read(colour_bands(scene))
    except (RasterioIOError, RasterioError) as error:
        raise BadInput(f"damaged TIFF: {_short(error)}") from None
    return np.ascontiguousarray(bands.transpose(1, 2, 0))


@lru_cache(maxsize=1)
def expect_no_coordinates() -> None:
    """Silence rasterio about images without coordinates: here they are the rule.

    Once and for the process: a filter set and taken back in one thread leaks into others.
    """
    from rasterio.errors import NotGeoreferencedWarning

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def colour_bands(scene: Any) -> list[int]:
    """Band numbers of an open rasterio dataset, without its alpha band."""
    from rasterio.enums import ColorInterp

    return [i + 1 for i, meaning in enumerate(scene.colorinterp) if meaning != ColorInterp.alpha]


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:120]
