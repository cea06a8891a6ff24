"""`ringmo data compact`: shards without the bytes of tiles that left the store.

Live members are copied to new shards, which the manifest then names, and only then the old ones
go: killed at any moment, the store is the one before or the one after.
"""

import os
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringmo import console
from ringmo.data import store
from ringmo.data.ingest import alone, old_store
from ringmo.errors import BadInput
from ringmo.stage import Report
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow

# The columns that say where a member lies; of an image they have no prefix.
PARTS = ("", *(f"{part}_" for part in store.LABELS))


def compact(workspace: Workspace) -> Report:
    """Remove the bytes of tiles that no row of the manifest names.

    Tiles that left keep their place and split: should one return, it is read again.
    Report figures: tiles, shards_removed, shards_written, freed_mb.

    Raises:
        BadInput: the store is missing or damaged.
    """
    started = time.monotonic()
    root = workspace.store
    with alone(workspace):
        if not (root / store.MANIFEST).exists():
            raise BadInput(f"{root / store.MANIFEST} is missing: run `ringmo ingest`")
        old = old_store(root)
        live = _members(old.table)
        shards = {path.name: path.stat().st_size for path in sorted(root.glob("tiles-*.tar"))}
        wasted = [name for name in shards if shards[name] != _full(live.get(name, []))]
        writer = store.ShardWriter(root, old.shards, _shard_mb(shards))
        moved: dict[tuple[str, int], tuple[str, int]] = {}
        try:
            with console.progress("compact", len(wasted)) as bar:
                for name in wasted:
                    _copy(root / name, live.get(name, []), writer, moved)
                    bar.advance()
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        if wasted:
            retired = _forgotten(old.retired, set(wasted))
            store.write_table(root / store.RETIRED, retired, store.COLUMNS)
            facts = {"shards": writer.shards, "ingest": old.ordinal}
            table = _relocated(old.table, moved)
            store.write_table(root / store.MANIFEST, table, store.COLUMNS, facts)
            for name in wasted:
                (root / name).unlink()
            store.sync_folder(root)
    report = Report("compact", seconds=round(time.monotonic() - started, 2))
    freed = sum(shards[name] for name in wasted) - sum(writer.sizes)
    report.figures = {
        "tiles": len(old.table),
        "shards_removed": len(wasted),
        "shards_written": len(writer.sizes),
        "freed_mb": round(max(freed, 0) / 1e6, 3),
    }
    return report


def _members(table: "pyarrow.Table") -> dict[str, list[tuple[int, int]]]:
    """Shard → offset and size of every member that a row names, in order."""
    found: dict[str, set[tuple[int, int]]] = {}
    for part in PARTS:
        names = [f"{part}shard", f"{part}offset", f"{part}size"]
        rows = table.select(names).filter(table[names[0]].is_valid()).to_pydict()
        for shard, offset, size in zip(*rows.values(), strict=True):
            found.setdefault(shard, set()).add((offset, size))
    return {shard: sorted(members) for shard, members in found.items()}


def _end(offset: int, size: int) -> int:
    """Where a member's last block ends."""
    return offset + size + -size % tarfile.BLOCKSIZE


def _full(members: list[tuple[int, int]]) -> int:
    """Bytes of a shard that has these members and no other."""
    end = sum(_end(0, size) + tarfile.BLOCKSIZE for _, size in members) + 2 * tarfile.BLOCKSIZE
    return end + -end % tarfile.RECORDSIZE


def _shard_mb(shards: dict[str, int]) -> float:
    """Shards as large as the largest there is."""
    return max([1e6, *shards.values()]) / 1e6


def _copy(
    path: Path,
    members: list[tuple[int, int]],
    writer: store.ShardWriter,
    moved: dict[tuple[str, int], tuple[str, int]],
) -> None:
    if not members:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, size in members:
            place = writer.copy(descriptor, offset - tarfile.BLOCKSIZE, _end(offset, size))
            moved[path.name, offset] = place
    finally:
        os.close(descriptor)


def _relocated(
    table: "pyarrow.Table", moved: dict[tuple[str, int], tuple[str, int]]
) -> "pyarrow.Table":
    for part in PARTS:
        names = [f"{part}shard", f"{part}offset"]
        places = zip(*(table[name].to_pylist() for name in names), strict=True)
        now = [moved.get(place, place) for place in places]
        for i, name in enumerate(names):
            table = store.with_column(table, name, [place[i] for place in now])
    return table


def _forgotten(retired: "pyarrow.Table", gone: set[str]) -> "pyarrow.Table":
    """Rows of tiles that left, without places in shards that are no longer there."""
    for part in PARTS:
        names = retired[f"{part}shard"].to_pylist()
        lost = np.array([name in gone for name in names], np.bool_)
        shards = [None if out else name for name, out in zip(names, lost, strict=True)]
        retired = store.with_column(retired, f"{part}shard", shards)
    return retired
