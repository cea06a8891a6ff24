"""A scene as a model reads it: opened, held against the model's sensors, and read box by box.

A scene is one raster, or several of one ground: further sensors and the later date of a change
pair, which are brought to the first one's pixels. Nothing here holds more than one box of it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data import decode, scenes
from ringmo.data.resampling import Side, resampled
from ringmo.errors import BadInput
from ringmo.inference.windows import Span
from ringmo.registry.bundle import read_size
from ringmo.tasks.base import SECOND

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle

# A ground sampling distance this many times finer or coarser than the tiles that a model learnt
# from is one that it has not seen: crops in training vary less than that beyond the tiles'.
SAME_SCALE = 1.25
READ_BYTES = 32e6  # of source pixels in one go, where they are resampled
APART = 0.5  # pixels by which two grids may differ and count as one


@dataclass
class Box:
    """A box of a scene in the model's pixels.

    pixels: (H, W, bands) by what they are of, of the sensors' decoded dtypes. gaps: of each, bool
    (H, W, bands) or (H, W, 1), True where it lacks data, or None. valid: bool (H, W), whether all
    of them have data. bright: of uint16 for a sensor of int16, how many values were read and how
    many of them it cannot hold, int64 (2,).
    """

    rows: Span
    cols: Span
    pixels: dict[str, decode.Pixels]
    gaps: dict[str, NDArray[np.bool_] | None]
    valid: NDArray[np.bool_]
    bright: NDArray[np.int64]

    @cached_property
    def full(self) -> bool:
        return bool(self.valid.all())

    def window(self, top: int, left: int, size: int) -> dict[str, decode.Pixels] | None:
        """Pixels (size, size, bands) of a window, its gaps filled; None where nothing has data."""
        at = (_cut(top, self.rows, size), _cut(left, self.cols, size))
        if not (self.full or self.valid[at].any()):
            return None
        cut = {}
        for name, pixels in self.pixels.items():
            gaps = self.gaps[name]
            if gaps is None or not gaps[at].any():
                cut[name] = pixels[at]
            else:
                # With the mean of what the window has, as tiles are filled.
                every = np.broadcast_to(gaps[at], pixels[at].shape)
                cut[name] = decode.filled(pixels[at].copy(), every)
        return cut


def _cut(start: int, span: Span, size: int) -> slice:
    return slice(start - span[0], start - span[0] + size)


@dataclass
class Raster:
    """One open raster and the numbers of its bands, among those without alpha, as a sensor has
    them. bright: of all that was read, as `Box` has it.
    """

    scene: scenes.OpenScene
    sensor: Sensor
    order: list[int] | None
    written: bool = field(init=False)  # whether the file says which of its blocks were written
    bright: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.written = self.scene.file.driver == "GTiff"
        self.bright = np.zeros(2, np.int64)

    def read(
        self, rows: Span, cols: Span
    ) -> tuple[decode.Pixels, NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """Pixels (h, w, bands), their gaps, which are 0, and where they have data; None:
        everywhere.

        Raises:
            BadInput: this part of the file is damaged.
        """
        from rasterio.errors import RasterioError

        try:
            part = self.scene.read(slice(*rows), slice(*cols))
        except (RasterioError, MemoryError) as error:
            reason = scenes.reason(error, self.scene.path)
            raise BadInput(
                f"damaged in rows {rows[0]} to {rows[1]}, columns {cols[0]} to {cols[1]}: {reason}"
            ) from None
        if self.order is not None:
            raw = np.ascontiguousarray(part.raw[:, :, self.order])
            gaps = None if part.gaps is None else part.gaps[:, :, self.order]
            part = replace(part, raw=raw, gaps=gaps)
        gaps, valid = part.gaps, part.valid
        raw = decode.values(part.raw, gaps)
        if raw.dtype == np.uint16 and self.sensor.dtype == "int16":
            self.bright += np.array([raw.size, np.count_nonzero(raw > decode.INT16_MAX)])
            raw = np.minimum(raw, decode.INT16_MAX).astype(np.int16)
        missing = self._missing(rows, cols)
        if missing is not None:
            valid = ~missing if valid is None else valid & ~missing
        return raw, gaps, valid

    def has_data(self, rows: Span, cols: Span) -> NDArray[np.bool_] | None:
        """The last of what `read` gives, without reading pixels where that can be."""
        scene = self.scene
        if not scene.full or np.dtype(scene.file.dtypes[0]).kind not in "iu":
            return self.read(rows, cols)[2]
        missing = self._missing(rows, cols)
        return None if missing is None else ~missing

    def empty(self, rows: Span, cols: Span) -> bool:
        """Whether no block of this box was ever written, so that it need not be read."""
        missing = self._missing(rows, cols, blocks=True)
        return missing is not None and bool(missing.all())

    def _missing(self, rows: Span, cols: Span, blocks: bool = False) -> NDArray[np.bool_] | None:
        """Which pixels (or blocks) of a sparse file are of blocks never written; None: none.

        GDAL tells no place in the file of such a block.
        """
        if not self.written:
            return None
        file = self.scene.file
        high, wide = file.block_shapes[0]
        down = range(rows[0] // high, -(-rows[1] // high))
        along = range(cols[0] // wide, -(-cols[1] // wide))
        bands = 1 if str(file.interleaving).endswith("pixel") else file.count
        missing = np.array(
            [
                [
                    all(
                        file.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", band + 1) is None
                        for band in range(bands)
                    )
                    for x in along
                ]
                for y in down
            ]
        )
        if not missing.any():
            return None
        if blocks:
            return missing
        at_row = np.arange(*rows) // high - down.start
        at_col = np.arange(*cols) // wide - along.start
        spread: NDArray[np.bool_] = missing[at_row[:, None], at_col]
        return spread


class Scene:
    """An open scene. Of one thread; it is closed by `close`, or as a context manager.

    height, width: its own pixels. scale: how many of these a pixel of the model stands for.
    rows, cols: of the model's pixels there are, `size` at least; what lies beyond the scene's
    edge is its last pixel again. notes: what was made of it that people should know.

    Raises:
        BadInput: it cannot be read, or not by this model; the reason alone.
    """

    def __init__(self, bundle: "Bundle", paths: Mapping[str, Path]) -> None:
        """
        Args:
            paths: the files by what they are of: sensors, and the later date as `second`.
        """
        self.stack = ExitStack()
        try:
            self._open(bundle, paths)
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stack.close()

    def _open(self, bundle: "Bundle", paths: Mapping[str, Path]) -> None:
        wanted = [*bundle.sensors]
        if bundle.task is not None and SECOND in bundle.task.parts:
            wanted.append(SECOND)
        if other := [name for name in paths if name not in wanted]:
            raise BadInput(f"this model does not read {other[0]}, but {', '.join(wanted)}")
        if lacking := [name for name in wanted if name not in paths]:
            raise BadInput(
                f"this model reads {' and '.join(wanted)} of the same ground: give "
                f"--with {lacking[0]}=FILE"
            )
        self.notes: list[str] = []
        self.rasters: dict[str, Raster] = {}
        for name in wanted:
            sensor = bundle.sensors[wanted[0] if name == SECOND else name]
            try:
                self.rasters[name] = self._raster(paths[name], sensor)
            except BadInput as error:
                raise BadInput(f"{paths[name]}: {error}" if self.rasters else str(error)) from None
        first = self.rasters[wanted[0]].scene
        self.path, self.first, self.name = first.path, first, wanted[0]
        self.height, self.width = first.height, first.width
        self.crs, self.transform = first.crs, first.transform
        self.acquired = first.acquired
        self.gsd_m = (
            math.nan
            if self.crs is None
            else first.located(scenes.Window(0, 0, self.height, self.width))[2]
        )
        self.size = bundle.encoder.image_size
        self.scale = self._scale(bundle.meta)
        self.rows, self.cols = (
            max(math.ceil(side / self.scale - 1e-6), self.size)
            for side in (self.height, self.width)
        )

    def _raster(self, path: Path, sensor: Sensor) -> Raster:
        file = self.stack.enter_context(scenes.opened(path))
        if (file.driver, file.colorinterp[0].name) != ("PNG", "palette"):  # three bands, as read
            scenes.refuse_odd(file)
        order = band_order(file, sensor)
        if self.rasters:
            file = self._on_the_same_grid(file)
        return Raster(scenes.OpenScene(path, file), sensor, order)

    def _on_the_same_grid(self, file: Any) -> Any:
        """A further raster, warped to the first one's pixels where it lies on others."""
        from rasterio.enums import Resampling
        from rasterio.vrt import WarpedVRT

        first = next(iter(self.rasters.values())).scene
        size, grid = (first.height, first.width), (first.transform, first.crs)
        other = scenes.OpenScene(first.path, file)
        same_size = (other.height, other.width) == size
        if same_size and scenes.apart(size, grid, (other.transform, other.crs)) <= APART:
            return file
        if first.crs is None or other.crs is None:
            raise BadInput(
                f"{other.width} x {other.height} pixels, and the first image has {size[1]} x "
                f"{size[0]}: without coordinates in both they cannot be brought together"
            )
        if not _meet(first, other):
            raise BadInput("it shows other ground than the first image")
        self.notes.append(f"{Path(file.name).name} was brought to the pixels of {first.path.name}")
        return self.stack.enter_context(
            WarpedVRT(
                file,
                crs=first.crs,
                transform=first.transform,
                height=first.height,
                width=first.width,
                resampling=Resampling.bilinear,
                add_alpha=file.nodata is None and "alpha" not in [c.name for c in file.colorinterp],
            )
        )

    def _scale(self, meta: Mapping[str, Any]) -> float:
        """Own pixels to one of the model's: as its tiles were scaled, and by the ratio of ground
        sampling distances where the scene's is none that the model has seen."""
        scale = int(meta.get("tile_pixels") or read_size(meta)) / read_size(meta)
        seen = meta.get("gsd_m")
        if self.crs is None:
            self.notes.append("no coordinates: answered in pixels, at the scale it came")
            return scale
        if not seen or not self.gsd_m > 0:
            return scale
        low, high = float(seen["low"]), float(seen["high"])
        if low / SAME_SCALE <= self.gsd_m <= high * SAME_SCALE:
            return scale
        nearest = min(max(self.gsd_m, low), high)
        if self.gsd_m / nearest > scenes.MAX_ENLARGED:
            raise BadInput(
                f"pixels of {self.gsd_m:g} m, over {scenes.MAX_ENLARGED} times the {nearest:g} m "
                f"that the model learnt from: there would be next to nothing to see"
            )
        scale *= nearest / self.gsd_m
        if scale * self.size > 2 * max(self.height, self.width):
            raise BadInput(
                f"{self.width} x {self.height} pixels of {self.gsd_m:g} m are less than half a "
                f"window of the model, which learnt from {nearest:g} m"
            )
        self.notes.append(f"resampled from {self.gsd_m:g} m to the {nearest:g} m the model knows")
        return scale

    # Boxes

    def model_span(self, span: Span, limit: int) -> Span:
        """Own pixels → those of the model that their answers are made of."""
        if self.scale == 1:
            return span[0], min(span[1], limit)
        low, high = math.floor(span[0] / self.scale) - 1, math.ceil(span[1] / self.scale) + 1
        return max(low, 0), min(high, limit)

    def empty(self, rows: Span, cols: Span) -> bool:
        """Whether this box of the model's pixels was never written."""
        for raster in self.rasters.values():
            box = [
                self._source(span, length)
                for span, length in ((rows, self.height), (cols, self.width))
            ]
            if raster.empty(*box):
                return True
        return False

    def _side(self, span: Span, cells: int) -> Side:
        return Side(span[0], span[1] - span[0], self.scale, math.ceil(cells * self.scale) + 1)

    def _source(self, span: Span, length: int) -> Span:
        """Own pixels, that there are, of the model's."""
        if self.scale == 1:
            low, high = span
        else:
            source = self._side(span, span[1] + 1).source
            low, high = source.start, source.stop
        return _there(low, high, length)

    def read(self, rows: Span, cols: Span) -> Box:
        """A box of the model's pixels.

        Raises:
            BadInput: this part of a file is damaged.
        """
        valid = np.ones((rows[1] - rows[0], cols[1] - cols[0]), np.bool_)
        box = Box(rows, cols, {}, {}, valid, np.zeros(2, np.int64))
        for name, raster in self.rasters.items():
            before = raster.bright.copy()
            if self.scale == 1:
                pixels, gaps, valid = self._padded(raster, rows, cols)
            else:
                pixels, gaps, valid = self._resampled(raster, rows, cols)
            box.pixels[name], box.gaps[name] = pixels, gaps
            box.bright += raster.bright - before
            if valid is not None:
                box.valid &= valid
        inside = [
            max(0, min(span[1], math.ceil(side / self.scale - 1e-6)) - span[0])
            for span, side in ((rows, self.height), (cols, self.width))
        ]
        box.valid[inside[0] :] = False
        box.valid[:, inside[1] :] = False
        return box

    def own_valid(self, rows: Span, cols: Span) -> NDArray[np.bool_]:
        """Which own pixels (h, w) have data in all rasters."""
        valid = np.ones((rows[1] - rows[0], cols[1] - cols[0]), np.bool_)
        for raster in self.rasters.values():
            for part in self._strips(raster, rows, cols[1] - cols[0]):
                has = raster.has_data(part, cols)
                if has is not None:
                    valid[part[0] - rows[0] : part[1] - rows[0]] &= has
        return valid

    @staticmethod
    def _strips(raster: Raster, rows: Span, width: int) -> Sequence[Span]:
        step = max(1, int(READ_BYTES / max(1, width * raster.scene.layout.pixel_bytes)))
        return [(top, min(top + step, rows[1])) for top in range(rows[0], rows[1], step)]

    def _padded(self, raster: Raster, rows: Span, cols: Span) -> Any:
        """Own pixels, and beyond the scene's edge its last ones."""
        there = (rows[0], min(rows[1], self.height)), (cols[0], min(cols[1], self.width))
        pixels, gaps, valid = raster.read(*there)
        more = (rows[1] - there[0][1], cols[1] - there[1][1])
        if not any(more):
            return pixels, gaps, valid
        return tuple(_grown(of, more) for of in (pixels, gaps, valid))

    def _resampled(self, raster: Raster, rows: Span, cols: Span) -> Any:
        """Resampled as tiles are at ingest; from the top down, so that little is read at once."""
        across = self._side(cols, self.cols)
        width = across.source.stop - across.source.start
        per_row = max(1.0, width * self.scale * raster.scene.layout.pixel_bytes)
        step = max(1, int(READ_BYTES / per_row))
        made, lost, any_lost = [], [], False
        for top in range(*rows, step):
            down = self._side((top, min(top + step, rows[1])), self.rows)
            source = [(s.source.start, s.source.stop) for s in (down, across)]
            there = [
                _there(*span, side)
                for span, side in zip(source, (self.height, self.width), strict=True)
            ]
            pixels, gaps, valid = raster.read(*there)
            more = [high - low for low, high in source]
            more = [m - (high - low) for m, (low, high) in zip(more, there, strict=True)]
            if any(more):
                pixels, gaps, valid = (_grown(of, more) for of in (pixels, gaps, valid))
            if valid is not None:
                gaps = ~valid[..., None] if gaps is None else gaps | ~valid[..., None]
            part, missing = resampled(pixels, gaps, down, across, None)
            made.append(part)
            if missing is None:
                missing = np.zeros(part.shape, np.bool_)
            else:
                part[missing] = 0  # as where nothing is resampled
                any_lost = True
            lost.append(missing)
        pixels = np.concatenate(made)
        if not any_lost:
            return pixels, None, None
        gaps = np.concatenate(lost)
        every = pixels.dtype.kind in "f"
        return pixels, gaps, ~(gaps.any(axis=2) if every else gaps.all(axis=2))


