"""What both trainings share: the device, the rate, the optimiser, figures and checkpoints.

Nothing random outlives a step: orders come from (seed, epoch), crops, masks and drop path from
(seed, step). So a resumed training needs no generator's state, and ends, on the same machine
with the same number of threads, in the very weights of one that was never stopped.
"""

import contextlib
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ringmo import console
from ringmo.config import Finetune, Pretrain
from ringmo.data.loading import Batch, SelectedTiles, shuffled
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, fuse_attention
from ringmo.stage import announce, write_json
from ringmo.training import checkpoint
from ringmo.training.augmentation import augment
from ringmo.workspace import Workspace

# Tiles are kept this much larger than the model's image, so that a random crop is rarely enlarged.
CROP_MARGIN = 1.5


@dataclass(frozen=True)
class Hardware:
    """The device, and whether matrix products run in bfloat16 there."""

    device: torch.device
    bfloat16: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def place(self, model: nn.Module) -> nn.Module:
        fuse_attention(model, fused=self.device.type == "cuda")
        return model.to(self.device)


def hardware() -> Hardware:
    """The GPU where there is one; bfloat16 only where the device computes in it."""
    if torch.cuda.is_available():
        return Hardware(torch.device("cuda"), torch.cuda.is_bf16_supported(False))
    return Hardware(torch.device("cpu"), False)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}: run the stage before this one") from None


