"""What people see: tables on standard output, progress and notes on standard error."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

quiet = False
as_json = False


def note(text: str) -> None:
    """A line for people, on standard error; silent with --quiet."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def result(value: dict[str, Any], text: str) -> None:
    """A command's result: one JSON object with --json, else text for people."""
    print(json.dumps(value, ensure_ascii=False, default=str) if as_json else text, flush=True)


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    """Plain aligned columns: readable in a log, a mail and a terminal alike."""
    texts = [[str(cell) for cell in row] for row in rows]
    if header:
        texts = [list(header), ["-" * len(name) for name in header], *texts]
    if not texts:
        return ""
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    )


class Progress:
    """A bar with the time left on a terminal; a line every `every_s` seconds elsewhere."""

    def __init__(self, label: str, total: int, every_s: float = 60.0) -> None:
        self.label, self.total, self.every_s = label, total, every_s
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, by: int = 1, detail: str = "") -> None:
        self.to(self.done + by, detail)

    def to(self, done: int, detail: str = "") -> None:
        """Progress is at `done` of the total."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"{self.label} {detail}")
        elif not quiet and time.monotonic() - self.last_line >= self.every_s and self.total:
            self.last_line = time.monotonic()
            elapsed = self.last_line - self.started
            left = elapsed / max(done, 1) * (self.total - done)
            note(f"{self.label}: {done}/{self.total} ({left:.0f} s left) {detail}".rstrip())


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """`with progress("ingest", n) as bar: bar.advance()`."""
    with Progress(label, total) as bar:
        yield bar


def figures(values: dict[str, Any]) -> str:
    """Figures by name as two columns; an interval's ends stand with their figure."""
    cells, rows = folded([values])
    return table(zip(rows, cells[0], strict=True)) if cells else ""


def folded(rows: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Rows of cells, and the columns' names: NAME_low and NAME_high stand in NAME's column.

    What is for programs alone is left out: hashes, the key of a registration, what no row has.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name != "key" and not name.endswith("_hash")]
    names = [n for n in names if any(row.get(n) not in (None, {}) for row in rows)]
    ends = {n for n in names if n.endswith(("_low", "_high")) and n.rpartition("_")[0] in names}

    def cell(row: dict[str, Any], name: str) -> str:
        value, low, high = (row.get(n) for n in (name, f"{name}_low", f"{name}_high"))
        if value is None or value == {}:
            return ""
        return f"{value} ({low} to {high})" if low is not None and high is not None else str(value)

    shown = [name for name in names if name not in ends]
    return [[cell(row, name) for name in shown] for row in rows], shown


def figure(value: float | None, unit: str = "%", *, points: bool = False) -> str:
    """A figure for people: shares in %, differences of shares in points, lengths in metres."""
    if value is None:
        return "-"
    if unit == "m":
        return f"{value:.2f} m"
    return f"{100 * value:.1f} {'points' if points else unit}"


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"


def interval(
    value: float | None,
    low: float | None,
    high: float | None,
    unit: str = "%",
    *,
    points: bool = False,
) -> str:
    """A figure with its 95 % interval, where it has one."""
    said = figure(value, unit, points=points)
    if value is None or low is None or high is None:
        return said
    times, digits = (1, 2) if unit == "m" else (100, 1)
    return f"{said} ({times * low:.{digits}f} to {times * high:.{digits}f})"
