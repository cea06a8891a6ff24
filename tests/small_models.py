"""Small real models for tests of what answers with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ringmo.config import Model, Sensor
from ringmo.models.backbone import encoder
from ringmo.models.classifier import Classifier
from ringmo.registry import bundle

SWIN = {
    "backbone": "swin",
    "stem": "pi_conv",
    "position": "relative",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
VIT = SWIN | {"backbone": "vit", "patch_size": 8, "depths": [2], "num_heads": [2]}
SENSORS = {
    "rgb": Sensor(
        bands=["red", "green", "blue"],
        dtype="uint8",
        mean=[123.7, 116.3, 103.5],
        std=[58.4, 57.1, 57.4],
    ),
    # Radar in linear power, which becomes decibels: every step of a normalisation.
    "sar": Sensor(
        bands=["VV", "VH"],
        dtype="float32",
        scale=2.0,
        decibels=True,
        clip=(-40, 10),
        mean=[-10.9, -17.3],
        std=[4.4, 4.5],
    ),
}


def write_model(
    folder: Path,
    architecture: dict[str, Any] = SWIN,
    sensors: tuple[str, ...] = ("rgb",),
    classes: list[str] | None = None,
    seed: int = 3,
) -> Path:
    """A bundle with random weights, as after a training: no tensor is left at its first value."""
    torch.manual_seed(seed)
    model = Model.model_validate(architecture)
    bands = {name: len(SENSORS[name].bands) for name in sensors}
    made: nn.Module = encoder(model, bands, finetuning=bool(classes))
    if classes:
        made = Classifier(made, len(classes))
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, float(name.endswith("weight")), std=0.2)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    meta = {
        "kind": "scene" if classes else "encoder",
        "architecture": model.model_dump(),
        "image_size": model.image_size,
        "sensors": {name: SENSORS[name].described() for name in sensors},
        "sensor": sensors[0] if classes else None,
        "classes": classes,
        "generated": False,
        "lineage": {},
        "figures": {},
    }
    bundle.write(folder, made, meta)
    return folder


def rgb(seed: int, height: int = 40, width: int = 50) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def sar(seed: int, size: int = 32) -> np.ndarray[Any, Any]:
    """Linear power, some of it 0."""
    power = np.random.default_rng(seed).gamma(2, 0.05, (size, size, 2)).astype(np.float32)
    power[:3, :3] = 0
    return power
