"""One micro-batch before anything is trained: does it fit the memory, and what does it cost?

A batch that is too large is said at once, with the largest that fits, and not after an hour.
"""

import gc
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ringmo import console
from ringmo.training.machine import Machine
from ringmo.training.whole_batch import statistics

# The loss of so many made-up images, through the model it is given.
Trial = Callable[[nn.Module, int], Tensor]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory is what ran out: PyTorch says so in as many ways as it has allocators."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    # The last two are oneDNN's, for the room that a product needs beside its result.
    return isinstance(error, RuntimeError) and any(
        text in said
        for text in (
            "can't allocate memory",
            "not enough memory",
            "bad_alloc",
            "could not create a primitive",
            "could not create a memory object",
        )
    )


def largest_that_fits(fits: Callable[[int], bool], count: int) -> int:
    """The first of count, count/2, count/4, … that fits; 0 where not even one image does."""
    while count and not fits(count):
        count //= 2
    return count


def runs(machine: Machine, model: nn.Module, trial: Trial, count: int) -> bool:
    """Whether a step on so many images, with AdamW's moments beside it, fits the memory."""
    moments: list[Tensor] = []
    try:
        moments += [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
        _step(machine, model, trial, count)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fitted = False
    else:
        fitted = True
    # Here the error, and with it the frames that hold tensors, is gone.
    moments.clear()
    model.zero_grad(set_to_none=True)
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return fitted


def flops(machine: Machine, model: nn.Module, trial: Trial, count: int) -> float:
    """Operations of one forward and backward pass, an image."""
    with FlopCounterMode(display=False) as counter:
        _step(machine, model, trial, count)
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / count


def compiled(machine: Machine, model: nn.Module, trial: Trial, count: int) -> nn.Module:
    """The model compiled, or as it is, with a note that says why."""
    try:
        faster = cast("nn.Module", torch.compile(model))
        _step(machine, faster, trial, count)
    except Exception as error:  # no compiler, a graph it cannot take: whatever it is, we can train
        # PyTorch's own explanation is pages long; the reason is where the text begins.
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
        console.note(f"hardware.compile: the model is trained uncompiled, since: {reason}")
        faster = model
    model.zero_grad(set_to_none=True)
    return faster


def _step(machine: Machine, model: nn.Module, trial: Trial, count: int) -> None:
    """Forward and backward; the model is left as it was but for its gradients."""
    before = [(buffer, buffer.clone()) for buffer in statistics(model)]
    try:
        with machine.autocast():
            loss = trial(model, count)
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for buffer, value in before:
            buffer.copy_(value)
