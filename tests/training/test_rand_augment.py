"""Each change against Pillow's, whose operations RandAugment was made of."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ringmo.training import rand_augment as of

LEVEL = 0.9


def tile(seed: int = 0) -> np.ndarray:
    """Smooth and dim, so that there is something to stretch and to turn."""
    random = np.random.default_rng(seed)
    small = random.integers(20, 180, (6, 6, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC))


def done(change: Callable[..., Tensor], sign: float) -> np.ndarray:
    images = torch.from_numpy(tile().copy()).permute(2, 0, 1)[None].float()
    out = change(images, torch.full((1, 1, 1, 1), LEVEL), torch.full((1, 1, 1, 1), sign))
    return out.clamp(0, 255)[0].permute(1, 2, 0).numpy()


def enhanced(kind: type, sign: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: kind(image).enhance(1 + 0.9 * LEVEL * sign)


@pytest.mark.parametrize(
    ("change", "theirs", "within"),
    [
        (of._auto_contrast, ImageOps.autocontrast, 1),
        (of._equalize, ImageOps.equalize, 1),
        (of._invert, ImageOps.invert, 0),
        (of._posterize, lambda image: ImageOps.posterize(image, 4 - int(4 * LEVEL) or 1), 0),
        (of._solarize, lambda image: ImageOps.solarize(image, 256 - int(256 * LEVEL)), 0),
    ],
)
def test_pointwise_changes_are_pillows(
    change: Callable[..., Tensor], theirs: Callable[[Image.Image], Image.Image], within: int
) -> None:
    wanted = np.asarray(theirs(Image.fromarray(tile()))).astype(float)
    assert np.abs(done(change, 1.0) - wanted).max() <= within
    assert np.abs(wanted - tile()).max() > 5  # the tile would show a change that does nothing


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (of._colour, ImageEnhance.Color),
        (of._contrast, ImageEnhance.Contrast),
        (of._brightness, ImageEnhance.Brightness),
        (of._sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pillows(change: Callable[..., Tensor], kind: type, sign: float) -> None:
    wanted = np.asarray(enhanced(kind, sign)(Image.fromarray(tile()))).astype(float)
    # Pillow rounds what it blends with to whole steps.
    assert np.abs(done(change, sign) - wanted).max() <= 2.1


def test_a_turn_keeps_the_middle_and_turns_by_its_angle() -> None:
    theirs = Image.fromarray(tile()).rotate(-30 * LEVEL, Image.Resampling.BILINEAR)
    inside = (slice(16, 32), slice(16, 32))
    ours = done(of._rotate, 1.0)
    other = done(of._rotate, -1.0)
    difference = min(
        np.abs(one[inside] - np.asarray(theirs)[inside].astype(float)).mean()
        for one in (ours, other)
    )
    assert difference < 1.0
    assert np.abs(ours - other).mean() > 5


@pytest.mark.parametrize(("change", "axis"), [(of._shift_x, 1), (of._shift_y, 0)])
def test_a_shift_moves_by_its_share_and_fills(change: Callable[..., Tensor], axis: int) -> None:
    steps = 0.45 * LEVEL * 48
    out = done(change, 1.0)
    moved = np.roll(tile().astype(float), -round(steps), axis)
    start = (slice(0, 24), slice(None)) if axis == 0 else (slice(None), slice(0, 24))
    end = (slice(-12, None), slice(None)) if axis == 0 else (slice(None), slice(-12, None))
    assert np.abs(out[start] - moved[start]).mean() < 8
    assert np.allclose(out[end], of.FILL)


def test_changes_are_drawn_for_the_batch_and_done_for_the_part() -> None:
    images = torch.from_numpy(np.stack([tile(n) for n in range(32)])).permute(0, 3, 1, 2).float()
    chosen = of.changes(32, 9.0, np.random.default_rng(3))
    whole = of.rand_augment(images, chosen)
    parts = [of.rand_augment(images[p], chosen[p]) for p in (slice(0, 16), slice(16, 32))]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.min() >= 0 and whole.max() <= 255
    same = (whole == images).flatten(1).all(1).numpy()
    assert (same >= (chosen.which == of.NONE).all(1)).all() and 2 <= same.sum() <= 16


def test_strengths_and_chances_are_those_asked_for() -> None:
    chosen = of.changes(20_000, 9.0, np.random.default_rng(0))
    assert abs((chosen.which == of.NONE).mean() - 0.5) < 0.01
    assert abs(chosen.strength.mean() - 0.9) < 0.01 and chosen.strength.max() <= 1
    assert abs(chosen.sign.mean()) < 0.02
    counts = np.bincount(chosen.which[chosen.which >= 0], minlength=len(of.CHANGES))
    assert counts.min() > 0.9 * counts.mean()
