"""Registered models by name: the version that a REF means, and the table of versions."""

import re
import time
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.errors import BadInput
from ringmo.registry.tracker import CLEANED, Tracker, Version, bundle_hash
from ringmo.workspace import Workspace


def resolve(workspace: Workspace, ref: str, tracker: Tracker | None = None) -> Version:
    """The version that a REF names: `scene@champion`, `scene/7`, or a bundle's folder.

    Raises:
        BadInput: unknown; says what there is. Unreachable: MLflow does not answer.
    """
    named = re.fullmatch(r"([a-z][a-z0-9_-]*)(?:@([a-z]+)|/(\d+))", ref)
    if Path(ref).is_dir() and (not named or (Path(ref) / "model.json").exists()):
        return of_folder(Path(ref))
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


def of_folder(folder: Path) -> Version:
    """A bundle that was never registered, as far as it can tell of itself."""
    from ringmo.registry.bundle import load_meta

    meta = load_meta(folder)
    figures = {name: str(value) for name, value in meta["figures"].items()}
    about = {
        "bundle_hash": bundle_hash(folder),
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
    (Unix seconds), bundle_hash, cleaned (the day on which its files were removed, or None).
    """
    tracker = Tracker(workspace)
    names = [task] if task else tracker.models()
    return [_row(version) for name in names for version in tracker.versions(name)]


def _row(version: Version) -> dict[str, Any]:
    metric = metric_of(version)
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
        "cleaned": version.tags.get(CLEANED) or None,
    }


def metric_of(version: Version) -> str:
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
                ", ".join(row["aliases"]) or (row["cleaned"] and f"cleaned {row['cleaned']}") or "",
                figure(row),
                "" if row["scratch"] is None else console.figure(row["scratch"], row["unit"]),
                row["verdict"] or "",
                (row["data_version"] or "")[:8] + (" generated" if row["generated"] else ""),
                row["encoder"] or "",
                moment(row["created"]),
            )
            for row in rows
        ],
        ("model", "alias", "test tiles (95 %)", "scratch", "gate", "data", "encoder", "created"),
    )


def moment(seconds: float) -> str:
    """Unix seconds as people read them, in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