def learning_rate(
    step: int, steps: int, steps_per_epoch: int, settings: Pretrain | Finetune
) -> float:
    """The rate of update number `step`: warm-up from the floor, then half a cosine down to it.

    Rates in params.yaml are for 512 images and scale with the batch.
    """
    scale = settings.batch_size / 512
    peak, floor = settings.base_lr * scale, settings.min_lr * scale
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return floor + (peak - floor) * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    model: nn.Module, encoder: Encoder, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW's groups: no decay on vectors and position tables; a slower rate for lower layers.

    Layer 0 is the stem, then each block, then all that stands above the encoder's blocks.
    """
    depths = [len(stage.blocks) for stage in encoder.layers]
    layer_of: dict[int, int] = {id(p): 0 for p in encoder.patch_embed.parameters()}
    layer = 1
    for stage in encoder.layers:
        layer_of |= {id(p): layer for p in stage.downsample.parameters()}
        for block in stage.blocks:
            layer_of |= {id(p): layer for p in block.parameters()}
            layer += 1
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "relative_position_bias_table" in name
        key = (0.0 if plain else weight_decay, layer_of.get(id(parameter), sum(depths) + 1))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "scale": layer_decay ** (sum(depths) + 1 - at)}
        for (decay, at), members in groups.items()
    ]


class Figures:
    """figures.jsonl of a run: one JSON object a line, appended, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, step: int, epoch: float, **figures: float) -> None:
        named = {n.replace("__", "/"): float(f"{value:.6g}") for n, value in figures.items()}
        line = {"step": step, "time": round(time.time(), 3), "epoch": round(epoch, 4), **named}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def cut(self, step: int) -> None:
        """Drop what comes after `step`, and a line that a kill left half."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)


class Trainer:
    """One training, from its first step or from its last checkpoint to its end.

        trainer = Trainer(...)
        for batch in trainer.batches():
            loss = ...
            trainer.update(loss, batch)
            if trainer.epoch_ended: ...validate, trainer.log(...)...
            trainer.save_if_due()
        ...write the result...

    The last checkpoint stays: until the result is on record, a kill must not cost the training.

    `state` and `tensors` are what else a checkpoint must hold: plain values and tensors.

    Raises:
        BadInput: no tiles.
    """

    def __init__(
        self,
        workspace: Workspace,
        stage: str,
        fingerprint: str,
        params: dict[str, Any],
        settings: Pretrain | Finetune,
        model: nn.Module,
        encoder: Encoder,
        tiles: SelectedTiles,
        tile_size: int,
        machine: Hardware,
    ) -> None:
        self.stage, self.settings, self.model, self.tiles = stage, settings, model, tiles
        self.tile_size, self.machine = tile_size, machine
        self.run_dir = workspace.run_dir(stage, fingerprint)
        self.pictures = self.run_dir / "pictures"
        self.pictures.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "params.json", params)
        announce(workspace, stage, self.run_dir)

        self.steps_per_epoch = math.ceil(len(tiles) / settings.batch_size)
        self.steps = self.steps_per_epoch * settings.epochs
        decay = settings.layer_decay if isinstance(settings, Finetune) else 1.0
        groups = parameter_groups(model, encoder, settings.weight_decay, decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self.figures = Figures(self.run_dir / "figures.jsonl")
        self.state: dict[str, Any] = {"seconds": 0.0}
        self.tensors: dict[str, Tensor] = {}
        self.step = 0
        found = checkpoint.restore(self.run_dir / "checkpoints", model, self.optimizer)
        if found is not None:
            self.step, self.state, self.tensors = found.step, found.state, found.tensors
            console.note(f"{stage}: goes on from step {self.step} of {self.steps}")
        self.figures.cut(self.step)
        # A few points an epoch tell enough, and a forwarder is not drowned.
        self._log_every = max(1, self.steps_per_epoch // 4)
        self._last_loss = math.nan
        self._asked_to_stop = False
        self._saved_at = self._counted_from = time.monotonic()
        self._clear()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    @property
    def epoch_ended(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    def batches(self) -> Iterator[Batch]:
        """The batches still to be done, each epoch in its own order; `random` belongs to each."""
        self.model.train()
        left = self.steps - self.step
        with _on_sigterm(self._ask_to_stop), console.progress(self.stage, left) as bar:
            while self.step < self.steps:
                order = shuffled(len(self.tiles), self.settings.seed, self.epoch)
                order = order[self.step % self.steps_per_epoch * self.settings.batch_size :]
                for batch in self.tiles.batches(order, self.settings.batch_size, self.tile_size):
                    batch.images = batch.images.to(self.machine.device, non_blocking=True)
                    # Crops come from `random`, masks and drop path from torch's own generator.
                    self.random = np.random.default_rng((self.settings.seed, self.step))
                    torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
                    yield batch
                    bar.advance(1, f"loss {self._last_loss:.3f}")

    def update(self, loss: Tensor, batch: Batch) -> None:
        """Backward, clip, step, and the figures of it.

        Raises:
            BadInput: the loss is not a number; names the tiles.
        """
        # Waits for the device; the next batch is being decoded meanwhile.
        self._last_loss = loss.item()
        if not math.isfinite(self._last_loss):
            keys = self.tiles.keys(batch.rows)
            raise BadInput(
                f"{self.stage}: the loss is {self._last_loss} at step {self.step + 1}, on tiles "
                f"{', '.join(keys[:4])} (and {max(0, len(keys) - 4)} more): lower "
                f"{self._section}.base_lr, or look at these tiles"
            )
        rate = learning_rate(self.step, self.steps, self.steps_per_epoch, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._losses += self._last_loss
        self._images += len(batch.rows)
        self._waited_s += batch.waited_s
        self._updates += 1
        if self.step % self._log_every == 0 or self.epoch_ended:
            elapsed = time.monotonic() - self._counted_from
            self.log(
                train__loss=self._losses / self._updates,
                train__lr=rate,
                train__grad_norm=float(norm),
                train__images_per_s=self._images / elapsed,
                train__data_wait_share=min(1.0, self._waited_s / elapsed),
            )
            self.state["seconds"] += elapsed
            self.state["images"] = self.state.get("images", 0) + self._images
            self._clear()

    def save_if_due(self) -> None:
        """A checkpoint at an epoch's end, every checkpoint_every_s seconds, and when asked to stop.

        Raises:
            SystemExit: 143, after SIGTERM.
        """
        now = time.monotonic()
        due = now - self._saved_at >= self.settings.checkpoint_every_s or self.epoch_ended
        if due or self._asked_to_stop:
            checkpoint.write(
                self.run_dir / "checkpoints",
                self.step,
                self.model,
                self.optimizer,
                self.state,
                self.tensors,
            )
            self._saved_at = time.monotonic()
        if self._asked_to_stop:
            console.note(f"{self.stage}: stopped at step {self.step} of {self.steps}, saved")
            raise SystemExit(143)
        self._pause(now)

    def augmented(self, batch: Batch, size: int) -> Tensor:
        """The batch, cropped, turned and mirrored at random: float32, in the tiles' units."""
        return augment(batch.images, size, self.settings.crop_scale, self.random)

    def log(self, **figures: float) -> None:
        """Add figures at this step; `val__loss` becomes `val/loss`."""
        self.figures.add(self.step, self.step / self.steps_per_epoch, **figures)
        self.state["last"] = self.state.get("last", {}) | figures

    def last(self, name: str) -> float | None:
        """The figure `val__loss` when it was last logged."""
        value: float | None = self.state.get("last", {}).get(name)
        return None if value is None else round(value, 4)

    def summary(self) -> dict[str, float]:
        """Figures of the whole training, interruptions included."""
        seconds = self.state["seconds"]
        return {
            "images_per_s": round(self.state.get("images", 0) / max(seconds, 1e-9), 1),
            "seconds_training": round(seconds, 1),
            "steps": self.steps,
        }

    @property
    def _section(self) -> str:
        return "pretrain" if isinstance(self.settings, Pretrain) else "finetune"

    def _clear(self) -> None:
        self._losses = self._waited_s = 0.0
        self._images = self._updates = 0
        self._counted_from = time.monotonic()

    def _pause(self, since: float) -> None:
        """Leave the time since then (validation, saving) out of the training's rate."""
        self._counted_from += time.monotonic() - since

    def _ask_to_stop(self) -> None:
        self._asked_to_stop = True


@contextlib.contextmanager
def _on_sigterm(action: Any) -> Iterator[None]:
    """Call `action` on SIGTERM inside the block: the step in hand is finished and saved first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_: int, __: FrameType | None) -> None:
        action()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
