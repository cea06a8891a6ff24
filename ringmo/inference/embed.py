"""`ringmo embed`: what an encoder makes of each tile, with the tile's footprint, as GeoParquet.

Tiles stream: whatever the source's size, memory holds what is being read and a row group.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ringmo import console
from ringmo.config import Config, Ingest
from ringmo.data import scenes
from ringmo.data.decode import Pixels, decode
from ringmo.data.footprints import outline, project
from ringmo.data.loading import cores, square
from ringmo.data.store import COLUMNS, MANIFEST, TileStore, read_some
from ringmo.errors import BadInput
from ringmo.inference.model import open_bundle
from ringmo.inference.predict import find_images
from ringmo.registry.bundle import Bundle, fit, read_size
from ringmo.training.machine import choose_device
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow

STORE = "store"
BATCH = 64  # tiles that pass the encoder at a time
ROW_GROUP = 4096  # rows that are written at a time: 16 MB of 1024 features
MODEL_KEY = b"ringmo.model"  # of the file's metadata: hash of the bundle that embedded
NEEDED = (
    *("key", "shard", "offset", "size", "source", "source_root", "row", "col", "height", "width"),
    *("scale", "sensor", "dtype", "label", "crs", "minx", "miny", "maxx", "maxy"),
)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Tile:
    """A tile on its way through an encoder: the first fields are columns of the file.

    key: in the tile store; None of any other source. source: the file it is from, or was when it
    was ingested. row, col, height, width, scale: as in the manifest, of the window in its source.
    bounds: minx, miny, maxx, maxy in crs. small: (S, S, bands), as the encoder reads it, but for
    normalisation.
    """

    key: str | None
    source: str
    row: int
    col: int
    height: int
    width: int
    scale: float
    sensor: str
    label: str | None
    crs: str | None
    bounds: tuple[float, float, float, float]
    small: Pixels


@dataclass
class Reading:
    """How far reading is: files or tiles of the store, and which could not be used, and why."""

    total: int
    done: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    left_out: int = 0

    def fail(self, source: str, reason: str) -> None:
        self.failed.append({"source": source, "reason": reason})


def embed(config: Config, workspace: Workspace, source: str, ref: str, out: Path) -> dict[str, Any]:
    """Embeddings of all tiles of a source, to a GeoParquet file, whole or not at all.

    Scenes are cut as `ringmo ingest` would (`ingest.tile_size`, `stride`, `gsd_m`,
    `max_nodata_share`). An image is of the sensor of the model that has its bands and dtype.

    Args:
        source: a file, a folder, a glob, or `store`: the workspace's tile store.
        ref: as of `ringmo.load`; of a task's model, its encoder.

    Returns:
        file, model, tiles, located (tiles with a footprint), features (numbers a tile), sensors,
        left_out (tiles of the store whose sensor the model does not read), failed (source,
        reason).

    Raises:
        BadInput: no such source or model, nothing in it that the model reads, or `out` cannot be
            written.
        Unreachable: MLflow does not answer.
    """
    bundle = open_bundle(ref, str(choose_device(config.hardware)), workspace.root)
    if source == STORE:
        reading, tiles = of_store(workspace, bundle)
    else:
        reading, tiles = of_files(find_images([source]), config.ingest, bundle)
    written = 0
    counts: dict[str, int] = {}
    with Writer(out, bundle) as writer, console.progress("embed", reading.total) as bar:
        for batch, vectors in embedded(bundle, tiles):
            writer.add(batch, vectors)
            written += len(batch)
            for tile in batch:
                counts[tile.sensor] = counts.get(tile.sensor, 0) + 1
            bar.to(reading.done, f"{written} tiles")
        if not written:
            reasons = [f"{one['source']}: {one['reason']}" for one in reading.failed[:1]]
            raise BadInput(": ".join([*reasons, f"no tile of {source} that this model reads"]))
    if reading.failed:
        console.note(f"{len(reading.failed)} of {reading.total} could not be read: see `failed`")
    return {
        "file": str(out),
        "model": bundle.hash,
        "tiles": written,
        "located": writer.located,
        "features": writer.features,
        "sensors": counts,
        "left_out": reading.left_out,
        "failed": reading.failed,
    }


def text(done: dict[str, Any]) -> str:
    """What was done, for people."""
    sensors = ", ".join(f"{count} {name}" for name, count in done["sensors"].items())
    lines = [
        f"{done['file']}: {done['tiles']} tiles ({sensors}) of {done['features']} features, "
        f"{done['located']} with a footprint"
    ]
    if done["left_out"]:
        lines.append(f"{done['left_out']} tiles are of sensors that this model does not read")
    lines += [f"not read: {one['source']}: {one['reason']}" for one in done["failed"]]
    return "\n".join(lines)


# Tiles of a source


def of_files(
    paths: Sequence[Path], ingest: Ingest, bundle: Bundle
) -> tuple[Reading, Iterator[Tile]]:
    """The tiles of image files; large ones in windows."""
    reading = Reading(len(paths))
    sensors = bundle.sensors

    def look(path: Path) -> tuple[scenes.Look, Tile | None]:
        found = scenes.look(path, ingest, sensors)
        if found.tile is None:
            return found, None
        if found.tile.valid is not None and not found.tile.valid.any():
            raise BadInput("no data in it")
        return found, _of_file(path, found.sensor, found.tile, bundle)

    def tiles() -> Iterator[Tile]:
        for path, result in _ahead(look, paths):
            made = 0
            try:
                found, whole = result()
                if whole is not None:
                    yield whole
                for first, last in found.groups:
                    windows = found.windows[first:last]
                    for tile in scenes.cut(path, windows, ingest.max_nodata_share):
                        if tile is not None:
                            yield _of_file(path, found.sensor, tile, bundle)
                            made += 1
            except BadInput as error:
                reading.fail(str(path), f"{error}{f' (after {made} tiles)' if made else ''}")
            except OSError as error:
                reading.fail(str(path), f"cannot be read: {error.strerror}")
            reading.done += 1

    return reading, tiles()


def of_store(
    workspace: Workspace, bundle: Bundle, only: NDArray[np.int64] | None = None
) -> tuple[Reading, Iterator[Tile]]:
    """The tiles of the workspace's store that are of the model's sensors.

    Args:
        only: rows of the manifest; None: all.

    Raises:
        BadInput: no store, or a damaged one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tiles = TileStore(workspace.store)
    table = manifest(workspace, NEEDED)
    if only is not None:
        table = table.take(only)
    read = table.filter(pc.is_in(table["sensor"], pa.array(list(bundle.meta["sensors"]))))
    reading = Reading(len(read), left_out=len(table) - len(read))

    def decoded(row: dict[str, Any]) -> Tile:
        pixels = decode(tiles.read(row["shard"], row["offset"], row["size"]), row["dtype"])
        return Tile(
            **{name: row[name] for name in ("key", "label", "crs", "sensor")},
            **{name: row[name] for name in ("row", "col", "height", "width", "scale")},
            source=source_of(row),
            bounds=_bounds(row),
            small=_small(pixels, bundle, row["sensor"]),
        )

    def rows() -> Iterator[dict[str, Any]]:
        for batch in read.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def made() -> Iterator[Tile]:
        for row, result in _ahead(decoded, rows()):
            reading.done += 1
            try:
                yield result()
            except BadInput as error:
                reading.fail(f"tile {row['key']}", str(error))

    return reading, made()


