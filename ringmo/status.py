"""What runs where: servers, flow runs, champions, the last result, and the room that it all takes.

At a glance: nothing heavy is imported, and a server that is away is said to be away.
"""

import contextlib
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ringmo import console, services
from ringmo.errors import RingmoError
from ringmo.stage import Report, announcement
from ringmo.workspace import Workspace

# Kind → folders below the workspace.
PLACES = {
    "tile store": ("data",),
    "results (work/)": ("work",),
    "DVC cache": (".dvc/cache",),
    "DVC remote": (".ringmo/remote",),
    "MLflow": (".ringmo/mlflow",),
    "Prefect": (".ringmo/prefect",),
    "trainings": (".ringmo/runs", ".ringmo/forward"),
    "reproductions": (".ringmo/reproduced",),
    "production": (".ringmo/production",),
    "public and generated imagery": (".ringmo/public", ".ringmo/generated"),
    "logs": (".ringmo/logs",),
}


def look(workspace: Workspace) -> dict[str, Any]:
    """The state of a workspace.

    Keys: services (`services.status`); runs: rows of `flows.running`, or None without a server;
    trainings: stage, pid, epoch, epochs of what is trained now; champions: rows of model, version,
    created; last: the last stage's report here, stage, ok, reason, when; disk: kind → bytes; away:
    lines for what did not answer.
    """
    from flows.running import flow_runs
    from ringmo.registry.tracker import Glance

    state: dict[str, Any] = {"services": services.status(workspace), "runs": None, "champions": []}
    away = []
    try:
        state["runs"] = flow_runs(workspace)
    except RingmoError as error:
        away.append(str(error))
    try:
        aliased = Glance(workspace).aliased()
        state["champions"] = [
            {name: row[name] for name in ("model", "version", "created")}
            for row in aliased
            if row["alias"] == "champion"
        ]
    except RingmoError as error:
        away.append(str(error))
    state["trainings"] = _trainings(workspace)
    state["last"] = _last(workspace)
    state["disk"] = _disk(workspace)
    return state | {"away": away}


def running(workspace: Workspace) -> list[dict[str, Any]]:
    """Chains, stages and trainings whose process lives: stage, pid."""
    import psutil

    from ringmo.registry import forward

    rows = [row for row in forward.running(workspace) if row["pid"] != os.getpid()]
    for path in sorted((workspace.state / "running").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            said = json.loads(path.read_text())
            # One that was started later is a stranger with the same number.
            if psutil.Process(said["pid"]).create_time() <= path.stat().st_mtime + 1:
                rows.append({"stage": said["stage"], "pid": said["pid"]})
    return rows


def _trainings(workspace: Workspace) -> list[dict[str, Any]]:
    rows = []
    for row in running(workspace):
        announced = announcement(workspace, row["stage"])
        epoch = epochs = None
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            folder = workspace.root / json.loads(announced.read_text())["run_dir"]
            epochs = json.loads((folder / "params.json").read_text())["training.epochs"]
            epoch = json.loads(_end_of(folder / "figures.jsonl").splitlines()[-1])["epoch"]
        rows.append({**row, "epoch": epoch, "epochs": epochs})
    return rows


def _end_of(path: Path) -> str:
    """The last whole lines of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        return file.read().rpartition(b"\n")[0].decode(errors="replace")


def _last(workspace: Workspace) -> dict[str, Any] | None:
    files = [path for path in (workspace.state / "reports").glob("*.json") if path.stem != "heads"]
    for path in sorted(files, key=lambda path: -path.stat().st_mtime):
        with contextlib.suppress(ValueError, TypeError):
            if report := Report.read(path):
                about = {"stage": report.stage, "ok": report.ok, "reason": report.reason}
                return about | {"when": path.stat().st_mtime}
    return None


def _disk(workspace: Workspace) -> dict[str, int]:
    """Bytes by kind. What lies in several places by links counts once, for the first of them."""
    seen: set[tuple[int, int]] = set()
    sizes = {}
    for kind, folders in PLACES.items():
        size = sum(_size(workspace.root / folder, seen) for folder in folders)
        if size:
            sizes[kind] = size
    sizes["all else"] = _size(workspace.root, seen)
    return sizes


def _size(folder: Path, seen: set[tuple[int, int]]) -> int:
    size, ahead = 0, [str(folder)]
    while ahead:
        with contextlib.suppress(OSError), os.scandir(ahead.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(entry.path)
                    continue
                about = entry.stat(follow_symlinks=False)
                key = (about.st_dev, about.st_ino)
                if key not in seen:
                    seen.add(key)
                    size += about.st_size
    return size


def text(state: dict[str, Any]) -> str:
    """The state as tables for people."""
    parts = [services.status_text(state["services"])]
    rows = [
        (run["flow"], run["name"], run["what"], run["state"], _ago(_seconds(run["when"])))
        for run in state["runs"] or []
    ]
    for one in state["trainings"]:
        at = "" if one["epoch"] is None else f"epoch {one['epoch']:.1f} of {one['epochs']}"
        rows.append((one["stage"], f"process {one['pid']}", "runs", at, ""))
    if rows:
        parts.append(console.table(rows, ("run", "name", "", "state", "when")))
    elif state["runs"] is not None:
        parts.append("No run yet, and none to come. Next: ringmo run")
    if last := state["last"]:
        how = "done" if last["ok"] else f"NOT done: {last['reason']}"
        parts.append(f"Last here: {last['stage']}, {_ago(last['when'])}: {how}")
    if state["champions"]:
        parts.append(
            console.table(
                [
                    (f"{row['model']}/{row['version']}", _ago(row["created"]))
                    for row in state["champions"]
                ],
                ("champion", "made"),
            )
        )
    disk = sorted(state["disk"].items(), key=lambda item: -item[1])
    total = sum(state["disk"].values())
    parts.append(
        console.table(
            [*((kind, console.size(size)) for kind, size in disk), ("in all", console.size(total))],
            ("on disk", "size"),
        )
    )
    return "\n\n".join(parts + state["away"])


def _seconds(when: str | None) -> float | None:
    return datetime.fromisoformat(when).timestamp() if when else None


def _ago(when: float | None) -> str:
    if when is None:
        return ""
    seconds = time.time() - when
    side = "ago" if seconds >= 0 else "from now"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= 2 * length:
            return f"{abs(seconds) / length:.0f} {unit} {side}"
    return f"{abs(seconds):.0f} s {side}"
