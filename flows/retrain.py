"""The retraining chain: new imagery in at one end, the better model in production at the other."""

import enum
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows import approval, notices, pages, turns, watch
from flows.stages import StageFailed, as_task, command, execute, patiently, show, together
from ringmo import chain, chain_lock, config, console, tasks
from ringmo.config import Config
from ringmo.data import versions
from ringmo.errors import BadInput
from ringmo.registry import forward, outbox
from ringmo.workspace import Workspace, template

# The files are the names: no type checker sees the members.
Task = enum.StrEnum("Task", tasks.names())  # type: ignore[misc]
Recipe = enum.StrEnum(  # type: ignore[misc]
    "Recipe", sorted(path.stem for path in template("recipes").glob("*.yaml"))
)


class Settings(BaseModel):
    """What to change in params.yaml before the run, as `ringmo run` does; it stays changed."""

    model_config = ConfigDict(extra="forbid")

    data: str | None = Field(
        default=None,
        pattern=r"^(/|s3://[^/]+|generated$)",
        description="Imagery: a folder or list on the worker's machine from / on, or "
        "s3://BUCKET/PREFIX. It takes the place of ingest.sources.",
    )
    tasks: list[Task] | None = Field(default=None, description="What to fine-tune for.")
    recipe: Recipe | None = Field(default=None, description="A named set of values.")
    refresh: Literal["full", "keep", "continue", "champion"] | None = Field(
        default=None, description="Whether new imagery enters the encoder (pretrain.refresh)."
    )

    def changes(self) -> dict[str, Any]:
        """Values by dotted key of params.yaml.

        Raises:
            BadInput: no such data on this machine.
        """
        found: dict[str, Any] = {}
        if self.recipe:
            found |= config.recipe(template("recipes") / f"{self.recipe}.yaml")
        if self.tasks:
            found["tasks"] = [str(task) for task in dict.fromkeys(self.tasks)]
        if self.refresh:
            found["pretrain.refresh"] = self.refresh
        if self.data:
            if self.data.startswith("/") and not Path(self.data).exists():
                raise BadInput(
                    f"settings.data: {self.data}: no such folder on the worker's machine"
                )
            found["ingest.sources"] = [self.data]
        return found


@flow(
    name="retrain",
    description=__doc__,
    persist_result=False,
    on_failure=[notices.failed],
    on_crashed=[notices.failed],
)
def retrain(
    workspace: str,
    reason: str = "by hand",
    settings: Settings = Settings(),  # noqa: B008 (a form's defaults)
    anew: bool = False,
) -> Any:
    """Ingest, every stage of dvc.yaml that changed, register and judge all, promote, push.

    Args:
        workspace: the workspace's folder on the worker's machine.
        reason: why it runs; kept with the models it makes.
        settings: what to change in params.yaml first.
        anew: in this run the encoder is trained anew, from all imagery, also where
            pretrain.refresh is keep or continue.
    """
    place = Workspace.find(workspace)
    loaded = Config.load(place.params_file)
    if (missed := turns.take(loaded, replace=loaded.schedule.overlap == "replace")) is not None:
        return missed
    run = str(flow_run.id or "")
    with chain_lock.alone(place, run) as before:
        if before.dead:
            watch.bury(before.dead, run)
        elif before.awaited == run and (end := watch.end_of(run)):
            return end
        with watch.followed(run):
            try:
                config.edit(place.params_file, settings.changes())
            except BadInput as error:
                return Failed(message=str(error), data=error)
            return _run(place, {"flow_run": run, "reason": reason}, anew)


def _run(place: Workspace, tags: dict[str, str], anew: bool) -> Any:
    config = Config.load(place.params_file)
    versions.sync_revisions(place)
    patiently(config, chain.bring_champion, config, place)
    about = tags | {"flow_run_url": flow_run.ui_url}
    try:
        with forward.ChainRun(place, config, about) as parent:
            # After that: a run that goes on would else be told MLflow as one that was killed.
            forward.forward_all(place)
            outbox.deliver(place, config.promotion)
            summary = _chain(config, place, tags, anew)
            parent.finish(summary, chain.summary_markdown(summary))
    except StageFailed as error:
        return Failed(message=error.reason, data=error)
    markdown = chain.summary_markdown(summary)
    show(create_markdown_artifact, key="summary", markdown=markdown, description="What came out")
    if summary["outcome"] == "Refused":
        _tell_refused(place, summary)
    return Completed(name=summary["outcome"], message=summary["headline"], data=summary)


def _tell_refused(place: Workspace, summary: dict[str, Any]) -> None:
    lines = [f"{model}: {why}" for model, why in summary["failed"].items()]
    for model, made in summary["tasks"].items():
        fresh = summary["stages"].get(f"register@{model}") == "done"
        if fresh and made.get("verdict") == "refused":
            lines.append(f"{made['model']}, and {made['champion'] or 'none'} stays champion:")
            lines += [f"  {reason}" for reason in made["verdict_reasons"]]
    notices.tell(str(place.root), "refused", summary["headline"], lines, pages.of_run(flow_run.id))


def _chain(config: Config, place: Workspace, tags: dict[str, str], anew: bool) -> dict[str, Any]:
    root = str(place.root)
    cached: dict[str, bool] = {}
    ingest: Any = as_task(config, command, "ingest", "New imagery into the tile store")
    ingested = ingest(root, "ingest", ["ingest"])
    tags = tags | {"data_version": ingested["figures"]["data_version"]}

    changes = versions.changed(place)
    if anew and chain.take_all(config, place):
        changes.setdefault("select", []).append(versions.ANEW)
    left = versions.stages(place)
    while left:
        # All that can run now; what these make ready comes after the last of them.
        names = {stage.name for stage in left}
        ready = [stage for stage in left if not names & set(stage.upstream)]
        left = [stage for stage in left if stage not in ready]
        pretrains = any(stage.name == "pretrain" for stage in ready)
        if pretrains and patiently(config, chain.bring_start, config, place, anew):
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
        yes = f"Yes or no: {page or 'in Prefect'}, or `ringmo promote {ref} --by NAME`"
        said = [*reasons, yes, f"After {config.promotion.wait_h:g} hours: not promoted"]
        notices.tell(str(place.root), "approval", f"{ref} waits for a person's word", said, page)
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
