"""A stage of the chain as a Prefect task: retried, limited in time, linked to its MLflow run."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from flows import progress
from flows.slots import slot
from ringmo import console, services
from ringmo.config import Config
from ringmo.data import versions
from ringmo.environment import shown
from ringmo.errors import AnswerIsNo, BadInput, RingmoError, Unreachable
from ringmo.process_group import GroupEnded, begin, end_all, run_group
from ringmo.registry.forward import Forwarder
from ringmo.stage import Report, forget_checkpoints
from ringmo.workspace import Workspace

# So often a step is tried again when something outside did not answer, after waits that double:
# ten minutes with run.retry_delay_s of 10.
OUTAGE_TRIES = 6


T = TypeVar("T")


class StageFailed(Exception):
    """A stage ended badly. `retry`: whether doing it again can help; `exit_code`: what to tell;
    `crashed`: it died before it could say anything."""

    def __init__(self, reason: str, exit_code: int, retry: bool, crashed: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.exit_code, self.retry, self.crashed = reason, exit_code, retry, crashed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.exit_code, self.retry, self.crashed)


def worth_a_retry(retries: int) -> Callable[[Task[..., Any], TaskRun, State[Any]], bool]:
    """Whether a step is done again: so often after a crash, and for a while when something outside
    does not answer. A refusal or bad input would only be refused again, and what was ended with the
    whole run is not begun once more."""

    def worth(_task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
        error = state.result(raise_on_failure=False)
        if isinstance(error, GroupEnded):
            return False
        if isinstance(error, StageFailed):
            return error.retry and (not error.crashed or run.run_count <= retries)
        return isinstance(error, Unreachable) or run.run_count <= retries

    return worth


def waits(config: Config) -> list[float]:
    """Seconds before each further try."""
    tries = max(config.run.retries, OUTAGE_TRIES)
    return [config.run.retry_delay_s * 2.0 ** min(n, OUTAGE_TRIES) for n in range(tries)]


def patiently(config: Config, call: Callable[..., T], *arguments: Any) -> T:
    """What the chain asks of the world between its steps, asked again while nothing answers.

    Raises:
        Unreachable: after the last try.
    """
    for wait in waits(config)[:OUTAGE_TRIES]:
        try:
            return call(*arguments)
        except Unreachable as error:
            console.note(f"{error}: asked again in {wait:.0f} s")
            time.sleep(wait)
    return call(*arguments)


def show(create: Callable[..., Any], **content: Any) -> None:
    """An artifact of the flow run. It tells people of work that is done: without Prefect's server
    it is not worth doing that again."""
    try:
        create(**content)
    except Exception as error:  # of whatever it is made of: HTTP, time limits, settings
        console.note(f"Prefect did not take {content['key']}: {type(error).__name__}: {error}")


def as_task(
    config: Config, kind: Task[..., Any], name: str, description: str = ""
) -> Task[..., Any]:
    """The Prefect task of a step: `execute` for a stage of dvc.yaml, `command` for the ends."""
    return kind.with_options(
        name=name,
        description=description,
        task_run_name=name,
        retries=len(waits(config)),
        retry_delay_seconds=waits(config),
        retry_condition_fn=worth_a_retry(config.run.retries),
        timeout_seconds=config.run.stage_time_limit_min * 60,
    )


@task(cache_policy=NO_CACHE, log_prints=False)
def execute(
    workspace_root: str, name: str, changed: list[str], tags: dict[str, str], slots: int = 1
) -> Any:
    """Run one stage if it changed, and follow it. Returns its report as a dict.

    changed: why it must run (DVC's words), empty when nothing did. slots: how many stages run at a
    time, each on its share of the machine.
    """
    workspace = Workspace.find(workspace_root)
    config = Config.load(workspace.params_file)
    if not changed:
        report = Report.read(workspace.work(name) / "report.json")
        _show_validation(workspace, name, None)
        return Completed(
            name="Cached", message="unchanged", data=asdict(report) if report else None
        )
    console.note(f"\n── {name}")
    workspace.report_file(name).unlink(missing_ok=True)
    command = versions.repro_command(workspace, name, changed)
    with (
        slot(config, name, slots) as own,
        Forwarder(workspace, name, tags, own.get("CUDA_VISIBLE_DEVICES")) as forwarder,
        progress.shown(workspace, name),
    ):
        status = run_group(
            command,
            workspace.root,
            services.environment(workspace) | own,
            config.run.grace_s,
            follow=get_run_logger().info,
            started=forwarder.measure,
        )
        report = Report.read(workspace.report_file(name))
        if report is None and status == 0:
            # DVC found, after all, that nothing it depends on changed.
            report = Report.read(workspace.work(name) / "report.json")
            _show_validation(workspace, name, None)
            return Completed(
                name="Cached", message="unchanged", data=asdict(report) if report else None
            )
        if report is not None:
            forwarder.finish(report, workspace.work(name))
    if forwarder.url:
        show(
            create_link_artifact,
            link=forwarder.url,
            link_text=f"{name} in MLflow",
            key=f"mlflow-{name.replace('@', '-')}",
            description=f"Figures and pictures of {name}",
        )
    # Before a refusal ends the task: it is then that somebody looks.
    if report is not None and report.exit_code in (0, 1):
        _show_validation(workspace, name, forwarder.url)
    checked = _checked(name, report, status)
    if report is not None:
        forget_checkpoints(workspace, report)
    return checked


@task(cache_policy=NO_CACHE)
def command(workspace_root: str, name: str, arguments: list[str]) -> Any:
    """Run one of the chain's two ends, a `ringmo` command of its own, apart. Returns its report."""
    workspace = Workspace.find(workspace_root)
    config = Config.load(workspace.params_file)
    console.note(f"\n── {name}")
    workspace.report_file(name).unlink(missing_ok=True)
    status = run_group(
        [sys.executable, "-m", "ringmo", *arguments, "--workspace", workspace_root],
        workspace.root,
        services.environment(workspace),
        config.run.grace_s,
        follow=get_run_logger().info,
    )
    report = Report.read(workspace.report_file(name))
    checked = _checked(name, report, status, allowed=(0, 1))
    if reasons := checked["figures"].get("verdict_reasons"):
        show(
            create_markdown_artifact,
            key=f"verdict-{name.replace('@', '-')}",
            markdown="\n".join(f"- {reason}" for reason in reasons),
            description=f"The gate's verdict: {checked['figures'].get('verdict')}",
        )
    return checked


def _show_validation(workspace: Workspace, name: str, url: str | None) -> None:
    """The verdict on the data as an artifact of the flow run, with links where a server has it."""
    if name != "validate":
        return
    from ringmo.data import data_docs

    work = workspace.work(name)
    verdict = json.loads((work / "verdict.json").read_text())

    def link(page: str) -> str:
        if url is None:
            return f"`{work / 'docs' / page}`"
        return f"[{page.split('/')[-1]}]({url}/artifacts/docs/{page})"

    show(
        create_markdown_artifact,
        key="validation",
        markdown=data_docs.markdown(verdict, link),
        description="The rules that the data version was judged by",
    )


Call = tuple[str, Any, tuple[Any, ...]]  # a stage's name, its task and arguments


def together(calls: Sequence[Call], slots: int) -> Iterator[tuple[str, State[Any]]]:
    """Run stages, so many at a time, and give each one's last state.

    When one fails, those beside it may finish: their work is kept, and not done again.

    Raises:
        StageFailed: the first that failed, when all have ended.
    """
    begin()
    failed: BaseException | None = None
    waiting = [(name, _begun(calls, i, slots)) for i, (name, _, _) in enumerate(calls)]
    try:
        for name, end in waiting:
            state = end()
            if state.is_failed() or state.is_crashed() or state.is_cancelled():
                error = state.result(raise_on_failure=False)
                known = isinstance(error, BaseException)
                failed = failed or (error if known else StageFailed(str(error), 3, True))
                if slots == 1:
                    break
            else:
                yield name, state
    except BaseException:
        end_all()
        raise
    if failed is not None:
        raise failed


def _begun(calls: Sequence[Call], i: int, slots: int) -> Callable[[], State[Any]]:
    """What gives a stage's last state. With one slot it runs then, in this thread; else now."""
    _, step, arguments = calls[i]
    if slots == 1 or len(calls) == 1:
        return lambda: step(*arguments, return_state=True)
    future = step.submit(*arguments, slots=slots)

    def end() -> State[Any]:
        future.wait()
        state: State[Any] = future.state
        return state

    return end


def _checked(
    name: str, report: Report | None, status: int, allowed: tuple[int, ...] = (0,)
) -> dict[str, Any]:
    if report is None:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        raise StageFailed(f"{name} ended without a report ({how})", 3, retry=True, crashed=True)
    if report.exit_code not in allowed:
        raise StageFailed(report.reason or f"{name} failed", report.exit_code, report.retry)
    return asdict(report)


def as_ringmo_error(error: BaseException) -> RingmoError:
    """The error that the command line speaks, for one that came out of a flow."""
    if isinstance(error, StageFailed):
        kinds = {1: AnswerIsNo, 3: Unreachable}
        return kinds.get(error.exit_code, BadInput)(error.reason)
    if isinstance(error, RingmoError):
        return error
    said = (str(error).splitlines() or [""])[0]
    return Unreachable(shown(f"the flow ended early: {type(error).__name__}: {said}"))
