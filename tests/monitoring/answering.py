"""Untrained models of every task, and batches that they answer."""

from pathlib import Path
from typing import Any

import torch
from small_models import SENSORS, SWIN, VIT

from ringmo import tasks
from ringmo.config import Finetune, Model
from ringmo.models.backbone import encoder
from ringmo.registry import bundle
from ringmo.registry.bundle import PLAIN, Bundle
from ringmo.tasks.base import SECOND

CLASSES = {"change": ["unchanged", "changed"], "height": []}


def write_model(
    folder: Path,
    task: str,
    *,
    vit: bool = False,
    sensors: tuple[str, ...] = ("rgb",),
    selection: str = "5e1ec7",
) -> Bundle:
    torch.manual_seed(5)
    model = Model.model_validate(VIT if vit else SWIN)
    names = CLASSES.get(task, ["field", "port", "wood"])
    kind, settings = tasks.find(task), Finetune.model_validate(PLAIN)
    trunk = encoder(model, {name: len(SENSORS[name].bands) for name in sensors}, finetuning=True)
    made: Any = kind.model(trunk, len(names), settings)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    example = None
    if len(sensors) > 1 or task == "change":
        example = {n: _pixels(n, 32)[0].permute(1, 2, 0).numpy() for n in read(task, sensors)}
    meta = {
        "kind": task,
        "architecture": model.model_dump(),
        "image_size": model.image_size,
        "settings": settings.model_dump(mode="json"),
        "sensors": {name: SENSORS[name].model_dump() for name in sensors},
        "sensor": sensors[0],
        "classes": names,
        "generated": False,
        "lineage": {"selection": selection},
        "figures": {},
    }
    bundle.write(folder, made, meta, example)
    return bundle.load(folder)


def read(task: str, sensors: tuple[str, ...] = ("rgb",)) -> list[str]:
    """What a model of the task reads."""
    return [*sensors, *([SECOND] if task == "change" else [])]


def batch(
    task: str, count: int, side: int, sensors: tuple[str, ...] = ("rgb",), seed: int = 0
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.cat([_pixels(name, side) for _ in range(count)]) for name in read(task, sensors)
    }


def _pixels(name: str, side: int) -> torch.Tensor:
    sensor = SENSORS["rgb" if name == SECOND else name]
    shape = (1, len(sensor.bands), side, side)
    if sensor.dtype == "uint8":
        return torch.randint(1, 256, shape, dtype=torch.uint8)
    return torch.rand(shape) + 0.01


@torch.inference_mode()
def answered(model: Bundle, pixels: dict[str, torch.Tensor]) -> Any:
    assert model.task is not None
    return model.task.answer(model.model, model.normalised(pixels))
