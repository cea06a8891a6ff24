"""DVC's door: data versions, the stage graph, what changed, and copies on a remote.

A data version is DVC's hash of the tile store. Reading (graph, status) happens in this process,
which is quicker; whatever writes is a `dvc` process of its own, by this Python, whatever PATH is.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ringmo import clocks
from ringmo.config import Config, read_yaml
from ringmo.data import class_facts, store
from ringmo.errors import BadInput, Unreachable
from ringmo.stage import REVISIONS, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas
    from dvc.repo import Repo

REMOTE = "main"
AMAZON = "https://s3.amazonaws.com"
ANEW = "all imagery is taken in"  # why a stage runs although DVC sees no change
CLEANED = "cleaned-data.json"  # in .ringmo: data version → the day on which it was removed
# Seconds until a store counts as not answering. By itself DVC waits for minutes for a connection,
# several times over, and for an answer for ever.
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 30
# S3-compatible stores do not all know what boto sends since 1.36 unless these say otherwise.
CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
# What the lines of a remote that does not answer say, among everything DVC may complain of.
NO_ANSWER = (
    *("could not connect", "connection refused", "connect timeout", "read timeout", "timed out"),
    *("cannot connect", "name or service not known", "temporary failure in name resolution"),
    *("connection was closed", "connection reset", "service unavailable", "max retries"),
    *("nodename nor servname", "could not contact", "connect call failed"),
)


@dataclass(frozen=True)
class StageInfo:
    """A stage of dvc.yaml. Paths are relative to the workspace; upstream: stages it reads from."""

    name: str
    desc: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[str, ...]
    upstream: tuple[str, ...]


def add_store(workspace: Workspace, config: Config) -> str:
    """Put the tile store under DVC, and a new version into the log; returns the version."""
    if not (workspace.store / store.MANIFEST).exists():
        raise BadInput(f"{workspace.store / store.MANIFEST} is missing: run `ringmo ingest`")
    _dvc(workspace, "add", "data/store")
    version = data_version(workspace)
    if version is None:
        raise BadInput(f"{_store_file(workspace)}: DVC recorded no hash for the tile store")
    if version not in [row["version"] for row in versions(workspace)]:
        row = _describe(workspace, config, version)
        with workspace.versions_file.open("a") as log:
            log.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.flush()
            os.fsync(log.fileno())
    return version


def _describe(workspace: Workspace, config: Config, version: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    manifest = store.TileStore(workspace.store).manifest()
    quarantine = workspace.store / store.QUARANTINE
    return {
        "version": version,
        "manifest": hashlib.md5((workspace.store / store.MANIFEST).read_bytes()).hexdigest(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiles": len(manifest),
        "classes": int(manifest["label"].nunique()),
        "labelled": int(manifest["label"].notna().sum()),
        "labels": class_facts.labelled(manifest),
        "set_aside": pq.read_metadata(quarantine).num_rows if quarantine.exists() else 0,
        "sources": list(config.ingest.sources),
        "generated": bool(manifest["generated"].any()),
    }


def data_version(workspace: Workspace) -> str | None:
    """DVC's hash of the tile store as last added; None before the first `add_store`."""
    path = _store_file(workspace)
    if not path.exists():
        return None
    try:
        version = read_yaml(path)["outs"][0]["md5"]
    except (KeyError, IndexError, TypeError):
        raise BadInput(f"{path} is damaged: run `ringmo ingest`") from None
    return str(version)


def selected_version(workspace: Workspace) -> str | None:
    """The data version that DVC's last `select` read; where it ran without DVC, the latest."""
    read = {d["path"]: d.get("md5") for d in lock_entry(workspace, "select").get("deps", [])}
    manifest = read.get(f"data/store/{store.MANIFEST}")
    made = [row["version"] for row in versions(workspace) if row.get("manifest") == manifest]
    return str(made[-1]) if manifest and made else data_version(workspace)


