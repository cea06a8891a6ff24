"""What people see: tables on standard output, progress and notes on standard error.

With RINGMO_LOG=json standard error is for programs: every line is an object with `time` (UTC),
`level`, `process`, `message` and what else there is to say; whatever children write there too.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from ringmo.environment import LOG

quiet = False
as_json = False


def note(text: str) -> None:
    """A line for people, on standard error; silent with --quiet."""
    if not quiet:
        say(text)


def say(text: str, level: str = "info", **more: Any) -> None:
    """A line on standard error, --quiet or not. more: further keys of the object."""
    _write(_object(text.strip(), level, **more) if log_is_json() else text)


def relay(line: str) -> None:
    """A line that a child has written, on standard error."""
    if log_is_json() and not _is_object(line):
        if line.strip():
            say(line)
    else:
        _write(line)


def _write(line: str) -> None:
    with suppress(BrokenPipeError):  # nobody reads it any more, and the work goes on
        print(line, file=sys.stderr, flush=True)


def log_is_json() -> bool:
    return LOG.read() == "json"


def speak_json() -> None:
    """Have libraries' logs, warnings and what nobody catches be objects too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)

    def uncaught(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        whole = "".join(traceback.format_exception(kind, error, trace))
        say(f"{kind.__name__}: {error}", "critical", traceback=whole)

    sys.excepthook = uncaught


class JsonFormatter(logging.Formatter):
    """A record of Python's logging as one of our objects; servers' logs are made so too."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def format(self, record: logging.LogRecord) -> str:
        more: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            more["traceback"] = self.formatException(record.exc_info)
        level = record.levelname.lower()
        return _object(record.getMessage(), level, record.created, **more)


def _object(text: str, level: str, when: float | None = None, **more: Any) -> str:
    now = datetime.now(UTC) if when is None else datetime.fromtimestamp(when, UTC)
    said = {
        "time": now.isoformat(timespec="milliseconds"),
        "level": level,
        "process": os.getpid(),
        "message": text,
    }
    return json.dumps(said | more, ensure_ascii=False, default=str)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


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
        if not quiet and sys.stderr.isatty() and not log_is_json():
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
            text = f"{self.label}: {done}/{self.total} ({left:.0f} s left) {detail}".rstrip()
            say(text, step=self.label, done=done, total=self.total, left_s=round(left))


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
