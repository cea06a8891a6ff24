"""Answers for scenes of any size: walked in blocks, each written when done, put together last.

    file ─▶ read (thread) ─▶ windows ─▶ model ─▶ blend (thread) ─▶ a file a block ─▶ deliver

What is in memory is a few blocks, whatever the scene's size. What is delivered is whole: the files
of an answer take their names when all blocks are there, the STAC item last of all.
"""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import ringmo
from ringmo.data import decode
from ringmo.errors import BadInput
from ringmo.inference import answers, mosaic, preview, scene_boxes, stac
from ringmo.inference.block_answers import (
    Arrays,
    Block,
    Boxes,
    Cells,
    Collector,
    Kind,
    Maps,
    block_side,
    blocks,
    kind_of,
    picture,
    picture_step,
)
from ringmo.inference.given import S3
from ringmo.inference.progress_folder import ProgressFolder
from ringmo.inference.reading import Box, Scene
from ringmo.inference.tables import CellTable
from ringmo.inference.windows import Windows
from ringmo.system_metrics import peak_memory_mb
from ringmo.tasks.base import UNKNOWN
from ringmo.tasks.dense import MaskTask
from ringmo.tasks.objects import ObjectTask

if TYPE_CHECKING:
    from torch import Tensor

    from ringmo.monitoring.record import Recorder
    from ringmo.registry.bundle import Bundle

REVISION = 2  # raised when the same scene and model get another answer: what is half done is redone
TOGETHER, TOGETHER_BYTES = 32, 16e6  # windows that a model is given at a time, and their answers
BOXES_TOGETHER = 8  # a detector keeps the features of a thousand proposals of each: 50 MB
POLL_S = 0.5  # between two looks whether other processes are ready
MANY_COLUMNS = 4  # blocks side by side for which strips are decoded over and over
WAIT_S = 0.2  # between two looks whether the other threads are well


@dataclass(frozen=True)
class About:
    """What answers: the registered version's name, or the bundle's folder, and where it is from."""

    model: str
    hash: str
    tags: dict[str, str]

    @property
    def properties(self) -> dict[str, str]:
        """As a STAC item has them."""
        return {f"ringmo:{name.lower()}": value for name, value in self.tags.items()}

    def for_file(self, **more: Any) -> dict[str, str]:
        """As tags of a file."""
        told = {**self.tags, **{name: str(value) for name, value in more.items()}}
        return {f"RINGMO_{name.upper()}": value for name, value in told.items()}


def about(bundle: "Bundle", name: str, tags: Mapping[str, str] | None = None) -> About:
    """What a bundle tells of itself, and its version's tags of it.

    Args:
        name: `segmentation/7`, or a folder. tags: of the registered version; None: it has none.
    """
    lineage, tags = bundle.meta["lineage"], tags or {}
    settings = {"finetune": bundle.meta.get("settings"), "resize": bundle.meta.get("resize")}
    settings["tile_pixels"] = bundle.meta.get("tile_pixels")
    found = {
        "model": name,
        "model_hash": bundle.hash,
        "data_version": tags.get("data_version") or lineage.get("selection"),
        "run": tags.get("run"),
        "parameters_digest": lineage.get("params"),
        "parameters": json.dumps(settings, sort_keys=True),
        "generated": str(bool(bundle.meta["generated"])).lower(),
        "software": f"ringmo {ringmo.__version__}",
    }
    return About(name, bundle.hash, {k: str(v) for k, v in found.items() if v is not None})


@dataclass
class Times:
    """Where the time of a scene went, in seconds. pixels: own ones of blocks done here."""

    started: float = field(default_factory=time.monotonic)
    model_s: float = 0.0
    windows: int = 0
    pixels: int = 0

    def told(self) -> dict[str, Any]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {
            "seconds": round(seconds, 2),
            "pixels_per_s": round(self.pixels / seconds),
            "model_share": round(self.model_s / seconds, 3),
            "windows": self.windows,
            "peak_memory_mb": round(peak_memory_mb()),
        }