def versions(workspace: Workspace) -> list[dict[str, Any]]:
    """The log of data versions, oldest first: version, manifest (its MD5), time (UTC), tiles,
    classes, labelled (tiles with a class), labels (tiles by kind of label; later versions have
    it), set_aside, sources, generated. A last line cut by a kill is passed over."""
    if not workspace.versions_file.exists():
        return []
    rows = []
    for line in workspace.versions_file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def diff(workspace: Workspace, a: str, b: str) -> dict[str, Any]:
    """What data version `b` has and `a` has not, and the other way round.

    Args:
        a, b: versions as `versions` lists them, or enough of their first digits; `latest`, and
            `latest~1` for the one before it.

    Returns:
        from, to: the versions. tiles: {added, removed, relabelled}. classes, sensors: name →
        {added, removed}, in tiles; a relabelled tile leaves one class and enters another. places:
        {added, removed}, those that are wholly new or gone.

    Raises:
        BadInput: no such version, or one whose manifest is no longer here.
    """
    import pandas as pd

    known = versions(workspace)
    rows = [_version(known, name) for name in (a, b)]
    old, new = (_manifest_of(workspace, row).set_index("key") for row in rows)
    both = old.index.intersection(new.index)
    gone, come = old.loc[old.index.difference(both)], new.loc[new.index.difference(both)]

    labels = [frame.loc[both, "label"].fillna("") for frame in (old, new)]

    def counts(column: str) -> dict[str, dict[str, int]]:
        sides = {"added": come[column].value_counts(), "removed": gone[column].value_counts()}
        if column == "label":
            changed = labels[0] != labels[1]
            for side, own in (("removed", labels[0]), ("added", labels[1])):
                more = own[changed & (own != "")].value_counts()
                sides[side] = sides[side].add(more, fill_value=0).astype(int)
        table = pd.DataFrame(sides).fillna(0).astype(int).sort_index()
        return {
            str(name): {"added": int(row["added"]), "removed": int(row["removed"])}
            for name, row in table.iterrows()
        }

    places = [set(frame["place"]) for frame in (old, new)]
    return {
        "from": rows[0]["version"],
        "to": rows[1]["version"],
        "tiles": {
            "added": len(come),
            "removed": len(gone),
            "relabelled": int((labels[0] != labels[1]).sum()),
        },
        "classes": counts("label"),
        "sensors": counts("sensor"),
        "places": {"added": len(places[1] - places[0]), "removed": len(places[0] - places[1])},
    }


