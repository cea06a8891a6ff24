import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from ringmo.models.position import resized_table, sine_cosine, table_sides


def test_sine_cosine_positions_are_those_of_mae() -> None:
    got = sine_cosine(3, 4, 8)
    assert got.shape == (12, 8) and got.dtype == torch.float32
    for y in range(3):
        for x in range(4):
            wanted = []
            for coordinate in (x, y):
                angles = [coordinate / 10000 ** (k / 2) for k in range(2)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert got[4 * y + x].tolist() == pytest.approx(wanted, abs=1e-6)


def test_tables_are_known_by_their_number_of_entries() -> None:
    assert table_sides(11 * 11) == (11, 0)
    assert table_sides(27 * 27 + 3) == (27, 3)
    assert table_sides(1) == (1, 0) and table_sides(4) == (1, 3)
    for none in (0, 2, 16, 100, 122):
        assert table_sides(none) is None


def growth(old: int, new: int) -> float:
    """The ratio of steps with which `old` steps reach as far as `new` of one token."""
    ratios = np.linspace(1, 1.5, 500_001)
    reach = sum(ratios**i for i in range(old))
    return float(ratios[np.abs(reach - new).argmin()])


@pytest.mark.parametrize(("old", "new"), [(6, 7), (3, 6), (12, 14)])
def test_table_is_resized_bicubically_on_a_geometric_grid(old: int, new: int) -> None:
    side, heads = 2 * old - 1, 3
    table = np.random.default_rng(0).normal(size=(side, side, heads))
    ratio = growth(old - 1, new - 1)
    steps = np.cumsum([ratio**i for i in range(old - 1)])
    points = np.concatenate([-steps[::-1], [0], steps])
    at = np.clip(np.arange(-(new - 1), new), points[0], points[-1])
    wanted = CubicSpline(points, table, axis=0)(at)  # not-a-knot, as SciPy's by default
    wanted = CubicSpline(points, wanted, axis=1)(at)
    got = resized_table(torch.from_numpy(table).reshape(-1, heads).float(), 2 * new - 1)
    assert np.allclose(got.numpy().reshape(2 * new - 1, 2 * new - 1, heads), wanted, atol=1e-3)


def test_near_offsets_keep_their_values_and_the_class_token_its_entries() -> None:
    table = torch.randn(11 * 11 + 3, 4)
    got = resized_table(table, 13)
    assert got.shape == (13 * 13 + 3, 4)
    assert torch.equal(got[-3:], table[-3:])
    old, new = table[:121].view(11, 11, 4), got[:169].view(13, 13, 4)
    assert torch.allclose(new[5:8, 5:8], old[4:7, 4:7], atol=1e-3)
    # A smaller window has the offsets that were there.
    smaller = resized_table(table, 7)[:49].view(7, 7, 4)
    assert torch.allclose(smaller, old[2:9, 2:9], atol=1e-4)
    same = resized_table(table, 11)
    assert torch.allclose(same, table, atol=1e-4)


@pytest.mark.parametrize("side", [1, 3])
def test_tables_of_the_smallest_windows_can_be_resized(side: int) -> None:
    flat = resized_table(torch.full((side * side, 2), 0.5), 9)
    assert flat.shape == (81, 2) and torch.allclose(flat, torch.tensor(0.5), atol=1e-5)


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="16 entries"):
        resized_table(torch.zeros(16, 2), 7)
