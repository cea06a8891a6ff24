"""The door to MLflow: runs and registered models.

The only module that imports mlflow, and only where it is used: the import costs seconds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringmo.environment import (
    TRACKING_PASSWORD,
    TRACKING_URI,
    TRACKING_USERNAME,
    basic_auth,
    part_passwords,
    quiet_telemetry,
    shown,
)
from ringmo.errors import BadInput, Unreachable
from ringmo.workspace import Workspace

PROBE_S = 3.0  # how long a server may take to say that it lives
ROLE_PREFIX = "ringmo-"  # of the roles that are ours to give and take
LOG_BATCH = 1000  # metrics a call that MLflow takes

EXPERIMENTS_FOLDER = "artifacts"
BUNDLE = "data/bundle"  # of a version's files
BUNDLE_FILES = ("model.safetensors", "model.json")
GENERATED = "generated"
CLEANED = "cleaned"  # tag: the day on which `ringmo clean` removed the files


def tracking_uri(workspace: Workspace) -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else the server of `ringmo up`, else SQLite.

    The last two show the same runs, models and files: the server keeps them in that SQLite file.
    """
    return TRACKING_URI.read() or local_server(workspace, "mlflow") or _sqlite(workspace)


def run_url(uri: str, experiment: str, run: str) -> str | None:
    """Address of a run in MLflow's pages; None where no server shows them."""
    if not uri.startswith("http"):
        return None
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}"


def _sqlite(workspace: Workspace) -> str:
    return f"sqlite:///{workspace.state / 'mlflow' / 'mlflow.db'}"


