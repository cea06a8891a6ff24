"""One run above those of the chain's stages: it links to them, and ends as the chain did."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ringmo.config import Config
from ringmo.errors import Unreachable
from ringmo.registry import forward
from ringmo.registry.forward import CHAIN, ChainRun, Forwarder, forward_all
from ringmo.registry.tracker import Run, Tracker
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

SUMMARY = {
    "outcome": "Completed",
    "data": {"tiles": 96},
    "pretrain": {"val_loss": 0.5},
    "tasks": {
        "scene": {
            "metric": "accuracy",
            "test_accuracy": 0.75,
            "test_accuracy_low": 0.5,
            "test_accuracy_high": 0.9,
            "scratch_accuracy": 0.6,
            "model": "scene/1",
            "verdict": "refused",
            "verdict_reasons": ["0.75 is below 0.80"],
        }
    },
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: Any) -> None:
    monkeypatch.setattr(forward, "POLL_S", 0.1)


def stage(workspace: Workspace, name: str, flow_run: str, seconds: float) -> None:
    """A stage as the flow runs it, whose work is a report and its parameters."""
    out = workspace.work(name)
    params = {"stage": name, "training.lr": 0.1, "tiles.train": 64, "tiles.val": 8}
    write_json(out / "params.json", params)
    report = Report(name, figures={"val_loss": 0.5}, seconds=seconds)
    report.write(out / "report.json")
    with Forwarder(
        workspace, name, {"flow_run": flow_run, "data_version": "ab12.dir"}
    ) as forwarder:
        forwarder.finish(report, out)


def chain_of(workspace: Workspace, flow_run: str) -> Run:
    (run,) = Tracker(workspace).runs(CHAIN, {"flow_run": flow_run})
    return run


def test_stages_are_children_and_an_unchanged_one_is_linked_to_who_made_it(
    tracked: Workspace, config: Config
) -> None:
    for flow_run in ("first", "second"):
        about = {"flow_run": flow_run, "reason": "schedule"}
        with ChainRun(tracked, config, about) as parent:
            if flow_run == "first":
                stage(tracked, "validate", flow_run, 1.25)
            stage(tracked, "select", flow_run, 2.5)
            parent.finish(SUMMARY, "the gate refused it")
    tracker = Tracker(tracked)
    first, second = (chain_of(tracked, name) for name in ("first", "second"))
    assert first.status == second.status == "FINISHED"
    assert first.name.startswith("retrain · ") and first.name.endswith(" · schedule")
    (validated,) = tracker.runs("validate")
    assert validated.tags["mlflow.parentRunId"] == first.id
    selected, before = tracker.runs("select")
    assert selected.tags["mlflow.parentRunId"] == second.id
    note = second.tags["mlflow.note.content"]
    assert f"| validate | unchanged | [{validated.name}](#/experiments/" in note
    assert f"/runs/{validated.id})" in note and f"/runs/{selected.id})" in note
    assert note.endswith("the gate refused it\n")
    assert before.id not in note and "pretrain" not in note
    assert second.metrics["scene/test_accuracy"] == 0.75
    assert second.metrics["scene/test_accuracy_low"] == 0.5
    assert second.metrics["pretrain/val_loss"] == 0.5
    assert json.loads(second.tags["scene.verdict_reasons"]) == ["0.75 is below 0.80"]
    assert second.tags["reason"] == "schedule"


def test_a_chain_that_failed_or_was_interrupted_says_so(tracked: Workspace, config: Config) -> None:
    for flow_run, error in (("bad", RuntimeError("two\nlines")), ("stopped", KeyboardInterrupt())):
        with (
            pytest.raises(type(error)),
            ChainRun(tracked, config, {"flow_run": flow_run, "reason": "by hand"}),
        ):
            raise error
    failed, killed = chain_of(tracked, "bad"), chain_of(tracked, "stopped")
    assert (failed.status, killed.status) == ("FAILED", "KILLED")
    assert failed.tags["failed"] == "two\nlines" and killed.tags["failed"] == "interrupted"
    assert failed.tags["reason"] == "by hand"


def test_a_chain_without_mlflow_is_sent_later_with_its_children(
    tracked: Workspace, config: Config, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with ChainRun(tracked, config, {"flow_run": "f", "reason": "by hand"}) as parent:
        stage(tracked, "select", "f", 1.5)
        parent.finish(SUMMARY, "| | |")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert forward_all(tracked) == 2
    run = chain_of(tracked, "f")
    (child,) = Tracker(tracked).runs("select")
    assert child.tags["mlflow.parentRunId"] == run.id
    assert child.id in run.tags["mlflow.note.content"]
    assert run.status == "FINISHED" and not any((tracked.state / "forward").iterdir())


@pytest.mark.parametrize("failed", [False, True])
def test_what_waited_while_mlflow_was_away_is_there_when_the_chain_ends(
    tracked: Workspace, config: Config, monkeypatch: Any, failed: bool
) -> None:
    about = {"flow_run": "f", "reason": "by hand"}
    with suppress(Unreachable), ChainRun(tracked, config, about) as parent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        stage(tracked, "select", "f", 1.5)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        if failed:
            raise Unreachable("the next stage")
        parent.finish(SUMMARY, "| | |")
    (child,) = Tracker(tracked).runs("select")
    assert child.status == "FINISHED"
    assert child.tags["mlflow.parentRunId"] == chain_of(tracked, "f").id


def test_a_killed_chain_does_not_stay_running(tracked: Workspace) -> None:
    code = (
        "import os, sys; from ringmo.config import Config; from ringmo.workspace import Workspace\n"
        "from pathlib import Path; from ringmo.registry.forward import ChainRun\n"
        "place = Workspace(Path(sys.argv[1])); config = Config.load(place.params_file)\n"
        "with ChainRun(place, config, {'flow_run': 'f', 'reason': 'by hand'}):\n"
        "    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tracked.root)], timeout=120)
    assert done.returncode == -9
    assert chain_of(tracked, "f").status == "RUNNING"
    assert forward_all(tracked) == 1
    assert chain_of(tracked, "f").status == "KILLED"


def test_what_mlflow_shows_of_a_run(tracked: Workspace) -> None:
    """Which tiles it read, tables that its pages draw, and few columns."""
    import pandas as pd

    out = tracked.work("evaluate@scene")
    write_json(out / "params.json", {"training.lr": 0.1, "tiles.train": 64, "tiles.test": 9})
    said = {"key": ["a", "b", "c"], "label": ["x"] * 3, "predicted": ["x", "y", "y"]}
    table = pd.DataFrame({**said, "confidence": [0.5, 0.6, 0.9], "model:x": [0.5, 0.4, 0.1]})
    table.to_parquet(out / "predictions.parquet")
    figures: dict[str, Any] = {"metric": "accuracy"}
    for name in ("test_accuracy", "test_f1", "drop_blurred"):
        figures |= {name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6}
    report = Report("evaluate@scene", figures=figures, tables={"per_class": [{"class": "x"}]})
    report.write(out / "report.json")
    with Forwarder(tracked, "evaluate@scene", {"data_version": "ab12.dir"}) as forwarder:
        forwarder.finish(report, out)
    tracker = Tracker(tracked)
    run = tracker._client.get_run(str(forwarder.run_id))
    seen = {
        (one.dataset.name, one.dataset.digest, one.tags[0].value, one.dataset.profile)
        for one in run.inputs.dataset_inputs
    }
    assert seen == {
        ("tile store, train", "ab12.dir", "training", '{"tiles": 64}'),
        ("tile store, test", "ab12.dir", "evaluation", '{"tiles": 9}'),
    }
    assert run.data.params == {
        "data_version": "ab12.dir", "training.lr": "0.1", "tiles.train": "64", "tiles.test": "9"
    }  # fmt: skip
    ends = {n for n in run.data.metrics if n.endswith(("_low", "_high"))}
    assert ends == {"test_accuracy_low", "test_accuracy_high"}
    assert {"hours", "peak_memory_gb", "system/cpu_utilization_percentage"} <= set(run.data.metrics)
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [one["path"] for one in shown] == [
        "tables/per_class.json", "tables/figures.json", "tables/predictions.json"
    ]  # fmt: skip
    folder = Path(tracker.artifact_uri(str(forwarder.run_id)).removeprefix("file://"))
    predictions = json.loads((folder / "tables" / "predictions.json").read_text())
    assert predictions["columns"] == ["key", "label", "predicted", "confidence"]
    assert [row[0] for row in predictions["data"]] == ["c", "b", "a"]
    intervals = json.loads((folder / "tables" / "figures.json").read_text())
    assert ["test_f1", 0.5, 0.4, 0.6] in intervals["data"]
    # What it took is in the report beside the workspace's state; DVC's output stays as it was.
    kept = Report.read(tracked.report_file("evaluate@scene"))
    assert kept is not None and "hours" in kept.figures and "energy_source" in kept.figures
    assert "hours" not in json.loads((out / "report.json").read_text())["figures"]
