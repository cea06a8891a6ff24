"""The door to MLflow: runs, registered models, and a stage's figures on their way there.

The only module that imports mlflow, and only where it is used: the import costs seconds.
Stages never call it. They append figures to a file, and a Forwarder beside them sends what is new,
so a server that is down delays figures and disturbs no training.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ringmo import console
from ringmo.config import digest
from ringmo.environment import TRACKING_URI, quiet_telemetry
from ringmo.errors import BadInput, RingmoError, Unreachable
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

POLL_S = 3.0
PROBE_S = 3.0  # how long a server may take to say that it lives
LOG_BATCH = 1000  # metrics a call that MLflow takes

EXPERIMENTS_FOLDER = "artifacts"
GENERATED = "generated"


def tracking_uri(workspace: Workspace) -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else the server of `ringmo up`, else SQLite.

    The last two show the same runs, models and files: the server keeps them in that SQLite file.
    """
    return TRACKING_URI.read() or _local_server(workspace) or _sqlite(workspace)


def run_url(uri: str, experiment: str, run: str) -> str | None:
    """Address of a run in MLflow's pages; None where no server shows them."""
    if not uri.startswith("http"):
        return None
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}"


def _sqlite(workspace: Workspace) -> str:
    return f"sqlite:///{workspace.state / 'mlflow' / 'mlflow.db'}"


def _local_server(workspace: Workspace) -> str | None:
    try:
        entry = json.loads((workspace.state / "services.json").read_text())["mlflow"]
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
        self.uri = tracking_uri(workspace)
        if self.uri.startswith("http") and not _answers(self.uri):
            if TRACKING_URI.read():
                raise Unreachable(
                    f"MLflow at {self.uri} does not answer ({TRACKING_URI.name}): "
                    f"start it, or unset the variable to use this workspace's own"
                )
            self.uri = _sqlite(workspace)  # what the local server keeps, without the server
        # Which runs these are, whether asked through the local server or the file.
        self.store = self.uri if TRACKING_URI.read() else "local"
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

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """MLflow's many exceptions as one line of ours."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except MlflowException as error:
            line = str(error.message).strip().splitlines()[0][:240]
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise BadInput(f"MLflow at {self.uri}: {line}") from None
            raise Unreachable(f"MLflow at {self.uri}: {line}") from None
        except (SQLAlchemyError, OSError) as error:
            line = str(error).strip().splitlines()[0][:240]
            raise Unreachable(f"MLflow at {self.uri}: {line}") from None

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

    def log_dataset(self, run_id: str, version: str, name: str, source: Path) -> None:
        """The data version a run has seen, as MLflow's dataset input."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(
            name=name,
            digest=version[:36],  # the column's width; a DVC hash with `.dir` just fits
            source_type="local",
            source=json.dumps({"uri": str(source), "dvc": version}),
        )
        with self._asking():
            self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, [])])

    def artifact_uri(self, run_id: str) -> str:
        with self._asking():
            return str(self._client.get_run(run_id).info.artifact_uri)

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
        uri = f"{version.source.rstrip('/')}/data/bundle"
        local = Path(uri.removeprefix("file://"))
        if local.is_absolute():
            if not local.is_dir():
                raise BadInput(f"{version}: {local} is missing: its files were moved or deleted")
            return local
        kept = self.workspace.state / "bundles" / (version.bundle_hash or str(version))
        if not kept.is_dir():
            mlflow = _mlflow()
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch, self._asking():
                fetched = mlflow.artifacts.download_artifacts(
                    artifact_uri=uri, dst_path=scratch, tracking_uri=self.uri
                )
                with contextlib.suppress(FileExistsError):
                    Path(fetched).rename(kept)
        return kept

    def version_path(self, version: Version, name: str, into: Path) -> Path | None:
        """A file or folder of a version's, on this machine's disk; None where it has none.

        Args:
            name: below the version's own folder, as `evaluation`. into: where what lies elsewhere
                is brought to.

        Raises:
            Unreachable: it cannot be fetched now.
        """
        if not version.run_id:
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


# A stage's figures on their way to MLflow