def local_server(workspace: Workspace, name: str) -> str | None:
    """Address of `mlflow` or `prefect`, as `ringmo up` started it in the workspace and it lives."""
    try:
        entry = json.loads((workspace.state / "services.json").read_text())[name]
        os.kill(int(entry["pid"]), 0)
        return str(entry["url"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, ProcessLookupError):
        return None
    except PermissionError:  # the number belongs to somebody else's process by now
        return None


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return True  # something is there; MLflow's own calls will say what is wrong with it
    except (OSError, ValueError):
        return False


def _mlflow() -> Any:
    """mlflow, with its telemetry, progress bars and chatter off and its waits short."""
    quieter = quiet_telemetry(os.environ)
    quieter.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    quieter.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    quieter.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    quieter["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # that is where --json answers
    os.environ.update(quieter)
    import logging

    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs every error of the database with its trace, and raises it as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


@dataclass(frozen=True)
class Version:
    """A version of a registered model: `model` is its name, a task's or `encoder`.

    `version` 0 and an empty `run_id` stand for a bundle in a folder that was never registered.
    """

    model: str
    version: int
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    run_id: str
    source: str
    created: float

    def __str__(self) -> str:
        return f"{self.model}/{self.version}" if self.version else self.source

    @property
    def bundle_hash(self) -> str:
        return self.tags.get("bundle_hash", "")

    @property
    def cleaned(self) -> str | None:
        """Why its files are gone, if `ringmo clean` removed them; its tags still tell the rest."""
        day = self.tags.get(CLEANED)
        return f"{self}: its files were cleaned on {day} (`ringmo clean`)" if day else None

    @property
    def generated(self) -> bool:
        """Whether made-up imagery trained it."""
        return self.tags.get(GENERATED) == "true"

    def figure(self, name: str) -> float | None:
        """A figure kept as a tag, such as test_accuracy."""
        try:
            return float(self.tags[name])
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Run:
    """An MLflow run. `status` is RUNNING, FINISHED, FAILED or KILLED; times are Unix seconds."""

    id: str
    experiment: str
    name: str
    status: str
    started: float
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


class Tracker:
    """MLflow at the workspace's tracking address.

    Raises:
        Unreachable: the server does not answer, or the database cannot be opened.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        part_passwords(os.environ)
        self.uri = tracking_uri(workspace)
        if self.uri.startswith("http") and not _answers(self.uri):
            if TRACKING_URI.read():
                raise Unreachable(
                    f"MLflow at {shown(self.uri)} does not answer ({TRACKING_URI.name}): "
                    f"start it, or unset the variable to use this workspace's own"
                )
            self.uri = _sqlite(workspace)  # what the local server keeps, without the server
        # Which runs these are, whether asked through the local server or the file.
        self.store = shown(self.uri) if TRACKING_URI.read() else "local"
        self._artifacts = workspace.state / "mlflow" / EXPERIMENTS_FOLDER
        self._experiments: dict[str, str] = {}
        mlflow = _mlflow()
        with self._asking():
            self._client = mlflow.MlflowClient(self.uri, self.uri)
            if self.uri.startswith("sqlite"):
                # Two first uses at once would both create the tables, and one would fail.
                folder = workspace.state / "mlflow"
                folder.mkdir(parents=True, exist_ok=True)
                with claim(folder / "create.lock"):
                    self._client.search_experiments(max_results=1)
        self.opened = time.monotonic()  # importing MLflow, bit by bit, is over

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        return _asking(self.uri)

    def claim_name(self, name: str, tags: Mapping[str, Any]) -> bool:
        """Whether the name is ours: of all who claim one, on any machine, exactly one gets it.

        The claim is an experiment of that name, which MLflow's database lets exist once; it holds
        `tags` as soon as it is there, and for ever. Asked again with the same tags, by a client
        that never heard the first answer, it is still ours.
        """
        from mlflow.exceptions import MlflowException

        place = None if self.uri.startswith("http") else str(self._artifacts / "claims")
        with self._asking():
            try:
                self._client.create_experiment(name, place, _texts(tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                there = self._client.get_experiment_by_name(name)
                return there is not None and _texts(tags).items() <= dict(there.tags).items()
        return True

    def claims(self, prefix: str) -> dict[str, dict[str, str]]:
        """Claimed names that begin with `prefix` and are not retired, each with its tags."""
        with self._asking():
            found = self._client.search_experiments(filter_string=f"name LIKE '{prefix}%'")
            return {one.name: dict(one.tags) for one in found if one.name.startswith(prefix)}

    def retire_claim(self, name: str) -> None:
        """Take a claim out of sight. Its name stays taken."""
        with self._asking():
            there = self._client.get_experiment_by_name(name)
            if there is not None and there.lifecycle_stage == "active":
                self._client.delete_experiment(there.experiment_id)

    # Runs

    def experiment(self, name: str) -> str:
        """Id of the experiment, made if there is none."""
        if name in self._experiments:
            return self._experiments[name]
        from mlflow.exceptions import MlflowException

        with self._asking():
            found = self._client.get_experiment_by_name(name)
            if found is None:
                place = None if self.uri.startswith("http") else str(self._artifacts / name)
                try:
                    self._experiments[name] = self._client.create_experiment(name, place)
                    return self._experiments[name]
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self._client.get_experiment_by_name(name)
            if found.lifecycle_stage != "active":
                self._client.restore_experiment(found.experiment_id)
            self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def create_run(
        self, experiment: str, name: str, tags: Mapping[str, Any], started: float | None = None
    ) -> str:
        """A run with status RUNNING; its tags are there as soon as it is."""
        experiment_id = self.experiment(experiment)
        with self._asking():
            run = self._client.create_run(
                experiment_id,
                start_time=round((started or time.time()) * 1000),
                tags=_texts(tags),
                run_name=name,
            )
        return str(run.info.run_id)

    def run(self, run_id: str) -> Run | None:
        """The run, or None where this store has none of that id."""
        try:
            with self._asking():
                found = self._client.get_run(run_id)
                return _run(found, self._client.get_experiment(found.info.experiment_id).name)
        except BadInput:
            return None

    def runs(self, experiment: str, tags: Mapping[str, str] | None = None) -> list[Run]:
        """Runs of an experiment whose tags have these values, newest first."""
        condition = " and ".join(f"tags.`{k}` = '{v}'" for k, v in (tags or {}).items())
        experiment_id = self.experiment(experiment)
        found: list[Run] = []
        token = None
        with self._asking():
            while True:
                page = self._client.search_runs(
                    [experiment_id],
                    condition,
                    max_results=1000,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
                found += [_run(run, experiment) for run in page]
                token = page.token
                if not token:
                    return found

    def tag_run(self, run_id: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        with self._asking():
            tag_list = [RunTag(key, text) for key, text in _texts(tags).items()]
            self._client.log_batch(run_id, tags=tag_list)

    def set_status(self, run_id: str, status: str, ended: float | None = None) -> None:
        """RUNNING reopens a run that was interrupted; the others end it."""
        with self._asking():
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                end = round((ended or time.time()) * 1000)
                self._client.set_terminated(run_id, status=status, end_time=end)

    def log_metrics(self, run_id: str, points: Iterable[tuple[str, float, float, int]]) -> None:
        """Points as (name, value, Unix seconds, step)."""
        from mlflow.entities import Metric

        metrics = [Metric(n, v, round(t * 1000), s) for n, v, t, s in points]
        with self._asking():
            for i in range(0, len(metrics), LOG_BATCH):
                self._client.log_batch(run_id, metrics=metrics[i : i + LOG_BATCH])

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Parameters of a run; one that is there already keeps its value."""
        from mlflow.entities import Param

        with self._asking():
            there = self._client.get_run(run_id).data.params
            new = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in there]
            for i in range(0, len(new), 100):
                self._client.log_batch(run_id, params=new[i : i + 100])

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        with self._asking():
            self._client.log_artifact(run_id, str(path), folder)

    def log_folder(self, run_id: str, path: Path, folder: str | None = None) -> None:
        with self._asking():
            self._client.log_artifacts(run_id, str(path), folder)

    def log_table(self, run_id: str, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows of equal keys as a JSON table, which MLflow's pages show as one."""
        columns = list(rows[0]) if rows else []
        table = {"columns": columns, "data": [[row.get(c) for c in columns] for row in rows]}
        with self._asking():
            self._client.log_dict(run_id, table, f"tables/{name}.json")

    def log_dataset(
        self,
        run_id: str,
        version: str,
        name: str,
        source: Path,
        context: str,
        profile: Mapping[str, Any],
    ) -> None:
        """Tiles of a data version that a run has read, as MLflow's dataset input.

        context: what for, such as training. profile: figures of these tiles.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=version[:36],  # the column's width; a DVC hash with `.dir` just fits
            source_type="local",
            source=json.dumps({"uri": str(source), "dvc": version}),
            profile=json.dumps(dict(profile)),
        )
        tags = [InputTag("mlflow.data.context", context)]
        with self._asking():
            self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])

    def artifact_uri(self, run_id: str) -> str:
        with self._asking():
            return str(self._client.get_run(run_id).info.artifact_uri)

    def experiments(self) -> list[str]:
        """Names of the experiments that are there and not deleted."""
        with self._asking():
            found: list[str] = []
            token = None
            while True:
                page = self._client.search_experiments(page_token=token)
                found += [one.name for one in page]
                token = page.token
                if not token:
                    return found

    def artifact_bytes(self, run_id: str) -> int:
        """The size of all that a run keeps."""
        uri = self.artifact_uri(run_id)
        local = Path(uri.removeprefix("file://"))
        if local.is_absolute():
            return sum(p.stat().st_size for p in local.rglob("*") if p.is_file())
        ahead, size = [""], 0
        with self._asking():
            while ahead:
                for one in self._client.list_artifacts(run_id, ahead.pop() or None):
                    if one.is_dir:
                        ahead.append(one.path)
                    else:
                        size += one.file_size or 0
        return size

    def remove_artifacts(self, run_id: str) -> None:
        """Remove all that a run keeps. Its parameters, figures and tags stay.

        Raises:
            Unreachable: the artifact store does not answer, or refuses.
        """
        _mlflow()
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        uri = self.artifact_uri(run_id)
        with self._asking():
            get_artifact_repository(uri, tracking_uri=self.uri).delete_artifacts()

    # Registered models

    def create_version(
        self, model: str, source: str, run_id: str, tags: Mapping[str, Any], description: str
    ) -> Version:
        """A new version with its tags, both or neither."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                self._client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            made = self._client.create_model_version(
                model, source, run_id, tags=_texts(tags), description=description
            )
        return _version(made)

    def versions(self, model: str) -> list[Version]:
        """Every version of a registered model, newest first; empty where there is no such model."""
        found: list[Any] = []
        token = None
        with self._asking():
            while True:
                page = self._client.search_model_versions(f"name='{model}'", page_token=token)
                found += page
                token = page.token
                if not token:
                    break
            # A search leaves aliases out; the registered model knows them.
            aliases = self._aliases(model) if found else {}
        versions = [_version(version, aliases) for version in found]
        return sorted(versions, key=lambda version: -version.version)

    def models(self) -> list[str]:
        """Names of the registered models."""
        with self._asking():
            return sorted(model.name for model in self._client.search_registered_models())

    def version(self, model: str, version: int) -> Version | None:
        return next((v for v in self.versions(model) if v.version == version), None)

    def of_bundle(self, model: str, bundle_hash: str | None) -> Version | None:
        """The version of this bundle, or None: a task's version names its encoder by this hash."""
        if not bundle_hash:
            return None
        return next((v for v in self.versions(model) if v.bundle_hash == bundle_hash), None)

    def aliased(self, model: str, alias: str) -> Version | None:
        """The version that bears an alias, or None."""
        return next((v for v in self.versions(model) if alias in v.aliases), None)

    def _aliases(self, model: str) -> dict[int, list[str]]:
        aliases: dict[int, list[str]] = {}
        for alias, version in self._client.get_registered_model(model).aliases.items():
            aliases.setdefault(int(version), []).append(alias)
        return aliases

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point an alias at a version, away from any other, in one step."""
        with self._asking():
            self._client.set_registered_model_alias(model, alias, str(version))

    def remove_alias(self, model: str, alias: str) -> None:
        """Take an alias away; one that is not there is no error."""
        with self._asking():
            self._client.delete_registered_model_alias(model, alias)

    def tag_version(self, version: Version, tags: Mapping[str, Any]) -> None:
        with self._asking():
            for key, text in _texts(tags).items():
                self._client.set_model_version_tag(version.model, str(version.version), key, text)

    def bundle_folder(self, version: Version) -> Path:
        """The version's bundle on this machine's disk, fetched once where it lies elsewhere.

        Raises:
            BadInput: its files are gone. Unreachable: they cannot be fetched now.
        """
        if not version.run_id:
            return Path(version.source)
        return self._folder(version, BUNDLE, "bundles")

    def lineage_folder(self, version: Version) -> Path:
        """The files that a version's lineage is told from, on this machine's disk.

        Raises:
            BadInput, Unreachable: as `bundle_folder`.
        """
        return self._folder(version, "lineage", "lineage")

    def _folder(self, version: Version, name: str, place: str) -> Path:
        if version.cleaned:
            raise BadInput(version.cleaned)
        uri = f"{version.source.rstrip('/')}/{name}"
        local = Path(uri.removeprefix("file://"))
        if local.is_absolute():
            if not local.is_dir():
                raise BadInput(f"{version}: {local} is missing: its files were moved or deleted")
            return local
        kept = self._kept(version, place)
        if not kept.is_dir():
            mlflow = _mlflow()
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch, self._asking():
                fetched = mlflow.artifacts.download_artifacts(
                    artifact_uri=uri, dst_path=scratch, tracking_uri=self.uri
                )
                try:
                    Path(fetched).rename(kept)
                except OSError:
                    if not kept.is_dir():  # else another command was quicker
                        raise
        return kept

    def bundle_here(self, version: Version) -> Path | None:
        """The version's bundle, if it can be read without fetching it. Looks where it is kept.

        Raises:
            BadInput: its files are gone from where they are kept. Unreachable: cannot look now.
        """
        if version.cleaned:
            raise BadInput(version.cleaned)
        uri = f"{version.source.rstrip('/')}/{BUNDLE}"
        if Path(uri.removeprefix("file://")).is_absolute():
            return self.bundle_folder(version)
        mlflow = _mlflow()
        with self._asking():
            found = mlflow.artifacts.list_artifacts(artifact_uri=uri, tracking_uri=self.uri)
        files = [Path(one.path).name for one in found if one.file_size]
        if len(files) < 2:
            there = ", ".join(files) or "nothing"
            raise BadInput(f"{version}: its files were moved or deleted: {uri} holds {there}")
        kept = self._kept(version, "bundles")
        return kept if kept.is_dir() else None

    def _kept(self, version: Version, place: str) -> Path:
        return self.workspace.state / place / (version.bundle_hash or str(version))

    def version_path(self, version: Version, name: str, into: Path) -> Path | None:
        """A file or folder of a version's, on this machine's disk; None where it has none.

        Args:
            name: below the version's own folder, as `evaluation`. into: where what lies elsewhere
                is brought to.

        Raises:
            Unreachable: it cannot be fetched now.
        """
        if not version.run_id or version.cleaned:
            return None
        uri = version.source.rstrip("/")
        local = Path(uri.removeprefix("file://"))
        if local.is_absolute():
            return local / name if (local / name).exists() else None
        mlflow = _mlflow()
        above, _, last = name.rpartition("/")
        with self._asking():
            there = mlflow.artifacts.list_artifacts(
                artifact_uri=f"{uri}/{above}".rstrip("/"), tracking_uri=self.uri
            )
            if last not in [one.path.rpartition("/")[2] for one in there]:
                return None
            (into / above).mkdir(parents=True, exist_ok=True)
            fetched = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{uri}/{name}", dst_path=str(into / above), tracking_uri=self.uri
            )
        return Path(fetched)


class Accounts:
    """Who may do what on the MLflow server of MLFLOW_TRACKING_URI, asked in an admin's name.

    Raises:
        BadInput: no server is named, or it keeps no accounts. Unreachable: it does not answer.
    """

    def __init__(self) -> None:
        self.uri = TRACKING_URI.read() or ""
        if not self.uri.startswith("http"):
            raise BadInput(f"{TRACKING_URI.name} names no server: only a server has accounts")
        if not _answers(self.uri):
            raise Unreachable(f"MLflow at {shown(self.uri)} does not answer ({TRACKING_URI.name})")
        _mlflow()
        with warnings.catch_warnings():  # of the server's own parts, which come along
            warnings.simplefilter("ignore")
            from mlflow.server.auth.client import AuthServiceClient

        self._client = AuthServiceClient(self.uri)

    def role(self, name: str, grants: Mapping[str, str]) -> int:
        """Id of a role with just these grants: kind of thing → READ, USE, EDIT, MANAGE."""
        with _asking(self.uri):
            roles = {role.name: role for role in self._client.list_roles("default")}
            role = roles.get(name) or self._client.create_role("default", name)
            had = self._client.list_role_permissions(role.id)
            for one in had:
                if one.resource_pattern != "*" or grants.get(one.resource_type) != one.permission:
                    self._client.remove_role_permission(one.id)
            there = {
                one.resource_type: one.permission for one in had if one.resource_pattern == "*"
            }
            for kind, permission in grants.items():
                if there.get(kind) != permission:
                    self._client.add_role_permission(role.id, kind, "*", permission)
        return int(role.id)

    def user(self, name: str, password: str | None, role: int) -> bool:
        """An account with just this role; whether it was made now. One that is there keeps its
        password where none is given."""
        made = not self.has(name)
        with _asking(self.uri):
            if made:
                self._client.create_user(name, password or "")
            elif password:
                self._client.update_user_password(name, password)
            # What MLflow gives to whoever makes an experiment is such a role too, and stays.
            held = {one.id: one.name for one in self._client.list_user_roles(name)}
            if role not in held:
                self._client.assign_role(name, role)
            for other, called in held.items():
                if other != role and called.startswith(ROLE_PREFIX):
                    self._client.unassign_role(name, other)
        return made

    def has(self, name: str) -> bool:
        """Whether there is an account of this name."""
        from mlflow.exceptions import MlflowException

        with _asking(self.uri):
            try:
                self._client.get_user(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
        return True


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    """MLflow's many exceptions as one line of ours."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError
    from sqlalchemy.exc import SQLAlchemyError

    uri = shown(uri)
    try:
        yield
    except MlflowException as error:
        line = _first_line(error.message)
        if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            raise _refused(uri, error.error_code, error.message) from None
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise BadInput(f"MLflow at {uri}: {line}") from None
        raise Unreachable(f"MLflow at {uri}: {line}") from None
    except HTTPError as error:  # an artifact, on its way through the server
        codes = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}
        if error.response is not None and error.response.status_code in codes:
            raise _refused(uri, codes[error.response.status_code], error.response.text) from None
        raise Unreachable(f"MLflow at {uri}: {_first_line(error)}") from None
    except (SQLAlchemyError, OSError) as error:
        raise Unreachable(f"MLflow at {uri}: {_first_line(error)}") from None
    except Exception as error:
        # An artifact store in S3 is written by boto3, whose errors have no common ancestor.
        if type(error).__module__.partition(".")[0] not in ("boto3", "botocore"):
            raise
        raise Unreachable(f"the artifact store of MLflow at {uri}: {_first_line(error)}") from None


