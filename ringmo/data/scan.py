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
        rows = np.full(len(images), -1, np.int64)
        if not len(self.table) or not images:
            return rows
        places = list(
            zip(self.table["folder"].to_pylist(), self.table["path"].to_pylist(), strict=True)
        )
        found = dict(zip(places, range(len(places)), strict=True))
        names = zip(folders(images), (image.path for image in images), strict=True)
        rows[:] = [found.get(name, -1) for name in names]
        known = np.flatnonzero(rows >= 0)
        sizes = np.fromiter((i.size for i in images), np.int64, len(images))
        times = np.fromiter((i.mtime_ns for i in images), np.int64, len(images))
        same = np.ones(len(known), np.bool_)
        for name, now in (("size", sizes), ("mtime_ns", times), ("attached", attached)):
            same &= self.table[name].to_numpy()[rows[known]] == now[known]
        rows[known[~same]] = -1
        return rows

    @cached_property
    def bare(self) -> NDArray[np.bool_]:
        """Rows of images without labels of their own, of which ingest.about says no sensor."""
        return np.asarray(self.table["attached"].to_numpy() == 0)

    @cached_property
    def _by_hash(self) -> dict[str, int]:
        rows = np.flatnonzero(self.bare)
        hashes = self.table["hash"].take(rows).to_pylist()
        return dict(zip(hashes, rows.tolist(), strict=True))

    def by_hash(self, content: str) -> int | None:
        """A row of a file with these bytes, of which the bytes alone decide what it becomes."""
        return self._by_hash.get(content)

    def write(self, now: "pyarrow.Table", unchanged: bool) -> None:
        """Remember `now` (COLUMNS), and of earlier scans what was found in other folders."""
        import pyarrow as pa
        import pyarrow.compute as pc

        here = pc.is_in(self.table["folder"], value_set=pc.unique(now["folder"]))
        if unchanged and len(now) == pc.sum(here).as_py():
            return
        others = self.table.filter(pc.invert(here))
        store.write_table(self.path, pa.concat_tables([others, now]), COLUMNS)


def folders(images: Sequence[Image]) -> list[str]:
    """Where each image's path begins."""
    return [image.folder for image in images]


def first_bits(hexadecimal: Any) -> NDArray[np.uint64]:
    """A column of hashes in hex, all of one length, as their first 64 bits."""
    import pyarrow.compute as pc

    if not len(hexadecimal):
        return np.empty(0, np.uint64)
    text = "".join(pc.utf8_slice_codeunits(hexadecimal, 0, 16).to_pylist())
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
