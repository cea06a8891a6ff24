"""`ringmo drift`: whether what production sees and says still looks as the reference does."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmo import console, tasks
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.monitoring import comparison, record, reference
from ringmo.monitoring.comparison import LEVEL, MOST, Comparison, Finding
from ringmo.tasks.objects import ObjectTask
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

KNOWN = ("time", "name", "digest", "bundle", "version")  # of every row that was recorded
UNUSUAL = 24  # tiles that are farthest from the reference


@dataclass
class Drift:
    """A comparison and what it was of. reference, production: a row a tile."""

    task: str
    version: str
    reference: "pd.DataFrame"
    production: "pd.DataFrame"
    comparison: Comparison
    since: date
    until: date
    made_of: str

    @property
    def drifted(self) -> bool:
        return self.comparison.drifted

    def unusual(self) -> "pd.DataFrame":
        """The tiles farthest from the reference, the farthest first, with their `distance`."""
        rows = self.production.assign(distance=self.comparison.distance)
        rows = rows.dropna(subset="distance").sort_values("distance", ascending=False)
        return rows.head(UNUSUAL)


def drift(
    config: Config,
    workspace: Workspace,
    task: str,
    ref: str | None = None,
    days: int | None = None,
    since: str | None = None,
) -> Drift:
    """Compare what production recorded of a model with the model's reference.

    Args:
        ref: the version; None: the task's champion. days: how many, up to today; None:
            monitoring.days. since: a date instead, as 2026-11-20.

    Raises:
        BadInput: nothing was recorded of this version in these days, or too little; no
            reference; another task's model. Unreachable: MLflow does not answer.
    """
    import pandas as pd

    from ringmo.registry import listing, register
    from ringmo.registry.bundle import Bundle, load
    from ringmo.registry.tracker import Tracker

    today = datetime.now(UTC).date()
    first = _first(config, today, days, since)
    ref = ref or f"{task}@champion"
    tracker = Tracker(workspace)
    version = listing.resolve(workspace, ref, tracker)
    if version.model != task:
        raise BadInput(f"--model {ref} is a model of {version.model}, not of {task}")

    def opened() -> Bundle:
        return register.open_bundle(tracker, version) if registered else load(Path(version.source))

    registered = bool(version.version)
    production = recorded(workspace, task, version.bundle_hash, str(version), first)
    expected, made_of = reference.of_version(
        workspace, tracker if registered else None, version, opened
    )
    compared = comparison.compare(expected, production)
    until = max(row.date() for row in pd.to_datetime(production["time"]))
    return Drift(task, str(version), expected, production, compared, first, until, made_of)


def _first(config: Config, today: date, days: int | None, since: str | None) -> date:
    if since is None:
        count = config.monitoring.days if days is None else days
        if count < 1:
            raise BadInput(f"--days {count}: at least 1, which is today")
        return today - timedelta(days=count - 1)
    try:
        first = date.fromisoformat(since)
    except ValueError:
        raise BadInput(f"--since {since}: expected a date, as {today}") from None
    if first > today:
        raise BadInput(f"--since {since} is not yet: today is {today} (UTC)")
    return first


def recorded(
    workspace: Workspace, task: str, bundle_hash: str, version: str, since: date
) -> "pd.DataFrame":
    """What production recorded of a model since a day; each tile once, MOST of them at most.

    Raises:
        BadInput: nothing; says what there is.
    """
    import pandas as pd

    where = record.folder(workspace, task)
    every = record.days(where)
    if not every:
        raise BadInput(
            f"production has recorded nothing of {task} here ({where}): `ringmo predict` and "
            f"`ringmo serve` do so, unless monitoring.share is 0"
        )
    files = [f for day, path in every if day >= since for f in sorted(path.glob("part-*.parquet"))]
    parts, unread = [], 0
    for number, file in enumerate(files):
        some = _read(file, list(KNOWN))
        if some is None:
            unread += 1
        else:
            parts.append(some.assign(file=number, at=np.arange(len(some))))
    if not parts:
        raise BadInput(
            f"production has recorded nothing of {task} since {since}; the last day with tiles "
            f"is {every[-1][0]}: see --days and --since"
        )
    rows = pd.concat(parts, ignore_index=True)
    own = rows[rows["bundle"] == bundle_hash]
    if own.empty:
        others = ", ".join(f"{n} ({c} tiles)" for n, c in rows["version"].value_counts().items())
        raise BadInput(
            f"production has recorded nothing of {version} since {since}, but of {others}: "
            f"name one with --model"
        )
    # A scene that was begun again, or pixels that were asked for twice.
    own = own.sort_values("time", kind="stable").drop_duplicates(["name", "digest"], keep="last")
    order = np.random.default_rng(0).permutation(len(own))[:MOST]
    chosen = own.iloc[np.sort(order)]
    # Only of these all columns: a month of production need not fit into memory.
    whole = []
    for number in chosen["file"].unique().tolist():
        rows_of = _read(files[number])
        if rows_of is None:
            unread += 1
        else:
            whole.append(rows_of.iloc[chosen["at"][chosen["file"] == number].to_numpy()])
    if unread:
        console.note(f"{unread} files of {where} could not be read and are left out")
    if not whole:
        raise BadInput(f"{where}: none of the files since {since} can be read")
    together: pd.DataFrame = pd.concat(whole, ignore_index=True)
    return together.dropna(axis=1, how="all")


def _read(file: Path, columns: list[str] | None = None) -> "pd.DataFrame | None":
    """None: it is damaged, or whoever keeps the sample has just removed it."""
    import pandas as pd

    try:
        return pd.read_parquet(file, columns=columns)
    except (OSError, ValueError):
        return None


def counts(task: str) -> bool:
    """Whether the answer has of each class a number of objects, and not a share."""
    return isinstance(tasks.find(task), ObjectTask)


def said(finding: Finding, task: str) -> str:
    """A finding in words."""
    if finding.test in ("bands", "answers"):
        moved = sorted(
            (p for p in finding.parts if p["p"] <= LEVEL), key=lambda part: -abs(part["shift"])
        )
        if not finding.drifted or not moved:
            return "as in the reference"
        told = [f"{p['of']} {p['measure']} {p['shift']:+.1f} deviations" for p in moved[:3]]
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        return ", ".join(told) + more
    if not finding.drifted:
        return "as in the reference"
    if finding.test == "embedding":
        return "the images look different to the model"
    if finding.test == "classes":
        amount = "{:.1f}".format if counts(task) else lambda share: f"{100 * share:.0f} %"
        moves = sorted(finding.parts, key=lambda p: -abs(p["production"] - p["reference"]))
        return ", ".join(
            f"{p['of']} {amount(p['reference'])} → {amount(p['production'])}" for p in moves[:3]
        )
    shift = finding.parts[0] if finding.parts else {"reference": 0.0, "production": 0.0}
    way = "less" if shift["production"] < shift["reference"] else "more"
    return f"{way} sure: {100 * shift['reference']:.0f} % → {100 * shift['production']:.0f} %"


def verdict(drift: Drift) -> str:
    """The answer in one sentence."""
    tests = [finding.test for finding in drift.comparison.findings if finding.drifted]
    tiles, scenes = drift.comparison.tiles["production"], drift.comparison.scenes["production"]
    of = f"{tiles} tiles of {scenes} scenes or requests, {drift.since} to {drift.until}"
    if not tests:
        return f"{drift.version}: no drift found ({of})"
    return f"{drift.version}: production has drifted: {', '.join(tests)} ({of})"


def result(drift: Drift, page: str | None = None) -> dict[str, Any]:
    """What --json prints."""
    return {
        "task": drift.task,
        "model": drift.version,
        "drift": drift.drifted,
        "verdict": verdict(drift),
        "level": LEVEL,
        "since": drift.since.isoformat(),
        "until": drift.until.isoformat(),
        "tiles": drift.comparison.tiles,
        "scenes": drift.comparison.scenes,
        "reference": drift.made_of,
        "tests": [
            {
                "test": finding.test,
                "drift": finding.drifted,
                "value": round(finding.value, 6),
                "unit": finding.unit,
                "p": round(finding.p, 6),
                "p_adjusted": round(finding.adjusted, 6),
                "said": said(finding, drift.task),
                "parts": [_plain(part) for part in finding.parts],
            }
            for finding in drift.comparison.findings
        ],
        "unusual": [
            {"name": row["name"], "distance": round(float(row["distance"]), 3)}
            for _, row in drift.unusual().iterrows()
        ],
        "page": page,
    }


def _plain(part: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in part.items()}


def text(drift: Drift, page: str | None = None) -> str:
    """The same for people."""
    rows = [
        (
            finding.test,
            "drift" if finding.drifted else "-",
            f"{finding.value:.3g} {finding.unit}",
            f"{finding.p:.3f}",
            f"{finding.adjusted:.3f}",
            said(finding, drift.task),
        )
        for finding in drift.comparison.findings
    ]
    header = ("test", "", "by", "p", "p (Holm)", "what")
    lines = [verdict(drift), f"Reference: {drift.made_of}", "", console.table(rows, header)]
    if page:
        lines.append(f"Page: {page}")
    if drift.drifted:
        unusual = drift.unusual()
        if len(unusual):
            lines.append(f"Most unusual: {', '.join(unusual['name'].head(3))}")
        lines.append(
            "Next: look at the tiles (--html FILE); if this is what production is now, label some, "
            "add them to ingest.sources, and `ringmo run`"
        )
    elif not page:
        lines.append("Next: --html FILE shows the histograms and the most unusual tiles")
    return "\n".join(lines)
