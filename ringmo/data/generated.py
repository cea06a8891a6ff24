"""The generated sample world: made-up overhead imagery in eight classes, to try everything with.

It is for seeing the whole chain work where there is no imagery yet; figures from it say nothing
of real imagery, and whatever was trained on it says so. Every class comes in many colours, so
that a histogram alone does not tell them apart. GeoTIFFs in UTM, one place each, in class
folders; two large scenes without labels lie in the folder `unlabelled`.
"""

import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console

SEED = 7
PER_CLASS = 64
LARGE = ((1500, 1200), (1100, 900))  # width, height of the scenes without labels
GSD_M = 0.6
CRS = "EPSG:32631"
ORIGIN = (300_000.0, 5_600_000.0)  # easting and northing of the first place, metres
APART_M = 2_000.0
COMPLETE = "complete"

Image = NDArray[np.float32]
Random = np.random.Generator
# Colours of ground, red, green, blue; a scene mixes two or three of a list.
GREENS = [(58, 78, 44), (84, 104, 58), (104, 118, 74), (70, 84, 60), (116, 124, 88)]
EARTHS = [(142, 120, 92), (166, 144, 110), (120, 98, 76), (184, 166, 132), (150, 130, 112)]
GREYS = [(112, 112, 112), (136, 134, 130), (92, 94, 98), (158, 156, 150), (124, 120, 114)]
WATERS = [(32, 58, 78), (44, 76, 82), (60, 88, 84), (26, 44, 62), (78, 96, 82)]
ROOFS = [(168, 92, 70), (126, 120, 116), (180, 172, 160), (96, 92, 98), (150, 116, 84)]
BRIGHT = [(226, 226, 222), (206, 210, 214), (236, 232, 220), (190, 196, 202)]
ANY = GREENS + EARTHS + GREYS


