"""From a model back to the pixels: which run, selection, encoder, data and code made it.

All of it is in the version's tags, so that it can be told without a commit and without the
workspace that made it; what the workspace knows of the data versions is added.
"""

import re
import time
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.errors import BadInput
from ringmo.registry.register import ENCODER
from ringmo.registry.tracker import Tracker, Version, run_url
from ringmo.workspace import Workspace


def resolve(workspace: Workspace, ref: str, tracker: Tracker | None = None) -> Version:
    """The version that a REF names: `scene@champion`, `scene/7`, or a bundle's folder.

    Raises:
        BadInput: unknown; says what there is. Unreachable: MLflow does not answer.
    """
    named = re.fullmatch(r"([a-z][a-z0-9_-]*)(?:@([a-z]+)|/(\d+))", ref)
    if Path(ref).is_dir() and (not named or (Path(ref) / "model.json").exists()):
        return _of_folder(Path(ref))
    if not named:
        raise BadInput(f"{ref}: no model's name (scene@champion, scene/7) and no bundle's folder")
    model, alias, number = named.groups()
    versions = (tracker or Tracker(workspace)).versions(model)
    for version in versions:
        if alias in version.aliases or (number and version.version == int(number)):
            return version
    if not versions:
        there = ", ".join((tracker or Tracker(workspace)).models()) or "none; next: ringmo run"
        raise BadInput(f"{ref}: no registered model `{model}` (there are: {there})")
    known = ", ".join(
        f"{version}" + "".join(f" @{alias}" for alias in version.aliases)
        for version in versions[:8]
    )
    raise BadInput(f"{ref}: no such version (there are: {known})")


def _of_folder(folder: Path) -> Version:
    """A bundle that was never registered, as far as it can tell of itself."""
    from ringmo.registry.bundle import load_meta

    meta = load_meta(folder)
    figures = {name: str(value) for name, value in meta["figures"].items()}
    about = {
        "kind": meta["kind"],
        "generated": str(bool(meta["generated"])).lower(),
        "selection": meta["lineage"].get("selection"),
        "encoder_hash": meta["lineage"].get("encoder"),
    }
    tags = figures | {name: value for name, value in about.items() if value is not None}
    created = (folder / "model.json").stat().st_mtime
    return Version(meta["kind"], 0, tags, (), "", str(folder.resolve()), created)


def models(workspace: Workspace, task: str | None = None) -> list[dict[str, Any]]:
    """Versions of one registered model, or of all, newest first.

    Keys: model, version, aliases, metric (the task's main figure), unit (% for a share), value,
    low, high, scratch (the same from scratch), verdict, data_version, encoder, generated, created
    (Unix seconds), bundle_hash.
    """
    tracker = Tracker(workspace)
    names = [task] if task else tracker.models()
    return [_row(version) for name in names for version in tracker.versions(name)]


def _row(version: Version) -> dict[str, Any]:
    metric = _metric(version)
    return {
        "model": version.model,
        "version": version.version,
        "aliases": list(version.aliases),
        "metric": metric,
        "unit": version.tags.get("unit", "%"),
        "value": version.figure(f"test_{metric}"),
        "low": version.figure(f"test_{metric}_low"),
        "high": version.figure(f"test_{metric}_high"),
        "scratch": version.figure(f"scratch_{metric}"),
        "verdict": version.tags.get("verdict"),
        "data_version": version.tags.get("data_version"),
        "encoder": version.tags.get("encoder_version"),
        "generated": version.generated,
        "created": version.created,
        "bundle_hash": version.bundle_hash,
    }


def _metric(version: Version) -> str:
    """The main figure; versions from before there were other tasks do not say it."""
    return version.tags.get("metric", "accuracy")


def models_text(rows: list[dict[str, Any]]) -> str:
    """The versions as a table for people."""

    def figure(row: dict[str, Any]) -> str:
        if row["value"] is None:
            return ""
        said = console.interval(row["value"], row["low"], row["high"], row["unit"])
        return f"{row['metric']} {said}"

    return console.table(
        [
            (
                f"{row['model']}/{row['version']}",
                ", ".join(row["aliases"]),
                figure(row),
                "" if row["scratch"] is None else console.figure(row["scratch"], row["unit"]),
                row["verdict"] or "",
                (row["data_version"] or "")[:8] + (" generated" if row["generated"] else ""),
                row["encoder"] or "",
                _time(row["created"]),
            )
            for row in rows
        ],
        ("model", "alias", "test tiles (95 %)", "scratch", "gate", "data", "encoder", "created"),
    )


