"""The whole chain from the command line's side: the plan, the run through Prefect, its summary."""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.config import Config, digest
from ringmo.errors import RingmoError
from ringmo.stage import Report
from ringmo.workspace import Workspace


def plan(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Each stage and why it would run (an empty list: it would not). Imagery is not looked at."""
    from ringmo.data import versions

    changes = versions.changed(workspace)
    rows: list[dict[str, Any]] = []
    runs: set[str] = set()
    for stage in versions.stages(workspace):
        why = list(changes.get(stage.name, []))
        why += [f"after {name}" for name in stage.upstream if name in runs]
        if why:
            runs.add(stage.name)
        rows.append({"stage": stage.name, "does": stage.desc, "why": why})
    return rows


def plan_text(rows: list[dict[str, Any]]) -> str:
    lines = [("ingest", "looks for new imagery", "always")]
    lines += [(row["stage"], row["does"], "; ".join(row["why"][:2]) or "unchanged") for row in rows]
    return console.table(lines, ("stage", "does", "would run because"))


def run(config: Config, workspace: Workspace) -> dict[str, Any]:
    """Start what is needed, run the retraining flow in this process, and return its summary.

    Raises:
        RingmoError: with the exit code of what went wrong.
    """
    from ringmo import services

    started = time.monotonic()
    command = _command()
    _check_sources(config, workspace)
    services.up(config, workspace)
    os.environ.update(services.environment(workspace))
    # Prefect's own lines go to its server; people get the stages' own progress.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    console.note("retraining: follow it at " + (services.status(workspace)["prefect"]["url"] or ""))

    from flows.retrain import retrain
    from flows.stages import as_ringmo_error

    state: Any = retrain(str(workspace.root), return_state=True)
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise as_ringmo_error(outcome) from outcome
    if not isinstance(outcome, dict):
        raise RingmoError(f"the flow ended as {state.name}: {state.message}")
    outcome["command"] = command
    outcome["minutes"] = round((time.monotonic() - started) / 60, 2)
    return outcome


def _command() -> str:
    """How the user calls `ringmo` from here: by its name only where that is on the path."""
    if shutil.which("ringmo"):
        return "ringmo"
    return os.path.relpath(Path(sys.executable).with_name("ringmo"))


def _check_sources(config: Config, workspace: Workspace) -> None:
    """What ingest would refuse anyway, said before any server is started."""
    from ringmo.errors import BadInput

    for source in config.ingest.sources:
        if source == "generated" or "://" in source:
            continue
        if not (workspace.root / Path(source).expanduser()).exists():
            raise BadInput(f"{source}: no such folder (ingest.sources in params.yaml)")


def ends(config: Config, workspace: Workspace) -> list[str]:
    """What is registered at the chain's end: the tasks' models, or the encoder alone."""
    return labelled(config, workspace) or ["encoder"]


def labelled(config: Config, workspace: Workspace) -> list[str]:
    """The tasks that the selection has labels for; without any, the chain ends at the encoder."""
    there = {row["task"] for row in _selected(workspace) if row["tiles"]}
    return [task for task in config.tasks if task in there]


def _selected(workspace: Workspace) -> list[dict[str, Any]]:
    """What was selected for each task."""
    report = Report.read(workspace.work("select") / "report.json")
    return report.tables.get("tasks", []) if report else []


def register(
    config: Config, workspace: Workspace, task: str, flow_run: str | None = None
) -> Report:
    """Register a model, judge it, and promote it if the gate lets it pass. Done twice is done once.

    A task's model brings its encoder along, which becomes champion when the task's model does.
    A version is promoted by itself at most once: what a person rolled back stays rolled back.
    """
    from ringmo.registry import gate, promotion, register

    def judge(name: str, version: Any) -> tuple[Any, bool]:
        verdict = gate.gate(config, workspace, name, version)
        moved = any(row["to"] == version.version for row in promotion.history(workspace, name))
        if verdict.ok and not moved:
            reason = "; ".join(verdict.reasons)
            promotion.promote(workspace, name, version.version, by="gate", reason=reason)
        return verdict, verdict.ok and not moved

    started = time.monotonic()
    tags = {"flow_run": flow_run or ""}
    encoder = register.register(config, workspace, register.ENCODER, tags)
    version = encoder
    if task != register.ENCODER:
        version = register.register(config, workspace, task, tags)
        verdict, promoted = judge(task, version)
        judge(register.ENCODER, encoder)
    else:
        verdict, promoted = judge(task, version)
    report = Report(
        f"register@{task}",
        figures={
            "model": f"{task}/{version.version}",
            "encoder": f"encoder/{encoder.version}",
            "verdict": "passed" if verdict.ok else "refused",
            "verdict_reasons": verdict.reasons,
            "promoted": promoted,
            **verdict.figures,
            "key": _registration_key(config, workspace, task),
        },
        seconds=round(time.monotonic() - started, 2),
        # An encoder that waits for a task model to be built on it has not been refused.
        exit_code=0 if verdict.ok or task == register.ENCODER else 1,
        ok=verdict.ok,
    )
    report.write(workspace.report_file(report.stage))
    return report


def registered(config: Config, workspace: Workspace, task: str) -> bool:
    """Whether just this model went through registration and gate under just these rules before."""
    report = Report.read(workspace.report_file(f"register@{task}"))
    return bool(report and report.figures.get("key") == _registration_key(config, workspace, task))


def _registration_key(config: Config, workspace: Workspace, task: str) -> str:
    lock = workspace.root / "dvc.lock"
    return digest(
        task,
        lock.read_text() if lock.exists() else "",
        config.gate,
        os.environ.get("MLFLOW_TRACKING_URI", ""),
    )


def push(config: Config, workspace: Workspace) -> None:
    """Data and outputs to the DVC remote, unless just these are there already."""
    from ringmo.data import versions

    names = ("dvc.lock", "data/store.dvc")
    text = "".join((workspace.root / n).read_text() for n in names if (workspace.root / n).exists())
    key = hashlib.sha256((text + repr(config.versioning)).encode()).hexdigest()
    marker = workspace.state / "pushed"
    if not marker.exists() or marker.read_text() != key:
        versions.push(workspace, config)
        marker.write_text(key)


def summary(config: Config, workspace: Workspace, cached: dict[str, bool]) -> dict[str, Any]:
    """What came out of a run, from the reports that its stages left."""
    from ringmo import services
    from ringmo.registry import listing

    def figures(stage: str) -> dict[str, Any]:
        report = Report.read(workspace.work(stage) / "report.json")
        return report.figures if report else {}

    ingest = Report.read(workspace.report_file("ingest"))
    running = services.status(workspace)
    verdict = json.loads((workspace.work("validate") / "verdict.json").read_text())
    result: dict[str, Any] = {
        "data": (ingest.figures if ingest else {}),
        "validation": {
            "ok": verdict["ok"],
            "rules": len(verdict["rules"]),
            "docs": str(workspace.work("validate") / "docs"),
        },
        "pretrain": figures("pretrain"),
        "tasks": {},
        "stages": {name: "cached" if was else "done" for name, was in cached.items()},
        "mlflow": running["mlflow"]["url"],
        "prefect": running["prefect"]["url"],
        "labelled": labelled(config, workspace),
        "other_tasks": figures("select").get("other_tasks", []),
        "beside": {row["task"]: row["beside"] for row in _selected(workspace)},
    }
    exit_code = 0
    for task in ends(config, workspace):
        report = Report.read(workspace.report_file(f"register@{task}"))
        made = report.figures if report else {}
        champion = next(
            (row for row in listing.models(workspace, task) if "champion" in row["aliases"]), None
        )
        new = not cached.get(f"register@{task}", True)
        if new and made.get("verdict") == "refused" and task != "encoder":
            exit_code = 1
        result["tasks"][task] = {
            **figures(f"evaluate@{task}"),
            **{k: v for k, v in made.items() if k != "key"},
            "champion": f"{task}/{champion['version']}" if champion else None,
        }
    refused = exit_code == 1
    everything_cached = all(cached.values()) if cached else False
    result["outcome"] = "Refused" if refused else "Unchanged" if everything_cached else "Completed"
    result["headline"] = (
        "the gate refused the new model; the champion stays"
        if refused
        else "nothing changed, nothing was done"
        if everything_cached
        else "done"
    )
    result["exit_code"] = exit_code
    return result


def summary_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as rows of name and text, for people."""
    data, pretrain = result["data"], result["pretrain"]
    made_up = (
        "  GENERATED imagery: figures say nothing of real ones" if data.get("generated") else ""
    )
    rows = [
        ("Data version", f"{data.get('data_version')}{made_up}"),
        ("Tiles", f"{data.get('tiles')}, {data.get('set_aside', 0)} set aside"),
    ]
    for row in (data.get("set_aside_reasons") or {}).items():
        rows.append(("", f"  {row[1]} × {row[0]}"))
    checked = result["validation"]
    rows.append(
        ("Validation", f"{'passed' if checked['ok'] else 'FAILED'}, {checked['rules']} rules")
    )
    losses = (pretrain.get("val_loss"), pretrain.get("train_loss"))
    loss = next((str(loss) for loss in losses if loss is not None), "-")
    rows.append(("Pre-training loss", loss))
    for task, figures in result["tasks"].items():
        if task != "encoder":
            rows += _figure_rows(task, figures)
        if figures.get("model"):
            standing = "champion" if figures["champion"] == figures["model"] else "candidate"
            rows.append(
                (f"Model, {task}", f"{figures['model']} ({standing}; gate: {figures['verdict']})")
            )
            if figures["champion"] and standing != "champion":
                rows.append(("  in production", f"{figures['champion']} (champion)"))
            rows += [("", f"  {reason}") for reason in figures.get("verdict_reasons", [])]
    if not result["labelled"]:
        why = "folders named by class give labels"
        if result["other_tasks"]:
            why = f"the labels are for {', '.join(result['other_tasks'])}"
        rows.append(("No labels", f"the chain stopped after the encoder; {why}"))
    if result.get("minutes") is not None:
        rows.append(("Took", f"{result['minutes']:.1f} min, {result['headline']}"))
    rows += [("MLflow", result["mlflow"] or "-"), ("Prefect", result["prefect"] or "-")]
    return rows


def _figure_rows(task: str, figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a task's model does on the test tiles, beside what it must beat."""
    metric, unit = figures.get("metric", "accuracy"), figures.get("unit", "%")

    def said(name: str, points: bool = False) -> str:
        low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
        return console.interval(figures.get(name), low, high, unit, points=points)

    rows = [
        (
            f"{task}: {metric}",
            f"{said(f'test_{metric}')} on {figures.get('test_tiles')} test tiles",
        ),
        ("  from scratch", said(f"scratch_{metric}")),
        ("  difference", said("difference_to_scratch", points=True)),
        ("  without looking", said(f"trivial_{metric}")),
    ]
    if f"histogram_{metric}" in figures:
        rows.append(("  histograms alone", said(f"histogram_{metric}")))
    if f"champion_{metric}" in figures:
        rows.append(("  champion before", said(f"champion_{metric}")))
    return rows


def summary_text(result: dict[str, Any]) -> str:
    ringmo = result.get("command", "ringmo")
    task = next(iter(result["labelled"]), None)
    other = next(iter(result["other_tasks"]), None)
    beside = "".join(f" --with {name}=IMAGE" for name in result["beside"].get(task, []))
    following = (
        f"{ringmo} predict IMAGE{beside} --model {task}@champion\n"
        f"      {ringmo} lineage {task}@champion"
        if task
        else f"{ringmo} run --task {other}"
        if other
        else "put the images in folders named by class and run again"
    )
    more = f"{ringmo} models\n      {ringmo} down      (ends the servers)"
    return f"\n{console.table(summary_rows(result))}\n\nNext: {following}\n      {more}"


def summary_markdown(result: dict[str, Any]) -> str:
    rows = [f"| {name} | {text.strip()} |" for name, text in summary_rows(result)]
    return "\n".join(["| | |", "|---|---|", *rows])
