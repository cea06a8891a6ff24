"""Source images of any size to tiles: what fits one tile stays as it came, the rest is cut.

A large scene is read in groups of windows of bounded size, never whole. What is wrong with an
image is a BadInput whose text is the reason alone; ingest adds the file's name.

Pixels are taken as they are: neither a file's scale and offset tags nor its overviews are looked
at. Set aside are what is no image of brightness (a palette, one bit a pixel), what holds several
images (pages), and what cannot be read in bounded memory (blocks of hundreds of megabytes).
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Ingest, Sensor
from ringmo.data import decode, geotiff
from ringmo.data.resampling import Side, resampled
from ringmo.errors import BadInput

# No side files read or written; a damaged JPEG is an error, not a half-grey picture.
GDAL = {
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",  # with it a truncated PNG is noise, and no error
    "GDAL_CACHEMAX": 64_000_000,  # bytes: rasterio does not read small numbers as megabytes
    "CPL_LOG": os.devnull,
}
DRIVERS = {"tif": "GTiff", "png": "PNG", "jpg": "JPEG"}
# Real imagery compresses a few times, blank paper perhaps a hundred; zlib's limit is 1032.
BOMB_BYTES, BOMB_RATIO = 256e6, 200
METRES_PER_DEGREE = 111_320
MAX_ENLARGED = 8  # times; of coarser imagery there would be next to nothing to see in a tile
SAME_GSD = 0.01  # a ground sampling distance this near the wanted one, of it, is the wanted one
# Decoded bytes that one process reads in one go (blocks narrower than the scene: the cache holds
# what two reads share), and that it is given to read. A strip, as wide as the scene, is decoded
# once for every group that a row of windows is parted into: there groups are larger and read as
# a whole. An image without random access is decoded from its top for every group.
READ_BYTES, GROUP_BYTES, STRIP_GROUP_BYTES = 16e6, 64e6, 192e6
MAX_BLOCK_BYTES = 256e6
HEAD_BYTES = 26  # up to a PNG's kind of colour


@dataclass(frozen=True, slots=True)
class Window:
    """A tile's place on the grid of the scene after resampling, in that grid's pixels."""

    row: int
    col: int
    height: int
    width: int
    scale: float = 1.0  # source pixels a pixel of the tile stands for


@dataclass
class Tile:
    """One tile, encoded and decoded. `valid` is None where every pixel has data.

    In uint8 a pixel has data where the file says so; in other integers where any band has, since
    a single band's 0 may be a measurement; in floats where every band has.

    The footprint `bounds` is the box about its corners, also where the scene is rotated, and of
    an affine fit where there are only ground control points; NaN where nothing says it.
    """

    row: int
    col: int
    form: str
    data: bytes
    pixels: decode.Pixels
    window: Window
    valid: NDArray[np.bool_] | None = None
    crs: str | None = None
    bounds: tuple[float, float, float, float] = (math.nan,) * 4
    gsd_m: float = math.nan
    acquired: str | None = None


@dataclass
class Look:
    """What an image is, and what is to be read of it."""

    sensor: str
    tile: Tile | None  # the whole image as its one tile; None where it is cut
    windows: list[Window]  # in the order in which they are read; empty where there is a tile
    groups: list[tuple[int, int]]  # windows [first, last) that are read together, in order
    size: tuple[int, int]  # the source's height and width, its own pixels


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


def look(
    path: Path,
    ingest: Ingest,
    sensors: dict[str, Sensor],
    sensor: str | None = None,
    data: bytes | None = None,
) -> Look:
    """Sensor of an image, and its one tile or the windows that it must be cut into.

    An image up to twice the tile size, after resampling, is one tile: its bytes as they came,
    unless it is resampled or much larger than its pixels (overviews, waste).

    Args:
        sensor: what ingest.about says of the source.
        data: the file's bytes, where they have been read.

    Raises:
        BadInput: unreadable, damaged, or of no sensor; the reason.
    """
    if data is None:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    else:
        head = data[:HEAD_BYTES]
    form = decode.kind(head)
    if form is None:
        raise BadInput("not an image (JPEG, PNG and TIFF are read)" if head else "empty file")
    if form == "tif":
        with opened(path) as file:
            refuse_odd(file)
            numbers = decode.colour_bands(file)
            names = [file.descriptions[number - 1] for number in numbers]
            name = sensor_of(len(numbers), file.dtypes[0], sensors, sensor, names)
            scene = OpenScene(path, file)
            _refuse_bomb(path, scene.height * scene.width * scene.layout.pixel_bytes)
            scale = scene.scale(ingest.gsd_m)
            # What is less than a pixel at the end is left out.
            height, width = (int(side / scale + 1e-6) for side in (scene.height, scene.width))
            if max(height, width) <= 2 * ingest.tile_size:
                tile = _whole(scene, Window(0, 0, height, width, scale), data)
                return Look(name, tile, [], [], (scene.height, scene.width))
            windows = _windows(height, width, ingest, scale)
            return Look(name, None, *_parted(windows, scene.layout), (scene.height, scene.width))
    width, height, bands, dtype = _header(path, head, data)
    pixel_bytes = bands * np.dtype(dtype).itemsize
    _refuse_bomb(path, width * height * pixel_bytes)
    name = sensor_of(bands, dtype, sensors, sensor)
    if max(width, height) <= 2 * ingest.tile_size:
        data = path.read_bytes() if data is None else data
        whole = Window(0, 0, height, width)
        tile = Tile(0, 0, form, data, decode.decode(data), whole, _alpha(data, form))
        return Look(name, tile, [], [], (height, width))
    windows = _windows(height, width, ingest, 1.0)
    layout = Layout(height, width, 1, width, pixel_bytes)
    return Look(name, None, *_parted(windows, layout), (height, width))


def cut(path: Path, windows: Sequence[Window], max_nodata_share: float) -> Iterator[Tile | None]:
    """Tiles of these windows of a scene, in their order; None where too much has no data.

    A tile's bytes depend on its window and the scene, not on the windows beside it.

    Args:
        windows: of `look`: one of its groups, or any of them in rows from the top left.

    Raises:
        BadInput: a part of the scene cannot be read.
    """
    with opened(path) as file:
        yield from _cut(OpenScene(path, file), windows, max_nodata_share)


def georeference(path: Path) -> tuple[Any, Any]:
    """An image's affine transform and reference system; both None where it has none.

    Raises:
        BadInput: it cannot be opened.
    """
    with opened(path) as file:
        return placing(file)


def grid(path: Path) -> tuple[tuple[int, int], Any, Any]:
    """An image's height and width, and what `georeference` gives.

    Raises:
        BadInput: it cannot be opened.
    """
    with opened(path) as file:
        return ((file.height, file.width), *placing(file))


def apart(size: tuple[int, int], one: tuple[Any, Any], other: tuple[Any, Any]) -> float:
    """How far, in pixels of the first, the corners of two grids of one size lie apart at most.

    Args:
        size: height and width. one, other: transform and reference system; 0 is the answer where
            either has none.
    """
    from rasterio.errors import CRSError
    from rasterio.warp import transform

    if one[1] is None or other[1] is None:
        return 0.0
    corners = [(x, y) for x in (0, size[1]) for y in (0, size[0])]
    xs, ys = zip(*(other[0] @ corner for corner in corners), strict=True)
    if one[1] != other[1]:
        try:
            xs, ys = transform(other[1], one[1], xs, ys)
        except CRSError:
            return 0.0
    back = [~one[0] @ place for place in zip(xs, ys, strict=True)]
    return float(np.abs(np.subtract(back, corners)).max())


def _header(path: Path, head: bytes, data: bytes | None) -> tuple[int, int, int, str]:
    """Width, height, bands without alpha and dtype of a JPEG or PNG, from its header."""
    png = decode.kind(head) == "png"
    if data is not None and not png:
        import simplejpeg

        # In a tenth of Pillow's time; what is wrong with a header is left to Pillow to say.
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            return width, height, 1 if colours == "Gray" else 3, "uint8"
    from PIL import Image

    try:
        source = path if data is None else io.BytesIO(data)
        with Image.open(source, formats=("PNG", "JPEG")) as image:
            if not png:
                return image.width, image.height, 1 if image.mode == "L" else 3, "uint8"
            # Types 0 and 4 are grey; Pillow's mode is RGBA for grey of 16 bits with alpha.
            bands = 1 if head[25] in (0, 4) else 3
            dtype = "uint16" if decode.deep_png(head) else "uint8"
            return image.width, image.height, bands, dtype
    except Image.DecompressionBombError:
        raise BadInput("decompression bomb: far more pixels than its bytes account for") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadInput(f"damaged image: {reason(error, path)}") from None


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


def refuse_odd(file: Any) -> None:
    """Set aside what is no picture of brightness, or none that can be read in bounded memory."""
    if file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS") == "1":
        raise BadInput("one bit a pixel: no imagery")
    if file.colorinterp[0].name == "palette":
        raise BadInput("colours by number, of a palette: convert it to RGB or grey")
    if len(file.subdatasets) > 1:
        raise BadInput(f"{len(file.subdatasets)} images in one file: split it into one a file")
    if len(set(file.dtypes)) > 1:
        raise BadInput(f"bands of {' and '.join(sorted(set(file.dtypes)))} in one file")
    layout = Layout.of(file)
    block = layout.block_height * layout.block_width * layout.pixel_bytes
    if block > MAX_BLOCK_BYTES:
        raise BadInput(
            f"compressed in pieces of {block / 1e6:.0f} MB: rewrite it, "
            f"gdal_translate -co TILED=YES -co COMPRESS=DEFLATE"
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    import rasterio
    from rasterio.errors import RasterioError

    decode.expect_no_coordinates()
    try:
        with path.open("rb") as file:
            driver = DRIVERS[decode.kind(file.read(16)) or "tif"]
        with rasterio.Env(**GDAL), rasterio.open(path, driver=driver) as scene:
            yield scene
    except (RasterioError, MemoryError) as error:
        raise BadInput(f"damaged image: {reason(error, path)}") from None


@dataclass
class Layout:
    """How a scene's pixels lie in its file: in blocks that are decoded as a whole."""

    height: int
    width: int
    block_height: int
    block_width: int
    pixel_bytes: int

    @classmethod
    def of(cls, file: Any) -> "Layout":
        # numpy has no complex integers.
        sizes = [4 if d == "complex_int16" else np.dtype(d).itemsize for d in file.dtypes]
        high, wide = file.block_shapes[0]
        return cls(file.height, file.width, high, wide, sum(sizes))

    @property
    def in_strips(self) -> bool:
        return self.block_width >= self.width

    @property
    def group_bytes(self) -> float:
        return STRIP_GROUP_BYTES if self.in_strips else GROUP_BYTES

    @property
    def read_bytes(self) -> float:
        return STRIP_GROUP_BYTES if self.in_strips else READ_BYTES


