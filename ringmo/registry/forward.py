"""A stage's figures on their way to MLflow, and the run of the whole chain above them.

Stages never call MLflow. They append figures to a file, and a Forwarder beside them sends what is
new, so a server that is down delays figures and disturbs no training.

A run has, under the same names whatever the stage: parameters (`stage.parameters`), the tiles it
reads as datasets with DVC's hash for a digest, figures with a slash that are curves and without
one that are results, tables, `system/…` of the machine, and the energy it took.
"""

import contextlib
import getpass
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ringmo import console, system_metrics
from ringmo.config import Config, digest, flatten
from ringmo.errors import RingmoError
from ringmo.process_group import born
from ringmo.registry.tracker import GENERATED, Tracker, run_url
from ringmo.stage import Report, announcement, write_json
from ringmo.workspace import Workspace

POLL_S = 3.0

CHAIN = "chain"  # the experiment of the runs that are parents
TABLE_ROWS = 1000  # of predictions, as many as MLflow's pages still draw quickly
# What MLflow calls the use of tiles, by our names of splits.
CONTEXTS = {"train": "training", "val": "validation", "test": "evaluation", "all": "data checks"}
# Flow process and children's threads may find at once that the parent has no run yet.
_parents = threading.Lock()


class _Feed:
    """One folder whose figures, pictures and files belong to one MLflow run.

    Its mlflow.json says what was sent already; it is written after the sending, so that a kill in
    between sends a few points twice (MLflow keeps the same) and loses none. A feed is `closed`
    when nothing more will come and all has arrived.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "mlflow.json"
        self._looks: list[int] = []  # when the files last sent from were written
        try:
            self.state: dict[str, Any] = json.loads(self.file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self.state = {}

    def describe(self, stage: str, tags: Mapping[str, Any], started: float) -> None:
        """An execution begins, or goes on after an interruption: the run is (again) RUNNING."""
        old = self.state.get("tags", {})
        self.state.update(
            stage=stage,
            tags={**old, **_said(tags)},
            started=self.state.get("started", started),
            status="RUNNING",
            pid=os.getpid(),
            born=born(os.getpid()),
            closed=False,
        )
        self.state.pop("ended", None)
        self.save()

    def end(self, status: str) -> None:
        # Where the clock was set back, a run still ends after it began.
        self.state.update(status=status, ended=max(time.time(), self.state["started"]))
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
        # In a container the numbers begin anew: the same one may be another process.
        return bool(born(int(self.state.get("pid", 0))) != self.state.get("born", ""))

    @property
    def experiment(self) -> str:
        stage: str = self.state["stage"]
        return stage.replace("@", "-")

    def send(self, tracker: Tracker) -> None:
        """Send what is new. Raises what the tracker raises; what was sent stays noted."""
        self._open(tracker)
        run_id = self.state["run_id"]
        try:
            self._send_params(tracker, run_id)
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
                tracker.tag_run(state["run_id"], self._tags(tracker))
                state["sent_status"] = "RUNNING"
        else:
            # Another store than before, or the first: everything goes to a run of its own there.
            self._looks = []
            state.update(points={}, files=[], params=False, dataset=None, sent_status="RUNNING")
            feed = {"feed": self.key}
            # A kill between creating the run and noting its id must not leave two.
            same = tracker.runs(self.experiment, feed)
            state["run_id"] = (
                same[0].id
                if same
                else tracker.create_run(
                    self.experiment,
                    run_name(state),
                    {**self._tags(tracker), **feed},
                    state["started"],
                )
            )
            state["store"] = tracker.store
        state["url"] = run_url(tracker.uri, tracker.experiment(self.experiment), state["run_id"])
        self.save()

    @property
    def key(self) -> str:
        return digest(str(self.folder), self.state["started"])[:32]

    def _tags(self, tracker: Tracker) -> dict[str, Any]:
        """Its tags, and whose child it is: of the chain with the same flow run, where one was."""
        tags: dict[str, Any] = dict(self.state["tags"])
        flow_run = tags.get("flow_run")
        if flow_run and self.state["stage"] != CHAIN:
            with _parents:
                parent = _Feed(_chain_folder(self.folder.parent.parent, flow_run))
                if parent.state:
                    parent._open(tracker)
                    tags["mlflow.parentRunId"] = parent.run_id
                elif there := tracker.runs(CHAIN, {"flow_run": flow_run}):
                    tags["mlflow.parentRunId"] = there[0].id
        return tags

    def _send_points(self, tracker: Tracker, run_id: str) -> None:
        # The files are read anew each time: a resumed training cuts its last lines, and a position
        # in it would then point into the middle of another line. They hold a few thousand lines.
        files = [self.folder / name for name in ("figures.jsonl", system_metrics.FILE)]
        looks = [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
        if looks == self._looks:
            return
        sent: dict[str, int] = self.state["points"]
        new = [
            (name, value, when, step)
            for file in files
            for name, value, when, step in points(file)
            if step > sent.get(name, -1)
        ]
        if new:
            tracker.log_metrics(run_id, new)
            for name, _, _, step in new:
                sent[name] = max(step, sent.get(name, -1))
        self._looks = looks

    def _send_params(self, tracker: Tracker, run_id: str) -> None:
        """Parameters as soon as the stage has written them, and with them which tiles it reads."""
        found = [self.folder / "params.json", self.folder / "final" / "params.json"]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            return
        params = json.loads(path.read_text())
        version = self.state["tags"].get("data_version")
        if not self.state["params"]:
            tracker.log_params(run_id, {"data_version": version or "-", **params})
            self.state["params"] = True
        if version and self.state.get("dataset") != version:
            for split, context in CONTEXTS.items():
                if tiles := params.get(f"tiles.{split}"):
                    name = self.state.get("sources") or "tile store"
                    tracker.log_dataset(
                        run_id,
                        version,
                        name if split == "all" else f"{name}, {split}",
                        tracker.workspace.store,
                        context,
                        {"tiles": tiles},
                    )
            self.state["dataset"] = version

    def _send_files(self, tracker: Tracker, run_id: str) -> None:
        for path in sorted((self.folder / "pictures").glob("[!.]*.png")):
            name = f"pictures/{path.name}"
            if name not in self.state["files"]:
                tracker.log_file(run_id, path, "pictures")
                self.state["files"].append(name)

    def _send_end(self, tracker: Tracker, run_id: str) -> None:
        """The report's figures and tables, and the pictures and pages beside it."""
        final = self.folder / "final"
        report = Report.read(final / "report.json") or Report(self.state["stage"])
        figures = {
            **_verdict_figures(final), **report.figures, **system_metrics.usage(self.folder)
        }  # fmt: skip
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        when = self.state["ended"]
        tables = {**report.tables, "figures": _intervals(numbers), "predictions": _answers(final)}
        tables = {name: rows for name, rows in tables.items() if rows}
        for name, rows in tables.items():
            tracker.log_table(run_id, name, rows)
        metrics = [(n, v, when, 0) for n, v in numbers.items() if _is_metric(n, report.figures)]
        tracker.log_metrics(run_id, metrics)
        texts = {n: v for n, v in figures.items() if n not in numbers}
        said = [f"**{report.reason}**"] if report.reason else []
        if self.state["tags"].get(GENERATED):
            said.append("Imagery is generated: figures say nothing of real ones.")
        said += report.notes
        if self.state["stage"] == CHAIN:
            said.append(self._stages(tracker))
            if (summary := final / "summary.md").is_file():
                said.append(summary.read_text())
        about = {
            "reason" if self.state["stage"] != CHAIN else "failed": report.reason,
            "mlflow.note.content": "\n\n".join(said) or None,
            "mlflow.runName": run_name(self.state),
            # By this tag MLflow's pages show JSON as a table.
            "mlflow.loggedArtifacts": [
                {"path": f"tables/{name}.json", "type": "table"} for name in tables
            ],
        }
        tracker.tag_run(run_id, {**texts, **self.state["tags"], **_said(about)})
        if final.is_dir():
            tracker.log_folder(run_id, final)
        tracker.set_status(run_id, self.state["status"], self.state["ended"])

    def _stages(self, tracker: Tracker) -> str:
        """Of a chain: its stages, each with a link to the run that made its result.

        MLflow's pages list as children only runs of the same experiment.
        """
        lines = ["| stage | | run |", "|---|---|---|"]
        for stage, result in self.state.get("results", {}).items():
            experiment = stage.replace("@", "-")
            own = tracker.runs(experiment, {"flow_run": self.state["tags"]["flow_run"]})
            made = own or (tracker.runs(experiment, {"result": result}) if result else [])
            how = made[0].status.lower() if own else "unchanged" if result else "not run"
            link = "-"
            if made:
                page = f"#/experiments/{tracker.experiment(experiment)}/runs/{made[0].id}"
                link = f"[{made[0].name}]({page})"
            lines.append(f"| {stage} | {how} | {link} |")
        return "\n".join(lines)


