"""Whole scenes answered by the champion, as files: when it is another one, by the clock, by hand.

What `ringmo predict` writes lies in scenes.out/TASK-VERSION/. Scenes that have their answer of this
version are not done again, so a run answers for those that are new to it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows import notices, turns
from flows.stages import StageFailed, as_task
from ringmo import services
from ringmo.config import Config
from ringmo.process_group import run_group
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

SHOWN = 50  # scenes in the artifact's table


@flow(
    name="ringmo-scenes",
    description=__doc__,
    persist_result=False,
    on_failure=[notices.failed],
    on_crashed=[notices.failed],
)
def ringmo_scenes(workspace: str, sources: list[str] | None = None) -> Any:
    """Answer for scenes with the champion of scenes.model.

    Args:
        workspace: the workspace's folder on the worker's machine.
        sources: files, folders, globs, s3://BUCKET/PREFIX; none: scenes.sources of params.yaml.
    """
    place = Workspace.find(workspace)
    config = Config.load(place.params_file)
    if (missed := turns.take(config)) is not None:
        return missed
    sources = sources or config.scenes.sources
    if not sources:
        return Completed(name="nothing to do", message="scenes.sources names none")
    name = config.scenes.model.partition("@")[0]
    champion = Tracker(place).aliased(name, "champion")
    if champion is None:
        return Completed(name="no champion", message=f"no {name} is champion yet")
    out = place.root / Path(config.scenes.out).expanduser() / f"{name}-{champion.version}"
    step: Any = as_task(config, answer, "predict", "The champion's answers, as files")
    try:
        rows = step(str(place.root), sources, str(champion), str(out))
    except StageFailed as error:
        return Failed(message=error.reason, data=error)
    bad = sum("error" in row for row in rows)
    create_markdown_artifact(
        key="scenes", markdown=_table(rows, out), description=f"What {champion} said of them"
    )
    said = f"{len(rows) - bad} answered by {champion} in {out}; {bad} could not be read"
    return Completed(name=str(champion), message=said)


@task(cache_policy=NO_CACHE)
def answer(workspace: str, sources: list[str], ref: str, out: str) -> list[dict[str, Any]]:
    """`ringmo predict`, apart. Returns its rows: image, what was said of it, or error."""
    place = Workspace.find(workspace)
    config = Config.load(place.params_file)
    lines: list[str] = []

    def follow(line: str) -> None:
        lines.append(line)
        get_run_logger().info(line)

    status = run_group(
        [
            *(sys.executable, "-m", "ringmo", "predict", "--model", ref, "--out", out),
            *("--workspace", workspace, "--", *sources),
        ],
        place.root,
        services.environment(place),
        config.run.grace_s,
        follow=follow,
    )
    if status:
        why = next((x for x in reversed(lines) if x.startswith("ringmo: ")), f"exit code {status}")
        raise StageFailed(why.removeprefix("ringmo: "), status, retry=status not in (1, 2))
    rows: list[dict[str, Any]] = json.loads((Path(out) / "predictions.json").read_text())
    return rows


def _table(rows: list[dict[str, Any]], out: Path) -> str:
    lines = [f"In `{out}`", "", "| image | |", "|---|---|"]
    for row in rows[:SHOWN]:
        said = row.get("error") or row.get("said") or row.get("label") or ""
        lines.append(f"| `{row['image']}` | {said} |")
    if len(rows) > SHOWN:
        lines.append(f"| … and {len(rows) - SHOWN} more | |")
    return "\n".join(lines)