def _windows(height: int, width: int, ingest: Ingest, scale: float) -> list[Window]:
    """The grid of windows, in rows from the top left.

    The last row and column are shifted inward, so that every tile has the full size where the
    scene has.
    """
    size, stride = ingest.tile_size, ingest.stride or ingest.tile_size
    high, wide = min(size, height), min(size, width)
    cols = _starts(width, size, stride)
    return [
        Window(row, col, high, wide, scale) for row in _starts(height, size, stride) for col in cols
    ]


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last is shifted inward."""
    starts = list(range(0, max(length - size, 0) + 1, stride))
    if starts[-1] + max(size, stride) < length:
        starts.append(length - size)
    return starts


def _parted(
    windows: Sequence[Window], layout: Layout
) -> tuple[list[Window], list[tuple[int, int]]]:
    """Windows in the order in which they are read, and which [first, last) are read together."""
    ordered: list[Window] = []
    groups = []
    for part in _fields(windows, layout):
        before = len(ordered)
        ends = _groups(part, layout, layout.group_bytes)
        groups += [(before + first, before + last) for first, last in ends]
        ordered += part
    return ordered, groups


def _fields(windows: Sequence[Window], layout: Layout) -> Iterator[Sequence[Window]]:
    """All windows as they are; where not even one row of blocks can be read in one go, squares of
    them, of whole blocks if they can be: else each block would be decoded for every row of windows
    that it reaches into.
    """
    limit = layout.group_bytes / layout.pixel_bytes
    if layout.in_strips or layout.block_height * layout.width <= limit:
        yield windows
        return
    first = windows[0]
    # Enlarged ones take more memory than what is read for them.
    side = math.sqrt(limit) * min(first.scale, 1.0)
    rows = [list(row) for _, row in groupby(windows, key=attrgetter("row"))]
    down, across = [row[0].row for row in rows], [window.col for window in rows[0]]
    for top, bottom in _runs(down, first.height, first.scale, side, layout.block_height):
        for left, right in _runs(across, first.width, first.scale, side, layout.block_width):
            yield [window for row in rows[top:bottom] for window in row[left:right]]


def _runs(
    starts: Sequence[int], size: int, scale: float, most: float, block: int
) -> Iterator[tuple[int, int]]:
    """Windows [first, last) along one side that reach over `most` pixels of the source together.

    One at least, and rather fewer where the next then begins with a block.
    """
    first = 0
    while first < len(starts):
        last = first + 1
        while last < len(starts) and (starts[last] + size - starts[first]) * scale <= most:
            last += 1
        whole = next((i for i in range(last, first, -1) if _at_edge(starts, i, scale, block)), 0)
        last = whole if 2 * (whole - first) > last - first else last
        yield first, last
        first = last


def _at_edge(starts: Sequence[int], number: int, scale: float, block: int) -> bool:
    return number == len(starts) or starts[number] * scale % block < 1e-6


def _groups(windows: Sequence[Window], layout: Layout, limit: float) -> list[tuple[int, int]]:
    """Windows [first, last) to read together: whole rows of them, or a part of one row.

    As many as `limit` bytes allow, one at least.
    """
    one = windows[0]
    # Read, or made of what is read: the larger counts.
    pixels = limit / layout.pixel_bytes / max(one.scale, 1.0) ** 2
    rows = [list(row) for _, row in groupby(windows, key=attrgetter("row"))]
    ends = list(accumulate(map(len, rows), initial=0))
    width = max(row[-1].col + row[-1].width - row[0].col for row in rows)
    if one.height * width <= pixels:
        most = pixels / width * one.scale
        down = [row[0].row for row in rows]
        runs = _runs(down, one.height, one.scale, most, layout.block_height)
        return [(ends[top], ends[bottom]) for top, bottom in runs]
    most = pixels / one.height * one.scale
    groups = []
    for start, row in zip(ends, rows, strict=False):
        across = [window.col for window in row]
        runs = _runs(across, one.width, one.scale, most, layout.block_width)
        groups += [(start + left, start + right) for left, right in runs]
    return groups


class OpenScene:
    """An open image with what its tiles share: bands, coordinates, how it lies in its file."""

    def __init__(self, path: Path, file: Any) -> None:
        from rasterio.enums import MaskFlags

        self.path, self.file = path, file
        self.layout = Layout.of(file)
        self.height, self.width = file.height, file.width
        flags = file.mask_flag_enums
        self.full = all(MaskFlags.all_valid in one for one in flags)
        # A mask that a tile's own bands say: a nodata value, or an alpha band.
        self.says_gaps = any(MaskFlags.nodata in f or MaskFlags.alpha in f for f in flags)
        self.acquired = _iso(file.tags().get("TIFFTAG_DATETIME"))
        self.transform, self.crs = placing(file)
        self.crs_text = None if self.crs is None else self.crs.to_string()
        self.unit_m = math.nan if self.crs is None else _metres(self.crs)

    @cached_property
    def geo_keys(self) -> geotiff.Tags:
        return geotiff.geo_keys(self.crs)

    @cached_property
    def stored(self) -> geotiff.Stored | None:
        return geotiff.stored(self.path, self.file) if self.file.driver == "GTiff" else None

    def nodata_at(self, scale: float) -> float | None:
        """The value for no data in tiles; none in the powers that complex values come to."""
        powers = scale != 1 and self.file.dtypes[0].startswith("complex")
        return None if powers else self.file.nodata

    def located(self, window: Window) -> tuple[Any, tuple[float, float, float, float], float]:
        """A window's affine transform, footprint and ground sampling distance in metres."""
        place = self.transform @ self.transform.translation(
            window.col * window.scale, window.row * window.scale
        )
        if window.scale != 1:
            place = place @ self.transform.scale(window.scale)
        corners = [place @ (x, y) for x in (0, window.width) for y in (0, window.height)]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        bounds = (min(xs), min(ys), max(xs), max(ys))
        across, down = math.hypot(place.a, place.d), math.hypot(place.b, place.e)
        if self.crs.is_geographic:
            across *= METRES_PER_DEGREE * math.cos(math.radians((bounds[1] + bounds[3]) / 2))
            down *= METRES_PER_DEGREE
        else:
            across, down = across * self.unit_m, down * self.unit_m
        return place, bounds, round(math.sqrt(abs(across * down)), 6)

    def scale(self, gsd_m: float | None) -> float:
        """Source pixels a pixel of this ground sampling distance stands for; 1 where unknown."""
        if gsd_m is None or self.crs is None:
            return 1.0
        own = self.located(Window(0, 0, self.height, self.width))[2]
        if not own > 0 or abs(own / gsd_m - 1) <= SAME_GSD:
            return 1.0
        scale = gsd_m / own
        if scale < 1 / MAX_ENLARGED:
            raise BadInput(
                f"pixels of {own:g} m, over {MAX_ENLARGED} times ingest.gsd_m ({gsd_m:g} m)"
            )
        if scale > min(self.height, self.width):
            raise BadInput(
                f"{self.width} x {self.height} pixels of {own:g} m: less than one of "
                f"{gsd_m:g} m (ingest.gsd_m)"
            )
        return scale

    def read(self, rows: slice, cols: slice) -> "_Part":
        box = ((rows.start, rows.stop), (cols.start, cols.stop))
        raw, gaps = decode.read(self.file, box)
        valid: NDArray[np.bool_] | None = None
        if raw.dtype == np.uint8 and not self.full:
            valid = self.file.dataset_mask(window=box) > 0
        return _Part(raw, gaps, valid, rows.start, cols.start)


