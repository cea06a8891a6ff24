"""Encoded tiles to pixels: JPEG by libjpeg-turbo, PNG by Pillow, TIFF (and 16-bit PNG) by GDAL.

The content decides, never a file's name. Decoding is strict: a truncated image is an error, not
a picture that is grey from the middle on. And what it gives can be trained on: where a band of
more than 8 bits has no data, it has the mean of what it has, never -9999 or NaN; and of complex
values, a radar's phase and amplitude, it gives the power |z|².
"""

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.errors import BadInput

Pixels = NDArray[Any]  # uint8, uint16, int16 or float32: its sensor's

# What a TIFF's bands may be → what its pixels are decoded to.
DTYPES = {name: name for name in ("uint8", "uint16", "int16", "float32")} | dict.fromkeys(
    ("float64", "complex64", "complex128", "complex_int16"), "float32"
)
FLOAT32_MAX = float(np.finfo(np.float32).max)
# The power of a complex value beyond this is one that no float32 holds.
COMPLEX_MAX = 1.8e19
# Sentinel-2's reflectances come as uint16 and as int16: beyond 32767 there is next to nothing.
INT16_MAX = 32767
MAX_SATURATED_SHARE = 0.01
# Bands whose numbers are no brightness → what they are.
NO_BRIGHTNESS = {
    "palette": "colours by number, of a palette",
    **dict.fromkeys(("cyan", "magenta", "yellow", "black"), "a printer's colours, CMYK"),
    **dict.fromkeys(("hue", "saturation", "lightness"), "hue, saturation and lightness"),
    **dict.fromkeys(("Y", "Cb", "Cr"), "luma and chroma, YCbCr"),
}


def kind(data: bytes) -> str | None:
    """`jpg`, `png` or `tif` by the first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    return None


def decode(data: bytes, dtype: str | None = None) -> Pixels:
    """Pixels of an encoded tile, (H, W, C): RGB for the sensor rgb, an alpha band dropped.

    uint8, uint16 or int16 as stored, float32 for floats of either size, and the power |z|² as
    float32 for complex values. In all but uint8, each band's missing values (nodata, masked, NaN,
    infinite) are the mean of the band's others in this tile, and 0 in a band that has none.

    Args:
        dtype: of the sensor's decoded pixels, which the tile's must then fit (`fitted`).

    Raises:
        BadInput: not an image, truncated, or of another dtype; the reason without the file's name.
    """
    pixels = _decoded(data)
    return pixels if dtype is None else fitted(pixels, dtype)


def decode_mask(data: bytes) -> Pixels:
    """A stored mask, (H, W, 1) of uint8: the numbers of its coding's classes.

    Raises:
        BadInput: damaged; the reason.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            return np.array(opened.convert("L"))[:, :, None]
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"damaged mask: {_short(error)}") from None


def decode_heights(data: bytes) -> Pixels:
    """Stored heights, (H, W, 1) of float32, in metres; NaN where there are none.

    Raises:
        BadInput: damaged; the reason.
    """
    from rasterio.errors import RasterioError, RasterioIOError
    from rasterio.io import MemoryFile

    expect_no_coordinates()
    try:
        with MemoryFile(data) as file, file.open(driver="GTiff") as opened:
            raw, gaps = read(opened)
    except (RasterioIOError, RasterioError) as error:
        raise BadInput(f"damaged heights: {_short(error)}") from None
    heights = raw[:, :, :1].astype(np.float32)
    if gaps is not None:
        heights[gaps[:, :, :1]] = np.nan
    return heights


def fitted(pixels: Pixels, dtype: str) -> Pixels:
    """Decoded pixels as their sensor's dtype: uint16 as int16, float64 as float32.

    What int16 cannot hold is 32767, the brightest: clouds and glints, of which an image of
    reflectances has a few.

    Raises:
        BadInput: of another dtype, or more than 1 % of the values are beyond int16; the reason.
    """
    found, dtype = str(pixels.dtype), DTYPES.get(dtype, dtype)
    if found == dtype:
        return pixels
    if (found, dtype) == ("float64", "float32"):
        return pixels.astype(np.float32)
    if (found, dtype) != ("uint16", "int16"):
        raise BadInput(f"pixels of {found}, the model reads {dtype}")
    refuse_bright(float((pixels > INT16_MAX).mean()))
    return np.minimum(pixels, INT16_MAX).astype(np.int16)


def refuse_bright(share: float) -> None:
    """Refuse an image of uint16 for a sensor of int16, by its share of values that it cannot hold.

    Raises:
        BadInput: more than 1 %; the reason.
    """
    if share > MAX_SATURATED_SHARE:
        raise BadInput(
            f"{100 * share:.0f} % of its values of uint16 are over {INT16_MAX}: its sensor is of "
            f"int16, declare one of uint16"
        )


def _decoded(data: bytes) -> Pixels:
    form = kind(data)
    if form == "jpg":
        return _jpeg(data)
    if form == "png":
        # Pillow would cut 16-bit colours down to 8.
        return _gdal(data, "PNG") if deep_png(data) else _pillow(data)
    if form == "tif":
        return _gdal(data, "GTiff")
    raise BadInput("not an image" if data else "empty file")


