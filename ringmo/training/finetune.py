"""Fine-tuning for scene classification, from the pre-trained encoder or from scratch.

    tiles → random crops, turns, perhaps more → classifier → smoothed cross-entropy

The recipe is the same with and without the encoder, so that the difference is the encoder's. The
model of the best epoch by validation accuracy is kept, the later one of equals.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo import config as configuration
from ringmo.config import Config
from ringmo.data.loading import SelectedTiles
from ringmo.data.selection import resolved
from ringmo.errors import BadInput
from ringmo.models.backbone import Transfer, encoder, transfer
from ringmo.models.classifier import Classifier
from ringmo.models.normal import Normal
from ringmo.registry import bundle
from ringmo.stage import REVISIONS, Report
from ringmo.training import engine
from ringmo.training.augmentation import erased, holes, mixed
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
    selection = selection or workspace.work("select") / f"{task}.parquet"
    settings, name = config.finetune["scene"], config.select.sensor
    sensor, pretrained, encoder_hash = config.sensors[name], None, None
    selection_hash = engine.file_hash(selection)
    train = SelectedTiles(workspace, selection, "train", name)
    val = SelectedTiles(workspace, selection, "val", name)
    classes = sorted({str(label) for label in train.table["label"]})
    if len(classes) < 2:
        raise BadInput(
            f"{selection} has {len(train)} labelled tiles to train on, of {len(classes)} classes: "
            f"put images into two or more class folders, or label them, and ingest again"
        )

    architecture = config.model
    if from_scratch:
        sensor = resolved(config, workspace)[name]
    else:
        pretrained = bundle.load(encoder or workspace.work("pretrain") / "encoder")
        sensor = _sensor_of(pretrained, name, sensor)
        architecture = configuration.Model.model_validate(pretrained.meta["architecture"])
        encoder_hash = pretrained.hash
    try:
        architecture = settings.sized(architecture)
    except ValueError as error:
        raise BadInput(str(error)) from None
    size = architecture.image_size
    params = {
        "model": architecture.model_dump(mode="json"),
        "sensors": {name: sensor.described()},
        f"finetune.{task}": settings.model_dump(mode="json"),
    }
    revision = REVISIONS["finetune"]
    fingerprint = configuration.digest(selection_hash, params, revision, encoder_hash)

    machine = Machine(config.hardware)
    normal = Normal(sensor, machine.device)
    torch.manual_seed(settings.seed)
    model = _classifier(architecture, {name: len(sensor.bands)}, settings.drop_path, len(classes))
    generated, notes = train.generated, []
    if pretrained is not None:
        came = transfer(pretrained.model.state_dict(), model.encoder, str(pretrained.folder))
        generated = generated or bool(pretrained.meta["generated"])
        notes = _what_came(came)
    machine.place(model)

    def try_out(candidate: nn.Module, count: int) -> Tensor:
        shape = (count, len(sensor.bands), size, size)
        logits: Tensor = candidate(torch.randn(shape, device=machine.device))
        return logits.float().logsumexp(1).mean()

    trainer = Trainer(
        workspace,
        stage,
        fingerprint,
        configuration.flatten(params),
        settings,
        machine,
        model,
        model.encoder,
        {name: train},
        {name: 1.0},
        size,
        try_out,
        config.hardware.compile,
    )

    answers = torch.nn.functional.one_hot(torch.from_numpy(_numbers(train, classes))).float()
    for batch in trainer.batches():
        images, wanted = augmented(trainer, batch, normal, answers)
        logits = trainer.model(images)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), wanted, label_smoothing=settings.label_smoothing
        )
        trainer.update(loss, batch)
        if trainer.epoch_ended:
            accuracy = 0.0  # without validation tiles every epoch ties, so the last is kept
            if len(val):
                accuracy = _accuracy(trainer, model, val, classes, normal)
                trainer.log(val__accuracy=accuracy)
            if accuracy >= trainer.state.get("best_accuracy", 0.0):
                trainer.state |= {"best_accuracy": accuracy, "best_epoch": trainer.epoch}
                trainer.tensors = {n: v.clone() for n, v in model.state_dict().items()}
        trainer.save_if_due()

    model.load_state_dict(trainer.tensors)
    figures = {
        **trainer.summary(),
        "tiles": len(train),
        "classes": len(classes),
        "train_loss": trainer.last("train__loss"),
        "val_accuracy": round(trainer.state["best_accuracy"], 4) if len(val) else None,
        "best_epoch": trainer.state["best_epoch"],
    }
    meta = {
        "kind": "scene",
        "architecture": architecture.model_dump(mode="json"),
        "image_size": size,
        "resize": settings.test_resize or size,
        "sensors": params["sensors"],
        "sensor": name,
        "classes": classes,
        "generated": generated,
        "lineage": {
            "selection": selection_hash,
            "params": configuration.digest(params),
            "revision": revision,
            "encoder": encoder_hash,
        },
        "figures": {"val_accuracy": figures["val_accuracy"]},
    }
    if machine.first:
        bundle.write(out / "model", model.to("cpu"), meta, train.image(0))
    machine.leave()
    run_dir = str(trainer.run_dir.relative_to(workspace.root))
    return Report(stage, figures=figures, notes=notes, run_dir=run_dir)


def augmented(
    trainer: Trainer, batch: engine.MicroBatch, normal: Normal, answers: Tensor
) -> tuple[Tensor, Tensor]:
    """A batch as it is learnt: images, normalised, and the shares of the classes they show.

    Args:
        answers: (tiles, classes), on the CPU.
    """
    settings, upload = trainer.settings, trainer.machine.upload
    assert isinstance(settings, configuration.Finetune)
    size, images = settings.batch_size, trainer.augmented(batch)
    if settings.rand_augment:
        chosen = changes(size, settings.rand_augment, trainer.random(engine.CHANGES))
        images = rand_augment(images, chosen[batch.part], upload)
    images = normal(images)
    if settings.random_erasing:
        where = holes(size, settings.random_erasing, trainer.random(engine.HOLES))[batch.part]

        def noise(count: int, **on: Any) -> Tensor:
            return torch.randn(count, *images.shape[1:], **on)

        images = erased(images, upload(where), trainer.drawn(engine.NOISE, batch, noise))
    random = trainer.random(engine.MIX)
    wanted = upload(answers[batch.rows])
    return mixed(images, wanted, settings.mixup, settings.cutmix, random)


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


def _classifier(
    architecture: configuration.Model, bands: dict[str, int], drop_path: float, classes: int
) -> Classifier:
    return Classifier(encoder(architecture, bands, drop_path, finetuning=True), classes)


def _what_came(came: Transfer) -> list[str]:
    notes = [f"{came.matched} tensors of the encoder came over ({came.parameters} values)"]
    if came.resized:
        notes.append(f"{len(came.resized)} position tables were resized")
    if came.left_out:
        notes.append(f"left out: {', '.join(came.left_out)}")
    return notes


def _numbers(tiles: SelectedTiles, classes: list[str]) -> NDArray[np.int64]:
    """Class numbers of the tiles; -1 for a class that the training tiles do not have."""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(str(label), -1) for label in tiles.table["label"]], np.int64)


@torch.no_grad()
def _accuracy(
    trainer: Trainer, model: Classifier, tiles: SelectedTiles, classes: list[str], normal: Normal
) -> float:
    """Share of tiles, as they are answered for later, whose likeliest class is theirs."""
    truth, right = _numbers(tiles, classes), 0
    settings = trainer.settings
    assert isinstance(settings, configuration.Finetune)
    model.eval()
    for images, rows in trainer.validation(tiles, settings.test_resize or trainer.image_size):
        with trainer.machine.autocast():
            shown = normal(bundle.middle(images, trainer.image_size))
            predicted = model(shown).argmax(1).cpu().numpy()
        right += int((predicted == truth[rows]).sum())
    model.train()
    return trainer.machine.total(right)[0] / len(tiles)