@dataclass
class _Part:
    """Pixels (H, W, C) of a scene, where their bands have gaps, and for uint8 where it has data."""

    raw: decode.Pixels
    gaps: NDArray[np.bool_] | None
    mask: NDArray[np.bool_] | None
    row: int = 0
    col: int = 0

    def at(self, rows: slice, cols: slice) -> "_Part":
        """A part of it, in the scene's rows and columns."""
        place = (
            slice(rows.start - self.row, rows.stop - self.row),
            slice(cols.start - self.col, cols.stop - self.col),
        )
        gaps = None if self.gaps is None else self.gaps[place]
        mask = None if self.mask is None else self.mask[place]
        return _Part(self.raw[place], gaps, mask, rows.start, cols.start)

    @property
    def valid(self) -> NDArray[np.bool_] | None:
        """As `Tile.valid`."""
        if self.raw.dtype == np.uint8:
            valid = self.mask
        elif self.gaps is None:
            return None
        else:
            every = self.raw.dtype.kind in "fc"
            valid = np.asarray(~(self.gaps.any(axis=2) if every else self.gaps.all(axis=2)))
        return None if valid is None or valid.all() else valid


def placing(file: Any) -> tuple[Any, Any]:
    """Affine transform and reference system; both None where the file gives no usable pair.

    Of ground control points without a transform, the affine fit.
    """
    from rasterio.errors import RasterioError
    from rasterio.transform import from_gcps

    transform, crs = file.transform, file.crs
    if transform.is_identity:
        points, crs = file.gcps
        if len(points) < 3 or not crs:
            return None, None
        try:
            transform = from_gcps(points)
        except RasterioError:
            return None, None
    values = tuple(transform)[:6]
    if not crs or not all(map(math.isfinite, values)) or transform.determinant == 0:
        return None, None
    return transform, crs


