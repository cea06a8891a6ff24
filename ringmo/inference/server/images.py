"""What strangers send or name, to pixels: every image is looked at before it is decoded.

A body is JPEG, PNG or TIFF by its first bytes, and is opened from memory by that format's driver
alone: no VRT, no prefix of GDAL's, no side file, nothing that lies elsewhere. A reference is the
path of a file below the one folder that the server was given, after all links are followed, or the
key of an object below the one prefix; it is opened by the same drivers. Sides and bands are checked
in the header.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ringmo.data import decode, scenes
from ringmo.data.buckets import Bucket
from ringmo.errors import BadInput, RingmoError, Unreachable

PART = 1 << 18  # bytes of an object that are brought at once


class Refused(RingmoError):
    """A request that is not answered; `status` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Place(BaseModel):
    """A window of a scene, in its pixels from the top left."""

    model_config = ConfigDict(extra="forbid")

    col: int = Field(ge=0)
    row: int = Field(ge=0)
    width: int = Field(ge=1)
    height: int = Field(ge=1)


@dataclass
class Picture:
    """Decoded pixels (H, W, bands); where they lie, if the file says so: an affine transform and
    a reference system."""

    pixels: decode.Pixels
    transform: Any = None
    crs: Any = None


def from_body(data: bytes, bands: int, max_side: int) -> Picture:
    """The image that a body is.

    Raises:
        Refused: no image, too large. BadInput: damaged, of other bands, or without data.
    """
    form = decode.kind(data)
    if form is None:
        raise Refused(415, "not an image: JPEG, PNG and TIFF are read" if data else "empty body")
    if form == "tif":
        from rasterio import Env
        from rasterio.errors import RasterioError
        from rasterio.io import MemoryFile

        decode.expect_no_coordinates()
        with Env(**scenes.GDAL), MemoryFile(data) as memory:
            try:
                with memory.open(driver="GTiff") as file:
                    return _window(file, None, bands, max_side)
            except (RasterioError, MemoryError) as error:
                text = str(error.__cause__ or error).split("\n")[0]
                raise BadInput(f"damaged TIFF: {text.replace(memory.name, '')[:120]}") from None
    height, width, found = _jpeg_size(data) if form == "jpg" else _png_size(data)
    _check_size(height, width, max_side)
    if found != bands:
        raise BadInput(f"{found} bands, the model reads {bands}")
    return Picture(decode.decode(data))


def from_scene(
    root: Path | Bucket, name: str, place: Place | None, bands: int, max_side: int
) -> Picture:
    """A window of a scene below `root`; None: all of it.

    Raises:
        Refused: outside of `root`, no such file, no image, too large, or not in the scene; the
            bucket does not answer.
        BadInput: damaged, of other bands, or without data.
    """
    with (
        _opened_there(root, name) if isinstance(root, Bucket) else _opened_here(root, name) as file
    ):
        return _window(file, place, bands, max_side)


@contextmanager
def _opened_here(root: Path, name: str) -> Iterator[Any]:
    path = _below(root, name)
    try:
        with path.open("rb") as head:
            form = decode.kind(head.read(16))
    except OSError as error:
        raise Refused(404, f"{name}: {error.strerror}") from None
    if form is None:
        raise _no_image(name)
    with scenes.opened(path) as file:
        yield file


@contextmanager
def _opened_there(root: Bucket, name: str) -> Iterator[Any]:
    import rasterio
    from rasterio.errors import RasterioError

    odd = not name.isprintable() or not {"", ".", ".."}.isdisjoint(name.split("/"))
    try:
        found = None if odd else root.opened(name)
    except (BadInput, Unreachable) as error:
        raise Refused(502, str(error)) from None
    if found is None:
        raise Refused(404, f"{name[:200]!r}: no such object below the server's prefix")
    parts = io.BufferedReader(found, PART)
    try:
        form = decode.kind(parts.read(16))
    except OSError as error:
        raise Refused(502, error.strerror or "the bucket broke off") from None
    if form is None:
        raise _no_image(name)
    parts.seek(0)
    decode.expect_no_coordinates()
    with rasterio.Env(**scenes.GDAL):
        try:
            with rasterio.open(parts, driver=scenes.DRIVERS[form]) as file:
                yield file
        except (RasterioError, MemoryError) as error:
            if found.failure:
                raise Refused(502, str(found.failure)) from None
            text = str(error.__cause__ or error).split("\n")[0]
            raise BadInput(f"{name}: damaged image: {text[:120]}") from None


def _no_image(name: str) -> Refused:
    return Refused(415, f"{name}: not an image: JPEG, PNG and TIFF are read")


def _below(root: Path, name: str) -> Path:
    """A regular file below a folder, links followed. It says no more than that there is none."""
    missing = Refused(404, f"{name[:200]!r}: no such file below the server's folder")
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # a null byte; links in a circle
        raise missing from None
    if Path(name).is_absolute() or not path.is_relative_to(root) or not path.is_file():
        raise missing
    return path


def _window(file: Any, place: Place | None, bands: int, max_side: int) -> Picture:
    """Pixels of an open dataset, after a look at what it says of itself."""
    scenes.refuse_odd(file)
    numbers = decode.colour_bands(file)
    if len(numbers) != bands:
        raise BadInput(f"{len(numbers)} bands, the model reads {bands}")
    if file.dtypes[0] not in decode.DTYPES:
        raise BadInput(f"bands of {file.dtypes[0]}: {', '.join(decode.DTYPES)} are read")
    at = place or Place(col=0, row=0, width=file.width, height=file.height)
    _check_size(at.height, at.width, max_side)
    if at.col + at.width > file.width or at.row + at.height > file.height:
        raise Refused(
            422, f"the window ends beyond the scene, which has {file.width} x {file.height} pixels"
        )
    box = ((at.row, at.row + at.height), (at.col, at.col + at.width))
    raw, gaps = decode.read(file, box)
    empty = gaps is not None and bool(gaps.all())
    if raw.dtype == np.uint8 and any("all_valid" not in _names(f) for f in file.mask_flag_enums):
        empty = not file.dataset_mask(window=box).any()
    if empty:
        raise BadInput("no pixel has data")
    transform, crs = scenes.placing(file)
    if transform is not None:
        transform = transform @ transform.translation(at.col, at.row)
    return Picture(decode.filled(raw, gaps), transform, crs)


def _names(flags: Any) -> list[str]:
    return [flag.name for flag in flags]


def _jpeg_size(data: bytes) -> tuple[int, int, int]:
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadInput(f"damaged JPEG: {str(error)[:120]}") from None
    return height, width, 1 if colours == "Gray" else 3


def _png_size(data: bytes) -> tuple[int, int, int]:
    """Of its header, which comes first: sides, and bands without alpha, a palette as three."""
    if len(data) < 26 or data[12:16] != b"IHDR":
        raise BadInput("damaged PNG: no header")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return height, width, 1 if data[25] in (0, 4) else 3


def _check_size(height: int, width: int, max_side: int) -> None:
    if height < 1 or width < 1:
        raise BadInput("an image without a pixel")
    if max(height, width) > max_side:
        raise Refused(
            413,
            f"{width} x {height} pixels: at most {max_side} a side are answered for at once "
            f"(--max-side); name windows of it, or use `ringmo predict`",
        )
