"""Fine-tuning for any task, from the pre-trained encoder or from scratch.

    tiles → random crops, turns, perhaps more → the task's model → the task's loss

The recipe is the same with and without the encoder, so that the difference is the encoder's. The
model of the best epoch by the task's main figure on the validation tiles is kept, the later one of
equals.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ringmo import config as configuration
from ringmo import tasks
from ringmo.config import Config
from ringmo.data.loading import BESIDE, SelectedTiles
from ringmo.data.selection import resolved
from ringmo.errors import BadInput
from ringmo.models.backbone import Transfer, encoder, transfer
from ringmo.registry import bundle
from ringmo.stage import REVISIONS, Report, parameters
from ringmo.tasks.base import Evidence, Figures, Sample, Task, joined
from ringmo.tasks.samples import Samples, made_up
from ringmo.training import engine
from ringmo.training.augmentation import cut, erased, holes, mixed
from ringmo.training.engine import Trainer
from ringmo.training.machine import Machine
from ringmo.training.rand_augment import changes, rand_augment
from ringmo.workspace import Workspace


def finetune(
    config: Config,
    workspace: Workspace,
    out: Path,
    task: str,
    from_scratch: bool = False,
    *,
    encoder: Path | None = None,
    selection: Path | None = None,
) -> Report:
    """Train on work/select/TASK.parquet and write the model to out/model/.

    From work/pretrain/encoder, whose architecture and normalisation it takes, at the sizes of
    finetune.TASK; or, from scratch, with those of params.yaml and no weights.

    Args:
        encoder: another bundle's folder. selection: another Parquet file of the same columns.

    Raises:
        BadInput: no labels or too few for a batch, no encoder, one for other bands or other
            sizes, a batch that does not fit the memory, unequal ranks, a loss that stays no
            number.
        SystemExit: 143 on SIGTERM, after a checkpoint.
    """
    stage = f"{'scratch' if from_scratch else 'finetune'}@{task}"
    kind = tasks.find(task)
    selection = selection or workspace.work("select") / f"{task}.parquet"
    settings = config.finetune[task]
    names = (config.select.sensor, *config.select.beside)
    sensors, pretrained, encoder_hash = {n: config.sensors[n] for n in names}, None, None
    selection_hash = engine.file_hash(selection)
    train, val = (
        SelectedTiles(workspace, selection, split, names[0], task=kind, beside=names[1:])
        for split in ("train", "val")
    )
    try:
        classes = kind.classes(train, settings)
    except BadInput as error:
        raise BadInput(f"{selection}: {error}") from None

    architecture = config.model
    if from_scratch:
        known = resolved(config, workspace)
        sensors = {name: known[name] for name in names}
    else:
        pretrained = bundle.load(encoder or workspace.work("pretrain") / "encoder")
        sensors = {name: _sensor_of(pretrained, name, of) for name, of in sensors.items()}
        architecture = configuration.Model.model_validate(pretrained.meta["architecture"])
        encoder_hash = pretrained.hash
    try:
        architecture = settings.sized(architecture)
    except ValueError as error:
        raise BadInput(str(error)) from None
    size = architecture.image_size
    params = {
        "model": architecture.model_dump(mode="json"),
        "sensors": {name: sensor.described() for name, sensor in sensors.items()},
        f"finetune.{task}": settings.model_dump(mode="json"),
    }
    revision = REVISIONS["finetune"]
    fingerprint = configuration.digest(selection_hash, params, revision, encoder_hash)

    # Some heads have parts that a batch may leave alone.
    machine = Machine(config.hardware, unused_parameters=task != "scene")
    torch.manual_seed(settings.seed)
    bands = {name: len(sensor.bands) for name, sensor in sensors.items()}
    freeze = settings.freeze and pretrained is not None
    model = _untrained(kind, architecture, bands, 0.0 if freeze else None, len(classes), settings)
    kind.prepare(model, train, classes, settings)
    generated, notes = train.generated, []
    if pretrained is not None:
        came = transfer(pretrained.model.state_dict(), model.encoder, str(pretrained.folder))
        generated = generated or bool(pretrained.meta["generated"])
        notes = _what_came(came)
        if freeze:
            model.encoder.freeze()
            notes.append("the encoder is frozen: only what stands on it is trained")
    machine.place(model)

    def try_out(candidate: nn.Module, count: int) -> Tensor:
        made = made_up(kind, len(classes), bands, count, size, machine.device)
        return kind.loss(candidate, made, settings)

    read_size = settings.test_resize or size
    trainer = Trainer(
        workspace,
        stage,
        fingerprint,
        parameters(
            stage,
            params,
            sensor=names[0],
            tiles={"train": len(train), "val": len(val)},
            selection=selection_hash[:16],
            encoder=encoder_hash and encoder_hash[:16],
            revision=revision,
        ),
        settings,
        machine,
        model,
        model.encoder,
        {names[0]: train},
        {names[0]: 1.0},
        size,
        try_out,
        config.hardware.compile,
        read_size,
    )

    def sampled(tiles: SelectedTiles) -> Samples:
        how = settings.heights, settings.multi_label, machine.upload
        return Samples(kind, tiles, classes, sensors, machine.device, *how)

    samples, val_samples = sampled(train), sampled(val)
    best = f"val_{kind.metric}"
    for batch in trainer.batches():
        loss = kind.loss(trainer.model, augmented(trainer, batch, samples), settings)
        trainer.update(loss, batch)
        if trainer.epoch_ended:
            gain = 0.0  # without validation tiles every epoch ties, so the last is kept
            if len(val):
                figures = _validated(trainer, model, kind, val_samples, read_size).whole
                trainer.log(**{f"val__{name}": value for name, value in figures.items()})
                gain = kind.gain(kind.metric, figures[kind.metric])
            if gain >= trainer.state.get("best_gain", -math.inf):
                value = figures[kind.metric] if len(val) else None
                trainer.state |= {"best_gain": gain, "best": value, "best_epoch": trainer.epoch}
                trainer.tensors = {n: v.clone() for n, v in model.state_dict().items()}
            waited = trainer.epoch - trainer.state["best_epoch"]
            if settings.early_stop is not None and len(val) and waited >= settings.early_stop:
                trainer.stop_early()
        trainer.save_if_due()

    model.load_state_dict(trainer.tensors)
    value = trainer.state["best"]
    done = {
        **trainer.summary(),
        "tiles": len(train),
        "classes": len(classes),
        "train_loss": trainer.last("train__loss"),
        best: None if value is None else round(value, 4),
        "best_epoch": trainer.state["best_epoch"],
    }
    meta = {
        "kind": task,
        "architecture": architecture.model_dump(mode="json"),
        "image_size": size,
        "resize": read_size,
        "tile_pixels": int(np.median(train.table[["width", "height"]].max(axis=1))),
        "gsd_m": _gsd_m(train),
        "settings": settings.model_dump(mode="json"),
        "sensors": params["sensors"],
        "sensor": names[0],
        "classes": classes,
        "generated": generated,
        "lineage": {
            "selection": selection_hash,
            "params": configuration.digest(params),
            "revision": revision,
            "encoder": encoder_hash,
        },
        "figures": {best: done[best]},
    }
    if machine.first:
        example = {names[0]: train.image(0)}
        example |= {name.removeprefix(BESIDE): train.other(name, 0) for name in train.others}
        bundle.write(out / "model", model.to("cpu"), meta, example)
    machine.leave()
    run_dir = str(trainer.run_dir.relative_to(workspace.root))
    return Report(stage, figures=done, notes=notes, run_dir=run_dir)


def augmented(trainer: Trainer, batch: engine.MicroBatch, samples: Samples) -> Sample:
    """A batch as it is learnt: cropped and turned with its labels, perhaps mixed and covered."""
    settings, upload = trainer.settings, trainer.machine.upload
    assert isinstance(settings, configuration.Finetune)
    size, where = settings.batch_size, trainer.where(batch)
    images = cut(batch.images, upload(where), trainer.image_size)
    if settings.rand_augment:
        chosen = changes(size, settings.rand_augment, trainer.random(engine.CHANGES))
        images = rand_augment(images, chosen[batch.part], upload)
    sample = samples.cropped(images, batch.parts, batch.rows, where, trainer.image_size)
    if not (settings.random_erasing or settings.mixup or settings.cutmix):
        return sample
    images = sample.images[batch.sensor]
    if settings.random_erasing:
        at = holes(size, settings.random_erasing, trainer.random(engine.HOLES))[batch.part]

        def noise(count: int, **on: Any) -> Tensor:
            return torch.randn(count, *images.shape[1:], **on)

        images = erased(images, upload(at), trainer.drawn(engine.NOISE, batch, noise))
    assert sample.labels is not None
    random = trainer.random(engine.MIX)
    images, sample.labels = mixed(images, sample.labels, settings.mixup, settings.cutmix, random)
    sample.images[batch.sensor] = images
    return sample


def _sensor_of(
    pretrained: bundle.Bundle, name: str, sensor: configuration.Sensor
) -> configuration.Sensor:
    """The task's sensor as the encoder knows it: its normalisation belongs to its weights."""
    again = "pre-train again with it in pretrain.mix"
    meta = pretrained.meta["sensors"].get(name)
    if meta is None or meta["bands"] != sensor.bands or meta["dtype"] != sensor.dtype:
        found = "no such sensor" if meta is None else f"{meta['bands']} of {meta['dtype']}"
        raise BadInput(
            f"{pretrained.folder}: sensor {name} has {sensor.bands} of {sensor.dtype}, the encoder "
            f"knows {found}: {again}"
        )
    known = configuration.Sensor.model_validate(meta)
    if known.steps != sensor.steps:
        raise BadInput(
            f"{pretrained.folder}: scale, offset, decibels and clip of sensor {name} are "
            f"{sensor.steps}, the encoder knows {known.steps}: {again}"
        )
    return known


