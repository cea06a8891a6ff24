"""What is measured of every tile: quality, and a perceptual hash that finds a place again."""

import math
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data.decode import Pixels
from ringmo.data.values import input_values

if TYPE_CHECKING:
    from PIL.Image import Image

CLOUD_BLOCK = 8  # pixels
CLOUD_8_BIT = 190  # of 255: brighter than fields and roads, in pictures as they are published
CLOUD_COLOUR = 0.2  # by which the visible bands of a white block differ at most, of the highest
THUMBNAIL = 32  # pixels; what the perceptual hash and the second look at near-duplicates see


@dataclass(frozen=True)
class Measures:
    """Columns of the manifest; mean and std over the valid pixels of all bands.

    `band_means` and `band_stds` are of what a model reads, before normalisation, over the valid
    pixels; the others are in 8-bit steps for every dtype, so that one threshold tells what is
    blank: pixels of more than 8 bits are scaled (`eight_bit`), and their std is the deviation
    within the bands, whose levels differ by nature.
    """

    nodata_share: float
    saturated_share: float
    mean: float
    std: float
    entropy: float
    sharpness: float
    phash: str
    cloud_share: float
    band_means: list[float]
    band_stds: list[float]


def measure(
    pixels: Pixels, valid: NDArray[np.bool_] | None = None, sensor: Sensor | None = None
) -> Measures:
    """Measures of one tile.

    Args:
        pixels: (H, W, C), as `decode` gives them.
        valid: (H, W), False where there is no data; None where every pixel counts.
        sensor: whose pixels they are; uint8 needs none.
    """
    from PIL import Image

    plain = sensor is None or sensor.plain
    small = pixels.dtype == np.uint8
    bands = pixels.shape[2]
    if valid is not None and not valid.any():
        nothing = [math.nan] * bands
        return Measures(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, f"{0:016x}", math.nan, nothing, nothing)
    values = pixels
    if not small or bands != 3:
        # Each band in one piece: some five times quicker where there are many.
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
    values = values if sensor is None else input_values(values, sensor)
    if not small:
        if sensor is None:
            raise ValueError(f"measures of {pixels.dtype} need the sensor")
        pixels = _eight_bit(values, sensor)
    elif bands != 3 and plain:
        pixels = values
    # Pillow's picture of it, made once: to make it costs as much as most of what it is asked.
    colour = Image.fromarray(pixels) if bands == 3 else None
    mask = None if valid is None else Image.fromarray(valid.astype(np.uint8) * 255)
    counts = _histograms(pixels, colour, mask)
    saturated = _saturated(pixels, valid, counts)
    levels = np.arange(256)
    size = counts.sum() / bands
    means = counts @ levels / size
    variances = counts @ levels**2 / size - means**2
    mean = float(means.mean())
    spread = (variances + means**2).mean() - mean**2 if small else variances.mean()
    if small and plain:
        band_means, band_stds = means, np.sqrt(variances.clip(0))
    else:
        band_means, band_stds = np.empty(bands), np.empty(bands)
        for band in range(bands):
            known = values[..., band] if valid is None else values[..., band][valid]
            known = known.astype(np.float64)
            band_means[band] = known.mean()
            known -= band_means[band]
            np.square(known, out=known)
            band_stds[band] = math.sqrt(known.mean())

    picture = Image.fromarray(grey(pixels)) if colour is None else colour.convert("L")
    shade, seen = np.asarray(picture), pixels if small else values
    histogram = np.array(picture.histogram(mask))
    shares = histogram[histogram > 0] / histogram.sum()
    return Measures(
        nodata_share=0.0 if valid is None else round(1 - float(valid.mean()), 6),
        saturated_share=round(float(saturated), 6),
        mean=round(mean, 4),
        std=round(math.sqrt(max(float(spread), 0)), 4),
        entropy=round(float(abs(shares @ np.log2(shares))), 4),
        sharpness=round(_laplacian_variance(shade), 4),
        # 8 bits of a sensor's whole range leave few for one scene.
        phash=perceptual_hash(picture if small else grey(values)),
        cloud_share=math.nan if sensor is None else cloud_share(seen, valid, sensor, colour),
        band_means=[_rounded(float(value), plain) for value in band_means],
        band_stds=[_rounded(float(value), plain) for value in band_stds],
    )


