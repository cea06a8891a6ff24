"""The machine a training runs on: its device and precision, and the ranks that share the work.

Under torchrun each rank is one process with one device; without it there is one rank.
"""

import contextlib
import inspect
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringmo.config import Hardware
from ringmo.errors import BadInput
from ringmo.models.backbone import fuse_attention

PEAK_SIDE = {"cuda": 8192, "cpu": 512}  # of the square matrices whose product shows the peak


def choose_device(hardware: Hardware) -> torch.device:
    """The GPU where there is one and it is wanted, else the CPU.

    Raises:
        BadInput: a GPU was asked for and there is none.
    """
    there = torch.cuda.is_available()
    if hardware.accelerator == "cuda" and not there:
        raise BadInput(
            "hardware.accelerator: cuda was asked for, and PyTorch finds no GPU here (no driver, "
            "or a PyTorch built without CUDA): mend that, or set auto or cpu"
        )
    return torch.device("cuda" if there and hardware.accelerator != "cpu" else "cpu")


def _computes_in_bfloat16(hardware: Hardware, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: where wanted, and only where the device does it.

    A CPU without the instructions takes twenty times as long as in float32.
    """
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if hardware.precision == "bf16" and not able:
        raise BadInput(
            f"hardware.precision: bf16 was asked for, and {device.type} does not compute in it "
            f"here: set auto or 32"
        )
    return able and hardware.precision != 32


@contextlib.contextmanager
def _out_of_sight(module: str) -> Iterator[None]:
    """As if a module were not installed. lightning-fabric imports torchmetrics to read its version,
    which takes two seconds, and does nothing with it."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


class Machine:
    """Device, precision and ranks.

    rank, ranks: this process's number, and how many train together.

    Raises:
        BadInput: no GPU or no bfloat16 where asked for, or ranks that do not fit the GPUs.
    """

    def __init__(self, hardware: Hardware, unused_parameters: bool = False) -> None:
        """`unused_parameters`: some parameters take no part in some steps."""
        with _out_of_sight("torchmetrics"):
            from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import (  # type: ignore[attr-defined]
            LightningEnvironment,
            TorchElasticEnvironment,
        )
        from lightning_fabric.strategies import DDPStrategy  # type: ignore[attr-defined]

        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        device = choose_device(hardware)
        self.bfloat16 = _computes_in_bfloat16(hardware, device)
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        if device.type == "cuda" and here > torch.cuda.device_count():
            raise BadInput(
                f"{here} processes were started on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: start one a GPU"
            )
        settings: dict[str, Any] = {
            "accelerator": device.type,
            "precision": "bf16-mixed" if self.bfloat16 else "32-true",
        }
        if self.ranks == 1:
            self.fabric = Fabric(devices=1, plugins=[LightningEnvironment()], **settings)
        else:
            known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            # PyTorch is renaming it.
            newer = "forward_sync_buffers"
            # BatchNorm's statistics are those of all ranks already.
            buffers: dict[str, Any] = {newer if newer in known else "broadcast_buffers": False}
            self.fabric = Fabric(
                devices=here,
                num_nodes=self.ranks // here,
                plugins=[TorchElasticEnvironment()],
                strategy=DDPStrategy(
                    process_group_backend="nccl" if device.type == "cuda" else "gloo",
                    find_unused_parameters=unused_parameters,
                    **buffers,
                    gradient_as_bucket_view=True,
                ),
                **settings,
            )
        self.fabric.launch()
        self.device: torch.device = self.fabric.device
        # What the host agrees on goes over the CPU: the device is never waited for.
        self._host: Any = dist.new_group(backend="gloo") if self.ranks > 1 else None
        self._wishes: tuple[Tensor, Any] | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this device, with the attention that is fastest there."""
        fuse_attention(model, fused=self.device.type == "cuda")
        return model.to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def upload(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device; a GPU copies while both go on."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks of a tensor on the device, on the device."""
        if self.ranks > 1:
            dist.all_reduce(value)
            value = value / self.ranks
        return value

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        summed = torch.tensor(values, dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(summed, group=self._host)
        sums: list[float] = summed.tolist()
        return sums

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order."""
        if self.ranks == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._host)
        longest = max(int(length) for length in lengths)
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: len(data)] = data
        texts = [torch.empty_like(padded) for _ in range(self.ranks)]
        dist.all_gather(texts, padded, group=self._host)
        return [bytes(t.numpy()).decode().rstrip(" ") for t in texts]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's CPU tensor, into this one of the same shape and type."""
        if self.ranks > 1:
            dist.broadcast(tensor, 0, group=self._host)
        return tensor

    def any_asked(self, wish: bool) -> bool:
        """Whether any rank wished so, one call ago where there are several: the same answer on all.

        Each call starts an exchange over the CPU and takes the result of the one before, so that
        nobody waits.
        """
        if self.ranks == 1:
            return wish
        asked = False
        if self._wishes is not None:
            flag, work = self._wishes
            work.wait()
            asked = bool(flag)
        flag = torch.tensor([int(wish)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._host, async_op=True)
        self._wishes = flag, work
        return asked

    def agree(self, what: str, value: str) -> None:
        """All ranks, or none, go on.

        Raises:
            BadInput: on every rank, where their values differ.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise BadInput(
                    f"rank {rank} has another {what} than rank 0 ({other} and {values[0]}): give "
                    f"every machine the same workspace, parameters and version of ringmo"
                )

    def leave(self) -> None:
        """End the ranks' connection, once all is done."""
        if self._wishes is not None:
            self._wishes[1].wait()
        if self.ranks > 1:
            dist.destroy_process_group()

    def memory_gb(self) -> float:
        """The most memory so far: the device's, or this process's where it computes on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def peak_flops(self) -> float:
        """Operations a second that a large matrix product reaches here, in the running precision.

        The best of a few: tens of milliseconds in all.
        """
        side = PEAK_SIDE[self.device.type]
        kind = torch.bfloat16 if self.bfloat16 else torch.float32
        matrix = torch.ones(side, side, dtype=kind, device=self.device)
        times = []
        for _ in range(8):
            self._wait()
            started = time.perf_counter()
            matrix @ matrix
            self._wait()
            times.append(time.perf_counter() - started)
        return float(2 * side**3 / min(times))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def no_sync(self, model: Any, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients stay on this rank inside: more micro-batches of the same step follow."""
        if self.ranks == 1:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.fabric.no_backward_sync(
            model, enabled=enabled
        )
        return context
