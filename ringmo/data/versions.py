"""The door to DVC: versions of the tile store, the stage graph of dvc.yaml, and what changed in it.

The only module that knows DVC. What takes DVC's lock goes through its command line, which can
wait for it; the graph is read in this process, which is faster. A data version is the hash DVC
gives the store's folder; data/versions.jsonl lists them, one JSON object a line, appended.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ringmo.config import Config, read_yaml
from ringmo.environment import quiet_telemetry
from ringmo.errors import BadInput, RingmoError, Unreachable
from ringmo.stage import REVISIONS
from ringmo.workspace import Workspace

STORE = "data/store"
REMOTE = "ringmo"


@dataclass(frozen=True)
class StageInfo:
    """A stage of dvc.yaml. `upstream`: names of the stages whose outputs it reads."""

    name: str
    desc: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[str, ...]
    upstream: tuple[str, ...]


# Data versions


def add_store(workspace: Workspace, config: Config) -> str:
    """Give the store's present state to DVC, and list it if it is new. Returns the data version."""
    del config
    _dvc(workspace, "add", STORE)
    version = data_version(workspace)
    if version is None:
        raise BadInput(f"{workspace.store}: DVC did not record the store")
    if all(row["version"] != version for row in _listed(workspace)):
        line = json.dumps(_describe(workspace, version), ensure_ascii=False)
        with workspace.versions_file.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    return version


def data_version(workspace: Workspace) -> str | None:
    """The store's DVC hash as last added, such as `ab12….dir`; None before the first ingest."""
    try:
        recorded = read_yaml(workspace.store.with_name("store.dvc"))
    except BadInput:
        return None
    return str(recorded["outs"][0]["md5"])


def versions(workspace: Workspace) -> list[dict[str, Any]]:
    """Every data version, oldest first: version, time, tiles, classes, labelled, set_aside,
    sources, generated, current."""
    now = data_version(workspace)
    return [row | {"current": row["version"] == now} for row in _listed(workspace)]


def _listed(workspace: Workspace) -> list[dict[str, Any]]:
    try:
        lines = workspace.versions_file.read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):  # the last one may be half: a kill while it was written
                raise BadInput(f"{workspace.versions_file}, line {number}: not JSON") from None
    return rows


def _describe(workspace: Workspace, version: str) -> dict[str, Any]:
    import pyarrow.parquet

    ingest = json.loads((workspace.store / "history.json").read_text())["ingests"][-1]
    quarantine = workspace.store / "quarantine.parquet"
    labels = {label: count for label, count in ingest["classes"].items() if count}
    return {
        "version": version,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tiles": ingest["tiles"],
        "classes": len(labels),
        "labelled": sum(labels.values()),
        "set_aside": pyarrow.parquet.read_metadata(quarantine).num_rows
        if quarantine.exists()
        else 0,
        "sources": ingest["sources"],
        "generated": ingest["generated"],
        "ingest": ingest["ordinal"],
    }


# The stage graph


