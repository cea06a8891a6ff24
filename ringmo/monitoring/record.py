"""A sample of what production sees and says, kept for the comparison with the reference.

    .ringmo/production/TASK/2026-11-26/part-….parquet   a row a tile, as `facts` has it
                                       pixels/….png     previews, with monitoring.pixels

Any number of processes write side by side: each writes whole files of its own, under a temporary
name first. Whoever is killed loses the rows that it had not written yet, and no other.

    recorder = record.Recorder(workspace, bundle, "scene/7", config.monitoring)
    answer = task.answer(bundle.model, bundle.normalised(pixels))
    recorder.add(pixels, answer, names)          # in the same thread, right after the answer
    recorder.close()
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ringmo.config import Monitoring, Sensor
from ringmo.monitoring import facts
from ringmo.stage import whole_file
from ringmo.tasks.base import SECOND
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle

WINDOW = "#"  # between a scene's name and a window's in the name of a tile
OF_SCENE = re.compile(rf"(.+){WINDOW}(\d+(?:,\d+){{3}})", re.DOTALL)
ROWS = 512  # written together
WAIT_S = 60.0  # after which rows are written, however few they are
PREVIEW = 128  # pixels of a side, at most
PIXELS = "pixels"  # the previews' folder

log = logging.getLogger("ringmo.monitoring")


class Recorder:
    """Keeps a share of what a model answers. Never raises: what goes wrong is a line in the log.

    Safe to use from several threads.
    """

    def __init__(
        self, workspace: Workspace, bundle: "Bundle", version: str, settings: Monitoring
    ) -> None:
        """
        Args:
            version: as `scene/7`. settings: `monitoring` of params.yaml; with a share of 0
                nothing is kept, and nothing is done.
        """
        self.bundle, self.version, self.settings = bundle, version, settings
        self.folder = folder(workspace, str(bundle.meta["kind"]))
        self._said: set[Any] = set()
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._embeddings: facts.Embeddings | None = None
        self._pruned: date | None = None
        if settings.share > 0:
            with self._only_logged():
                self._embeddings = facts.Embeddings(bundle)

    def add(
        self,
        pixels: Mapping[str, Tensor],
        answer: Any,
        named: Sequence[str],
        embeddings: Tensor | None = None,
    ) -> None:
        """Keep some tiles of a batch. To be called by the thread that asked the model, right after.

        Args:
            pixels: sensor (or `second`) → (N, bands, S, S), as `Bundle.normalised` gets them.
            answer: what `Task.answer` gave of the batch, before anything was made of it.
            named: N names: a file; FILE#COL,ROW,WIDTH,HEIGHT of a window of a scene, in the
                scene's pixels; or a request's. What stands before `#` tells which tiles belong
                together. The name alone decides whether a tile is kept.
            embeddings: (N, C), the encoder's means over all positions, where the caller has
                them; None: as they passed in this thread.
        """
        if self.settings.share <= 0:
            return
        with self._only_logged():
            rows = [i for i, name in enumerate(named) if sampled(name, self.settings.share)]
            side, count = next(iter(pixels.values())).shape[-1], len(named)
            if embeddings is None and self._embeddings is not None:
                embeddings = self._embeddings.taken(count, side)
            if rows:
                self._keep(pixels, answer, named, rows, embeddings)

    def close(self) -> None:
        """Write what is left, and leave the model as it was."""
        if self._embeddings is not None:
            self._embeddings.close()
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        with self._lock:
            rows, self._rows = self._rows, []
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        with self._only_logged():
            by_day: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                by_day.setdefault(row["time"].date().isoformat(), []).append(row)
            for day, some in by_day.items():
                _write(self.folder / day, some)
            if by_day:
                self._prune()

    def _keep(
        self,
        pixels: Mapping[str, Tensor],
        answer: Any,
        named: Sequence[str],
        rows: Sequence[int],
        embeddings: Tensor | None,
    ) -> None:
        now = datetime.now(UTC)
        columns = facts.of_tiles(self.bundle, pixels, answer, rows, embeddings)
        first = next(iter(pixels.values()))
        kept = []
        for i, row in enumerate(rows):
            digest = hashlib.blake2b(digest_size=8)
            for images in pixels.values():
                digest.update(images[row].cpu().contiguous().numpy().tobytes())
            kept.append(
                {
                    "time": now,
                    "name": named[row],
                    "scene": parted(named[row])[0],
                    "version": self.version,
                    "bundle": self.bundle.hash,
                    "digest": digest.hexdigest(),
                    "side": int(first.shape[-1]),
                    **{name: of[i] for name, of in columns.items()},
                }
            )
            if self.settings.pixels:
                where = self.folder / now.date().isoformat() / PIXELS
                preview(where / f"{kept[-1]['digest']}.png", pixels, row, self.bundle)
        with self._lock:
            self._rows += kept
            full = len(self._rows) >= ROWS
            if not full and self._timer is None:
                self._timer = threading.Timer(WAIT_S, self.flush)
                self._timer.daemon = True
                self._timer.start()
        if full:
            self.flush()

    def _prune(self) -> None:
        """Remove the days that are kept no longer, once a day."""
        today = datetime.now(UTC).date()
        if self._pruned == today:
            return
        self._pruned = today
        for day, path in days(self.folder):
            if day <= today - timedelta(days=self.settings.keep_days):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _only_logged(self) -> Iterator[None]:
        """What goes wrong is one line in the log, once for each reason."""
        try:
            yield
        # Whatever it is: an answer is never late or lost for the sample's sake.
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            # The system's errors name a file, another each time.
            reason = (type(error), getattr(error, "errno", None) or line)
            if reason not in self._said:
                self._said.add(reason)
                log.warning("monitoring: tiles of %s are not recorded: %s", self.version, line)


def folder(workspace: Workspace, task: str) -> Path:
    """Where the samples of a task lie."""
    return workspace.state / "production" / task


def parted(name: str) -> tuple[str, str]:
    """A tile's scene, file or request, and its window in it: COL,ROW,WIDTH,HEIGHT, or nothing."""
    found = OF_SCENE.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def sampled(name: str, share: float) -> bool:
    """Whether a tile of this name is among so many: always the same answer."""
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return number < share * 2**64


