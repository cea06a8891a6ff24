"""The whole chain from the command line's side: the plan, the run through Prefect, its summary."""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import console
from ringmo.config import Config, digest
from ringmo.data import store
from ringmo.errors import BadInput, RingmoError
from ringmo.stage import Report, whole_folder, write_json
from ringmo.workspace import CHAMPION, Workspace, template

if TYPE_CHECKING:
    from ringmo.registry.tracker import Tracker, Version


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

    from flows import watch
    from flows.retrain import retrain
    from flows.stages import as_ringmo_error

    try:
        watch.ensure()
        state: Any = retrain(str(workspace.root), return_state=True)
    except Exception as error:  # what the flow raises is in its state: this is Prefect's own
        raise as_ringmo_error(error) from error
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
    for source in config.ingest.sources:
        if source == "generated" or "://" in source:
            continue
        if not (workspace.root / Path(source).expanduser()).exists():
            raise BadInput(f"{source}: no such folder (ingest.sources in params.yaml)")


def bring_champion(config: Config, workspace: Workspace) -> None:
    """Write to champion.yaml which encoder is taken instead of pre-training one, and bring it here.

    So that the stage is a function of files and parameters, and the registry is asked before it.

    Raises:
        BadInput: pretrain.refresh is champion, and no encoder is.
    """
    if config.pretrain.refresh == "continue":
        return  # see `bring_start`
    if config.pretrain.refresh != "champion":
        _name_encoder(workspace, None, None)
        return
    from ringmo.registry.tracker import Tracker

    tracker = Tracker(workspace)
    encoder = tracker.aliased("encoder", "champion")
    if encoder is None:
        raise BadInput("pretrain.refresh: champion: no encoder is champion yet: set full")
    _name_encoder(workspace, tracker, encoder)


def take_all(config: Config, workspace: Workspace) -> bool:
    """Where the encoder's tiles are kept (pretrain.refresh: keep), forget which; whether it was so.

    The next `select` takes in all there are, and keeps those.
    """
    if config.pretrain.refresh != "keep":
        return False
    from ringmo.data import selection

    for name in (selection.KEPT, selection.KEPT_NORMALISATION):
        (workspace.state / name).unlink(missing_ok=True)
    return True


def bring_start(config: Config, workspace: Workspace, anew: bool = False) -> bool:
    """Write to champion.yaml which encoder pre-training starts from (pretrain.refresh: continue).

    That is the champion, once the selection is another than it learnt from; before that the one
    that it started from itself, so that a run without new imagery finds nothing to do. Without a
    champion there is none, nor where the encoder shall be trained `anew`.

    Returns:
        Whether the file is another than before.
    """
    if config.pretrain.refresh != "continue":
        return False
    from ringmo.registry.tracker import Tracker

    tracker = Tracker(workspace)
    start = None if anew else tracker.aliased("encoder", "champion")
    selection = workspace.work("select") / "pretrain.parquet"
    if (
        start is not None
        and start.tags.get("refresh") == "continue"
        and start.tags.get("selection") == store.file_sha256(selection)
    ):
        start = tracker.of_bundle("encoder", start.tags.get("encoder_hash"))
    return _name_encoder(workspace, tracker, start)


def _name_encoder(
    workspace: Workspace, tracker: "Tracker | None", encoder: "Version | None"
) -> bool:
    """Write an encoder's hash, or null, to champion.yaml, after its files lie in the workspace."""
    wanted = None
    if tracker is not None and encoder is not None:
        wanted = encoder.bundle_hash
        kept = workspace.state / "bundles" / wanted
        if not kept.is_dir():
            with whole_folder(kept) as folder:
                shutil.copytree(tracker.bundle_folder(encoder), folder, dirs_exist_ok=True)
    path = workspace.root / CHAMPION
    header = template(CHAMPION).read_text().rpartition("encoder:")[0]
    text = f"{header}encoder: {wanted or 'null'}\n"
    if path.exists() and path.read_text() == text:
        return False
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return True