def make(folder: Path) -> Path:
    """The sample world in `folder`, made once; it is complete or made again."""
    if (folder / COMPLETE).exists():
        return folder
    console.note("generated: making the sample world")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    jobs = [(name, i) for name in CLASSES for i in range(PER_CLASS)]
    jobs += [("unlabelled", i) for i in range(len(LARGE))]

    def one(number: int) -> None:
        name, i = jobs[number]
        random = np.random.default_rng([SEED, number])
        path = temporary / name / f"{name}_{i:03d}.tif"
        if name == "unlabelled":
            image = _countryside(random, *LARGE[i])
        else:
            side = int(random.choice([96, 128, 160, 192, 256], p=[0.25, 0.3, 0.25, 0.15, 0.05]))
            image = _finish(CLASSES[name](random, side), random)
        easting = ORIGIN[0] + APART_M * (number % 40)
        northing = ORIGIN[1] + APART_M * (number // 40)
        _write(path, image, easting, northing)

    for name in (*CLASSES, "unlabelled"):
        (temporary / name).mkdir(parents=True)
    with (
        console.progress("generated", len(jobs)) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for _ in pool.map(one, range(len(jobs))):
            bar.advance()
    (temporary / COMPLETE).touch()
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return folder


def _write(path: Path, image: NDArray[np.uint8], easting: float, northing: float) -> None:
    import rasterio
    from rasterio.transform import from_origin

    height, width = image.shape[:2]
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=3,
        dtype="uint8",
        crs=CRS,
        transform=from_origin(easting, northing, GSD_M, GSD_M),
        photometric="rgb",
        interleave="pixel",
        compress="deflate",
        predictor=2,
    ) as target:
        target.write(image.transpose(2, 0, 1))


# Texture and drawing -------------------------------------------------------------------------


def _noise(random: Random, height: int, width: int, roughest: float, power: float = 1.0) -> Image:
    """Fractal noise in 0..1: octaves from `roughest` (share of the longer side) to two pixels."""
    from PIL import Image as Pillow

    total = np.zeros((height, width), np.float32)
    cell, weight = max(height, width) * roughest, 1.0
    while cell >= 2:
        shape = (max(2, round(height / cell) + 2), max(2, round(width / cell) + 2))
        coarse = random.random(shape, dtype=np.float32)
        smooth = Pillow.fromarray(coarse).resize((width, height), Pillow.Resampling.BICUBIC)
        total += weight * np.asarray(smooth)
        cell, weight = cell / 2, weight * 0.5**power
    low, high = float(total.min()), float(total.max())
    scaled: Image = (total - low) / max(high - low, 1e-6)
    return scaled


def _pick(random: Random, colours: list[tuple[int, int, int]]) -> Image:
    base = np.array(colours[random.integers(len(colours))], np.float32)
    return base + random.normal(0, 9, 3).astype(np.float32)


def _ground(
    random: Random, height: int, width: int, colours: list[tuple[int, int, int]], rough: float = 0.5
) -> Image:
    """Two colours mixed by fractal noise, with grain."""
    mix = _noise(random, height, width, rough)[..., None]
    grain = random.normal(0, random.uniform(2, 6), (height, width, 1)).astype(np.float32)
    image: Image = _pick(random, colours) * mix + _pick(random, colours) * (1 - mix) + grain
    return image


def _turned(height: int, width: int, angle: float, x: float, y: float) -> tuple[Image, Image]:
    """Coordinates along and across a direction, from the point (x, y), in pixels."""
    down, right = np.mgrid[0:height, 0:width].astype(np.float32)
    right, down = right - x, down - y
    cos, sin = math.cos(angle), math.sin(angle)
    return right * cos + down * sin, down * cos - right * sin


def _box(
    image: Image,
    x: float,
    y: float,
    length: float,
    breadth: float,
    angle: float,
    colour: Image,
    shadow: float = 0.0,
) -> None:
    """A rectangle about (x, y), with a shadow to its lower right."""
    reach = int(math.hypot(length, breadth) / 2 + shadow + 2)
    top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
    part = image[top : int(y) + reach + 1, left : int(x) + reach + 1]
    if not part.size:
        return
    for offset in (shadow, 0.0) if shadow else (0.0,):
        along, across = _turned(
            part.shape[0], part.shape[1], angle, x - left + offset, y - top + offset
        )
        inside = (np.abs(along) <= length / 2) & (np.abs(across) <= breadth / 2)
        if offset:
            part[inside] *= 0.45
        else:
            # A ridge: the sun lights one side of a roof more.
            part[inside] = colour * np.where(across[inside] > 0, 0.88, 1.05)[:, None]


def _disc(image: Image, x: float, y: float, radius: float, colour: Image, shadow: float) -> None:
    height, width = image.shape[:2]
    for offset in (shadow, 0.0):
        down, right = np.ogrid[0:height, 0:width]
        inside = (right - x - offset) ** 2 + (down - y - offset) ** 2 <= radius**2
        if offset:
            image[inside] *= 0.5
        else:
            image[inside] = colour


def _road(
    image: Image, random: Random, angle: float, x: float, y: float, breadth: float, cars: int = 0
) -> None:
    """A straight road through (x, y), vehicles on it."""
    height, width = image.shape[:2]
    along, across = _turned(height, width, angle, x, y)
    on = np.abs(across) <= breadth / 2
    grain = random.normal(0, 3, (int(on.sum()), 1)).astype(np.float32)
    image[on] = _pick(random, GREYS) + grain
    if breadth > 7:
        image[(np.abs(across) < 0.6) & (np.abs(along) % 12 < 6)] = 205
    for _ in range(cars):
        step = random.uniform(-0.7, 0.7) * max(height, width)
        side = random.choice([-1, 1]) * breadth / 4
        cx = x + step * math.cos(angle) - side * math.sin(angle)
        cy = y + step * math.sin(angle) + side * math.cos(angle)
        _box(image, cx, cy, 6, 3, angle, _pick(random, BRIGHT + ROOFS + WATERS), 1)


def _trees(image: Image, random: Random, count: int, low: float = 2, high: float = 5) -> None:
    height, width = image.shape[:2]
    green = _pick(random, GREENS) * 0.8
    for _ in range(count):
        radius = random.uniform(low, high)
        x, y = random.uniform(0, width), random.uniform(0, height)
        reach = int(radius) + 4
        top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
        part = image[top : int(y) + reach, left : int(x) + reach]
        if part.size:
            _disc(part, x - left, y - top, radius, green * random.uniform(0.75, 1.2), 1.5)


# Scene classes -------------------------------------------------------------------------------


def _farmland(random: Random, side: int) -> Image:
    """Fields with furrows, divided by lanes."""
    image = _ground(random, side, side, GREENS + EARTHS)
    angle = random.uniform(0, math.pi)
    along, across = _turned(side, side, angle, side / 2, side / 2)
    wide, long = random.uniform(22, 55), random.uniform(40, 110)
    shift = random.uniform(0, 50)
    field = np.floor((across + shift) / wide) * 57 + np.floor((along + shift) / long) * 131
    for number in np.unique(field):
        inside = field == number
        furrows = np.sin((along if number % 2 else across)[inside] * random.uniform(0.7, 1.6))
        colour = _pick(random, GREENS + EARTHS)
        grain = random.normal(0, 4, int(inside.sum()))
        image[inside] = colour + (furrows * random.uniform(2, 9) + grain)[:, None]
    lane = ((across + shift) % wide < 2) | ((along + shift) % long < 2)
    image[lane] = _pick(random, EARTHS + GREENS) * random.uniform(0.7, 1.1)
    if random.random() < 0.4:
        _trees(image, random, int(random.integers(3, 15)))
    return image


def _forest(random: Random, side: int) -> Image:
    """Crowns of trees, sometimes a clearing or a track."""
    image = _ground(random, side, side, GREENS + EARTHS) * 0.7
    _trees(image, random, int(side * side / random.uniform(18, 45)), 2, random.uniform(4, 7))
    if random.random() < 0.4:
        clearing = _noise(random, side, side, 0.7) > random.uniform(0.75, 0.9)
        image[clearing] = _ground(random, side, side, GREENS + EARTHS)[clearing]
    if random.random() < 0.3:
        where = random.uniform(0.2, 0.8, 2) * side
        _road(image, random, random.uniform(0, math.pi), where[0], where[1], 4)
    return image


def _residential(random: Random, side: int) -> Image:
    """Houses in rows along streets, gardens, trees, cars."""
    image = _ground(random, side, side, GREENS + EARTHS + GREYS)
    angle = random.uniform(0, math.pi)
    plot, block = random.uniform(15, 22), random.uniform(38, 52)
    cos, sin = math.cos(angle), math.sin(angle)
    roofs = [_pick(random, ROOFS) for _ in range(3)]
    _trees(image, random, int(side * side / 400))
    reach = int(side / min(plot, block)) + 2
    for i in range(-reach, reach + 1):
        lane = i * block
        x, y = side / 2 - lane * sin, side / 2 + lane * cos
        _road(image, random, angle, x, y, 6, 3)
        for j in range(-reach, reach + 1):
            for off in (-block / 3.6, block / 3.6):
                if random.random() < 0.12:
                    continue
                step = j * plot + random.normal(0, 1)
                hx, hy = x + step * cos - off * sin, y + step * sin + off * cos
                size = random.uniform(8, 12), random.uniform(7, 10)
                roof = roofs[random.integers(3)] * random.uniform(0.85, 1.1)
                _box(image, hx, hy, *size, angle, roof, 2)
    return image


def _industrial(random: Random, side: int) -> Image:
    """Large halls and round storage tanks on paved ground."""
    image = _ground(random, side, side, GREYS + EARTHS)
    angle = random.uniform(0, math.pi)
    _road(image, random, angle, side / 2, random.uniform(0.1, 0.9) * side, 9, 4)
    for _ in range(int(random.integers(2, 5))):
        size = random.uniform(0.25, 0.5) * side, random.uniform(0.12, 0.25) * side
        x, y = random.uniform(0.1, 0.9, 2) * side
        roof = _pick(random, BRIGHT + ROOFS + GREYS)
        turn = angle + random.choice([0, math.pi / 2])
        _box(image, x, y, *size, turn, roof, 4)
    radius, x, y = random.uniform(5, 10), *(random.uniform(0.1, 0.6, 2) * side)
    for i in range(int(random.integers(2, 5))):
        for j in range(int(random.integers(2, 4))):
            at = x + i * radius * 2.7, y + j * radius * 2.7
            _disc(image, *at, radius, _pick(random, BRIGHT + ROOFS), 3)
            _disc(image, *at, radius * 0.6, _pick(random, BRIGHT), 0)
    return image


def _harbour(random: Random, side: int) -> Image:
    """A quay with piers, ships beside them."""
    image = _ground(random, side, side, WATERS, 0.3)
    angle = random.choice([0, math.pi / 2, math.pi, -math.pi / 2]) + random.uniform(-0.4, 0.4)
    along, across = _turned(side, side, angle, side / 2, side / 2)
    shore = random.uniform(0.05, 0.25) * side
    land = across > shore
    image[land] = _ground(random, side, side, ANY)[land]
    concrete = _pick(random, GREYS + EARTHS)
    image[np.abs(across - shore) < 4] = concrete
    cos, sin = math.cos(angle), math.sin(angle)
    gap, length = random.uniform(24, 38), random.uniform(0.3, 0.5) * side
    for i in range(-4, 5):
        step = i * gap + random.uniform(-2, 2)
        image[(np.abs(along - step) < 2) & (across < shore) & (across > shore - length)] = concrete
        for k in range(int(length / 9)):
            for edge in (-7, 7):
                if random.random() < 0.35:
                    continue
                a, c = step + edge, shore - 8 - k * 9
                x, y = side / 2 + a * cos - c * sin, side / 2 + a * sin + c * cos
                _box(image, x, y, random.uniform(7, 10), 4, angle, _pick(random, BRIGHT + ROOFS))
    return image


def _airport(random: Random, side: int) -> Image:
    """A marked runway or apron, with aircraft."""
    image = _ground(random, side, side, ANY)
    angle = random.uniform(0, math.pi)
    x, y = random.uniform(0.3, 0.7, 2) * side
    breadth = random.uniform(0.22, 0.4) * side
    along, across = _turned(side, side, angle, x, y)
    runway = np.abs(across) < breadth / 2
    image[runway] = _ground(random, side, side, GREYS, 0.2)[runway]
    image[(np.abs(across) < 1.2) & (np.abs(along) % 18 < 10)] = 222
    image[np.abs(np.abs(across) - breadth * 0.45) < 0.8] = 210
    for _ in range(int(random.integers(2, 6))):
        a, c = random.uniform(-0.6, 0.6) * side, random.uniform(-0.42, 0.42) * breadth * 1.6
        cx = x + a * math.cos(angle) - c * math.sin(angle)
        cy = y + a * math.sin(angle) + c * math.cos(angle)
        size, heading = random.uniform(16, 26), random.uniform(0, 2 * math.pi)
        white = _pick(random, BRIGHT)
        cos, sin = math.cos(heading), math.sin(heading)
        _box(image, cx, cy, size, size * 0.13, heading, white, 2)
        _box(image, cx, cy, size * 0.16, size * 0.95, heading, white, 2)
        _box(
            image,
            cx - cos * size * 0.42,
            cy - sin * size * 0.42,
            size * 0.1,
            size * 0.36,
            heading,
            white,
        )
    return image


def _desert(random: Random, side: int) -> Image:
    """Dunes and bare ground: ripples bent by the wind, few stones."""
    image = _ground(random, side, side, EARTHS + GREYS + GREENS[2:], 0.9)
    angle = random.uniform(0, math.pi)
    along, _ = _turned(side, side, angle, 0, 0)
    bend = _noise(random, side, side, 0.6, 1.5) * random.uniform(20, 60)
    ripple = np.sin((along + bend) * 2 * math.pi / random.uniform(9, 28))
    relief = _noise(random, side, side, 0.5) - 0.5
    image += (ripple * random.uniform(4, 14) + relief * random.uniform(10, 45))[..., None]
    return image


def _river(random: Random, side: int) -> Image:
    """Water winding through land, banks of sand or trees."""
    image = _ground(random, side, side, ANY)
    if random.random() < 0.6:
        _trees(image, random, int(side * side / random.uniform(60, 400)))
    angle = random.uniform(0, math.pi)
    along, across = _turned(side, side, angle, side / 2, side / 2)
    wave = np.sin(along * 2 * math.pi / (random.uniform(0.7, 1.6) * side) + random.uniform(0, 6))
    middle = wave * random.uniform(0.05, 0.22) * side + random.uniform(-0.12, 0.12) * side
    rough = (_noise(random, side, side, 0.2) - 0.5) * 10
    distance = np.abs(across - middle) + rough
    half = random.uniform(0.06, 0.16) * side
    image[distance < half + random.uniform(1, 6)] = _pick(random, EARTHS + GREENS)
    water = distance < half
    image[water] = _ground(random, side, side, WATERS + EARTHS[2:3], 0.3)[water]
    if random.random() < 0.3:
        _road(image, random, angle + math.pi / 2, side / 2, side / 2, 8, 3)
    return image


CLASSES: dict[str, Callable[[Random, int], Image]] = {
    "airport": _airport,
    "desert": _desert,
    "farmland": _farmland,
    "forest": _forest,
    "harbour": _harbour,
    "industrial": _industrial,
    "residential": _residential,
    "river": _river,
}


def _countryside(random: Random, width: int, height: int) -> NDArray[np.uint8]:
    """A large scene: patches of the classes on fractal ground, roads across all of it."""
    image = _ground(random, height, width, GREENS + EARTHS, 0.4)
    names: list[Any] = list(CLASSES.values())
    patch = 300
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            scene = names[random.integers(len(names))](random, patch)
            part = image[top : top + patch, left : left + patch]
            high, wide = part.shape[:2]
            edge = _noise(random, patch, patch, 0.5)[:high, :wide] > 0.3
            part[edge] = scene[:high, :wide][edge]
    for _ in range(3):
        x, y = random.uniform(0, width), random.uniform(0, height)
        _road(image, random, random.uniform(0, math.pi), x, y, 12, 25)
    return _finish(image, random)


def _finish(image: Image, random: Random) -> NDArray[np.uint8]:
    """Light, haze and the sensor's blur, as no two acquisitions share them."""
    from PIL import Image as Pillow
    from PIL import ImageFilter

    image = image * random.uniform(0.75, 1.2) * random.normal(1, 0.05, 3).astype(np.float32)
    haze = random.uniform(0, 0.25)
    image = image * (1 - haze) + haze * np.array([170, 178, 190], np.float32)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    blurred = Pillow.fromarray(pixels).filter(ImageFilter.GaussianBlur(random.uniform(0.4, 0.9)))
    return np.asarray(blurred)
