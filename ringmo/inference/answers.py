"""What a task says of an image, as files: masks and heights as GeoTIFF, boxes as GeoJSON.

They lie where their image lies on the ground; an image without coordinates has them in pixels.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.decode import expect_no_coordinates
from ringmo.data.scenes import georeference
from ringmo.errors import BadInput


def written(
    told: dict[str, Any], image: Path, out: Path, name: str, classes: Sequence[str]
) -> list[str]:
    """Write what was told of an image into folder `out`, under `name`; the files' paths."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        transform, crs = georeference(image)
    except BadInput:  # no image that lies anywhere
        crs, transform = None, None
    files = []
    for what, value in told.items():
        if what == "boxes":
            path = out / f"{name}.geojson"
            _write_boxes(path, value, crs, transform)
        else:
            path = out / f"{name}.{what}.tif"
            _write_map(path, value, crs, transform, classes if what == "mask" else ())
        files.append(str(path))
    return files


def _write_map(
    path: Path, values: NDArray[Any], crs: Any, transform: Any, classes: Sequence[str]
) -> None:
    import rasterio

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with rasterio.open(temporary, "w", **map_profile(values, crs, transform)) as file:
        file.write(values, 1)
        if classes:
            colour_classes(file, classes)
    temporary.replace(path)


def map_profile(values: NDArray[Any], crs: Any, transform: Any) -> dict[str, Any]:
    """What rasterio is to make a GeoTIFF of a map (H, W) with.

    Args:
        crs, transform: where it lies; None: nowhere.
    """
    expect_no_coordinates()
    height, width = values.shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": 1,
        "dtype": values.dtype,
        "compress": "deflate",
        "predictor": 3 if values.dtype.kind == "f" else 2,
        "crs": crs,
    }
    return profile if transform is None else {**profile, "transform": transform}


def colour_classes(file: Any, classes: Sequence[str]) -> None:
    """Give a mask, open for writing, its classes' colours, and their names as tags of the band."""
    from ringmo.tasks.dense import colour

    file.write_colormap(1, {i: (*colour(i), 255) for i in range(len(classes))})
    file.update_tags(1, **{f"class_{i}": one for i, one in enumerate(classes)})


def _write_boxes(path: Path, boxes: list[dict[str, Any]], crs: Any, transform: Any) -> None:
    """GeoJSON in degrees (RFC 7946), or in the image's pixels where it lies nowhere."""
    features = []
    for box in boxes:
        points = [tuple(point) for point in box["points"]]
        if crs is not None:
            from rasterio.warp import transform as to_degrees

            xs, ys = zip(*(transform @ point for point in points), strict=True)
            lon, lat = to_degrees(crs, "EPSG:4326", xs, ys)
            points = list(zip(lon, lat, strict=True))
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring(points)]},
                "properties": {
                    "class": box["class"],
                    "score": round(float(box["score"]), 4),
                    "pixels": [[round(float(v), 1) for v in point] for point in box["points"]],
                },
            }
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    temporary.replace(path)


def ring(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners as an exterior ring: closed, and counter-clockwise, as RFC 7946 has it."""
    first = points[0][0]
    # Of a box across 180 degrees the longitudes jump.
    xs = [(x - first + 180) % 360 - 180 if abs(x - first) > 180 else x - first for x, _ in points]
    ys = [y for _, y in points]
    following = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    twice = sum(x * further - beyond * y for x, y, beyond, further in following)
    around = points if twice >= 0 else points[::-1]
    return [*around, around[0]]


def summed_up(told: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """The answer in a few words and numbers: `said`, and shares, counts or metres by name.

    Of boxes `objects` counts by class those with a score of SURE or more, `boxes` all.
    """
    if "boxes" in told:
        from ringmo.tasks.objects import SURE

        counts: dict[str, int] = {}
        for box in told["boxes"]:
            if box["score"] >= SURE:
                counts[box["class"]] = counts.get(box["class"], 0) + 1
        said = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "no objects"
        rest = len(told["boxes"]) - sum(counts.values())
        said += f" (score from {SURE}" + (f"; {rest} more below)" if rest else ")")
        return {"said": said, "objects": counts, "boxes": len(told["boxes"])}
    if "mask" in told:
        return of_counts(np.bincount(told["mask"].ravel(), minlength=len(classes)), classes)
    heights = told["height"]
    return of_metres(heights.min(), heights.mean(), heights.max())


def of_counts(counts: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    """The largest classes as `said`, and the `shares` of all.

    Args:
        counts: pixels (or cells) of each value; those that are no class do not count.
    """
    of_classes = counts[: len(classes)]
    parts = (of_classes / max(1, of_classes.sum())).tolist()
    shares: dict[str, float] = dict(zip(classes, parts, strict=True))
    largest = sorted(shares, key=lambda name: -shares[name])[:3]
    return {"said": ", ".join(f"{n} {shares[n]:.1%}" for n in largest), "shares": shares}


def of_metres(lowest: float, mean: float, highest: float) -> dict[str, Any]:
    """Heights as `said`, and each as a number: `lowest_m`, `mean_m`, `highest_m`."""
    metres = {"lowest": float(lowest), "mean": float(mean), "highest": float(highest)}
    said = ", ".join(f"{name} {value:.1f} m" for name, value in metres.items())
    return {"said": said, **{f"{name}_m": value for name, value in metres.items()}}