def _refused(uri: str, code: str, said: str) -> BadInput:
    if "Invalid Host header" in said:
        return BadInput(
            f"MLflow at {uri} does not know itself by this name: "
            f"whoever runs it adds it to MLFLOW_SERVER_ALLOWED_HOSTS"
        )
    if code == "UNAUTHENTICATED":
        return BadInput(
            f"MLflow at {uri} wants a name and its password: "
            f"set {TRACKING_USERNAME.name} and {TRACKING_PASSWORD.name}"
        )
    who = TRACKING_USERNAME.read() or "who asks"
    return BadInput(
        f"MLflow at {uri}: {who} may not do this: an admin gives another role with "
        f"`ringmo user {TRACKING_USERNAME.read() or 'NAME'} --role ROLE`"
    )


class Glance:
    """Champions and unfinished promotions, told in a moment: to import MLflow takes seconds.

    A server is asked by its REST interface; an SQLite file is read. Any other database is asked
    through MLflow after all.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.uri = TRACKING_URI.read() or _sqlite(workspace)

    def aliased(self) -> list[dict[str, Any]]:
        """model, version, alias and created (Unix seconds) of each version that bears an alias.

        Raises:
            Unreachable: the server does not answer, refuses, or the file cannot be read.
        """
        if self.uri.startswith("http"):
            found = self._ask("registered-models/search?max_results=1000", None)
            rows = []
            for model in found.get("registered_models", []):
                for alias in model.get("aliases", []):
                    name, number = model["name"], alias["version"]
                    query = urllib.parse.urlencode({"name": name, "version": number})
                    version = self._ask(f"model-versions/get?{query}", None)["model_version"]
                    rows.append((name, int(number), alias["alias"], version["creation_timestamp"]))
        elif self.uri.startswith("sqlite"):
            rows = self._rows(
                "SELECT a.name, a.version, a.alias, v.creation_time "
                "FROM registered_model_aliases a "
                "JOIN model_versions v ON v.name = a.name AND v.version = a.version"
            )
        else:
            tracker = Tracker(self.workspace)
            rows = [
                (version.model, version.version, alias, version.created * 1000)
                for model in tracker.models()
                for version in tracker.versions(model)
                for alias in version.aliases
            ]
        names = ("model", "version", "alias", "created")
        return [
            dict(zip(names, (*row[:3], float(row[3]) / 1000), strict=True)) for row in sorted(rows)
        ]

    def claims(self, prefix: str) -> list[dict[str, str]]:
        """Tags of each claim that begins with `prefix` and is not retired: see `Tracker.claims`.

        Raises:
            Unreachable: as `aliased`.
        """
        if self.uri.startswith("http"):
            asked = {"max_results": 1000, "filter": f"name LIKE '{prefix}%'"}
            found = self._ask("experiments/search", asked).get("experiments", [])
            return [{tag["key"]: tag["value"] for tag in one.get("tags", [])} for one in found]
        if not self.uri.startswith("sqlite"):
            return list(Tracker(self.workspace).claims(prefix).values())
        tags: dict[int, dict[str, str]] = {}
        for number, key, value in self._rows(
            "SELECT e.experiment_id, t.key, t.value FROM experiments e "
            "JOIN experiment_tags t ON t.experiment_id = e.experiment_id "
            "WHERE e.lifecycle_stage = 'active' AND e.name LIKE ?",
            f"{prefix}%",
        ):
            tags.setdefault(number, {})[key] = value
        return list(tags.values())

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        import sqlite3

        file = Path(self.uri.partition("sqlite:///")[2])
        if not file.is_file():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as base:
                return base.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Unreachable(f"{file}: {error}") from None

    def _ask(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if user := TRACKING_USERNAME.read():
            headers |= basic_auth(f"{user}:{TRACKING_PASSWORD.read() or ''}")
        request = urllib.request.Request(
            f"{self.uri.rstrip('/')}/api/2.0/mlflow/{path}",
            None if body is None else json.dumps(body).encode(),
            headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=PROBE_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            why = "refused us" if error.code in (401, 403) else f"answers {error.code}"
            raise Unreachable(f"MLflow at {shown(self.uri)} {why}") from None
        except (OSError, ValueError):
            raise Unreachable(f"MLflow at {shown(self.uri)} does not answer") from None


def _first_line(error: object) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0][:240])


def bundle_hash(folder: Path) -> str:
    """The hash of a bundle over both its files, as `bundle.load` finds it; loads no model."""
    whole = hashlib.sha256()
    for name in BUNDLE_FILES:
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 22):
                whole.update(piece)
    return whole.hexdigest()


def save_pyfunc(bundle: Path, folder: Path) -> None:
    """Write `folder`: the bundle as a pyfunc model, without a pickle; bundle in data/bundle."""
    import ringmo

    mlflow = _mlflow()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        named = Path(scratch) / "bundle"
        shutil.copytree(bundle, named)
        mlflow.pyfunc.save_model(
            path=str(folder),
            loader_module="ringmo.registry.pyfunc",
            data_path=str(named),
            pip_requirements=[f"ringmo=={ringmo.__version__}"],
        )


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """One at a time on this machine; ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow takes them: text of at most 5,000 characters; None is left out."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return {key: text(value)[:5000] for key, value in tags.items() if value is not None}


def _run(found: Any, experiment: str) -> Run:
    return Run(
        id=found.info.run_id,
        experiment=experiment,
        name=found.info.run_name or "",
        status=found.info.status,
        started=found.info.start_time / 1000,
        tags=dict(found.data.tags),
        metrics=dict(found.data.metrics),
    )


def _version(found: Any, aliases: Mapping[int, list[str]] | None = None) -> Version:
    number = int(found.version)
    names = aliases.get(number, []) if aliases is not None else found.aliases or []
    return Version(
        model=found.name,
        version=number,
        tags=dict(found.tags or {}),
        aliases=tuple(sorted(names)),
        run_id=found.run_id or "",
        source=found.source,
        created=found.creation_timestamp / 1000,
    )
