"""Answers as they are sent: JSON, GeoJSON, PNG and GeoTIFF, by what the request accepts."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data import decode
from ringmo.data.colours import visible
from ringmo.inference.answers import summed_up
from ringmo.inference.server.images import Picture, Refused
from ringmo.inference.server.models import Loaded
from ringmo.tasks.base import UNKNOWN
from ringmo.tasks.dense import colour
from ringmo.tasks.height import VIRIDIS

JSON, GEOJSON, PNG, TIFF = "application/json", "application/geo+json", "image/png", "image/tiff"
FORMS = (JSON, GEOJSON, PNG, TIFF)
LEAST_SPAN_M = 1.0  # of a picture's colours
DIGITS = 5


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
        return answer | {"boxes": [_box(box) for box in told["boxes"]]}
    if "mask" in told:
        answer["legend"] = {name: _hex(colour(i)) for i, name in enumerate(classes)}
    else:
        answer["legend_m"] = dict(zip(("low", "high"), _span(told["height"]), strict=True))
    name = "mask" if "mask" in told else "picture"
    return answer | {name: base64.b64encode(_png(model, told)).decode()}


def shown(model: Loaded, pictures: Mapping[str, Picture]) -> dict[str, str]:
    """What the models read, for people: a PNG in base64 each, by what it is of."""
    told = {}
    for name, picture in pictures.items():
        sensor = model.bundle.sensors.get(name) or next(iter(model.bundle.sensors.values()))
        pixels = visible(model.bundle.fit(picture.pixels, _sensor(model, name)), sensor)
        told[name] = base64.b64encode(_encoded(pixels)).decode()
    return told


def _sensor(model: Loaded, name: str) -> str:
    return name if name in model.bundle.sensors else next(iter(model.bundle.sensors))


def _box(box: dict[str, Any]) -> dict[str, Any]:
    return {
        "class": box["class"],
        "score": round(float(box["score"]), DIGITS),
        "box": [round(float(value), 2) for value in box["box"]],
        "points": [[round(float(value), 2) for value in point] for point in box["points"]],
    }


def _geojson(model: Loaded, told: Any, picture: Picture) -> dict[str, Any]:
    """In degrees (RFC 7946) where the image lies somewhere, else in its pixels."""
    from shapely.geometry import box, mapping, shape

    height, width = picture.pixels.shape[:2]
    classes = model.bundle.classes
    found: list[tuple[Any, dict[str, Any]]]
    if not isinstance(told, dict):
        answer = as_json(model, told)
        about = {name: answer[name] for name in ("label", "confidence", "probabilities")}
        found = [(box(0, 0, width, height), about)]
    elif "boxes" in told:
        found = [
            (
                shape({"type": "Polygon", "coordinates": [one["points"]]}),
                {"class": one["class"], "score": one["score"], "pixels": one["points"]},
            )
            for one in map(_box, told["boxes"])
        ]
    else:
        from rasterio.features import shapes

        areas = shapes(told["mask"], mask=told["mask"] != UNKNOWN)
        found = [(shape(area), {"class": classes[int(value)]}) for area, value in areas]
    features = [
        {"type": "Feature", "geometry": mapping(_placed(area, picture)), "properties": about}
        for area, about in found
    ]
    return {
        "type": "FeatureCollection",
        "ringmo:version": model.version,
        "ringmo:coordinates": "pixels" if picture.crs is None else "degrees",
        "features": features,
    }


def _placed(area: Any, picture: Picture) -> Any:
    from shapely import transform
    from shapely.geometry.polygon import orient

    if picture.crs is not None:
        from rasterio.warp import transform as to_degrees

        def degrees(points: NDArray[np.float64]) -> NDArray[np.float64]:
            xs, ys = picture.transform @ (points[:, 0], points[:, 1])
            return np.stack(to_degrees(picture.crs, "EPSG:4326", xs, ys), 1)

        area = transform(area, degrees)
    return orient(area)


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
    share = np.clip((told["height"] - low) / max(high - low, LEAST_SPAN_M), 0, 1)
    steps = np.linspace(0, 1, len(VIRIDIS))
    bands = [np.interp(share, steps, [colours[i] for colours in VIRIDIS]) for i in range(3)]
    return _encoded(np.rint(np.stack(bands, 2)).astype(np.uint8))


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

    decode.expect_no_coordinates()
    height, width = values.shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": 1,
        "dtype": values.dtype,
        "crs": picture.crs,
        "compress": "deflate",
        "predictor": 3 if values.dtype.kind == "f" else 2,
    }
    if picture.transform is not None:
        profile["transform"] = picture.transform
    with MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(values, 1)
            file.update_tags(ringmo_version=model.version, ringmo_bundle=model.bundle.hash)
            if what == "mask":
                names = model.bundle.classes
                file.write_colormap(1, {i: (*colour(i), 255) for i in range(len(names))})
                file.update_tags(1, **{f"class_{i}": name for i, name in enumerate(names)})
        memory.seek(0)
        return bytes(memory.read())


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
