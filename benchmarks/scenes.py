"""Whole scenes: memory, pixels a second and how busy the model is, against the plain way.

    python -m benchmarks.scenes '{"side": 5000, "contender": "ours", "cores": 2}'

The plain way is what many write: the whole raster in memory, the same windows of the same model in
batches of the same size, one thing after the other, blended in one array as large as the scene, and
written with the same overviews. Both answer for the same full GeoTIFF. How often a pixel gets
another class when the grid of windows moves by half a window is measured with ours.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import begin
from benchmarks.table import Bench, Row, compare

SIDE, TRIAL = 5000, 1200  # pixels
CORES = 2
SIZE, CLASSES = 64, 6
GOAL_MB, BUSY = 1000, 0.9
MOVED_SIDE = 1000  # pixels of the scene whose grid is moved


def rows(bench: Bench) -> None:
    """Ours and the plain way in processes of their own, in turn."""
    side = SIDE if bench.images is None else TRIAL
    what = f"segmentation of a full {side} x {side} scene, windows of {SIZE}, two cores"
    speed = Row(f"{what}, against the whole raster in memory", "pixels/s", "none")
    memory = Row(f"{what}: memory above Python, PyTorch and the model", "MB", f"< {GOAL_MB}")
    busy = Row(f"{what}: time that the model is busy", "%", f"≥ {100 * BUSY:g}")
    moved = Row(
        f"pixels with another class, grid moved by half a window, {MOVED_SIDE}²", "%", "none"
    )
    seams = Row("steps across windows' borders, of those elsewhere", "times", "≤ 1.1")
    bench.rows += [speed, memory, busy, moved, seams]
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for _ in range(bench.rounds):
        for contender, found in runs.items():
            one = bench.tried(
                f"scenes, {contender}", "scenes", CORES, side=side, contender=contender
            )
            if one is not None:
                found.append(one)
    if len(runs["ours"]) < bench.rounds or len(runs["plain"]) < bench.rounds:
        for row in (speed, memory, busy):
            row.note = "not measured: failed, see below"
    else:

        def of(contender: str, name: str) -> list[float]:
            return [one[name] for one in runs[contender]]

        compare(speed, of("ours", "pixels_per_s"), of("plain", "pixels_per_s"), None)
        speed.note = (
            f"an untrained Swin, float32; ours computes {of('ours', 'windows')[0]:.0f} windows, "
            f"the plain way {of('plain', 'windows')[0]:.0f}: those at blocks' edges twice"
        )
        compare(memory, of("ours", "memory_mb"), of("plain", "memory_mb"), None)
        assert memory.ours is not None and memory.baseline is not None
        memory.ratio, memory.reached = memory.baseline / memory.ours, memory.ours < GOAL_MB
        compare(busy, of("ours", "busy"), of("plain", "busy"), None)
        busy.reached = busy.ours is not None and busy.ours >= 100 * BUSY
        busy.note = "of the whole, from opening the scene to the finished COG"
    found = bench.tried("scenes, grid moved", "scenes", CORES, side=MOVED_SIDE, contender="moved")
    if found is None:
        moved.note = seams.note = "not measured: failed, see below"
        return
    moved.ours, seams.ours = found["moved"], found["seams"]
    seams.reached = found["seams"] <= 1.1


def _bundle() -> Any:
    """A real model, untrained, whose answers differ from place to place."""
    import torch
    from torch import nn

    from ringmo.config import Finetune, Model, Sensor
    from ringmo.models.backbone import encoder
    from ringmo.registry.bundle import PLAIN, Bundle
    from ringmo.tasks import find

    architecture = Model(
        image_size=SIZE, patch_size=8, embed_dim=48, depths=[2, 4], num_heads=[3, 6], window_size=4
    )
    torch.manual_seed(1)
    trunk = encoder(architecture, {"rgb": 3}, finetuning=True)
    model: nn.Module = find("segmentation").model(trunk, CLASSES, Finetune.model_validate(PLAIN))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    sensor = Sensor(
        bands=["red", "green", "blue"], dtype="uint8", mean=[123.7, 116.3, 103.5],
        std=[58.4, 57.1, 57.4],
    )  # fmt: skip
    meta = {
        "kind": "segmentation", "image_size": SIZE, "resize": SIZE, "tile_pixels": SIZE,
        "sensors": {"rgb": sensor.model_dump()}, "sensor": "rgb", "lineage": {}, "generated": True,
        "classes": [f"class {i}" for i in range(CLASSES)], "figures": {},
    }  # fmt: skip
    return Bundle(Path("untrained"), meta, model.eval(), "0" * 64, "cpu", {})


def _scene(path: Path, side: int) -> None:
    """A full GeoTIFF in tiles: smooth ground with noise, written in strips."""
    import rasterio
    from rasterio.transform import from_origin

    dice = np.random.default_rng(0)
    profile = {
        "driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8",
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate",
        "crs": "EPSG:32631", "transform": from_origin(500_000, 5_700_000, 0.5, 0.5),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        for top in range(0, side, 512):
            y, x = np.mgrid[top : min(top + 512, side), :side].astype(np.float32)
            waves = [np.sin(x / a) + np.cos(y / b) for a, b in ((37, 91), (120, 23), (11, 60))]
            strip = 128 + 50 * np.stack(waves) + dice.normal(0, 8, (3, *x.shape))
            strip = np.clip(strip, 0, 255).astype(np.uint8)
            file.write(strip, window=((top, top + strip.shape[1]), (0, side)))


def _ours(bundle: Any, scene: Path, out: Path, **how: Any) -> Any:
    from ringmo.inference import scenes

    job = scenes.SceneJob(
        bundle, scenes.about(bundle, "segmentation/0"), {"rgb": scene}, out, "s", **how
    )
    job.work()
    job.deliver()
    return job


def _plain(bundle: Any, path: Path, out: Path) -> dict[str, float]:
    """The whole raster in memory."""
    import rasterio
    import torch
    from rasterio.shutil import copy

    from ringmo.inference.scenes import TOGETHER
    from ringmo.inference.windows import Windows, stride_of
    from ringmo.tasks.dense import weight

    started, busy = time.monotonic(), 0.0
    with rasterio.open(path) as file:
        image, profile = torch.from_numpy(file.read()), file.profile
    grid = Windows(*image.shape[1:], SIZE, stride_of(SIZE))
    places = [(int(row), int(col)) for row in grid.rows for col in grid.cols]
    total = torch.zeros(CLASSES, *image.shape[1:])
    weights, one = torch.zeros(image.shape[1:]), weight(SIZE)
    with torch.inference_mode():
        for start in range(0, len(places), TOGETHER):
            some = places[start : start + TOGETHER]
            cut = torch.stack([image[:, r : r + SIZE, c : c + SIZE] for r, c in some])
            began = time.monotonic()
            answer = bundle.task.answer(bundle.model, bundle.normalised({"rgb": cut}))
            busy += time.monotonic() - began
            for (r, c), each in zip(some, answer, strict=True):
                total[:, r : r + SIZE, c : c + SIZE] += each * one
                weights[r : r + SIZE, c : c + SIZE] += one
    mask = (total / weights).argmax(0).numpy().astype(np.uint8)
    profile |= {"count": 1, "nodata": 255}
    with rasterio.open(out / "plain.tif", "w", **profile) as file:
        file.write(mask, 1)
    how = {"compress": "deflate", "overview_resampling": "nearest"}
    copy(out / "plain.tif", out / "cog.tif", driver="COG", **how)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "busy": 100 * busy / seconds, "windows": float(len(places))}


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """One contender's figures; of `moved`, what depends on the grid."""
    import psutil

    from ringmo.system_metrics import peak_memory_mb

    side = int(spec["side"])
    with tempfile.TemporaryDirectory(prefix="ringmo-scenes-") as folder:
        out = Path(folder)
        bundle = _bundle()
        _scene(out / "scene.tif", side)
        if spec["contender"] == "moved":
            return _moved(bundle, out)
        before = psutil.Process().memory_info().rss / 1e6
        if spec["contender"] == "ours":
            job = _ours(bundle, out / "scene.tif", out / "ours")
            told = job.times.told()
            found = {"seconds": told["seconds"], "busy": 100 * told["model_share"]}
            found["windows"] = float(told["windows"])
        else:
            found = _plain(bundle, out / "scene.tif", out)
        found |= {
            "pixels_per_s": side**2 / found["seconds"],
            "memory_mb": peak_memory_mb() - before,
        }
        return found


def _moved(bundle: Any, out: Path) -> dict[str, float]:
    """Pixels that change class, and steps at borders against the same pixels' without a border."""
    import rasterio

    from ringmo.inference.windows import Windows, stride_of

    said = []
    for shift in ((0, 0), (stride_of(SIZE) // 2,) * 2):
        job = _ours(bundle, out / "scene.tif", out / str(shift[0]), shift=shift, probabilities=True)
        with rasterio.open(job.out / "s.probabilities.tif") as file:
            said.append(file.read())
    ratios = []
    grid = Windows(*said[0].shape[1:], SIZE, stride_of(SIZE))
    for axis, starts in ((1, grid.rows), (2, grid.cols)):
        step = np.abs(np.diff(said[0], axis=axis)).mean(axis=(0, 3 - axis))
        edges = np.unique(np.concatenate([starts[1:], starts[:-1] + SIZE])) - 1
        inner = np.setdiff1d(np.arange(len(step)), edges)
        ratios.append(step[edges].mean() / step[inner].mean())
    moved = (said[0].argmax(0) != said[1].argmax(0)).mean()
    return {"moved": float(100 * moved), "seams": float(max(ratios))}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    print(json.dumps(measured(asked)), flush=True)