def ends(config: Config, workspace: Workspace) -> list[str]:
    """What is registered and judged at the chain's end: the encoder, and then the tasks' models."""
    return ["encoder", *labelled(config, workspace)]


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
    """Register a model, judge it by its gate, which promotes nothing, and attach its card.

    Done twice is done once. The encoder that a task's model stands on is registered before it.
    """
    from ringmo.registry import card, gate, register
    from ringmo.registry.tracker import Tracker

    started = time.monotonic()
    tags = {"flow_run": flow_run or ""}
    tracker = Tracker(workspace)
    if task != register.ENCODER and not _encoder_known(workspace, tracker, task):
        register.register(config, workspace, register.ENCODER, tags)
    version = register.register(config, workspace, task, tags)
    verdict = gate.gate(config, workspace, task, version)
    card.attach(workspace, version)
    judged = tracker.version(task, version.version) or version
    against = judged.tags.get("verdict_against", "none")
    champion = next((v for v in tracker.versions(task) if str(v) == against), None)
    report = Report(
        f"register@{task}",
        figures={
            "model": str(version),
            "encoder": _encoder_of(tracker, version),
            "against": str(champion) if champion else None,
            "against_encoder": _encoder_of(tracker, champion) if champion else None,
            "verdict": "passed" if verdict.ok else "refused",
            "verdict_reasons": verdict.reasons,
            **verdict.figures,
            "key": _registration_key(config, workspace, task),
        },
        tables={"checks": verdict.checks},
        seconds=round(time.monotonic() - started, 2),
        exit_code=0 if verdict.ok else 1,
        ok=verdict.ok,
    )
    report.write(workspace.report_file(report.stage))
    return report


def _encoder_known(workspace: Workspace, tracker: "Tracker", task: str) -> bool:
    """Whether the encoder of a task's new model is a version already."""
    from ringmo.registry import bundle

    meta = bundle.load_meta(workspace.work(f"finetune@{task}") / "model")
    encoder = meta["lineage"].get("encoder")
    return tracker.of_bundle("encoder", encoder) is not None


def _encoder_of(tracker: "Tracker", version: "Version") -> str | None:
    """The encoder that a version stands on; its own name, if it is one."""
    if version.model == "encoder":
        return str(version)
    found = tracker.of_bundle("encoder", version.tags.get("encoder_hash"))
    return str(found) if found else version.tags.get("encoder_version")


def registered(config: Config, workspace: Workspace, task: str) -> bool:
    """Whether just this model was registered and judged under just these rules before.

    A verdict that somebody still has to act on counts as long as the champion is the one that it
    was found against.
    """
    from ringmo.registry.tracker import Tracker

    report = Report.read(workspace.report_file(f"register@{task}"))
    if report is None or report.figures.get("key") != _registration_key(config, workspace, task):
        return False
    if passed(workspace, task) is None:
        return True
    champion = Tracker(workspace).aliased(task, "champion")
    return bool(report.figures["against"] == (str(champion) if champion else None))


def _registration_key(config: Config, workspace: Workspace, task: str) -> str:
    lock = workspace.root / "dvc.lock"
    return digest(
        task,
        lock.read_text() if lock.exists() else "",
        config.gate,
        os.environ.get("MLFLOW_TRACKING_URI", ""),
    )


