"""Whole pre-training steps, measured in a process of their own: a ladder from plain to ours.

    python -m benchmarks.steps '{"rung": "plain", "folder": …, "recipe": "small", "seed": 1, …}'

Each rung has what the one before it has, and one change. All start from fresh weights, take the
same number of steps of the same size at the same rates, and end with the loss on the same held-out
tiles under the same masks. The first epoch warms up and is not timed.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.imagery import Imagery, parameters
from ringmo.config import Config
from ringmo.data import loading
from ringmo.models.backbone import fuse_attention
from ringmo.models.masking import pimask
from ringmo.models.normal import Normal
from ringmo.models.pretraining import pretraining_model
from ringmo.training import engine
from ringmo.training.augmentation import crops, cut

RUNGS = {
    "plain": "the plain recipe",
    "loader": "our loader: whole tiles in threads; crop, flip and mask an image at a time",
    "augment": "crops and turns of whole batches on the device",
    "pimask": "masks of whole batches on the device",
    "kept": "tiles that fit in memory are decoded once",
    "fast": "fused AdamW, the device's attention, no waiting for the loss",
    "engine": "all of `ringmo pretrain`: as the fast one, with its checks, figures and checkpoints",
    "compiled": "hardware.compile: true",
}
VAL = 64  # held-out tiles at a time
PROFILED = 10  # steps
LINES = 30  # of the profile

# A batch: images (B, 3, H, W), normalised, and masks (B, 1, H, W), both on the device.
Batches = Iterator[tuple[Tensor, Tensor]]


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Images a second after the first epoch, memory, loss on held-out tiles."""
    imagery = Imagery(Path(spec["folder"]), 0, 0, 0, 0.0)
    changes = {
        "pretrain.epochs": spec["epochs"],
        "pretrain.warmup_epochs": 1,
        "pretrain.batch_size": spec["batch"],
        "pretrain.seed": spec["seed"],
        # None of these within a measurement.
        "pretrain.picture_every": 1000,
        "pretrain.knn_every": 1000,
        "pretrain.checkpoint_every_s": 3600,
        "hardware.accelerator": spec["device"],
        "hardware.compile": spec["rung"] == "compiled",
    }
    config = parameters(imagery, spec["recipe"], changes)
    torch.manual_seed(spec["seed"])
    if spec["rung"] in ("engine", "compiled"):
        return whole_engine(config, imagery)
    return ladder(config, imagery, spec)


