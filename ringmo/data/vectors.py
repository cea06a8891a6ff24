"""Vectors drawn over a scene: read, brought to its pixels, and burnt into the masks of its tiles.

GeoPackage, GeoJSON and Shapefile. A pixel belongs to a feature that covers its centre, and to the
later one where two do.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.codings import UNKNOWN, VECTORS, class_names, said, unless_damaged
from ringmo.errors import BadInput

if TYPE_CHECKING:
    from ringmo.config import About
    from ringmo.data.sources import Attachment

# Attributes that say a feature's class, where params.yaml names none; the first there is.
CLASS_ATTRIBUTES = (
    *("class", "class_name", "classname", "label", "type", "category", "landcover"),
    *("land_cover", "landuse", "land_use"),
)
STARTS = (b"SQLite format 3\0", b"\x00\x00\x27\x0a")


class Vectors:
    """A scene's features, in its pixels, each with a class number."""

    def __init__(
        self,
        file: Path,
        attribute: str | None,
        coding: str,
        codings: dict[str, Any],
        size: tuple[int, int],
        crs: Any,
        transform: Any,
    ) -> None:
        """
        Args:
            size: height and width of the scene, in pixels.
            crs, transform: the scene's, as rasterio has them.

        Raises:
            BadInput: the scene has no coordinates, or the vectors cannot be read or are of
                classes that the coding does not know.
        """
        import shapely

        if crs is None or transform is None or transform.is_identity:
            raise BadInput("it has vectors but no coordinates to lay them on")
        shapes, values = _read(file, attribute, size, crs, transform)
        self.numbers = _numbers(values, len(shapes), coding, codings)
        self.shapes = shapes
        self.tree = shapely.STRtree(shapes)

    def window(
        self, row: int, col: int, height: int, width: int, scale: float
    ) -> NDArray[np.uint8]:
        """Class numbers of a tile's pixels; arguments as `boxes.cut`'s."""
        import shapely
        from rasterio.features import rasterize
        from rasterio.transform import Affine

        edges = (col * scale, row * scale, (col + width) * scale, (row + height) * scale)
        here = np.sort(self.tree.query(shapely.box(*edges)))
        burnt = np.zeros((height, width), np.uint8)
        if len(here):
            rasterize(
                [(self.shapes[i], int(self.numbers[i])) for i in here],
                out=burnt,
                transform=Affine(scale, 0, col * scale, 0, scale, row * scale),
            )
        return burnt


def coding(files: "list[list[Attachment]]", about: "About", mask_codings: dict[str, Any]) -> str:
    """The coding of all vectors of a source: what params.yaml says, `index` where the classes
    are numbers, `binary` where there are none, else one that lists the classes, sorted.

    Args:
        files: each with the parts that a Shapefile has beside it.
    """
    if about.masks != "auto":
        return about.masks
    names: set[str] = set()
    numeric, there = True, False
    for parts in files:
        with unless_damaged():
            values = None
            try:
                for part in parts:
                    part.fetch()
                values = _values(parts[0].file, about.vector_class)
            finally:
                for part in parts:
                    if part.bucket is not None:
                        part.file.unlink(missing_ok=True)
            if values is not None:
                there = True
                numeric &= values.dtype.kind in "iuf"
                names |= {_name(value) for value in values} - {""}
    if not there:
        return "binary"
    return "index" if numeric else VECTORS + json.dumps(sorted(names), ensure_ascii=False)


def _numbers(
    values: NDArray[Any] | None, count: int, coding: str, codings: dict[str, Any]
) -> NDArray[np.uint8]:
    if values is None or coding == "binary":
        return np.ones(count, np.uint8)
    if coding == "index":
        if values.dtype.kind not in "iuf":
            raise BadInput("its vectors' classes are names, the others' are numbers")
        numbers = np.nan_to_num(values.astype(np.float64), nan=UNKNOWN)
        if ((numbers < 0) | (numbers > UNKNOWN) | (numbers != np.round(numbers))).any():
            raise BadInput("its vectors' classes are numbers beyond 0 to 254")
        return numbers.astype(np.uint8)
    known = {name: int(number) for number, name in class_names(coding, codings).items()}
    names = [_name(value) for value in values]
    strange = sorted({name for name in names if name and name not in known})
    if strange:
        raise BadInput(f"its vectors have the class {strange[0][:60]}, which is not known")
    return np.array([known.get(name, UNKNOWN) for name in names], np.uint8)


