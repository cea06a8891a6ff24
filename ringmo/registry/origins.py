"""What a version takes along into the registry: all that its lineage is told from, as files.

dvc.lock, dvc.yaml, params.yaml, revisions.yaml, champion.yaml, store.dvc    what ran, on what
environment.txt, source.patch       the libraries, and how the code differed from its commit
outs/PATH.json                      DVC's list of the files of each folder that dvc.lock names
reports/STAGE.json                  figures of each stage, and the machine it ran on
data.json, tiles.parquet            the data version, and the tiles that this model saw
SHA256SUMS                          of these files; its own hash is a tag of the version
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.config import read_yaml
from ringmo.data import store, versions
from ringmo.errors import BadInput
from ringmo.registry import seen
from ringmo.stage import Report, write_json
from ringmo.workspace import CHAMPION, Workspace

ENCODER = "encoder"
SUMS, TILES, DATA, LOCK, PATCH = (
    *("SHA256SUMS", "tiles.parquet", "data.json", "dvc.lock", "source.patch"),
)  # fmt: skip
STORE = "data/store"


def write(
    workspace: Workspace, folder: Path, model: str, selection: str | None, patch: bytes | None
) -> str:
    """Fill `folder`; returns the hash of its SHA256SUMS.

    Args:
        model: a task's name, or `encoder`. selection: sha256 of the one it learnt from.
        patch: what the code has beyond its commit; None where it has nothing.
    """
    folder.mkdir()
    for name in (LOCK, "dvc.yaml", "params.yaml", "revisions.yaml", CHAMPION):
        path = workspace.root / name
        if path.is_file():
            (folder / name).write_bytes(path.read_bytes())
    (folder / "environment.txt").write_text("\n".join(installed()) + "\n")
    if patch is not None:
        (folder / PATCH).write_bytes(patch)
    version = versions.selected_version(workspace)
    _write_store(workspace, folder, version)
    cache = versions.Cache(workspace)
    wanted = {STORE: version} if version else {}
    for stage, entry in stages_of(_lock(folder), model).items():
        wanted |= {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}
        report = workspace.work(stage) / "report.json"
        if report.is_file():
            (folder / "reports").mkdir(exist_ok=True)
            (folder / "reports" / f"{_file(stage)}.json").write_bytes(report.read_bytes())
    for out, digest in wanted.items():
        listing = cache.listing(digest) if digest.endswith(".dir") else None
        if listing is not None:
            path = folder / "outs" / f"{out}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(listing)
    _write_data(workspace, folder, model, selection, version)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = "".join(
        f"{store.file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files
    )
    (folder / SUMS).write_text(sums)
    return hashlib.sha256(sums.encode()).hexdigest()


def installed() -> list[str]:
    """The packages of this environment, as name==version."""
    return sorted({f"{d.name}=={d.version}" for d in metadata.distributions()})


def _write_store(workspace: Workspace, folder: Path, version: str | None) -> None:
    """store.dvc of the data version that was selected from, which need not be the latest."""
    path = workspace.root / f"{STORE}.dvc"
    if version and path.is_file() and versions.data_version(workspace) == version:
        (folder / "store.dvc").write_bytes(path.read_bytes())
    elif version:
        (folder / "store.dvc").write_text(f"outs:\n- md5: {version}\n  hash: md5\n  path: store\n")


def _write_data(
    workspace: Workspace, folder: Path, model: str, selection: str | None, version: str | None
) -> None:
    rows = [row for row in versions.versions(workspace) if row["version"] == version]
    row: dict[str, Any] = rows[-1] if rows else {"version": version}
    path = versions.manifest_file(workspace, row.get("manifest", ""))
    manifest = None
    if path is not None:
        manifest = store.read_table(path, store.COLUMNS, "run `ringmo ingest`")
        counted = manifest.groupby(manifest["source_root"].fillna("not recorded")).size()
        row = row | {"tiles_by_source": {str(k): int(n) for k, n in counted.items()}}
    write_json(folder / DATA, row)
    chosen = workspace.work("select") / f"{'pretrain' if model == ENCODER else model}.parquet"
    if chosen.is_file() and store.file_sha256(chosen) == selection:
        seen.write(folder / TILES, chosen, manifest)
    else:
        console.note(f"{model}: {chosen} is not what it learnt from; its tiles are not recorded")


def stages_of(lock: dict[str, Any], model: str) -> dict[str, Any]:
    """The stages of dvc.lock that a model, or its figures, come from."""
    return {
        stage: entry
        for stage, entry in lock.items()
        if ("@" not in stage or stage.endswith(f"@{model}"))
    }


@dataclass(frozen=True)
class Origins:
    """A version's lineage files, as `write` left them; what was not recorded is empty."""

    folder: Path

    @cached_property
    def lock(self) -> dict[str, Any]:
        """Stage → its entry in dvc.lock."""
        return _lock(self.folder)

    @cached_property
    def data(self) -> dict[str, Any]:
        """The data version's row."""
        found: dict[str, Any] = _json(self.folder / DATA)
        return found

    @property
    def tiles(self) -> Path | None:
        path = self.folder / TILES
        return path if path.is_file() else None

    def report(self, stage: str) -> Report | None:
        return Report.read(self.folder / "reports" / f"{_file(stage)}.json")

    def listing(self, out: str) -> bytes | None:
        """DVC's list of the files in a folder that a stage wrote, or of the store."""
        try:
            return (self.folder / "outs" / f"{out}.json").read_bytes()
        except FileNotFoundError:
            return None

    def sums(self) -> dict[str, str]:
        """File → its sha256, as registered."""
        try:
            lines = (self.folder / SUMS).read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def yaml(self, name: str) -> Any:
        """params.yaml or another of the files; None where it is not there."""
        path = self.folder / name
        return read_yaml(path) if path.is_file() else None


def _lock(folder: Path) -> dict[str, Any]:
    path = folder / LOCK
    if not path.is_file():
        return {}
    found: dict[str, Any] = (read_yaml(path) or {}).get("stages") or {}
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _file(stage: str) -> str:
    return stage.replace("@", "-")
