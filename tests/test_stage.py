"""A stage's outputs appear whole or not at all, and its report tells a refusal from a crash."""

import errno
from pathlib import Path

import pytest

from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import Report, run_stage
from ringmo.workspace import Workspace


def write(out: Path, text: str) -> Report:
    (out / "result.txt").write_text(text)
    return Report("select", figures={"tiles": 3})


def test_outputs_and_report_stand_after_success(workspace: Workspace) -> None:
    run_stage(workspace, "select", lambda out: write(out, "one"))
    assert (workspace.work("select") / "result.txt").read_text() == "one"
    report = Report.read(workspace.report_file("select"))
    assert report is not None and report.ok and report.figures == {"tiles": 3}


def test_a_failure_leaves_the_outputs_of_before_and_a_report(workspace: Workspace) -> None:
    run_stage(workspace, "select", lambda out: write(out, "one"))

    def fail(out: Path) -> Report:
        write(out, "half")
        raise BadInput("no tiles")

    with pytest.raises(BadInput):
        run_stage(workspace, "select", fail)
    assert (workspace.work("select") / "result.txt").read_text() == "one"
    report = Report.read(workspace.report_file("select"))
    assert report is not None and not report.ok
    assert (report.exit_code, report.reason, report.retry) == (2, "no tiles", False)
    assert [p.name for p in workspace.work("select").parent.iterdir()] == ["select"]


def test_a_no_keeps_its_reasons(workspace: Workspace) -> None:
    def refuse(out: Path) -> Report:
        write(out, "why")
        raise AnswerIsNo("blank tiles")

    with pytest.raises(AnswerIsNo):
        run_stage(workspace, "validate", refuse)
    assert (workspace.work("validate") / "result.txt").read_text() == "why"
    report = Report.read(workspace.report_file("validate"))
    assert report is not None and report.exit_code == 1 and report.reason == "blank tiles"


def test_a_full_disk_is_one_line_and_exit_two(workspace: Workspace) -> None:
    def fill(out: Path) -> Report:
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "model"))

    with pytest.raises(BadInput, match="No space left on device") as refused:
        run_stage(workspace, "pretrain", fill)
    assert "\n" not in str(refused.value)
    assert not workspace.work("pretrain").exists()


def test_a_crash_leaves_no_report_to_mistake_for_an_answer(workspace: Workspace) -> None:
    run_stage(workspace, "select", lambda out: write(out, "one"))

    def crash(out: Path) -> Report:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stage(workspace, "select", crash)
    assert Report.read(workspace.report_file("select")) is None