class SceneJob:
    """One scene to answer for, into one folder.

    Use: `done` is an answer that lies there already; else `work`, and then `deliver` until it
    gives the answer (None: other processes still work on blocks; `work` again takes what one of
    them left).
    """

    def __init__(
        self,
        bundle: "Bundle",
        about: About,
        paths: Mapping[str, Path],
        out: Path,
        name: str,
        shown: str | None = None,
        probabilities: bool = False,
        marks: Mapping[str, list[Any]] | None = None,
        shift: tuple[int, int] = (0, 0),
        recorder: "Recorder | None" = None,
    ) -> None:
        """
        Args:
            paths: the files by what they are of: sensors, and the later date as `second`.
            name: of the answer's files. shown: how people call the scene; default: its path.
            marks: what tells a file's contents from another's, where not its size and date.
            shift: of the grid of windows, in the model's pixels, to see what depends on it.
            recorder: is shown each batch of windows and what the model said of it, in the
                model's thread; its windows' names begin with the file's whole path, or s3://.
        """
        self.bundle, self.about, self.out, self.name = bundle, about, out, name
        self.shown = shown or str(next(iter(paths.values())))
        self.paths, self.probabilities, self.shift = dict(paths), probabilities, shift
        self.recorder = recorder
        first = next(iter(paths.values()))
        self.recorded = self.shown if self.shown.startswith(S3) else str(first.resolve())
        known = marks or {}
        self.job = {
            "revision": REVISION,
            "files": {what: known.get(what) or _mark(path) for what, path in self.paths.items()},
            "model": bundle.hash,
            "probabilities": probabilities,
            "shift": list(shift),
        }
        self.key = hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()
        self.times = Times()
        self.folder: ProgressFolder | None = None
        self.blocks: list[Block] = []

    def open(self) -> None:
        """Look at the scene and plan its blocks.

        Raises:
            BadInput: it cannot be read, or not by this model; the reason alone.
        """
        with Scene(self.bundle, self.paths) as scene:
            kind = self.kind(scene)
            side = block_side(scene, kind.outputs)
            self.blocks = blocks(scene.height, scene.width, side)
            self.height, self.width, self.notes = scene.height, scene.width, scene.notes
            self.scale, self.window = scene.scale, scene.size
            self.retile = _in_turn(scene, side)
        self.changed = next(iter(self.paths.values())).stat().st_mtime

    def kind(self, scene: Scene) -> Kind:
        return kind_of(self.bundle, scene, self.probabilities, self.shift)

    @property
    def pixels(self) -> int:
        pixels: int = self.height * self.width
        return pixels

    @property
    def item(self) -> Path:
        return self.out / f"{self.name}.stac.json"

    @property
    def work_folder(self) -> Path:
        return self.out / f".{self.name}.work"

    def done(self) -> dict[str, Any] | None:
        """The answer, if it was delivered by an earlier run or another process."""
        try:
            told = json.loads(self.item.read_text())["properties"]
        except (OSError, ValueError, KeyError):
            return None
        if told.get("ringmo:job") != self.key:
            return None
        files = [self.out / name for name in told["ringmo:files"]]
        if not all(file.exists() for file in files):
            return None
        answer: dict[str, Any] = told["ringmo:answer"]
        return {"image": self.shown, **answer, "files": [str(file) for file in files]}

    def work(self, tell: Callable[[int], None] | None = None) -> None:
        """Do the blocks that nobody has done or is doing.

        Args:
            tell: is told own pixels that have become ready, of all processes' blocks.

        Raises:
            BadInput: a part of the scene is damaged, or the disk is full; nothing is left behind.
        """
        if not self.blocks:
            self.open()
        self.close()
        self.folder = ProgressFolder(self.work_folder, self.job, len(self.blocks))
        with self._given_up(self.folder):
            self._tiled()
            _Walk(self, self.folder, tell or (lambda pixels: None)).run()

    @contextmanager
    def _given_up(self, folder: ProgressFolder) -> Iterator[None]:
        """What goes wrong as a BadInput; the folder goes where trying again would not help."""
        try:
            yield
        except BadInput:
            folder.remove()
            raise
        except FileNotFoundError:
            if self.done() is None:
                raise BadInput("given up by another process that worked on it") from None
        except OSError as error:
            raise BadInput(f"{error.filename or self.work_folder}: {error.strerror}") from None

    def _tiled(self) -> None:
        """Rewrite in tiles what can be read only from the top, or in strips across it all."""
        if not self.retile:
            return
        assert self.folder is not None
        for what in self.retile:
            self.paths[what] = self.folder.once(f"{what}.tif", self.paths[what], _in_tiles)

    def deliver(self) -> dict[str, Any] | None:
        """Put the blocks together; None as long as some are missing, or another process does it.

        Raises:
            BadInput: it cannot be written there, or the scene had no data at all.
        """
        assert self.folder is not None
        if (there := self.done()) is not None:
            self.folder.remove()  # what was begun anew when another had just ended
            return there
        if self.folder.finished() < len(self.blocks) or not self.folder.claim(len(self.blocks)):
            return None
        if (there := self.done()) is not None:
            self.folder.remove()
            return there
        answer = None
        with self._given_up(self.folder):
            answer = self._delivered(self.folder)
            self.folder.remove()
        return answer or self.done()

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()

    def _delivered(self, folder: ProgressFolder) -> dict[str, Any]:
        with Scene(self.bundle, self.paths) as scene:
            kind = self.kind(scene)
            delivery = _Delivery(self, scene, kind, folder)
            files, answer = delivery.made()
            answer["gsd_m"] = round(scene.gsd_m, 4) if scene.gsd_m > 0 else None
            answer["size"] = [scene.width, scene.height]
            if self.notes:  # of `open`: of the files as people know them
                answer["notes"] = self.notes
            properties = {
                **self.about.properties,
                "ringmo:job": self.key,
                "ringmo:scene": self.shown,
                "ringmo:answer": answer,
                "ringmo:files": [file.name for file in files.values()],
                "ringmo:window": {"size": self.window, "scale": self.scale},
            }
            mask_names = self.bundle.classes
            stac.write(self.item, self.name, scene, files, mask_names, properties, self.changed)
        return {"image": self.shown, **answer, "files": [str(file) for file in files.values()]}


