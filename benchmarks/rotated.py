"""Boxes at any angle: overlap of every pair, and suppression of double answers, against shapely.

    python -m benchmarks.rotated '{"boxes": 2000, "job": "nms", "contender": "ours", "cores": 1}'

Clusters of like boxes, as a detector answers before suppression on a tile of 1024 pixels. shapely
finds the pairs that can touch with its R-tree and intersects them in one call of GEOS, the quickest
way it has. A run whose answers differ from it is no measurement.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.child import begin
from benchmarks.table import Bench, Row, compare

BOXES, CORES = 2000, 1
THRESHOLD = 0.1  # of suppression, as oriented detectors have it
REPEATS = 20  # of which the quickest counts
AGREE = 1e-5  # of overlaps from float32 corners and boxes
WHAT = {"iou": "overlap of every pair", "nms": "suppression"}


def rows(bench: Bench) -> None:
    """Boxes a second, ours against shapely in processes of the same kind, in turn."""
    count = bench.images or BOXES
    for what, title in WHAT.items():
        row = Row(f"{title} of {count} rotated boxes, one core, against shapely", "boxes/s", "≥ 1")
        bench.rows.append(row)
        runs: dict[str, list[float]] = {"ours": [], "shapely": []}
        found: dict[str, Any] | None = None
        for _ in range(bench.rounds):
            for contender, rates in runs.items():
                found = bench.tried(
                    f"{row.what}, {contender}",
                    "rotated",
                    CORES,
                    boxes=count,
                    job=what,
                    contender=contender,
                )
                rates.append(found["boxes_per_s"] if found else 0.0)
        if 0.0 in runs["ours"] + runs["shapely"] or found is None:
            row.note = "not measured: failed, see below"
            continue
        compare(row, runs["ours"], runs["shapely"], 1.0)
        row.note = f"same answers; {found['pairs']} pairs overlap, {found['kept']} boxes stay"


def boxes(count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (count, 5) in clusters of five about 8 to 128 pixels long, and their scores."""
    dice = np.random.default_rng(0)
    objects = -(-count // 5)
    long = np.exp(dice.uniform(np.log(8), np.log(128), objects))
    sides = np.stack([long, long * dice.uniform(0.2, 1, objects)], 1)
    middles = dice.uniform(0, 1024, (objects, 2))
    whole = np.concatenate([middles, sides, dice.uniform(-1.5, 1.5, (objects, 1))], 1)
    every = np.repeat(whole, 5, 0)[:count]
    every[:, :2] += dice.normal(0, 0.1, (count, 2)) * every[:, 2:4]
    every[:, 2:4] *= np.exp(dice.normal(0, 0.1, (count, 2)))
    every[:, 4] += dice.normal(0, 0.1, count)
    return every.astype(np.float32), dice.random(count, np.float32)


def by_shapely(corners: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs (P, 2) that may touch, each once and the earlier first, and their overlaps."""
    import shapely

    shapes = shapely.polygons(corners)
    first, second = shapely.STRtree(shapes).query(shapes)
    once = first < second
    first, second = first[once], second[once]
    both = shapely.area(shapely.intersection(shapes[first], shapes[second]))
    area = shapely.area(shapes)
    overlap = both / (area[first] + area[second] - both)
    return np.stack([first, second], 1), overlap


def nms_by_shapely(corners: NDArray[np.float64], scores: NDArray[np.float32]) -> list[int]:
    order = np.argsort(-scores, kind="stable")
    pairs, overlap = by_shapely(corners[order])
    pairs = pairs[overlap > THRESHOLD]
    worse: dict[int, list[int]] = {}
    for better, other in pairs.tolist():
        worse.setdefault(better, []).append(other)
    stays = np.ones(len(scores), bool)
    for i in range(len(scores)):
        if stays[i] and i in worse:
            stays[worse[i]] = False
    kept: list[int] = order[stays].tolist()
    return kept


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Boxes a second of one contender.

    Raises:
        SystemExit: the two disagree.
    """
    import torch

    from ringmo.models import rotated

    drawn, drawn_scores = boxes(spec["boxes"])
    ours, scores = torch.from_numpy(drawn), torch.from_numpy(drawn_scores)
    corners = rotated.to_corners(ours.double()).numpy()
    jobs: dict[tuple[str, str], Callable[[], object]] = {
        ("iou", "ours"): lambda: rotated.pairwise_iou(ours, ours),
        ("nms", "ours"): lambda: rotated.nms(ours, scores, THRESHOLD),
        ("iou", "shapely"): lambda: by_shapely(corners),
        ("nms", "shapely"): lambda: nms_by_shapely(corners, drawn_scores),
    }
    job = jobs[spec["job"], spec["contender"]]
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started)
    pairs, overlap = by_shapely(corners)
    wanted = np.eye(len(drawn))
    wanted[pairs[:, 0], pairs[:, 1]] = wanted[pairs[:, 1], pairs[:, 0]] = overlap
    apart = float(np.abs(rotated.pairwise_iou(ours, ours).numpy() - wanted).max())
    kept = rotated.nms(ours, scores, THRESHOLD).tolist()
    if apart > AGREE or kept != nms_by_shapely(corners, drawn_scores):
        raise SystemExit(f"other answers than shapely's: overlaps differ by up to {apart:.2g}")
    return {
        "boxes_per_s": len(drawn) / min(seconds),
        "pairs": int((overlap > 0).sum()),
        "kept": len(kept),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    print(json.dumps(measured(asked)), flush=True)
