"""Small made-up ground for tests: dark fields and bright buildings, with masks and with heights."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48


def ground(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image, uint8 (48, 48, 3), and where buildings stand, bool (48, 48)."""
    rng = np.random.default_rng(seed)
    built = np.kron(rng.random((3, 3)) < 0.4, np.ones((16, 16))).astype(bool)
    colour = np.where(built[..., None], (200, 190, 180), (60, 90, 50))
    image = colour + rng.normal(0, 12, (SIDE, SIDE, 3)) + rng.normal(0, 10, 3)
    return np.clip(image, 0, 255).astype(np.uint8), built


def write_masks(root: Path, count: int) -> Path:
    """Images and masks of buildings, as pairs of PNGs; returns root."""
    for number in range(count):
        image, built = ground(number)
        for folder, pixels in (("images", image), ("masks", np.uint8(255) * built)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")
    return root


def write_heights(root: Path, count: int) -> Path:
    """Images and their heights, 2 m and 10 m, as GeoTIFFs 1 m a pixel; returns root."""
    import rasterio

    for number in range(count):
        image, built = ground(number)
        heights = np.where(built, 10, 2).astype(np.float32)[..., None]
        for folder, pixels in (("images", image), ("dsm", heights)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                root / folder / f"{number:03d}.tif",
                "w",
                driver="GTiff",
                width=SIDE,
                height=SIDE,
                count=pixels.shape[2],
                dtype=pixels.dtype,
                crs="EPSG:32633",
                transform=rasterio.transform.from_origin(500_000 + 2000 * number, 5e6, 1, 1),
                # A band that follows three of uint8 is no alpha band, and none is a palette.
                photometric="RGB" if pixels.shape[2] == 3 else "MINISBLACK",
            ) as file:
                file.write(pixels.transpose(2, 0, 1))
    return root
