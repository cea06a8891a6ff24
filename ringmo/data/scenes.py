"""Source images of any size to tiles: what fits one tile stays as it came, the rest is cut.

A large scene is read in strips as high as a tile, never whole. What is wrong with an image is a
BadInput whose text is the reason alone; ingest adds the file's name.
"""

import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data import decode
from ringmo.errors import BadInput

# No side files read or written; a damaged JPEG is an error, not a half-grey picture.
GDAL = {
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
    "GDAL_CACHEMAX": 256,
    "CPL_LOG": os.devnull,
}
DRIVERS = {"tif": "GTiff", "png": "PNG", "jpg": "JPEG"}
# Real imagery compresses a few times, blank paper perhaps a hundred; zlib's limit is 1032.
BOMB_BYTES, BOMB_RATIO = 256e6, 200
METRES_PER_DEGREE = 111_320


@dataclass
class Tile:
    """One tile, encoded and decoded. `valid` is None where every pixel has data.

    In uint8 a pixel has data where the file says so; in other integers where any band has, since
    a single band's 0 may be a measurement; in floats where every band has.
    """

    row: int
    col: int
    form: str
    data: bytes
    pixels: decode.Pixels
    valid: NDArray[np.bool_] | None = None
    crs: str | None = None
    bounds: tuple[float, float, float, float] = (math.nan,) * 4
    gsd_m: float = math.nan
    acquired: str | None = None


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sensor_of(
    bands: int,
    dtype: str,
    sensors: Mapping[str, Sensor],
    chosen: str | None = None,
    names: Sequence[str | None] = (),
) -> str:
    """Name of the sensor that these bands fit, by their number and dtype.

    float64 counts as float32, and every complex type as complex64. uint16 fits a sensor of int16
    where no sensor of uint16 has so many bands; `decode.fitted` then looks at the values. Of
    sensors that share both, it is the one that was chosen, or whose bands have these names.

    Args:
        chosen: what ingest.about says of the source. names: the bands' descriptions.

    Raises:
        BadInput: none fits, which names the nearest; the chosen one does not; several do.
    """
    kind = "complex64" if dtype.startswith("complex") else decode.DTYPES.get(dtype)
    of_bands = {name: s for name, s in sensors.items() if len(s.bands) == bands}
    exact = [name for name, sensor in of_bands.items() if sensor.dtype == kind]
    near = [name for name, s in of_bands.items() if (dtype, s.dtype) == ("uint16", "int16")]
    found, fit = f"{_bands(bands)} of {dtype}", "fits" if bands == 1 else "fit"
    if chosen is not None:
        if chosen not in exact + near:
            raise BadInput(
                f"{found}: not of sensor {chosen}, which ingest.about names "
                f"({_its_bands(sensors[chosen])})"
            )
        return chosen
    fitting = exact or near
    if len(fitting) > 1:
        said = [(name or "").lower() for name in names]
        named = [one for one in fitting if [b.lower() for b in sensors[one].bands] == said]
        fitting = named if len(named) == 1 else fitting
    if len(fitting) > 1:
        raise BadInput(
            f"{found} {fit} sensors {' and '.join(fitting)}: say which it is, "
            f"ingest.about: {{SOURCE: {{sensor: {fitting[0]}}}}}, or describe its bands in the file"
        )
    if fitting:
        return fitting[0]

    def distance(name: str) -> tuple[bool, int]:
        return sensors[name].dtype != kind, abs(len(sensors[name].bands) - bands)

    nearest = min(sensors, key=distance)
    raise BadInput(f"{found} {fit} no sensor (nearest: {nearest}, {_its_bands(sensors[nearest])})")


def _its_bands(sensor: Sensor) -> str:
    return f"{_bands(len(sensor.bands))} of {sensor.dtype}"


def _bands(count: int) -> str:
    return f"{count} band{'s' if count != 1 else ''}"


def read_whole(path: Path, tile_size: int, sensors: dict[str, Sensor]) -> tuple[str, Tile | None]:
    """Sensor and the one tile of an image; None as the tile where the image must be cut.

    Raises:
        BadInput: unreadable, damaged, or of no sensor; the reason.
    """
    with path.open("rb") as file:
        head = file.read(16)
    form = decode.kind(head)
    if form is None:
        raise BadInput("not an image (JPEG, PNG and TIFF are read)" if head else "empty file")
    if form == "tif":
        return _whole_tiff(path, tile_size, sensors)
    width, height, bands, dtype = _header(path)
    _refuse_bomb(path, width * height * bands)
    sensor = sensor_of(bands, dtype, sensors)
    if max(width, height) > 2 * tile_size:
        return sensor, None
    data = path.read_bytes()
    return sensor, Tile(0, 0, form, data, decode.decode(data), _alpha(data, form))


