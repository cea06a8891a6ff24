"""The tile store: WebDataset tar shards and manifest.parquet, one row a tile.

Any tile is one `pread` away; any tool that reads tar and Parquet reads the store. Shards are
written once and never touched again; the manifest is replaced last, as a whole, so that a store
is always the one before an ingest or the one after it.
"""

import hashlib
import os
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pandas
    import pyarrow

SCHEMA = 4
SCHEMA_KEY = b"ringmo.schema"
MANIFEST = "manifest.parquet"
QUARANTINE = "quarantine.parquet"
HISTORY = "history.json"
CLASSES = "classes.json"  # coding of masks → names of its classes, the first is number 0's
DECISIONS = "decisions.json"  # what a person set aside, or put back
RETIRED = "retired.parquet"  # tiles whose source left: if it returns, so do their split and bytes

# Column → Arrow type. Text that may be missing is null (NaN in pandas).
COLUMNS = {
    "key": "string",  # 16 hex digits, from the source's bytes and the window
    "shard": "string",
    "member": "string",
    "offset": "int64",  # of the member's bytes in the shard
    "size": "int64",  # bytes
    "source": "string",  # path below its source root, posix
    "source_root": "string",  # as ingest.sources gives it
    "row": "int32",  # window offset in the source, pixels
    "col": "int32",
    "width": "int32",  # pixels
    "height": "int32",
    "sensor": "string",
    "bands": "int32",
    "dtype": "string",
    "crs": "string",
    "minx": "float64",  # footprint, in crs
    "miny": "float64",
    "maxx": "float64",
    "maxy": "float64",
    "gsd_m": "float64",  # ground sampling distance, metres
    "acquired": "string",  # ISO date and time
    "nodata_share": "float64",
    "saturated_share": "float64",  # 0 or 255 in every band
    "mean": "float64",
    "std": "float64",
    "entropy": "float64",  # bits, of the grey histogram
    "sharpness": "float64",  # variance of the Laplacian
    "content_hash": "string",  # sha256 of the stored bytes
    "phash": "string",  # 64-bit perceptual hash, 16 hex digits
    "place": "string",
    "split": "string",  # train, val, test or unused
    "label": "string",  # of the scene: a class, or several, sorted and joined by `;`
    "generated": "bool_",
    "ingest": "int32",  # ordinal of the ingest that added the tile
    "cloud_share": "float64",  # an estimate; NaN where the sensor has no visible bands
    "band_means": "floats",  # one a band, of the values as they are, over pixels with data
    "band_stds": "floats",
    "scale": "float64",  # source pixels that a tile's pixel stands for; row and col are the tile's
    "second": "string",  # key of the tile of the same ground at a later date, of a change pair
    # Labels are members of their own: a corrected one is written anew, its image is not.
    "mask_shard": "string",  # a PNG of one byte a pixel: the class's number, 255 where unknown
    "mask_offset": "int64",
    "mask_size": "int64",  # 0 where there is none
    "mask_hash": "string",
    "mask_width": "int32",  # pixels
    "mask_height": "int32",
    "mask_coding": "string",  # what its numbers mean: a name in classes.json
    "mask_counts": "ints",  # pixels of each number, from 0 to the highest there is; 255's last
    "boxes_shard": "string",  # JSON: class and corners in the tile's pixels
    "boxes_offset": "int64",
    "boxes_size": "int64",
    "boxes_hash": "string",
    "boxes_count": "int32",
    "boxes_outside": "int32",  # of them, how many reach beyond the image
    "boxes_classes": "strings",  # of each box
    "height_shard": "string",  # a TIFF of one band of float32: metres, NaN where unknown
    "height_offset": "int64",
    "height_size": "int64",
    "height_hash": "string",
    "height_width": "int32",  # pixels
    "height_height": "int32",
    "height_known": "float64",  # share of the pixels
    "height_min": "float64",  # metres, of the known pixels
    "height_max": "float64",
    "height_mean": "float64",
    "height_std": "float64",
}
LABELS = ("mask", "boxes", "height")  # the members that a tile may have beside its image
QUARANTINE_COLUMNS = {
    "source": "string",
    "source_root": "string",
    "reason": "string",
    "key": "string",  # of a tile; null for a file that could not be used
}
# Schema → the columns it brought, and what an older table's rows have there.
ADDED: dict[int, dict[str, Any]] = {
    2: dict.fromkeys(("cloud_share", "band_means", "band_stds")),
    3: {
        name: 1.0 if name == "scale" else 0 if COLUMNS[name].startswith("int") else None
        for name in COLUMNS
        if name in ("scale", "second") or name.startswith(("mask_", "boxes_"))
    }
    | {"key": None},  # of quarantine.parquet
}
ADDED[3]["mask_counts"] = None
ADDED[4] = {
    name: 0 if COLUMNS[name].startswith("int") else None
    for name in COLUMNS
    if name.startswith("height_")
}
# The columns of a tile's labels, where it has none.
NO_LABELS = {
    name: value
    for name, value in (ADDED[3] | ADDED[4]).items()
    if name.startswith(tuple(f"{part}_" for part in LABELS))
}


