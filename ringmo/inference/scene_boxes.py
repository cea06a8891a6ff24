"""Boxes of a whole scene: those that several windows found become one, and a GeoPackage of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ringmo.tasks.base import spans
from ringmo.tasks.objects import Found, ObjectTask

if TYPE_CHECKING:
    from torch import Tensor

LOOKED_UP, COMPARED = 2000, 200_000  # boxes, and pairs of them, that are in memory at a time


def merged(task: ObjectTask, corners: "Tensor", scores: "Tensor", labels: "Tensor") -> Found:
    """What stays when double boxes of a class go, by falling score: as the task does it.

    Only what touches is compared, so that it is not a matter of all pairs, however many boxes a
    scene has and however they lie.

    Args:
        corners: float64 (n, 4, 2), in pixels of the scene.
    """
    import shapely

    from ringmo.models import rotated

    order = scores.argsort(descending=True, stable=True)
    found = Found(corners[order], scores[order], labels[order], 0)
    boxes = spans(found.corners)
    shapes = shapely.box(*boxes.numpy().T)
    tree, pairs = shapely.STRtree(shapes), [torch.zeros((2, 0), dtype=torch.int64)]
    for start in range(0, len(order), LOOKED_UP):
        touching = torch.from_numpy(tree.query(shapes[start : start + LOOKED_UP]))
        touching[0] += start
        better, worse = touching
        touching = touching[:, (better < worse) & (found.labels[better] == found.labels[worse])]
        for some in torch.split(touching, COMPARED, 1):
            # In float32 far from the corner of a large scene an eighth of a pixel is lost.
            origin = boxes[some[0], None, :2]
            one, other = ((found.corners[each] - origin).float() for each in some)
            pairs.append(some[:, task.paired_overlap(one, other) > task.double])
    better, worse = torch.cat(pairs, 1)
    return found.taken(rotated.greedy(better, worse, len(order)))


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
