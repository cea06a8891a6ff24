import pytest
import torch

from ringmo.models.masking import pimask


def test_paper_size_masks_exactly_22_patches_of_615_pixels() -> None:
    mask = pimask(4, 192, 192, generator=torch.Generator().manual_seed(1))
    assert mask.shape == (4, 1, 192, 192) and mask.dtype == torch.bool
    counts = mask.view(4, 6, 32, 6, 32).sum(dim=(2, 4)).flatten(1)
    for image in counts:
        assert sorted(image.tolist()) == [0] * 14 + [615] * 22


def test_inside_ratio_one_is_simmims_mask() -> None:
    mask = pimask(3, 64, 64, mask_patch_size=16, inside_ratio=1.0)
    counts = mask.view(3, 4, 16, 4, 16).sum(dim=(2, 4))
    assert set(counts.unique().tolist()) == {0, 256}
    assert ((counts == 256).sum(dim=(1, 2)) == 10).all()  # ceil(0.6 · 16)


def test_counts_are_not_a_rounding_error_too_many() -> None:
    # 0.6 · 25 is 15 exactly; in binary it is a hair more or less.
    mask = pimask(2, 80, 80, mask_patch_size=16, mask_ratio=0.6, inside_ratio=1.0)
    assert (mask.sum(dim=(1, 2, 3)) == 15 * 256).all()
    full = pimask(1, 32, 32, mask_patch_size=8, mask_ratio=1.0, inside_ratio=1.0)
    assert full.all()


def test_each_image_gets_its_own_mask_and_a_seed_repeats_it() -> None:
    first, again, other = (
        pimask(2, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_pixels_are_masked_evenly() -> None:
    mask = pimask(4000, 16, 16, mask_patch_size=8, generator=torch.Generator().manual_seed(0))
    # 3 of 4 patches, 39 of 64 pixels; a pixel's share has a deviation of 0.008 over 4,000 masks.
    assert (mask.float().mean(0) - 0.75 * 39 / 64).abs().max() < 0.045


@pytest.mark.parametrize(
    ("size", "values", "says"),
    [
        ((100, 64), {}, "100×64"),
        ((0, 64), {}, "0×64"),
        ((64, 64), {"mask_patch_size": 0}, "patches of 0"),
        ((64, 64), {"mask_ratio": 0.0}, "mask_ratio"),
        ((64, 64), {"inside_ratio": 1.2}, "inside_ratio"),
        ((64, 64), {"inside_ratio": float("nan")}, "inside_ratio"),
    ],
)
def test_what_cannot_be_masked_is_refused(
    size: tuple[int, int], values: dict[str, float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        pimask(1, *size, **values)  # type: ignore[arg-type]