def _header(path: Path) -> tuple[int, int, int, str]:
    """Width, height, bands without alpha and dtype of a JPEG or PNG, from its header."""
    from PIL import Image

    try:
        with path.open("rb") as file:
            head = file.read(26)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if decode.kind(head) != "png":
                return image.width, image.height, 1 if image.mode == "L" else 3, "uint8"
            # Types 0 and 4 are grey; Pillow's mode is RGBA for grey of 16 bits with alpha.
            bands = 1 if head[25] in (0, 4) else 3
            dtype = "uint16" if decode.deep_png(head) else "uint8"
            return image.width, image.height, bands, dtype
    except Image.DecompressionBombError:
        raise BadInput("decompression bomb: far more pixels than its bytes account for") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadInput(f"damaged image: {_reason(error, path)}") from None


def _alpha(data: bytes, form: str) -> NDArray[np.bool_] | None:
    """Where a PNG with an alpha band has data."""
    # Bit 2 of the header's colour type; every other image is spared a second look.
    if form != "png" or len(data) < 26 or not data[25] & 4:
        return None
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        valid: NDArray[np.bool_] = np.asarray(image.getchannel("A")) > 0
    return None if valid.all() else valid


def _refuse_bomb(path: Path, raw: int) -> None:
    if raw > BOMB_BYTES and raw > BOMB_RATIO * path.stat().st_size:
        raise BadInput("decompression bomb: far more pixels than its bytes account for")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import rasterio
    from rasterio.errors import RasterioError

    decode.expect_no_coordinates()
    try:
        with path.open("rb") as file:
            driver = DRIVERS[decode.kind(file.read(16)) or "tif"]
        with rasterio.Env(**GDAL), rasterio.open(path, driver=driver) as scene:
            yield scene
    except (RasterioError, MemoryError) as error:
        raise BadInput(f"damaged image: {_reason(error, path)}") from None


def _whole_tiff(path: Path, tile_size: int, sensors: dict[str, Sensor]) -> tuple[str, Tile | None]:
    with _opened(path) as scene:
        bands = len(decode.colour_bands(scene))
        sensor = sensor_of(bands, scene.dtypes[0], sensors)
        _refuse_bomb(path, scene.width * scene.height * bands * np.dtype(scene.dtypes[0]).itemsize)
        if max(scene.width, scene.height) > 2 * tile_size:
            return sensor, None
        raw, gaps = decode.read(scene)
        valid = _valid(scene, (0, 0, scene.height, scene.width), raw, gaps)
        tile = _located(scene, Tile(0, 0, "tif", b"", decode.filled(raw, gaps), valid))
        # As it came, unless overviews or waste make it much larger than its pixels.
        if path.stat().st_size <= 1.5 * raw.nbytes + 65_536:
            tile.data = path.read_bytes()
        else:
            tile.data = _geotiff(scene, tile, raw)
        return sensor, tile


def cut(path: Path, tile_size: int, max_nodata_share: float) -> Iterator[Tile | None]:
    """Tiles of a scene, in rows from the top left; None for a window with too much nodata.

    The last row and column are shifted inward, so that every tile has the full size where the
    scene has.

    Raises:
        BadInput: a part of the scene cannot be read.
    """
    with _opened(path) as scene:
        for row in _starts(scene.height, tile_size):
            high = min(tile_size, scene.height)
            strip, gaps = decode.read(scene, ((row, row + high), (0, scene.width)))
            valid = _valid(scene, (row, 0, high, scene.width), strip, gaps)
            for col in _starts(scene.width, tile_size):
                wide = slice(col, col + min(tile_size, scene.width))
                part = None if valid is None else valid[:, wide]
                if part is not None and 1 - part.mean() > max_nodata_share:
                    yield None
                    continue
                raw = np.ascontiguousarray(strip[:, wide])
                pixels = decode.filled(raw, None if gaps is None else gaps[:, wide])
                full = part is None or bool(part.all())
                tile = _located(scene, Tile(row, col, "tif", b"", pixels, None if full else part))
                tile.data = _geotiff(scene, tile, raw)
                yield tile