def lineage(workspace: Workspace, ref: str) -> dict[str, Any]:
    """A model's origins, nested: each `from` holds what that part was made from.

    Each part has `what` (its kind), `name`, `facts` (name → value) and `from` (parts).

    Raises:
        BadInput: unknown reference. Unreachable: MLflow does not answer.
    """
    if Path(ref).is_dir() and (Path(ref) / "model.json").exists():
        return _model(workspace, None, _of_folder(Path(ref)))
    tracker = Tracker(workspace)
    return _model(workspace, tracker, resolve(workspace, ref, tracker))


def _model(workspace: Workspace, tracker: Tracker | None, version: Version) -> dict[str, Any]:
    tags = version.tags
    facts = {
        "aliases": ", ".join(version.aliases) or None,
        "created": _time(version.created),
        _metric(version): tags.get(f"test_{_metric(version)}"),
        "gate": tags.get("verdict") and f"{tags['verdict']}: {tags.get('verdict_reasons', '')}",
        "imagery": "generated" if version.generated else "real",
        "bundle": version.bundle_hash or None,
        "files": version.source,
    }
    code = {
        "commit": tags.get("code_version"),
        "tree": {"true": "clean", "false": "changed: see source.patch"}.get(
            tags.get("code_clean", "")
        ),
        "parameters": tags.get("params_digest"),
        "stage lock": tags.get("stage_lock"),
        "files": f"{version.source}/lineage" if version.version else None,
    }
    data = _data(workspace, tags.get("data_version"))
    selection = _part("selection", tags.get("selection"), {}, [data])
    made_from = [selection]
    if version.model == ENCODER or tags.get("kind") == ENCODER:
        training = "pre-training"
    else:
        training = "fine-tuning"
        made_from.append(_encoder(workspace, tracker, version))
    made_from = [
        _part(training, version.run_id or None, _run_facts(tracker, version), made_from),
        _part("code", tags.get("code_version"), code, []),
        _part("flow run", tags.get("flow_run"), {"reason": tags.get("reason")}, []),
    ]
    return _part("model", str(version), facts, made_from)


def _encoder(workspace: Workspace, tracker: Tracker | None, version: Version) -> dict[str, Any]:
    wanted = version.tags.get("encoder_hash")
    for encoder in tracker.versions(ENCODER) if tracker else []:
        if encoder.bundle_hash == wanted:
            return _model(workspace, tracker, encoder) | {"what": "encoder"}
    return _part("encoder", wanted and wanted[:16], {"registered": "no"} if wanted else {}, [])


def _run_facts(tracker: Tracker | None, version: Version) -> dict[str, Any]:
    run = tracker.run(version.run_id) if tracker and version.run_id else None
    if tracker is None or run is None:
        return {}
    return {
        "experiment": run.experiment,
        "run": run.name,
        "started": _time(run.started),
        "page": run_url(tracker.uri, tracker.experiment(run.experiment), run.id),
    }


def _data(workspace: Workspace, version: str | None) -> dict[str, Any]:
    """A data version with what the workspace's log knows of it."""
    from ringmo.data.versions import versions

    row: dict[str, Any] = next((r for r in versions(workspace) if r["version"] == version), {})
    names = ("time", "tiles", "classes", "labelled", "set_aside", "sources", "generated")
    return _part("data", version, {name: row.get(name) for name in names}, [])


def _part(
    what: str, name: str | None, facts: dict[str, Any], made_from: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "what": what,
        "name": name,
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "from": [part for part in made_from if part["name"] or part["from"]],
    }


def text(tree: dict[str, Any]) -> str:
    """The lineage as an indented tree, for people."""
    return "\n".join(_lines(tree, "", ""))


def _lines(part: dict[str, Any], first: str, rest: str) -> list[str]:
    lines = [f"{first}{part['what']}  {part['name'] or '(not recorded)'}"]
    bar = "│ " if part["from"] else "  "
    for name, value in part["facts"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"{rest}{bar}  {name}: {shown}")
    for i, child in enumerate(part["from"]):
        last = i == len(part["from"]) - 1
        lines += _lines(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
    return lines


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
