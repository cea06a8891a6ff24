"""Figures reach MLflow whatever happens, each once, in one run a training."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from servers import wait_until

from ringmo.errors import Unreachable
from ringmo.registry import forward
from ringmo.registry.forward import Forwarder, forward_all
from ringmo.registry.tracker import Tracker, tracking_uri
from ringmo.stage import Report, announce
from ringmo.workspace import Workspace


@pytest.fixture(autouse=True)
def _quick(monkeypatch: Any) -> None:
    monkeypatch.setattr(forward, "POLL_S", 0.1)


def write_figures(run_dir: Path, steps: range, mode: str = "a") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "figures.jsonl").open(mode) as file:
        for step in steps:
            line = {
                "step": step,
                "time": time.time(),
                "epoch": step / 10,
                "train/loss": 1 / (step + 1),
            }
            file.write(json.dumps(line) + "\n")


def sent(run_dir: Path) -> int | None:
    """The last step noted as sent."""
    with contextlib.suppress(FileNotFoundError):
        state = json.loads((run_dir / "mlflow.json").read_text())
        return state.get("points", {}).get("train/loss")  # type: ignore[no-any-return]
    return None


def losses(workspace: Workspace, run_id: str) -> list[int]:
    client = Tracker(workspace)._client
    return [metric.step for metric in client.get_metric_history(run_id, "train/loss")]


def test_importing_the_door_does_not_import_mlflow() -> None:
    code = "import sys, ringmo.registry.tracker; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tracking_goes_to_the_environment_then_the_local_server_then_sqlite(
    workspace: Workspace, monkeypatch: Any
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sqlite = tracking_uri(workspace)
    assert sqlite == f"sqlite:///{workspace.root}/.ringmo/mlflow/mlflow.db"
    services = workspace.state / "services.json"
    services.parent.mkdir(exist_ok=True)
    services.write_text(json.dumps({"mlflow": {"url": "http://127.0.0.1:5", "pid": os.getpid()}}))
    assert tracking_uri(workspace) == "http://127.0.0.1:5"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    services.write_text(json.dumps({"mlflow": {"url": "http://127.0.0.1:5", "pid": ended.pid}}))
    assert tracking_uri(workspace) == sqlite
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(workspace) == "http://tracking:5000"


def test_a_server_that_does_not_answer_is_said_so_within_seconds(
    workspace: Workspace, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        Tracker(workspace)
    assert time.monotonic() - started < 15
    assert caught.value.exit_code == 3
    assert "127.0.0.1:9" in str(caught.value) and "\n" not in str(caught.value)


def test_a_training_is_followed_live_and_ends_finished(tracked: Workspace) -> None:
    run_dir = tracked.run_dir("pretrain", "f" * 64)
    out = tracked.work("pretrain")
    out.mkdir(parents=True)
    with Forwarder(
        tracked, "pretrain", {"data_version": "ab12.dir", "flow_run": "f1"}
    ) as forwarder:
        announce(tracked, "pretrain", run_dir)
        write_figures(run_dir, range(3))
        (run_dir / "params.json").write_text('{"epochs": 2, "tiles.train": 5}')
        wait_until(lambda: forwarder.run_id)
        assert Tracker(tracked).run(str(forwarder.run_id)).status == "RUNNING"  # type: ignore[union-attr]
        (run_dir / "pictures").mkdir()
        (run_dir / "pictures" / "epoch-001.png").write_bytes(b"png")
        write_figures(run_dir, range(3, 5))
        (out / "confusion.png").write_bytes(b"png")
        report = Report(
            "pretrain",
            figures={"val_loss": 0.25, "device": "cpu"},
            tables={"per_class": [{"class": "river", "f1": 0.5}]},
            run_dir=str(run_dir.relative_to(tracked.root)),
        )
        forwarder.finish(report, out)
    run = Tracker(tracked).run(str(forwarder.run_id))
    assert run is not None and run.status == "FINISHED" and run.experiment == "pretrain"
    assert run.metrics["val_loss"] == 0.25
    assert run.tags["device"] == "cpu" and run.tags["flow_run"] == "f1"
    assert losses(tracked, run.id) == [0, 1, 2, 3, 4]
    client = Tracker(tracked)._client
    assert client.get_run(run.id).data.params == {
        "data_version": "ab12.dir", "epochs": "2", "tiles.train": "5"
    }  # fmt: skip
    assert client.get_run(run.id).inputs.dataset_inputs[0].dataset.digest == "ab12.dir"
    names = {file.path for file in client.list_artifacts(run.id)}
    assert {"pictures", "confusion.png", "report.json", "tables"} <= names
    assert not (run_dir / "final").exists()


def test_an_interrupted_training_goes_on_as_the_same_run_with_each_step_once(
    tracked: Workspace,
) -> None:
    run_dir = tracked.run_dir("pretrain", "a" * 64)
    with Forwarder(tracked, "pretrain", {}) as first:
        announce(tracked, "pretrain", run_dir)
        write_figures(run_dir, range(8))
        wait_until(lambda: first.run_id)
    assert Tracker(tracked).run(str(first.run_id)).status == "KILLED"  # type: ignore[union-attr]
    with Forwarder(tracked, "pretrain", {}) as second:
        # The checkpoint was at step 4: what came after is cut and done again.
        write_figures(run_dir, range(5), mode="w")
        announce(tracked, "pretrain", run_dir)
        write_figures(run_dir, range(5, 12))
        report = Report("pretrain", run_dir=str(run_dir.relative_to(tracked.root)))
        second.finish(report, tracked.work("pretrain"))
    assert second.run_id == first.run_id
    assert losses(tracked, str(second.run_id)) == list(range(12))
    assert len(Tracker(tracked).runs("pretrain")) == 1
    assert Tracker(tracked).run(str(first.run_id)).status == "FINISHED"  # type: ignore[union-attr]


def test_an_announcement_of_an_earlier_execution_is_not_followed(tracked: Workspace) -> None:
    old = tracked.run_dir("pretrain", "b" * 64)
    write_figures(old, range(3))
    announce(tracked, "pretrain", old)
    with Forwarder(tracked, "pretrain", {}) as forwarder:
        time.sleep(0.5)
        assert forwarder.run_id is None


def test_a_stage_without_a_training_is_one_run_an_execution(tracked: Workspace) -> None:
    out = tracked.work("validate")
    (out / "docs").mkdir(parents=True)
    (out / "docs" / "index.html").write_text("<html></html>")
    for ok in (True, False):
        with Forwarder(tracked, "validate", {"generated": True}) as forwarder:
            reason = None if ok else "places: 3 rows"
            report = Report("validate", ok=ok, exit_code=0 if ok else 1, reason=reason)
            forwarder.finish(report, out)
    failed, passed = Tracker(tracked).runs("validate")
    assert (passed.status, failed.status) == ("FINISHED", "FAILED")
    assert failed.tags["reason"] == "places: 3 rows"
    assert failed.tags["generated"] == "true" and "generated" in failed.name
    assert not any((tracked.state / "forward").glob("*"))
    docs = Tracker(tracked)._client.list_artifacts(passed.id, "docs")
    assert [file.path for file in docs] == ["docs/index.html"]


def test_a_failed_validation_brings_the_rows_of_every_rule(tracked: Workspace) -> None:
    out = tracked.work("validate")
    out.mkdir(parents=True)
    rules = [{"rule": "nodata", "failed_rows": 3}, {"rule": "blank", "failed_rows": 0}]
    verdict = {"ok": False, "rules": rules, "figures": {"tiles": 12, "broken": 1, "warnings": 0}}
    (out / "verdict.json").write_text(json.dumps(verdict))
    with Forwarder(tracked, "validate", {}) as forwarder:
        report = Report("validate", ok=False, exit_code=1, reason="nodata: 3 rows")
        forwarder.finish(report, out)
    (run,) = Tracker(tracked).runs("validate")
    assert run.status == "FAILED"
    figures = {"tiles", "broken", "warnings"}
    assert {n: v for n, v in run.metrics.items() if n in figures or n.startswith("failed/")} == {
        "tiles": 12, "broken": 1, "warnings": 0, "failed/nodata": 3, "failed/blank": 0
    }  # fmt: skip
    names = {file.path for file in Tracker(tracked)._client.list_artifacts(run.id)}
    assert "verdict.json" in names


def test_half_a_line_is_sent_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    path.write_text('{"step": 1, "time": 5, "train/loss": 2.5, "val/loss": NaN}\n{"step": 2, "ti')
    assert list(forward.points(path)) == [("train/loss", 2.5, 5.0, 1)]


def test_nothing_is_forwarded_and_nothing_fails_while_mlflow_is_down(
    tracked: Workspace, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run_dir = tracked.run_dir("pretrain", "c" * 64)
    with Forwarder(tracked, "pretrain", {}) as forwarder:
        announce(tracked, "pretrain", run_dir)
        write_figures(run_dir, range(4))
        report = Report(
            "pretrain", figures={"val_loss": 1.0}, run_dir=str(run_dir.relative_to(tracked.root))
        )
        forwarder.finish(report, tracked.work("pretrain"))
    assert forwarder.run_id is None
    assert forward_all(tracked) == 0
    assert capsys.readouterr().err.count("sent later") == 1
    # The next run, with MLflow in reach, sends it all.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert forward_all(tracked) == 1
    (run,) = Tracker(tracked).runs("pretrain")
    assert run.status == "FINISHED" and run.metrics["val_loss"] == 1.0
    assert losses(tracked, run.id) == [0, 1, 2, 3]
    assert forward_all(tracked) == 0


def test_a_run_whose_follower_was_killed_does_not_stay_running(tracked: Workspace) -> None:
    run_dir = tracked.run_dir("pretrain", "d" * 64)
    with Forwarder(tracked, "pretrain", {}) as forwarder:
        announce(tracked, "pretrain", run_dir)
        write_figures(run_dir, range(2))
        wait_until(lambda: forwarder.run_id)
        # As a SIGKILL of the follower would leave it: RUNNING, with a process that is gone.
        forwarder._stop.set()
        forwarder._thread.join()
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        state = json.loads((run_dir / "mlflow.json").read_text())
        state["pid"] = ended.pid
        (run_dir / "mlflow.json").write_text(json.dumps(state))
        assert forward_all(tracked) == 1
    assert Tracker(tracked).run(str(forwarder.run_id)).status == "KILLED"  # type: ignore[union-attr]


def test_a_store_of_artifacts_that_refuses_keeps_no_figures_and_no_other_run(
    tracked: Workspace, capsys: Any
) -> None:
    store = tracked.state / "mlflow" / "artifacts"
    store.mkdir()
    (store / "pretrain").write_text("a file, where MLflow would make a folder")
    run_dir = tracked.run_dir("pretrain", "c" * 64)
    with Forwarder(tracked, "pretrain", {}) as forwarder:
        announce(tracked, "pretrain", run_dir)
        write_figures(run_dir, range(4))
        (run_dir / "pictures").mkdir()
        (run_dir / "pictures" / "epoch-001.png").write_bytes(b"png")
        wait_until(lambda: sent(run_dir) == 3)
        write_figures(run_dir, range(4, 6))
        wait_until(lambda: sent(run_dir) == 5)
        report = Report("pretrain", run_dir=str(run_dir.relative_to(tracked.root)))
        forwarder.finish(report, tracked.work("pretrain"))
    assert capsys.readouterr().err.count("sent later") == 1
    out = tracked.work("select")
    out.mkdir(parents=True)
    with Forwarder(tracked, "select", {}) as other:
        other.finish(Report("select"), out)
    assert Tracker(tracked).run(str(other.run_id)).status == "FINISHED"
    assert forward_all(tracked) == 0
    (store / "pretrain").unlink()
    assert forward_all(tracked) == 1
    (run,) = Tracker(tracked).runs("pretrain")
    assert run.status == "FINISHED" and losses(tracked, run.id) == list(range(6))
    pictures = Tracker(tracked)._client.list_artifacts(run.id, "pictures")
    assert [file.path for file in pictures] == ["pictures/epoch-001.png"]


class Slow:
    """A proxy before a server, through which every answer comes this much later."""

    def __init__(self, port: int, delay_s: float) -> None:
        self.port, self.delay_s = port, delay_s
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listening.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                for ends in ((client, server, 0.0), (server, client, self.delay_s)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, delay_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(delay_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


# A training that writes figures as often as it can for so many seconds.
TRAINING = """
import json, sys, time
from pathlib import Path
file, step, end = Path(sys.argv[1], "figures.jsonl").open("a"), 0, time.monotonic() + 4
while time.monotonic() < end:
    file.write(json.dumps({"step": step, "time": time.time(), "train/loss": 1.0}) + "\\n")
    file.flush()
    time.sleep(0.01)
    step += 1