def manifest(workspace: Workspace, names: Iterable[str]) -> "pyarrow.Table":
    """Columns of the store's manifest."""
    columns = {name: COLUMNS[name] for name in names}
    return read_some(workspace.store / MANIFEST, columns, [], "run `ringmo ingest`")


def source_of(row: Mapping[str, Any]) -> str:
    """Where a tile of the store is from, of its row of the manifest."""
    return f"{row['source_root'].rstrip('/')}/{row['source']}"


def _of_file(path: Path, sensor: str, tile: scenes.Tile, bundle: Bundle) -> Tile:
    small = _small(tile.pixels, bundle, sensor)
    return Tile(
        key=None,
        source=str(path),
        **asdict(tile.window),
        sensor=sensor,
        label=None,
        crs=tile.crs,
        bounds=tile.bounds,
        small=small,
    )


def _small(pixels: Pixels, bundle: Bundle, sensor: str) -> Pixels:
    """As `Bundle.embed` would, but in the thread that reads, and a batch of it needs less."""
    fitting = fit(pixels, bundle.meta["sensors"][sensor])
    small: Pixels = square(fitting, read_size(bundle.meta)).permute(1, 2, 0).numpy()
    return small


def _bounds(row: dict[str, Any]) -> tuple[float, float, float, float]:
    west, south, east, north = (
        math.nan if row[name] is None else row[name] for name in ("minx", "miny", "maxx", "maxy")
    )
    return west, south, east, north


