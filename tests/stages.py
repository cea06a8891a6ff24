"""The stages of the chain, one after the other, in this process."""

from typing import Any

from ringmo.config import Config
from ringmo.data.ingest import ingest
from ringmo.data.selection import select
from ringmo.data.validation import validate
from ringmo.evaluation.evaluate import evaluate
from ringmo.stage import Report, run_stage
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain


def prepared(values: Config, workspace: Any) -> None:
    """Ingest, rules that all pass, selections."""
    ingest(values, workspace)
    assert run_stage(workspace, "validate", lambda out: validate(values, workspace, out)).ok
    run_stage(workspace, "select", lambda out: select(values, workspace, out))


def taught(values: Config, workspace: Any, task: str) -> Report:
    """Encoder, task model, the same from scratch; the evaluation's report."""
    run_stage(workspace, "pretrain", lambda out: pretrain(values, workspace, out))
    for stage, alone in (("finetune", False), ("scratch", True)):
        run_stage(
            workspace,
            f"{stage}@{task}",
            lambda out, alone=alone: finetune(values, workspace, out, task, alone),
        )
    return run_stage(
        workspace, f"evaluate@{task}", lambda out: evaluate(values, workspace, out, task)
    )
