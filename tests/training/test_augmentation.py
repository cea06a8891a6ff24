import numpy as np
import pytest
import torch

from ringmo.training.augmentation import crops, cut, erased, holes, mixed


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


def test_mixup_and_cutmix_mix_neighbours_and_their_answers() -> None:
    images = torch.arange(6).float().view(6, 1, 1, 1).expand(6, 2, 20, 20)
    answers = torch.eye(6)
    boxes = blends = 0
    for seed in range(20):
        out, shares = mixed(images, answers, 0.8, 1.0, np.random.default_rng(seed))
        assert torch.allclose(shares.sum(1), torch.ones(6))
        # What an image shows is what its answer says.
        seen = out.mean((1, 2, 3))
        assert torch.allclose(seen, (shares * torch.arange(6)).sum(1), atol=1e-4)
        values = len(out[0, 0].unique())
        boxes += values == 2
        blends += values == 1 and bool(seen[0] > 0)
    assert boxes >= 5 and blends >= 5
    odd, shares = mixed(images[:5], answers[:5], 0.8, 0.0, np.random.default_rng(0))
    assert torch.allclose(odd[4], images[4]) and torch.allclose(shares[4], answers[4])
    same, as_they_are = mixed(images, answers, 0.0, 0.0, np.random.default_rng(0))
    assert torch.equal(same, images) and torch.equal(as_they_are, answers)


def test_holes_have_the_areas_and_the_chance_asked_for() -> None:
    where = holes(4000, 0.25, np.random.default_rng(0))
    images, noise = torch.zeros(4000, 1, 64, 64), torch.ones(4000, 1, 64, 64)
    covered = erased(images, where, noise).mean((1, 2, 3))
    assert abs(float((covered > 0).float().mean()) - 0.25) < 0.03
    some = covered[covered > 0]
    assert some.min() > 0.01 and some.max() < 0.36 and abs(float(some.mean()) - 0.18) < 0.02