def whole_engine(config: Config, imagery: Imagery) -> dict[str, Any]:
    """The stage itself, and what it wrote into figures.jsonl."""
    from ringmo import console
    from ringmo.training.pretrain import pretrain

    console.quiet = True
    # A training of the same seed would go on from the end of the one before.
    shutil.rmtree(imagery.workspace.state / "runs", ignore_errors=True)
    out = imagery.folder / f"out-{time.time_ns()}"
    out.mkdir()
    report = pretrain(config, imagery.workspace, out)
    run_dir = imagery.workspace.root / str(report.run_dir)
    lines = [json.loads(line) for line in (run_dir / "figures.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "train/images_per_s" in line and line["epoch"] > 1]

    def mean(name: str) -> float:
        return float(np.mean([line[name] for line in timed]))

    # The mean of rates over equal numbers of images is harmonic.
    rate = len(timed) / sum(1 / line["train/images_per_s"] for line in timed)
    return {
        "images_per_s": rate,
        "loss": [line["val/loss"] for line in lines if "val/loss" in line][-1],
        "mfu": mean("train/mfu"),
        "wait_share": mean("train/data_wait_share"),
        **memory(torch.device("cuda" if "cuda" in config.hardware.accelerator else "cpu")),
    }


def ladder(config: Config, imagery: Imagery, spec: dict[str, Any]) -> dict[str, Any]:
    rung, device = spec["rung"], torch.device(spec["device"])
    settings = config.pretrain
    tall = list(RUNGS).index(rung)
    if tall < list(RUNGS).index("kept"):
        loading.CACHE_BYTES = 0
    selection = imagery.workspace.work("select") / "pretrain.parquet"
    train = loading.SelectedTiles(imagery.workspace, selection, "train", "rgb")
    val = loading.SelectedTiles(imagery.workspace, selection, "val", "rgb")
    steps_per_epoch = len(train) // settings.batch_size
    steps = steps_per_epoch * settings.epochs

    fast = tall >= list(RUNGS).index("fast")
    if rung == "plain":
        model: Any = plain.PlainRingMo(config.model).to(device)
        batches = _plain_batches(imagery, config, spec["workers"], device)
    else:
        model = pretraining_model(config.model, settings, {"rgb": 3})
        # timm's own choice is fused, everywhere.
        fuse_attention(model, fused=device.type == "cuda" if fast else True)
        model.to(device)
        batches = _our_batches(config, train, rung, device)
    optimiser = plain.optimiser(model, settings.weight_decay, fused=True if fast else None)
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    model.train()
    started, profile, losses = 0.0, None, []
    for step in range(steps):
        if step == steps_per_epoch:
            _wait(device)
            started = time.perf_counter()
        if spec.get("profile") and step == steps - PROFILED:
            _wait(device)
            profile = torch.profiler.profile().__enter__()
        images, mask = next(batches)
        with autocast:
            loss = model(images, mask)
        rate = engine.learning_rate(step, steps, steps_per_epoch, settings)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimiser.step()
        losses.append(loss.detach() if fast else loss.item())
    _wait(device)
    elapsed = time.perf_counter() - started
    result = {
        "images_per_s": (steps - steps_per_epoch) * settings.batch_size / elapsed,
        **memory(device),  # the loader's workers are still there
    }
    if profile is not None:
        profile.__exit__(None, None, None)
        by = f"self_{device.type}_time_total" if device.type == "cuda" else "self_cpu_time_total"
        result["profile"] = profile.key_averages().table(sort_by=by, row_limit=LINES)
    return result | {"loss": held_out(model, val, config, device, autocast)}


def _plain_batches(imagery: Imagery, config: Config, workers: int, device: torch.device) -> Batches:
    for images, mask in plain.batches(imagery.train, config, workers, device.type):
        yield images.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def _our_batches(
    config: Config, tiles: loading.SelectedTiles, rung: str, device: torch.device
) -> Batches:
    """What the rungs between the plain recipe and the engine train on."""
    settings, size, sensor = config.pretrain, config.model.image_size, config.sensors["rgb"]
    tile_size = round(size * engine.CROP_MARGIN)
    if rung == "loader":
        prepare: Callable[[Tensor], Tensor] = _one_by_one(config)
    else:
        random = np.random.default_rng(settings.seed)

        def prepare(tiles: Tensor) -> Tensor:
            where = crops(len(tiles), settings.crop_scale, random)
            images = cut(tiles.to(device, non_blocking=True), where.to(device), size)
            return Normal(sensor, images.device)(images)

    dice = np.random.default_rng(settings.seed)

    def masks(count: int) -> Tensor:
        of = settings
        if rung in ("loader", "augment"):
            one = (size, of.mask_patch_size, of.mask_ratio, of.inside_ratio, dice)
            drawn = np.stack([plain.mask_of_one(*one) for _ in range(count)])
            return torch.from_numpy(drawn)[:, None].to(device)
        return pimask(
            count,
            size,
            size,
            mask_patch_size=of.mask_patch_size,
            mask_ratio=of.mask_ratio,
            inside_ratio=of.inside_ratio,
            device=device,
        )

    whole = len(tiles) // settings.batch_size * settings.batch_size
    epoch = 0
    while True:
        order = loading.shuffled(len(tiles), settings.seed, epoch)[:whole]
        for batch in tiles.batches(order, settings.batch_size, tile_size):
            images = prepare(batch.images).to(device)
            yield images, masks(len(images))
        epoch += 1


def _one_by_one(config: Config) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    steps = v2.Compose(
        [
            v2.RandomResizedCrop(
                config.model.image_size,
                scale=config.pretrain.crop_scale,
                interpolation=v2.InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(plain.MEAN, plain.STD),
        ]
    )
    return lambda tiles: torch.stack([steps(tile) for tile in tiles])


@torch.no_grad()
def held_out(
    model: nn.Module,
    tiles: loading.SelectedTiles,
    config: Config,
    device: torch.device,
    autocast: Any,
) -> float:
    """As `ringmo pretrain` validates: all tiles, uncropped, under masks of the same seeds."""
    settings, size, sensor = config.pretrain, config.model.image_size, config.sensors["rgb"]
    total = 0.0
    model.eval()
    for batch in tiles.batches(np.arange(len(tiles)), VAL, size):
        images = Normal(sensor, device)(batch.images.to(device))
        seed = settings.seed + int(batch.rows[0])
        mask = pimask(
            len(images),
            size,
            size,
            mask_patch_size=settings.mask_patch_size,
            mask_ratio=settings.mask_ratio,
            inside_ratio=settings.inside_ratio,
            generator=torch.Generator(device).manual_seed(seed),
            device=device,
        )
        with autocast:
            total += float(model(images, mask)) * len(images)
    return total / len(tiles)


def memory(device: torch.device) -> dict[str, float]:
    """Megabytes: of this process and its workers, shared pages counted once; of the GPU."""
    import psutil

    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    used = {"memory_mb": sum(one.memory_full_info().pss for one in family) / 1e6}
    if device.type == "cuda":
        used["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return used


def masking(spec: dict[str, Any]) -> dict[str, float]:
    """Milliseconds for a batch of masks: in one pass on the device, and an image at a time."""
    device, dice = torch.device(spec["device"]), np.random.default_rng(0)
    size, patch, count = spec["size"], spec["patch"], spec["batch"]

    def ours() -> None:
        pimask(count, size, size, mask_patch_size=patch, device=device)
        _wait(device)

    def theirs() -> None:
        masks = [plain.mask_of_one(size, patch, 0.6, 0.6, dice) for _ in range(count)]
        torch.from_numpy(np.stack(masks)[:, None]).to(device)
        _wait(device)

    return {"ours_ms": _median_ms(ours), "baseline_ms": _median_ms(theirs)}


def _median_ms(work: Callable[[], None], times: int = 15) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[3:]) * 1e3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    from benchmarks.child import begin

    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    found = masking(asked) if asked["rung"] == "masking" else run(asked)
    print(json.dumps(found), flush=True)
