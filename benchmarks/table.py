"""The table of `make bench`: its rows, and the run that fills them."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.child import Failed, measure
from benchmarks.imagery import Imagery, Source, prepare
from ringmo import console


@dataclass
class Row:
    """One line of the table. ours and baseline are medians; ratio is how much better ours is."""

    what: str
    unit: str
    goal: str
    ours: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    reached: bool | None = None
    note: str = ""
    runs: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Bench:
    """A run of some rows: where its images are, what it found, and what went wrong."""

    source: Source
    scratch: Path
    images: int | None
    rounds: int
    rows: list[Row] = field(default_factory=list)
    ladders: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # What an image costs in ingest, in % of its time: part → share.
    shares: dict[str, float] = field(default_factory=dict)
    ready: dict[Path, Imagery] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def prepare(self, side: int, count: int, val: int = 0) -> Imagery:
        folder = self.scratch / f"{side}-{count}-{val}"
        if folder in self.ready:
            return self.ready[folder]
        console.note(f"bench: preparing {count} images of {side}×{side}")
        made = prepare(self.source, folder, side, count, val)
        self.ready[folder] = made
        return made

    def tried(
        self, what: str, module: str, cores: int | None, **spec: Any
    ) -> dict[str, Any] | None:
        """One measurement; None where it failed, which is noted and fails the run in the end."""
        try:
            found = measure(module, cores, **spec)
        except Failed as failure:
            self.failures.append(f"{what}: {failure}")
            console.note(f"bench: {what}: FAILED: {failure}")
            return None
        shown = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
        console.note(f"bench: {what}: {shown}")
        return found


def compare(row: Row, ours: list[float], baseline: list[float], goal: float | None) -> None:
    row.ours, row.baseline = statistics.median(ours), statistics.median(baseline)
    row.ratio = row.ours / row.baseline
    row.reached = None if goal is None else row.ratio >= goal
    row.runs = {"ours": [round(r, 1) for r in ours], "baseline": [round(r, 1) for r in baseline]}