def _mark(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError as error:
        raise BadInput(str(error.strerror)) from None
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _in_turn(scene: Scene, side: int) -> list[str]:
    """Which files can be read only from the top, or again and again for each column of blocks."""
    slow = []
    for name, raster in scene.rasters.items():
        layout, file = raster.scene.layout, raster.scene.file
        wide = layout.in_strips and scene.width > MANY_COLUMNS * side
        # A TIFF with a palette would be a map of classes. So it is decoded for each column.
        palette = file.driver == "PNG" and file.colorinterp[0].name == "palette"
        if (file.driver in ("PNG", "JPEG") and not palette) or (wide and file.driver == "GTiff"):
            slow.append(name)
    return slow


def _in_tiles(source: Path, target: Path) -> None:
    """A file's pixels and all that it says, in tiles.

    Raises:
        BadInput: it is damaged.
    """
    from rasterio.errors import RasterioError
    from rasterio.shutil import copy

    from ringmo.data import scenes

    with scenes.opened(source) as file:
        depth = {"tiled": True, "blockxsize": 512, "blockysize": 512, "bigtiff": "if_safer"}
        try:
            copy(file, target, driver="GTiff", compress="deflate", zlevel=1, **depth)
        except RasterioError as error:
            target.unlink(missing_ok=True)
            raise BadInput(f"damaged image: {scenes.reason(error, source)}") from None


# The walk


@dataclass
class _Task:
    """A block on its way: what was read of it, its windows, and its share of the preview."""

    block: Block
    some: list[tuple[int, int]]
    box: Box
    collector: Collector
    picture: NDArray[Any] | None


class _Stopped(Exception):
    """Another thread has failed."""


class _Walk:
    """Reading, computing and writing, each in a thread of its own; computing in the caller's."""

    def __init__(self, job: SceneJob, folder: ProgressFolder, tell: Callable[[int], None]) -> None:
        self.job, self.folder, self.tell = job, folder, tell
        self.read: queue.Queue[_Task | None] = queue.Queue(1)
        self.answered: queue.Queue[Any] = queue.Queue(4)
        self.failed: list[BaseException] = []
        self.stop = threading.Event()
        values = 4 * job.window**2 * max(1, len(job.bundle.classes))
        most = BOXES_TOGETHER if isinstance(job.bundle.task, ObjectTask) else TOGETHER
        self.batch = int(min(most, max(1, TOGETHER_BYTES / values)))

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(of,), daemon=True)
            for of in (self._reading, self._writing)
        ]
        for thread in threads:
            thread.start()
        try:
            self._computing()
        except _Stopped:
            pass
        except BaseException:
            self.stop.set()
            raise
        finally:
            for thread in threads:
                thread.join()
        if self.failed:
            raise self.failed[0]

    def _guarded(self, of: Callable[[], None]) -> None:
        try:
            of()
        except _Stopped:
            pass
        except BaseException as error:
            self.failed.append(error)
            self.stop.set()

    def _put(self, into: "queue.Queue[Any]", what: Any) -> None:
        while not self.stop.is_set():
            with suppress(queue.Full):
                return into.put(what, timeout=WAIT_S)
        raise _Stopped

    def _get(self, of: "queue.Queue[Any]") -> Any:
        while not self.stop.is_set():
            with suppress(queue.Empty):
                return of.get(timeout=WAIT_S)
        raise _Stopped

    def _reading(self) -> None:
        with Scene(self.job.bundle, self.job.paths) as scene:
            kind = self.job.kind(scene)
            for block in self.job.blocks:
                if self.stop.is_set():
                    raise _Stopped
                if not self.folder.claim(block.number):
                    if self.folder.done(block.number):
                        self.tell(block.pixels)
                    continue
                some = kind.windows(block)
                rows, cols = kind.around(block, some)
                if scene.empty(rows, cols):
                    self.folder.write(block.number, {})
                    self.job.times.pixels += block.pixels
                    self.tell(block.pixels)
                    continue
                if self.job.done() is not None:  # and its folder is being removed
                    break
                box = scene.read(rows, cols)
                seen = picture(scene, block, box) if box.valid.any() else None
                self._put(self.read, _Task(block, some, box, kind.collector(block, box), seen))
        self._put(self.read, None)

    @torch.inference_mode()
    def _computing(self) -> None:
        while (task := self._get(self.read)) is not None:
            for some, images in _batches(task, self.job.window, self.batch):
                answer = self._answered(task.collector.grid, some, images)
                self._put(self.answered, (task, some, answer))
            self._put(self.answered, (task, None, None))
            del task
        self._put(self.answered, None)

    def _named(self, grid: Windows, some: list[tuple[int, int]]) -> list[str]:
        scale, size = self.job.scale, self.job.window
        return [
            f"{self.job.recorded}#"
            + ",".join(str(round(v * scale)) for v in (grid.cols[c], grid.rows[r], size, size))
            for r, c in some
        ]

    def _answered(
        self, grid: Windows, some: list[tuple[int, int]], images: dict[str, "Tensor"]
    ) -> Any:
        """What the model says of windows: `images` are raw pixels (n, bands, S, S) by sensor, as
        `Bundle.normalised` takes them; `some` their rows and columns on the scene's grid."""
        bundle, times = self.job.bundle, self.job.times
        assert bundle.task is not None
        started = time.monotonic()
        answer = bundle.task.answer(bundle.model, bundle.normalised(images))
        if self.job.recorder is not None:
            self.job.recorder.add(images, answer, self._named(grid, some))
        if isinstance(answer, torch.Tensor):
            answer = answer.float().cpu()
        times.model_s += time.monotonic() - started
        times.windows += len(some)
        return answer

    @torch.inference_mode()
    def _writing(self) -> None:
        while (got := self._get(self.answered)) is not None:
            task, some, answer = got
            if some is not None:
                task.collector.add(some, answer)
                continue
            self._finish(task)
            del got, task

    def _finish(self, task: _Task) -> None:
        arrays = task.collector.finish()
        if task.picture is not None:
            arrays["picture"] = task.picture
        if task.box.bright[0]:
            arrays["bright"] = task.box.bright
        self.folder.write(task.block.number, arrays)
        self.job.times.pixels += task.block.pixels
        self.tell(task.block.pixels)