def deep_png(head: bytes) -> bool:
    """Whether a PNG, of which these are the first bytes, has 16 bits a band."""
    return head[24:25] == b"\x10"


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
            image.load()
            if image.mode in ("1", "LA"):
                image = image.convert("L")
            elif image.mode in ("P", "CMYK", "RGBA", "PA"):
                image = image.convert("RGB")
            pixels = np.asarray(image)
    except Image.DecompressionBombError:
        raise BadInput("decompression bomb: far more pixels than its bytes account for") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadInput(f"damaged image: {_short(error)}") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _gdal(data: bytes, driver: str) -> Pixels:
    from rasterio.errors import RasterioError, RasterioIOError
    from rasterio.io import MemoryFile

    expect_no_coordinates()
    try:
        with MemoryFile(data) as memory, memory.open(driver=driver) as scene:
            if scene.dtypes[0] not in DTYPES:
                raise BadInput(f"bands of {scene.dtypes[0]}: {', '.join(DTYPES)} are read")
            return filled(*read(scene))
    except (RasterioIOError, RasterioError) as error:
        name = "PNG" if driver == "PNG" else "TIFF"
        raise BadInput(f"damaged {name}: {_short(error)}") from None


def read(scene: Any, window: Any = None) -> tuple[Pixels, NDArray[np.bool_] | None]:
    """Bands of an open rasterio dataset as they are, (H, W, C), and where they lack data.

    In memory colours of 8 bits lie pixel by pixel, all else band by band.

    Args:
        window: ((row, end), (col, end)); None: all of it.

    Returns:
        The second is of the same shape; None where nothing is missing, and for uint8, where
        missing pixels stay what they are (black, as a rule).
    """
    from rasterio.enums import MaskFlags

    bands = colour_bands(scene)
    (top, bottom), (left, right) = window or ((0, scene.height), (0, scene.width))
    # numpy has no complex integers. GDAL writes the bands where they belong: no second copy.
    dtype = "complex64" if scene.dtypes[0] == "complex_int16" else scene.dtypes[0]
    height, width = bottom - top, right - left
    raw: Pixels
    if dtype == "uint8":
        raw = np.empty((height, width, len(bands)), dtype)
    else:
        # Each band in one piece: what is done with many bands is done band by band.
        raw = np.empty((len(bands), height, width), dtype).transpose(1, 2, 0)
    scene.read(bands, window=window, out=raw.transpose(2, 0, 1))
    if raw.dtype == np.uint8:
        if bands == [1, 1, 1]:
            colours = np.zeros((256, 3), np.uint8)
            for number, colour in scene.colormap(1).items():
                colours[number] = colour[:3]
            raw = colours[raw[..., 0]]
        return raw, None
    gaps: NDArray[np.bool_] = np.zeros_like(raw, np.bool_)
    flags = [scene.mask_flag_enums[band - 1] for band in bands]
    if raw.dtype.kind == "c" and all(MaskFlags.nodata in one for one in flags):
        # GDAL looks at the real part alone, which is often 0 where there is a signal.
        gaps |= raw == scene.nodata
    elif any(MaskFlags.all_valid not in one for one in flags):
        gaps |= scene.read_masks(bands, window=window).transpose(1, 2, 0) == 0
    if raw.dtype.kind in "fc":
        # Also true of NaN; and a float64 that no float32 can hold is no measurement.
        gaps |= ~(np.abs(raw) <= (FLOAT32_MAX if raw.dtype.kind == "f" else COMPLEX_MAX))
    return raw, gaps if gaps.any() else None


def values(raw: Pixels, gaps: NDArray[np.bool_] | None) -> Pixels:
    """What `read` gave, as `decode` has it, but for gaps, which are 0: float32 for floats, power
    for complex values."""
    seen = raw if gaps is None else np.where(gaps, 0, raw)
    if raw.dtype.kind == "c":
        seen = np.square(seen.real) + np.square(seen.imag)
    return seen.astype(np.dtype(DTYPES[str(raw.dtype)]), copy=False)


def filled(raw: Pixels, gaps: NDArray[np.bool_] | None, sensor_dtype: str | None = None) -> Pixels:
    """Pixels to train on, of what `read` gave: float32 for floats, gaps as `decode` says.

    Args:
        sensor_dtype: of the sensor's decoded pixels, as `fitted` has it.

    Raises:
        BadInput: they do not fit the sensor's dtype.
    """
    pixels = values(raw, gaps)
    if gaps is not None:
        for band in np.flatnonzero(gaps.any(axis=(0, 1))):
            has = ~gaps[..., band]
            if has.any():
                mean = pixels[..., band][has].mean(dtype=np.float64)
                pixels[..., band][~has] = mean if pixels.dtype.kind == "f" else round(float(mean))
    return pixels if sensor_dtype is None else fitted(pixels, sensor_dtype)


@lru_cache(maxsize=1)
def expect_no_coordinates() -> None:
    """Silence rasterio about images without coordinates: here they are the rule.

    Once and for the process: a filter set and taken back in one thread leaks into others.
    """
    from rasterio.errors import NotGeoreferencedWarning

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def colour_bands(scene: Any) -> list[int]:
    """Band numbers of an open rasterio dataset, without its alpha band.

    A PNG's palette is three bands, as `read` makes them. A TIFF's is a map of classes as a rule.

    Raises:
        BadInput: bands whose numbers are no brightness; the reason.
    """
    names = [meaning.name for meaning in scene.colorinterp]
    if scene.driver == "PNG" and names == ["palette"]:
        return [1, 1, 1]
    for name in names:
        if name in NO_BRIGHTNESS:
            raise BadInput(f"{NO_BRIGHTNESS[name]}: convert it to RGB or grey")
    return [number for number, name in enumerate(names, 1) if name != "alpha"]


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0][:120]
