"""Pre-training: the encoder learns to fill in masked pixels (RingMo with PIMask).

    uint8 tiles → random crops, turns → normalised images x, mask m
    loss = |x - RingMo(x · (1 - m))| on masked pixels

A killed training goes on from its last checkpoint; the same selection, parameters and revision
give the same encoder.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringmo import config as configuration
from ringmo.config import Config, Pretrain, Sensor
from ringmo.data.loading import SelectedTiles
from ringmo.errors import BadInput
from ringmo.evaluation.pictures import reconstructions
from ringmo.models.backbone import encoder
from ringmo.models.masking import pimask
from ringmo.models.ringmo import RingMo, masked_l1
from ringmo.registry import bundle
from ringmo.stage import REVISIONS, Report
from ringmo.training import engine
from ringmo.workspace import Workspace

SHOWN = 12  # tiles in a picture of reconstructions


def pretrain(config: Config, workspace: Workspace, out: Path) -> Report:
    """Train the encoder on work/select/pretrain.parquet and write it to out/encoder/.

    Raises:
        BadInput: no tiles to train on, a damaged selection, or a loss that is not a number.
        SystemExit: 143 on SIGTERM, after a checkpoint.
    """
    selection = workspace.work("select") / "pretrain.parquet"
    settings, sensor = config.pretrain, config.sensors[config.select.sensor]
    selection_hash = engine.file_hash(selection)
    params = {
        "model": config.model.model_dump(mode="json"),
        "sensors": {config.select.sensor: sensor.model_dump(mode="json")},
        "pretrain": settings.model_dump(mode="json"),
    }
    fingerprint = configuration.digest(selection_hash, params, REVISIONS["pretrain"], None)

    train = SelectedTiles(workspace, selection, "train")
    val = SelectedTiles(workspace, selection, "val")
    if not len(train):
        raise BadInput(f"{selection} has no tiles to train on: ingest more imagery")

    machine, size = engine.hardware(), config.model.image_size
    torch.manual_seed(settings.seed)
    model = RingMo(encoder(config.model, len(sensor.bands), settings.drop_path), len(sensor.bands))
    machine.place(model)
    trainer = engine.Trainer(
        workspace,
        "pretrain",
        fingerprint,
        configuration.flatten(params),
        settings,
        model,
        model.encoder,
        train,
        round(size * engine.CROP_MARGIN),
        machine,
    )

    masks = partial(
        pimask,
        height=size,
        width=size,
        mask_patch_size=settings.mask_patch_size,
        mask_ratio=settings.mask_ratio,
        inside_ratio=settings.inside_ratio,
        device=machine.device,
    )
    held_out = val if len(val) else train

    for batch in trainer.batches():
        images = trainer.augmented(batch, size)
        images = bundle.normalise(images, sensor.mean, sensor.std)
        mask = masks(len(images))
        with machine.autocast():
            loss = masked_l1(model(images, mask), images, mask)
        trainer.update(loss, batch)
        if trainer.epoch_ended:
            if len(val):
                trainer.log(val__loss=_loss(model, val, sensor, masks, settings))
            if trainer.epoch % settings.picture_every == 0 or trainer.epoch == settings.epochs:
                path = trainer.pictures / f"epoch-{trainer.epoch:03d}.png"
                _picture(path, model, held_out, sensor, masks, settings)
        trainer.save_if_due()

    lineage = {
        "selection": selection_hash,
        "params": configuration.digest(params),
        "revision": REVISIONS["pretrain"],
        "encoder": None,
    }
    figures = {
        **trainer.summary(),
        "tiles": len(train),
        "train_loss": trainer.last("train__loss"),
        "val_loss": trainer.last("val__loss"),
    }
    meta = {
        "kind": "encoder",
        "architecture": config.model.model_dump(mode="json"),
        "image_size": size,
        "sensor": config.select.sensor,
        "bands": sensor.bands,
        "mean": sensor.mean,
        "std": sensor.std,
        "classes": None,
        "generated": train.generated,
        "lineage": lineage,
        "figures": {"val_loss": figures["val_loss"]},
    }
    bundle.write(out / "encoder", model.encoder.to("cpu"), meta, train.image(0))
    return Report(
        "pretrain", figures=figures, run_dir=str(trainer.run_dir.relative_to(workspace.root))
    )


@torch.inference_mode()
def _reconstruct(
    model: RingMo, images: Tensor, sensor: Sensor, masks: Any, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of uint8 images: normalised, mask of this seed, reconstruction."""
    device = next(model.parameters()).device
    images = bundle.normalise(images.to(device), sensor.mean, sensor.std)
    mask = masks(len(images), generator=torch.Generator(device).manual_seed(seed))
    was_training = model.training
    model.eval()
    reconstruction = model(images, mask)
    model.train(was_training)
    return images, mask, reconstruction


def _loss(
    model: RingMo, tiles: SelectedTiles, sensor: Sensor, masks: Any, settings: Pretrain
) -> float:
    """Mean masked error over all tiles, uncropped, under the same masks every time."""
    total, size = 0.0, masks.keywords["height"]
    for batch in tiles.batches(np.arange(len(tiles)), settings.batch_size, size):
        seed = settings.seed + int(batch.rows[0])
        images, mask, reconstruction = _reconstruct(model, batch.images, sensor, masks, seed)
        total += float(masked_l1(reconstruction, images, mask)) * len(images)
    return total / len(tiles)


def _picture(
    path: Path,
    model: RingMo,
    tiles: SelectedTiles,
    sensor: Sensor,
    masks: Any,
    settings: Pretrain,
) -> None:
    """Original, masked and reconstructed, of the same tiles and masks every time."""
    rows = np.linspace(0, len(tiles) - 1, min(SHOWN, len(tiles))).astype(int)
    small = torch.stack([tiles.small(int(row), masks.keywords["height"]) for row in rows])
    images, mask, reconstruction = _reconstruct(model, small, sensor, masks, settings.seed)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (sensor.mean, sensor.std))
    filled = torch.where(mask, reconstruction, images).cpu() * std + mean
    reconstructions(path, small.numpy(), mask.cpu().numpy(), filled.clamp(0, 255).byte().numpy())