def heads(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Each task's model on the old encoder and on the new one, before any of them is promoted.

    Keys: task, champion and candidate, the encoder that each stands on, what both reach on the same
    test tiles by `metric` in `unit`, the difference (above 0 the candidate is better), the bound
    (95 %, one-sided) that it is not below where the gate found one, and the verdict. In MLflow
    they are a table of the candidate encoder's run.
    """
    from ringmo import tasks
    from ringmo.registry.tracker import Tracker

    rows = []
    for task in labelled(config, workspace):
        report = Report.read(workspace.report_file(f"register@{task}"))
        if report is None or "verdict" not in report.figures:
            continue
        made, kind = report.figures, tasks.find(task)
        metric = config.gate[task].metric or kind.metric
        new, old = made.get(f"candidate_{metric}"), made.get(f"champion_{metric}")
        difference = made.get("difference_to_champion")
        if difference is None and new is not None and old is not None:
            difference = kind.gain(metric, new) - kind.gain(metric, old)
        rows.append(
            {
                "task": task,
                "champion": made["against"],
                "champion_encoder": made["against_encoder"],
                "candidate": made["model"],
                "candidate_encoder": made["encoder"],
                "metric": metric,
                "unit": kind.unit(metric),
                "champion_value": old,
                "candidate_value": new,
                "difference": difference,
                "difference_low": made.get("difference_to_champion_low"),
                "tiles": made.get("gate_tiles"),
                "verdict": made["verdict"],
            }
        )
    tracker = Tracker(workspace)
    encoder = _registered_encoder(workspace, tracker)
    if rows and encoder is not None and encoder.run_id:
        tracker.log_table(encoder.run_id, "heads", rows)
    return rows


def keep_heads(config: Config, workspace: Workspace, rows: list[dict[str, Any]]) -> None:
    """Write `heads` to .ringmo/reports/heads.json: it has been shown."""
    write_json(_heads_file(workspace), {"key": _heads_key(config, workspace), "rows": rows})


def _registered_encoder(workspace: Workspace, tracker: "Tracker") -> "Version | None":
    """The version that the workspace's encoder is."""
    report = Report.read(workspace.report_file("register@encoder"))
    name = report.figures.get("model") if report else None
    return next((v for v in tracker.versions("encoder") if str(v) == name), None)


def heads_shown(config: Config, workspace: Workspace) -> bool:
    """Whether the table of `heads` is of just these registrations."""
    try:
        kept = json.loads(_heads_file(workspace).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return bool(kept.get("key") == _heads_key(config, workspace))


def _heads_file(workspace: Workspace) -> Path:
    return workspace.report_file("heads")


def _heads_key(config: Config, workspace: Workspace) -> str:
    reports = [workspace.report_file(f"register@{model}") for model in ends(config, workspace)]
    return digest([path.read_text() if path.exists() else "" for path in reports])


def heads_table(rows: list[dict[str, Any]]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The rows of `heads` as cells, and the columns' names."""

    def on(row: dict[str, Any], which: str) -> str:
        if row[which] is None:
            return "none"
        value = console.figure(row[f"{which}_value"], row["unit"])
        return f"{row[which]} on {row[f'{which}_encoder'] or 'an unknown encoder'}: {value}"

    def difference(row: dict[str, Any]) -> str:
        low, unit = row["difference_low"], row["unit"]
        said = console.figure(row["difference"], unit, points=True)
        if row["difference"] is None or low is None:
            return said
        return f"{said} (95 %: over {console.figure(low, unit, points=True)})"

    cells: list[tuple[str, ...]] = [
        (
            f"{row['task']}, {row['metric']}",
            on(row, "champion"),
            on(row, "candidate"),
            difference(row),
            row["verdict"],
        )
        for row in rows
    ]
    return cells, ("task", "champion", "candidate", "difference", "gate")


def heads_markdown(rows: list[dict[str, Any]]) -> str:
    cells, names = heads_table(rows)
    lines = [names, ("---",) * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def passed(workspace: Workspace, model: str) -> tuple[str, list[str]] | None:
    """The version that its gate let pass and nobody ever promoted, and the gate's reasons.

    So a version is promoted by itself at most once: what a person rolled back stays rolled back.
    """
    from ringmo.registry import promotion
    from ringmo.registry.tracker import Tracker

    report = Report.read(workspace.report_file(f"register@{model}"))
    if report is None or report.figures.get("verdict") != "passed":
        return None
    promotion.settle(workspace, model)
    version: str = report.figures["model"]
    champion = Tracker(workspace).aliased(model, "champion")
    moved = {f"{model}/{row['to']}" for row in promotion.history(workspace, model)}
    if version in moved or version == str(champion):
        return None
    return version, report.figures["verdict_reasons"]


def left_behind(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Champions on another encoder than the champion encoder that no run here brings onto it.

    Keys: model, encoder (that it stands on), champion_encoder, next (arguments of `ringmo`; None
    where this workspace has no labels for it).
    """
    from ringmo.registry.tracker import Tracker

    tracker = Tracker(workspace)
    encoder = tracker.aliased("encoder", "champion")
    if encoder is None:
        return []
    encoders = {one.bundle_hash: one for one in tracker.versions("encoder")}
    made_here = str(_registered_encoder(workspace, tracker)) == str(encoder)
    ours = labelled(config, workspace)
    select = Report.read(workspace.work("select") / "report.json")
    could = [*ours, *(select.figures.get("other_tasks", []) if select else [])]
    rows: list[dict[str, Any]] = []
    for task in tracker.models():
        champion = None if task == "encoder" else tracker.aliased(task, "champion")
        if champion is None or champion.tags.get("encoder_hash") == encoder.bundle_hash:
            continue
        stands = encoders.get(champion.tags.get("encoder_hash", ""))
        ahead = stands is not None and stands.version > encoder.version
        if ahead and stands is not None and stands.tags.get("verdict") == "refused":
            continue  # its own gate found it better, whatever the encoder's said
        if made_here and task in ours:
            continue  # this run tried, and its gate refused
        more = "" if made_here else " --set pretrain.refresh=champion"
        rows.append(
            {
                "model": str(champion),
                "encoder": _encoder_of(tracker, champion),
                "champion_encoder": str(encoder),
                "next": f"run --task {' '.join(dict.fromkeys([*ours, task]))}{more}"
                if task in could
                else None,
            }
        )
    return rows


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


def summary(
    config: Config,
    workspace: Workspace,
    cached: dict[str, bool],
    failed: dict[str, str],
) -> dict[str, Any]:
    """What came out of a run, from the reports that its stages left.

    failed: model → why its registration or promotion was refused.
    """
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
        "heads": json.loads(_heads_file(workspace).read_text())["rows"],
        "left_behind": left_behind(config, workspace),
        "failed": failed,
    }
    refused = list(failed)
    for task in ends(config, workspace):
        report = Report.read(workspace.report_file(f"register@{task}"))
        made = report.figures if report else {}
        champion = next(
            (row for row in listing.models(workspace, task) if "champion" in row["aliases"]), None
        )
        new = not cached.get(f"register@{task}", True)
        if new and made.get("verdict") == "refused":
            refused.append(task)
        result["tasks"][task] = {
            **figures(f"evaluate@{task}"),
            **{k: v for k, v in made.items() if k != "key"},
            "champion": f"{task}/{champion['version']}" if champion else None,
            "promoted": not cached.get(f"promote@{task}", True)
            and champion is not None
            and made.get("model") == f"{task}/{champion['version']}",
            "waits": config.promotion.approval == "person" and passed(workspace, task) is not None,
        }
    everything_cached = all(cached.values()) if cached else False
    result["outcome"] = "Refused" if refused else "Unchanged" if everything_cached else "Completed"
    result["headline"] = (
        f"refused: {', '.join(dict.fromkeys(refused))}; there the champion stays"
        if refused
        else "nothing changed, nothing was done"
        if everything_cached
        else "done"
    )
    result["exit_code"] = 1 if refused else 0
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
            if figures.get("waits"):
                yes = f"{result.get('command', 'ringmo')} promote {figures['model']} --by NAME"
                rows.append(("  waits for a yes", f"in Prefect, or `{yes}`"))
            rows += [("", f"  {reason}") for reason in figures.get("verdict_reasons", [])]
        if task in result["failed"]:
            rows.append((f"Model, {task}", f"REFUSED: {result['failed'][task]}"))
    for row in result["left_behind"]:
        todo = f"`{result.get('command', 'ringmo')} {row['next']}`"
        todo = todo if row["next"] else "no tile here has its labels"
        on = f"still on {row['encoder'] or 'an unknown encoder'}, not {row['champion_encoder']}"
        rows.append((row["model"], f"{on}: {todo}"))
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
    parts = [console.table(summary_rows(result))]
    if any(row["champion"] for row in result["heads"]):
        parts.append(console.table(*heads_table(result["heads"])))
    parts.append(f"Next: {following}\n      {more}")
    return "\n" + "\n\n".join(parts)


def summary_markdown(result: dict[str, Any]) -> str:
    rows = [f"| {name} | {text.strip()} |" for name, text in summary_rows(result)]
    return "\n".join(["| | |", "|---|---|", *rows])
