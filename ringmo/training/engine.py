"""What both trainings share: the rate, the optimiser, the steps, figures and checkpoints.

Nothing random outlives a step: orders come from (seed, pass), crops, masks and drop path from
(seed, step), all for the global batch, of which each rank takes its part. So a resumed training
needs no generator's state, and ends, on the same machine with the same number of threads, in the
very weights of one that was never stopped; and two ranks learn what one would.

Within a step the host never waits for the device: losses and norms stay there, and are read once
in a while.
"""

import contextlib
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo import console
from ringmo.config import Finetune, Pretrain
from ringmo.data.loading import Batch, SelectedTiles, shuffled
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder
from ringmo.stage import announce, write_json
from ringmo.training import checkpoint, trial, whole_batch
from ringmo.training.augmentation import crops, cut
from ringmo.training.machine import Machine
from ringmo.workspace import Workspace

# Tiles are kept this much larger than the model's image, so that a random crop is rarely enlarged.
CROP_MARGIN = 1.5
# Random numbers of images are drawn in runs of this many of the global batch, or of the validation
# tiles: a rank draws the runs it needs, and any number of ranks draws the same.
RUN = 64
# Points of the curves are this many steps apart at most; each costs one wait for the device.
LOG_STEPS = 100
# A loss that is this often its running mean, and larger than the first, has exploded.
EXPLODED = 10.0
MEMORY_OF_MEAN = 0.98
# So many skipped steps in a row are no accident: back to the last good checkpoint, once.
ROW = 8
LOWER = 0.5  # times the rate, from there on
# More tiles than this share smaller than half the image would mean training on enlargements.
SMALL_SHARE = 0.1

CROPS, MIX, PATHS, MASKS, CHANGES, HOLES, NOISE = range(7)  # what a step's random numbers are for


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
    """AdamW's groups: no decay on vectors, tokens and position tables; lower levels learn slower.

    A level of the encoder learns `layer_decay` times as fast as the one above it, and the last
    one so much slower than what stands on the encoder.
    """
    levels = encoder.levels()
    level_of = {id(p): at for at, members in enumerate(levels) for p in members}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith(("relative_position_bias_table", "token"))
        scale = layer_decay ** (len(levels) - level_of.get(id(parameter), len(levels)))
        groups.setdefault((0.0 if plain else weight_decay, scale), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "scale": scale}
        for (decay, scale), members in groups.items()
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


@dataclass
class MicroBatch:
    """A rank's images of one micro-batch of a step, on the device, as they are stored.

    images: (n, bands, S, S). rows: positions of their tiles. part: where they lie in the global
    batch. first, last: whether a step begins with it, whether its update follows. parts: what
    else of the tiles is read, by name.
    """

    sensor: str
    images: Tensor
    rows: NDArray[np.int64]
    part: slice
    first: bool
    last: bool
    waited_s: float
    parts: dict[str, Tensor] = field(default_factory=dict)


