"""Several processes for one training, by torchrun; one each device.

    ringmo pretrain                                       hardware.devices says how many
    torchrun --nproc-per-node 8 -m ringmo pretrain        the same by hand
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-endpoint HOST:PORT --rdzv-backend c10d \\
        -m ringmo pretrain                                on each of four machines
    PET_NNODES=4 PET_NODE_RANK=0 PET_MASTER_ADDR=HOST PET_MASTER_PORT=29500 ringmo pretrain
                                                          the same, each machine with its rank
"""

import ctypes
import logging
import os
import signal
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ringmo.config import Config, Hardware
from ringmo.errors import BadInput
from ringmo.workspace import Workspace


def joined() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leads() -> bool:
    """Whether this process is the one that writes."""
    return os.environ["RANK"] == "0"


def follow(config: Config, workspace: Workspace, function: str, options: dict[str, Any]) -> int:
    """Train along with the rank that writes; `function` is module:name of a training."""
    module, _, name = function.partition(":")
    with TemporaryDirectory() as nothing:
        getattr(import_module(module), name)(config, workspace, Path(nothing), **options)
    return 0


def several_machines() -> bool:
    """Whether torchrun's own variables name more than this machine."""
    return os.environ.get("PET_NNODES", "1") != "1"


def processes(hardware: Hardware) -> int:
    """How many processes this training wants on this machine.

    Raises:
        BadInput: more than it has GPUs.
    """
    if hardware.devices == 1 or (hardware.devices == "auto" and hardware.accelerator == "cpu"):
        return 1
    import torch

    on_gpu = hardware.accelerator != "cpu" and torch.cuda.is_available()
    if hardware.devices == "auto":
        return torch.cuda.device_count() if on_gpu else 1
    if on_gpu and hardware.devices > torch.cuda.device_count():
        raise BadInput(
            f"hardware.devices: {hardware.devices} were asked for, this machine has "
            f"{torch.cuda.device_count()} GPUs"
        )
    return hardware.devices


def torchrun(count: int, arguments: list[str]) -> int:
    """Run `ringmo ARGUMENTS` in so many processes and wait for them; returns the exit code.

    With PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT set they join those of
    other machines.
    It is torchrun's own function, called here, since its command turns every failure into 1.
    SIGTERM is passed on; the workers get half a minute to save.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    how = [] if several_machines() else ["--standalone"]
    how += ["--nproc-per-node", str(count), "-m", "ringmo"]
    try:
        run.run(run.parse_args([*how, *arguments]))  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        # torchrun ends the other ranks with a signal: what a rank says itself is the reason.
        codes = [failure.exitcode for failure in failed.failures.values()]
        return min((code for code in codes if code > 0), default=128 - min(codes))
    return 0


def end_with_torchrun() -> None:
    """Let this rank die when torchrun does, which starts each in a session of its own (Linux)."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
