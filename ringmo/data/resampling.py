"""Pixels at another ground sampling distance: area means where they shrink, bilinear where not.

What has no data takes no part. A resampled pixel is made of its own source pixels alone, so it is
the same whatever is read with it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
Mask = NDArray[np.bool_]

PART_VALUES = 2_000_000  # source values that are in float64 at a time


@dataclass(frozen=True)
class Side:
    """Resampled pixels `start` to `start + count` along one side of a scene.

    A resampled pixel stands for `scale` of the `length` source pixels of that side.
    """

    start: int
    count: int
    scale: float
    length: int

    @property
    def source(self) -> slice:
        """The source pixels they are made of."""
        low, high = self.start * self.scale, (self.start + self.count) * self.scale
        if self.scale < 1:  # the centres of pixels on both sides
            low, high = low - 1, high + 1
        return slice(max(math.floor(low + 1e-6), 0), min(math.ceil(high - 1e-6), self.length))

    def made_of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Resampled along the first axis, of which `values` has those of `source`."""
        first = self.source.start
        shape = (-1, *[1] * (values.ndim - 1))
        if self.scale > 1:
            edges = (self.start + np.arange(self.count + 1)) * self.scale - first
            whole = np.floor(edges + 1e-6).astype(int)
            part = (edges - whole).clip(0).reshape(shape)
            sums = np.add.reduceat(values[: whole[-1]], whole[:-1], axis=0)
            sums -= part[:-1] * values[whole[:-1]]
            sums += part[1:] * values[np.minimum(whole[1:], len(values) - 1)]
            return np.asarray(sums / self.scale)
        centres = (self.start + np.arange(self.count) + 0.5) * self.scale - 0.5
        low = np.floor(centres).astype(int)
        part = (centres - low).reshape(shape)
        one, other = (values[at.clip(0, self.length - 1) - first] for at in (low, low + 1))
        return np.asarray(one * (1 - part) + other * part)


def resampled(
    raw: Pixels, gaps: Mask | None, rows: Side, cols: Side, nodata: float | None
) -> tuple[Pixels, Mask | None]:
    """Pixels of `rows` x `cols` and their gaps, of the source pixels (H, W, C) that they need.

    The dtype stays, but of complex values, whose mean would be that of their phases, it is the
    power |z|² in float32.

    Args:
        gaps: as `raw`, or (H, W, 1) for all bands; None where there are none.
        nodata: what to write where half a pixel or more has no data; None: NaN, of integers 0.
    """
    source_row = max(1, raw[0].size * rows.scale)
    step = max(1, int(PART_VALUES / source_row))
    values, lost = [], []
    for top in range(0, rows.count, step):
        part = Side(rows.start + top, min(step, rows.count - top), rows.scale, rows.length)
        near = slice(part.source.start - rows.source.start, part.source.stop - rows.source.start)
        some = None if gaps is None else gaps[near]
        one, missing = _resampled(raw[near], some, part, cols, nodata)
        values.append(one)
        lost.append(missing)
    every = np.concatenate(lost)
    return np.concatenate(values), every if every.any() else None


def _resampled(
    raw: Pixels, gaps: Mask | None, rows: Side, cols: Side, nodata: float | None
) -> tuple[Pixels, Mask]:
    if raw.dtype.kind == "c":
        raw = (np.square(raw.real) + np.square(raw.imag)).astype(np.float32)

    def means(values: Any) -> NDArray[np.float64]:
        down = rows.made_of(np.asarray(values, np.float64))
        return cols.made_of(down.swapaxes(0, 1)).swapaxes(0, 1)

    if gaps is None or not gaps.any():
        values = means(raw)
        lost = np.zeros(values.shape, np.bool_)
    else:
        values, has = means(np.where(gaps, 0, raw)), means(~gaps)
        lost = np.broadcast_to(has <= 0.5, values.shape)
        values = np.divide(values, has, out=np.zeros_like(values), where=~lost)
    if raw.dtype.kind in "iu":
        limits = np.iinfo(raw.dtype)
        values = np.rint(values).clip(limits.min, limits.max)
        if nodata is not None:
            # A measurement that comes to the value for none is the next one.
            values[values == nodata] += 1 if nodata < limits.max else -1
    empty = math.nan if raw.dtype.kind == "f" else 0
    values[lost] = empty if nodata is None else nodata
    return values.astype(raw.dtype), lost
