"""Pre-training: the encoder learns to fill in what a mask hides (RingMo, SimMIM or MAE).

    tiles → random crops, turns → normalised images x, mask m
    loss = |x - model(x · (1 - m))| on masked pixels

    ringmo pretrain                                    one process, or one a GPU
    torchrun --nproc-per-node 2 -m ringmo pretrain     by hand; more in training/launch.py

A killed training goes on from its last checkpoint; the same selection, parameters and revision
give the same encoder.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ringmo import config as configuration
from ringmo.config import Config
from ringmo.data.colours import stretched
from ringmo.data.loading import SelectedTiles
from ringmo.data.selection import resolved
from ringmo.errors import BadInput
from ringmo.evaluation import pictures, probes
from ringmo.models.backbone import timm_weights, transfer
from ringmo.models.mae import MAE
from ringmo.models.normal import Normal
from ringmo.models.pretraining import pretraining_model
from ringmo.models.ringmo import RingMo
from ringmo.registry import bundle
from ringmo.stage import REVISIONS, Report, parameters
from ringmo.training import engine
from ringmo.training.engine import Trainer
from ringmo.training.machine import Machine
from ringmo.workspace import CHAMPION, Workspace

SHOWN = 12  # tiles in a picture of reconstructions
KNN_TILES = 2000  # of each split, evenly chosen: enough for a figure, seconds to embed


def pretrain(config: Config, workspace: Workspace, out: Path) -> Report:
    """Train the encoder on work/select/pretrain.parquet and write it to out/encoder/.

    With pretrain.refresh: champion, take the one that champion.yaml names; with continue, start
    from it. Its decoder was not kept, and starts anew.

    Raises:
        BadInput: too few tiles or too small ones, a damaged selection, a batch that does not fit
            the memory, unequal ranks, a loss that stays no number.
        SystemExit: 143 on SIGTERM, after a checkpoint.
    """
    if config.pretrain.refresh == "champion":
        return _taken(config, workspace, out)
    selection = workspace.work("select") / "pretrain.parquet"
    settings, size = config.pretrain, config.model.image_size
    sensors = resolved(config, workspace)
    bands = {name: len(sensor.bands) for name, sensor in sensors.items()}
    selection_hash = engine.file_hash(selection)
    start = _named(config, workspace) if settings.refresh == "continue" else None
    if start is not None:
        init_hash: str | None = start.hash
    else:
        init_hash = engine.file_hash(Path(settings.init)) if settings.init else None
    params = {
        "model": config.model.model_dump(mode="json"),
        "sensors": {name: sensor.described() for name, sensor in sensors.items()},
        # How often a figure is taken is no part of what is trained.
        "pretrain": settings.model_dump(mode="json", exclude={"knn_every"}),
    }
    revision = REVISIONS["pretrain"]
    fingerprint = configuration.digest(selection_hash, params, revision, init_hash)

    train = {name: SelectedTiles(workspace, selection, "train", name) for name in sensors}
    val = {name: SelectedTiles(workspace, selection, "val", name) for name in sensors}
    machine = Machine(config.hardware, unused_parameters=len(sensors) > 1)
    normal = {name: Normal(sensor, machine.device) for name, sensor in sensors.items()}

    torch.manual_seed(settings.seed)
    model = pretraining_model(config.model, settings, bands)
    notes = []
    if start is not None or settings.init:
        if start is not None:
            weights, known = start.encoder.state_dict(), set(start.sensors)
            where = f"encoder {start.hash[:12]}"
        else:
            weights = timm_weights(Path(settings.init or ""), config.model, config.select.sensor)
            where, known = str(settings.init), {config.select.sensor}
        came = transfer(weights, model.encoder, where, fresh=sensors.keys() - known)
        notes.append(f"from {where}: {came.matched} tensors ({came.parameters} values)")
    machine.place(model)

    def try_out(candidate: nn.Module, count: int) -> Tensor:
        widest = max(bands, key=lambda name: bands[name])
        images = torch.randn(count, bands[widest], size, size, device=machine.device)
        mask = model.masks(count, device=machine.device)
        loss: Tensor = candidate(images, mask, widest)
        return loss

    trainer = Trainer(
        workspace,
        "pretrain",
        fingerprint,
        parameters(
            "pretrain",
            params,
            sensor=config.select.sensor,
            tiles={"train": _count(train), "val": _count(val)},
            selection=selection_hash[:16],
            encoder=init_hash and init_hash[:16],
            revision=revision,
        ),
        settings,
        machine,
        model,
        model.encoder,
        train,
        settings.mix,
        size,
        try_out,
        config.hardware.compile,
    )
    ours = normal[config.select.sensor]
    neighbours = Neighbours(config, workspace, machine, ours) if machine.first else None

    for batch in trainer.batches():
        images = normal[batch.sensor](trainer.augmented(batch))
        mask = trainer.drawn(engine.MASKS, batch, model.masks)
        loss = trainer.model(images, mask, batch.sensor)
        trainer.update(loss, batch)
        val_loss = None
        if trainer.epoch_ended:
            if any(len(tiles) for tiles in val.values()):
                val_loss = _loss(trainer, model, val, normal)
                trainer.log(val__loss=val_loss)
            if neighbours is not None and (
                trainer.epoch % settings.knn_every == 0 or trainer.ended
            ):
                accuracy = neighbours.accuracy(model)
                if accuracy is not None:
                    trainer.log(knn__accuracy=accuracy)
            if machine.first and (trainer.epoch % settings.picture_every == 0 or trainer.ended):
                for name in sensors:
                    held_out = val[name] if len(val[name]) else train[name]
                    _picture(trainer, model, name, normal[name], held_out)
        trainer.save_if_due(best=val_loss)

    figures = {
        **trainer.summary(),
        "tiles": _count(train),
        "train_loss": trainer.last("train__loss"),
        "val_loss": trainer.last("val__loss"),
        "knn_accuracy": trainer.last("knn__accuracy"),
    }
    meta = {
        "kind": "encoder",
        "architecture": config.model.model_dump(mode="json"),
        "image_size": size,
        "sensors": params["sensors"],
        "classes": None,
        "generated": any(tiles.generated for tiles in train.values()),
        "lineage": {
            "selection": selection_hash,
            "params": configuration.digest(params),
            "revision": revision,
            "encoder": init_hash,
        },
        "figures": {"val_loss": figures["val_loss"], "knn_accuracy": figures["knn_accuracy"]},
    }
    if machine.first:
        example = next(iter(train.values())).image(0)
        bundle.write(out / "encoder", model.encoder.to("cpu"), meta, example)
    machine.leave()
    run_dir = str(trainer.run_dir.relative_to(workspace.root))
    return Report("pretrain", figures=figures, notes=notes, run_dir=run_dir)


def _count(tiles: dict[str, SelectedTiles]) -> int:
    return sum(len(own) for own in tiles.values())


def _named(config: Config, workspace: Workspace) -> "bundle.Bundle | None":
    """The encoder that champion.yaml names; None: it names none.

    Raises:
        BadInput: it is damaged, or of another architecture.
    """
    wanted = configuration.read_yaml(workspace.root / CHAMPION)["encoder"]
    if wanted is None:
        return None
    found = bundle.load(workspace.state / "bundles" / wanted)
    if found.hash != wanted:
        raise BadInput(f"{found.folder} is damaged: remove it, and `ringmo run` fetches it again")
    ours, theirs = config.model.model_dump(), found.meta["architecture"]
    if other := [name for name in ours if theirs.get(name) != ours[name]]:
        said = ", ".join(f"model.{name}={theirs.get(name)}" for name in other)
        where = f"pretrain.refresh: {config.pretrain.refresh}: the champion encoder"
        raise BadInput(f"{where} is of another architecture: set {said}, or refresh: full")
    return found


def _taken(config: Config, workspace: Workspace, out: Path) -> Report:
    """The encoder that champion.yaml names, as it is, in a training's place."""
    taken = _named(config, workspace)
    if taken is None:
        raise BadInput(f"{CHAMPION} names no encoder: `ringmo run` writes it from the registry")
    if missing := [name for name in config.pretrain.mix if name not in taken.meta["sensors"]]:
        where = "pretrain.refresh: champion: the champion encoder"
        raise BadInput(f"{where} does not read {', '.join(missing)} (pretrain.mix)")
    shutil.copytree(taken.folder, out / "encoder")
    return Report("pretrain", figures={**taken.meta["figures"], "taken": taken.hash[:16]})


