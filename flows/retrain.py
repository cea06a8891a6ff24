"""The retraining chain: new imagery in at one end, the better model in production at the other."""

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.stages import StageFailed, as_task, command, execute, together
from ringmo import chain
from ringmo.config import Config
from ringmo.data import versions
from ringmo.registry import forward
from ringmo.workspace import Workspace


@flow(name="retrain", description=__doc__, persist_result=False)
def retrain(workspace: str, reason: str = "by hand") -> Any:
    """Ingest, every stage of dvc.yaml that changed, register, gate, promote, push.

    Args:
        workspace: the workspace's folder on the worker's machine.
        reason: why it runs; kept with the models it makes.
    """
    place = Workspace.find(workspace)
    config = Config.load(place.params_file)
    versions.sync_revisions(place)
    tags = {"flow_run": str(flow_run.id or ""), "reason": reason}
    forward.forward_all(place)
    about = tags | {"flow_run_url": flow_run.ui_url}
    try:
        with forward.ChainRun(place, config, about) as parent:
            summary = _chain(config, place, tags)
            parent.finish(summary, chain.summary_markdown(summary))
    except StageFailed as error:
        return Failed(message=error.reason, data=error)
    create_markdown_artifact(
        key="summary", markdown=chain.summary_markdown(summary), description="What came out"
    )
    return Completed(name=summary["outcome"], message=summary["headline"], data=summary)


def _chain(config: Config, place: Workspace, tags: dict[str, str]) -> dict[str, Any]:
    root = str(place.root)
    cached: dict[str, bool] = {}
    ingest: Any = as_task(config, command, "ingest", "New imagery into the tile store")
    ingested = ingest(root, "ingest", ["ingest"])
    tags = tags | {"data_version": ingested["figures"]["data_version"]}

    changes = versions.changed(place)
    left = versions.stages(place)
    while left:
        # All that can run now; what these make ready comes after the last of them.
        names = {stage.name for stage in left}
        ready = [stage for stage in left if not names & set(stage.upstream)]
        left = [stage for stage in left if stage not in ready]
        calls = []
        for stage in ready:
            if not _wanted(config, place, stage.name):
                continue
            why = list(changes.get(stage.name, []))
            if not why and any(not cached.get(name, True) for name in stage.upstream):
                why = ["a stage before it ran"]
            step = as_task(config, execute, stage.name, stage.desc)
            calls.append((stage.name, step, (root, stage.name, why, tags)))
        for name, state in together(calls, config.run.side_by_side):
            cached[name] = state.name == "Cached"

    for task in chain.ends(config, place):
        if chain.registered(config, place, task):
            cached[f"register@{task}"] = True
            continue
        about = "A version in the registry, the gate, production"
        end: Any = as_task(config, command, f"register@{task}", about)
        end(root, f"register@{task}", ["register", task, "--flow-run", tags["flow_run"]])
        cached[f"register@{task}"] = False
    chain.push(config, place)
    return chain.summary(config, place, cached)


def _wanted(config: Config, place: Workspace, stage: str) -> bool:
    """A task without labels has no stages; without any, the chain ends after the encoder."""
    _, at, task = stage.partition("@")
    return not at or task in chain.labelled(config, place)