def _starts(length: int, tile_size: int) -> list[int]:
    """Where windows begin along one side; the last is shifted inward."""
    starts = list(range(0, max(length - tile_size, 0) + 1, tile_size))
    if starts[-1] + tile_size < length:
        starts.append(length - tile_size)
    return starts


def _valid(
    scene: Any,
    window: tuple[int, int, int, int],
    raw: decode.Pixels,
    gaps: NDArray[np.bool_] | None,
) -> NDArray[np.bool_] | None:
    """Mask of pixels with data in (row, col, height, width); None where all have.

    `raw` and `gaps` are what `decode.read` gave of that window.
    """
    from rasterio.enums import MaskFlags

    if raw.dtype != np.uint8:
        if gaps is None:
            return None
        valid = np.asarray(~(gaps.any(axis=2) if raw.dtype.kind == "f" else gaps.all(axis=2)))
        return None if valid.all() else valid
    if all(MaskFlags.all_valid in flags for flags in scene.mask_flag_enums):
        return None
    row, col, height, width = window
    valid = scene.dataset_mask(window=((row, row + height), (col, col + width))) > 0
    return None if valid.all() else valid


def _located(scene: Any, tile: Tile) -> Tile:
    """The tile with its footprint, ground sampling distance and time, where the scene says."""
    from rasterio.windows import Window

    height, width = tile.pixels.shape[:2]
    tile.acquired = _iso(scene.tags().get("TIFFTAG_DATETIME"))
    if scene.crs is None or scene.transform.is_identity:
        return tile
    transform = scene.window_transform(Window(tile.col, tile.row, width, height))
    corners = [transform @ (x, y) for x in (0, width) for y in (0, height)]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    tile.bounds = (min(xs), min(ys), max(xs), max(ys))
    tile.crs = scene.crs.to_string()
    across = math.hypot(transform.a, transform.d)
    down = math.hypot(transform.b, transform.e)
    if scene.crs.is_geographic:
        latitude = math.radians((tile.bounds[1] + tile.bounds[3]) / 2)
        across *= METRES_PER_DEGREE * math.cos(latitude)
        down *= METRES_PER_DEGREE
    else:
        metres = scene.crs.linear_units_factor[1]
        across, down = across * metres, down * metres
    tile.gsd_m = round(math.sqrt(abs(across * down)), 6)
    return tile


def _iso(text: str | None) -> str | None:
    """A TIFF's `2024:05:01 10:20:30` as ISO 8601."""
    if not text or len(text) < 19 or text[4] != ":":
        return None
    return f"{text[:10].replace(':', '-')}T{text[11:19]}"


def _geotiff(scene: Any, tile: Tile, raw: decode.Pixels) -> bytes:
    """A lossless one-tile GeoTIFF of the scene's own values.

    Where data is missing without a nodata value to say so, with alpha; of more than 8 bits, which
    GDAL does not read as one, with a mask.
    """
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.io import MemoryFile
    from rasterio.windows import Window

    height, width, bands = raw.shape
    unsaid = tile.valid is not None and scene.nodata is None
    alpha = unsaid and raw.dtype == np.uint8
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "width": width,
        "height": height,
        "count": bands + alpha,
        "dtype": str(raw.dtype),
        "compress": "deflate",
        "predictor": 3 if raw.dtype.kind == "f" else 2,
        "zlevel": 6,
        "interleave": "pixel",
        "photometric": "rgb" if bands == 3 and raw.dtype == np.uint8 else "minisblack",
        "nodata": scene.nodata,
    }
    if tile.crs is not None:
        window = Window(tile.col, tile.row, width, height)
        profile |= {"crs": scene.crs, "transform": scene.window_transform(window)}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write(raw.transpose(2, 0, 1), list(range(1, bands + 1)))
            if alpha and tile.valid is not None:
                target.colorinterp = (*target.colorinterp[:bands], ColorInterp.alpha)
                target.write(tile.valid.astype(np.uint8) * 255, bands + 1)
            elif unsaid and tile.valid is not None:
                target.write_mask(tile.valid.astype(np.uint8) * 255)
        data: bytes = memory.read()
    return data


def _reason(error: BaseException, path: Path) -> str:
    cause = error.__cause__ or error
    text = str(cause).split("\n")[0].replace(str(path), "").replace(path.name, "")
    return text.strip(" :,'")[:120] or type(cause).__name__