def stages(workspace: Workspace) -> list[StageInfo]:
    """The stages of dvc.yaml, each after those it depends on.

    Raises:
        BadInput: dvc.yaml cannot be read; one line.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    os.environ.update(quiet_telemetry(os.environ))
    try:
        with Repo(str(workspace.root)) as repo:
            found = {s.name: s for s in repo.index.stages if s.cmd}
            graph = repo.index.graph
            upstream = {
                name: tuple(sorted(u.name for u in graph.successors(s) if u.cmd))
                for name, s in found.items()
            }
            described = {name: _info(stage, upstream[name]) for name, stage in found.items()}
    except DvcException as error:
        line = str(error).strip().splitlines()[0]
        raise BadInput(f"{workspace.root / 'dvc.yaml'}: {line}") from error
    return [described[name] for name in TopologicalSorter(upstream).static_order()]


def _info(stage: Any, upstream: tuple[str, ...]) -> StageInfo:
    params = [
        f"{dep.def_path}:{name}"
        for dep in stage.deps
        for name in getattr(dep, "params", None) or []
    ]
    return StageInfo(
        name=stage.name,
        desc=stage.desc or "",
        deps=tuple(d.def_path for d in stage.deps if not getattr(d, "params", None)),
        outs=tuple(out.def_path for out in stage.outs),
        params=tuple(params),
        upstream=upstream,
    )


def changed(workspace: Workspace) -> dict[str, list[str]]:
    """Stage → why it must run, in words; stages without a reason are not in it."""
    out = _dvc(workspace, "status", "--json")
    status = json.loads(out or "{}")
    return {
        name: [reason for entry in entries for reason in _reasons(entry)]
        for name, entries in status.items()
        if not name.endswith(".dvc")
    }


def _reasons(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]  # such as "changed command"
    reasons = []
    for what, paths in entry.items():
        for path, how in paths.items():
            if isinstance(how, dict):  # parameters: file → {key: how}
                reasons += [f"{key} {kind}" for key, kind in how.items()]
            else:
                reasons.append(f"{path} {how}" if what == "changed deps" else f"output {how}")
    return reasons


def repro_command(workspace: Workspace, stage: str) -> list[str]:
    """The command that runs one stage, through DVC, by this Python."""
    del workspace
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]


def lock_entry(workspace: Workspace, stage: str) -> dict[str, Any]:
    """The stage's entry in dvc.lock: what it read, with which parameters, and what it wrote."""
    try:
        lock = read_yaml(workspace.root / "dvc.lock")
    except BadInput:
        return {}
    entry: dict[str, Any] = lock.get("stages", {}).get(stage, {})
    return entry


def sync_revisions(workspace: Workspace) -> None:
    """Write the code's revisions to the workspace, where DVC sees them as parameters."""
    path = workspace.root / "revisions.yaml"
    comments = "".join(
        line + "\n"
        for line in (path.read_text().splitlines() if path.exists() else [])
        if line.startswith("#")
    )
    text = comments + "".join(f"{stage}: {number}\n" for stage, number in REVISIONS.items())
    if not path.exists() or path.read_text() != text:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text)
        temporary.replace(path)


# The remote


def push(workspace: Workspace, config: Config) -> None:
    """Send the store and every stage's outputs to the remote of params.yaml.

    Raises:
        Unreachable: the remote does not answer or refuses. BadInput: a folder that cannot be used.
    """
    _configure(workspace, config)
    _to_remote(workspace, config, "push", "--no-run-cache")


def pull(workspace: Workspace, config: Config) -> None:
    """Fetch what dvc.lock and data/store.dvc name from the remote of params.yaml.

    Raises: as `push`.
    """
    _configure(workspace, config)
    _to_remote(workspace, config, "pull", "--no-run-cache")


def _to_remote(workspace: Workspace, config: Config, *arguments: str) -> None:
    remote = config.versioning.remote
    kind = Unreachable if "://" in remote else BadInput
    _dvc(workspace, *arguments, "--remote", REMOTE, failure=kind, about=f"remote {remote}")


def _configure(workspace: Workspace, config: Config) -> None:
    """Make DVC's remote what params.yaml says. Secrets stay in the environment."""
    wanted = config.versioning.remote
    url = wanted if "://" in wanted else os.path.relpath(workspace.root / wanted, workspace.root)
    endpoint = config.versioning.endpoint or ""
    marker = workspace.state / "dvc-remote"
    key = f"{url}\n{endpoint}"
    if marker.exists() and marker.read_text() == key:
        return
    _dvc(workspace, "remote", "add", "--force", "--default", REMOTE, url)
    if endpoint:
        _dvc(workspace, "remote", "modify", REMOTE, "endpointurl", endpoint)
    if "://" not in url:
        Path(workspace.root / url).mkdir(parents=True, exist_ok=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(key)


def _dvc(
    workspace: Workspace,
    *arguments: str,
    failure: type[RingmoError] = BadInput,
    about: str = "",
) -> str:
    """Run a DVC command in the workspace; its standard output, or one line of what went wrong."""
    env = quiet_telemetry(os.environ)
    # Stores that are not Amazon's refuse checksums they never asked for.
    env.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    env.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    quiet = [] if "--json" in arguments else ["--quiet"]
    command, *rest = arguments
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "--wait-for-lock", command, *rest, *quiet],
        cwd=workspace.root,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    said = (lines or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
    where = f"{about}: " if about else ""
    raise failure(f"dvc {command}: {where}{said.removeprefix('ERROR: ')}")