def _metres(crs: Any) -> float:
    """Metres of a projected system's unit; NaN where it does not say."""
    from rasterio.errors import CRSError

    try:
        return float(crs.linear_units_factor[1])
    except CRSError:
        return math.nan


def _iso(text: str | None) -> str | None:
    """A TIFF's `2024:05:01 10:20:30` as ISO 8601."""
    if not text or len(text) < 19 or text[4] != ":":
        return None
    return f"{text[:10].replace(':', '-')}T{text[11:19]}"


def _whole(scene: OpenScene, window: Window, data: bytes | None) -> Tile:
    """The one tile of an image: its bytes as they came where nothing is to be changed."""
    if window.scale != 1:
        (tile,) = _cut(scene, [window], 1.0)
        assert tile is not None  # all of it may have no data
        return tile
    part = scene.read(slice(0, scene.height), slice(0, scene.width))
    tile = _tile(scene, window, part)
    # Overviews or waste may make it much larger than its pixels.
    if scene.path.stat().st_size <= 1.5 * part.raw.nbytes + 65_536:
        tile.data = scene.path.read_bytes() if data is None else data
    else:
        tile.data = _encoded(scene, tile, part)
    return tile


def _tile(scene: OpenScene, window: Window, part: _Part) -> Tile:
    """A tile of these pixels, without its bytes."""
    pixels = decode.filled(part.raw, part.gaps)
    tile = Tile(window.row, window.col, "tif", b"", pixels, window, part.valid)
    tile.acquired = scene.acquired
    if scene.crs is not None:
        tile.crs = scene.crs_text
        _, tile.bounds, tile.gsd_m = scene.located(window)
    return tile


