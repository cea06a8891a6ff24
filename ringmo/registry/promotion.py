"""Which version is in production, and how it came to be: every move of an alias, on record.

The record comes first, the aliases follow. A move of registered model `scene` is entry number N of
its record: an MLflow run in experiment `promotions`, RUNNING before the first alias moves and
FINISHED after the last. Each entry holds the hash of the one before, so that the record cannot be
changed unnoticed, and none is ever rewritten.

Who moves, when several want to. MLflow's aliases have no compare-and-swap, and a lock on this
machine's disk says nothing to another machine. What MLflow's database does promise is that an
experiment of a given name is created once. So a move begins by creating an experiment named
`promotions/scene/N`, with the whole entry as its tags, where N follows the last entry that was seen
before any check was made. That is the compare-and-swap: of all who saw the same champion one gets
the number, and the others are told what happened meanwhile. Numbers are unique and the content of
each is decided in one step, on any number of machines.

What a dead owner leaves. The claim holds all that is to happen, so nobody waits for its owner, and
it is never taken away from him: the next command, on any machine, carries the move out. All steps
may be done again and by several at once: the run is written if there is none (two that tell the
same are read as one), the aliases are pointed where the record's last entry says, the run is
FINISHED, the claim is deleted, which takes it out of sight and keeps its name taken.
An owner that was not dead but stopped may wake up after others have finished his move and made
another, and point the aliases back. That is why whoever has moved an alias then reads the record
once more, and when an entry was added, points the aliases where that one says. What remains is an
owner who stops between reading and writing, wakes up after somebody else's next move and dies
before reading again; the next command sees a champion that the record does not know, and puts
that on record (below): wrong for so long, and never hidden.

`previous` is moved before `champion`, and an alias moves in one transaction: there is no moment
without a champion.

What was moved in MLflow itself, past this module, is respected: the next command enters it in the
record as `outside`. A champion that somebody took away without naming another is put back.

The champion before. The record is read as a stack: a promotion puts a version on top, a rollback
takes the top off. So a rollback undoes the last promotion that was not undone yet, and a second one
goes back one further, not forward again; `previous` always is where the next rollback would go, and
is absent where there is nothing to go back to. Versions deleted from the registry are left out.
"""

import contextlib
import json
import textwrap
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ringmo import console
from ringmo.config import Config, digest
from ringmo.errors import AnswerIsNo, BadInput, Unreachable
from ringmo.registry import outbox
from ringmo.registry.tracker import Run, Tracker, Version, bundle_hash
from ringmo.workspace import Workspace