def _batches(
    task: _Task, size: int, together: int
) -> Iterator[tuple[list[tuple[int, int]], dict[str, "Tensor"]]]:
    """A block's windows that have data, some at a time: their places, and (n, bands, S, S) by
    sensor. Batches begin with the block, so that its answer is the same to the last bit."""
    some: list[tuple[int, int]] = []
    cut: list[dict[str, NDArray[Any]]] = []
    starts = task.collector.grid
    for place in task.some:
        window = task.box.window(int(starts.rows[place[0]]), int(starts.cols[place[1]]), size)
        if window is None:
            continue
        some.append(place)
        cut.append(window)
        if len(some) == together:
            yield some, _stacked(cut)
            some, cut = [], []
    if some:
        yield some, _stacked(cut)


def _stacked(cut: list[dict[str, NDArray[Any]]]) -> dict[str, "Tensor"]:
    return {
        name: torch.from_numpy(np.stack([one[name] for one in cut])).permute(0, 3, 1, 2)
        for name in cut[0]
    }


# Delivery


class _Delivery:
    """A scene's finished blocks, and the files that are made of them."""

    def __init__(self, job: SceneJob, scene: Scene, kind: Kind, folder: ProgressFolder) -> None:
        self.job, self.scene, self.kind, self.folder = job, scene, kind, folder
        self.classes = job.bundle.classes
        self.tags = job.about.for_file(
            scene=job.shown, window=job.window, scale=job.scale, task=kind.task.name
        )
        self.place = mosaic.Place.of(scene.first.file)
        self.sensor = job.bundle.sensors[scene.name]
        step = picture_step(scene.height, scene.width)
        self.step = step
        self.pixels = np.zeros(
            (-(-scene.height // step), -(-scene.width // step), len(self.sensor.bands)),
            self.sensor.decoded,
        )
        self.any = False

    def made(self) -> tuple[dict[str, Path], dict[str, Any]]:
        """The files by what they are, and the answer in a few words and numbers."""
        out = self.job.out
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(self.kind, Maps):
            files, answer = self._maps(self.kind)
        elif isinstance(self.kind, Cells):
            files, answer = self._cells(self.kind)
        else:
            assert isinstance(self.kind, Boxes)
            files, answer = self._boxes(self.kind)
        return files, answer

    def _blocks(self, *names: str) -> Iterator[tuple[Block, Arrays]]:
        """Each block that has one of these; on the way the preview's pixels are gathered.

        Raises:
            BadInput: no block has data; or too much is brighter than the model's pixels can be.
        """
        names = (*names, "picture", "bright")
        bright = np.zeros(2, np.int64)
        for block in self.job.blocks:
            arrays = self.folder.read(block.number, *names)
            bright += arrays.pop("bright", 0)
            if "picture" in arrays:
                top, left = (-(-span[0] // self.step) for span in (block.rows, block.cols))
                seen = arrays.pop("picture")
                self.pixels[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
                self.any = True
            if arrays:
                yield block, arrays
        if not self.any:
            raise BadInput("no data in any of its pixels")
        decode.refuse_bright(float(bright[1] / max(1, bright[0])))

    def _path(self, ending: str) -> Path:
        return self.job.out / f"{self.job.name}.{ending}"

    def _maps(self, kind: Maps) -> tuple[dict[str, Path], dict[str, Any]]:
        masks = isinstance(kind.task, MaskTask)
        what = "mask" if masks else "height"
        path = self._path(f"{what}.tif")
        layer = (
            mosaic.mask_layer(self.classes, self.tags) if masks else mosaic.height_layer(self.tags)
        )
        counts = np.zeros(len(self.classes), np.int64)
        metres = np.array([0, np.inf, 0, -np.inf])

        def parts() -> Iterator[mosaic.Part]:
            for block, arrays in self._blocks(what, "counts", "metres"):
                if "counts" in arrays:
                    counts[:] += arrays["counts"]
                if "metres" in arrays:
                    count, low, total, high = arrays["metres"]
                    metres[:] = (
                        metres[0] + count, min(metres[1], low), metres[2] + total,
                        max(metres[3], high),
                    )  # fmt: skip
                if what in arrays:
                    yield block.rows[0], block.cols[0], arrays[what]

        mosaic.write(path, self.place, layer, parts(), self.folder.folder)
        files = {what: path}
        if kind.probabilities:
            files["probabilities"] = self._path("probabilities.tif")
            layer = mosaic.probability_layer(self.classes, self.tags)
            of = (
                (block.rows[0], block.cols[0], arrays["probabilities"])
                for block, arrays in self._blocks("probabilities")
            )
            mosaic.write(files["probabilities"], self.place, layer, of, self.folder.folder)
        files["preview"] = self._path("preview.png")
        small = _decimated(path, self.pixels.shape[:2])
        if masks:
            mask = small.astype(np.uint8)
            preview.of_mask(files["preview"], self.pixels, self.sensor, mask, self.classes)
            return files, answers.of_counts(counts, self.classes)
        preview.of_heights(files["preview"], self.pixels, self.sensor, small)
        if not metres[0]:
            raise BadInput("no data in any of its pixels")
        return files, answers.of_metres(metres[1], metres[2] / metres[0], metres[3])

    def _cells(self, kind: Cells) -> tuple[dict[str, Path], dict[str, Any]]:
        height, width = kind.shape
        cell = self.scene.size * self.scene.scale
        place = self.place.coarser(cell, height, width)
        said = np.full((height, width), UNKNOWN, np.uint8)
        table = self._path("cells.csv")
        several = self.job.bundle.settings.multi_label
        with CellTable(table, self.classes, cell, self.scene, several) as rows:
            for _, arrays in self._blocks("row", "col", "scores"):
                said[arrays["row"], arrays["col"]] = arrays["scores"].argmax(1)
                rows.add(arrays["row"], arrays["col"], arrays["scores"])
        path = self._path("mask.tif")
        layer = mosaic.mask_layer(self.classes, self.tags)
        mosaic.write(path, place, layer, [(0, 0, said)], self.folder.folder)
        files = {"mask": path, "cells": table, "preview": self._path("preview.png")}
        # A cell of the last row or column may end beyond the scene: no stretching.
        at = [
            np.minimum((np.arange(length) * self.step / cell).astype(np.int64), cells - 1)
            for length, cells in zip(self.pixels.shape[:2], said.shape, strict=True)
        ]
        small = said[at[0][:, None], at[1]]
        preview.of_mask(files["preview"], self.pixels, self.sensor, small, self.classes)
        told = answers.of_counts(np.bincount(said.ravel(), minlength=UNKNOWN + 1), self.classes)
        return files, {**told, "cells": int((said != UNKNOWN).sum())}

    def _boxes(self, kind: Boxes) -> tuple[dict[str, Path], dict[str, Any]]:
        from ringmo.tasks.objects import SURE

        parts = [arrays for _, arrays in self._blocks("corners", "scores", "labels")]
        corners, scores, labels = (
            torch.from_numpy(np.concatenate([part[name] for part in parts]))
            if parts
            else torch.zeros(shape, dtype=dtype)
            for name, shape, dtype in (
                ("corners", (0, 4, 2), torch.float64),
                ("scores", (0,), torch.float32),
                ("labels", (0,), torch.int64),
            )
        )
        assert isinstance(kind.task, ObjectTask)
        found = scene_boxes.merged(kind.task, corners, scores, labels)
        upright = kind.task.name == "detection"
        if upright and len(found.scores):  # boxes end at the scene's edge
            limit = torch.tensor([self.scene.width, self.scene.height], dtype=torch.float64)
            found.corners = torch.minimum(found.corners.clamp(min=0), limit)
        path = self._path("boxes.gpkg")
        place = (self.scene.transform, self.scene.crs)
        scene_boxes.write(path, found, self.classes, *place, self.tags, self.folder.folder)
        files = {"boxes": path, "preview": self._path("preview.png")}
        sure = found.scores >= SURE
        preview.of_boxes(
            files["preview"],
            self.pixels,
            self.sensor,
            found.corners[sure].double().numpy() / self.step,
            found.labels[sure].tolist(),
            self.classes,
        )
        told = [
            {"class": self.classes[label], "score": score}
            for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
        ]
        return files, answers.summed_up({"boxes": told}, self.classes)


def _decimated(path: Path, shape: tuple[int, int]) -> NDArray[Any]:
    """A raster's first band at the size of the preview, from its overviews."""
    import rasterio

    with rasterio.open(path) as file:
        values: NDArray[Any] = file.read(1, out_shape=shape)
    return values