def arrow_schema(columns: dict[str, str] = COLUMNS) -> "pyarrow.Schema":
    """Arrow schema of `columns`, carrying the schema version."""
    import pyarrow as pa

    forms = {
        "floats": pa.list_(pa.float64()),
        "ints": pa.list_(pa.int64()),
        "strings": pa.list_(pa.string()),
    }
    fields = [pa.field(n, forms.get(f) or getattr(pa, f)()) for n, f in columns.items()]
    return pa.schema(fields, metadata={SCHEMA_KEY: str(SCHEMA).encode()})


def write_table(
    path: Path, rows: Any, columns: dict[str, str], facts: dict[str, int] | None = None
) -> None:
    """Rows (dicts, a DataFrame, an Arrow table) to Parquet: whole or not at all, the same bytes.

    Pages carry checksums, so that a flipped bit is an error when the file is read. `facts` go
    into the metadata under the prefix `ringmo.`.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(columns)
    if isinstance(rows, pa.Table):
        table = rows.select(list(columns)).cast(schema).replace_schema_metadata(schema.metadata)
    elif isinstance(rows, pd.DataFrame):
        table = pa.Table.from_pandas(rows[list(columns)], schema=schema, preserve_index=False)
        table = table.replace_schema_metadata(schema.metadata)
    else:
        table = pa.Table.from_pylist(rows, schema=schema)
    for name, value in sorted((facts or {}).items()):
        metadata = {**table.schema.metadata, f"ringmo.{name}".encode(): str(value).encode()}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def read_table(path: Path, columns: dict[str, str], remedy: str) -> "pandas.DataFrame":
    """A table that `write_table` wrote, as a DataFrame.

    Raises:
        BadInput: missing, damaged, or of a later schema; ends in `remedy`.
    """
    frame: pandas.DataFrame = read_arrow(path, columns, remedy).to_pandas()
    return frame


def read_arrow(path: Path, columns: dict[str, str], remedy: str) -> "pyarrow.Table":
    """A table that `write_table` wrote, each column in one piece.

    Raises:
        BadInput: as `read_table`.
    """
    table = _read(path, columns, remedy)
    wanted = arrow_schema(columns)
    if set(table.schema.names) == set(columns):
        table = table.select(list(columns))
    if not table.schema.equals(wanted, check_metadata=False):
        different = sorted(set(table.schema.names) ^ set(columns)) or "types"
        raise BadInput(f"{path} has other columns ({different}): {remedy}")
    return table.cast(wanted).combine_chunks()


def read_some(path: Path, columns: dict[str, str], few: list[str], remedy: str) -> "pyarrow.Table":
    """Some columns of a table that `write_table` wrote, as they lie in the file.

    Args:
        few: columns of few different texts, which are read as numbers and a list of these.

    Raises:
        BadInput: as `read_table`.
    """
    table = _read(path, columns, remedy, part=True, read_dictionary=few)
    if missing := sorted(set(columns) - set(table.schema.names)):
        raise BadInput(f"{path} has other columns ({', '.join(missing)} missing): {remedy}")
    return table.select(list(columns)).unify_dictionaries()


def _read(
    path: Path, columns: dict[str, str], remedy: str, part: bool = False, **options: Any
) -> "pyarrow.Table":
    """What is in the file, all or the part that `columns` names, and what later schemas added."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if part:
            names = pq.read_schema(path).names
            options["columns"] = [name for name in columns if name in names]
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None, **options)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: {remedy}") from None
    except (OSError, pa.ArrowException) as error:
        what = str(error).split("\n")[0][:120]
        raise BadInput(f"{path} is damaged ({what}): {remedy}") from None
    version = (table.schema.metadata or {}).get(SCHEMA_KEY, b"none").decode()
    if version not in {str(number) for number in range(1, SCHEMA + 1)}:
        raise BadInput(f"{path} has schema {version}, this version reads up to {SCHEMA}: {remedy}")
    wanted = arrow_schema(columns)
    for number in range(int(version) + 1, SCHEMA + 1):
        for name, value in ADDED[number].items():
            if name in columns and name not in table.schema.names:
                field = wanted.field(name)
                filled = pa.repeat(pa.scalar(value, field.type), len(table))
                table = table.append_column(field, filled)
    return table


