"""All that a team would miss, in one folder, and back onto empty servers.

    DIR/backup.json     what it is of and when; written last, so a folder without it is no backup
    DIR/SHA256SUMS      of every file beside it: `sha256sum --check --quiet SHA256SUMS`
    DIR/mlflow.*        MLflow's database, with accounts and roles: runs, models, aliases, history
    DIR/prefect.*       Prefect's: flows, their runs, deployments, schedules
    DIR/artifacts/      MLflow's files: models, cards, tables
    DIR/dvc/            every data version and result that was pushed to DVC's remote
    DIR/workspace/      parameters, DVC's records, reports, what production saw

Until it is whole the folder is called DIR.unfinished; the same command goes on from there. The
databases come first and the files they speak of after, so that these are never missing; what is
made in between is in the next backup. Servers may run meanwhile.

Where the databases are, a server's own variables say (`MLFLOW_BACKEND_STORE_URI`,
`MLFLOW_ARTIFACTS_DESTINATION`, `PREFECT_SERVER_DATABASE_CONNECTION_URL`, and libpq's PGHOST,
PGUSER, PGPASSWORD); without them they are those of `ringmo up`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from ringmo import __version__, console, services
from ringmo import config as configuration
from ringmo.config import Config
from ringmo.data.buckets import Bucket
from ringmo.environment import (
    ARTIFACTS,
    BACKEND_STORE,
    PREFECT_API_URL,
    PREFECT_DATABASE,
    S3_ENDPOINT,
    TRACKING_URI,
)
from ringmo.errors import BadInput, Unreachable
from ringmo.stage import write_json
from ringmo.workspace import Workspace

SCHEMA = 1
ABOUT, SUMS = "backup.json", "SHA256SUMS"
UNFINISHED = ".unfinished"
AT_ONCE = 8  # files on their way to or from S3
FILES = (
    *("params.yaml", "dvc.yaml", "dvc.lock", "revisions.yaml", "champion.yaml", ".dvcignore"),
    *(".gitignore", ".dvc/config", ".dvc/.gitignore", "data/store.dvc", "data/versions.jsonl"),
)
# Of .ringmo/: what nothing else knows. The rest is made again, or belongs to a running process.
STATE = ("reports", "production", "drift", "outbox", "forward")
# Columns in which a local MLflow keeps absolute paths of its files.
PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
NO_ANSWER = ("could not connect", "connection to server", "timeout expired", "starting up")


@dataclass(frozen=True)
class Sqlite:
    """A database in a file, which a server may have open."""

    path: Path
    kind = "sqlite"

    def __str__(self) -> str:
        return str(self.path)

    def save(self, to: Path) -> None:
        """A copy as of one moment."""
        if not self.path.exists():
            raise BadInput(f"{self.path} is missing: there is nothing to back up yet")
        to.unlink(missing_ok=True)
        try:
            with (
                contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as live,
                contextlib.closing(sqlite3.connect(to)) as copy,
            ):
                live.backup(copy)
        except sqlite3.Error as error:
            raise BadInput(f"{self.path}: {error}") from None

    def check_empty(self) -> None:
        """Raises: BadInput: there is a database already."""
        if self.path.exists():
            raise BadInput(f"{self.path} is there already: restore into a new workspace")

    def load(self, source: Path) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(self.path)

    def move_paths(self, old: str, new: str) -> None:
        """Point MLflow's absolute paths below one folder into another."""
        with contextlib.closing(sqlite3.connect(self.path)) as database, database:
            for table, column in PATHS:
                known = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
                if column in known:
                    database.execute(
                        f"UPDATE {table} SET {column} = replace({column}, ?, ?) "
                        f"WHERE {column} LIKE ? OR {column} LIKE ?",
                        (f"{old}/", f"{new}/", f"{old}/%", f"file://{old}/%"),
                    )


