"""What every stage has in common: outputs that appear whole or not at all, and a report."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ringmo import hardware
from ringmo.config import flatten
from ringmo.environment import shown
from ringmo.errors import AnswerIsNo, BadInput, RingmoError
from ringmo.workspace import Workspace

# Code counts as an input: raise a stage's number when its results change for the same inputs.
# `ringmo` writes them to the workspace's revisions.yaml, which dvc.yaml lists among the parameters.
REVISIONS = {"validate": 3, "select": 3, "pretrain": 3, "finetune": 4, "evaluate": 4}


@dataclass
class Report:
    """What a stage did.

    figures: numbers and short texts, flat, by name. tables: name → rows of equal keys.
    run_dir: the training's run folder, relative to the workspace, where there is one. machine:
    what it ran on (`hardware.described`).
    """

    stage: str
    ok: bool = True
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    run_dir: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    exit_code: int = 0
    reason: str | None = None
    retry: bool = False

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Report | None":
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None


def parameters(
    stage: str,
    sections: Mapping[str, Any],
    *,
    sensor: str,
    tiles: Mapping[str, int],
    **facts: Any,
) -> dict[str, Any]:
    """What a run is known by, for params.json: flat, and named alike in every stage's runs.

    Args:
        sections: of params.yaml, by name, as they are or as plain values. Those of the training
            itself, `pretrain` and `finetune.TASK`, are called `training`, so that any two
            trainings stand side by side.
        sensor: the main one. tiles: split → how many it reads; `all` for those of the store.
        facts: hashes of what it was made from (selection, encoder, model), its revision.
    """
    name, _, task = stage.partition("@")
    own = f"finetune.{task}" if task else "pretrain" if name == "pretrain" else None
    plain = {
        key: of.model_dump(mode="json") if isinstance(of, BaseModel) else of
        for key, of in sections.items()
    }
    named = {"training" if key == own else key: values for key, values in plain.items()}
    seed = named.get("training", {}).get("seed")
    known = {"stage": name, "task": task or None, "seed": seed, "sensor": sensor, **facts}
    known |= {f"tiles.{split}": count for split, count in tiles.items()}
    return {k: v for k, v in known.items() if v is not None} | flatten(named)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A name of this thread's own to write to, whose file becomes `target` when the block ends
    without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    own = f"{os.getpid()}-{threading.get_ident()}"
    temporary = target.with_name(f".{target.name}.{own}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes `target`'s place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def run_stage(workspace: Workspace, stage: str, function: Callable[[Path], Report]) -> Report:
    """Run `function(out)`, where `out` becomes the stage's output folder if it succeeds.

    The report is written to the workspace's state in every case, so that whoever started the
    stage can tell a refusal from a crash. An AnswerIsNo keeps the outputs: they hold the reasons.
    """
    started = time.monotonic()
    refusal: RingmoError | None = None
    with failure_reported(workspace, stage):
        with whole_folder(workspace.work(stage)) as out:
            try:
                report = function(out)
            except AnswerIsNo as error:
                refusal = error
                report = Report(stage, ok=False, exit_code=1, reason=str(error))
            report.seconds = round(time.monotonic() - started, 2)
            report.machine = hardware.described()
            report.write(out / "report.json")
        report.write(workspace.report_file(stage))
    if refusal is not None:
        raise refusal
    return report


@contextlib.contextmanager
def failure_reported(workspace: Workspace, stage: str) -> Iterator[None]:
    """Leave a report when the block fails, so that a refusal can be told from a crash."""
    started = time.monotonic()
    report_file = workspace.report_file(stage)
    report_file.unlink(missing_ok=True)
    try:
        yield
    except (RingmoError, OSError) as caught:
        if isinstance(caught, RingmoError):
            error = caught
        else:
            # No space left, a folder that may not be written: the user can mend these.
            where = caught.filename or workspace.root
            error = BadInput(f"{stage}: {where}: {caught.strerror or caught}")
        with contextlib.suppress(OSError):
            Report(
                stage,
                ok=False,
                exit_code=error.exit_code,
                reason=shown(str(error)),
                retry=error.retry,
                seconds=round(time.monotonic() - started, 2),
            ).write(report_file)
        if error is caught:
            raise
        raise error from caught


def announcement(workspace: Workspace, stage: str) -> Path:
    """The file in which a stage's training says where its figures appear: stage, run_dir, pid."""
    return workspace.state / "running" / f"{stage.replace('@', '-')}.json"


def announce(workspace: Workspace, stage: str, run_dir: Path) -> None:
    """Say, while a training runs, where its figures appear, so that they can be followed live."""
    write_json(
        announcement(workspace, stage),
        {"stage": stage, "run_dir": str(run_dir.relative_to(workspace.root)), "pid": os.getpid()},
    )


def forget_checkpoints(workspace: Workspace, report: Report) -> None:
    """Remove a training's checkpoints once its outputs are on record in dvc.lock."""
    if report.run_dir:
        shutil.rmtree(workspace.root / report.run_dir / "checkpoints", ignore_errors=True)
