"""A STAC item beside each scene's answer: where and when, which files, which model, made how.

Source: the STAC item specification 1.1.0, the extensions projection 2.0.0 and classification 2.0.0.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringmo.stage import write_json
from ringmo.tasks.dense import colour

VERSION = "1.1.0"
EXTENSIONS = "https://stac-extensions.github.io"
PROJECTION = f"{EXTENSIONS}/projection/v2.0.0/schema.json"
CLASSIFICATION = f"{EXTENSIONS}/classification/v2.0.0/schema.json"
STEPS = 20  # points along a side of the footprint: a straight side of UTM is none in degrees
DIGITS = 7  # of degrees: a centimetre
MEDIA = {
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".png": "image/png",
    ".gpkg": "application/geopackage+sqlite3",
    ".csv": "text/csv",
}


def write(
    path: Path,
    name: str,
    scene: Any,
    files: Mapping[str, Path],
    classes: Sequence[str],
    properties: Mapping[str, Any],
    changed: float,
) -> None:
    """Write the item.

    Args:
        scene: of `reading.Scene`. files: the answer's files by what they are, beside `path`.
        classes: of the mask, by value. properties: what else is to be said, with names of ours.
        changed: when the scene's file was last changed, Unix seconds.
    """
    geometry, bbox = footprint(scene)
    now = _time(datetime.datetime.now(datetime.UTC))
    told: dict[str, Any] = {
        **when(scene.acquired, changed),
        "created": now,
        "title": f"{properties.get('ringmo:model')} of {name}",
        **properties,
    }
    extensions = []
    if scene.crs is not None:
        extensions.append(PROJECTION)
        epsg = scene.crs.to_epsg()
        told["proj:code"] = None if epsg is None else f"EPSG:{epsg}"
        if epsg is None:
            told["proj:wkt2"] = scene.crs.to_wkt()
        told["proj:shape"] = [scene.height, scene.width]
        told["proj:transform"] = [float(value) for value in tuple(scene.transform)[:6]]
    assets: dict[str, Any] = {}
    for what, file in files.items():
        asset: dict[str, Any] = {
            "href": f"./{file.name}",
            "type": MEDIA[file.suffix],
            "roles": ["thumbnail" if file.suffix == ".png" else "data"],
        }
        if what == "mask" and classes:
            asset["classification:classes"] = [
                {
                    "value": number,
                    "name": re.sub(r"[^0-9A-Za-z-]", "_", one) or "_",
                    "title": one,
                    "color_hint": "{:02X}{:02X}{:02X}".format(*colour(number)),
                }
                for number, one in enumerate(classes)
            ]
            extensions.append(CLASSIFICATION)
        assets[what] = asset
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": VERSION,
        "stac_extensions": extensions,
        "id": name,
        "geometry": geometry,
        "properties": told,
        "links": [],
        "assets": assets,
    }
    if bbox is not None:
        item["bbox"] = bbox
    write_json(path, item)


def when(acquired: str | None, changed: float) -> dict[str, str | None]:
    """When the scene was seen. Where its file does not say: at some time before it was written."""
    if acquired is not None:
        return {"datetime": f"{acquired}Z"}
    last = datetime.datetime.fromtimestamp(changed, datetime.UTC)
    return {
        "datetime": None,
        "start_datetime": "1970-01-01T00:00:00Z",
        "end_datetime": _time(last),
    }


def _time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def footprint(scene: Any) -> tuple[dict[str, Any] | None, list[float] | None]:
    """A scene's outline in degrees, and the box around it; of one that lies nowhere both None.

    Across 180 degrees it is parted, and the box's west is east of its east (RFC 7946).
    """
    if scene.crs is None:
        return None, None
    import shapely

    from ringmo.data.footprints import outline, project

    share = np.arange(STEPS) / STEPS
    ones, zeros = np.ones(STEPS), np.zeros(STEPS)
    x = scene.width * np.concatenate([share, ones, 1 - share, zeros])
    y = scene.height * np.concatenate([zeros, share, ones, 1 - share])
    places = np.stack(scene.transform @ (x, y), 1)
    ring = project(scene.crs.to_wkt(), places)
    ring = ring[np.isfinite(ring).all(1)]
    if len(ring) < 3:  # a picture of the whole globe: its corners see none of it
        return None, None
    ring[:, 1] = ring[:, 1].clip(-90, 90)
    shape = outline(np.concatenate([ring, ring[:1]]), scene.crs.is_geographic)
    if shape is None:
        return None, None
    shape = shapely.make_valid(shape)
    parts = [one for one in shapely.get_parts(shape) if one.geom_type == "Polygon"]
    if not parts:
        return None, None
    parts = [shapely.orient_polygons(one) for one in parts]
    geometry = shapely.geometry.mapping(
        parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    )
    box = [round(value, DIGITS) for value in _box(parts)]
    return {"type": geometry["type"], "coordinates": _rounded(geometry["coordinates"])}, box


def _box(parts: Sequence[Any]) -> list[float]:
    """West, south, east and north of shapes: all but the widest span of longitudes that they leave
    free, which is that beyond 180 degrees where others are as wide."""
    bounds = np.array(sorted(part.bounds for part in parts))
    west, east = bounds[:, 0], np.maximum.accumulate(bounds[:, 2])
    free = np.append(west[1:] - east[:-1], west[0] + 360 - east[-1])
    last = len(free) - 1 - int(free[::-1].argmax())
    south, north = bounds[:, 1].min(), bounds[:, 3].max()
    return [west[(last + 1) % len(west)], south, east[last], north]


def _rounded(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else [_rounded(one) for one in value]
