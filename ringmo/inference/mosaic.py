"""Finished blocks → cloud-optimised GeoTIFFs that say what they are.

Blocks go into a tiled file first, then GDAL's COG driver copies it with overviews. Both walk the
scene in tiles; parts without an answer take no space in either.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray

from ringmo.data import scenes
from ringmo.data.decode import expect_no_coordinates
from ringmo.errors import BadInput
from ringmo.inference.answers import colour_classes
from ringmo.inference.block_answers import TILE
from ringmo.tasks.base import UNKNOWN


@dataclass
class Place:
    """Where a raster lies: its size in pixels, and what the scene says of its ground.

    gcps: ground control points and their reference system, where it has no transform.
    """

    height: int
    width: int
    transform: Any = None
    crs: Any = None
    gcps: tuple[list[Any], Any] | None = None

    @classmethod
    def of(cls, file: Any) -> "Place":
        """That of an open raster, as it says it."""
        points, crs = file.gcps
        gcps = (points, crs) if points and file.transform.is_identity else None
        transform = None if file.transform.is_identity else file.transform
        return cls(file.height, file.width, transform, file.crs, gcps)

    def coarser(self, factor: float, height: int, width: int) -> "Place":
        """The same ground in pixels `factor` times as large."""
        from rasterio.control import GroundControlPoint

        moved = (
            None if self.transform is None else self.transform @ type(self.transform).scale(factor)
        )
        gcps = self.gcps and (
            [
                GroundControlPoint(p.row / factor, p.col / factor, p.x, p.y, p.z, p.id, p.info)
                for p in self.gcps[0]
            ],
            self.gcps[1],
        )
        return Place(height, width, moved, self.crs, gcps)


@dataclass
class Layer:
    """One raster to write.

    overviews: GDAL's method. classes: names by value, which get colours. names: of the bands.
    """

    dtype: str
    bands: int
    nodata: float
    overviews: str
    classes: Sequence[str] = ()
    names: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


def mask_layer(classes: Sequence[str], tags: Mapping[str, str]) -> Layer:
    # The commonest class of each four would take seven times as long, minutes of a large scene.
    return Layer("uint8", 1, UNKNOWN, "nearest", classes, ["class"], tags=tags)


def probability_layer(classes: Sequence[str], tags: Mapping[str, str]) -> Layer:
    names = list(classes)
    return Layer("float32", len(names), np.nan, "average", (), names, tags)


def height_layer(tags: Mapping[str, str]) -> Layer:
    return Layer("float32", 1, np.nan, "average", (), ["height in metres"], tags=tags)


Part = tuple[int, int, NDArray[Any]]


def write(target: Path, place: Place, layer: Layer, parts: Iterable[Part], scratch: Path) -> None:
    """Write a raster, whole or not at all.

    Args:
        parts: row, column and values (h, w) or (bands, h, w) of each part that has an answer.
        scratch: a folder on the same disk for what is not finished.

    Raises:
        BadInput: it cannot be written there: the disk is full, or not ours.
    """
    import rasterio
    from rasterio.shutil import copy

    expect_no_coordinates()
    plain, cog = scratch / f"{target.name}.plain.tif", scratch / f"{target.name}.cog.tif"
    floats = layer.dtype.startswith("float")
    packed = {"compress": "deflate", "predictor": 3 if floats else 2, "bigtiff": "if_safer"}
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": place.height,
        "width": place.width,
        "count": layer.bands,
        "dtype": layer.dtype,
        "nodata": layer.nodata,
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        "sparse_ok": True,
        "interleave": "pixel",
        "zlevel": 1,
        **packed,
    }
    if layer.bands > 1:
        profile["photometric"] = "minisblack"
    if place.transform is not None:
        profile["transform"] = place.transform
    with _written(target), rasterio.Env(**scenes.GDAL, GDAL_NUM_THREADS="2"):
        with rasterio.open(plain, "w", crs=place.crs, **profile) as file:
            if place.gcps is not None:
                file.gcps = place.gcps
            file.update_tags(**layer.tags)
            for number, name in enumerate(layer.names, 1):
                file.set_band_description(number, name)
            if layer.classes:
                colour_classes(file, layer.classes)
            for row, col, values in parts:
                shaped = values if values.ndim == 3 else values[None]
                window = ((row, row + shaped.shape[1]), (col, col + shaped.shape[2]))
                file.write(shaped, window=window)
        copy(
            plain,
            cog,
            driver="COG",
            blocksize=TILE,
            sparse_ok=True,
            overviews="ignore_existing",
            overview_resampling=layer.overviews,
            **{**packed, "predictor": "yes"},
        )
        plain.unlink()
        if layer.classes:
            _name_classes(target, layer.classes, scratch)
        cog.replace(target)


@contextmanager
def _written(target: Path) -> Any:
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, OSError) as error:
        raise BadInput(f"{target}: cannot be written: {scenes.reason(error, target)}") from None


def _name_classes(target: Path, classes: Sequence[str], scratch: Path) -> None:
    """Names of the values beside a TIFF, which has no place for them: GDAL's own, and a QGIS style,
    without which its legend lists all 256 values that a TIFF's palette has."""
    from ringmo.tasks.dense import colour

    names = "".join(f"<Category>{escape(name)}</Category>" for name in classes)
    _put_beside(
        target.with_name(f"{target.name}.aux.xml"),
        f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames>'
        f"</PAMRasterBand></PAMDataset>\n",
        scratch,
    )
    entries = "".join(
        f'<paletteEntry value="{i}" color="#{bytes(colour(i)).hex()}" alpha="255" '
        f"label={quoteattr(name)}/>"
        for i, name in enumerate(classes)
    )
    _put_beside(
        target.with_suffix(".qml"),
        f'<!DOCTYPE qgis>\n<qgis><pipe><rasterrenderer type="paletted" band="1" opacity="1">'
        f"<colorPalette>{entries}</colorPalette></rasterrenderer></pipe></qgis>\n",
        scratch,
    )


def _put_beside(target: Path, text: str, scratch: Path) -> None:
    temporary = scratch / target.name
    temporary.write_text(text)
    temporary.replace(target)
