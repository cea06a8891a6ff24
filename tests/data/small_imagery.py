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


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