def _said(tags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tags.items() if value is not None}


def _chain_folder(state: Path, flow_run: str) -> Path:
    return state / "forward" / f"{CHAIN}-{flow_run}"


def _is_metric(name: str, figures: Mapping[str, Any]) -> bool:
    """Of intervals only those of the main figure are columns of their own; the table has all."""
    base, _, end = name.rpartition("_")
    of_chain, _, figure = base.rpartition("/")
    main = f"test_{figures.get('metric', '') if not of_chain else figure.removeprefix('test_')}"
    return end not in ("low", "high") or figure in (main, "difference_to_scratch")


def _intervals(numbers: Mapping[str, float]) -> list[dict[str, Any]]:
    """The figures that have an interval, a row each."""
    return [
        {"figure": n, "value": v, "low": numbers[f"{n}_low"], "high": numbers.get(f"{n}_high")}
        for n, v in numbers.items()
        if f"{n}_low" in numbers
    ]


def _answers(final: Path) -> list[dict[str, Any]]:
    """What predictions.parquet says of the tiles, without each class's probability; the worst
    first, so many."""
    from pyarrow import parquet

    path = final / "predictions.parquet"
    if not path.is_file():
        return []
    columns = [name for name in parquet.read_schema(path).names if ":" not in name]
    rows = parquet.read_table(path, columns=columns).to_pylist()

    def worst(row: dict[str, Any]) -> tuple[bool, float]:
        if "predicted" in row:
            return row["predicted"] == row["label"], -row["confidence"]
        quality = float(row.get("quality") or 0)
        return math.isnan(quality), 0.0 if math.isnan(quality) else quality

    def plain(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return round(value, 4) if math.isfinite(value) else None

    shown = sorted(rows, key=worst)[:TABLE_ROWS]
    return [{name: plain(value) for name, value in row.items()} for row in shown]


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
    """What a person reads in the list of runs: stage, data, when, and whether the imagery is made
    up; of a chain also why it ran."""
    tags = state["tags"]
    parts = ["retrain" if state["stage"] == CHAIN else state["stage"].replace("@", " ")]
    if tags.get("data_version"):
        parts.append(f"data {tags['data_version'][:8]}")
    parts.append(time.strftime("%d %b %H:%M", time.localtime(state["started"])))
    if state["stage"] == CHAIN and tags.get("reason"):
        parts.append(tags["reason"])
    if tags.get(GENERATED):
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
    *("comparison.txt", "results.parquet", "params.json"),
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
    gpus: those the stage may use, as CUDA_VISIBLE_DEVICES has them; None: all.
    """

    def __init__(
        self, workspace: Workspace, stage: str, tags: Mapping[str, Any], gpus: str | None = None
    ) -> None:
        self.workspace, self.stage = workspace, stage
        self.started = time.time()
        self.tags = dict(tags)
        self._feed: _Feed | None = None
        self._tracker: Tracker | None = None
        self._announcement = announcement(workspace, stage)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._poll, name=f"forward {stage}", daemon=True)
        self._sampler = system_metrics.Sampler(workspace.root, gpus)
        self._told = False

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, as soon as there is one."""
        return self._feed.run_id if self._feed else None

    @property
    def url(self) -> str | None:
        """The run's page, where a server shows it."""
        return self._feed.url if self._feed else None

    def measure(self, pid: int) -> None:
        """The stage's processes are this one and its children; else those of this process."""
        self._sampler.measure(pid)

    def __enter__(self) -> "Forwarder":
        self._before = self._announced()
        self.tags.setdefault("data_version", _data_version(self.workspace))
        self.tags.setdefault(GENERATED, _made_up(self.workspace))
        self.tags |= {"mlflow.user": _user(), "mlflow.source.name": f"ringmo {self.stage}"}
        self._sampler.start()
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
        self._sampler.stop()
        with self._lock:
            self._find()
            if self._feed is not None and self._feed.state["status"] == "RUNNING":
                self._feed.end("KILLED")
                self._try_sending()

    def finish(self, report: Report | None, out: Path) -> None:
        """The stage has ended: send its figures, tables and pictures, and end the run.

        The report gets what the stage took (`system_metrics.usage`); the copy in `out` stays as
        it is, since DVC keeps that by its hash.

        report: None where the child died without one. out: the stage's output folder.
        """
        self._stop.set()
        self._thread.join(timeout=60)
        self._sampler.stop()
        with self._lock:
            if report is not None and report.run_dir:
                self._follow(self.workspace.root / report.run_dir)
            else:
                self._find()
            feed = self._feed
            if feed is None:
                name = f"{self.stage.replace('@', '-')}-{round(self.started * 1000)}"
                self._follow(self.workspace.state / "forward" / name)
                feed = self._feed
            assert feed is not None
            final = feed.folder / "final"
            if report is not None:
                _keep_for_sending(out if report.ok or report.exit_code == 1 else final / "-", final)
                feed.state["tags"]["result"] = result_of(out)
                report.figures |= system_metrics.usage(feed.folder)
                report.write(final / "report.json")
                report.write(self.workspace.report_file(self.stage))
                if _from_generated(report, out):
                    feed.state["tags"][GENERATED] = True
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
            self._feed.state["sources"] = _sources(self.workspace, self.tags.get("data_version"))
            self._feed.describe(self.stage, self.tags, self.started)
            self._sampler.follow(folder)

    def _try_sending(self) -> None:
        assert self._feed is not None
        try:
            if self._tracker is None:
                self._tracker = Tracker(self.workspace)
            self._feed.send(self._tracker)
        except Exception as error:  # a store of artifacts may raise what it likes
            self._tracker = None
            if not self._told:
                self._told = True
                console.note(
                    f"{_in_a_line(error)}; figures wait in {self._feed.folder} and are sent later"
                )
        else:
            _tidy(self._feed)


class ChainRun:
    """The MLflow run of one execution of the whole chain; those of its stages are its children.

    `with ChainRun(workspace, config, tags) as parent:` around the chain, `parent.finish(…)` inside
    when it is through. An exception ends it as FAILED, an interruption as KILLED. Like all runs it
    is a folder first, and sent when MLflow answers.

    tags: flow_run, by which its children are known, reason, and what else there is to say.
    """

    def __init__(self, workspace: Workspace, config: Config, tags: Mapping[str, Any]) -> None:
        self.workspace, self.config, self.tags = workspace, config, dict(tags)
        self._feed = _Feed(_chain_folder(workspace.state, self.tags["flow_run"]))
        self._report: Report | None = None
        self._summary = ""

    def __enter__(self) -> "ChainRun":
        self._started, self._began_at = time.time(), time.monotonic()
        # Not told by a time: clocks are set while a chain runs.
        self._before = {file: file.stat().st_mtime_ns for file in self._left()}
        self.tags |= {"mlflow.user": _user(), "mlflow.source.name": "ringmo run"}
        self._feed.describe(CHAIN, self.tags, self._started)
        sections = ("select", "model", "pretrain", "finetune", "evaluate", "gate")
        chosen = self.config.model_dump(mode="json", by_alias=True, include=set(sections))
        for section in ("finetune", "gate"):
            chosen[section] = {t: v for t, v in chosen[section].items() if t in self.config.tasks}
        write_json(self._feed.folder / "params.json", flatten(chosen))
        with contextlib.suppress(Exception):  # those of its children try again
            tracker = Tracker(self.workspace)
            with _parents:
                self._feed.send(tracker)
        return self

    def finish(self, summary: Mapping[str, Any], text: str) -> None:
        """The chain is through.

        Args:
            summary: as `chain.summary` gives it. text: the same for people, in Markdown.
        """
        figures: dict[str, Any] = {"outcome": summary["outcome"]}
        for task, found in summary["tasks"].items():
            metric = found.get("metric")
            names = [f"{of}_{metric}" for of in ("test", "scratch", "trivial", "champion")]
            names += ["difference_to_scratch"]
            names += [f"{n}{end}" for n in (names[0], names[-1]) for end in ("_low", "_high")]
            figures |= {f"{task}/{n}": found[n] for n in names if found.get(n) is not None}
            said = ("metric", "model", "champion", "verdict", "verdict_reasons")
            figures |= {f"{task}.{n}": found[n] for n in said if found.get(n)}
        if (loss := summary["pretrain"].get("val_loss")) is not None:
            figures["pretrain/val_loss"] = loss
        if (tiles := summary["data"].get("tiles")) is not None:
            figures["tiles"] = tiles
        self._report = Report(CHAIN, figures=figures)
        self._summary = text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = "FINISHED" if error is None else "FAILED"
        if error is not None and not isinstance(error, Exception):
            status = "KILLED"
        report = self._report or Report(CHAIN, ok=False)
        if error is not None:
            report.reason = "interrupted" if status == "KILLED" else _in_a_line(error)
        report.figures["hours"] = round((time.monotonic() - self._began_at) / 3600, 5)
        report.figures |= self._energy()
        final = self._feed.folder / "final"
        report.write(final / "report.json")
        if self._summary:
            (final / "summary.md").write_text(self._summary + "\n")
        if status != "KILLED":  # whoever interrupts does not wait for a server
            forward_all(self.workspace)  # figures of stages that ran while MLflow was away
        with _parents:
            feed = self._feed = _Feed(self._feed.folder)  # a child may have sent it meanwhile
            version, made_up = _data_version(self.workspace), _made_up(self.workspace) or None
            feed.state["tags"] |= _said({"data_version": version, GENERATED: made_up})
            feed.state["results"] = self._results()
            feed.end(status)
            try:
                feed.send(Tracker(self.workspace))
                _tidy(feed)
            except Exception as caught:  # as in `_try_sending`; the chain has ended already
                console.note(f"{_in_a_line(caught)}; the chain's run is sent later")

    def _ran(self) -> dict[str, Report]:
        """Reports of the stages that ran in this execution."""
        from ringmo.data.versions import stages

        ran = {}
        for stage in stages(self.workspace):
            file = self.workspace.report_file(stage.name)
            if self._written(file):
                ran[stage.name] = Report.read(file) or Report(stage.name)
        return ran

    def _results(self) -> dict[str, str | None]:
        from ringmo.data.versions import stages

        names = [stage.name for stage in stages(self.workspace)]
        results = {name: result_of(self.workspace.work(name)) for name in names}
        return {n: result for n, result in results.items() if result or self._began(n)}

    def _began(self, stage: str) -> bool:
        """Whether it left anything in this execution, if only half a training."""
        feeds = (self.workspace.state / "runs").glob(f"{stage.replace('@', '-')}-*/mlflow.json")
        left = [*feeds, self.workspace.report_file(stage)]
        return any(self._written(file) for file in left)

    def _left(self) -> list[Path]:
        """What executions leave: reports, and how far figures were sent."""
        state = self.workspace.state
        return [*state.glob("reports/*.json"), *state.glob("runs/*/mlflow.json")]

    def _written(self, file: Path) -> bool:
        """Whether a file is there and was not, as it is, when this execution began."""
        return file.exists() and file.stat().st_mtime_ns != self._before.get(file)

    def _energy(self) -> dict[str, Any]:
        """What its stages took together, where each of them was measured."""
        ran = [report.figures for report in self._ran().values()]
        if not ran:
            return {"energy_source": "no stage ran"}
        sources = dict.fromkeys(one.get("energy_source", "not measured") for one in ran)
        said = {"energy_source": "sum of the stages that ran: " + " | ".join(sources)}
        if all("energy_wh" in one for one in ran):
            said["energy_wh"] = round(sum(one["energy_wh"] for one in ran), 4)
        return said


def result_of(out: Path) -> str | None:
    """Hash of a stage's result, by which the run that made it is found again; also after DVC has
    restored an earlier one: a report holds the seconds that it took."""
    try:
        return hashlib.sha256((out / "report.json").read_bytes()).hexdigest()[:32]
    except FileNotFoundError:
        return None


def _in_a_line(error: BaseException) -> str:
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0][:240] if isinstance(error, RingmoError) else said[:240]


