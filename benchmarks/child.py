"""A measurement's own process: how one is started, and how it begins."""

import json
import os
import resource
import subprocess
import sys
from typing import Any

from benchmarks.imagery import ROOT
from ringmo.data.cluster import MALLOC
from ringmo.system_metrics import peak_memory_mb

TIME_LIMIT_S = 1800


class Failed(Exception):
    """A measurement that did not end; its message is the last line it wrote."""


def measure(module: str, cores: int | None, **spec: Any) -> dict[str, Any]:
    """Run `python -m benchmarks.MODULE SPEC` and read the JSON of its last line.

    Args:
        cores: it may use so many, with as many threads in PyTorch. None: all.
    """
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", DO_NOT_TRACK="true")
    if cores is not None:
        environment["OMP_NUM_THREADS"] = str(spec.get("threads", cores))
    if spec.get("as_reader"):
        environment |= MALLOC
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps({**spec, "cores": cores})]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {TIME_LIMIT_S} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise Failed(lines[-1][:200])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def begin(cores: int | None) -> None:
    """Keep this process and its children to the first so many cores, all contenders alike."""
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def peak_mb() -> float:
    """Peak memory of this process, and of the largest of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return peak_memory_mb() + children