def _name(value: Any) -> str:
    """A class as text; empty for none."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _values(file: Path, attribute: str | None) -> NDArray[Any] | None:
    """Of each feature the attribute that says its class; None where there is none."""
    import pyogrio.raw

    with _errors(file):
        layer = _layer(file)
        column = _column(file, layer, attribute)
        if column is None:
            return None
        _, _, _, fields = pyogrio.raw.read(file, layer=layer, columns=[column], read_geometry=False)
        values: NDArray[Any] = fields[0]
        return values


def _read(
    file: Path, attribute: str | None, size: tuple[int, int], crs: Any, transform: Any
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Features near a scene in its pixels, and the attribute that says their class."""
    import pyogrio.raw
    import shapely
    from rasterio.crs import CRS
    from rasterio.errors import CRSError
    from rasterio.warp import transform as reproject
    from rasterio.warp import transform_bounds

    corners = [transform @ (x, y) for x in (0, size[1]) for y in (0, size[0])]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    bounds = (min(xs), min(ys), max(xs), max(ys))
    with _errors(file):
        layer = _layer(file)
        column = _column(file, layer, attribute)
        stated = pyogrio.read_info(file, layer=layer)["crs"]
        try:
            # A shapefile without a .prj is meant to lie on its scene.
            own = CRS.from_user_input(stated) if stated else crs
            near = bounds if own == crs else transform_bounds(crs, own, *bounds)
        except CRSError as error:
            raise BadInput(f"its vectors' coordinates: {said(error, file)}") from None
        _, _, geometry, fields = pyogrio.raw.read(
            file, layer=layer, columns=[column] if column else [], bbox=near
        )
        shapes = shapely.from_wkb(geometry)
    inverse = ~transform

    def to_pixels(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = points[:, 0], points[:, 1]
        if own != crs and len(points):
            x, y = (np.asarray(values) for values in reproject(own, crs, x, y))
        a, b, c, d, e, f = tuple(inverse)[:6]
        return np.column_stack([a * x + b * y + c, d * x + e * y + f])

    there = ~(shapely.is_missing(shapes) | shapely.is_empty(shapes))
    shapes = shapely.transform(shapely.force_2d(shapes[there]), to_pixels)
    if not np.isfinite(shapely.bounds(shapes)).all():
        raise BadInput("its vectors cannot be brought to its coordinates")
    return shapes, fields[0][there] if column else None


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, GeometryError
    from shapely.errors import ShapelyError

    try:
        with file.open("rb") as opened:
            head = opened.read(64)
        # What else GDAL would open, some of it other files or addresses, is nothing to be read.
        if not head.startswith(STARTS) and head.lstrip(b" \t\r\n\xef\xbb\xbf")[:1] != b"{":
            raise BadInput("its vectors are no GeoPackage, GeoJSON or Shapefile")
        yield
    except OSError as error:
        raise BadInput(f"its vectors cannot be read: {said(error, file)}") from None
    except (DataSourceError, DataLayerError, FeatureError, GeometryError, ShapelyError) as error:
        raise BadInput(f"damaged vectors: {said(error, file)}") from None


def _layer(file: Path) -> str:
    import pyogrio

    layers = [str(name) for name, kind in pyogrio.list_layers(file) if kind is not None]
    if len(layers) != 1:
        some = ", ".join(layers[:4]) or "none"
        raise BadInput(f"its vectors have {len(layers)} layers ({some}): keep one in a file")
    return layers[0]


def _column(file: Path, layer: str, attribute: str | None) -> str | None:
    import pyogrio

    fields = [str(name) for name in pyogrio.read_info(file, layer=layer)["fields"]]
    if attribute is not None:
        if attribute not in fields:
            has = ", ".join(fields[:6]) or "none"
            raise BadInput(f"its vectors have no attribute {attribute} (they have: {has})")
        return attribute
    by_name = {name.lower(): name for name in reversed(fields)}
    return next((by_name[name] for name in CLASS_ATTRIBUTES if name in by_name), None)


def write(
    path: Path,
    shapes: NDArray[Any],
    columns: dict[str, NDArray[Any]],
    crs: Any,
    tags: Mapping[str, str],
) -> None:
    """A GeoPackage with one layer, `boxes`, of polygons (WKB); the tags are its metadata.

    Args:
        crs: rasterio's; None: none.

    Raises:
        BadInput: it cannot be written there.
    """
    import pyogrio.raw
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

    path.unlink(missing_ok=True)
    try:
        pyogrio.raw.write(
            path,
            shapes,
            list(columns.values()),
            list(columns),
            layer="boxes",
            driver="GPKG",
            geometry_type="Polygon",
            crs=None if crs is None else crs.to_wkt(),
            layer_metadata=dict(tags),
        )
    except (DataSourceError, DataLayerError, FeatureError, OSError) as error:
        raise BadInput(f"{path}: cannot be written: {said(error, path)}") from None
