"""Heights under an image: a surface or terrain model of the same pixels, read and stored.

A raster of one band (DEM, DSM, nDSM) in metres, with whatever its file says of scale, offset and
missing data. Stored are float32 values without loss, NaN where the height is not known. A tile
without any known height has none, as if its raster were not there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data import decode
from ringmo.data.codings import GDAL, said
from ringmo.errors import BadInput

if TYPE_CHECKING:
    from ringmo.data.geotiff import Tags

Heights = NDArray[np.float32]  # (H, W), metres, NaN where unknown

DRIVERS = {"tif": "GTiff", "png": "PNG"}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A raster of heights as an open rasterio dataset; to be read within the block.

    Raises:
        BadInput: it cannot be read, or is none; the reason.
    """
    import rasterio
    from rasterio.errors import RasterioError

    decode.expect_no_coordinates()
    try:
        with path.open("rb") as file:
            form = decode.kind(file.read(16))
        if form not in DRIVERS:
            raise BadInput("its heights are no TIFF or PNG")
        with rasterio.Env(**GDAL), rasterio.open(path, driver=DRIVERS[form]) as raster:
            if raster.count != 1 or raster.dtypes[0].startswith("complex"):
                raise BadInput(
                    f"its heights have {raster.count} bands of {raster.dtypes[0]}: one of metres"
                )
            yield raster
    except (RasterioError, MemoryError) as error:
        raise BadInput(f"damaged heights: {said(error, path)}") from None
    except OSError as error:
        raise BadInput(f"its heights cannot be read: {said(error, path)}") from None


def looks_like(file: Path) -> bool:
    """Whether a file is one band of more than 8 bits, as heights are and pictures are not."""
    try:
        with opened(file) as raster:
            return raster.dtypes[0] not in ("uint8", "int8")
    except BadInput:
        return False


def read(raster: Any, rows: slice, cols: slice) -> Heights:
    """A part of an open raster."""
    window = ((rows.start, rows.stop), (cols.start, cols.stop))
    values = raster.read(1, window=window).astype(np.float64)
    known = raster.read_masks(1, window=window) > 0
    values = values * raster.scales[0] + raster.offsets[0]
    with np.errstate(over="ignore", invalid="ignore"):
        heights: Heights = values.astype(np.float32)
    heights[~known | ~np.isfinite(heights)] = np.nan
    return heights


def encoded(heights: Heights, tags: "Tags") -> bytes:
    """Heights as a GeoTIFF of one strip, without loss; `tags` place it."""
    from ringmo.data import geotiff

    strip = geotiff.Strip(heights[..., None], tags | geotiff.nodata_tag(np.nan))
    return geotiff.encoded(strip)


def decoded(data: bytes) -> Heights:
    """What `encoded` made, (H, W).

    Raises:
        BadInput: damaged.
    """
    heights: Heights = decode.decode_heights(data)[..., 0]
    return heights


def measured(heights: Heights) -> dict[str, float]:
    """The manifest's figures of heights of which one at least is known."""
    known = heights[~np.isnan(heights)].astype(np.float64)
    return {
        "height_known": known.size / heights.size,
        "height_min": float(known.min()),
        "height_max": float(known.max()),
        "height_mean": float(known.mean()),
        "height_std": float(known.std()),
    }
