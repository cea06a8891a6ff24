"""Run as a script: trains in forked children and kills them, as the last test of test_resume asks.

It imports everything once and computes nothing itself, so that forking is safe and cheap.
Arguments: workspace, seed, kills. Prints one JSON object.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from ringmo.config import Config
from ringmo.stage import run_stage
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain
from ringmo.workspace import Workspace


def train(workspace: Workspace) -> None:
    torch.set_num_threads(1)
    config = Config.load(workspace.params_file)
    if not (workspace.work("pretrain") / "encoder" / "model.json").exists():
        run_stage(workspace, "pretrain", lambda out: pretrain(config, workspace, out))
    run_stage(workspace, "finetune@scene", lambda out: finetune(config, workspace, out, "scene"))


def start(workspace: Workspace) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(workspace)
            code = 0
        finally:
            os._exit(code)
    return child


def wait(child: int, until: float, writing: list[Path]) -> bool:
    """Until the time, or a checkpoint is being written where asked for; False: it ended before."""
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if any(any(folder.glob("*/checkpoints/*.tmp")) for folder in writing):
            return True
        time.sleep(0.0002 if writing else 0.002)
    return True


def main() -> None:
    workspace, kills = Workspace(Path(sys.argv[1])), int(sys.argv[3])
    dice = random.Random(int(sys.argv[2]))
    killed = inside = finished = 0
    runs = workspace.state / "runs"
    while killed < kills:
        child = start(workspace)
        earliest = time.monotonic() + dice.uniform(0.05, 1.8)
        if killed % 3 == 0:
            alive = wait(child, earliest, []) and wait(child, earliest + 20, [runs])
        else:
            alive = wait(child, earliest, [])
        if not alive:
            finished += 1
            if finished > kills:
                break
            # What is finished stays so until its checkpoints are gone: train once more.
            for folder in runs.glob("*/checkpoints"):
                shutil.rmtree(folder)
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        inside += any(runs.glob("*/checkpoints/*.tmp"))
    code = os.waitstatus_to_exitcode(os.waitpid(start(workspace), 0)[1])
    print(json.dumps({"killed": killed, "inside": inside, "finished": finished, "code": code}))


main()