"""


@pytest.mark.slow
def test_a_slow_server_slows_no_training(
    workspace: Workspace, server: Any, monkeypatch: Any
) -> None:
    """Two at a time, of which one is followed: it gets as much done as the other."""
    slow = Slow(server.port, 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", slow.url)
    alone, followed = (workspace.run_dir("pretrain", letter * 64) for letter in "0e")
    with Forwarder(workspace, "pretrain", {}) as forwarder:
        announce(workspace, "pretrain", followed)
        trainings = []
        for run_dir in (alone, followed):
            run_dir.mkdir(parents=True, exist_ok=True)
            trainings.append(subprocess.Popen([sys.executable, "-c", TRAINING, str(run_dir)]))
        assert [training.wait(60) for training in trainings] == [0, 0]
        report = Report("pretrain", run_dir=str(followed.relative_to(workspace.root)))
        forwarder.finish(report, workspace.work("pretrain"))
    slow.listening.close()
    done, of_other = (len(list(forward.points(one / "figures.jsonl"))) for one in (followed, alone))
    assert done > 0.8 * of_other
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    forward_all(workspace)
    (run,) = Tracker(workspace).runs("pretrain")
    assert run.status == "FINISHED" and losses(workspace, run.id) == list(range(done))


@pytest.mark.slow
def test_figures_survive_an_outage_of_a_real_server(
    workspace: Workspace, server: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    run_dir = workspace.run_dir("pretrain", "e" * 64)
    with Forwarder(workspace, "pretrain", {}) as forwarder:
        announce(workspace, "pretrain", run_dir)
        write_figures(run_dir, range(5))
        wait_until(lambda: sent(run_dir) == 4)
        server.stop()
        write_figures(run_dir, range(5, 10))
        time.sleep(1)
        server.start()
        wait_until(lambda: sent(run_dir) == 9)
        report = Report("pretrain", run_dir=str(run_dir.relative_to(workspace.root)))
        forwarder.finish(report, workspace.work("pretrain"))
    assert losses(workspace, str(forwarder.run_id)) == list(range(10))
    assert len(Tracker(workspace).runs("pretrain")) == 1
    assert str(forwarder.url).startswith(f"{server.url}/#/experiments/")


@pytest.mark.slow
def test_the_local_server_and_its_sqlite_file_show_the_same_runs(
    workspace: Workspace, server: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """With the server of `ringmo up` gone, the file goes on, and the run is the same one."""
    (workspace.state).mkdir(exist_ok=True)
    (workspace.state / "mlflow").symlink_to(tmp_path / "server")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    services = workspace.state / "services.json"
    services.write_text(json.dumps({"mlflow": {"url": server.url, "pid": server.process.pid}}))
    through_server = Tracker(workspace)
    assert through_server.uri == server.url
    run_id = through_server.create_run("pretrain", "one", {"a": 1})
    (tmp_path / "x.txt").write_text("x")
    through_server.log_file(run_id, tmp_path / "x.txt")
    pid = server.process.pid
    server.stop()
    services.write_text(json.dumps({"mlflow": {"url": server.url, "pid": os.getpid()}}))
    assert pid != os.getpid()
    through_file = Tracker(workspace)
    assert through_file.uri.startswith("sqlite") and through_file.store == through_server.store
    assert through_file.run(run_id) is not None
    through_file.log_file(run_id, tmp_path / "x.txt", "again")
    assert {f.path for f in through_file._client.list_artifacts(run_id)} == {"x.txt", "again"}
