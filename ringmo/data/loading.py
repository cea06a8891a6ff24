"""Tiles of a selection on their way to training: read, decoded and shrunk in background threads.

The CPU only decodes and shrinks each tile to one fixed small size; crops, flips, normalisation
and masks are made of whole batches on the training device. What fits in memory is decoded once.
"""

import queue
import time
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

# Decoded tiles are kept up to this many bytes: 64,000 tiles of 102 pixels, and never a surprise.
CACHE_BYTES = 2_000_000_000


def square(image: Pixels, size: int) -> Tensor:
    """The largest centred square of an image (H, W, C), resized with antialiasing.

    uint8 (C, size, size).
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    # Pillow's arrays are read-only, which PyTorch does not know.
    cut = np.require(image[top : top + side, left : left + side], requirements=["C", "W"])
    tensor = torch.from_numpy(cut).permute(2, 0, 1)
    if side == size:
        return tensor.contiguous()
    resized = torch.nn.functional.interpolate(
        tensor[None], size=(size, size), mode="bilinear", antialias=True
    )
    return resized[0].contiguous()


@dataclass
class Batch:
    """images: uint8 (B, C, size, size); rows: their positions in the selection's table."""

    images: Tensor
    rows: NDArray[np.int64]
    waited_s: float = 0.0


class SelectedTiles:
    """The tiles of a selection, by position, as small squares.

    `table` holds the selection's columns and the manifest's, joined by key, in the selection's
    order.

    Raises:
        BadInput: the selection is missing, or names a tile that the store lacks or whose
            bytes changed.
    """

    def __init__(self, workspace: Workspace, selection: Path, split: str | None = None) -> None:
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
        # The selection decides about split and label: a corrected label is a new selection.
        own = set(chosen.columns)
        extra = known[[name for name in known.columns if name not in own]].reset_index(drop=True)
        self.table = pd.concat([chosen.reset_index(drop=True), extra], axis=1)
        self._place = list(
            zip(known["shard"], known["offset"].astype(int), known["size"].astype(int), strict=True)
        )
        self._cache: dict[int, dict[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def generated(self) -> bool:
        """Whether any tile comes from the made-up sample world."""
        return bool(self.table["generated"].any())

    def keys(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        return [str(key) for key in self.table["key"].to_numpy()[rows]]

    def image(self, row: int) -> Pixels:
        """One tile as it is stored, uint8 (H, W, C).

        Raises:
            BadInput: unreadable, naming the tile.
        """
        try:
            return decode(self.store.read(*self._place[row]))
        except BadInput as error:
            raise BadInput(f"tile {self.table['key'].iloc[row]}: {error}") from None

    def small(self, row: int, size: int) -> Tensor:
        """One tile as a square, uint8 (C, size, size); decoded once where memory allows."""
        cache = self._cache.setdefault(size, {})
        tile = cache.get(row)
        if tile is None:
            tile = square(self.image(row), size)
            if (len(cache) + 1) * tile.numel() <= CACHE_BYTES:
                cache[row] = tile
        return tile

    def batches(
        self,
        order: NDArray[np.int64],
        batch_size: int,
        size: int,
        *,
        workers: int = 2,
        ahead: int = 4,
    ) -> Iterator[Batch]:
        """Batches in this order, the last one smaller, prepared `ahead` of use in threads.

        Decoding and resizing release the interpreter, so threads are enough and nothing is copied
        between processes.
        """
        starts = range(0, len(order), batch_size)

        def prepare(start: int) -> Batch:
            rows = order[start : start + batch_size]
            return Batch(torch.stack([self.small(int(row), size) for row in rows]), rows)

        with ThreadPoolExecutor(workers, thread_name_prefix="tiles") as pool:
            waiting: queue.SimpleQueue[Future[Batch]] = queue.SimpleQueue()
            upcoming = iter(starts)
            for start, _ in zip(upcoming, range(ahead), strict=False):
                waiting.put(pool.submit(prepare, start))
            try:
                while not waiting.empty():
                    asked = time.perf_counter()
                    batch = waiting.get().result()
                    batch.waited_s = time.perf_counter() - asked
                    following = next(upcoming, None)
                    if following is not None:
                        waiting.put(pool.submit(prepare, following))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A random order of `count` items that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int64)
