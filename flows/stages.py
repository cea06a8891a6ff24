"""A stage of the chain as a Prefect task: retried, limited in time, linked to its MLflow run."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from ringmo import console, services
from ringmo.config import Config
from ringmo.data import versions
from ringmo.environment import shown
from ringmo.errors import AnswerIsNo, BadInput, RingmoError, Unreachable
from ringmo.process_group import GroupEnded, begin, end_all, run_group
from ringmo.registry.forward import Forwarder
from ringmo.stage import Report, forget_checkpoints
from ringmo.workspace import Workspace


class StageFailed(Exception):
    """A stage ended badly. `retry`: whether doing it again can help; `exit_code`: what to tell."""

    def __init__(self, reason: str, exit_code: int, retry: bool) -> None:
        super().__init__(reason)
        self.reason, self.exit_code, self.retry = reason, exit_code, retry

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.exit_code, self.retry)


def worth_a_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """A crash is retried; a refusal or bad input would only be refused again, and what was ended
    with the whole run is not begun once more."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, GroupEnded):
        return False
    return error.retry if isinstance(error, StageFailed) else True


def as_task(
    config: Config, kind: Task[..., Any], name: str, description: str = ""
) -> Task[..., Any]:
    """The Prefect task of a step: `execute` for a stage of dvc.yaml, `command` for the ends."""
    return kind.with_options(
        name=name,
        description=description,
        task_run_name=name,
        retries=config.run.retries,
        retry_delay_seconds=config.run.retry_delay_s,
        retry_condition_fn=worth_a_retry,
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
    command = versions.repro_command(workspace, name)
    with (
        slot(slots) as own,
        Forwarder(workspace, name, tags, own.get("CUDA_VISIBLE_DEVICES")) as forwarder,
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
        create_link_artifact(
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
        create_markdown_artifact(
            key=f"verdict-{name.replace('@', '-')}",
            markdown="\n".join(f"- {reason}" for reason in reasons),
            description=f"The gate's verdict: {checked['figures'].get('verdict')}",
        )
    return checked


_slots: dict[int, queue.SimpleQueue[int]] = {}  # how many → those that are free
_slots_lock = threading.Lock()


@contextmanager
def slot(slots: int) -> Iterator[dict[str, str]]:
    """One of so many equal shares of this machine, when one is free: its GPUs, or its cores.

    Yields:
        What the share is, as environment variables.
    """
    if slots == 1:
        yield {}
        return
    with _slots_lock:
        if slots not in _slots:
            _slots[slots] = queue.SimpleQueue()
            for number in range(slots):
                _slots[slots].put(number)
    free = _slots[slots]
    number = free.get()
    try:
        gpus = _gpus()
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots))}
        own = [gpus[i] for i in range(len(gpus)) if i % slots == number % len(gpus)]
        yield threads | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})
    finally:
        free.put(number)


def _gpus() -> list[str]:
    """The GPUs that may be used here, by number; none where there are none."""
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


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

    create_markdown_artifact(
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
        raise StageFailed(f"{name} ended without a report ({how})", 3, retry=True)
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
