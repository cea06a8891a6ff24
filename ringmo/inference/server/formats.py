"""Answers as they are sent: JSON, GeoJSON, PNG and GeoTIFF, by what the request accepts."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data.colours import visible
from ringmo.inference.answers import colour_classes, map_profile, ring, summed_up
from ringmo.inference.server.images import Picture, Refused
from ringmo.inference.server.models import Loaded
from ringmo.tasks.base import UNKNOWN
from ringmo.tasks.dense import colour
from ringmo.tasks.height import coloured
from ringmo.tasks.objects import SURE

JSON, GEOJSON, PNG, TIFF = "application/json", "application/geo+json", "image/png", "image/tiff"
FORMS = (JSON, GEOJSON, PNG, TIFF)
DIGITS = 5

Points = Sequence[Sequence[float]]  # x and y each, of a ring that is not closed


def accepted(accept: str | None) -> str:
    """The form that an Accept header asks for first; without one JSON.

    Raises:
        Refused: none that there is.
    """
    for one in (accept or "*/*").split(","):
        name = one.partition(";")[0].strip().lower()
        if name in ("*/*", "application/*", ""):
            return JSON
        if name in FORMS:
            return name
    raise Refused(406, f"Accept: {accept}: there are {', '.join(FORMS)}")


def check(form: str, model: Loaded) -> None:
    """Whether a model's answers have this form.

    Raises:
        Refused: they have not, and which they have.
    """
    task = model.task
    maps = (PNG, TIFF) if "mask" in task.parts or "height" in task.parts else ()
    there = (JSON, *((GEOJSON,) if "height" not in task.parts else ()), *maps)
    if form not in there:
        raise Refused(406, f"{model.name} answers with {', '.join(there)}")


def written(form: str, model: Loaded, told: Any, pictures: Mapping[str, Picture]) -> bytes:
    """One model's answer to one request.

    Args:
        form: one that `check` lets pass. told: probabilities (classes,), or a dict, for the
            image's own pixels. pictures: what was asked about, by what it is of.
    """
    first = next(iter(pictures.values()))
    if form == JSON:
        return json.dumps(as_json(model, told), ensure_ascii=False).encode()
    if form == GEOJSON:
        return json.dumps(_geojson(model, told, first), ensure_ascii=False).encode()
    what = "mask" if "mask" in told else "height"
    return _png(model, told) if form == PNG else _geotiff(model, told[what], what, first)


def as_json(model: Loaded, told: Any) -> dict[str, Any]:
    """The answer for programs, and for the page: masks and heights as a PNG in base64."""
    answer: dict[str, Any] = {
        "model": model.name,
        "task": model.task.name,
        "version": model.version,
    }
    classes = model.bundle.classes
    if not isinstance(told, dict):
        ranked = {classes[i]: round(float(told[i]), DIGITS) for i in np.argsort(-told)}
        best = next(iter(ranked))
        return answer | {"label": best, "confidence": ranked[best], "probabilities": ranked}
    answer |= summed_up(told, classes)
    if "boxes" in told:
        answer["legend"] = {name: _hex(colour(i + 1)) for i, name in enumerate(classes)}
        # sure: from which score on pictures show a box.
        return answer | {"sure": SURE, "boxes": [_box(box) for box in told["boxes"]]}
    if "mask" in told:
        answer["legend"] = {name: _hex(colour(i)) for i, name in enumerate(classes)}
    else:
        answer["legend_m"] = dict(zip(("low", "high"), _span(told["height"]), strict=True))
    name = "mask" if "mask" in told else "picture"
    return answer | {name: base64.b64encode(_png(model, told)).decode()}


def shown(models: Sequence[Loaded], pictures: Mapping[str, Picture]) -> dict[str, str]:
    """What the models read, for people: a PNG in base64 each, by what it is of."""
    told = {}
    for name, picture in pictures.items():
        bundle = next(model.bundle for model in models if name in model.bundle.reads)
        pixels = visible(bundle.fit(picture.pixels, name), bundle.reads[name])
        told[name] = base64.b64encode(_encoded(pixels)).decode()
    return told


def _box(box: dict[str, Any]) -> dict[str, Any]:
    return {
        "class": box["class"],
        "score": round(float(box["score"]), DIGITS),
        "box": [round(float(value), 2) for value in box["box"]],
        "points": [[round(float(value), 2) for value in point] for point in box["points"]],
    }


def _geojson(model: Loaded, told: Any, picture: Picture) -> dict[str, Any]:
    """In degrees (RFC 7946) where the image lies somewhere, else in its pixels."""
    height, width = picture.pixels.shape[:2]
    classes = model.bundle.classes
    found: list[tuple[list[Points], dict[str, Any]]]  # rings, the outer first, open; and about it
    if not isinstance(told, dict):
        answer = as_json(model, told)
        about = {name: answer[name] for name in ("label", "confidence", "probabilities")}
        found = [([[(0, 0), (width, 0), (width, height), (0, height)]], about)]
    elif "boxes" in told:
        found = [
            (
                [one["points"]],
                {"class": one["class"], "score": one["score"], "pixels": one["points"]},
            )
            for one in map(_box, told["boxes"])
        ]
    else:
        from rasterio.features import shapes

        areas = shapes(told["mask"], mask=told["mask"] != UNKNOWN)
        found = [
            ([points[:-1] for points in area["coordinates"]], {"class": classes[int(value)]})
            for area, value in areas
        ]
    features = [
        {"type": "Feature", "geometry": _polygon(rings, picture), "properties": about}
        for rings, about in found
    ]
    return {
        "type": "FeatureCollection",
        "ringmo:version": model.version,
        "ringmo:coordinates": "pixels" if picture.crs is None else "degrees",
        "features": features,
    }


def _polygon(rings: Sequence[Points], picture: Picture) -> dict[str, Any]:
    """Rings in pixels, the outer first, where they lie; holes run the other way round."""
    outer, *holes = (ring(_placed(points, picture)) for points in rings)
    return {"type": "Polygon", "coordinates": [outer, *(hole[::-1] for hole in holes)]}


def _placed(points: Points, picture: Picture) -> list[tuple[float, float]]:
    if picture.crs is None:
        return [(float(x), float(y)) for x, y in points]
    from rasterio.warp import transform as to_degrees

    xs, ys = picture.transform @ np.asarray(points, np.float64).T
    return list(zip(*to_degrees(picture.crs, "EPSG:4326", xs, ys), strict=True))


def _png(model: Loaded, told: Mapping[str, Any]) -> bytes:
    """A mask as the numbers of its classes with a palette; heights as colours, low to high."""
    from PIL import Image

    if "mask" in told:
        image = Image.fromarray(told["mask"])
        palette = [channel for i in range(256) for channel in colour(i)]
        image.putpalette(palette)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()
    low, high = _span(told["height"])
    return _encoded(coloured(told["height"], low, high))


def _span(heights: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(heights, (2, 98))
    return round(float(low), 2), round(float(high), 2)


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    image = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _geotiff(model: Loaded, values: NDArray[Any], what: str, picture: Picture) -> bytes:
    """The map where its image lies, with its version, and of a mask with its classes' names."""
    from rasterio.io import MemoryFile

    with MemoryFile() as memory:
        with memory.open(**map_profile(values, picture.crs, picture.transform)) as file:
            file.write(values, 1)
            file.update_tags(ringmo_version=model.version, ringmo_bundle=model.bundle.hash)
            if what == "mask":
                colour_classes(file, model.bundle.classes)
        memory.seek(0)
        return bytes(memory.read())


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