def _cut(
    scene: OpenScene, windows: Sequence[Window], max_nodata_share: float
) -> Iterator[Tile | None]:
    for first, last in _groups(windows, scene.layout, scene.layout.read_bytes):
        near = windows[first:last]
        parts = _parts(scene, near) if near[0].scale == 1 else _resampled(scene, near)
        for window, part in zip(near, parts, strict=True):
            valid = part.valid
            if valid is not None and 1 - valid.mean() > max_nodata_share:
                yield None
                continue
            tile = _tile(scene, window, part)
            tile.data = _encoded(scene, tile, part)
            yield tile


def _parts(scene: OpenScene, windows: Sequence[Window]) -> Iterator[_Part]:
    """The pixels of windows that are read together."""
    spans = [(_span(w.row, w.height), _span(w.col, w.width)) for w in windows]
    box = scene.read(*_around(spans))
    for rows, cols in spans:
        part = box.at(rows, cols)
        part.raw = part.raw.copy(order="K")
        yield part


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def _around(spans: Sequence[tuple[slice, slice]]) -> tuple[slice, slice]:
    rows, cols = [rows for rows, _ in spans], [cols for _, cols in spans]
    return (
        slice(min(r.start for r in rows), max(r.stop for r in rows)),
        slice(min(c.start for c in cols), max(c.stop for c in cols)),
    )


