"""Fine-tuning for scene classification, from the pre-trained encoder or from scratch.

    uint8 tiles → random crops, turns, perhaps mixed in pairs → classifier → smoothed cross-entropy

The recipe is the same with and without the encoder, so that the difference is the encoder's. The
model of the best epoch by validation accuracy is kept, the later one of equals.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ringmo import config as configuration
from ringmo.config import Config
from ringmo.data.loading import SelectedTiles
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder, transfer
from ringmo.models.classifier import Classifier
from ringmo.registry import bundle
from ringmo.stage import REVISIONS, Report
from ringmo.training import engine
from ringmo.workspace import Workspace


def finetune(
    config: Config, workspace: Workspace, out: Path, task: str, from_scratch: bool = False
) -> Report:
    """Train on work/select/TASK.parquet and write the model to out/model/.

    From work/pretrain/encoder, whose architecture and normalisation it takes; or, from scratch,
    with those of params.yaml and no weights.

    Raises:
        BadInput: no labels, no encoder, one for other bands, or a loss that is not a number.
        SystemExit: 143 on SIGTERM, after a checkpoint.
    """
    stage = f"{'scratch' if from_scratch else 'finetune'}@{task}"
    selection = workspace.work("select") / f"{task}.parquet"
    settings, sensor = config.finetune["scene"], config.sensors[config.select.sensor]
    selection_hash = engine.file_hash(selection)
    train = SelectedTiles(workspace, selection, "train")
    val = SelectedTiles(workspace, selection, "val")
    classes = sorted({str(label) for label in train.table["label"]})
    if len(classes) < 2:
        raise BadInput(
            f"{selection} has {len(train)} labelled tiles to train on, of {len(classes)} classes: "
            f"put images into two or more class folders, or label them, and ingest again"
        )

    architecture, mean, std, encoder_hash = config.model, sensor.mean, sensor.std, None
    if not from_scratch:
        pretrained = bundle.load(workspace.work("pretrain") / "encoder")
        if pretrained.meta["bands"] != sensor.bands:
            raise BadInput(
                f"{pretrained.folder} reads bands {pretrained.meta['bands']}, "
                f"sensor {config.select.sensor} has {sensor.bands}: pre-train again"
            )
        architecture = configuration.Model.model_validate(pretrained.meta["architecture"])
        mean, std, encoder_hash = pretrained.meta["mean"], pretrained.meta["std"], pretrained.hash
    params = {
        "model": architecture.model_dump(mode="json"),
        "sensors": {config.select.sensor: sensor.model_dump(mode="json")},
        f"finetune.{task}": settings.model_dump(mode="json"),
    }
    fingerprint = configuration.digest(selection_hash, params, REVISIONS["finetune"], encoder_hash)

    machine, size = engine.hardware(), architecture.image_size
    torch.manual_seed(settings.seed)
    trunk = encoder(architecture, len(sensor.bands), settings.drop_path)
    model = Classifier(trunk, len(classes))
    generated = train.generated
    if not from_scratch:
        came = transfer(pretrained.model.state_dict(), trunk, str(pretrained.folder))
        generated = generated or bool(pretrained.meta["generated"])
    machine.place(model)
    trainer = engine.Trainer(
        workspace,
        stage,
        fingerprint,
        configuration.flatten(params),
        settings,
        model,
        trunk,
        train,
        round(size * engine.CROP_MARGIN),
        machine,
    )

    targets = torch.from_numpy(_numbers(train, classes)).to(machine.device)
    normal = {"mean": mean, "std": std}
    for batch in trainer.batches():
        images = bundle.normalise(trainer.augmented(batch, size), mean, std)
        wanted = torch.nn.functional.one_hot(targets[batch.rows], len(classes)).float()
        if settings.mixup:
            share = float(trainer.random.beta(settings.mixup, settings.mixup))
            images = share * images + (1 - share) * images.flip(0)
            wanted = share * wanted + (1 - share) * wanted.flip(0)
        with machine.autocast():
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), wanted, label_smoothing=settings.label_smoothing
        )
        trainer.update(loss, batch)
        if trainer.epoch_ended:
            if len(val):
                accuracy = _accuracy(model, val, classes, normal, size, settings.batch_size)
                trainer.log(val__accuracy=accuracy)
            else:
                accuracy = 0.0  # every epoch ties, so the last is kept
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
        "sensor": config.select.sensor,
        "bands": sensor.bands,
        "mean": mean,
        "std": std,
        "classes": classes,
        "generated": generated,
        "lineage": {
            "selection": selection_hash,
            "params": configuration.digest(params),
            "revision": REVISIONS["finetune"],
            "encoder": encoder_hash,
        },
        "figures": {"val_accuracy": figures["val_accuracy"]},
    }
    bundle.write(out / "model", model.to("cpu"), meta, train.image(0))
    report = Report(
        stage, figures=figures, run_dir=str(trainer.run_dir.relative_to(workspace.root))
    )
    if not from_scratch:
        report.notes.append(
            f"all {came.matched} tensors of the encoder came over ({came.parameters} values)"
        )
    return report


def _numbers(tiles: SelectedTiles, classes: list[str]) -> NDArray[np.int64]:
    """Class numbers of the tiles; -1 for a class that the training tiles do not have."""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(str(label), -1) for label in tiles.table["label"]], np.int64)


def _accuracy(
    model: Classifier,
    tiles: SelectedTiles,
    classes: list[str],
    normal: dict[str, list[float]],
    size: int,
    batch_size: int,
) -> float:
    """Share of tiles, uncropped, whose likeliest class is theirs."""
    device = next(model.parameters()).device
    truth, right = _numbers(tiles, classes), 0
    model.eval()
    for batch in tiles.batches(np.arange(len(tiles)), batch_size, size):
        predicted = bundle.answer(model, batch.images.to(device), normal).argmax(1).cpu().numpy()
        right += int((predicted == truth[batch.rows]).sum())
    model.train()
    return right / len(tiles)
