"""Bundles whose model sees each pixel by itself: what they say of a scene is known exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.transform import from_origin
from small_models import SENSORS, SWIN
from torch import Tensor, nn

from ringmo.config import Model
from ringmo.models.backbone import encoder
from ringmo.registry.bundle import Bundle
from ringmo.tasks.dense import DenseTask

CLASSES = ["water", "field", "town & road"]
SIZE = 32  # pixels of a window


class Pixelwise(nn.Module):
    """A 1x1 convolution. The encoder is there for its size alone."""

    def __init__(self, outputs: int, bands: int = 3, size: int = SIZE) -> None:
        super().__init__()
        architecture = Model.model_validate({**SWIN, "image_size": size})
        self.encoder = encoder(architecture, {"rgb": 3}, finetuning=True)
        self.head = nn.Conv2d(bands, outputs, 1)
        self.outputs = outputs

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        seen = torch.cat(list(images.values()), 1)
        said: Tensor = self.head(seen)
        return said if self.outputs > 1 else said[:, 0]


def bundle_of(
    kind: str = "segmentation", model: nn.Module | None = None, size: int = SIZE, **meta: Any
) -> Bundle:
    """A loaded bundle around a model; by default one that looks at pixels alone."""
    torch.manual_seed(7)
    bands = 6 if kind == "change" else 3
    classes = {"segmentation": CLASSES, "change": ["unchanged", "changed"], "height": []}.get(
        kind, CLASSES
    )
    made = model or Pixelwise(max(1, len(classes)), bands, size)
    told = {
        "kind": kind,
        "image_size": size,
        "resize": size,
        "tile_pixels": size,
        "sensors": {"rgb": SENSORS["rgb"].model_dump()},
        "sensor": "rgb",
        "classes": classes,
        "generated": True,
        "lineage": {"selection": "5e1ec7", "params": "9a", "revision": 1},
        "figures": {},
        **meta,
    }
    return Bundle(Path("pixelwise"), told, made.eval(), "ab" * 32, "cpu", {})


def whole(bundle: Bundle, *images: NDArray[Any]) -> NDArray[np.float32]:
    """What a pixelwise model says of images (H, W, 3) as a whole: (C, H, W) or (H, W)."""
    names = ["rgb", "second"][: len(images)]
    batch = {
        name: torch.from_numpy(image).permute(2, 0, 1)[None]
        for name, image in zip(names, images, strict=True)
    }
    assert isinstance(bundle.task, DenseTask)
    with torch.inference_mode():
        answer = bundle.task.said(bundle.model(bundle.normalised(batch)))
    return answer[0].numpy()


def pixels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth ground with some noise (H, W, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + seed) + np.cos(y / b) for a, b in ((37, 91), (120, 23), (11, 60))]
    image = 128 + 50 * np.stack(waves, 2) + random.normal(0, 8, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def write_scene(
    path: Path, image: NDArray[Any], crs: str | None = "EPSG:32631", **how: Any
) -> Path:
    """A GeoTIFF of an image (H, W, bands), half a metre a pixel, tiled unless `how` says not."""
    height, width, bands = image.shape
    profile = {
        "driver": "GTiff", "height": height, "width": width, "count": bands,
        "dtype": str(image.dtype), "tiled": True, "blockxsize": 256, "blockysize": 256,
        "compress": "deflate",
    } | how  # fmt: skip
    if crs is not None:
        profile |= {"crs": crs, "transform": from_origin(500_000, 5_700_000, 0.5, 0.5)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile) as file:
        file.write(image.transpose(2, 0, 1))
    return path
