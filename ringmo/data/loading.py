"""Tiles of a selection on their way to training: read, decoded and shrunk in background threads.

The CPU only decodes and shrinks each tile to one fixed small size; crops, flips, normalisation
and masks are made of whole batches on the training device. What fits in memory is decoded once.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo.data.decode import Pixels, decode
from ringmo.data.store import TileStore
from ringmo.errors import BadInput
from ringmo.workspace import Workspace

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


@dataclass
class Batch:
    """images: of the sensor's dtype, (B, C, size, size), in memory with the bands innermost.

    rows: their positions in the selection's table. waited_s: how long the training waited.
    """

    images: Tensor
    rows: NDArray[np.int64]
    waited_s: float = 0.0


class SelectedTiles:
    """The tiles of a selection, by position, as small squares.

    `table` holds the selection's columns and the manifest's, joined by key, in the selection's
    order.

    Args:
        split: only its tiles. None: all.
        sensor: only its tiles. None: all, of which one batch still holds one sensor's.

    Raises:
        BadInput: the selection is missing, or names a tile that the store lacks or whose
            bytes changed.
    """

    def __init__(
        self,
        workspace: Workspace,
        selection: Path,
        split: str | None = None,
        sensor: str | None = None,
    ) -> None:
        import pandas as pd

        self.store = TileStore(workspace.store)
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
        wrong = known["content_hash"].to_numpy() != chosen["content_hash"].to_numpy()
        if wrong.any():
            key = chosen["key"].to_numpy()[wrong][0]
            raise BadInput(
                f"{selection}: tile {key} is not in the store as it was selected "
                f"({int(wrong.sum())} such): run `ringmo select`"
            )
        if sensor is not None:
            of_sensor = (known["sensor"] == sensor).to_numpy()
            chosen, known = chosen[of_sensor], known[of_sensor]
        # The selection decides about split and label: a corrected label is a new selection.
        own = set(chosen.columns)
        extra = known[[name for name in known.columns if name not in own]].reset_index(drop=True)
        self.table = pd.concat([chosen.reset_index(drop=True), extra], axis=1)
        self._place = list(
            zip(known["shard"], known["offset"].astype(int), known["size"].astype(int), strict=True)
        )
        self._dtypes = [str(dtype) for dtype in known["dtype"]]
        self._cache: dict[tuple[int, int], Tensor] = {}  # (size, row) → (size, size, C)
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

    def image(self, row: int) -> Pixels:
        """One tile as it is stored, (H, W, C).

        Raises:
            BadInput: unreadable, naming the tile.
        """
        try:
            return decode(self.store.read(*self._place[row]), self._dtypes[row])
        except BadInput as error:
            raise BadInput(f"tile {self.table['key'].iloc[row]}: {error}") from None

    def small(self, row: int, size: int) -> Tensor:
        """One tile as a square, (C, size, size) of its dtype; decoded once where memory allows."""
        bands, dtype = self._kind(np.array([row]))
        pixels = torch.empty((1, size, size, bands), dtype=dtype)
        self._fill(pixels, [row])
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
        bands, dtype = self._kind(order)
        # Pinned, a copy to the GPU runs beside the training instead of holding it up.
        pinned = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        starts = iter(range(0, len(order), batch_size))
        waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(workers or cores(), thread_name_prefix="tiles") as pool:

            def prepare(start: int) -> None:
                rows = order[start : start + batch_size]
                shape = (len(rows), size, size, bands)
                pixels = torch.empty(shape, dtype=dtype, pin_memory=pinned)
                parts = [
                    pool.submit(self._fill, pixels[i : i + TOGETHER], rows[i : i + TOGETHER])
                    for i in range(0, len(rows), TOGETHER)
                ]
                waiting.append((Batch(pixels.permute(0, 3, 1, 2), rows), parts))

            try:
                for _, start in zip(range(ahead), starts, strict=False):
                    prepare(start)
                while waiting:
                    asked = time.perf_counter()
                    batch, parts = waiting.popleft()
                    for part in parts:
                        part.result()
                    batch.waited_s = time.perf_counter() - asked
                    for start in starts:
                        prepare(start)
                        break
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _kind(self, rows: NDArray[np.int64]) -> tuple[int, torch.dtype]:
        """Bands and dtype that these tiles share."""
        kinds = self.table[["sensor", "bands", "dtype"]].iloc[rows].drop_duplicates()
        if len(kinds) > 1:
            raise BadInput(
                f"tiles of more than one kind in one batch ({', '.join(kinds['sensor'])}): "
                f"a batch holds one sensor's"
            )
        dtype = str(kinds["dtype"].iloc[0])
        if dtype not in DTYPES:
            raise BadInput(
                f"tile {self.keys(rows[:1])[0]}: pixels of {dtype}: tiles are of "
                f"{', '.join(DTYPES)}"
            )
        return int(kinds["bands"].iloc[0]), DTYPES[dtype]

    def _fill(self, pixels: Tensor, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Tiles of these rows as squares into `pixels` (N, size, size, C)."""
        size = pixels.shape[1]
        new = []
        for i, row in enumerate(rows):
            kept = self._cache.get((size, int(row)))
            if kept is None:
                new.append(i)
            else:
                pixels[i] = kept
        if not new:
            return
        images = [self.image(int(rows[i])) for i in new]
        for i, image in zip(new, images, strict=True):
            if (image.shape[2], DTYPES.get(str(image.dtype))) != (pixels.shape[3], pixels.dtype):
                raise BadInput(
                    f"tile {self.keys([int(rows[i])])[0]}: {image.shape[2]} bands of "
                    f"{image.dtype}, not what the manifest says: run `dvc checkout`"
                )
        fresh = squares(images, size)
        for i, tile in zip(new, fresh, strict=True):
            pixels[i] = tile
            with self._lock:
                fits = self._cached_bytes + tile.nbytes <= CACHE_BYTES
                self._cached_bytes += tile.nbytes * fits
            if fits:
                self._cache[size, int(rows[i])] = tile.clone()


def cores() -> int:
    """Cores this process may use: all it is allowed, shared with the ranks beside it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (allowed or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A random order of `count` items that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int64)
