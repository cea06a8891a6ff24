"""What a task says of an image, as files: masks and heights as GeoTIFF, boxes as GeoJSON.

They lie where their image lies on the ground; an image without coordinates has them in pixels.
"""

import json
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

    expect_no_coordinates()
    height, width = values.shape
    temporary = path.with_name(f".{path.name}.tmp")
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": 1,
        "dtype": values.dtype,
        "compress": "deflate",
        "predictor": 3 if values.dtype.kind == "f" else 2,
    }
    if transform is not None:
        profile["transform"] = transform
    with rasterio.open(temporary, "w", crs=crs, **profile) as file:
        file.write(values, 1)
        if classes:
            from ringmo.tasks.dense import colour

            file.write_colormap(1, {i: (*colour(i), 255) for i in range(len(classes))})
            file.update_tags(1, **{f"class_{i}": one for i, one in enumerate(classes)})
    temporary.replace(path)


def _write_boxes(path: Path, boxes: list[dict[str, Any]], crs: Any, transform: Any) -> None:
    """GeoJSON in degrees (RFC 7946), or in the image's pixels where it lies nowhere."""
    features = []
    for box in boxes:
        points = [tuple(point) for point in box["points"]]
        if crs is not None and transform is not None:
            from rasterio.warp import transform as to_degrees

            xs, ys = zip(*(transform * point for point in points), strict=True)
            lon, lat = to_degrees(crs, "EPSG:4326", xs, ys)
            points = list(zip(lon, lat, strict=True))
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [_ring(points)]},
                "properties": {
                    "class": box["class"],
                    "score": round(float(box["score"]), 4),
                    "pixels": [[round(float(v), 1) for v in point] for point in box["points"]],
                },
            }
        )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    temporary.replace(path)


def _ring(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
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
        pixels = np.bincount(told["mask"].ravel(), minlength=len(classes))[: len(classes)]
        shares = {
            name: float(n / told["mask"].size) for name, n in zip(classes, pixels, strict=True)
        }
        largest = sorted(shares, key=lambda name: -shares[name])[:3]
        return {"said": ", ".join(f"{n} {shares[n]:.1%}" for n in largest), "shares": shares}
    heights = told["height"]
    metres = {"lowest": heights.min(), "mean": heights.mean(), "highest": heights.max()}
    said = ", ".join(f"{name} {value:.1f} m" for name, value in metres.items())
    return {"said": said, **{f"{name}_m": float(value) for name, value in metres.items()}}
