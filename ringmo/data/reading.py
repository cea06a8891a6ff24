"""Images to tiles, measures and labels: what a process that reads for the ingest does.

Bytes for the store go into a spool file of the workspace as they will lie in a shard, so that
only the table of tiles travels between processes.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Ingest, Sensor
from ringmo.data import scenes, store
from ringmo.data.decode import fitted
from ringmo.data.layouts import MAX_APART, Labels, Member
from ringmo.data.measures import measure
from ringmo.data.sources import Image
from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

UNREADABLE = "unreadable"  # in place of a hash: permissions can change without a trace
PARTS = ("image", *store.LABELS)
# Columns beside the manifest's: the image's number in its batch, and where in the spool file the
# tile's members begin and end.
SPOOLED = {"number": "int32"} | {f"{p}_{end}": "int64" for p in PARTS for end in ("start", "end")}
COLUMNS = store.COLUMNS | SPOOLED
AT_ONCE_BYTES = 16e6  # an image up to this is read once; a larger one as its tiles need it
FETCHING = 8  # objects of a bucket that are brought at once


@dataclass(frozen=True)
class Settings:
    """What all readers need to know."""

    ingest: Ingest
    sensors: dict[str, Sensor]
    spool: Path


@dataclass
class Found:
    """What one image came to; `known` where its bytes have been read before, `look` where it has
    to be cut into windows."""

    hash: str
    reason: str | None = None
    known: bool = False
    look: scenes.Look | None = None
    skipped: int = 0


@dataclass
class Read:
    """What a task found: a `Found` an image, a row a tile, and the spool file, if any."""

    found: list[Found]
    rows: "pyarrow.Table"
    spool: Path | None = None


@dataclass
class _Spool:
    """Rows, and the members of their tiles, one after the other in a file."""

    folder: Path
    rows: list[Row] = field(default_factory=list)

    def __enter__(self) -> "_Spool":
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        self.path = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is not None or not self.rows:
            self.path.unlink(missing_ok=True)

    def add(self, number: int, row: Row, tile: scenes.Tile, members: Sequence[Member]) -> None:
        row |= dict.fromkeys(SPOOLED, 0) | {"number": number}
        row["member"] = f"{row['key']}.{tile.form}"
        for part, suffix, data in (
            ("image", tile.form, tile.data),
            *((member.part, member.suffix, member.data) for member in members),
        ):
            row[f"{part}_start"] = self._file.tell()
            self._file.write(store.segment(f"{row['key']}.{suffix}", data))
            row[f"{part}_end"] = self._file.tell()
        for member in members:
            row |= member.facts
        self.rows.append(row)

    def read(self, found: list[Found]) -> Read:
        import pyarrow as pa

        self._file.flush()
        rows = pa.Table.from_pylist(self.rows, schema=store.arrow_schema(COLUMNS))
        return Read(found, rows, self.path if self.rows else None)


def read_images(
    settings: Settings, images: Sequence[Image], known: NDArray[np.uint64] | None
) -> Read:
    """Read images, and make tiles of those that are not to be cut.

    Args:
        known: first 64 bits of the hashes of files read before, sorted: an image among them is
            only hashed.
    """
    with _Spool(settings.spool) as spool, ThreadPoolExecutor(FETCHING) as pool:
        # Waiting for a bucket costs no processor; there is nothing to wait for in a folder.
        ahead = {i: pool.submit(_fetch, image) for i, image in enumerate(images) if image.bucket}
        found = []
        for i, image in enumerate(images):
            one = Found(f"{UNREADABLE} {image.file}")
            try:
                if i in ahead:
                    ahead[i].result()
                tile, row, members = _read(settings, image, known, one)
            except OSError as error:
                one.reason = _unreadable(error)
                tile = row = None
            except BadInput as error:
                one.reason = str(error)
                tile = row = None
            finally:
                if one.look is None:
                    forget(image)
            if tile is not None and row is not None:
                spool.add(i, row, tile, members)
            found.append(one)
        return spool.read(found)


def read_windows(
    settings: Settings,
    image: Image,
    content: str,
    sensor: str,
    size: tuple[int, int],
    windows: Sequence[scenes.Window],
) -> Read:
    """Cut windows of an image of these bytes (their hash), sensor and size, which was looked at.

    The one `Found` of the answer says how many windows were left out, or why the image fails.
    """
    found = Found(content)
    with _Spool(settings.spool) as spool:
        try:
            with ExitStack() as stack:
                labels = _labels(settings, image, size, stack)
                for tile in scenes.cut(image.file, windows, settings.ingest.max_nodata_share):
                    if tile is None:
                        found.skipped += 1
                        continue
                    own = store.sha256(tile.data)
                    row = _row(content, sensor, settings.sensors, tile, own)
                    members = labels.of(tile.window) if labels else []
                    spool.add(0, row, tile, members)
        except BadInput as error:
            found.reason = str(error)
        except OSError as error:
            found.reason = _unreadable(error)
        if found.reason is not None:
            spool.rows.clear()
        return spool.read([found])


def _unreadable(error: OSError) -> str:
    """Why a file cannot be read; a full disk is no fault of the file's, and is raised."""
    if error.errno == errno.ENOSPC:
        raise error
    return f"cannot be read: {error.strerror}"


