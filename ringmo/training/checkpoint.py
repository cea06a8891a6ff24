"""Checkpoints of a training: tensors in safetensors, everything else as JSON in its header.

A kill at any moment leaves the last whole checkpoint: each is written under a temporary name,
forced to disk and renamed, and the two newest are kept, in case the newest cannot be read.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ringmo import console
from ringmo.data.store import sync_folder
from ringmo.errors import BadInput

KEPT = 2
MODEL, OPTIMIZER, EXTRA = "model.", "optimizer.", "extra."


@dataclass(frozen=True)
class Checkpoint:
    """step: updates done. state: plain values of the training's own. tensors: all, by name."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def into(self, model: nn.Module, optimizer: torch.optim.Optimizer, where: Path) -> None:
        """Load into model and optimizer, or change neither.

        Raises:
            BadInput: the checkpoint of another architecture; names the first weight.
        """
        weights, own = self.part(MODEL), model.state_dict()
        for name in sorted(weights.keys() | own.keys()):
            theirs, ours = (w[name].shape if name in w else None for w in (weights, own))
            if theirs != ours:
                raise BadInput(
                    f"{where}: the checkpoint's weight {name} is {_shape(theirs)}, the model's "
                    f"{_shape(ours)}: it belongs to another architecture; remove this folder"
                )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.part(OPTIMIZER).items():
            index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
        model.load_state_dict(weights)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start so, without it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def write(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    best: bool = False,
) -> Path:
    """Write step-NNNNNNNN.safetensors and remove all but the newest two.

    The `best` so far is also best-NNNNNNNN.safetensors, which stays until a better one comes.
    """
    data = {MODEL + name: value for name, value in model.state_dict().items()}
    data |= {EXTRA + name: value for name, value in tensors.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        data |= {f"{OPTIMIZER}{index}.{name}": value for name, value in moments.items()}
    header = {"step": str(step), "state": json.dumps(state)}
    packed = save({name: v.detach().cpu().contiguous() for name, v in data.items()}, header)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(packed)
        file.flush()
        os.fsync(file.fileno())
    if best:
        kept = folder / f"best-{step:08d}.safetensors"
        kept.unlink(missing_ok=True)
        os.link(temporary, kept)  # the same bytes, once on disk
    temporary.replace(path)
    sync_folder(folder)
    # A later one is of a course that was given up.
    staying = {path, *[other for other in found(folder) if other <= path][:KEPT]}
    staying |= {folder / f"best-{step:08d}.safetensors"} if best else set()
    for old in folder.glob("*-*.safetensors" if best else "step-*.safetensors"):
        if old not in staying:
            old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def read(
    folder: Path, wanted: Callable[[dict[str, Any]], bool] = lambda state: True
) -> Checkpoint | None:
    """The newest checkpoint that can be read and whose state is wanted; None where none can.

    What a kill left half written is removed, and so is a file that cannot be read, with a note.
    """
    for left in folder.glob("*.tmp"):
        left.unlink(missing_ok=True)
    for path in found(folder):
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                step, state = int(header["step"]), json.loads(header["state"])
                if not wanted(state):
                    continue
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = str(error).split("\n")[0][:120]
            console.note(f"{path.name} cannot be read ({reason}): taking the one before")
            path.unlink(missing_ok=True)
            continue
        return Checkpoint(step, state, tensors)
    return None
