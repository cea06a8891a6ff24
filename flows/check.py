"""The data checked every night: do the sources answer, what is new, does it keep the rules.

What is new is taken into the tile store and judged, so that whoever trains next knows beforehand
that it can, and finds the reading done. Nothing is trained.
"""

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import notices, turns
from flows.stages import StageFailed, as_task, command, execute
from ringmo.config import Config
from ringmo.data import versions
from ringmo.data.look import Look, look
from ringmo.workspace import Workspace


@flow(
    name="ringmo-check",
    description=__doc__,
    persist_result=False,
    on_failure=[notices.failed],
    on_crashed=[notices.failed],
)
def ringmo_check(workspace: str) -> Any:
    """List the sources, take in what is new, and judge the data by the rules of params.yaml.

    Args:
        workspace: the workspace's folder on the worker's machine.
    """
    place = Workspace.find(workspace)
    config = Config.load(place.params_file)
    if (missed := turns.take(config)) is not None:
        return missed
    busy: Any = Completed(name="skipped", message="a retraining goes on, which does the same")
    if turns.running("retrain", str(place.root)):
        return busy
    seen = look(config, place)
    if seen is None:
        return busy
    create_markdown_artifact(key="sources", markdown=_table(seen), description="What they hold")
    if seen.errors:
        return Failed(message="; ".join(seen.errors))
    versions.sync_revisions(place)
    root = str(place.root)
    tags = {"flow_run": str(flow_run.id or ""), "reason": "check"}
    try:
        if seen.new or seen.gone or versions.data_version(place) is None:
            step: Any = as_task(config, command, "ingest", "New imagery into the tile store")
            ingested = step(root, "ingest", ["ingest"])
            tags |= {"data_version": ingested["figures"]["data_version"]}
        changes = versions.changed(place)
        judge: Any = as_task(config, execute, "validate", "The rules a data version must pass")
        judge(root, "validate", list(changes.get("validate", [])), tags)
    except StageFailed as error:
        return Failed(message=error.reason, data=error)
    said = f"{seen.new} new images, {seen.gone} gone; the rules hold"
    name = "new imagery" if seen.new or seen.gone else "nothing new"
    return Completed(name=name, message=said)


def _table(seen: Look) -> str:
    lines = ["| source | images | new | gone | |", "|---|---:|---:|---:|---|"]
    for row in seen.sources:
        counts = ("-" if row[n] is None else str(row[n]) for n in ("images", "new", "gone"))
        cells = (f"`{row['source']}`", *counts, row["error"] or "answers")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