EXPERIMENT = "promotions"
ENTRY = ("number", "model", "what", "from", "to", "who", "why", "when", "forced", "before")
SECOND_LOOK_S = 0.5


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
        force: although the gate refused it, has not judged it, or compared it with another champion
            than the present one. What does not hold is not promoted with it either.

    Returns:
        The entry of `history`; `moved`, False where it was the champion already; `seconds` that it
        took once MLflow was imported and open.

    Raises:
        AnswerIsNo: the gate refused it, or somebody else moved the champion meanwhile.
        BadInput: no such version, its files are gone or damaged, it is a model for another task,
            or it does not give its own example's answer. Unreachable: MLflow does not answer.
    """
    move = _Move(workspace, task)
    if version is None:
        chosen = next((v for v in move.versions if "candidate" in v.aliases), None)
        if chosen is None:
            raise BadInput(f"{task} has no candidate: register one, or name a version")
    else:
        chosen = next((v for v in move.versions if v.version == version), None)
        if chosen is None:
            raise BadInput(f"{task}/{version}: no such version; see `ringmo models {task}`")
    champion = move.champion
    if champion is not None and champion.version == chosen.version:
        return move.nothing(chosen, by, reason)
    if not force and (refusal := _refusal(chosen, champion)):
        raise AnswerIsNo(f"{chosen}: {refusal}; promote it all the same with --force")
    _check(move.tracker, chosen)
    return move.make("promote", chosen, by, reason, force)


def rollback(workspace: Workspace, task: str, *, by: str, reason: str) -> dict[str, Any]:
    """Make the champion before the champion again: the last promotion is undone.

    Its files are compared, byte for byte, with those that were registered, and no model is loaded:
    that they answer was seen when they were promoted. Where they lie on another machine and are not
    on this one, that they are there is all that is looked at: they are not fetched.

    Raises:
        AnswerIsNo: there is none, or somebody else moved the champion meanwhile.
        BadInput: its files are gone or damaged. Unreachable: MLflow does not answer.
    """
    move = _Move(workspace, task)
    if move.champion is None or move.previous is None:
        raise AnswerIsNo(f"{task} has no previous champion to go back to")
    _check_bytes(move.tracker, move.previous)
    return move.make("rollback", move.previous, by, reason, False)


def history(workspace: Workspace, task: str) -> list[dict[str, Any]]:
    """Every move, newest first: when, what, from, to, who, why, forced, status, intact.

    what: promote, rollback, or outside (the alias was moved in MLflow itself). `from` and `to` are
    version numbers. status: FINISHED, RUNNING (interrupted: the next command finishes it) or
    FAILED (interrupted, and left, since somebody had moved the champion elsewhere). `intact` is
    False where an entry is not what it was when it was written, or one before it is missing.
    """
    rows: list[dict[str, Any]] = []
    number, before = 0, ""
    for entry in _record(Tracker(workspace), task):
        intact = entry.whole and entry.tags["before"] == before and entry.number == number + 1
        number, before = entry.number, entry.sha256
        rows.append(_row(entry.tags) | {"status": entry.status, "intact": intact})
    return rows[::-1]


def settle(workspace: Workspace, task: str) -> None:
    """Finish a move that was interrupted, if there is one, and put on record what moved outside."""
    move = _Move(workspace, task)
    outbox.deliver(workspace, move.config)


def move_text(moved: dict[str, Any]) -> str:
    """A move in one line, for people."""
    name = f"{moved['model']}/{moved['to']}"
    if not moved["moved"]:
        return f"{name} is the champion already: nothing to do."
    instead = f" in place of {moved['model']}/{moved['from']}" if moved["from"] else ""
    return f"{name} is the champion{instead} ({moved['what']} by {moved['who']})."


def history_text(rows: list[dict[str, Any]]) -> str:
    """Moves as a table for people; each row is one of `history`."""
    words = {"FINISHED": "done", "RUNNING": "interrupted", "FAILED": "left"}

    def cells(row: dict[str, Any]) -> list[Any]:
        what = row["what"] + (" --force" if row["forced"] else "")
        told = ("model", "number", "when"), ("from", "to", "who", "why")
        first, last = ([row[name] or "-" for name in names] for names in told)
        record = "intact" if row["intact"] else "BROKEN"
        last[-1] = textwrap.shorten(str(last[-1]), 60, placeholder=" …")  # whole with --json
        return [*first, what, *last, words.get(row["status"], row["status"]), record]

    names = ("model", "no.", "when", "what", "from", "to", "who", "why", "state", "record")
    text = console.table([cells(row) for row in rows], names)
    if broken := sum(not row["intact"] for row in rows):
        text += (
            f"\n\n{broken} of {len(rows)} entries are BROKEN: changed after they were written, "
            f"or one before them is missing."
        )
    return text + "\n\nNext: ringmo rollback TASK   (goes back to the champion before)"


class _Move:
    """The registered model as it stands, with nothing unfinished, and a move from there.

    champion, previous: as the record has them. versions: all there are, newest first.
    """

    def __init__(self, workspace: Workspace, task: str) -> None:
        self.workspace, self.task = workspace, task
        self.config = Config.load(workspace.params_file).promotion
        outbox.check(self.config)
        self.tracker = Tracker(workspace)
        for _, tags in sorted(self._claims().items()):
            self._told_finish(tags)
        self.record = _record(self.tracker, task)
        for entry in self.record:
            if entry.status == "RUNNING":
                self._told_finish(entry.tags)
        self._read()
        self._follow_outside()

    def _read(self) -> None:
        self.record = _record(self.tracker, self.task)
        self.versions = self.tracker.versions(self.task)
        stack = _stack(self.record, self.versions)
        self.champion = stack[-1] if stack else None
        self.previous = stack[-2] if len(stack) > 1 else None

    def _follow_outside(self) -> None:
        """Have record and aliases say the same."""
        aliased = _bearer(self.versions, "champion")
        if aliased is not None and aliased != self.champion:
            # Somebody who was stopped in the middle of a move may be putting it right just now.
            time.sleep(SECOND_LOOK_S if self.champion else 0)
            self._read()
            aliased = _bearer(self.versions, "champion")
        if aliased is not None and aliased != self.champion:
            why = "the alias was moved in MLflow, not by ringmo"
            with contextlib.suppress(AnswerIsNo):  # another command has just entered it
                self.make("outside", aliased, "unknown", why, False)
            self._read()
        elif (aliased, _bearer(self.versions, "previous")) != (self.champion, self.previous):
            _apply(self.tracker, self.task)
            self._read()

    def make(self, what: str, to: Version, by: str, reason: str, forced: bool) -> dict[str, Any]:
        """Claim the next number with this move, and carry it out."""
        last = self.record[-1] if self.record else None
        number = last.number + 1 if last else 1
        while True:
            entry = {
                "number": str(number),
                "model": self.task,
                "what": what,
                "from": str(self.champion.version) if self.champion else "",
                "to": str(to.version),
                "who": by[:200],
                "why": reason[:1000],
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "forced": str(forced).lower(),
                "before": last.sha256 if last else "",
            }
            tags = entry | {"entry_sha256": digest(entry), "claim": uuid.uuid4().hex}
            if self.tracker.claim_name(f"{EXPERIMENT}/{self.task}/{number}", tags):
                break
            claimed = {int(tags["number"]) for tags in self._claims().values()}
            if claimed or len(_record(self.tracker, self.task)) > len(self.record):
                raise self._lost(f"{what} of {to}")
            number += 1  # that entry was deleted in MLflow: the gap shows in the history
        try:
            moved = self._finish(tags)
        except Unreachable as error:
            raise Unreachable(
                f"{error}; the {what} is on record, and the next command finishes it"
            ) from None
        if not moved:
            why = "somebody moved the champion in MLflow meanwhile"
            raise AnswerIsNo(f"{what} of {to}: {why}: look at it, and decide again")
        done = _row(entry) | {"moved": True, "seconds": self._seconds()}
        outbox.deliver(self.workspace, self.config)
        return done

    def nothing(self, chosen: Version, by: str, reason: str) -> dict[str, Any]:
        """The answer where the version is the champion already."""
        same = {"from": chosen.version, "to": chosen.version}
        about = {"model": self.task, "what": "promote", "who": by, "why": reason}
        done = about | same | {"moved": False, "seconds": self._seconds()}
        outbox.deliver(self.workspace, self.config)
        return done

    def _seconds(self) -> float:
        return round(time.monotonic() - self.tracker.opened, 3)

    def _claims(self) -> dict[int, dict[str, str]]:
        found = self.tracker.claims(f"{EXPERIMENT}/{self.task}/")
        return {int(name.rpartition("/")[2]): tags for name, tags in found.items()}

    def _lost(self, what: str) -> AnswerIsNo:
        known = [entry.tags for entry in _record(self.tracker, self.task)]
        last = max([*known, *self._claims().values()], key=lambda tags: int(tags["number"]))
        return AnswerIsNo(
            f"{what}: {last['who']} made {self.task}/{last['to']} the champion meanwhile "
            f"({last['why'] or 'without a reason'}): look at it, and decide again"
        )

    def _told_finish(self, tags: dict[str, str]) -> None:
        where = f"champion ← {self.task}/{tags['to']}"
        if self._finish(tags):
            console.note(f"finished an interrupted {tags['what']}: {where}")

    def _finish(self, tags: dict[str, str]) -> bool:
        """Carry out what is claimed, whoever claimed it; whether it was. Again does no harm."""
        tracker, number = self.tracker, tags["number"]

        def runs() -> list[Run]:
            return tracker.runs(EXPERIMENT, {"model": self.task, "number": number})

        champion = _bearer(tracker.versions(self.task), "champion")
        # Read after the champion: who moved it on from here had finished this entry before.
        there = runs()
        done = next((run.status for run in there if run.status != "RUNNING"), None)
        if done is None:
            now = str(champion.version) if champion else tags["to"]
            expected = tags["what"] == "outside" or now in (tags["from"], tags["to"])
            if not there:
                name = f"{tags['what']} {self.task}/{tags['to']}"
                name += f" in place of {self.task}/{tags['from']}" if tags["from"] else ""
                tracker.create_run(EXPERIMENT, name, tags)
                there = runs()
            if expected:
                _apply(tracker, self.task)
                # Before it is FINISHED, so that no kill in between loses the message.
                entry = {name: tags.get(name, "") for name in ENTRY}
                outbox.put(self.workspace, self.config, _row(entry), self.tracker)
                done = "FINISHED"
            else:
                # Somebody moved the champion elsewhere since: theirs is the later word.
                for run in there:
                    tracker.tag_run(run.id, {"settled": f"left: the champion is {champion}"})
                done = "FAILED"
        for run in there:
            if run.status == "RUNNING":
                tracker.set_status(run.id, done)
        tracker.retire_claim(f"{EXPERIMENT}/{self.task}/{number}")
        return done == "FINISHED"


@dataclass
class _Entry:
    """One number of the record. `whole`: each run of that number still tells what it told first."""

    number: int
    tags: dict[str, str]
    sha256: str
    status: str
    whole: bool


_ORDER = ("RUNNING", "FAILED", "FINISHED")


def _record(tracker: Tracker, task: str) -> list[_Entry]:
    """Entries of one registered model, oldest first."""
    entries: dict[int, _Entry] = {}
    runs = tracker.runs(EXPERIMENT, {"model": task})
    for run in sorted(runs, key=lambda run: _ORDER.index(run.status)):
        number = int(run.tags["number"])
        tags = {name: run.tags.get(name, "") for name in ENTRY}
        sha256 = run.tags.get("entry_sha256", "")
        whole = sha256 == digest(tags)
        if number in entries:
            whole = whole and entries[number].whole and sha256 == entries[number].sha256
        entries[number] = _Entry(number, tags, sha256, run.status, whole)
    return [entries[number] for number in sorted(entries)]


def _stack(record: list[_Entry], versions: list[Version]) -> list[Version]:
    """The champion, last, over those that rollbacks would bring back one after the other."""
    numbers: list[int] = []
    for entry in record:
        to = int(entry.tags["to"])
        if entry.status == "FAILED":
            continue
        if entry.tags["what"] == "rollback" and to in numbers:
            while numbers[-1] != to:
                numbers.pop()
        else:
            numbers.append(to)
    there = {version.version: version for version in versions}
    found = [there[number] for number in numbers if number in there]
    return [v for i, v in enumerate(found) if i == 0 or found[i - 1] != v]


def _bearer(versions: list[Version], alias: str) -> Version | None:
    return next((version for version in versions if alias in version.aliases), None)


def _apply(tracker: Tracker, task: str) -> None:
    """Point the aliases where the record says, `previous` first: there always is a champion."""
    while True:
        record, versions = _record(tracker, task), tracker.versions(task)
        stack = _stack(record, versions)
        for alias, depth in (("previous", 2), ("champion", 1)):
            wanted = stack[-depth] if len(stack) >= depth else None
            if wanted == _bearer(versions, alias):
                continue
            if wanted is not None:
                tracker.set_alias(task, alias, wanted.version)
            elif alias == "previous":
                tracker.remove_alias(task, alias)
        if len(_record(tracker, task)) == len(record):
            return


def _refusal(chosen: Version, champion: Version | None) -> str | None:
    """Why the gate's verdict does not let it pass."""
    verdict = chosen.tags.get("verdict")
    if verdict is None:
        return "the gate has not judged it"
    if verdict != "passed":
        why = chosen.tags.get("verdict_reasons", "no reason recorded")
        return f"the gate refused it: {why}"
    against, now = chosen.tags.get("verdict_against"), str(champion) if champion else "none"
    if against is not None and against != now:
        return f"the gate compared it with {against}, and the champion is {now} by now"
    return None


