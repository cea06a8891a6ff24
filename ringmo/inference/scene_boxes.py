"""Boxes of a whole scene: those that several windows found become one, and a GeoPackage of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ringmo.tasks.base import spans
from ringmo.tasks.objects import Found, ObjectTask

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 2000  # boxes that are held against each other at a time, at least
LOOKED_UP = 20_000  # boxes, whose neighbours are in memory at a time


def merged(task: ObjectTask, corners: "Tensor", scores: "Tensor", labels: "Tensor") -> Found:
    """What stays when double boxes of a class go, by falling score: as the task does it.

    Boxes that do not touch have nothing to do with each other. So boxes are parted into groups
    that nothing joins, and each is treated alone: exact, and not a matter of all pairs.

    Args:
        corners: float64 (n, 4, 2), in pixels of the scene.
    """
    if not len(scores):
        return Found(corners.float(), scores, labels, 0)
    group = torch.from_numpy(_groups(spans(corners).numpy()))
    order = group.argsort(stable=True)
    sizes = torch.bincount(group)
    kept = []
    first, ends = 0, sizes.cumsum(0).tolist()
    for i, end in enumerate(ends):
        if end - first < TOGETHER and i + 1 < len(ends):
            continue
        some = order[first:end]
        first = end
        # In float32 far from the corner of a large scene an eighth of a pixel is lost.
        origin = corners[some].reshape(-1, 2).amin(0)
        near = Found((corners[some] - origin).float(), scores[some], labels[some], 0)
        kept.append(some[task.single(near)])
    which = torch.cat(kept)
    which = which[scores[which].argsort(descending=True, stable=True)]
    return Found(corners[which], scores[which], labels[which], 0)


def _groups(boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """A number for each of upright boxes (n, 4): the same for those that touch, and for all that
    are joined by such. Neighbours get neighbouring numbers."""
    import shapely

    from ringmo.data.grouping import join

    shapes = shapely.box(*boxes.T)
    tree, count = shapely.STRtree(shapes), len(boxes)
    number = np.arange(count)
    for start in range(0, count, LOOKED_UP):
        one, other = tree.query(shapes[start : start + LOOKED_UP])
        number, _ = join(number, np.stack([one + start, other], 1))
    # Groups far apart in one call would be held against each other; in rows they seldom are.
    top = np.full(number.max() + 1, np.inf)
    np.minimum.at(top, number, boxes[:, 1])
    rank = np.empty(len(top), np.int64)
    rank[np.argsort(top, kind="stable")] = np.arange(len(top))
    ranked: NDArray[np.int64] = rank[number]
    return ranked


def write(
    target: Path,
    found: Found,
    classes: Sequence[str],
    transform: Any,
    crs: Any,
    tags: Mapping[str, str],
    scratch: Path,
) -> None:
    """A GeoPackage with a polygon a box, in the scene's reference system, or in its pixels.

    Columns: class, score, pixels (the corners in the scene's pixels, as JSON).

    Args:
        transform: pixels → ground; None: the scene lies nowhere, and y is minus the row.
    """
    import shapely

    from ringmo.data import vectors

    pixels = found.corners.double().numpy()
    # GIS draw an image that lies nowhere below zero.
    places = pixels * (1, -1)
    if transform is not None:
        places = np.stack(transform @ (pixels[..., 0], pixels[..., 1]), -1)
    shapes = shapely.polygons(places) if len(places) else np.zeros(0, object)
    columns = {
        "class": np.array([classes[i] for i in found.labels.tolist()], object),
        "score": np.round(found.scores.double().numpy(), 4),
        "pixels": np.array([json.dumps(np.round(one, 1).tolist()) for one in pixels], object),
    }
    temporary = scratch / f"{target.stem}.new{target.suffix}"
    vectors.write(temporary, shapely.to_wkb(shapes), columns, crs, tags)
    temporary.replace(target)