def _ahead(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """Each item with what gives its result, in order, worked on in threads ahead of use."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(cores(), thread_name_prefix="tiles") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 4 * cores():
                    first, future = waiting.popleft()
                    yield first, future.result
            for last, future in waiting:
                yield last, future.result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def embedded(
    bundle: Bundle, tiles: Iterable[Tile]
) -> Iterator[tuple[list[Tile], NDArray[np.float32]]]:
    """Tiles of one sensor each, in batches, with their features (B, C)."""
    waiting: dict[str, list[Tile]] = {}

    def done(sensor: str) -> tuple[list[Tile], NDArray[np.float32]]:
        whole = waiting.pop(sensor)
        return whole, bundle.embed([tile.small for tile in whole], BATCH, sensor=sensor)

    for tile in tiles:
        waiting.setdefault(tile.sensor, []).append(tile)
        if len(waiting[tile.sensor]) == BATCH:
            yield done(tile.sensor)
    for sensor in list(waiting):
        yield done(sensor)


# The file


class Writer:
    """A GeoParquet file of embeddings, which appears when its block ends without an error."""

    def __init__(self, out: Path, bundle: Bundle) -> None:
        import pyarrow as pa

        first = next(iter(bundle.meta["sensors"]))
        self.features = int(bundle.embed([], sensor=first).shape[1])
        self.out, self.located = out, 0
        self.schema = pa.schema(
            [
                *(pa.field(name, pa.string()) for name in ("key", "source")),
                *(pa.field(name, pa.int32()) for name in ("row", "col", "height", "width")),
                pa.field("scale", pa.float64()),
                *(pa.field(name, pa.string()) for name in ("sensor", "label")),
                pa.field("embedding", pa.list_(pa.float32(), self.features)),
                pa.field("geometry", pa.binary()),
            ],
            metadata={MODEL_KEY: bundle.hash},
        )
        self._tiles: list[Tile] = []
        self._vectors: list[NDArray[np.float32]] = []
        self._types: set[str] = set()
        self._extent = np.array([np.inf, np.inf, -np.inf, -np.inf])

    def __enter__(self) -> "Writer":
        import pyarrow.parquet as pq

        self._temporary = self.out.with_name(f".{self.out.name}.{os.getpid()}.tmp")
        if self.out.is_dir():
            raise BadInput(f"{self.out} is a folder: name a file, such as {self.out}/tiles.parquet")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise BadInput(f"{self.out}: {error.strerror}") from None
        self._writer = pq.ParquetWriter(self._file, self.schema, compression="zstd")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            try:
                if kind is None:
                    self._flush()
                    self._writer.add_key_value_metadata({"geo": json.dumps(self._geo())})
            finally:
                self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            if kind is None:
                self._temporary.replace(self.out)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, tiles: Sequence[Tile], vectors: NDArray[np.float32]) -> None:
        self._tiles += tiles
        self._vectors.append(vectors)
        if len(self._tiles) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import shapely

        if not self._tiles:
            return
        tiles, vectors = self._tiles, np.concatenate(self._vectors)
        self._tiles, self._vectors = [], []
        shapes = footprints([tile.crs for tile in tiles], np.array([t.bounds for t in tiles]))
        there = [shape for shape in shapes if shape is not None]
        if there:
            self.located += len(there)
            self._types |= {shape.geom_type for shape in there}
            low, high = self._extent[:2], self._extent[2:]
            west, south, east, north = shapely.total_bounds(np.array(there))
            self._extent = np.r_[np.minimum(low, (west, south)), np.maximum(high, (east, north))]
        columns = {
            name: [getattr(tile, name) for tile in tiles]
            for name in self.schema.names
            if name not in ("embedding", "geometry")
        }
        flat = pa.array(vectors.astype(np.float32).ravel())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, self.features)
        columns["geometry"] = list(shapely.to_wkb(np.array(shapes, dtype=object)))
        self._writer.write_table(pa.table(columns, self.schema))

    def _geo(self) -> dict[str, Any]:
        """GeoParquet 1.1's metadata (geoparquet.org/releases/v1.1.0)."""
        from rasterio.crs import CRS

        column: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": sorted(self._types),
            "crs": CRS.from_epsg(4326).to_dict(projjson=True),
        }
        if self.located:
            column["bbox"] = self._extent.tolist()
        return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def footprints(crs: Sequence[str | None], bounds: NDArray[np.float64]) -> list[Any]:
    """Boxes (N, 4: minx, miny, maxx, maxy), each in its own system, as shapes in EPSG:4326.

    Longitude first. The four corners, joined by straight lines; in two parts where the box lies
    across 180 degrees, and all longitudes where a pole is inside. None where there is no system,
    or no place on Earth.
    """
    from rasterio.crs import CRS
    from rasterio.errors import RasterioError

    found: list[Any] = [None] * len(crs)
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(crs):
        if name is not None and np.isfinite(bounds[i]).all():
            groups.setdefault(name, []).append(i)
    for name, members in groups.items():
        try:
            geographic = CRS.from_user_input(name).is_geographic
        except (RasterioError, ValueError):
            continue
        # Counter-clockwise.
        rings = bounds[members][:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 5, 2)
        for i, ring in zip(members, project(name, rings), strict=True):
            found[i] = outline(ring, geographic)
    return found
