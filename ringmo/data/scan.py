"""What earlier ingests found in each file, so that an unchanged one is not read again.

A table with a row a file, held as columns: a million known files are looked up in a second.
Losing it costs reading again, nothing else.
"""

import contextlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data import store
from ringmo.data.sources import Image
from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pyarrow

COLUMNS = {
    "folder": "string",
    "path": "string",
    "size": "int64",
    "mtime_ns": "int64",
    "attached": "int64",  # changes with labels that belong to the image
    "settings": "string",  # digest of what decides what an image becomes
    "hash": "string",  # sha256 of the file
    "reason": "string",  # why it was set aside
    "keys": "strings",  # of its tiles
    "skipped": "int64",  # windows left out
}


class Scan:
    """The scan cache as it was; `write` replaces it with what this ingest has seen."""

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        self.table = store.arrow_schema(COLUMNS).empty_table()
        with contextlib.suppress(BadInput):
            import pyarrow.compute as pc

            table = store.read_arrow(path, COLUMNS, "")
            self.table = table.filter(pc.equal(table["settings"], settings)).combine_chunks()

    def match(self, images: Sequence[Image], attached: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each image that is as it was; -1 where it is new or has changed."""
        import pyarrow.compute as pc

        rows = np.full(len(images), -1, np.int64)
        if not len(self.table) or not images:
            return rows
        found: dict[str, dict[str, int]] = {}
        for folder in self.table["folder"].unique().to_pylist():
            here = pc.indices_nonzero(pc.equal(self.table["folder"], folder))
            paths = self.table["path"].take(here).to_pylist()
            found[folder] = dict(zip(paths, here.to_pylist(), strict=True))
        nothing: dict[str, int] = {}
        rows[:] = [found.get(image.folder, nothing).get(image.path, -1) for image in images]
        del found
        known = np.flatnonzero(rows >= 0)
        sizes = np.fromiter((i.size for i in images), np.int64, len(images))
        times = np.fromiter((i.mtime_ns for i in images), np.int64, len(images))
        same = np.ones(len(known), np.bool_)
        for name, now in (("size", sizes), ("mtime_ns", times), ("attached", attached)):
            same &= self.table[name].to_numpy()[rows[known]] == now[known]
        rows[known[~same]] = -1
        return rows

    def paths(self, folders: set[str]) -> set[tuple[str, str]]:
        """(folder, path) of every file known in these folders."""
        import pyarrow as pa
        import pyarrow.compute as pc

        here = self.table.filter(pc.is_in(self.table["folder"], value_set=pa.array(list(folders))))
        columns = (here[name].to_pylist() for name in ("folder", "path"))
        return set(zip(*columns, strict=True))

    @cached_property
    def bare(self) -> NDArray[np.bool_]:
        """Rows of images without labels of their own, of which ingest.about says no sensor."""
        return np.asarray(self.table["attached"].to_numpy() == 0)

    @cached_property
    def _by_hash(self) -> tuple[NDArray[np.int64], "Lookup"]:
        rows = np.flatnonzero(self.bare)
        return rows, Lookup(self.table["hash"].take(rows).combine_chunks())

    def by_hash(self, content: str) -> int | None:
        """A row of a file with these bytes, of which the bytes alone decide what it becomes."""
        rows, lookup = self._by_hash
        at = lookup.find(content)
        return None if at < 0 else int(rows[at])

    def write(self, now: "pyarrow.Table", unchanged: bool) -> None:
        """Remember `now` (COLUMNS), and of earlier scans what was found in other folders."""
        import pyarrow as pa
        import pyarrow.compute as pc

        here = pc.is_in(self.table["folder"], value_set=pc.unique(now["folder"]))
        if unchanged and len(now) == pc.sum(here).as_py():
            return
        others = self.table.filter(pc.invert(here))
        store.write_table(self.path, pa.concat_tables([others, now]), COLUMNS)


def first_bits(hexadecimal: Any) -> NDArray[np.uint64]:
    """A column of hashes in hex, all of one length, as their first 64 bits."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(hexadecimal):
        return np.empty(0, np.uint64)
    short = pc.utf8_slice_codeunits(hexadecimal, 0, 16)
    if isinstance(short, pa.ChunkedArray):
        short = short.combine_chunks()
    start = short.offset * 16
    text = short.buffers()[2].to_pybytes()[start : start + 16 * len(short)]
    return np.frombuffer(bytes.fromhex(text.decode()), ">u8").astype(np.uint64)


class Lookup:
    """Rows of a column of hashes in hex, found by the hash: two numbers a row, where a dict of
    texts would take ten times as much."""

    def __init__(self, column: Any) -> None:
        self._column = column
        bits = first_bits(column)
        self._order = np.argsort(bits, kind="stable")
        self._bits = bits[self._order]

    def find(self, text: str) -> int:
        """The first row that has it; -1 where none has."""
        wanted = np.uint64(int(text[:16], 16))
        at = int(np.searchsorted(self._bits, wanted))
        while at < len(self._bits) and self._bits[at] == wanted:
            row = int(self._order[at])
            if self._column[row].as_py() == text:
                return row
            at += 1
        return -1
