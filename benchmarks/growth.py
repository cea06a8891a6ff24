"""A large store made from a small one, and what it costs to add to it and to validate it.

    python -m benchmarks.growth '{"measure": "grow", "workspace": …, "tiles": 1000000, …}'

A few real images are ingested; then their rows are repeated with keys, hashes, paths and places
of their own, in the very tables that the ingest wrote. So the store's formats stand in the
product alone: here are only the names of the columns in which one tile differs from the next.
Bytes are not repeated: every row points at those of a real tile.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.child import peak_mb
from benchmarks.ingest import timed
from ringmo import config
from ringmo.config import Config
from ringmo.workspace import Workspace, init

if TYPE_CHECKING:
    import pyarrow

CLASSES = 50
FLIPPED = 0.3  # of a real hash's bits: as uneven as real ones, and none near another
METRES = 200.0  # a tile's side on the ground; neighbours share an edge
SPLITS = ("train", "val", "test")
SHARES = (0.7, 0.1, 0.2)


def make(spec: dict[str, Any]) -> dict[str, Any]:
    """A workspace whose store has so many tiles; with `files` also the source's files, sparse.

    Files have the name, size and time that the scan cache knows, and no bytes on the disk.
    """
    workspace = init(Path(spec["workspace"]))
    source = workspace.root / "source"
    _seed(sorted(Path(spec["from"]).rglob("*.jpg"))[: spec["seed"]], source)
    config.edit(workspace.params_file, {"ingest.sources": [str(source)]})
    timed(workspace)
    tiles = Tiles(workspace, spec["tiles"])
    tiles.write()
    started = time.perf_counter()
    if spec["files"]:
        tiles.write_files(source)
        os.sync()  # what was just written is no part of what is measured next
    return {"tiles": tiles.count, "files_s": time.perf_counter() - started}


def _seed(images: list[Path], source: Path) -> None:
    for number, path in enumerate(images):
        folder = source / f"class{number % CLASSES:02}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


class Tiles:
    """Rows of the grown store: those of the seed, then `count` less these that repeat them."""

    def __init__(self, workspace: Workspace, count: int) -> None:
        import pyarrow.parquet as pq

        from ringmo.data import store

        self.tables = {"manifest": workspace.store / store.MANIFEST}
        self.tables["scan"] = workspace.state / "scan.parquet"
        self.history = workspace.store / store.HISTORY
        self.manifest = pq.read_table(self.tables["manifest"], partitioning=None)
        self.seeds = self.manifest.num_rows
        self.count = max(count, self.seeds)
        self.more = self.count - self.seeds
        dice = np.random.default_rng(0)
        self.content = _hex(dice, self.more, 32)
        self.key = _hex(dice, self.more, 8)
        self.phash = self._hashes(dice)
        self.split = dice.choice(SPLITS, self.more, p=SHARES).tolist()
        self.like = np.arange(self.more) % self.seeds  # the row that each repeats
        labels = np.array(self.manifest["label"].to_pylist())[self.like]
        self.path = [f"{label}/s{n:07}.jpg" for n, label in enumerate(labels)]

    def _hashes(self, dice: np.random.Generator) -> list[str]:
        real = np.array([int(h, 16) for h in self.manifest["phash"].to_pylist()], np.uint64)
        hashes = real[dice.integers(len(real), size=self.more)] ^ flips(dice, self.more, FLIPPED)
        return [f"{value:016x}" for value in hashes.tolist()]

    def write(self) -> None:
        """Manifest, scan cache and history as if the ingest had seen them all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        located = np.arange(self.more) % 2 == 1
        side = int(np.ceil(np.sqrt(self.more)))
        row, col = np.divmod(np.arange(self.more), max(side, 1))
        west, south = 400_000 + METRES * col, 5_000_000 + METRES * row
        corners = {"minx": west, "miny": south, "maxx": west + METRES, "maxy": south + METRES}
        members = [f"{key}.jpg" for key in self.key]
        own: dict[str, Any] = {
            "key": self.key,
            "member": members,
            "source": self.path,
            "content_hash": self.content,
            "phash": self.phash,
            "place": [f"p{key}" for key in self.key],
            "split": self.split,
            "crs": pa.array(np.where(located, "EPSG:32633", None), pa.string()),
            "gsd_m": np.where(located, METRES / 400, np.nan),
        }
        own |= {name: np.where(located, values, np.nan) for name, values in corners.items()}
        grown = self._grown(self.manifest, own, self.like)
        _write(self.tables["manifest"], grown.sort_by("source"))  # the order of the files

        scan = pq.read_table(self.tables["scan"], partitioning=None)
        sizes, times = self._files()
        own = {"path": self.path, "hash": self.content, "keys": self.key}
        own |= {"size": sizes, "mtime_ns": times}
        _write(self.tables["scan"], self._grown(scan, own, self.like % scan.num_rows))

        history = json.loads(self.history.read_text())
        last = history["ingests"][-1]
        labels = pq.read_table(self.tables["manifest"], columns=["label"])["label"]
        counts = {str(c["values"]): c["counts"].as_py() for c in labels.value_counts()}
        last |= {"tiles": self.count, "classes": dict(sorted(counts.items()))}
        self.history.write_text(json.dumps(history))

    def _grown(
        self, table: "pyarrow.Table", own: dict[str, Any], like: NDArray[np.intp]
    ) -> "pyarrow.Table":
        import pyarrow as pa

        more = table.take(pa.array(like))
        for name, values in own.items():
            form = table.schema.field(name).type
            if pa.types.is_list(form):
                values = [[value] for value in values]
            column = pa.array(values, form)
            more = more.set_column(more.schema.get_field_index(name), table.field(name), column)
        return pa.concat_tables([table, more])

    def _files(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        dice = np.random.default_rng(1)
        sizes = dice.integers(20_000, 120_000, self.more)
        return sizes, 1_700_000_000_000_000_000 + dice.integers(10**15, size=self.more) * 1000

    def write_files(self, source: Path) -> None:
        for path, size, when in zip(self.path, *self._files(), strict=True):
            name = source / path
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.ftruncate(descriptor, int(size))
            os.utime(descriptor, ns=(int(when), int(when)))
            os.close(descriptor)


def _write(path: Path, table: "pyarrow.Table") -> None:
    import pyarrow.parquet as pq

    path.unlink()
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _hex(dice: np.random.Generator, count: int, size: int) -> list[str]:
    text = dice.bytes(count * size).hex()
    return [text[i : i + 2 * size] for i in range(0, len(text), 2 * size)]


def flips(dice: np.random.Generator, count: int, share: float) -> NDArray[np.uint64]:
    """Numbers of 64 bits, of which each is set with this probability."""
    parts: Iterator[NDArray[np.uint8]] = (
        np.packbits(dice.random((min(100_000, count - start), 64), np.float32) < share, axis=1)
        for start in range(0, count, 100_000)
    )
    return np.concatenate([np.empty((0, 8), np.uint8), *parts]).view(np.uint64).ravel()


def grow(spec: dict[str, Any]) -> dict[str, Any]:
    """New images into the store of `make`; nothing else may be read."""
    workspace = Workspace(Path(spec["workspace"]))
    config.edit(workspace.params_file, {"ingest.workers": spec["workers"]})
    source = workspace.root / "source"
    images = sorted(Path(spec["from"]).rglob("*.jpg"))[spec["seed"] :]
    for number, path in enumerate(images):
        os.link(path, source / f"class{number % CLASSES:02}" / f"new-{path.name}")
    started = time.perf_counter()
    listed = sum(len(files) for _, _, files in os.walk(source))
    listing = time.perf_counter() - started
    found = timed(workspace)
    figures = found["figures"]
    if (figures["tiles"], figures["new_tiles"]) != (listed, len(images)):
        raise SystemExit(f"{listed} files, {len(images)} of them new, came to {figures}")
    return found | {"listing_s": listing, "new": len(images)}


def validate(spec: dict[str, Any]) -> dict[str, Any]:
    """All suites over the store's manifest."""
    from ringmo.data.validation import validate

    workspace = Workspace(Path(spec["workspace"]))
    settings = Config.load(workspace.params_file)
    out = workspace.work("validate")
    out.mkdir(parents=True)
    started = time.perf_counter()
    report = validate(settings, workspace, out)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory_mb": peak_mb(), "figures": report.figures}


if __name__ == "__main__":
    from benchmarks.child import begin

    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    measured = {"make": make, "grow": grow, "validate": validate}
    print(json.dumps(measured[asked["measure"]](asked)), flush=True)