@torch.no_grad()
def _loss(
    trainer: Trainer,
    model: RingMo | MAE,
    tiles: dict[str, SelectedTiles],
    normal: dict[str, Normal],
) -> float:
    """Mean loss over all validation tiles, uncropped, under the same masks every time."""
    machine, total, count = trainer.machine, 0.0, 0
    model.eval()
    for name, own in tiles.items():
        for batch in trainer.validation(own, trainer.image_size):
            images = batch.images
            mask = _mask(trainer, model, len(images), int(batch.rows[0]))
            with machine.autocast():
                loss = model(normal[name](images), mask, name)
            total += float(loss) * len(images)
            count += len(images)
    model.train()
    total, images_of_all = machine.total(total, count)
    return total / images_of_all


def _mask(trainer: Trainer, model: RingMo | MAE, count: int, number: int) -> Tensor:
    """The masks of this number, the same whenever they are asked for."""
    device = trainer.machine.device
    generator = torch.Generator(device).manual_seed(trainer.settings.seed + number)
    return model.masks(count, generator=generator, device=device)


@torch.no_grad()
def _picture(
    trainer: Trainer, model: RingMo | MAE, name: str, normal: Normal, tiles: SelectedTiles
) -> None:
    """Original, masked and reconstructed, of the same tiles and masks every time."""
    rows = np.linspace(0, len(tiles) - 1, min(SHOWN, len(tiles))).astype(int)
    small = torch.stack([tiles.small(int(row), trainer.image_size) for row in rows])
    images = normal(trainer.machine.upload(small))
    mask = _mask(trainer, model, len(images), 0)
    model.eval()
    with trainer.machine.autocast():
        filled = torch.where(mask, model.reconstruct(images, mask, name).float(), images)
    model.train()

    def back(pixels: Tensor) -> np.ndarray:
        return normal.back(pixels).permute(0, 2, 3, 1).cpu().numpy()

    def shown(pixels: np.ndarray) -> np.ndarray:
        """Reconstructions are stretched as their originals are."""
        pairs = zip(pixels, originals, strict=True)
        return np.stack([stretched(one, normal.sensor, like) for one, like in pairs])

    originals = back(images)
    only = len(trainer.tiles) == 1
    path = trainer.pictures / f"epoch-{trainer.epoch:03d}{'' if only else f'-{name}'}.png"
    masks = mask.permute(0, 2, 3, 1).cpu().numpy()
    pictures.reconstructions(path, shown(originals), masks, shown(back(filled)))