def read_facts(path: Path) -> dict[str, int]:
    """The numbers that `write_table` put into the metadata."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    prefix = b"ringmo."
    return {
        name.removeprefix(prefix).decode(): int(value)
        for name, value in metadata.items()
        if name.startswith(prefix)
    }


def with_column(table: "pyarrow.Table", name: str, column: Any) -> "pyarrow.Table":
    """The table with a column replaced, or appended; a list becomes of the column's type."""
    import pyarrow as pa

    at = table.schema.get_field_index(name)
    if at < 0:
        return table.append_column(name, column)
    field = table.schema.field(at)
    if isinstance(column, list):
        column = pa.array(column, field.type)
    return table.set_column(at, field, column)


def same_rows(a: "pyarrow.Table", b: "pyarrow.Table") -> bool:
    """Whether two tables of the same columns hold the same; NaN is the same as NaN."""
    import numpy as np
    import pyarrow as pa

    def same(one: Any, other: Any) -> bool:
        if pa.types.is_list(one.type):
            if not (one.is_valid().equals(other.is_valid()) and len(one) == len(other)):
                return False
            lengths = [column.value_lengths() for column in (one, other)]
            return lengths[0].equals(lengths[1]) and same(one.flatten(), other.flatten())
        if pa.types.is_floating(one.type):
            values = [column.to_numpy(zero_copy_only=False) for column in (one, other)]
            valid = one.is_valid().equals(other.is_valid())
            return valid and np.array_equal(values[0], values[1], equal_nan=True)
        return bool(one.equals(other))

    if len(a) != len(b):
        return False
    return not len(a) or all(
        same(a[name].combine_chunks(), b[name].combine_chunks()) for name in a.schema.names
    )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TileStore:
    """Reads a tile store. Threads and forked processes may share one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def manifest(self) -> "pandas.DataFrame":
        """One row a tile (`COLUMNS`); missing text is NaN.

        Raises:
            BadInput: no manifest, a damaged one, or one of another schema.
        """
        remedy = "run `ringmo ingest`, or `dvc checkout` for the version before"
        return read_table(self.root / MANIFEST, COLUMNS, remedy)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """The bytes of one tile.

        Raises:
            BadInput: the shard is missing or too short, or none of this folder.
        """
        data = os.pread(self._open(shard), size, offset)
        if len(data) != size:
            raise BadInput(
                f"{self.root / shard} ends before byte {offset + size}: "
                f"run `dvc checkout` to bring the shard back"
            )
        return data

    def _open(self, shard: str) -> int:
        descriptor = self._files.get(shard)
        if descriptor is None:
            with self._lock:
                descriptor = self._files.get(shard)
                if descriptor is None:
                    # A manifest may come from anywhere: it names files of this folder alone.
                    if Path(shard).name != shard or shard_number(Path(shard)) is None:
                        raise BadInput(f"{shard[:200]!r} is no shard's name: run `dvc checkout`")
                    how = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                    try:
                        descriptor = os.open(self.root / shard, how)
                    except OSError as error:
                        raise BadInput(
                            f"{self.root / shard}: {error.strerror}: "
                            f"run `dvc checkout` to bring the shard back"
                        ) from None
                    self._files[shard] = descriptor
        return descriptor

    def close(self) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]


class ShardWriter:
    """Appends tiles to new shards under temporary names; `commit` gives them their real ones.

    Nothing in a tar depends on the machine or the hour, and a shard that is there is never
    opened. `rollback` takes back what was added since a `mark`: the tiles of a scene whose last
    strip proves damaged.
    """

    def __init__(self, root: Path, first: int, shard_mb: float) -> None:
        self.root, self.first, self.limit = root, first, int(shard_mb * 1e6)
        self.sizes: list[int] = []  # bytes in each shard so far
        self._file: BinaryIO | None = None

    @property
    def shards(self) -> int:
        """How many shards the store has with the new ones."""
        return self.first + len(self.sizes)

    def add(self, member: str, data: bytes) -> tuple[str, int]:
        """Shard name and offset of the bytes just appended."""
        self._open().write(segment(member, data))
        offset = self.sizes[-1] + tarfile.BLOCKSIZE
        self.sizes[-1] = self._open(same=True).tell()
        return self._final(len(self.sizes) - 1).name, offset

    def copy(self, source: int, start: int, end: int) -> tuple[str, int]:
        """`add` of a member that lies in an open file as the bytes of `segment`, copied there."""
        target = self._open()
        target.flush()
        while start < end:
            copied = os.sendfile(target.fileno(), source, start, end - start)
            if not copied:
                raise OSError(f"{end - start} bytes are missing of what was read for the store")
            start += copied
        target.seek(0, os.SEEK_END)
        offset = self.sizes[-1] + tarfile.BLOCKSIZE
        self.sizes[-1] = target.tell()
        return self._final(len(self.sizes) - 1).name, offset

    def _open(self, same: bool = False) -> BinaryIO:
        """The shard to append to: a new one where the last is full."""
        if self._file is None or (self.sizes[-1] >= self.limit and not same):
            self._finish()
            self.sizes.append(0)
            self._file = self._temporary(len(self.sizes) - 1).open("w+b")
        return self._file

    def read(self, shard: str, offset: int, size: int) -> bytes | None:
        """Bytes added since the start; None if the shard is an old one."""
        for i in range(len(self.sizes)):
            if self._final(i).name == shard:
                if self._file is not None:
                    self._file.flush()
                with self._temporary(i).open("rb") as file:
                    return os.pread(file.fileno(), size, offset)
        return None

    def mark(self) -> tuple[int, int]:
        return len(self.sizes), self.sizes[-1] if self.sizes else 0

    def rollback(self, mark: tuple[int, int]) -> None:
        shards, size = mark
        if self._file is not None:
            self._file.close()
            self._file = None
        for i in range(shards, len(self.sizes)):
            self._temporary(i).unlink()
        del self.sizes[shards:]
        if shards:
            self._file = self._temporary(shards - 1).open("r+b")
            self._file.truncate(size)
            self._file.seek(size)
            self.sizes[-1] = size

    def commit(self) -> None:
        """Real names for all shards; the manifest that mentions them comes after."""
        self._finish()
        for i in range(len(self.sizes)):
            self._temporary(i).replace(self._final(i))
        if self.sizes:
            sync_folder(self.root)

    def abort(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for i in range(len(self.sizes)):
            self._temporary(i).unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._file is not None:
            end = self.sizes[-1] + 2 * tarfile.BLOCKSIZE
            self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _final(self, i: int) -> Path:
        return self.root / shard_name(self.first + i)

    def _temporary(self, i: int) -> Path:
        return self.root / f".{shard_name(self.first + i)}.tmp"


def segment(member: str, data: bytes) -> bytes:
    """A member as it lies in a shard: a header of one block, the bytes, zeros to a whole block."""
    info = tarfile.TarInfo(member)
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return b"".join((header, data, bytes(-len(data) % tarfile.BLOCKSIZE)))


def shard_name(number: int) -> str:
    return f"tiles-{number:06d}.tar"


def shard_number(path: Path) -> int | None:
    """Number of a shard's file; None for any other file."""
    digits = path.name.removeprefix("tiles-").removesuffix(".tar")
    return int(digits) if digits.isdigit() and path.name == shard_name(int(digits)) else None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