def _version(known: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of a version's name, of its first digits, or of `latest~N`."""
    latest, _, back = name.partition("~")
    if latest == "latest" and (back or "0").isdecimal():
        if int(back or 0) < len(known):
            return known[-1 - int(back or 0)]
        raise BadInput(f"{name}: there are {len(known)} versions: see `ringmo data versions`")
    found = [row for row in known if row["version"].startswith(name)]
    if len(found) != 1:
        what = "several versions begin so" if found else "no such version"
        raise BadInput(f"{name}: {what}: see `ringmo data versions`")
    return found[0]


def _manifest_of(workspace: Workspace, row: dict[str, Any]) -> "pandas.DataFrame":
    """The manifest of a version, from DVC's cache or from the store."""
    path = manifest_file(workspace, row.get("manifest", ""))
    if path is None:
        lost = f"{row['version']}: its manifest is not in this workspace's DVC cache"
        day = cleaned_on(workspace, row["version"])
        raise BadInput(lost + (f": cleaned on {day} (`ringmo clean`)" if day else ""))
    return store.read_table(path, store.COLUMNS, "fetch it again with `dvc fetch`")


def note_cleaned(workspace: Workspace, gone: Iterable[str], day: str) -> None:
    """Keep the day on which data versions were removed from DVC's cache."""
    known = _cleaned(workspace)
    write_json(workspace.state / CLEANED, dict.fromkeys(gone, day) | known)


def cleaned_on(workspace: Workspace, version: str) -> str | None:
    """The day on which `ringmo clean` removed a data version from DVC's cache; None: it did not."""
    return _cleaned(workspace).get(version)


def _cleaned(workspace: Workspace) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((workspace.state / CLEANED).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def manifest_file(workspace: Workspace, digest: str) -> Path | None:
    """The manifest of this MD5: in DVC's cache, or the store's; None where neither has it."""
    kept = Cache(workspace).file(digest)
    if digest and kept.is_file():
        return kept
    ours = workspace.store / store.MANIFEST
    return ours if ours.is_file() and file_md5(ours) == digest else None


class Cache:
    """DVC's cache of a workspace: files by their MD5, folders as lists of theirs."""

    def __init__(self, workspace: Workspace) -> None:
        self.root = workspace.root / ".dvc" / "cache" / "files" / "md5"
        if any(re.search(r"(?m)^\s*dir\s*=", path.read_text()) for path in _settings(workspace)):
            with _repo(workspace) as repo:  # perhaps it lies elsewhere, shared by several
                self.root = Path(repo.cache.local.path)

    def file(self, digest: str) -> Path:
        """Where the file, or the list, of this MD5 lies if it is here."""
        if not re.fullmatch(r"[0-9a-f]{32}(\.dir)?", digest):
            return self.root / "none"  # what is no MD5 might name any file
        return self.root / digest[:2] / digest[2:]

    def objects(self) -> Iterator[tuple[str, Path]]:
        """Every file and list there is, with the MD5 that it is known by."""
        for folder in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for path in sorted(folder.iterdir()):
                yield folder.name + path.name, path

    def runs(self) -> Iterator[tuple[Path, set[str]]]:
        """Executions that DVC remembers, to restore their outputs: a file each, with their MD5s."""
        for path in sorted((self.root.parents[1] / "runs").glob("*/*/*")):
            try:
                outs = (read_yaml(path) or {}).get("outs", [])
                yield path, {str(out["md5"]) for out in outs if "md5" in out}
            except (BadInput, AttributeError, TypeError):
                yield path, set()

    def listing(self, digest: str) -> bytes | None:
        """A folder's list of files, as it lies there; None where it is not here."""
        try:
            return self.file(digest).read_bytes()
        except OSError:
            return None


def _settings(workspace: Workspace) -> list[Path]:
    names = ("config", "config.local")
    return [path for name in names if (path := workspace.root / ".dvc" / name).is_file()]


def listed(listing: bytes) -> dict[str, str]:
    """A folder's list: path below the folder → MD5.

    Raises:
        BadInput: it is none, or names a file outside of its folder.
    """
    try:
        found = {str(row["relpath"]): str(row["md5"]) for row in json.loads(listing)}
    except (ValueError, KeyError, TypeError):
        raise BadInput("not one of DVC's lists of a folder's files") from None
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadInput(f"a list of DVC's names {name[:80]!r}, outside of its folder")
    return found


def folder_hash(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder that holds these files: path below it → MD5."""
    rows = [{"md5": files[path], "relpath": path} for path in sorted(files)]
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir"


def file_md5(path: Path) -> str:
    """A file's MD5, which DVC knows it by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def stages(workspace: Workspace) -> list[StageInfo]:
    """The stages of dvc.yaml, each after those it reads from."""
    from dvc.dependency.param import ParamsDependency
    from dvc.stage import PipelineStage

    with _repo(workspace) as repo:
        found: dict[str, StageInfo] = {}
        for stage in repo.index.stages:
            if not isinstance(stage, PipelineStage):
                continue
            files = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            params = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
            found[stage.name] = StageInfo(
                name=stage.name,
                desc=stage.desc or "",
                deps=tuple(_relative(workspace, dep) for dep in files),
                outs=tuple(_relative(workspace, out) for out in stage.outs),
                params=tuple(name for dep in params for name in _params(workspace, dep)),
                upstream=tuple(
                    sorted(
                        other.name
                        for other in repo.index.graph.successors(stage)
                        if isinstance(other, PipelineStage)
                    )
                ),
            )
    ordered: list[StageInfo] = []
    while found:
        done = {stage.name for stage in ordered}
        ready = next(stage for stage in found.values() if set(stage.upstream) <= done)
        ordered.append(found.pop(ready.name))
    return ordered


def _relative(workspace: Workspace, item: Any) -> str:
    return Path(item.fs_path).relative_to(workspace.root).as_posix()


def _params(workspace: Workspace, dependency: Any) -> list[str]:
    """`section.key` for params.yaml, `file:key` for another file."""
    file = _relative(workspace, dependency)
    return [key if file == "params.yaml" else f"{file}:{key}" for key in dependency.params]


def changed(workspace: Workspace) -> dict[str, list[str]]:
    """Stage → why it would run, in DVC's words; stages that are up to date are left out."""
    with _repo(workspace) as repo:
        status = repo.status()
    reasons: dict[str, list[str]] = {}
    for name, entries in status.items():
        if name.endswith(".dvc"):
            continue
        # From another folder DVC names a stage FILE:NAME.
        found = reasons.setdefault(name.rpartition(":")[2], [])
        for entry in entries:
            if isinstance(entry, str):  # "changed command", "always changed"
                found.append(entry)
                continue
            for items in entry.values():
                for item, state in items.items():
                    if isinstance(state, dict):
                        found += [f"{key} {what}" for key, what in state.items()]
                    else:
                        found.append(f"{item} {state}")
    return reasons


def repro_command(workspace: Workspace, stage: str, why: Sequence[str] = ()) -> list[str]:
    """The command that runs one stage if it changed, with this Python's `ringmo` first in PATH.

    why: with ANEW in it the stage runs whatever DVC finds, and whatever result DVC remembers.
    """
    here = Path(sys.executable).parent
    return [
        "/usr/bin/env",
        f"PATH={here}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        f"RINGMO_WORKSPACE={workspace.root}",
        *_python_dvc(workspace),
        *("--wait-for-lock", "repro", "--single-item", *["--force"] * (ANEW in why), stage),
    ]


def lock_entry(workspace: Workspace, stage: str) -> dict[str, Any]:
    """The stage's entry in dvc.lock: command, deps and outs with hashes, params; empty if none."""
    path = workspace.root / "dvc.lock"
    if not path.exists():
        return {}
    entry: dict[str, Any] = ((read_yaml(path) or {}).get("stages") or {}).get(stage) or {}
    return entry


def sync_revisions(workspace: Workspace) -> None:
    """Bring revisions.yaml to this code's revisions, keeping its comment."""
    from ruamel.yaml import YAML

    path = workspace.root / "revisions.yaml"
    if path.exists() and read_yaml(path) == REVISIONS:
        return
    yaml = YAML()
    document = (yaml.load(path) if path.exists() else None) or {}
    for name in [name for name in document if name not in REVISIONS]:
        del document[name]
    document.update(REVISIONS)
    temporary = path.with_name(f".{path.name}.tmp")
    yaml.dump(document, temporary)
    temporary.replace(path)


def push(workspace: Workspace, config: Config) -> None:
    """Copy what DVC holds and the remote lacks.

    Raises:
        Unreachable: the remote does not answer.
        BadInput: it refuses.
    """
    _transfer(workspace, config, "push")


def pull(workspace: Workspace, config: Config) -> None:
    """Bring the tile store and results that the workspace's DVC files name.

    Raises:
        Unreachable, BadInput: as in `push`.
    """
    _transfer(workspace, config, "pull", "--allow-missing", "--force")


def fetch(workspace: Workspace, config: Config, of: Workspace, what: str) -> None:
    """Bring what a DVC file names from the remote of another workspace into this one's cache.

    Raises:
        Unreachable, BadInput: as in `push`.
    """
    url = config.versioning.remote
    if "://" not in url:
        folder = of.root / Path(url).expanduser()
        if not folder.is_dir():
            raise BadInput(f"there is no remote at {folder}")
        remote = config.versioning.model_copy(update={"remote": str(folder)})
        config = config.model_copy(update={"versioning": remote})
    _transfer(workspace, config, "fetch", what)


def _transfer(workspace: Workspace, config: Config, verb: str, *arguments: str) -> None:
    _set_remote(workspace, config)
    try:
        _dvc(workspace, verb, "--no-run-cache", "--remote", REMOTE, *arguments)
    except BadInput as error:
        reason = _clock_refused(config)
        if reason is None:
            raise
        raise Unreachable(f"dvc {verb}: {reason}") from error


def _clock_refused(config: Config) -> str | None:
    """Where the remote refuses for its clock, that it does: an answer to HEAD has no room for the
    reason, so that DVC cannot tell it."""
    if not config.versioning.remote.startswith("s3://"):
        return None
    url = config.versioning.endpoint or os.environ.get("AWS_ENDPOINT_URL") or AMAZON
    reason = clocks.why_refused(clocks.asked(url)[1])
    return None if reason is None else f"{url}: {reason}"


@dataclass(frozen=True)
class RemoteObject:
    """A file, or a folder's list, on a remote: its MD5, and what is known of it without reading."""

    digest: str
    path: str
    size: int
    written: float  # Unix seconds


class Remote:
    """The workspace's remote: what lies there, and its removal.

    Raises:
        Unreachable: it does not answer. BadInput: it refuses.
    """

    def __init__(self, workspace: Workspace, config: Config) -> None:
        self.url, self._config = config.versioning.remote, config
        _set_remote(workspace, config)
        for name in CHECKSUMS:
            os.environ.setdefault(name, "when_required")
        with _repo(workspace) as repo:
            self._odb = repo.cloud.get_remote_odb(REMOTE, "clean", hash_name="md5")

    def objects(self) -> list[RemoteObject]:
        fs, root = self._odb.fs, self._odb.path
        with self._asking():
            if not fs.exists(root):
                return []
            found = fs.fs.find(root, detail=True) if "://" in self.url else None
        if found is None:
            rows = [(str(p), p.stat()) for p in Path(root).rglob("*") if p.is_file()]
            return [
                RemoteObject(_digest(path), path, s.st_size, max(s.st_mtime, s.st_ctime))
                for path, s in rows
            ]
        return [
            RemoteObject(_digest(path), path, int(about["size"]), about["LastModified"].timestamp())
            for path, about in found.items()
        ]

    def remove(self, objects: list[RemoteObject]) -> None:
        """Lists before files: DVC takes the files of a list that is there for present."""
        from dvc_data.hashfile.db import get_index

        with self._asking():
            for lists in (True, False):
                paths = [o.path for o in objects if o.digest.endswith(".dir") == lists]
                if paths:
                    self._odb.fs.remove(paths)
            # What DVC remembers of the remote, so that a push does not ask for each file.
            get_index(self._odb).clear()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from dvc.exceptions import DvcException

        try:
            yield
        except Exception as error:  # botocore's errors have no common ancestor
            ours = type(error).__module__.partition(".")[0] in ("boto3", "botocore", "aiohttp")
            if not ours and not isinstance(error, OSError | DvcException):
                raise
            text = f"{self.url}: {_one_line(str(error))}"
            if any(sign in text.lower() for sign in NO_ANSWER):
                raise Unreachable(text) from None
            if (reason := _clock_refused(self._config)) is not None:
                raise Unreachable(reason) from None
            raise BadInput(text) from None


def _digest(path: str) -> str:
    above, _, name = path.rpartition("/")
    return above.rpartition("/")[2] + name


@contextmanager
def alone(workspace: Workspace) -> Iterator[None]:
    """No `dvc` begins in the workspace meanwhile; waits for one that is about to."""
    from dvc.exceptions import DvcException

    with _repo(workspace) as repo:
        try:
            repo.lock.lock()
        except DvcException as error:
            raise BadInput(f"{workspace.root}: {_one_line(str(error))}") from None
        try:
            yield
        finally:
            repo.lock.unlock()


def at_work(workspace: Workspace) -> list[tuple[int, str, bool]]:
    """Who has a file of the workspace for itself, as DVC has noted: process, command, whether it
    lives. DVC passes over dead ones by itself."""
    import psutil

    path = workspace.root / ".dvc" / "tmp" / "rwlock"
    try:
        noted = json.loads(path.read_text())
        groups = [*noted.get("write", {}).values(), *noted.get("read", {}).values()]
        entries = [
            one for group in groups for one in (group if isinstance(group, list) else [group])
        ]
        known = {(int(one["pid"]), str(one["cmd"])) for one in entries if one}
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is damaged: remove it while no `dvc` runs") from None
    return sorted((pid, cmd, psutil.pid_exists(pid)) for pid, cmd in known)


def _set_remote(workspace: Workspace, config: Config) -> None:
    """Write the remote of params.yaml into .dvc/config, so that plain `dvc pull` works too."""
    from dvc.config_schema import RelPath

    url = config.versioning.remote
    inside = False
    wanted: dict[str, Any] = {}
    if "://" not in url:
        folder = workspace.root / Path(url).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        url = str(folder)
        inside = folder.resolve().is_relative_to(workspace.root)
    elif url.startswith("s3://"):
        wanted["connect_timeout"], wanted["read_timeout"] = CONNECT_TIMEOUT_S, READ_TIMEOUT_S
        if config.versioning.endpoint:
            wanted["endpointurl"] = config.versioning.endpoint
    with _repo(workspace) as repo:
        have = dict(repo.config["remote"].get(REMOTE, {}))
        if have == {"url": url, **wanted} and repo.config["core"].get("remote") == REMOTE:
            return
        with repo.config.edit("repo") as file:
            # A folder of the workspace is written relative, and moves with it.
            written = RelPath(url) if inside else url
            file.setdefault("remote", {})[REMOTE] = {"url": written, **wanted}
            file.setdefault("core", {})["remote"] = REMOTE


@contextmanager
def _repo(workspace: Workspace) -> Iterator["Repo"]:
    """DVC's view of the workspace; waits for a `dvc` at work there."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(workspace.root), _wait_for_lock=True) as repo:
            yield repo
    except NotDvcRepoError:
        raise BadInput(
            f"{workspace.root} has no .dvc: make a workspace with `ringmo init`"
        ) from None
    except DvcException as error:
        raise BadInput(f"{workspace.root}: {_one_line(str(error))}") from None


def _dvc(workspace: Workspace, *arguments: str) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "NO_COLOR": "1"}
    for name in CHECKSUMS:
        environment.setdefault(name, "when_required")
    # Never --quiet: it leaves out why an unexpected error came.
    done = subprocess.run(
        [*_python_dvc(workspace), "--wait-for-lock", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode < 0:  # no answer of DVC's: it was killed, and may be asked again
        raise Unreachable(f"dvc {arguments[0]}: killed by signal {-done.returncode}")
    if done.returncode:
        said = (done.stderr + done.stdout).strip()
        errors = [line for line in said.splitlines() if line.startswith("ERROR")]
        text = _one_line(". ".join(errors) or said or f"dvc ended with {done.returncode}")
        if any(sign in said.lower() for sign in NO_ANSWER):
            raise Unreachable(f"dvc {arguments[0]}: {text}")
        raise BadInput(f"dvc {arguments[0]}: {text}")


def _python_dvc(workspace: Workspace) -> list[str]:
    return [sys.executable, "-m", "dvc", "--cd", str(workspace.root)]


def _one_line(text: str) -> str:
    return " ".join(text.replace("ERROR: ", "").replace("unexpected error - ", "").split())[:300]


def _store_file(workspace: Workspace) -> Path:
    return workspace.root / "data" / "store.dvc"
