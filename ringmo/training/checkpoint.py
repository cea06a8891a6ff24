"""Checkpoints of a training: tensors in safetensors, everything else as JSON in its header.

A kill at any moment leaves the last whole checkpoint: each is written under a temporary name,
forced to disk and renamed, and the two newest are kept, in case the newest cannot be read.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ringmo import console
from ringmo.data.store import sync_folder

KEPT = 2
MODEL, OPTIMIZER, EXTRA = "model.", "optimizer.", "extra."


@dataclass(frozen=True)
class Checkpoint:
    """step: updates done. state: plain values of the training's own. tensors: likewise."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def write(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Path:
    """Write step-NNNNNNNN.safetensors and remove all but the newest two."""
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
    temporary.replace(path)
    sync_folder(folder)
    for old in found(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint | None:
    """Load the newest checkpoint that can be read into model and optimizer; None where none can."""
    for left in folder.glob("*.tmp"):
        left.unlink(missing_ok=True)
    for path in found(folder):
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, state = int(header["step"]), json.loads(header["state"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name in [name for name in tensors if name.startswith(OPTIMIZER)]:
                index, moment = name.removeprefix(OPTIMIZER).split(".")
                moments.setdefault(int(index), {})[moment] = tensors.pop(name)
            # Both sides are checked before either is changed.
            weights = _part(tensors, MODEL)
            model.load_state_dict(weights)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = str(error).split("\n")[0][:120]
            console.note(f"{path.name} cannot be read ({reason}): taking the one before")
            path.unlink(missing_ok=True)
            continue
        return Checkpoint(step, state, _part(tensors, EXTRA))
    return None


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
