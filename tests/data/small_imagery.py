"""Small imagery for the data tests: every image different, textured, and made from its number."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(number: int, width: int = 48, height: int = 40) -> Any:
    random = np.random.default_rng(number)
    coarse = random.integers(0, 255, (6, 7, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = random.integers(-9, 10, (height, width, 3))
    return np.clip(np.asarray(smooth).astype(int) + grain, 1, 254).astype(np.uint8)


def write(path: Path, number: int, form: str = "JPEG", **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number, **size)).save(path, form)
    return path


def encoded(array: Any, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


def class_folders(folder: Path, classes: int = 3, each: int = 12, start: int = 0) -> Path:
    for c in range(classes):
        for i in range(each):
            name = f"{start + i:04d}.jpg"
            write(folder / f"class{c}" / name, 100_000 * c + start + i)
    return folder


def geotiff(
    path: Path,
    number: int,
    left: float,
    top: float,
    *,
    side: int = 48,
    width: int | None = None,
    crs: str = "EPSG:32631",
    gsd: float = 1.0,
    nodata: float | None = None,
    hole: int = 0,
) -> Path:
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(number, width=width or side, height=side)
    if hole:
        array[:, :hole] = 0
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width or side,
        height=side,
        count=3,
        dtype="uint8",
        crs=crs,
        transform=from_origin(left, top, gsd, gsd),
        nodata=nodata,
    ) as target:
        target.write(array.transpose(2, 0, 1))
    return path


# By sensor: bands, dtype of the file, and what turns `pixels` into values that it could have.
SENSORS: dict[str, tuple[int, str, float, float]] = {
    "rgb": (3, "uint8", 0, 1),
    "s2l2a": (12, "int16", 200, 20),
    "s2l1c": (13, "int16", 1200, 20),
    "s1": (2, "float64", -25, 0.1),
}


def sensed(sensor: str, number: int, width: int = 48, height: int = 48) -> Any:
    """Values of a sensor's bands, (H, W, C), in the dtype that its files have."""
    bands, dtype, base, scale = SENSORS[sensor]
    texture = pixels(number, width, height)[..., np.arange(bands) % 3].astype(float)
    # What a band sees differs from what the others see, if not by much.
    texture += np.random.default_rng(number).integers(-9, 10, texture.shape)
    return (base + scale * np.clip(texture, 1, 254)).astype(dtype)


def write_bands(
    path: Path, values: Any, left: float = 0, top: float = 5e6, *, gsd: float = 10.0, **profile: Any
) -> Path:
    """A GeoTIFF of values (H, W, C); more of its profile by name, as nodata and crs."""
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, bands = values.shape
    profile = {"crs": "EPSG:32631", "transform": from_origin(left, top, gsd, gsd), **profile}
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=bands,
        dtype=str(values.dtype), photometric="minisblack", **profile,
    ) as target:  # fmt: skip
        target.write(values.transpose(2, 0, 1))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
