"""Which version is in production, and how it came to be: every move of an alias, on record.

A move is an MLflow run in experiment `promotions`. It is created with all that is to happen, in
status RUNNING; then `previous` moves, then `champion`; then it is FINISHED. So production always
has a champion, and whoever comes after a kill finds the RUNNING entry and finishes the move.
Each entry holds the hash of the one before: history cannot be changed unnoticed.
"""

import time
from typing import Any

from ringmo import console
from ringmo.config import digest
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.registry.register import open_bundle
from ringmo.registry.tracker import Run, Tracker, Version, claim
from ringmo.workspace import Workspace

EXPERIMENT = "promotions"
ENTRY = ("number", "model", "what", "from", "to", "who", "why", "when", "forced", "before")


def promote(
    workspace: Workspace,
    task: str,
    version: int | None = None,
    *,
    by: str,
    reason: str,
    force: bool = False,
) -> dict[str, Any]:
    """Make a version the champion; the old champion becomes `previous`.

    Args:
        task: registered model: a task's name or `encoder`.
        version: None stands for the candidate.
        force: although the gate refused it, or has not judged it.

    Returns:
        The entry of `history`, and `moved`: False where it was the champion already.

    Raises:
        AnswerIsNo: the gate refused it. BadInput: no such version, or its bundle does not hold.
        Unreachable: MLflow does not answer.
    """
    tracker = Tracker(workspace)
    with claim(workspace.state / "registry.lock"):
        _settle(tracker, task)
        if version is None:
            chosen = tracker.aliased(task, "candidate")
            if chosen is None:
                raise BadInput(f"{task} has no candidate: register one, or name a version")
        else:
            chosen = tracker.version(task, version)
            if chosen is None:
                raise BadInput(f"{task}/{version}: no such version; see `ringmo models {task}`")
        champion = tracker.aliased(task, "champion")
        if champion is not None and champion.version == chosen.version:
            return _nothing("promote", chosen, by, reason)
        if chosen.tags.get("verdict") != "passed" and not force:
            verdict = chosen.tags.get("verdict")
            why = chosen.tags.get("verdict_reasons", "no reason recorded")
            refused = f"the gate refused it: {why}" if verdict else "the gate has not judged it"
            raise AnswerIsNo(f"{chosen}: {refused}; promote it all the same with --force")
        open_bundle(tracker, chosen).check_example()
        return _move(tracker, "promote", champion, chosen, by, reason, force)


def rollback(workspace: Workspace, task: str, *, by: str, reason: str) -> dict[str, Any]:
    """Make the previous champion the champion again, and the champion `previous`.

    Raises:
        AnswerIsNo: there is none. BadInput: its bundle does not hold.
        Unreachable: MLflow does not answer.
    """
    tracker = Tracker(workspace)
    with claim(workspace.state / "registry.lock"):
        _settle(tracker, task)
        champion = tracker.aliased(task, "champion")
        previous = tracker.aliased(task, "previous")
        if champion is None or previous is None or previous.version == champion.version:
            raise AnswerIsNo(f"{task} has no previous champion to go back to")
        open_bundle(tracker, previous).check_example()
        return _move(tracker, "rollback", champion, previous, by, reason, False)


def history(workspace: Workspace, task: str) -> list[dict[str, Any]]:
    """Every move, newest first: when, what, from, to, who, why, forced, status, intact.

    `from` and `to` are version numbers; `intact` is False where an entry, or the one before it,
    is not what it was when it was written.
    """
    runs = _entries(Tracker(workspace), task)
    rows: list[dict[str, Any]] = []
    before = ""
    for run in reversed(runs):
        entry = _entry(run)
        intact = run.tags.get("entry_sha256") == digest(entry) and entry["before"] == before
        before = run.tags.get("entry_sha256", "")
        rows.append(_row(entry) | {"status": run.status, "intact": intact})
    return rows[::-1]


def settle(workspace: Workspace, task: str) -> None:
    """Finish a move that was interrupted, if there is one."""
    tracker = Tracker(workspace)
    with claim(workspace.state / "registry.lock"):
        _settle(tracker, task)


def move_text(moved: dict[str, Any]) -> str:
    """A move in one line, for people."""
    name = f"{moved['model']}/{moved['to']}"
    if not moved["moved"]:
        return f"{name} is the champion already: nothing to do."
    instead = f" in place of {moved['model']}/{moved['from']}" if moved["from"] else ""
    return f"{name} is the champion{instead} ({moved['what']} by {moved['who']})."


def _move(
    tracker: Tracker,
    what: str,
    champion: Version | None,
    chosen: Version,
    by: str,
    reason: str,
    forced: bool,
) -> dict[str, Any]:
    last = next(iter(_entries(tracker, chosen.model)), None)
    entry = {
        "number": str(int(last.tags["number"]) + 1 if last else 1),
        "model": chosen.model,
        "what": what,
        "from": str(champion.version) if champion else "",
        "to": str(chosen.version),
        "who": by[:200],
        "why": reason[:1000],
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "forced": str(forced).lower(),
        "before": last.tags["entry_sha256"] if last else "",
    }
    name = f"{what} {chosen}" + (f" in place of {champion}" if champion else "")
    run_id = tracker.create_run(EXPERIMENT, name, entry | {"entry_sha256": digest(entry)})
    _apply(tracker, entry)
    tracker.set_status(run_id, "FINISHED")
    return _row(entry) | {"moved": True}


def _apply(tracker: Tracker, entry: dict[str, str]) -> None:
    """Move the aliases; again does no harm. `previous` first: there always is a champion."""
    if entry["from"]:
        tracker.set_alias(entry["model"], "previous", int(entry["from"]))
    tracker.set_alias(entry["model"], "champion", int(entry["to"]))


def _settle(tracker: Tracker, task: str) -> None:
    """Finish what a killed command began: its checks had passed before it was written down."""
    for run in reversed(_entries(tracker, task)):
        if run.status != "RUNNING":
            continue
        entry = _entry(run)
        champion = tracker.aliased(task, "champion")
        now = str(champion.version) if champion else ""
        if now not in (entry["from"], entry["to"]):
            # Somebody moved the champion elsewhere since: theirs is the later word.
            tracker.tag_run(run.id, {"settled": f"left: champion is {task}/{now}"})
            tracker.set_status(run.id, "FAILED")
            continue
        console.note(f"finishing an interrupted {entry['what']}: champion ← {task}/{entry['to']}")
        _apply(tracker, entry)
        tracker.tag_run(run.id, {"settled": "finished by the next command"})
        tracker.set_status(run.id, "FINISHED")


def _entries(tracker: Tracker, task: str) -> list[Run]:
    """Entries of one registered model, newest first."""
    runs = tracker.runs(EXPERIMENT, {"model": task})
    return sorted(runs, key=lambda run: -int(run.tags["number"]))


def _entry(run: Run) -> dict[str, str]:
    return {name: run.tags.get(name, "") for name in ENTRY}


def _row(entry: dict[str, str]) -> dict[str, Any]:
    return entry | {
        "number": int(entry["number"]),
        "from": int(entry["from"]) if entry["from"] else None,
        "to": int(entry["to"]),
        "forced": entry["forced"] == "true",
    }


def _nothing(what: str, chosen: Version, by: str, reason: str) -> dict[str, Any]:
    return {
        "model": chosen.model,
        "what": what,
        "from": chosen.version,
        "to": chosen.version,
        "who": by,
        "why": reason,
        "moved": False,
    }
