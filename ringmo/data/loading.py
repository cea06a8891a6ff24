"""Tiles of a selection on their way to training: read, decoded and shrunk in background threads.

The CPU only decodes and shrinks each tile to one fixed small size; crops, flips, normalisation
and masks are made of whole batches on the training device. What fits in memory is decoded once.

With a tile come, where a task wants them, its parts: the mask, the heights, the same ground at a
second date or by other sensors, each at the tile's size.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo.data.decode import Pixels, decode, decode_heights, decode_mask
from ringmo.data.store import TileStore
from ringmo.errors import BadInput
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.tasks.base import Task

# Decoded tiles are kept up to this many bytes: 70,000 tiles of 96 pixels, and never a surprise.
CACHE_BYTES = 2_000_000_000

# Tiles a thread decodes and shrinks at a time: resizing many of one shape in one call takes half
# the time of as many calls, and 16 still fit the processor's cache.
TOGETHER = 16

# NumPy's dtype of a tile → that of its tensors.
DTYPES = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "float32": torch.float32,
    "float64": torch.float32,
}


def square(image: Pixels, size: int) -> Tensor:
    """The largest centred square of an image (H, W, C), resized with antialiasing.

    (C, size, size) of the image's dtype, float32 for float64.

    Raises:
        BadInput: pixels of a dtype that no sensor has.
    """
    return squares([image], size)[0].permute(2, 0, 1).contiguous()


def squares(images: Sequence[Pixels], size: int) -> Tensor:
    """`square` of images with the same bands and dtype, at once: (N, size, size, C)."""
    name = str(images[0].dtype)
    if name not in DTYPES:
        raise BadInput(f"pixels of {name}: tiles are of {', '.join(DTYPES)}")
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    if len(by_shape) == 1:
        return _resized([_centre(image) for image in images], size)
    result = torch.empty((len(images), size, size, images[0].shape[2]), dtype=DTYPES[name])
    for members in by_shape.values():
        resized = _resized([_centre(images[i]) for i in members], size)
        for i, tile in zip(members, resized, strict=True):
            result[i] = tile
    return result


def _centre(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _resized(cuts: Sequence[Pixels], size: int) -> Tensor:
    """Squares of one size, bands and dtype, to (N, size, size, C)."""
    dtype = DTYPES[str(cuts[0].dtype)]
    stacked = torch.from_numpy(np.stack(cuts))
    if cuts[0].shape[0] == size:
        return stacked.to(dtype)
    # PyTorch resizes uint8 as it is, and quickest with the bands innermost; no other integers.
    images = stacked.permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        images if dtype == torch.uint8 else images.float(),
        size=(size, size),
        mode="bilinear",
        antialias=True,
    )
    if not (dtype.is_floating_point or dtype == torch.uint8):
        resized = resized.round_()
    return resized.permute(0, 2, 3, 1).to(dtype)


def padded(image: Pixels, fill: float | None = None) -> Pixels:
    """An image (H, W, C) with more rows below or columns on the right, so that it is square.

    Args:
        fill: their value; None: the nearest pixel's.
    """
    height, width = image.shape[:2]
    if height == width:
        return image
    side = max(height, width)
    missing = ((0, side - height), (0, side - width), (0, 0))
    if fill is None:
        return np.pad(image, missing, mode="edge")
    return np.pad(image, missing, constant_values=fill)


def nearest(image: Pixels, size: int) -> Pixels:
    """A square image (S, S, C) at another size, of the pixels nearest."""
    if image.shape[0] == size:
        return image
    at = ((np.arange(size) + 0.5) * image.shape[0] / size).astype(np.int64)
    taken: Pixels = image[at[:, None], at]
    return taken


IMAGE, MASK, HEIGHT, SECOND, BOXES = "image", "mask", "height", "second", "boxes"
BESIDE = "beside:"  # and a sensor: the column with the key of its tile of the same ground
UNKNOWN = {MASK: 255, HEIGHT: float("nan")}


@dataclass
class Batch:
    """images: of the sensor's dtype, (B, C, size, size), in memory with the bands innermost.

    rows: their positions in the selection's table. parts: what a task wants beside them, by
    name, alike in shape. waited_s: how long the training waited.
    """

    images: Tensor
    rows: NDArray[np.int64]
    parts: dict[str, Tensor] = field(default_factory=dict)
    waited_s: float = 0.0


@dataclass
class _Plane:
    """One of the things a tile has at every pixel: how it is read, and what its pixels are."""

    read: Callable[[int], Pixels]
    bands: int
    dtype: torch.dtype


class SelectedTiles:
    """The tiles of a selection, by position, as small squares.

    `table` holds the selection's columns and the manifest's, joined by key, in the selection's
    order.

    Args:
        split: only its tiles. None: all.
        sensor: only its tiles. None: all, of which one batch still holds one sensor's.
        task: what it needs of a tile beside the image is read too, and tiles become squares as
            it wants them. beside: sensors whose tiles of the same ground are read too.

    Raises:
        BadInput: the selection is missing, or names a tile or a label that the store lacks or
            whose bytes changed.
    """

    def __init__(
        self,
        workspace: Workspace,
        selection: Path,
        split: str | None = None,
        sensor: str | None = None,
        *,
        task: "Task | None" = None,
        beside: Sequence[str] = (),
    ) -> None:
        import pandas as pd

        self.store, self.whole = TileStore(workspace.store), task is not None and task.padded
        parts = () if task is None else task.parts
        self.parts = tuple(part for part in parts if part in (MASK, HEIGHT, SECOND))
        try:
            chosen = pd.read_parquet(selection)
        except FileNotFoundError:
            raise BadInput(f"{selection} is missing: run `ringmo select`") from None
        except (OSError, ValueError) as error:
            raise BadInput(f"{selection} is damaged ({error}): run `ringmo select`") from None
        if split is not None:
            chosen = chosen[chosen["split"] == split]
        manifest = self.store.manifest().set_index("key")
        known = manifest.reindex(chosen["key"])
        for column in ("content_hash", "mask_hash", "boxes_hash", "height_hash"):
            if column not in chosen:
                continue
            wrong = known[column].to_numpy() != chosen[column].to_numpy()
            if wrong.any():
                key = chosen["key"].to_numpy()[wrong][0]
                what = "tile" if column == "content_hash" else column.removesuffix("_hash")
                raise BadInput(
                    f"{selection}: {what}{' of tile' * (what != 'tile')} {key} is not in the store "
                    f"as it was selected ({int(wrong.sum())} such): run `ringmo select`"
                )
        if sensor is not None:
            of_sensor = (known["sensor"] == sensor).to_numpy()
            chosen, known = chosen[of_sensor], known[of_sensor]
        # The selection decides about split and label: a corrected label is a new selection.
        own = set(chosen.columns)
        extra = known[[name for name in known.columns if name not in own]].reset_index(drop=True)
        self.table = pd.concat([chosen.reset_index(drop=True), extra], axis=1)
        self._place = _places(known)
        self._dtypes = [str(dtype) for dtype in known["dtype"]]
        self._others: dict[str, tuple[list[Place], list[str]]] = {}
        self._kinds: dict[str, pd.DataFrame] = {}
        for name in [SECOND] * (SECOND in self.parts) + [BESIDE + one for one in beside]:
            keys = self.table.get(name)
            if keys is None or not keys.isin(manifest.index).all():
                what = "second date" if name == SECOND else f"tile of {name.removeprefix(BESIDE)}"
                raise BadInput(f"{selection}: a {what} is not in the store: run `ringmo select`")
            rows = manifest.reindex(keys)
            self._others[name] = _places(rows), [str(d) for d in rows["dtype"]]
            self._kinds[name] = rows[["bands", "dtype"]]
        self._labels = {
            part: _places(known, f"{part}_")
            for part in (MASK, HEIGHT, BOXES)
            if part in parts and f"{part}_shard" in known
        }
        self._cache: dict[tuple[str, int, int], Tensor] = {}  # (plane, size, row) → (size, size, C)
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def generated(self) -> bool:
        """Whether any tile comes from the made-up sample world."""
        return bool(self.table["generated"].any())

    def keys(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        return [str(key) for key in self.table["key"].to_numpy()[rows]]

    @property
    def others(self) -> list[str]:
        """What further images its tiles have: `second`, `beside:SENSOR`."""
        return list(self._others)

    def image(self, row: int) -> Pixels:
        """One tile as it is stored, (H, W, C).

        Raises:
            BadInput: unreadable, naming the tile.
        """
        return self._decoded(self._place[row], self._dtypes[row], row)

    def other(self, name: str, row: int) -> Pixels:
        """The tile of the same ground at the `second` date, or of `beside:SENSOR`: (H, W, C)."""
        places, dtypes = self._others[name]
        return self._decoded(places[row], dtypes[row], row)

    def mask(self, row: int) -> Pixels:
        """A tile's mask, (H, W, 1) of uint8: numbers of its coding's classes, 255 unknown."""
        return self._named(row, lambda: decode_mask(self.store.read(*self._labels[MASK][row])))

    def heights(self, row: int) -> Pixels:
        """A tile's heights in metres, (H, W, 1) of float32, NaN where unknown."""
        return self._named(row, lambda: decode_heights(self.store.read(*self._labels[HEIGHT][row])))

    def boxes(self, row: int) -> list[dict[str, Any]]:
        """A tile's boxes as `data.boxes` writes them, in pixels of the tile."""
        try:
            found: list[dict[str, Any]] = json.loads(self.store.read(*self._labels[BOXES][row]))[
                "boxes"
            ]
        except (ValueError, KeyError) as error:
            raise BadInput(f"boxes of tile {self.keys([row])[0]}: damaged: {error}") from None
        return found

    def _decoded(self, place: "Place", dtype: str, row: int) -> Pixels:
        return self._named(row, lambda: decode(self.store.read(*place), dtype))

    def _named(self, row: int, read: Callable[[], Pixels]) -> Pixels:
        """What `read` gives; its errors name the tile."""
        try:
            return read()
        except BadInput as error:
            raise BadInput(f"tile {self.table['key'].iloc[row]}: {error}") from None

    def small(self, row: int, size: int) -> Tensor:
        """One tile as a square, (C, size, size) of its dtype; decoded once where memory allows."""
        plane = self._planes(np.array([row]))[IMAGE]
        pixels = torch.empty((1, size, size, plane.bands), dtype=plane.dtype)
        self._fill(IMAGE, plane, pixels, [row])
        return pixels[0].permute(2, 0, 1).contiguous()

    def batches(
        self,
        order: NDArray[np.int64],
        batch_size: int,
        size: int,
        *,
        workers: int | None = None,
        ahead: int = 4,
    ) -> Iterator[Batch]:
        """Batches in this order, the last one smaller, prepared `ahead` of use in threads.

        Decoding and resizing release the interpreter, so threads are enough and nothing is copied
        between processes. What a batch holds does not depend on `workers`.

        Args:
            workers: threads. None: one for each core this process may use.

        Raises:
            BadInput: an unreadable tile, by name, or tiles of more than one kind.
        """
        if not len(order):
            return
        planes = self._planes(order)
        # Pinned, a copy to the GPU runs beside the training instead of holding it up.
        pinned = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        starts = iter(range(0, len(order), batch_size))
        waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(workers or cores(), thread_name_prefix="tiles") as pool:

            def prepare(start: int) -> None:
                rows = order[start : start + batch_size]
                whole: dict[str, Tensor] = {}
                work = []
                for name, plane in planes.items():
                    shape = (len(rows), size, size, plane.bands)
                    pixels = torch.empty(shape, dtype=plane.dtype, pin_memory=pinned)
                    whole[name] = pixels.permute(0, 3, 1, 2)
                    work += [
                        pool.submit(
                            self._fill,
                            name,
                            plane,
                            pixels[i : i + TOGETHER],
                            rows[i : i + TOGETHER],
                        )
                        for i in range(0, len(rows), TOGETHER)
                    ]
                waiting.append((Batch(whole.pop(IMAGE), rows, whole), work))

            try:
                for _, start in zip(range(ahead), starts, strict=False):
                    prepare(start)
                while waiting:
                    asked = time.perf_counter()
                    batch, work = waiting.popleft()
                    for part in work:
                        part.result()
                    batch.waited_s = time.perf_counter() - asked
                    for start in starts:
                        prepare(start)
                        break
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _planes(self, rows: NDArray[np.int64]) -> dict[str, _Plane]:
        """What these tiles have at every pixel; all share its bands and dtype."""
        kinds = self.table[["sensor", "bands", "dtype"]].iloc[rows].drop_duplicates()
        if len(kinds) > 1:
            raise BadInput(
                f"tiles of more than one kind in one batch ({', '.join(kinds['sensor'])}): "
                f"a batch holds one sensor's"
            )
        key = self.keys(rows[:1])[0]
        image = _Plane(self.image, int(kinds["bands"].iloc[0]), _dtype(kinds["dtype"].iloc[0], key))
        planes = {IMAGE: image}
        for name in self._others:
            kept = self._kinds[name].iloc[rows].drop_duplicates()
            bands, dtype = int(kept["bands"].iloc[0]), str(kept["dtype"].iloc[0])
            if len(kept) > 1 or (name == SECOND and bands != image.bands):
                raise BadInput(f"tile {key}: its {name} is of another kind than other tiles'")

            def read(row: int, name: str = name) -> Pixels:
                return self.other(name, row)

            planes[name] = _Plane(read, bands, _dtype(dtype, key))
        if MASK in self.parts:
            planes[MASK] = _Plane(self.mask, 1, torch.uint8)
        if HEIGHT in self.parts:
            planes[HEIGHT] = _Plane(self.heights, 1, torch.float32)
        return planes

    def _fill(
        self, name: str, plane: _Plane, pixels: Tensor, rows: Sequence[int] | NDArray[np.int64]
    ) -> None:
        """What tiles of these rows have there, as squares, into `pixels` (N, size, size, C)."""
        size = pixels.shape[1]
        new = []
        for i, row in enumerate(rows):
            kept = self._cache.get((name, size, int(row)))
            if kept is None:
                new.append(i)
            else:
                pixels[i] = kept
        if not new:
            return
        images = [plane.read(int(rows[i])) for i in new]
        for i, image in zip(new, images, strict=True):
            if (image.shape[2], DTYPES.get(str(image.dtype))) != (plane.bands, plane.dtype):
                what = "" if name == IMAGE else f"{name}: "
                raise BadInput(
                    f"tile {self.keys([int(rows[i])])[0]}: {what}{image.shape[2]} bands of "
                    f"{image.dtype}, not what the manifest says: run `dvc checkout`"
                )
        fresh: Sequence[Tensor] | Tensor
        if name in UNKNOWN:
            fresh = [torch.tensor(nearest(padded(image, UNKNOWN[name]), size)) for image in images]
        else:
            fresh = squares([padded(image) for image in images] if self.whole else images, size)
        for i, tile in zip(new, fresh, strict=True):
            pixels[i] = tile
            with self._lock:
                fits = self._cached_bytes + tile.nbytes <= CACHE_BYTES
                self._cached_bytes += tile.nbytes * fits
            if fits:
                self._cache[name, size, int(rows[i])] = tile.clone()


Place = tuple[str, int, int]  # shard, offset and size


def _places(rows: Any, part: str = "") -> list[Place]:
    columns = (rows[f"{part}{name}"] for name in ("shard", "offset", "size"))
    shard, offset, size = columns
    return list(zip(shard, offset.astype(int), size.astype(int), strict=True))


def _dtype(dtype: str, key: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise BadInput(f"tile {key}: pixels of {dtype}: tiles are of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def cores() -> int:
    """Cores this process may use: all it is allowed, shared with the ranks beside it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (allowed or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A random order of `count` items that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int64)