@dataclass(frozen=True)
class Postgres:
    """A database of a PostgreSQL server, named as SQLAlchemy does; libpq fills in what lacks."""

    url: str
    kind = "pgdump"

    def __str__(self) -> str:
        return f"PostgreSQL's database {self._url.database}"

    @property
    def _url(self) -> Any:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            return make_url(self.url)
        except ArgumentError:
            raise BadInput("a database's address cannot be read: postgresql://…/NAME") from None

    def save(self, to: Path) -> None:
        self._run("pg_dump", "--format=custom", f"--file={to}")

    def check_empty(self) -> None:
        """Raises: BadInput: it holds tables. Unreachable: it does not answer."""
        tables = self._ask("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        if tables != "0":
            raise BadInput(
                f"{self} is not empty ({tables} tables): restore before its server first starts, "
                f"or drop the database and create it again for its owner"
            )

    def load(self, source: Path) -> None:
        """All of it or nothing; whatever its owner was called, it is this database's owner's."""
        owner = self._ask(
            "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
        )
        how = ("--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges")
        self._run("pg_restore", *how, f"--role={owner}", f"--dbname={self._url.database}", source)

    def _ask(self, query: str) -> str:
        return self._run("psql", "--no-psqlrc", "--tuples-only", "--no-align", "-c", query).strip()

    def _run(self, program: str, *arguments: Any) -> str:
        found = shutil.which(program)
        if found is None:
            raise BadInput(f"{program} is missing: install PostgreSQL's client programs")
        url = self._url
        # Never on a command line, which every user of a machine can read.
        given = {
            "PGHOST": url.host,
            "PGPORT": url.port,
            "PGUSER": url.username,
            "PGPASSWORD": url.password,
            "PGDATABASE": url.database,
        }
        env = os.environ | {name: str(value) for name, value in given.items() if value}
        env |= {"PGCONNECT_TIMEOUT": "10"}
        done = subprocess.run(
            [found, "--no-password", *map(str, arguments)],
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            said = " ".join(done.stderr.split())[:300] or f"{program} ended with {done.returncode}"
            if any(sign in said.lower() for sign in NO_ANSWER):
                raise Unreachable(f"{self}: {said}")
            raise BadInput(f"{self}: {said}")
        return done.stdout


Database = Sqlite | Postgres


@dataclass(frozen=True)
class Folder:
    """Files below a folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self) -> dict[str, int]:
        """File → bytes, by their paths below it."""
        if not self.path.is_dir():
            return {}
        return {
            found.relative_to(self.path).as_posix(): found.stat().st_size
            for found in self.path.rglob("*")
            if found.is_file() and not found.is_symlink()
        }

    def fetch(self, name: str, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{to.name}.tmp")
        shutil.copyfile(self.path / name, temporary)
        temporary.replace(to)

    def put(self, name: str, source: Path) -> None:
        Folder(source.parent).fetch(source.name, self.path / name)


@dataclass(frozen=True)
class Objects:
    """Objects below an S3 prefix."""

    bucket: Bucket

    def __str__(self) -> str:
        return self.bucket.url

    def sizes(self) -> dict[str, int]:
        found = {one.path: one.size for one in self.bucket.objects()}
        for name in found:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise BadInput(f"{self}: an object is called {name!r}, which is no path below it")
        return found

    def fetch(self, name: str, to: Path) -> None:
        self.bucket.fetch(name, to)

    def put(self, name: str, source: Path) -> None:
        self.bucket.put(name, source)


Files = Folder | Objects


@dataclass(frozen=True)
class Places:
    """Where everything is, or shall be."""

    mlflow: Database
    prefect: Database
    artifacts: Files

    @classmethod
    def known(cls, workspace: Workspace) -> "Places":
        """As the environment says, else those of `ringmo up`.

        Raises:
            BadInput: servers elsewhere are used, and nothing says where their databases are.
        """
        elsewhere = services.status(workspace)
        local = workspace.state / "mlflow"
        for name, variable, used in (
            ("mlflow", BACKEND_STORE, TRACKING_URI),
            ("prefect", PREFECT_DATABASE, PREFECT_API_URL),
        ):
            where = elsewhere[name]
            named = str(where["url"] or "").startswith("http")
            if where["where"] == "environment" and named and not variable.read():
                raise BadInput(
                    f"{used.name} names a server: run this where that server's {variable.name} is "
                    f"known (docker compose run --rm backup …), or unset it for what is local"
                )
        home = Path(os.environ.get("PREFECT_HOME", workspace.state / "prefect"))
        return cls(
            _database(BACKEND_STORE.read() or f"sqlite:///{local / 'mlflow.db'}"),
            _database(PREFECT_DATABASE.read() or f"sqlite:///{home / 'prefect.db'}"),
            _files(ARTIFACTS.read() or str(local / "artifacts"), S3_ENDPOINT.read()),
        )


def _database(url: str) -> Database:
    kind, _, path = url.partition(":///")
    if kind.startswith("sqlite"):
        return Sqlite(Path(path))
    if not kind.startswith("postgresql"):
        raise BadInput(f"a database that is neither SQLite nor PostgreSQL: {kind.split(':')[0]}")
    return Postgres(url)


def _files(place: str, endpoint: str | None) -> Files:
    if place.startswith("s3://"):
        return Objects(Bucket(place, endpoint))
    return Folder(Path(place.removeprefix("file://")))


def _remote(config: Config, workspace: Workspace) -> Files:
    url = config.versioning.remote
    if "://" not in url:
        return Folder(workspace.root / Path(url).expanduser())
    return _files(url, config.versioning.endpoint)


def backup(config: Config, workspace: Workspace, to: Path) -> dict[str, Any]:
    """Write a backup into a folder that is not there yet.

    Returns:
        backup: the folder. parts: name → {files, bytes}.

    Raises:
        BadInput: the folder exists, something to back up is missing or refuses. Unreachable: a
            server does not answer. What was brought so far stays in DIR.unfinished.
    """
    to = to.resolve()
    if to.exists():
        raise BadInput(f"{to} exists: a backup is a folder of its own; name a new one")
    places = Places.known(workspace)
    half = to.with_name(to.name + UNFINISHED)
    half.mkdir(parents=True, exist_ok=True)
    names = {name: f"{name}.{getattr(places, name).kind}" for name in ("mlflow", "prefect")}
    for name, file in names.items():
        console.note(f"backup: {name}, from {getattr(places, name)}")
        getattr(places, name).save(half / file)
    _copy_workspace(workspace, half / "workspace")
    _bring(places.artifacts, half / "artifacts", again=True)
    # DVC's files are named for what they hold.
    _bring(_remote(config, workspace), half / "dvc", again=False)
    sums = _sums(half)
    (half / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    parts: dict[str, dict[str, int]] = {}
    for name, size in Folder(half).sizes().items():
        if name in (SUMS, ABOUT):
            continue
        part = parts.setdefault(name.split("/")[0].split(".")[0], {"files": 0, "bytes": 0})
        part["files"], part["bytes"] = part["files"] + 1, part["bytes"] + size
    about = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "root": str(workspace.root),
        "databases": names,
        "sums": _sha256(half / SUMS),
        "versions": {"ringmo": __version__}
        | {name: metadata.version(name) for name in ("mlflow", "prefect", "dvc")},
        "parts": parts,
    }
    write_json(half / ABOUT, about)
    half.replace(to)
    return {"backup": str(to), "parts": parts}


def restore(root: Path, source: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Bring a backup onto empty servers, and into a workspace that has no data yet.

    All of it is read and compared with SHA256SUMS before anything is written. Killed meanwhile,
    the same command goes on. The servers must not run.

    Args:
        root: the workspace; made if there is none. changes: of its params.yaml, by dotted key:
            DVC's remote may have another address now.

    Returns:
        backup, workspace, parts: as `backup` told.

    Raises:
        BadInput: it is no whole backup, of other kinds of servers, or these are not empty.
        Unreachable: a server does not answer.
    """
    about = _whole(source)
    workspace = Workspace(root.resolve())
    running = services.status(workspace)
    if up := [name for name, row in running.items() if row["where"] == "local"]:
        raise BadInput(f"{', '.join(up)} runs here: `ringmo down` first")
    places = Places.known(workspace)
    for name, file in about["databases"].items():
        if not file.endswith(getattr(places, name).kind):
            raise BadInput(
                f"{source} holds {file}, and {name}'s database here is {getattr(places, name)}: "
                f"restore where it is of the same kind"
            )
    done_file = workspace.state / "restored.json"
    done = _done(done_file, about["sums"])
    _check_workspace(workspace, source / "workspace")
    _check_subset(places.artifacts, source / "artifacts")
    for name in about["databases"]:
        if name not in done:
            getattr(places, name).check_empty()

    for found in Folder(source / "workspace").sizes():
        Folder(source / "workspace").fetch(found, workspace.root / found)
    write_json(done_file, {"backup": about["sums"], "done": done})
    configuration.edit(workspace.params_file, dict(changes or {}))
    config = Config.load(workspace.params_file)
    remote = _remote(config, workspace)
    _check_subset(remote, source / "dvc")
    _take(source / "dvc", remote)
    _take(source / "artifacts", places.artifacts)
    for name, file in about["databases"].items():
        if name in done:
            continue
        console.note(f"restore: {name}, into {getattr(places, name)}")
        database = getattr(places, name)
        database.load(source / file)
        if name == "mlflow" and isinstance(database, Sqlite):
            database.move_paths(about["root"], str(workspace.root))
        done.append(name)
        write_json(done_file, {"backup": about["sums"], "done": done})
    if (workspace.root / "data" / "store.dvc").exists():
        from ringmo.data import versions

        console.note("restore: the data version and results, from DVC's remote")
        versions.pull(workspace, config)
    return {"backup": str(source), "workspace": str(workspace.root), "parts": about["parts"]}


def text(done: dict[str, Any], next_step: str) -> str:
    rows = [
        (name, str(part["files"]), f"{part['bytes'] / 1e6:.1f}")
        for name, part in sorted(done["parts"].items())
    ]
    return f"{console.table(rows, ('part', 'files', 'MB'))}\n\nNext: {next_step}"


def _copy_workspace(workspace: Workspace, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    here = Folder(workspace.root)
    for name in FILES:
        if (workspace.root / name).is_file():
            here.fetch(name, to / name)
    for part in STATE:
        folder = Folder(workspace.state / part)
        for name in folder.sizes():
            with contextlib.suppress(FileNotFoundError):  # sent and deleted meanwhile
                folder.fetch(name, to / workspace.state.name / part / name)


def _bring(source: Files, to: Path, again: bool) -> None:
    """Copy all files; `again`: those too that an earlier try brought."""
    console.note(f"backup: files of {source}")
    to.mkdir(exist_ok=True)
    wanted = source.sizes()
    there = Folder(to).sizes()
    for name in there.keys() - wanted.keys():
        (to / name).unlink()
    left = [name for name, size in wanted.items() if again or there.get(name) != size]

    def fetch(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, as by `ringmo clean`
            source.fetch(name, to / name)

    _all_at_once(fetch, left)


def _take(source: Path, to: Files) -> None:
    console.note(f"restore: files of {to}")
    there = to.sizes()
    left = [name for name, size in Folder(source).sizes().items() if there.get(name) != size]
    _all_at_once(lambda name: to.put(name, source / name), left)


def _all_at_once(work: Any, names: list[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for _ in pool.map(work, names):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_subset(place: Files, source: Path) -> None:
    """Raises: BadInput: there are files that a restore of this backup cannot have brought."""
    ours = Folder(source).sizes()
    for name, size in place.sizes().items():
        if ours.get(name) != size:
            raise BadInput(f"{place} is not empty (it holds {name}): restore onto an empty one")


def _check_workspace(workspace: Workspace, source: Path) -> None:
    """Raises: BadInput: it has data of its own."""
    for name in ("data/versions.jsonl", "data/store.dvc", "dvc.lock"):
        here, ours = workspace.root / name, source / name
        if here.exists() and not (ours.exists() and here.read_bytes() == ours.read_bytes()):
            raise BadInput(f"{workspace.root} has data of its own ({name}): name a new workspace")


def _done(path: Path, sums: str) -> list[str]:
    """The databases that an earlier try of this very backup restored."""
    try:
        said = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return []
    return list(said["done"]) if said.get("backup") == sums else []


def _whole(source: Path) -> dict[str, Any]:
    """What backup.json says, once every file was found to be what SHA256SUMS says.

    Raises:
        BadInput: it is not whole, or damaged.
    """
    if not (source / ABOUT).is_file():
        half = (
            source.name.endswith(UNFINISHED) or source.with_name(source.name + UNFINISHED).exists()
        )
        why = "it was never finished" if half else f"it has no {ABOUT}"
        raise BadInput(f"{source} is no backup: {why}")
    try:
        about: dict[str, Any] = json.loads((source / ABOUT).read_text())
        if about["schema"] != SCHEMA:
            raise BadInput(f"{source}: written by another ringmo (schema {about['schema']})")
        if _sha256(source / SUMS) != about["sums"]:
            raise BadInput(f"{source}: {SUMS} is damaged")
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise BadInput(f"{source}: {ABOUT} or {SUMS} is damaged") from None
    said = dict(line.split("  ", 1)[::-1] for line in (source / SUMS).read_text().splitlines())
    console.note(f"restore: {len(said)} files are compared with {SUMS}")
    found = _sums(source)
    for name in sorted(said.keys() | found.keys()):
        if said.get(name) != found.get(name):
            what = "is missing" if name not in found else "is damaged"
            raise BadInput(f"{source}: {name} {'is not of it' if name not in said else what}")
    return about


def _sums(folder: Path) -> dict[str, str]:
    names = [name for name in sorted(Folder(folder).sizes()) if name not in (SUMS, ABOUT)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
