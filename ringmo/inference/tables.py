"""The table beside a map of cells: a line a cell, with where it lies and how sure the model is."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class CellTable:
    """A CSV file, whole or not there: row, col (of the map), x, y (the middle of the map's cell
    in the scene's reference system, or in its pixels), label, confidence, and each class's
    probability.

    Of several classes a cell `label` names all from a probability of one half on, apart by `;`.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], cell: float, scene: Any, several: bool
    ) -> None:
        """
        Args:
            cell: the scene's own pixels along a cell's side. scene: of `reading.Scene`.
        """
        self.path, self.classes, self.cell, self.several = path, list(classes), cell, several
        self.transform = scene.transform

    def __enter__(self) -> "CellTable":
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.file = self.temporary.open("w", newline="")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["row", "col", "x", "y", "label", "confidence", *self.classes])
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink()

    def add(self, row: NDArray[Any], col: NDArray[Any], scores: NDArray[Any]) -> None:
        """Cells (n,) with scores (n, classes)."""
        x, y = (col + 0.5) * self.cell, (row + 0.5) * self.cell
        if self.transform is not None:
            x, y = self.transform @ (x, y)
        best = scores.argmax(1)
        for i in range(len(row)):
            label = self.classes[best[i]]
            if self.several:
                label = ";".join(np.array(self.classes, object)[scores[i] >= 0.5])
            told = [f"{value:.4f}" for value in scores[i].tolist()]
            place = [f"{x[i]:.9g}", f"{y[i]:.9g}"]
            self.rows.writerow([row[i], col[i], *place, label, told[best[i]], *told])