def _rounded(value: float, plain: bool) -> float:
    """Four decimals; of scaled values, which may be small, seven digits."""
    return round(value, 4) if plain else float(f"{value:.7g}")


def _block_means(pixels: Pixels | NDArray[np.bool_]) -> list[NDArray[np.float32]]:
    """Of each band, (H, W)."""
    height, width, bands = pixels.shape
    means = []
    for band in range(bands):
        # Rows first: whole rows are added at once.
        rows = pixels[..., band].reshape(height // CLOUD_BLOCK, CLOUD_BLOCK, width)
        sums = rows.sum(axis=1, dtype=np.float32)
        means.append(sums.reshape(len(sums), -1, CLOUD_BLOCK).mean(axis=2) / CLOUD_BLOCK)
    return means


def _histograms(
    pixels: NDArray[np.uint8], colour: "Image | None", mask: "Image | None"
) -> NDArray[np.int64]:
    """Counts of the 256 values in each band of (H, W, C), where the mask is not 0: (C, 256)."""
    from PIL import Image

    images = (
        [colour]
        if colour
        else map(Image.fromarray, np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    )
    return np.array([image.histogram(mask) for image in images]).reshape(-1, 256)


def _saturated(
    pixels: NDArray[np.uint8], valid: NDArray[np.bool_] | None, counts: NDArray[np.int64]
) -> float:
    """Share of the pixels that are 0 or 255 in every band, where valid."""
    ends = counts[:, 0] + counts[:, 255]
    fewest = int(ends.argmin())
    if not ends[fewest]:
        return 0.0

    def at_end(values: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return (values - np.uint8(1)) >= 254  # 0 wraps to 255: one comparison finds both

    found = at_end(np.ascontiguousarray(pixels[..., fewest]))
    if valid is not None:
        found &= valid
    # Few pixels are: only these are looked at in the other bands.
    few = np.flatnonzero(found)
    for band in range(len(counts)):
        few = few[at_end(pixels[..., band].reshape(-1)[few])]
    return float(len(few) / counts[0].sum())


def cloud_share(
    values: Pixels,
    valid: NDArray[np.bool_] | None,
    sensor: Sensor,
    colour: "Image | None" = None,
) -> float:
    """Share of a tile that is broad, bright and white as clouds are: an estimate, 0 to 1.

    Of blocks of CLOUD_BLOCK pixels, so that a bright roof is none; snow, salt and large roofs of
    concrete are. Bright and white are what Fmask's first tests ask for (Zhu & Woodcock 2012),
    with the sensor's own range in place of reflectances, which pictures of 8 bits do not have.
    NaN where the sensor has no red, green and blue.

    Args:
        values: (H, W, C): pixels of 8 bits as they are, of all others `input_values`.
    """
    if sensor.visible is None:
        return math.nan
    height, width = (side // CLOUD_BLOCK * CLOUD_BLOCK for side in values.shape[:2])
    if not height or not width:
        return math.nan
    three = sensor.visible == [0, 1, 2] and values.shape[2] == 3
    if three and values.dtype == np.uint8:
        picture = colour or _picture(values)
        reduced = picture.reduce(CLOUD_BLOCK, (0, 0, width, height))
        blocks = list(np.asarray(reduced, np.float32).transpose(2, 0, 1))
    else:
        blocks = _block_means(values[:height, :width, sensor.visible])
    floor: NDArray[Any]
    if values.dtype == np.uint8:
        floor = np.full(3, CLOUD_8_BIT)
    elif sensor.mean is not None and sensor.std is not None:
        mean, std = np.array(sensor.mean, np.float32), np.array(sensor.std, np.float32)
        floor = (mean + std / 2)[sensor.visible]
    else:  # as far up the range as half a deviation above the mean
        low, high = _clip(sensor)
        floor = np.full(3, low + (high - low) * 3.5 / 6)
    # Band by band: along an axis of three numpy takes ten times as long.
    darkest, brightest = reduce(np.minimum, blocks), reduce(np.maximum, blocks)
    cloud = brightest - darkest < CLOUD_COLOUR * brightest
    for band, least in zip(blocks, floor, strict=True):
        cloud &= band > least
    if valid is None:
        return round(float(cloud.mean()), 6)
    whole = _block_means(valid[:height, :width, None])[0] == 1
    return round(float(cloud[whole].mean()), 6) if whole.any() else math.nan


def eight_bit(pixels: Pixels, sensor: Sensor) -> NDArray[np.uint8]:
    """Decoded pixels of more than 8 bits in 0 to 255, each band for itself.

    0 to 255 are the sensor's mean ± 3 standard deviations, and where these are null its clip.
    """
    return _eight_bit(input_values(pixels, sensor), sensor)


def _eight_bit(values: Pixels, sensor: Sensor) -> NDArray[np.uint8]:
    height, width, bands = values.shape
    eight = np.empty((bands, height, width), np.uint8)
    for band in range(bands):
        if sensor.mean is not None and sensor.std is not None:
            scale = np.float32(255) / (6 * np.float32(sensor.std[band]))
            scaled: Pixels = (values[..., band] - np.float32(sensor.mean[band])) * scale
            scaled += np.float32(127.5)
        else:
            low, high = _clip(sensor)
            scaled = (values[..., band] - np.float32(low)) * np.float32(255 / (high - low))
        np.rint(scaled, out=scaled)
        eight[band] = np.clip(scaled, 0, 255, out=scaled)
    return eight.transpose(1, 2, 0)


def _clip(sensor: Sensor) -> tuple[float, float]:
    assert sensor.clip is not None  # else its mean and std are given
    return sensor.clip


def grey(pixels: Pixels) -> Pixels:
    """The bands' mean (of three bands of uint8 ITU-R 601 luma), (H, W): uint8 of uint8, of
    others float32."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        from PIL import Image

        return np.asarray(Image.fromarray(pixels).convert("L"))
    small = pixels.dtype == np.uint8
    total: NDArray[Any] = pixels[..., 0].astype(np.uint32 if small else np.float32)
    for band in range(1, pixels.shape[2]):
        total += pixels[..., band]
    if small:
        return np.asarray((total // pixels.shape[2]).astype(np.uint8))
    total /= pixels.shape[2]
    return np.asarray(total)


def thumbnail(shade: "Pixels | Image") -> NDArray[np.float32]:
    """The whole tile as THUMBNAIL x THUMBNAIL grey values, each the mean of its area."""
    from PIL import Image

    size = (THUMBNAIL, THUMBNAIL)
    picture = _picture(shade) if isinstance(shade, np.ndarray) else shade
    return np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=np.float32)


def _picture(pixels: Pixels) -> "Image":
    from PIL import Image

    return Image.fromarray(pixels)


def perceptual_hash(shade: "Pixels | Image") -> str:
    """64 bits as 16 hex digits: signs of the 8x8 lowest frequencies about their median.

    Compression and rescaling flip a few bits, another scene about half of them.
    """
    cosines = _cosines()
    frequencies = cosines @ thumbnail(shade) @ cosines.T
    ranked = np.sort(frequencies, axis=None)  # for the median: np.median is slow
    bits = (frequencies > (ranked[31] + ranked[32]) / 2).ravel()
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
    inner = s[:-2, 1:-1] + s[2:, 1:-1]
    inner += s[1:-1, :-2]
    inner += s[1:-1, 2:]
    inner -= 4 * s[1:-1, 1:-1]
    values = inner.astype(np.float64).ravel()
    # Sums of squares of whole numbers are exact here.
    return float(values @ values / values.size - values.mean() ** 2)