def _check(tracker: Tracker, chosen: Version) -> None:
    """Whether it can be the champion at all: there, whole, of its task, and answering.

    Raises:
        BadInput: it cannot, and why.
    """
    from ringmo.registry.register import open_bundle

    tracker.bundle_here(chosen)  # a copy kept here does not help where production fetches it
    try:
        model = open_bundle(tracker, chosen)
        _check_kind(chosen, model.meta)
        model.check_example()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:240]
        raise BadInput(f"{chosen} does not load: {why}") from None


def _check_bytes(tracker: Tracker, chosen: Version) -> None:
    """Whether its files are those that were registered. Loads no model.

    Raises:
        BadInput: they are not, or are gone.
    """
    folder = tracker.bundle_here(chosen)
    if folder is None:
        return
    try:
        found = bundle_hash(folder)
    except OSError as error:
        raise BadInput(f"{chosen}: {error.filename}: {error.strerror}") from None
    if found != chosen.bundle_hash:
        raise BadInput(f"{chosen}: its files in {folder} are not the ones that were registered")
    _check_kind(chosen, json.loads((folder / "model.json").read_bytes()))


def _check_kind(chosen: Version, meta: dict[str, Any]) -> None:
    if meta["kind"] != chosen.model:
        raise BadInput(f"{chosen} is a model for {meta['kind']}, not for {chosen.model}")


def _row(entry: dict[str, str]) -> dict[str, Any]:
    return entry | {
        "number": int(entry["number"]),
        "from": int(entry["from"]) if entry["from"] else None,
        "to": int(entry["to"]),
        "forced": entry["forced"] == "true",
    }