def _fetch(image: Image) -> None:
    image.fetch()
    for attachment in image.attachments:
        attachment.fetch()


def forget(image: Image) -> None:
    """Remove what was brought of an image and its labels."""
    image.forget()
    for attachment in image.attachments:
        attachment.forget()


def _read(
    settings: Settings, image: Image, known: NDArray[np.uint64] | None, found: Found
) -> tuple[scenes.Tile | None, Row | None, list[Member]]:
    data = image.file.read_bytes() if image.size <= AT_ONCE_BYTES else None
    found.hash = store.file_sha256(image.file) if data is None else store.sha256(data)
    bare = not image.attachments and image.sensor is None and image.second is None
    if bare and known is not None and _among(found.hash, known):
        found.known = True
        return None, None, []
    look = scenes.look(image.file, settings.ingest, settings.sensors, image.sensor, data)
    _refuse_other_ground(image, look.size)
    if look.tile is None:
        found.look = look
        return None, None, []
    tile = look.tile
    if tile.valid is not None and not tile.valid.any():
        raise BadInput("no data in it")
    own = found.hash if tile.data is data else store.sha256(tile.data)
    row = _row(found.hash, look.sensor, settings.sensors, tile, own)
    with ExitStack() as stack:
        labels = _labels(settings, image, look.size, stack)
        return tile, row, labels.of(tile.window) if labels else []


def _refuse_other_ground(image: Image, size: tuple[int, int]) -> None:
    """Set an image aside whose second date is of another size, or lies elsewhere.

    In a bucket the other is not at hand: there validation finds tiles of different sizes.
    """
    if image.second is None or image.bucket is not None:
        return
    second = Path(f"{image.base}/{image.second}")
    try:
        other, *where = scenes.grid(second)
    except (BadInput, OSError):
        return  # which is told of the second itself
    if other != size:
        raise BadInput(
            f"its second date has {other[1]}x{other[0]} pixels, it has {size[1]}x{size[0]}"
        )
    own = scenes.georeference(image.file)
    off = scenes.apart(size, own, (where[0], where[1]))
    if not off <= MAX_APART:
        raise BadInput(f"its second date lies elsewhere, {off:.0f} pixels away")


def _among(content: str, known: NDArray[np.uint64]) -> bool:
    wanted = np.uint64(int(content[:16], 16))
    at = int(np.searchsorted(known, wanted))
    return at < len(known) and bool(known[at] == wanted)


def _labels(
    settings: Settings, image: Image, size: tuple[int, int], stack: ExitStack
) -> Labels | None:
    if not image.attachments:
        return None
    transform = crs = None
    if any(one.part in ("vectors", "height") for one in image.attachments):
        transform, crs = scenes.georeference(image.file)
    labels = Labels(image, size, settings.ingest.mask_codings, crs, transform)
    return stack.enter_context(labels)


def key(content: str, row: int, col: int, height: int, width: int, scale: float) -> str:
    """A tile's key: of its image's bytes (their sha256, in hexadecimal) and its window."""
    window = f"{content}:{row}:{col}:{height}:{width}"
    if scale != 1:
        window += f":{scale:.9g}"
    return hashlib.sha256(window.encode()).hexdigest()[:16]


def _row(content: str, name: str, sensors: dict[str, Sensor], tile: scenes.Tile, own: str) -> Row:
    """A tile's row of the manifest, as far as its pixels and its scene know.

    Args:
        content: hash of its image's bytes. own: of the tile's.

    Raises:
        BadInput: its values do not fit the sensor's dtype.
    """
    sensor = sensors[name]
    pixels = fitted(tile.pixels, sensor.decoded)
    height, width, bands = pixels.shape
    minx, miny, maxx, maxy = tile.bounds
    scale = tile.window.scale
    return {
        "key": key(content, tile.row, tile.col, height, width, scale),
        "size": len(tile.data),
        "row": tile.row,
        "col": tile.col,
        "width": width,
        "height": height,
        "scale": scale,
        "sensor": name,
        "bands": bands,
        "dtype": str(pixels.dtype),
        "crs": tile.crs,
        "minx": minx,
        "miny": miny,
        "maxx": maxx,
        "maxy": maxy,
        "gsd_m": tile.gsd_m,
        "acquired": tile.acquired,
        **vars(measure(pixels, tile.valid, sensor)),
        "content_hash": own,
        **store.NO_LABELS,
    }
