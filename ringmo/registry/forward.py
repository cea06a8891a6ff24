"""A stage's figures on their way to MLflow.

Stages never call MLflow. They append figures to a file, and a Forwarder beside them sends what is
new, so a server that is down delays figures and disturbs no training.
"""

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

from ringmo import console
from ringmo.config import digest
from ringmo.errors import RingmoError
from ringmo.registry.tracker import GENERATED, Tracker, run_url
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

POLL_S = 3.0


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
            tags={**old, **{k: v for k, v in tags.items() if v is not None}},
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
        if self.state["tags"].get(GENERATED):
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
