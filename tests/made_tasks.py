"""A made-up world for every task: bright bars, turned, on dark noise, labelled as published."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image

from ringmo import config
from ringmo.config import Config
from ringmo.data.ingest import ingest
from ringmo.data.selection import select
from ringmo.stage import run_stage
from ringmo.workspace import Workspace

COUNT, SIDE = 40, 64
# What makes a model of a second learn something.
SHORT = {
    "epochs": 6,
    "warmup_epochs": 1,
    "batch_size": 6,
    "base_lr": 0.2,
    "crop_scale": [0.5, 1.0],
}


def bars(random: np.random.Generator) -> tuple[Any, list[tuple[str, list[tuple[float, float]]]]]:
    """An image (S, S, 3), and one or two bars: the class by its colour, and its corners."""
    image = random.normal(60, 12, (SIDE, SIDE, 3))
    rows, cols = np.mgrid[:SIDE, :SIDE] + 0.5
    found = []
    for _ in range(random.integers(1, 3)):
        name, colour = [("ship", (230, 220, 210)), ("tank", (210, 120, 40))][random.integers(2)]
        x, y = random.uniform(18, SIDE - 18, 2)
        long, wide, angle = random.uniform(18, 26), random.uniform(8, 11), random.uniform(0, 3)
        cos, sin = math.cos(angle), math.sin(angle)
        along = (cols - x) * cos + (rows - y) * sin
        across = (rows - y) * cos - (cols - x) * sin
        inside = (abs(along) <= long / 2) & (abs(across) <= wide / 2)
        image[inside] = np.array(colour) + random.normal(0, 8, (int(inside.sum()), 3))
        corners = [(-long / 2, -wide / 2), (long / 2, -wide / 2), (long / 2, wide / 2)]
        corners.append((-long / 2, wide / 2))
        points = [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners]
        found.append((name, points))
    return np.clip(image, 0, 255).astype(np.uint8), found


def covered(found: list[Any]) -> Any:
    """Which pixels the bars have: 0 ground, 1 ship, 2 tank."""
    from PIL import ImageDraw

    mask = Image.new("L", (SIDE, SIDE))
    for name, points in found:
        ImageDraw.Draw(mask).polygon(points, fill=1 + (name == "tank"))
    return np.asarray(mask)


def write(folder: Path, task: str) -> Path:
    """Images and labels for a task, as published sets of its kind lie in folders."""
    random = np.random.default_rng(5)
    for i in range(COUNT):
        name = f"{i:03d}"
        image, found = bars(random)
        mask = covered(found)
        if task == "scene":
            one = "tanks" if (mask == 2).sum() > (mask == 1).sum() else "ships"
            _png(folder / one / f"{name}.png", image)
        elif task == "segmentation":
            _png(folder / "images" / f"{name}.png", image)
            _png(folder / "masks" / f"{name}.png", mask)
        elif task == "change":
            before = np.where(mask[..., None] > 0, 60, image).astype(np.uint8)
            _png(folder / "A" / f"{name}.png", before)
            _png(folder / "B" / f"{name}.png", image)
            _png(folder / "label" / f"{name}.png", np.where(mask > 0, 255, 0).astype(np.uint8))
        elif task == "height":
            _png(folder / "images" / f"{name}.png", image)
            _tif(folder / "dsm" / f"{name}.tif", np.where(mask > 0, 12.0, 2.0))
        elif task == "detection":
            _png(folder / "images" / f"{name}.png", image)
            _voc(folder / "annotations" / f"{name}.xml", found)
        else:
            _png(folder / "images" / f"{name}.png", image)
            lines = [
                f"{' '.join(f'{v:.1f}' for point in points for v in point)} {kind} 0"
                for kind, points in found
            ]
            _text(folder / "labelTxt" / f"{name}.txt", "\n".join(lines) + "\n")
    return folder


def selected(workspace: Workspace, folder: Path, task: str, **changes: Any) -> Config:
    """A workspace in which such a world went in, and tiles were chosen for the task."""
    given = {f"finetune.{task}.{name}": value for name, value in {**SHORT, **changes}.items()}
    given |= {"tasks": [task], "ingest.sources": [str(write(folder, task))]}
    config.edit(workspace.params_file, given)
    values = Config.load(workspace.params_file)
    ingest(values, workspace)
    run_stage(workspace, "select", lambda out: select(values, workspace, out))
    return values


def _png(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _tif(path: Path, metres: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": SIDE, "width": SIDE, "count": 1, "dtype": "float32"}
    with rasterio.open(path, "w", **profile) as file:
        file.write(metres.astype(np.float32), 1)


def _voc(path: Path, found: list[Any]) -> None:
    objects = []
    for name, points in found:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        box = {"xmin": min(xs), "ymin": min(ys), "xmax": max(xs), "ymax": max(ys)}
        inside = "".join(f"<{k}>{v:.1f}</{k}>" for k, v in box.items())
        objects.append(f"<object><name>{name}</name><bndbox>{inside}</bndbox></object>")
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
    _text(path, f"<annotation>{size}{''.join(objects)}</annotation>")


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def forget(workspace: Workspace) -> None:
    """Remove all runs: what was trained is trained again from its first step."""
    shutil.rmtree(workspace.state / "runs")