class Neighbours:
    """The k-NN accuracy of frozen features on the labelled tiles: do they get better?

    Neighbours among the training tiles of work/select/scene.parquet vote for those of validation.
    None of it reaches the encoder.
    """

    def __init__(
        self, config: Config, workspace: Workspace, machine: Machine, normal: Normal
    ) -> None:
        selection = workspace.work("select") / "scene.parquet"
        self.sensor, self.size = config.select.sensor, config.model.image_size
        self.normal, self.machine = normal, machine
        self.splits: list[tuple[SelectedTiles, np.ndarray]] = []
        if selection.exists():
            for split in ("train", "val"):
                tiles = SelectedTiles(workspace, selection, split, self.sensor)
                every = max(1, -(-len(tiles) // KNN_TILES))
                self.splits.append((tiles, np.arange(0, len(tiles), every)))

    def accuracy(self, model: RingMo | MAE) -> float | None:
        """Share of validation tiles that their neighbours name rightly; None without labels."""
        if not self.splits or not all(len(rows) for _, rows in self.splits):
            return None
        (known, labels), (asked, truth) = (self._features(model, *s) for s in self.splits)
        names = {name: number for number, name in enumerate(sorted(set(labels)))}
        numbers = torch.tensor([names[label] for label in labels], device=known.device)
        right = torch.tensor([names.get(label, -1) for label in truth], device=known.device)
        return float((probes.knn(known, numbers, asked) == right).float().mean())

    @torch.no_grad()
    def _features(
        self, model: RingMo | MAE, tiles: SelectedTiles, rows: np.ndarray
    ) -> tuple[Tensor, list[str]]:
        encoder = model.encoder.eval()
        features = []
        for batch in tiles.batches(rows, engine.RUN, self.size):
            images = self.normal(self.machine.upload(batch.images))
            with self.machine.autocast():
                features.append(encoder(images, self.sensor).float().mean((1, 2)))
        model.train()
        return torch.cat(features), [str(label) for label in tiles.table["label"].iloc[rows]]