def _untrained(
    task: Task,
    architecture: configuration.Model,
    bands: dict[str, int],
    drop_path: float | None,
    classes: int,
    settings: configuration.Finetune,
) -> Any:
    path = settings.drop_path if drop_path is None else drop_path
    return task.model(encoder(architecture, bands, path, finetuning=True), classes, settings)


def _gsd_m(train: SelectedTiles) -> dict[str, float] | None:
    """The ground sampling distances of nearly all training tiles, in metres; None: none says."""
    if "gsd_m" not in train.table:
        return None
    gsd = train.table["gsd_m"]
    known = gsd[gsd > 0].astype(float)
    if known.empty:
        return None
    low, high = np.percentile(known, (5, 95))
    return {"low": round(float(low), 6), "high": round(float(high), 6)}


def _what_came(came: Transfer) -> list[str]:
    notes = [f"{came.matched} tensors of the encoder came over ({came.parameters} values)"]
    if came.resized:
        notes.append(f"{len(came.resized)} position tables were resized")
    if came.left_out:
        notes.append(f"left out: {', '.join(came.left_out)}")
    return notes


@torch.no_grad()
def _validated(
    trainer: Trainer, model: nn.Module, task: Task, samples: Samples, size: int
) -> Figures:
    """The task's figures on the validation tiles, answered as they are answered for later."""
    model.eval()
    parts = []
    for batch in trainer.validation(samples.tiles, size):
        sample = samples.whole(batch)
        with trainer.machine.autocast():
            answer = task.answer(model, sample.images)
        parts.append(task.evidence(answer, sample))
    model.train()
    return task.figures(_of_all_ranks(trainer.machine, parts), samples.classes)


def _of_all_ranks(machine: Machine, parts: list[Evidence]) -> Evidence:
    """The evidence of all ranks' tiles together."""
    if machine.ranks == 1:
        return joined(parts)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **joined(parts) if parts else {})
    told = machine.gather(base64.b64encode(file.getvalue()).decode())
    read = [np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) for text in told]
    return joined([dict(one) for one in read if one.files])
