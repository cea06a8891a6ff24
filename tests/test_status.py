"""Status: servers, runs, champions, the last result and the disk, at a glance and honestly."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_api import api
from registered import register_three
from servers import MLflow, free_port

from flows.running import flow_runs
from ringmo import config, services, status
from ringmo.cli import main
from ringmo.config import Config
from ringmo.registry import promotion
from ringmo.registry.tracker import Glance, Tracker
from ringmo.stage import Report
from ringmo.workspace import Workspace, init


def test_a_new_workspace_is_told_in_a_moment_and_nothing_heavy_is_loaded(
    workspace: Workspace,
) -> None:
    seen = (
        "import sys; from ringmo.cli import main; main(['status', '--workspace', sys.argv[1]])\n"
        "print(sorted({'torch','pandas','numpy','prefect','mlflow','dvc'} & set(sys.modules)))\n"
        "import time; print(time.process_time())"
    )
    names = [n for n in os.environ if n.startswith(("MLFLOW_TRACKING", "PREFECT_API"))]
    done = subprocess.run(
        [sys.executable, "-c", seen, str(workspace.root)],
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, heavy, seconds = done.stdout.strip().splitlines()
    assert heavy == "[]"
    assert float(seconds) < 4  # 0.6 s of a processor's time when nothing else runs
    assert any(line.startswith("prefect") and "down" in line for line in lines)


def test_the_last_step_and_the_disk(workspace: Workspace) -> None:
    Report("select").write(workspace.report_file("select"))
    reason = "no room on /data"
    failed = Report("finetune@scene", ok=False, reason=reason, exit_code=2)
    failed.write(workspace.report_file("finetune@scene"))
    os.utime(workspace.report_file("select"), (1, 1))
    cache = workspace.root / ".dvc" / "cache" / "files" / "md5" / "ab" / "cd"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"x" * 5000)
    workspace.store.mkdir(parents=True)
    os.link(cache, workspace.store / "tiles-000000.tar")
    state = status.look(workspace)
    assert state["last"]["stage"] == "finetune@scene" and state["last"]["reason"] == reason
    assert state["disk"]["tile store"] == 5000
    assert "DVC cache" not in state["disk"], "the same bytes count once"
    assert f"NOT done: {reason}" in status.text(state)


def test_a_training_is_told_with_its_epoch(workspace: Workspace) -> None:
    run = workspace.state / "runs" / "pretrain-0123456789abcdef"
    run.mkdir(parents=True)
    (run / "params.json").write_text('{"training.epochs": 45}')
    line = '{"step": 6, "time": 1.0, "epoch": 1.5}\n'
    (run / "figures.jsonl").write_text(line + '{"step": 7, "ep')
    from ringmo.stage import announce

    announce(workspace, "pretrain", run)
    (row,) = status.look(workspace)["trainings"]
    assert (row["stage"], row["epoch"], row["epochs"]) == ("pretrain", 1.5, 45)
    assert "epoch 1.5 of 45" in status.text(status.look(workspace))
    # One that is gone is not told.
    said = json.loads((workspace.state / "running" / "pretrain.json").read_text())
    child = subprocess.Popen(["true"])
    child.wait()
    (workspace.state / "running" / "pretrain.json").write_text(
        json.dumps(said | {"pid": child.pid})
    )
    assert status.look(workspace)["trainings"] == []


def test_a_server_that_is_away_is_said_to_be_away(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    started = time.monotonic()
    assert main(["status", "--workspace", str(workspace.root)]) == 0
    assert time.monotonic() - started < 30
    said = capsys.readouterr().out
    assert said.count("does not answer") == 2 and "on disk" in said


@pytest.mark.slow
def test_champions_are_those_of_the_registry(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server with its database, as MLflow itself tells it."""
    server = MLflow(f"sqlite:///{tmp_path}/m.db", str(tmp_path / "kept"), kept=True)
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        register_three(workspace)
        promotion.promote(workspace, "scene", 2, by="ada", reason="")
        (champion,) = status.look(workspace)["champions"]
        version = Tracker(workspace).aliased("scene", "champion")
        assert version is not None
        told = {"model": "scene", "version": 2, "created": version.created}
        assert champion == told
        assert Glance(workspace).claims("promotions/") == []
        assert Tracker(workspace).claim_name("promotions/scene/9", {"model": "scene", "to": "3"})
        (claim,) = Glance(workspace).claims("promotions/")
        assert claim["model"] == "scene" and claim["to"] == "3"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace with a real Prefect server and no worker."""
    made = init(tmp_path_factory.mktemp("served") / "workspace")
    config.edit(made.params_file, {"services.prefect_port": free_port()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made.root}/mlflow.db")
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setattr(services, "START_LIMIT_S", 600.0)
        services.up(Config.load(made.params_file), made)
        yield made
        services.down(made)


@pytest.mark.slow
def test_runs_that_run_wait_and_come(served: Workspace) -> None:
    assert flow_runs(served) == []
    flow = api(served, "flows/", {"name": "retrain"})["id"]
    other = api(served, "flows/", {"name": "drift"})["id"]

    def made(of: str, state: dict[str, Any], place: str = "") -> str:
        parameters = {"workspace": place or str(served.root)}
        body = {"flow_id": of, "state": state, "parameters": parameters}
        return str(api(served, "flow_runs/", body)["id"])

    soon = {"state_details": {"scheduled_time": "2999-01-01T00:00:00Z"}}
    later = {"state_details": {"scheduled_time": "2999-01-02T00:00:00Z"}}
    late = {"state_details": {"scheduled_time": "2020-01-01T00:00:00Z"}}
    made(flow, {"type": "RUNNING", "name": "Running"})
    made(flow, {"type": "SCHEDULED", "name": "Scheduled", **soon})
    made(flow, {"type": "SCHEDULED", "name": "Scheduled", **later})
    made(other, {"type": "SCHEDULED", "name": "Late", **late})
    made(other, {"type": "PAUSED", "name": "Suspended"})
    made(flow, {"type": "RUNNING", "name": "Running"}, "/somewhere/else")
    made(flow, {"type": "COMPLETED", "name": "Unchanged"})
    rows = flow_runs(served)
    assert rows is not None
    told = sorted((row["flow"], row["what"], row["state"]) for row in rows)
    assert told == [
        ("drift", "waits", "Late"),
        ("drift", "waits", "Suspended"),
        ("retrain", "ended", "Unchanged"),
        ("retrain", "next", "Scheduled"),
        ("retrain", "runs", "Running"),
    ]
    (coming,) = [row for row in rows if row["what"] == "next"]
    assert coming["when"].startswith("2999-01-01")
    text = status.text(status.look(served))
    assert "from now" in text and "Unchanged" in text