class _Feed:
    """One folder whose figures, pictures and files belong to one MLflow run.

    Its mlflow.json says what was sent already; it is written after the sending, so that a kill in
    between sends a few points twice (MLflow keeps the same) and loses none. A feed is `closed`
    when nothing more will come and all has arrived.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "mlflow.json"
        try:
            self.state: dict[str, Any] = json.loads(self.file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self.state = {}

    def describe(self, stage: str, tags: Mapping[str, Any], started: float) -> None:
        """An execution begins, or goes on after an interruption: the run is (again) RUNNING."""
        old = self.state.get("tags", {})
        self.state.update(
            stage=stage,
            tags={**old, **_texts(tags)},
            started=self.state.get("started", started),
            status="RUNNING",
            pid=os.getpid(),
            closed=False,
        )
        self.state.pop("ended", None)
        self.save()

    def end(self, status: str) -> None:
        self.state.update(status=status, ended=time.time())
        self.save()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.state)

    @property
    def run_id(self) -> str | None:
        run_id: str | None = self.state.get("run_id")
        return run_id

    @property
    def url(self) -> str | None:
        url: str | None = self.state.get("url")
        return url

    @property
    def orphaned(self) -> bool:
        """Whether whoever followed this run is gone and has not ended it."""
        if self.state.get("status") != "RUNNING":
            return False
        try:
            os.kill(int(self.state["pid"]), 0)
        except (KeyError, ProcessLookupError):
            return True
        except PermissionError:
            pass
        return False

    def send(self, tracker: Tracker) -> None:
        """Send what is new. Raises what the tracker raises; what was sent stays noted."""
        self._open(tracker)
        run_id = self.state["run_id"]
        try:
            self._send_points(tracker, run_id)
            self._send_files(tracker, run_id)
        finally:
            self.save()
        if self.state["status"] != "RUNNING":
            self._send_end(tracker, run_id)
            self.state.update(sent_status=self.state["status"], closed=True)
            self.save()

    def _open(self, tracker: Tracker) -> None:
        state = self.state
        if state.get("store") == tracker.store and tracker.run(state.get("run_id") or "-"):
            if state.get("sent_status") != "RUNNING" and state["status"] == "RUNNING":
                tracker.set_status(state["run_id"], "RUNNING")
                tracker.tag_run(state["run_id"], state["tags"])
                state["sent_status"] = "RUNNING"
        else:
            # Another store than before, or the first: everything goes to a run of its own there.
            state.update(points={}, files=[], params=False, dataset=None, sent_status="RUNNING")
            experiment = state["stage"].replace("@", "-")
            feed = {"feed": digest(str(self.folder), state["started"])[:32]}
            # A kill between creating the run and noting its id must not leave two.
            same = tracker.runs(experiment, feed)
            state["run_id"] = (
                same[0].id
                if same
                else tracker.create_run(
                    experiment, run_name(state), {**state["tags"], **feed}, state["started"]
                )
            )
            state["store"] = tracker.store
        experiment_id = tracker.experiment(state["stage"].replace("@", "-"))
        state["url"] = run_url(tracker.uri, experiment_id, state["run_id"])
        self.save()
        version = state["tags"].get("data_version")
        if version and state.get("dataset") != version:
            tracker.log_dataset(state["run_id"], version, "tile store", tracker.workspace.store)
            state["dataset"] = version

    def _send_points(self, tracker: Tracker, run_id: str) -> None:
        params = self.folder / "params.json"
        if not self.state["params"] and params.is_file():
            tracker.log_params(run_id, json.loads(params.read_text()))
            self.state["params"] = True
        # The file is read anew each time: a resumed training cuts its last lines, and a position
        # in it would then point into the middle of another line. It holds a few thousand lines.
        sent: dict[str, int] = self.state["points"]
        new = [
            (name, value, when, step)
            for name, value, when, step in points(self.folder / "figures.jsonl")
            if step > sent.get(name, -1)
        ]
        if new:
            tracker.log_metrics(run_id, new)
            for name, _, _, step in new:
                sent[name] = max(step, sent.get(name, -1))

    def _send_files(self, tracker: Tracker, run_id: str) -> None:
        for path in sorted((self.folder / "pictures").glob("[!.]*.png")):
            name = f"pictures/{path.name}"
            if name not in self.state["files"]:
                tracker.log_file(run_id, path, "pictures")
                self.state["files"].append(name)

    def _send_end(self, tracker: Tracker, run_id: str) -> None:
        """The report's figures and tables, and the pictures and pages beside it."""
        final = self.folder / "final"
        report = Report.read(final / "report.json")
        if report is not None:
            when = self.state["ended"]
            figures = {**_verdict_figures(final), **report.figures}
            numbers = {
                name: float(value)
                for name, value in figures.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            tracker.log_metrics(run_id, [(n, v, when, 0) for n, v in numbers.items()])
            texts = {n: v for n, v in report.figures.items() if n not in numbers}
            texts |= {"reason": report.reason, "notes": "\n".join(report.notes) or None}
            tracker.tag_run(run_id, {**texts, **self.state["tags"]})
            for name, rows in report.tables.items():
                tracker.log_table(run_id, name, rows)
        if self.state["tags"].get(GENERATED) == "true":
            tracker.tag_run(run_id, {"mlflow.runName": run_name(self.state)})
        if final.is_dir():
            tracker.log_folder(run_id, final)
        tracker.set_status(run_id, self.state["status"], self.state["ended"])


def _verdict_figures(final: Path) -> dict[str, float]:
    """Of a validation: its figures, and the rows that break each rule as `failed/RULE`.

    They come from the verdict, since the report of one that failed says only why.
    """
    try:
        verdict = json.loads((final / "verdict.json").read_text())
    except FileNotFoundError:
        return {}
    return {
        **verdict["figures"],
        **{f"failed/{rule['rule']}": rule["failed_rows"] for rule in verdict["rules"]},
    }


def run_name(state: Mapping[str, Any]) -> str:
    """What a person reads in the list of runs: stage, data, and whether the imagery is made up."""
    tags = state["tags"]
    parts = [state["stage"].replace("@", " ")]
    if tags.get("data_version"):
        parts.append(f"data {tags['data_version'][:8]}")
    parts.append(time.strftime("%d %b %H:%M", time.localtime(state["started"])))
    if tags.get(GENERATED) == "true":
        parts.append(GENERATED)
    return " · ".join(parts)


def points(path: Path) -> Iterator[tuple[str, float, float, int]]:
    """(name, value, Unix seconds, step) of every whole line of a figures file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            return  # being written
        try:
            figures = json.loads(line)
            step, when = int(figures.pop("step")), float(figures.pop("time"))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
        for name, value in figures.items():
            if isinstance(value, int | float) and math.isfinite(value):
                yield name, float(value), when, step


# What of a stage's output people look at in MLflow, at the top of its output folder.
_SHOWN = (
    *("*.png", "*.html", "report.json", "per_class.json", "verdict.json", "predictions.parquet"),
    *("comparison.txt", "results.parquet"),
)


def _keep_for_sending(out: Path, final: Path) -> None:
    """Copy what MLflow shall show, so that it can be sent after `out` has been replaced."""
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir(parents=True)
    for pattern in _SHOWN:
        for path in out.glob(pattern):
            shutil.copy2(path, final / path.name)
    if (out / "docs").is_dir():
        shutil.copytree(out / "docs", final / "docs")


class Forwarder:
    """Sends a stage's figures to MLflow while its child process runs.

    `with Forwarder(workspace, "pretrain", tags) as forwarder:` around the child, and
    `forwarder.finish(report, out)` inside when it has ended. Without a finish the run ends as
    KILLED, and goes on as the same run when the training does. Nothing here raises because of
    MLflow: what cannot be sent waits in its folder for the next poll or `forward_all`.

    tags: what is known beforehand (data_version, flow_run, code_version, generated …).
    """

    def __init__(self, workspace: Workspace, stage: str, tags: Mapping[str, Any]) -> None:
        self.workspace, self.stage = workspace, stage
        self.started = time.time()
        self.tags = dict(tags)
        self._feed: _Feed | None = None
        self._tracker: Tracker | None = None
        self._announcement = workspace.state / "running" / f"{stage.replace('@', '-')}.json"
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._poll, name=f"forward {stage}", daemon=True)
        self._told = False

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, as soon as there is one."""
        return self._feed.run_id if self._feed else None

    @property
    def url(self) -> str | None:
        """The run's page, where a server shows it."""
        return self._feed.url if self._feed else None

    def __enter__(self) -> "Forwarder":
        self._before = self._announced()
        self.tags.setdefault("data_version", _data_version(self.workspace))
        self.tags.setdefault(GENERATED, _made_up(self.workspace))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        with self._lock:
            self._find()
            if self._feed is not None and self._feed.state["status"] == "RUNNING":
                self._feed.end("KILLED")
                self._try_sending()

    def finish(self, report: Report | None, out: Path) -> None:
        """The stage has ended: send its figures, tables and pictures, and end the run.

        report: None where the child died without one. out: the stage's output folder.
        """
        self._stop.set()
        self._thread.join(timeout=60)
        with self._lock:
            if report is not None and report.run_dir:
                self._follow(self.workspace.root / report.run_dir)
            else:
                self._find()
            feed = self._feed
            if feed is None:
                name = f"{self.stage.replace('@', '-')}-{round(self.started * 1000)}"
                feed = self._feed = _Feed(self.workspace.state / "forward" / name)
                feed.describe(self.stage, self.tags, self.started)
            final = feed.folder / "final"
            if report is not None:
                _keep_for_sending(out if report.ok or report.exit_code == 1 else final / "-", final)
                report.write(final / "report.json")
                if _from_generated(report, out):
                    feed.state["tags"][GENERATED] = "true"
            feed.end("FINISHED" if report is not None and report.ok else "FAILED")
            self._try_sending()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            with self._lock:
                self._find()
                if self._feed is not None:
                    self._try_sending()

    def _announced(self) -> tuple[str, int] | None:
        """What the stage announced, with the file's time: an old one is of an earlier execution."""
        try:
            text, when = self._announcement.read_text(), self._announcement.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        return text, when

    def _find(self) -> None:
        announced = self._announced()
        if self._feed is None and announced is not None and announced != self._before:
            self._follow(self.workspace.root / json.loads(announced[0])["run_dir"])

    def _follow(self, folder: Path) -> None:
        if self._feed is None or self._feed.folder != folder:
            self._feed = _Feed(folder)
            self._feed.describe(self.stage, self.tags, self.started)

    def _try_sending(self) -> None:
        assert self._feed is not None
        try:
            if self._tracker is None:
                self._tracker = Tracker(self.workspace)
            self._feed.send(self._tracker)
        except RingmoError as error:
            self._tracker = None
            if not self._told:
                self._told = True
                console.note(f"{error}; figures wait in {self._feed.folder} and are sent later")
        else:
            _tidy(self._feed)


def forward_all(workspace: Workspace) -> int:
    """Send what waits from earlier executions; returns how many runs are complete now.

    Where MLflow does not answer, a note says so and everything goes on waiting.
    """
    waiting = []
    for pattern in ("runs/*/mlflow.json", "forward/*/mlflow.json"):
        for path in sorted(workspace.state.glob(pattern)):
            feed = _Feed(path.parent)
            if feed.orphaned:
                feed.end("KILLED")
            if not feed.state.get("closed", True) and feed.state["status"] != "RUNNING":
                waiting.append(feed)
    done = 0
    try:
        tracker = Tracker(workspace) if waiting else None
        for feed in waiting:
            assert tracker is not None
            feed.send(tracker)
            _tidy(feed)
            done += 1
    except RingmoError as error:
        console.note(f"{error}; figures of {len(waiting) - done} runs go on waiting")
    return done


def _tidy(feed: _Feed) -> None:
    """What has arrived in MLflow is not kept a second time."""
    if feed.state.get("closed"):
        if feed.folder.parent.name == "forward":
            shutil.rmtree(feed.folder, ignore_errors=True)
        else:
            shutil.rmtree(feed.folder / "final", ignore_errors=True)


def _data_version(workspace: Workspace) -> str | None:
    from ringmo.data.versions import data_version

    return data_version(workspace)


def _made_up(workspace: Workspace) -> bool:
    """Whether the tile store holds generated imagery."""
    from pyarrow import ArrowException, compute, parquet

    try:
        column = parquet.read_table(workspace.store / "manifest.parquet", columns=[GENERATED])
    except (OSError, ArrowException):
        return False
    return bool(compute.any(column[GENERATED]).as_py())


def _from_generated(report: Report, out: Path) -> bool:
    if report.figures.get(GENERATED):
        return True
    for name in ("encoder", "model"):
        try:
            return bool(json.loads((out / name / "model.json").read_text())[GENERATED])
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            continue
    return False