def days(where: Path) -> list[tuple[date, Path]]:
    """The days of which there are samples, in order."""
    found = []
    for path in where.iterdir() if where.is_dir() else ():
        try:
            found.append((date.fromisoformat(path.name), path))
        except ValueError:
            continue  # somebody else's folder
    return sorted(found)


def preview(path: Path, pixels: Mapping[str, Tensor], row: int, bundle: "Bundle") -> None:
    """A tile as people see it, a PNG of at most PREVIEW pixels a side; two dates side by side."""
    from PIL import Image

    from ringmo.data.colours import visible

    parts = []
    for name, images in pixels.items():
        if name not in (next(iter(pixels)), SECOND):
            continue
        of = Sensor.model_validate(
            bundle.meta["sensors"][bundle.meta["sensor"] if name == SECOND else name]
        )
        picture = visible(images[row].cpu().permute(1, 2, 0).numpy(), of)
        parts.append(np.repeat(picture, 3, 2) if picture.shape[2] == 1 else picture)
    sheet = Image.fromarray(np.ascontiguousarray(np.concatenate(parts, 1)))
    sheet.thumbnail((PREVIEW * len(parts), PREVIEW))
    with whole_file(path) as temporary:
        sheet.save(temporary, "PNG")


def _write(where: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A whole file of its own, or none."""
    name = f"part-{time.time_ns():019d}-{os.getpid()}-{uuid.uuid4().hex[:8]}.parquet"
    with whole_file(where / name) as temporary:
        write_table(temporary, rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as Parquet; embeddings are lists, and a row without one has null."""
    import pyarrow
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name == "embedding":
            columns[name] = pyarrow.array(values, pyarrow.list_(pyarrow.float32()))
        elif name == "time":
            columns[name] = pyarrow.array(values, pyarrow.timestamp("us", "UTC"))
        elif isinstance(values[0], str):
            columns[name] = pyarrow.array(values, pyarrow.string())
        elif name == "side":
            columns[name] = pyarrow.array(values, pyarrow.int32())
        else:
            numbers = [np.nan if value is None else float(value) for value in values]
            columns[name] = pyarrow.array(numbers, pyarrow.float32())
    parquet.write_table(pyarrow.table(columns), path, compression="zstd")