def forward_all(workspace: Workspace) -> int:
    """Send what waits from earlier executions; returns how many runs are complete now.

    Where MLflow does not answer, a note says so and everything goes on waiting. A run that cannot
    be sent for another reason keeps none of the others waiting.
    """
    waiting = []
    for pattern in ("runs/*/mlflow.json", "forward/*/mlflow.json"):
        for path in sorted(workspace.state.glob(pattern)):
            feed = _Feed(path.parent)
            if feed.orphaned:
                feed.end("KILLED")
            if not feed.state.get("closed", True) and feed.state["status"] != "RUNNING":
                waiting.append(feed)
    waiting.sort(key=lambda feed: feed.state["stage"] == CHAIN)  # these link to the others
    done = 0
    tracker, last = None, ""
    for feed in waiting:
        try:
            tracker = tracker or Tracker(workspace)
        except RingmoError as error:
            last = str(error)
            break
        try:
            feed.send(tracker)
            _tidy(feed)
            done += 1
        except Exception as error:  # whatever keeps one run waiting keeps no other
            tracker, last = None, _in_a_line(error)
    if done < len(waiting):
        console.note(f"{last}; figures of {len(waiting) - done} runs go on waiting")
    return done


def running(workspace: Workspace) -> list[dict[str, Any]]:
    """Chains and stages of this workspace whose process lives: stage, pid, started (Unix seconds).

    Chains come first.
    """
    rows = []
    for pattern in ("forward/*/mlflow.json", "runs/*/mlflow.json"):
        for path in sorted(workspace.state.glob(pattern)):
            feed = _Feed(path.parent)
            if feed.state.get("status") == "RUNNING" and not feed.orphaned:
                rows.append({name: feed.state[name] for name in ("stage", "pid", "started")})
    return sorted(rows, key=lambda row: row["stage"] != CHAIN)


def unsent(run_dir: Path) -> bool:
    """Whether figures of a training still wait for MLflow."""
    return not _Feed(run_dir).state.get("closed", True)


def _tidy(feed: _Feed) -> None:
    """What has arrived in MLflow is not kept a second time."""
    if feed.state.get("closed"):
        if feed.folder.parent.name == "forward":
            shutil.rmtree(feed.folder, ignore_errors=True)
        else:
            shutil.rmtree(feed.folder / "final", ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _sources(workspace: Workspace, version: str | None) -> str | None:
    """Where a data version comes from, in short: the names of its sources."""
    from ringmo.data.versions import versions

    row = next((row for row in versions(workspace) if row["version"] == version), None)
    names = [str(source).rstrip("/").rpartition("/")[2] for source in row["sources"]] if row else []
    return ", ".join(names)[:200] or None


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