def _there(low: int, high: int, length: int) -> Span:
    """The part of a span that a side of `length` has; one pixel at least, its last."""
    low = min(low, length - 1)
    return low, max(min(high, length), low + 1)


def _grown(values: Any, more: Sequence[int]) -> Any:
    if values is None:
        return None
    pad = [(0, more[0]), (0, more[1])] + [(0, 0)] * (values.ndim - 2)
    return np.pad(values, pad, mode="edge")


def _meet(first: scenes.OpenScene, other: scenes.OpenScene) -> bool:
    """Whether two rasters share ground."""
    from rasterio.errors import CRSError
    from rasterio.warp import transform_bounds

    def bounds(of: scenes.OpenScene) -> tuple[float, float, float, float]:
        return of.located(scenes.Window(0, 0, of.height, of.width))[1]

    try:
        there = transform_bounds(other.crs, first.crs, *bounds(other))
    except CRSError:
        return False
    here = bounds(first)
    return bool(
        there[0] < here[2] and there[2] > here[0] and there[1] < here[3] and there[3] > here[1]
    )


def band_order(file: Any, sensor: Sensor) -> list[int] | None:
    """Which of a file's bands (without alpha, from 0) are the sensor's, in its order.

    By their descriptions, or by the colours that the file says they are; None: all as they come.

    Raises:
        BadInput: bands are missing, or of another type; what there is.
    """
    numbers = decode.colour_bands(file)
    dtype = file.dtypes[0]
    kind = "complex64" if dtype.startswith("complex") else decode.DTYPES.get(dtype)
    if kind != sensor.dtype and (dtype, sensor.dtype) != ("uint16", "int16"):
        raise BadInput(f"pixels of {dtype}, the model reads {sensor.dtype}")
    wanted = [_band_name(band) for band in sensor.bands]
    said = [_band_name(file.descriptions[n - 1] or "") for n in numbers]
    colours = [file.colorinterp[n - 1].name for n in numbers]
    # What the descriptions say of any of these bands, the colours do not overrule.
    for names in [said] if set(said) & set(wanted) else [said, colours]:
        if set(wanted) <= set(names) and all(names.count(name) == 1 for name in wanted):
            order = [names.index(name) for name in wanted]
            return None if order == list(range(len(numbers))) else order
    missing = [b for b, name in zip(sensor.bands, wanted, strict=True) if name not in said]
    if len(numbers) != len(wanted):
        there = ", ".join(filter(None, (file.descriptions[n - 1] for n in numbers)))
        raise BadInput(
            f"{len(numbers)} bands{f' ({there})' if there else ''}, the model reads "
            f"{len(wanted)}: {', '.join(sensor.bands)}"
        )
    if missing and set(said) & set(wanted):
        raise BadInput(f"its bands are {', '.join(said)}: {', '.join(missing)} missing")
    return None


def _band_name(name: str) -> str:
    """B2, B02 and B02_blue are one band, B8A another; all else is the whole name."""
    name = name.strip().lower()
    found = re.match(r"b0*(\d+a?)(?![0-9a-z])", name)
    return f"b{found[1]}" if found else name
