"""The retraining chain: new imagery in at one end, the better model in production at the other."""

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import approval, watch
from flows.stages import StageFailed, as_task, command, execute, patiently, show, together
from ringmo import chain, chain_lock, console
from ringmo.config import Config
from ringmo.data import versions
from ringmo.registry import forward
from ringmo.workspace import Workspace


@flow(name="retrain", description=__doc__, persist_result=False)
def retrain(workspace: str, reason: str = "by hand") -> Any:
    """Ingest, every stage of dvc.yaml that changed, register and judge all, promote, push.

    Args:
        workspace: the workspace's folder on the worker's machine.
        reason: why it runs; kept with the models it makes.
    """
    place = Workspace.find(workspace)
    run = str(flow_run.id or "")
    with chain_lock.alone(place, run) as dead:
        if dead:
            watch.bury(dead, run)
        with watch.followed(run):
            return _run(place, {"flow_run": run, "reason": reason})


def _run(place: Workspace, tags: dict[str, str]) -> Any:
    config = Config.load(place.params_file)
    versions.sync_revisions(place)
    patiently(config, chain.bring_champion, config, place)
    about = tags | {"flow_run_url": flow_run.ui_url}
    try:
        with forward.ChainRun(place, config, about) as parent:
            # After that: a run that goes on would else be told MLflow as one that was killed.
            forward.forward_all(place)
            summary = _chain(config, place, tags)
            parent.finish(summary, chain.summary_markdown(summary))
    except StageFailed as error:
        return Failed(message=error.reason, data=error)
    markdown = chain.summary_markdown(summary)
    show(create_markdown_artifact, key="summary", markdown=markdown, description="What came out")
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
        pretrains = any(stage.name == "pretrain" for stage in ready)
        if pretrains and patiently(config, chain.bring_start, config, place):
            changes = versions.changed(place)
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

    failed = _registered(config, place, tags, cached)
    _promoted(config, place, cached, failed)
    patiently(config, chain.push, config, place)
    return patiently(config, chain.summary, config, place, cached, failed)


def _registered(
    config: Config, place: Workspace, tags: dict[str, str], cached: dict[str, bool]
) -> dict[str, str]:
    """Register and judge the encoder and each task's model, and then show them side by side.

    One that is refused stops none of the others. Returns model → why it could not be registered.
    """
    failed: dict[str, str] = {}
    for model in chain.ends(config, place):
        name = f"register@{model}"
        cached[name] = patiently(config, chain.registered, config, place, model)
        if not cached[name]:
            arguments = ["register", model, "--flow-run", tags["flow_run"]]
            about = "A version in the registry, and its gate's verdict"
            if reason := _refused(config, place, name, about, arguments):
                failed[model] = reason
    if not chain.heads_shown(config, place):
        if rows := patiently(config, chain.heads, config, place):
            show(
                create_markdown_artifact,
                key="heads",
                markdown=chain.heads_markdown(rows),
                description="Each task's model on the old encoder and on the new one",
            )
        chain.keep_heads(config, place, rows)
    return failed


def _promoted(
    config: Config, place: Workspace, cached: dict[str, bool], failed: dict[str, str]
) -> None:
    """Put forward what passed: the encoder first, since it is a version before any model on it."""
    for model in chain.ends(config, place):
        if model in failed:
            continue
        if (waits := patiently(config, chain.passed, place, model)) is None:
            cached[f"promote@{model}"] = True
        elif reason := _put_forward(config, place, *waits):
            failed[model] = reason
        else:
            cached[f"promote@{model}"] = False


def _put_forward(config: Config, place: Workspace, ref: str, reasons: list[str]) -> str | None:
    """What happens to a version that passed its gate, once: it becomes champion, or a person is
    asked (promotion.approval).

    Returns:
        Why it did not.
    """
    if config.promotion.approval == "person":
        page = patiently(config, approval.ask, place, ref, reasons)
        console.note(f"{ref} waits for a person: {page or 'ringmo promote ' + ref}")
        return None
    name = f"promote@{ref.partition('/')[0]}"
    arguments = ["promote", ref, "--by", "gate", "--reason", "; ".join(reasons)]
    return _refused(config, place, name, "The better model in production", arguments)


def _refused(
    config: Config, place: Workspace, name: str, about: str, arguments: list[str]
) -> str | None:
    """Run one of the chain's last steps; why it cannot be done, where doing it again cannot help.

    Raises:
        StageFailed: something outside did not answer, or it crashed.
    """
    step: Any = as_task(config, command, name, about)
    try:
        reason: str | None = step(str(place.root), name, arguments)["reason"]
    except StageFailed as error:
        if error.exit_code not in (1, 2):
            raise
        reason = error.reason
    return reason


def _wanted(config: Config, place: Workspace, stage: str) -> bool:
    """A task without labels has no stages; without any, the chain ends after the encoder."""
    _, at, task = stage.partition("@")
    return not at or task in chain.labelled(config, place)
