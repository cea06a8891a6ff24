"""What nobody needs any more, and its removal: one rule for all that a workspace makes.

What stays, and with it every byte that reproducing it needs:

    of each registered model   what bears an alias, what a promotion is under way for, and the
                               `clean.keep_runs` newest versions; the encoder that each stands on,
                               and the bundle that this one started from
    of each stage              its `clean.keep_runs` newest runs, and those that are running
    data                       the versions that those models learnt from, and the newest
    of this workspace          what dvc.lock and data/store.dvc name
    of anything                what is younger than `clean.keep_days`

Marked first, then swept, and nothing is kept of who was here before: a removal that was killed is
begun anew. Nobody trains, ingests or registers meanwhile: it waits for who does, and they for it.
Without `shared` nothing outside the workspace's folder is touched.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ringmo import console, tasks
from ringmo.config import Config, read_yaml
from ringmo.data import versions
from ringmo.data.ingest import alone
from ringmo.errors import BadInput
from ringmo.registry import forward
from ringmo.registry.origins import ENCODER, STORE, Origins
from ringmo.registry.tracker import CLEANED, Run, Tracker, Version, claim
from ringmo.stage import Report
from ringmo.status import running
from ringmo.workspace import CHAMPION, Workspace

POLL_S = 2.0
CHAIN_LOCK = "chain.lock"  # what a run of the chain holds
LOG_BYTES, LOG_KEPT = 10_000_000, 1_000_000  # a server's log that is larger is cut to its end
LEFT_S = 3600.0  # what a killed command left under a temporary name
DAY_S = 86400.0


@dataclass(frozen=True)
class Item:
    """One thing that goes. paths: what it is on this disk; bytes: where it is elsewhere."""

    name: str
    remove: Callable[[], None]
    paths: tuple[Path, ...] = ()
    bytes: int = 0
    count: int = 1


@dataclass
class Heap:
    """Things of one kind: those that go, and how many stay."""

    kind: str
    items: list[Item] = field(default_factory=list)
    stay: int = 0

    @property
    def count(self) -> int:
        return sum(item.count for item in self.items)


@dataclass
class _Kept:
    """Versions that stay whole, with what remakes them; bundles that these start from; runs."""

    whole: list[Version]
    starts: list[Version]
    gone: list[Version]
    runs: list[Run]  # that go

    @property
    def names(self) -> set[str]:
        return {f"{v.model}-{v.version}" for v in (*self.whole, *self.starts)}

    @property
    def hashes(self) -> set[str]:
        return {v.bundle_hash for v in (*self.whole, *self.starts)}


@dataclass
class _Plan:
    config: Config
    workspace: Workspace
    shared: bool
    now: float
    heaps: list[Heap] = field(default_factory=list)
    models: list[str] = field(default_factory=list)  # whose files go
    data: list[str] = field(default_factory=list)  # data versions that go
    notes: list[str] = field(default_factory=list)

    def young(self, when: float) -> bool:
        return when > self.now - self.config.clean.keep_days * DAY_S

    def heap(self, kind: str) -> Heap:
        self.heaps.append(Heap(kind))
        return self.heaps[-1]


def clean(
    config: Config, workspace: Workspace, *, dry_run: bool = False, shared: bool = False
) -> dict[str, Any]:
    """Remove what nothing that stays reaches.

    Args:
        dry_run: look only; whoever is at work is not waited for. shared: also what others may
            use: the DVC remote, a DVC cache outside the workspace, and the artifacts of a server
            that MLFLOW_TRACKING_URI names.

    Returns:
        dry_run; kinds: rows of kind, count, bytes (that the disk gets back), stay; bytes in all;
        models and data_versions whose files went; notes.

    Raises:
        BadInput: a DVC file is damaged. Unreachable: MLflow, or a remote, does not answer.
    """
    if dry_run:
        plan = _plan(config, workspace, shared)
        if who := at_work(workspace):
            plan.notes.append(f"At work just now: {'; '.join(who)}. A removal waits for them.")
        return _result(plan, dry_run=True)
    with _undisturbed(workspace):
        plan = _plan(config, workspace, shared)
        result = _result(plan, dry_run=False)
        if plan.data:
            versions.note_cleaned(workspace, plan.data, _today())
        with console.progress("clean", sum(heap.count for heap in plan.heaps)) as bar:
            for heap in plan.heaps:
                for item in heap.items:
                    item.remove()
                    bar.advance(item.count, heap.kind)
    return result


# Who is at work


def at_work(workspace: Workspace) -> list[str]:
    """Whoever trains, registers or runs the chain in this workspace, in words."""
    said = _at_work(workspace)
    if not said and _held(workspace.state / CHAIN_LOCK):
        said.append("a run of the chain")
    return said


def _at_work(workspace: Workspace) -> list[str]:
    rows = {row["pid"]: f"{row['stage']} (process {row['pid']})" for row in running(workspace)}
    for pid, command, lives in versions.at_work(workspace):
        if lives:
            rows.setdefault(pid, f"`{command}` (process {pid})")
    rows.pop(os.getpid(), None)  # what trained in this very process has ended: it cleans now
    said = list(rows.values())
    for lock in sorted((workspace.state / "reproduced").glob("*/.ringmo/reproduce.lock")):
        if _held(lock):
            said.append(f"reproduce of {lock.parents[1].name}")
    return said


def _held(lock: Path) -> bool:
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def _undisturbed(workspace: Workspace) -> Iterator[None]:
    """Nobody is at work and nobody begins: one removal at a time, then all locks that there are."""
    told: list[str] = []
    with claim(workspace.state / "clean.lock"):
        while True:
            with contextlib.ExitStack() as locks:
                if not (who := at_work(workspace)):
                    locks.enter_context(_chain(workspace))
                    locks.enter_context(alone(workspace))
                    locks.enter_context(claim(workspace.state / "registry.lock"))
                    locks.enter_context(versions.alone(workspace))
                    # Once more: somebody may have begun just before.
                    if not (who := _at_work(workspace)):
                        yield
                        return
            if who != told:
                console.note(f"clean: waiting for {'; '.join(who)}")
                told = who
            time.sleep(POLL_S)


@contextlib.contextmanager
def _chain(workspace: Workspace) -> Iterator[None]:
    """No run of the chain begins meanwhile. The file's words are left: they are of a run."""
    with (workspace.state / CHAIN_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# What stays


def _plan(config: Config, workspace: Workspace, shared: bool) -> _Plan:
    plan = _Plan(config, workspace, shared, time.time())
    tracker = Tracker(workspace)
    kept = _registry(plan, tracker)
    marked = _marked(plan, tracker, kept)
    _mlflow(plan, tracker, kept)
    if marked is not None:
        _cache(plan, marked)
        _remote(plan, marked)
    _run_folders(plan)
    _copies(plan, kept)
    _production(plan)
    _by_age(plan)
    _logs(plan)
    _left_behind(plan)
    return plan


def _registry(plan: _Plan, tracker: Tracker) -> _Kept:
    """Which versions and runs stay."""
    keep = plan.config.clean.keep_runs
    going: dict[str, Run] = {}
    stay = plan.heap("runs in MLflow: files")
    for name in tracker.experiments():
        if not _is_ours(name):
            continue
        for i, run in enumerate(tracker.runs(name)):
            if run.tags.get(CLEANED):
                continue
            if i < keep or run.status == "RUNNING" or plan.young(run.started):
                stay.stay += 1
            else:
                going[run.id] = run
    under_way = {
        (tags["model"], tags[end])
        for tags in tracker.claims("promotions/").values()
        for end in ("from", "to")
        if tags.get("model") and tags.get(end)
    }
    there = {model: tracker.versions(model) for model in tracker.models()}
    whole: dict[str, Version] = {}
    for model, found in there.items():
        for i, version in enumerate(v for v in found if not v.cleaned):
            if (
                i < keep
                or version.aliases
                or (model, str(version.version)) in under_way
                or plan.young(version.created)
                or version.run_id not in going
            ):
                whole[str(version)] = version
    # What remaking each needs: its encoder, of which all is needed, and where that one started.
    encoders = {v.bundle_hash: v for v in reversed(there.get(ENCODER, []))}
    for version in [v for v in whole.values() if v.model != ENCODER]:
        if encoder := encoders.get(version.tags.get("encoder_hash", "")):
            whole.setdefault(str(encoder), encoder)
    starts: dict[str, Version] = {}
    for version in [v for v in whole.values() if v.model == ENCODER]:
        start = encoders.get(version.tags.get("encoder_hash", ""))
        if start is not None and str(start) not in whole:
            starts[str(start)] = start
    needed = {v.run_id for v in (*whole.values(), *starts.values())}
    runs = [run for run in going.values() if run.id not in needed]
    stay.stay += len(going) - len(runs)
    gone = [
        v
        for found in there.values()
        for v in found
        if v.run_id and str(v) not in whole and str(v) not in starts
    ]
    return _Kept(list(whole.values()), list(starts.values()), gone, runs)


def _is_ours(experiment: str) -> bool:
    """Whether a stage or the chain writes there; other people's experiments are theirs."""
    kind, _, task = experiment.partition("-")
    if task:
        return kind in ("finetune", "scratch", "evaluate") and task in tasks.names()
    return experiment in (forward.CHAIN, "validate", "select", "pretrain")


def _marked(plan: _Plan, tracker: Tracker, kept: _Kept) -> set[str] | None:
    """MD5s of what stays in DVC's cache; None where it cannot be told for sure."""
    workspace, cache = plan.workspace, versions.Cache(plan.workspace)
    marked: set[str] = set()
    unknown: list[str] = []

    def mark(digest: str, listing: bytes | None = None) -> bool:
        marked.add(digest)
        if not digest.endswith(".dir"):
            return True
        listing = listing or cache.listing(digest)
        if listing is not None:
            marked.update(versions.listed(listing).values())
        return listing is not None

    def mark_stages(stages: dict[str, Any], origins: Origins | None = None) -> None:
        for entry in stages.values():
            for one in (*entry.get("outs", []), *entry.get("deps", [])):
                if "md5" in one:
                    mark(str(one["md5"]), origins.listing(str(one["path"])) if origins else None)

    lock = workspace.root / "dvc.lock"
    if lock.is_file():
        mark_stages((read_yaml(lock) or {}).get("stages") or {})
    current = versions.data_version(workspace)
    if current and not mark(current) and workspace.store.is_dir():
        unknown.append(f"this workspace's data, {current[:12]}")
    for version in kept.whole:
        origins = None
        with contextlib.suppress(BadInput):  # it was removed by hand: what its tags tell is left
            origins = Origins(tracker.lineage_folder(version))
            mark_stages(origins.lock, origins)
        data = str(version.tags.get("data_version") or "")
        # Its cache may never have had the data: another workspace made it.
        if data and not mark(data, origins.listing(STORE) if origins else None):
            plan.notes.append(f"{version}: which files its data {data[:12]} has is not known here")
    log = versions.versions(workspace)
    newest = {row["version"] for row in log[-plan.config.clean.keep_runs :]}
    for row in log:
        if row["version"] in newest or plan.young(_moment(row.get("time"))):
            mark(row["version"])
    if unknown:
        plan.notes.append(
            f"DVC's cache is left alone: {'; '.join(unknown)}: its list of files is missing there. "
            f"Next: ringmo ingest"
        )
        return None
    return marked


def _moment(text: Any) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


# What goes


def _mlflow(plan: _Plan, tracker: Tracker, kept: _Kept) -> None:
    heap = plan.heaps[0]
    models = plan.heap("models' files")
    models.stay = len(kept.whole) + len(kept.starts)
    if tracker.store != "local" and not plan.shared:
        if kept.runs:
            plan.notes.append(
                f"{len(kept.runs)} runs of MLflow at {tracker.uri} hold files that nothing here "
                f"needs: others may share it, so --shared removes them"
            )
        return
    by_run: dict[str, list[Version]] = {}
    for version in kept.gone:
        by_run.setdefault(version.run_id, []).append(version)
    for run in kept.runs:
        made = by_run.get(run.id, [])
        item = Item(
            f"{run.experiment}: {run.name}",
            partial(_remove_run, tracker, run, made, _today()),
            (local,) if (local := _local(tracker.artifact_uri(run.id))) else (),
            0 if local else tracker.artifact_bytes(run.id),
        )
        (models if made else heap).items.append(item)
        plan.models += [str(version) for version in made if not version.cleaned]


def _local(uri: str) -> Path | None:
    path = Path(uri.removeprefix("file://"))
    return path if path.is_absolute() else None


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _remove_run(tracker: Tracker, run: Run, made: Iterable[Version], day: str) -> None:
    # Somebody may have given one an alias since it was looked at, on another machine perhaps.
    for version in made:
        now = tracker.version(version.model, version.version)
        if now is not None and now.aliases:
            return
    # Its versions say so first: none is ever half there and silent.
    for version in made:
        if not version.cleaned:
            tracker.tag_version(version, {CLEANED: day})
    tracker.remove_artifacts(run.id)
    tracker.tag_run(run.id, {CLEANED: day})
    if path := _local(tracker.artifact_uri(run.id)):
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _cache(plan: _Plan, marked: set[str]) -> None:
    cache = versions.Cache(plan.workspace)
    heap = plan.heap("DVC cache")
    if not cache.root.is_relative_to(plan.workspace.root) and not plan.shared:
        plan.notes.append(f"DVC's cache {cache.root} may be shared: --shared cleans it too")
        return
    going, there = [], {row["version"] for row in versions.versions(plan.workspace)}
    for digest, path in cache.objects():
        about = path.lstat()
        # A link that was made lately has an old file's time of writing.
        if digest in marked or plan.young(max(about.st_mtime, about.st_ctime)):
            heap.stay += 1
        else:
            going.append((digest, path))
            plan.data += [digest] if digest in there else []
    # Lists first: DVC takes the files of a list that is there for present.
    going.sort(key=lambda one: not one[0].endswith(".dir"))
    heap.items += [_of_path(path) for _, path in going]
    runs = plan.heap("DVC's memory of stages")
    for path, outs in cache.runs():
        if outs <= marked:
            runs.stay += 1
        elif not plan.young(path.stat().st_mtime):
            runs.items.append(Item(path.name, partial(_remove_run_entry, path), (path,)))


def _remove_run_entry(path: Path) -> None:
    path.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remote(plan: _Plan, marked: set[str]) -> None:
    if not plan.shared:
        return
    remote = versions.Remote(plan.workspace, plan.config)
    heap = plan.heap("DVC remote")
    going = []
    for one in remote.objects():
        if one.digest in marked or plan.young(one.written):
            heap.stay += 1
        else:
            going.append(one)
    if going:
        size = sum(one.size for one in going)
        remove = partial(remote.remove, going)
        heap.items.append(Item(remote.url, remove, bytes=size, count=len(going)))
    plan.notes.append(f"The remote {remote.url} is cleaned by what this workspace and MLflow know.")


def _run_folders(plan: _Plan) -> None:
    """Checkpoints, figures and pictures of trainings, the newest of each stage kept."""
    heap = plan.heap("checkpoints and figures of trainings")
    named = set(_named_run_folders(plan.workspace))
    by_stage: dict[str, list[tuple[float, Path]]] = {}
    for path in (plan.workspace.state / "runs").glob("*-*"):
        stage = path.name.rpartition("-")[0]
        by_stage.setdefault(stage, []).append((_touched(path), path))
    for folders in by_stage.values():
        for i, (when, path) in enumerate(sorted(folders, reverse=True)):
            young = i < plan.config.clean.keep_runs or plan.young(when)
            if young or path in named or forward.unsent(path):
                heap.stay += 1
            else:
                heap.items.append(_of_path(path, unless_touched=when))


def _named_run_folders(workspace: Workspace) -> Iterator[Path]:
    """Run folders of the results that lie in work/, and of what is being trained."""
    for path in (workspace.root / "work").glob("*/report.json"):
        if (report := Report.read(path)) and report.run_dir:
            yield workspace.root / report.run_dir
    for path in (workspace.state / "running").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            yield workspace.root / json.loads(path.read_text())["run_dir"]


def _copies(plan: _Plan, kept: _Kept) -> None:
    """What was fetched, made or written of models: brought or made again when it is asked for."""
    state, hashes = plan.workspace.state, kept.hashes
    with contextlib.suppress(BadInput):
        hashes = hashes | {str((read_yaml(plan.workspace.root / CHAMPION) or {}).get("encoder"))}
    short = {one[:16] for one in hashes}
    heap = plan.heap("copies and pages of models")
    for folder, stays in (
        ("bundles", hashes),
        ("lineage", hashes),
        ("references", short),
        ("embeddings", short),
        ("cards", kept.names),
    ):
        for path in _within(state / folder):
            if path.stem in stays or plan.young(_touched(path)):
                heap.stay += 1
            else:
                heap.items.append(_of_path(path))
    made_again = plan.heap("reproductions")
    found = sorted(((_touched(p), p) for p in _within(state / "reproduced")), reverse=True)
    for i, (when, path) in enumerate(found):
        young = i < plan.config.clean.keep_runs or plan.young(when)
        if young or _held(path / ".ringmo" / "reproduce.lock"):
            made_again.stay += 1
        else:
            made_again.items.append(_of_path(path))


def _production(plan: _Plan) -> None:
    """Samples of production past monitoring.keep_days: the recorder itself only looks while it
    records."""
    heap = plan.heap("samples of production")
    last = datetime.now(UTC).date() - timedelta(days=plan.config.monitoring.keep_days)
    for path in (plan.workspace.state / "production").glob("*/*"):
        with contextlib.suppress(ValueError):  # somebody else's folder
            if date.fromisoformat(path.name) > last:
                heap.stay += 1
            else:
                heap.items.append(_of_path(path))


def _by_age(plan: _Plan) -> None:
    """What no other result names: a comparison's pieces, unfinished answers. Finished ones are
    their owner's."""
    heap = plan.heap("comparisons and unfinished answers")
    state = plan.workspace.state
    for path in (*_within(state / "compare"), *sorted((state / "answers").glob(".*.work"))):
        if plan.young(_touched(path)):
            heap.stay += 1
        else:
            heap.items.append(_of_path(path))


def _logs(plan: _Plan) -> None:
    heap = plan.heap("servers' logs")
    for path in sorted((plan.workspace.state / "logs").glob("*.log")):
        size = path.stat().st_size
        if size > LOG_BYTES:
            heap.items.append(Item(path.name, partial(_cut, path), (), size - LOG_KEPT))
        else:
            heap.stay += 1


def _cut(path: Path) -> None:
    """Keep a log's end, in the same file: its server has it open, and appends."""
    with path.open("r+b") as file:
        file.seek(-min(LOG_KEPT, path.stat().st_size), os.SEEK_END)
        end = file.read().partition(b"\n")[2]
        file.seek(0)
        file.write(end)
        file.truncate()


def _left_behind(plan: _Plan) -> None:
    """What commands that were killed left under temporary names, or in folders to work in."""
    heap = plan.heap("left by what was killed")
    root, state = plan.workspace.root, plan.workspace.state
    places = [root, root / "work", state, *(p for p in _within(state) if p.is_dir())]
    found = [p for place in places for p in place.glob(".*.tmp")]
    found += [p for name in ("spool", "dask", "fetched") for p in _within(state / name)]
    for path in sorted(set(found)):
        if _touched(path) < plan.now - LEFT_S:
            heap.items.append(_of_path(path))


def _within(folder: Path) -> list[Path]:
    """What lies in a folder, but for what is only being written."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _touched(path: Path) -> float:
    """When something, or the newest thing below it, was written."""
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = path.lstat().st_mtime
        if path.is_dir() and not path.is_symlink():
            newest = max([newest, *(_mtime(one) for one in path.rglob("*"))])
    return newest


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _of_path(path: Path, unless_touched: float | None = None) -> Item:
    return Item(path.name, partial(_remove_path, path, unless_touched), (path,))


def _remove_path(path: Path, unless_touched: float | None) -> None:
    if unless_touched is not None and _touched(path) > unless_touched:
        return  # taken up again meanwhile
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# What is said


def _result(plan: _Plan, *, dry_run: bool) -> dict[str, Any]:
    rows = [
        {"kind": heap.kind, "count": heap.count, "bytes": size, "stay": heap.stay}
        for heap, size in zip(plan.heaps, _sizes(plan.heaps), strict=True)
    ]
    return {
        "dry_run": dry_run,
        "kinds": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "models": plan.models,
        "data_versions": plan.data,
        "notes": plan.notes,
    }


def _sizes(heaps: list[Heap]) -> list[int]:
    """What the disk gets back of each: bytes that lie under several names go with the last."""
    links: Counter[tuple[int, int]] = Counter()
    sizes = []
    for heap in heaps:
        size = sum(item.bytes for item in heap.items)
        for path in (path for item in heap.items for path in item.paths):
            for about in _files(path):
                key = (about.st_dev, about.st_ino)
                links[key] += 1
                if links[key] == about.st_nlink:
                    size += about.st_size
        sizes.append(size)
    return sizes


def _files(path: Path) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for one in path.rglob("*"):
                if one.is_file() and not one.is_symlink():
                    yield one.lstat()
        elif path.exists():
            yield path.lstat()


def text(result: dict[str, Any]) -> str:
    """What goes, or went, as a table for people."""
    rows = [
        (row["kind"], row["count"], console.size(row["bytes"]), row["stay"])
        for row in result["kinds"]
        if row["count"] or row["stay"]
    ]
    count = sum(row["count"] for row in result["kinds"])
    rows.append(("in all", count, console.size(result["bytes"]), ""))
    goes = "goes" if result["dry_run"] else "went"
    parts = [console.table(rows, ("what", goes, "size", "stays"))]
    for name, found in (("Models", result["models"]), ("Data versions", result["data_versions"])):
        if found:
            shown = ", ".join(one[:16] for one in found[:8]) + (" …" if len(found) > 8 else "")
            parts.append(f"{name} of which only the record is left then: {shown}")
    parts += result["notes"]
    if result["dry_run"]:
        parts.append(
            "Next: ringmo clean"
            if count
            else "Nothing to remove (clean.keep_runs, clean.keep_days)."
        )
    return "\n\n".join(parts)
