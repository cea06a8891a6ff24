"""Windows over a scene on one fixed grid, and what becomes of their answers where they overlap.

Everything here is in the model's pixels. The grid belongs to the scene, not to the blocks in which
it is walked: a block takes all windows that touch it, so its answer is the same whatever is walked
beside it, before it or by whom.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo.tasks.dense import weight

# Of a window's side. Of untrained models, which differ most from window to window, a quarter leaves
# steps at windows' borders that are up to 1.6 times those elsewhere, this none.
OVERLAP = 3 / 8
Span = tuple[int, int]  # [first, last)


@dataclass(frozen=True)
class Windows:
    """Windows of `size` pixels over `height` x `width` pixels, each at least `size`.

    `stride` apart; the last row and column are shifted inward. shift: where the second row and
    column begin, below the stride; 0: a stride after the first.
    """

    height: int
    width: int
    size: int
    stride: int
    shift: tuple[int, int] = (0, 0)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        return _starts(self.height, self.size, self.stride, self.shift[0])

    @cached_property
    def cols(self) -> NDArray[np.int64]:
        return _starts(self.width, self.size, self.stride, self.shift[1])

    def touching(self, rows: Span, cols: Span) -> list[tuple[int, int]]:
        """Row and column, among `rows` and `cols`, of each window that has a pixel of this box."""
        return [
            (r, c)
            for r in _touching(self.rows, self.size, rows)
            for c in _touching(self.cols, self.size, cols)
        ]

    def beginning(self, rows: Span, cols: Span) -> list[tuple[int, int]]:
        """Of each window whose first pixel lies in this box: every window is in one such box."""
        return [(r, c) for r in _within(self.rows, rows) for c in _within(self.cols, cols)]

    def around(self, some: Sequence[tuple[int, int]]) -> tuple[Span, Span]:
        """The box that these windows cover."""
        rows = [int(self.rows[r]) for r, _ in some]
        cols = [int(self.cols[c]) for _, c in some]
        return (min(rows), max(rows) + self.size), (min(cols), max(cols) + self.size)


def stride_of(size: int) -> int:
    """Pixels from one window to the next."""
    return max(1, round(size * (1 - OVERLAP)))


def _starts(side: int, size: int, stride: int, shift: int) -> NDArray[np.int64]:
    last = side - size
    inner = np.arange(shift, last, stride, dtype=np.int64)
    return np.unique(np.concatenate([[0], inner, [last]]))


def _touching(starts: NDArray[np.int64], size: int, span: Span) -> range:
    first = int(np.searchsorted(starts, span[0] - size, "right"))
    return range(first, int(np.searchsorted(starts, span[1], "left")))


def _within(starts: NDArray[np.int64], span: Span) -> range:
    return range(*(int(np.searchsorted(starts, edge, "left")) for edge in span))


class Blend:
    """Answers of windows as they come → their weighted mean over one box of the scene."""

    def __init__(self, rows: Span, cols: Span, size: int) -> None:
        self.rows, self.cols, self.size = rows, cols, size
        self.weight = weight(size)
        self.total: Tensor | None = None
        self.weights = torch.zeros(rows[1] - rows[0], cols[1] - cols[0])

    def add(self, top: int, left: int, answer: Tensor) -> None:
        """A window's answer (C, size, size), which begins at this pixel of the scene."""
        if self.total is None:
            self.total = torch.zeros(len(answer), *self.weights.shape)
        into, of = zip(
            _common(self.rows, top, self.size), _common(self.cols, left, self.size), strict=True
        )
        part = self.weight[of]
        self.total[(slice(None), *into)] += answer[(slice(None), *of)] * part
        self.weights[into] += part

    def mean(self) -> Tensor | None:
        """(C, H, W); 0 where no window was. None where there was none at all. Once, in place."""
        if self.total is None:
            return None
        return self.total.div_(self.weights.clamp(min=1e-30))

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which pixels (H, W) a window had."""
        known: NDArray[np.bool_] = (self.weights > 0).numpy()
        return known


def _common(span: Span, start: int, size: int) -> tuple[slice, slice]:
    """What a window and a span share: as positions in the span, and in the window."""
    low, high = max(span[0], start), min(span[1], start + size)
    return slice(low - span[0], high - span[0]), slice(low - start, high - start)
