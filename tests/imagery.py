"""Small made-up images for tests: each class a texture of its own, each image different."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("fields", "harbour", "town", "woods")


def texture(kind: int, seed: int, size: int = 64) -> np.ndarray:
    """An RGB image, uint8 (size, size, 3), of one of four textures."""
    rng = np.random.default_rng((kind, seed))
    y, x = np.mgrid[0:size, 0:size] / size
    turn, phase = rng.uniform(0, np.pi), rng.uniform(0, 6)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn)
    pattern = {
        0: np.sin(2 * np.pi * 3 * along + phase),
        1: np.sign(np.sin(2 * np.pi * 6 * along + phase)),
        2: np.sign(np.sin(2 * np.pi * 5 * along) * np.sin(2 * np.pi * 5 * across + phase)),
        3: rng.standard_normal((size, size)),
    }[kind]
    colour = rng.uniform(70, 180, 3)
    image = colour + 45 * pattern[..., None] * rng.uniform(0.6, 1, 3)
    image += rng.normal(0, 6, (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def write_class_folders(root: Path, each: int = 24, seed: int = 0) -> Path:
    """`each` JPEGs a class under root/CLASS/; returns root."""
    for kind, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            picture = Image.fromarray(texture(kind, seed * 10_000 + i))
            picture.save(folder / f"{name}_{seed}_{i:03d}.jpg", quality=92)
    return root
