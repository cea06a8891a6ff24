"""Generated car parks from above with DOTA labels: vehicles at every angle.

    python docs/fields/generated_vehicles.py FOLDER [COUNT]

writes FOLDER/images/*.png, 128x128 at about 0.27 m a pixel, and FOLDER/labelTxt/*.txt with the
classes `small-vehicle` and `large-vehicle`. The same COUNT gives the same scenes. They are no
imagery: say so of whatever was trained on them.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128  # pixels
FINE = 4  # drawn at so many times the size, then shrunk, so that edges are soft
SEED = 11
# Pixels: lengths and widths, from and to.
SIZES = {"small-vehicle": ((17, 23), (8, 11)), "large-vehicle": ((40, 56), (10, 13))}
PAINT = {
    "small-vehicle": [(225, 225, 222), (40, 42, 46), (120, 124, 128), (150, 40, 36), (50, 70, 120)],
    "large-vehicle": [(238, 238, 238), (238, 238, 238), (226, 176, 84), (120, 150, 180)],
}
GROUND = [(112, 112, 112), (136, 134, 130), (96, 98, 98), (124, 118, 108)]
GREEN = [(58, 78, 44), (84, 104, 58), (104, 98, 74), (46, 60, 40)]

Point = tuple[float, float]


def scene(random: np.random.Generator) -> tuple[Image.Image, list[tuple[str, list[Point]]]]:
    """An image, and of each vehicle the class and four corners, clockwise."""
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), _one(random, GROUND))
    pen = ImageDraw.Draw(image)
    for _ in range(random.integers(0, 3)):
        middle, size = random.uniform(0, SIDE, 2), random.uniform(20, 70, 2)
        pen.polygon(_fine(_corners(*middle, *size, random.uniform(0, 3))), fill=_one(random, GREEN))
    vehicles: list[tuple[str, list[Point]]] = []
    light = random.uniform(-3, 3, 2)
    for _ in range(random.integers(1, 4)):
        for name, (x, y, length, width, angle) in _row(random):
            points = _corners(x, y, length, width, angle)
            around = _corners(x, y, length + 2, width + 2, angle)
            inside = all(1 <= value <= SIDE - 1 for point in points for value in point)
            if not inside or any(_touch(around, other) for _, other in vehicles):
                continue
            vehicles.append((name, points))
            pen.polygon(_fine([(a + light[0], b + light[1]) for a, b in points]), fill=(46, 46, 50))
            paint = _one(random, PAINT[name])
            pen.polygon(_fine(points), fill=paint)
            # A windscreen, which says where the front is.
            ahead = length * (0.2 if name == "small-vehicle" else 0.42)
            at = x + ahead * math.cos(angle), y + ahead * math.sin(angle)
            glass = _corners(*at, length * 0.1, width * 0.8, angle)
            pen.polygon(_fine(glass), fill=(52, 56, 62) if sum(paint) > 240 else (110, 116, 122))
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.8)))
    uneven = Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).resize((SIDE, SIDE))
    values = np.asarray(image, np.float32) + (np.asarray(uneven, np.float32)[..., None] - 128) * 0.1
    values = values * random.uniform(0.8, 1.15) + random.normal(0, 5, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)), vehicles


def _row(random: np.random.Generator) -> list[tuple[str, tuple[float, ...]]]:
    """Vehicles of a class side by side, as they park: of each the box."""
    name = str(random.choice(list(SIZES)))
    lengths, widths = SIZES[name]
    length, angle = random.uniform(*lengths), random.uniform(-math.pi, math.pi)
    x, y = random.uniform(10, SIDE - 10, 2)
    boxes = []
    for _ in range(random.integers(1, 9)):
        width = random.uniform(*widths)
        box = (x, y, length * random.uniform(0.93, 1.07), width, angle + random.normal(0, 0.03))
        boxes.append((name, box))
        step = width + random.uniform(2.5, 7)
        x, y = x - step * math.sin(angle), y + step * math.cos(angle)
    return boxes


def _corners(x: float, y: float, length: float, width: float, angle: float) -> list[Point]:
    cos, sin = math.cos(angle), math.sin(angle)
    halves = [(length / 2 * a, width / 2 * b) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in halves]


def _touch(first: list[Point], second: list[Point]) -> bool:
    """Whether two rectangles overlap: no side of either has them on its two sides."""
    for shape in (first, second):
        for (ax, ay), (bx, by) in pairwise(shape[:3]):
            along = [[(bx - ax) * x + (by - ay) * y for x, y in one] for one in (first, second)]
            if max(along[0]) < min(along[1]) or max(along[1]) < min(along[0]):
                return False
    return True


def _one(random: np.random.Generator, colours: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    red, green, blue = np.clip(
        colours[random.integers(len(colours))] + random.normal(0, 8, 3), 0, 255
    )
    return int(red), int(green), int(blue)


def _fine(points: list[Point]) -> list[Point]:
    return [(x * FINE, y * FINE) for x, y in points]


def write(folder: Path, count: int) -> None:
    for part in ("images", "labelTxt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, vehicles = scene(np.random.default_rng([SEED, number]))
        image.save(folder / "images" / f"park_{number:04d}.png")
        lines = [
            f"{' '.join(f'{value:.1f}' for point in points for value in point)} {name} 0\n"
            for name, points in vehicles
        ]
        (folder / "labelTxt" / f"park_{number:04d}.txt").write_text("".join(lines))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 120)
