import math

import pytest
import torch

from ringmo.models import rotated
from ringmo.models.oriented import (
    corrected,
    corrections,
    from_midpoint_offsets,
    midpoint_offsets,
)


def boxes(count: int, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    draw = torch.rand((count, 5), generator=dice)
    sides = 4 + 40 * draw[:, 2:4]
    return rotated.canonical(torch.cat((draw[:, :2] * 64, sides, draw[:, 4:] * 7 - 3.5), 1))


def anchors(near: torch.Tensor) -> torch.Tensor:
    spans = rotated.to_spans(near)
    shift = torch.randn(spans.shape, generator=torch.Generator().manual_seed(9))
    return spans + 2 * shift.clamp(-1, 1) + torch.tensor([-3, -3, 3, 3])


def test_a_box_comes_back_from_what_an_anchor_says_of_it() -> None:
    true = boxes(500)
    said = midpoint_offsets(true, anchors(true))
    assert said.shape == (500, 6) and said.isfinite().all()
    again = from_midpoint_offsets(said, anchors(true))
    # A box that leans by a tenth of a pixel comes back upright.
    assert rotated.paired_iou(true, again).min() > 0.99


def test_midpoint_offsets_known_by_hand() -> None:
    # A square on its corner: top and right corners lie at the middles of its span's sides.
    half = 10 / math.sqrt(2)
    anchor = torch.tensor([[20 - half, 30 - half, 20 + half, 30 + half]])
    diamond = torch.tensor([[20.0, 30, 10, 10, math.pi / 4]])
    assert midpoint_offsets(diamond, anchor) == pytest.approx(torch.zeros(1, 6), abs=1e-3)
    # Upright: the top's right end and the right's lower end, half the span away, twice as said.
    upright = torch.tensor([[20.0, 30, 8, 4, 0]])
    said = midpoint_offsets(upright, torch.tensor([[16.0, 28, 24, 32]]))
    assert said == pytest.approx(torch.tensor([[0.0, 0, 0, 0, 1, 1]]), abs=1e-3)


def test_whatever_an_anchor_says_is_a_box() -> None:
    wild = torch.randn((2, 300, 6), generator=torch.Generator().manual_seed(0)) * 20
    anchor = anchors(boxes(300))
    found = from_midpoint_offsets(wild, anchor.expand(2, -1, -1))
    assert found.shape == (2, 300, 5) and found.isfinite().all()
    assert (found[..., 2] >= found[..., 3]).all() and (found[..., 3] >= 0).all()


def test_a_box_comes_back_from_the_corrections_of_a_proposal() -> None:
    true, proposals = boxes(500), boxes(500, seed=1)
    said = corrections(true, proposals)
    assert (said[:, 4].abs() * 0.1 <= math.pi / 4 + 1e-5).all()
    again = corrected(said, proposals)
    assert rotated.paired_iou(true, again).min() > 0.999
    assert corrections(true, true).abs().max() < 1e-3


def test_corrections_are_along_and_across_the_proposal() -> None:
    proposal = torch.tensor([[10.0, 10, 8, 4, math.pi / 2]])  # its first side points down
    true = torch.tensor([[10.0, 14, 8, 4, math.pi / 2]])
    wanted = torch.tensor([[4 / 8 / 0.1, 0, 0, 0, 0]])
    assert torch.allclose(corrections(true, proposal), wanted, atol=1e-4)
