import math

import numpy as np
import torch

from ringmo.models.lbp import local_binary_pattern


def plain(band: np.ndarray) -> np.ndarray:
    """Uniform rotation-invariant patterns, pixel by pixel, as Ojala et al. write them."""
    height, width = band.shape

    def value(y: int, x: int) -> float:
        return float(band[min(max(y, 0), height - 1), min(max(x, 0), width - 1)])

    out = np.zeros(band.shape)
    for y in range(height):
        for x in range(width):
            bits = []
            for p in range(8):
                dy = round(-2 * math.sin(2 * math.pi * p / 8), 9)
                dx = round(2 * math.cos(2 * math.pi * p / 8), 9)
                top, left = math.floor(y + dy), math.floor(x + dx)
                fy, fx = y + dy - top, x + dx - left
                corners = [
                    (1 - fy) * (1 - fx) * value(top, left),
                    (1 - fy) * fx * value(top, left + 1),
                    fy * (1 - fx) * value(top + 1, left),
                    fy * fx * value(top + 1, left + 1),
                ]
                bits.append(sum(corners) - band[y, x] >= -1e-9)
            changes = sum(bits[p] != bits[p - 1] for p in range(8))
            out[y, x] = sum(bits) if changes <= 2 else 9
    return out


def test_patterns_are_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    noisy = random.integers(0, 256, (13, 17))
    smooth = np.add.outer(np.arange(13) ** 2, 3 * np.arange(17))
    flat = np.full((13, 17), 7)
    flat[5:, 9:] = 40
    bands = np.stack([noisy, smooth, flat])
    got = local_binary_pattern(torch.from_numpy(np.stack([bands, bands[::-1].copy()])))
    wanted = np.stack([plain(band) for band in bands])
    assert got.dtype == torch.float32
    assert np.array_equal(got[0].numpy(), wanted)
    assert np.array_equal(got[1].numpy(), wanted[::-1])
    assert set(np.unique(wanted)) == set(range(10))


def test_scale_and_offset_of_a_band_change_nothing() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16)).float()
    before = local_binary_pattern(images)
    mean, std = torch.tensor([120.0, 90.0, 40.0]), torch.tensor([58.0, 50.0, 61.0])
    normal = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert (
        local_binary_pattern(normal) != before
    ).float().mean() < 0.005  # ties that rounding parts
    assert (local_binary_pattern(torch.full((1, 1, 8, 8), 0.3)) == 8).all()
