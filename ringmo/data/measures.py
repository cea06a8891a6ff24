"""What is measured of every tile: quality, and a perceptual hash that finds a place again."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data.decode import Pixels

THUMBNAIL = 32  # pixels; what the perceptual hash and the second look at near-duplicates see


@dataclass(frozen=True)
class Measures:
    """Columns of the manifest; mean and std over the valid pixels of all bands.

    In 8-bit steps for every dtype, so that one threshold tells what is blank: pixels of more
    than 8 bits are scaled (`eight_bit`), and their std is the deviation within the bands, whose
    levels differ by nature.
    """

    nodata_share: float
    saturated_share: float
    mean: float
    std: float
    entropy: float
    sharpness: float
    phash: str


def measure(
    pixels: Pixels, valid: NDArray[np.bool_] | None = None, sensor: Sensor | None = None
) -> Measures:
    """Measures of one tile.

    Args:
        pixels: (H, W, C), as `decode` gives them.
        valid: (H, W), False where there is no data; None where every pixel counts.
        sensor: whose pixels they are; uint8 needs none.
    """
    plain = pixels
    if pixels.dtype != np.uint8:
        if sensor is None:
            raise ValueError(f"measures of {pixels.dtype} need the sensor")
        pixels = eight_bit(pixels, sensor)
    values = pixels if valid is None else pixels[valid]
    if values.size == 0:
        return Measures(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, f"{0:016x}")
    bands = pixels.shape[2]
    at_end = (values - np.uint8(1)) >= 254  # 0 wraps to 255: one comparison finds both ends
    saturated = np.logical_and.reduce([at_end[..., band] for band in range(bands)]).mean()
    counts = np.bincount(values.ravel(), minlength=256)
    levels = np.arange(256)
    mean = float(counts @ levels / values.size)
    if plain.dtype == np.uint8:
        variance = float(counts @ (levels - mean) ** 2 / values.size)
    else:
        flat = values.reshape(-1, bands)
        variance = float(np.mean([flat[:, band].var(dtype=np.float64) for band in range(bands)]))

    shade = grey(pixels)
    histogram = np.bincount((shade if valid is None else shade[valid]).ravel(), minlength=256)
    shares = histogram[histogram > 0] / histogram.sum()
    return Measures(
        nodata_share=0.0 if valid is None else round(1 - float(valid.mean()), 6),
        saturated_share=round(float(saturated), 6),
        mean=round(mean, 4),
        std=round(math.sqrt(variance), 4),
        entropy=round(float(abs(shares @ np.log2(shares))), 4),
        sharpness=round(_laplacian_variance(shade), 4),
        # Of the pixels as they are: a hash needs an order of values, no scale, and 8 bits of a
        # sensor's whole range leave few for one scene.
        phash=perceptual_hash(shade if plain.dtype == np.uint8 else grey(plain)),
    )


def eight_bit(pixels: Pixels, sensor: Sensor) -> NDArray[np.uint8]:
    """Each band scaled so that the sensor's mean ± 3 standard deviations are 0 to 255."""
    scale = 255 / (6 * np.array(sensor.std, np.float32))
    scaled = (pixels - np.array(sensor.mean, np.float32)) * scale + np.float32(127.5)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def grey(pixels: Pixels) -> Pixels:
    """The bands' mean (of three bands of uint8 ITU-R 601 luma), (H, W): uint8 of uint8, of
    others float32."""
    if pixels.dtype != np.uint8:
        return np.asarray(pixels.mean(axis=2, dtype=np.float32))
    if pixels.shape[2] == 3:
        from PIL import Image

        return np.asarray(Image.fromarray(pixels).convert("L"))
    mean: NDArray[np.uint8] = pixels.mean(axis=2).astype(np.uint8)
    return mean


def thumbnail(shade: Pixels) -> NDArray[np.float32]:
    """The whole tile as THUMBNAIL x THUMBNAIL grey values, each the mean of its area."""
    from PIL import Image

    size = (THUMBNAIL, THUMBNAIL)
    small = Image.fromarray(shade).resize(size, Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def perceptual_hash(shade: Pixels) -> str:
    """64 bits as 16 hex digits: signs of the 8x8 lowest frequencies about their median.

    Compression and rescaling flip a few bits, another scene about half of them.
    """
    cosines = _cosines()
    frequencies = cosines @ thumbnail(shade) @ cosines.T
    bits = (frequencies > np.median(frequencies)).ravel()
    return np.packbits(bits).tobytes().hex()


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float32]:
    """Rows 0 to 7 of the type-II discrete cosine transform."""
    k = np.arange(8)[:, None]
    n = np.arange(THUMBNAIL)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * THUMBNAIL)).astype(np.float32)


def _laplacian_variance(shade: NDArray[np.uint8]) -> float:
    if min(shade.shape) < 3:
        return 0.0
    s = shade.astype(np.int16)
    inner = s[:-2, 1:-1] + s[2:, 1:-1] + s[1:-1, :-2] + s[1:-1, 2:] - 4 * s[1:-1, 1:-1]
    return float(inner.astype(np.float32).var(dtype=np.float64))
