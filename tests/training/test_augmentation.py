import numpy as np
import pytest
import torch

from ringmo.training.augmentation import crops, cut


def test_whole_crops_are_the_eight_turns_of_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringmo.training.augmentation.ASPECT", (1.0, 1.0))
    tile = torch.arange(3 * 16 * 16).view(1, 3, 16, 16) % 251
    turns = [torch.rot90(tile, k, (2, 3)) for k in range(4)]
    eight = {t.contiguous().numpy().tobytes() for t in turns + [t.flip(3) for t in turns]}
    tiles = tile.byte().expand(200, -1, -1, -1)
    out = cut(tiles, crops(200, (1.0, 1.0), np.random.default_rng(0)), 16).round().long()
    assert {image[None].numpy().tobytes() for image in out} == eight


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_crops_stay_inside_and_keep_brightness(dtype: torch.dtype) -> None:
    flat = torch.full((32, 3, 24, 24), 77, dtype=dtype)
    out = cut(flat, crops(32, (0.2, 1.0), np.random.default_rng(0)), 16)
    assert out.shape == (32, 3, 16, 16)
    assert torch.allclose(out, torch.full_like(out, 77), atol=1e-3)


def test_same_random_same_crops() -> None:
    first, again, other = (crops(8, (0.4, 1.0), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