class Trainer:
    """One training, from its first step or from its last checkpoint to its end.

        trainer = Trainer(...)
        for batch in trainer.batches():
            loss = trainer.model(...)
            trainer.update(loss, batch)
            if trainer.epoch_ended: ...validate, trainer.log(...)...
            trainer.save_if_due()
        ...write the result...

    The last checkpoint stays: until the result is on record, a kill must not cost the training.

    `model` is what computes the loss: compiled, and with the gradients of all ranks, where that
    is so. `state` and `tensors` are what else a checkpoint must hold: plain values and tensors.

    Args:
        tiles: sensor → its tiles. shares: sensor → its share of the steps.
        image_size: of the model, pixels. read_size: to which a tile is scaled when it is answered
            for; None: image_size.
        try_out: the loss of so many made-up images through the model it is given.

    Raises:
        BadInput: too few or too small tiles, a batch that does not divide among the ranks or does
            not fit the memory, ranks that would train on different things, the checkpoint of
            another architecture.
    """

    def __init__(
        self,
        workspace: Workspace,
        stage: str,
        fingerprint: str,
        params: dict[str, Any],
        settings: Pretrain | Finetune,
        machine: Machine,
        model: nn.Module,
        encoder: Encoder,
        tiles: Mapping[str, SelectedTiles],
        shares: Mapping[str, float],
        image_size: int,
        try_out: trial.Trial,
        compile: bool = False,
        read_size: int | None = None,
    ) -> None:
        self.stage, self.settings, self.machine, self.tiles = stage, settings, machine, dict(tiles)
        self.image_size = image_size
        self.tile_size = max(round(image_size * CROP_MARGIN), read_size or 0)
        machine.agree("selection, encoder, parameters or revision", fingerprint[:16])
        machine.agree("precision", "bf16" if machine.bfloat16 else "32")
        self._share = self._batch_of_a_rank()
        self._check_tiles()
        self.steps_per_epoch = sum(len(t) for t in self.tiles.values()) // settings.batch_size
        self.steps = self.steps_per_epoch * settings.epochs
        self._plan(shares)

        self.run_dir = workspace.run_dir(stage, fingerprint)
        self.pictures = self.run_dir / "pictures"
        self.figures = Figures(self.run_dir / "figures.jsonl")
        if machine.first:
            self.pictures.mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / "params.json", params)
            announce(workspace, stage, self.run_dir)

        self._fit(model, try_out)
        self._flops = trial.flops(machine, model, try_out, 1)
        self._peak = machine.peak_flops() * machine.ranks
        whole_batch.convert(model, machine.ranks)
        faster = trial.compiled(machine, model, try_out, self._share) if compile else model
        self.model: Any = machine.fabric.setup_module(faster)
        self._bare = model
        # Once: walking through the modules takes its time.
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._paths = whole_batch.drop_paths(model)
        self._statistics = whole_batch.statistics(model)

        decay = settings.layer_decay if isinstance(settings, Finetune) else 1.0
        groups = parameter_groups(model, encoder, settings.weight_decay, decay)
        self.optimizer: Any = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self.state: dict[str, Any] = {"seconds": 0.0}
        self.tensors: dict[str, Tensor] = {}
        self.step = 0
        # On the device: running mean of the loss, first loss, skipped in a row, skipped in all.
        self._guard = torch.zeros(4, device=machine.device)
        self._best: float | None = None
        self._checkpoints = self.run_dir / "checkpoints"
        if self._restore():
            self._note(f"goes on from step {self.step} of {self.steps}")
        else:
            self._save()  # there is always one to return to
        # A few points an epoch tell enough, and a forwarder is not drowned.
        self._log_every = max(1, min(LOG_STEPS, self.steps_per_epoch // 4))
        self._last_loss = math.nan
        self._asked_to_stop = False
        self._saved_at = time.monotonic()
        self._generator = torch.Generator(machine.device)
        self._loss = torch.zeros((), device=machine.device)  # of the step, over its micro-batches
        self._before: list[Tensor] = []  # the statistics, to go back to
        self._updated = False  # by the last micro-batch, and not returned from there
        self._clear()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    @property
    def epoch_ended(self) -> bool:
        """Whether the update just done was an epoch's last."""
        return self._updated and self.step % self.steps_per_epoch == 0

    @property
    def ended(self) -> bool:
        return self._updated and self.step == self.steps

    def batches(self) -> Iterator[MicroBatch]:
        """The micro-batches still to be done, an epoch after the other."""
        left = self.steps - self.step
        self.model.train()
        with _on_sigterm(self._ask_to_stop), console.progress(self.stage, left) as bar:
            while self.step < self.steps:
                with contextlib.closing(self._epoch()) as epoch:
                    for batch in epoch:
                        if batch.first:
                            self._begin_step()
                        self._tell_paths(batch.part)
                        step = self.step
                        with self.machine.no_sync(self.model, enabled=not batch.last):
                            yield batch
                        if batch.last:
                            bar.to(self.step - (self.steps - left), f"loss {self._last_loss:.3f}")
                            if self.step != step + 1:
                                break  # returned to an earlier step

    def random(self, purpose: int) -> np.random.Generator:
        """This step's random numbers for a purpose, the same on all ranks."""
        return np.random.default_rng((self.settings.seed, self.step, purpose))

    def where(self, batch: MicroBatch) -> Tensor:
        """Where the batch is cropped, turned and mirrored: (n, 2, 3), on the CPU."""
        where = crops(self.settings.batch_size, self.settings.crop_scale, self.random(CROPS))
        return where[batch.part]

    def augmented(self, batch: MicroBatch) -> Tensor:
        """The batch, cropped, turned and mirrored at random: float32, in the tiles' units."""
        return cut(batch.images, self.machine.upload(self.where(batch)), self.image_size)

    def drawn(self, purpose: int, batch: MicroBatch, draw: Callable[..., Tensor]) -> Tensor:
        """This part of what is drawn for the global batch on the device, an image a row.

        Args:
            draw: draw(count, generator=…, device=…) → (count, …).
        """
        part, size = batch.part, self.settings.batch_size
        start = part.start // RUN * RUN
        runs = []
        for first in range(start, part.stop, RUN):
            seed = np.random.SeedSequence((self.settings.seed, self.step, purpose, first))
            self._generator.manual_seed(int(seed.generate_state(1)[0]))
            count = min(RUN, size - first)
            runs.append(draw(count, generator=self._generator, device=self.machine.device))
        return torch.cat(runs)[part.start - start : part.stop - start]

    def update(self, loss: Tensor, batch: MicroBatch) -> None:
        """Backward; with the step's last micro-batch clip, step, and the figures of it.

        A loss or a gradient that is no number, and an exploded loss, change nothing: the step is
        skipped and counted.

        Raises:
            BadInput: too many in a row, a second time; names the tiles.
        """
        machine, settings = self.machine, self.settings
        machine.fabric.backward(loss / settings.accumulate)
        self._loss = self._loss + loss.detach() / settings.accumulate
        self._waited_s += batch.waited_s
        self._updated = batch.last
        if not batch.last:
            return
        rate = learning_rate(self.step, self.steps, self.steps_per_epoch, settings)
        rate *= self.state.get("rate", 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        mean = machine.mean(self._loss)
        norm = nn.utils.clip_grad_norm_(self._parameters, settings.clip_norm)
        good = self._judge(mean, norm)
        self.optimizer.found_inf = (~good).float()  # AdamW's fused kernel then changes nothing
        self.optimizer.step()
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(torch.where(good, buffer, before))
        self._sums += torch.where(good, torch.stack((mean, norm, torch.ones_like(mean))), 0.0)
        self.step += 1
        self._updates += 1
        if self.step % self._log_every == 0 or self.epoch_ended:
            self._log_figures(rate)
            self._look_at_skipped()
        self._updated_at = time.monotonic()

    def save_if_due(self, best: float | None = None) -> None:
        """A checkpoint at an epoch's end, every checkpoint_every_s seconds, and when asked to stop.

        Args:
            best: a validation's loss; the checkpoint of the smallest is kept.

        Raises:
            SystemExit: 143, after SIGTERM to any rank.
        """
        if not self._updated:
            return
        now = time.monotonic()
        stop = self.machine.any_asked(self._asked_to_stop)
        due = self.epoch_ended or now - self._saved_at >= self.settings.checkpoint_every_s
        # Not in the middle of trouble: what came before it is what a return needs.
        if stop or (due and self.machine.first and self._row() == 0):
            is_best = best is not None and best <= self.state.get("best_loss", math.inf)
            if is_best:
                self.state["best_loss"] = best
            self._save(is_best)
            self._saved_at = time.monotonic()
        if stop:
            self._note(f"stopped at step {self.step} of {self.steps}, saved")
            self.machine.leave()
            raise SystemExit(143)
        self._pause(self._updated_at)

    def stop_early(self) -> None:
        """End the training with this step, also where it goes on from a checkpoint."""
        self.state["steps"] = self.steps = self.step

    def validation(self, tiles: SelectedTiles, size: int) -> Iterator[Batch]:
        """This rank's part of all tiles, uncropped; the images are on the device."""
        rows = np.arange(len(tiles))
        starts = rows[::RUN][self.machine.rank :: self.machine.ranks]
        mine = [rows[start : start + RUN] for start in starts]
        if mine:
            for batch in tiles.batches(np.concatenate(mine), RUN, size):
                batch.images = self.machine.upload(batch.images)
                yield batch

    def log(self, **figures: float) -> None:
        """Add figures at this step; `val__loss` becomes `val/loss`."""
        if self.machine.first:
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
            "skipped_steps": int(self.state.get("last", {}).get("train__skipped", 0)),
        }

    # What it starts from

    @property
    def _section(self) -> str:
        if isinstance(self.settings, Pretrain):
            return "pretrain"
        return f"finetune.{self.stage.partition('@')[2]}"

    def _batch_of_a_rank(self) -> int:
        """Images of a micro-batch on one rank."""
        size, parts = self.settings.batch_size, self.settings.accumulate * self.machine.ranks
        if size % parts:
            raise BadInput(
                f"{self._section}.batch_size: {size} images cannot be shared by "
                f"{self.machine.ranks} processes with {self.settings.accumulate} micro-batches "
                f"each: take a multiple of {parts}"
            )
        return size // parts

    def _check_tiles(self) -> None:
        for sensor, tiles in self.tiles.items():
            size = self.settings.batch_size
            if len(tiles) < size:
                raise BadInput(
                    f"{self._section}.batch_size: a batch has {size} images, and there are "
                    f"{len(tiles)} tiles of sensor {sensor} to train on: make it smaller, or "
                    f"ingest more"
                )
            sides = tiles.table[["width", "height"]]
            shorter = (sides.max(axis=1) if tiles.whole else sides.min(axis=1)).to_numpy()
            small = shorter < self.image_size / 2
            if small.mean() > SMALL_SHARE:
                raise BadInput(
                    f"{int(small.sum())} of {len(tiles)} tiles of sensor {sensor} are smaller "
                    f"than half of the model's image (tile {tiles.keys(np.flatnonzero(small))[0]}: "
                    f"{int(shorter[small][0])} of {self.image_size} pixels): set "
                    f"model.image_size to {int(np.median(shorter))} or less, or ingest larger tiles"
                )

    def _plan(self, shares: Mapping[str, float]) -> None:
        """Which sensor each step trains on, and which of that sensor's batches it takes."""
        names = list(self.tiles)
        weights = np.array([shares[name] for name in names], np.float64)
        dice = np.random.default_rng((self.settings.seed, len(names)))
        drawn = dice.choice(len(names), self.steps, p=weights / weights.sum())
        self._sensors = [names[i] for i in drawn]
        self._nth = np.zeros(self.steps, np.int64)
        for i in range(len(names)):
            self._nth[drawn == i] = np.arange((drawn == i).sum())

    def _rows(self, steps: Sequence[int], sensor: str) -> NDArray[np.int64]:
        """Rows of the global batches of a sensor's steps: (steps, batch_size)."""
        size = self.settings.batch_size
        a_pass = len(self.tiles[sensor]) // size
        rows = np.empty((len(steps), size), np.int64)
        order, current = np.empty(0, np.int64), -1
        for i, step in enumerate(steps):
            number, at = divmod(int(self._nth[step]), a_pass)
            if number != current:
                order = shuffled(len(self.tiles[sensor]), self.settings.seed, number)
                current = number
            rows[i] = order[at * size : (at + 1) * size]
        return rows

    def _epoch(self) -> Generator[MicroBatch]:
        """This rank's micro-batches from this step to the end of its epoch."""
        steps = range(self.step, (self.epoch + 1) * self.steps_per_epoch)
        micros, ranks, share = self.settings.accumulate, self.machine.ranks, self._share
        with contextlib.ExitStack() as opened:
            streams = {}
            for sensor, tiles in self.tiles.items():
                own = [step for step in steps if self._sensors[step] == sensor]
                rows = self._rows(own, sensor)
                mine = rows.reshape(-1, micros, ranks, share)[:, :, self.machine.rank].reshape(-1)
                streams[sensor] = tiles.batches(mine, share, self.tile_size)
                opened.callback(streams[sensor].close)  # type: ignore[attr-defined]
            for step in steps:
                sensor = self._sensors[step]
                for micro in range(micros):
                    read = next(streams[sensor])
                    start = (micro * ranks + self.machine.rank) * share
                    yield MicroBatch(
                        sensor,
                        self.machine.upload(read.images),
                        read.rows,
                        slice(start, start + share),
                        micro == 0,
                        micro == micros - 1,
                        read.waited_s,
                        {n: self.machine.upload(part) for n, part in read.parts.items()},
                    )

    def _fit(self, model: nn.Module, try_out: trial.Trial) -> None:
        """Try a micro-batch, on every rank."""

        def fits(count: int) -> bool:
            return trial.runs(self.machine, model, try_out, count)

        largest = trial.largest_that_fits(fits, self._share)
        smallest = min(int(n) for n in self.machine.gather(str(largest)))
        if smallest == self._share:
            return
        size, parts = self.settings.batch_size, self.settings.accumulate * self.machine.ranks
        if smallest == 0:
            advice = "not even one image fits: take a smaller model"
        else:
            advice = (
                f"the largest that fits is {smallest}: set {self._section}.batch_size to "
                f"{smallest * parts}"
            )
            more = self.settings.accumulate * -(-self._share // smallest)
            if size % (more * self.machine.ranks) == 0:
                advice += f", or {self._section}.accumulate to {more}"
        raise BadInput(
            f"{self._section}.batch_size: {self._share} images at once do not fit the memory of "
            f"this machine's {self.machine.device.type}; {advice}"
        )

    # The steps

    def _begin_step(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._loss = torch.zeros((), device=self.machine.device)
        self._before = [buffer.clone() for buffer in self._statistics]
        # For whatever else may draw; all that we know of is drawn from `random`.
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)

    def _tell_paths(self, part: slice) -> None:
        if self._paths:
            size, random = self.settings.batch_size, self.random(PATHS)
            scales = whole_batch.drop_path_scales(self._paths, size, part, random)
            for path, scale in zip(self._paths, self.machine.upload(scales), strict=True):
                path.scale = scale

    def _judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is good, and the counts of those that are not; all on the device."""
        mean, first, row, skipped = self._guard.unbind()
        begun = first > 0
        exploded = begun & (loss > EXPLODED * mean) & (loss > first)
        good = torch.isfinite(loss) & torch.isfinite(norm) & ~exploded
        running = torch.where(begun, torch.lerp(loss, mean, MEMORY_OF_MEAN), loss)
        after = torch.stack((running, torch.where(begun, first, loss), row * 0, skipped))
        self._guard = torch.where(good, after, torch.stack((mean, first, row + 1, skipped + 1)))
        return good

    def _row(self) -> int:
        """Steps skipped in a row; waits for the device."""
        return int(self._guard[2])

    def _log_figures(self, rate: float) -> None:
        loss, norm, good, *_, skipped = torch.cat((self._sums, self._guard)).tolist()
        elapsed = time.monotonic() - self._counted_from
        images = self._updates * self.settings.batch_size
        figures = {
            "train__lr": rate,
            "train__images_per_s": images / elapsed,
            "train__mfu": images / elapsed * self._flops / self._peak,
            "train__data_wait_share": min(1.0, self._waited_s / elapsed),
            "train__memory_gb": self.machine.memory_gb(),
            "train__skipped": skipped,
        }
        if good:
            self._last_loss = loss / good
            figures |= {"train__loss": self._last_loss, "train__grad_norm": norm / good}
        self.log(**figures)
        self.state["seconds"] += elapsed
        self.state["images"] = self.state.get("images", 0) + images
        self._clear()

    def _look_at_skipped(self) -> None:
        """Go back, or give up, after too many skipped steps in a row."""
        row = self._row()
        if row < min(ROW, self.steps):
            return
        at, sensor = self.step - 1, self._sensors[self.step - 1]
        keys = self.tiles[sensor].keys(self._rows(range(at, at + 1), sensor)[0])
        what = (
            f"{row} steps in a row were skipped, up to step {self.step}: their losses were no "
            f"numbers, or more than {EXPLODED:g} times the mean"
        )
        again = (
            f"also at {self.state['rate']:g} times the rate"
            if "rate" in self.state
            else "and no good checkpoint is left to return to"
        )
        if "rate" in self.state or not self._restore(lambda state: not state["row"]):
            raise BadInput(
                f"{self.stage}: {what}, {again}; lower "
                f"{self._section}.base_lr, or look at the last batch's tiles: "
                f"{', '.join(keys[:4])} (and {max(0, len(keys) - 4)} more)"
            )
        self.state["rate"] = LOWER
        self._updated = False
        self._note(f"{what}: returns to step {self.step}, at {LOWER:g} times the rate")
        self._guard[2] = 0
        self._save()
        self._clear()

    # Checkpoints

    def _save(self, best: bool = False) -> None:
        if self.machine.first:
            self.state["row"] = self._row()
            tensors = {**self.tensors, "guard": self._guard}
            checkpoint.write(
                self._checkpoints, self.step, self._bare, self.optimizer, self.state, tensors, best
            )

    def _restore(self, wanted: Callable[[dict[str, Any]], bool] = lambda state: True) -> bool:
        """Go to the newest wanted checkpoint, which the first rank reads and all ranks take."""
        found = checkpoint.read(self._checkpoints, wanted) if self.machine.first else None
        found = self._shared(found)
        if found is not None:
            found.into(self._bare, self.optimizer, self.run_dir)
            self.step, self.state = found.step, found.state
            self.steps = self.state.get("steps", self.steps)
            extra = found.part(checkpoint.EXTRA)
            self._guard = extra.pop("guard").to(self.machine.device)
            self.tensors = extra
        if self.machine.first:
            self.figures.cut(self.step)
        return found is not None

    def _shared(self, found: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
        """The first rank's checkpoint, on every rank: their machines may share no disk."""
        if self.machine.ranks == 1:
            return found
        header = None
        if found is not None:
            kinds = [
                (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
                for name, tensor in found.tensors.items()
            ]
            header = {"step": found.step, "state": found.state, "tensors": kinds}
        told = json.loads(self.machine.gather(json.dumps(header))[0])
        if told is None:
            return None
        tensors = {}
        for name, kind, shape in told["tensors"]:
            own = torch.empty(shape, dtype=getattr(torch, kind))
            tensors[name] = self.machine.broadcast(own if found is None else found.tensors[name])
        return checkpoint.Checkpoint(told["step"], told["state"], tensors)

    # Small things

    def _clear(self) -> None:
        self._sums = torch.zeros(3, device=self.machine.device)  # loss, norm, good steps
        self._waited_s = 0.0
        self._updates = 0
        self._counted_from = time.monotonic()

    def _pause(self, since: float) -> None:
        """Leave the time since then (validation, saving) out of the training's rate."""
        self._counted_from += time.monotonic() - since

    def _note(self, text: str) -> None:
        if self.machine.first:
            console.note(f"{self.stage}: {text}")

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