def _resampled(scene: OpenScene, windows: Sequence[Window]) -> list[_Part]:
    """The pixels of windows that are read together, resampled.

    A window whose source is larger than what may be read at once is made from the top down.
    """
    first = windows[0]
    step = height = first.height
    if len(windows) == 1:
        row_bytes = first.width * first.scale**2 * scene.layout.pixel_bytes
        step = min(height, max(1, int(scene.layout.read_bytes / row_bytes)))
    made: list[list[_Part]] = [[] for _ in windows]
    for top in range(0, height, step):
        sides = [
            (
                Side(w.row + top, min(step, height - top), w.scale, scene.height),
                Side(w.col, w.width, w.scale, scene.width),
            )
            for w in windows
        ]
        box = scene.read(*_around([(rows.source, cols.source) for rows, cols in sides]))
        for (rows, cols), parts in zip(sides, made, strict=True):
            source = box.at(rows.source, cols.source)
            masked = None if source.mask is None else ~source.mask[..., None]
            gaps = source.gaps if masked is None else masked
            raw, lost = resampled(source.raw, gaps, rows, cols, scene.nodata_at(first.scale))
            if masked is None:
                parts.append(_Part(raw, lost, None))
            else:
                parts.append(_Part(raw, None, None if lost is None else ~lost[..., 0]))
    return [_stacked(parts) for parts in made]


def _stacked(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    gaps = mask = None
    if any(part.gaps is not None for part in parts):
        none = [np.zeros(p.raw.shape, np.bool_) if p.gaps is None else p.gaps for p in parts]
        gaps = np.concatenate(none)
    if any(part.mask is not None for part in parts):
        all_ = [np.ones(p.raw.shape[:2], np.bool_) if p.mask is None else p.mask for p in parts]
        mask = np.concatenate(all_)
    return _Part(np.concatenate([part.raw for part in parts]), gaps, mask)


def _encoded(scene: OpenScene, tile: Tile, part: _Part) -> bytes:
    """A lossless one-tile GeoTIFF of the scene's own values.

    Where data is missing without a nodata value to say so, with alpha; of more than 8 bits, which
    GDAL does not read as one, with a mask.
    """
    window, nodata = tile.window, scene.nodata_at(tile.window.scale)
    tags = geotiff.nodata_tag(nodata)
    if scene.crs is not None:
        tags |= geotiff.placed(scene.located(window)[0], scene.geo_keys)
    if scene.stored and window.scale == 1 and (tile.valid is None or scene.says_gaps):
        corners = (window.row, window.col, window.height, window.width)
        data = scene.stored.tile(*corners, tags)
        if data is not None:
            return data
    unsaid = tile.valid is not None and nodata is None
    alpha = unsaid and part.raw.dtype == np.uint8
    raw = part.raw
    if alpha and tile.valid is not None:
        raw = np.dstack([raw, tile.valid.astype(np.uint8) * 255])
    mask = tile.valid if unsaid and not alpha else None
    return geotiff.encoded(geotiff.Strip(raw, tags, alpha, mask))


def reason(error: BaseException, path: Path) -> str:
    cause = error.__cause__ or error
    text = str(cause).split("\n")[0].replace(str(path), "").replace(path.name, "")
    return text.strip(" :,'")[:120] or type(cause).__name__
