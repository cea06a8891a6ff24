"""Where a token lies: fixed sine-cosine positions, and relative-position tables at another size."""

import math

import torch
from torch import Tensor


def sine_cosine(rows: int, columns: int, channels: int) -> Tensor:
    """Fixed positions of a grid's tokens, row by row: float32 (rows · columns, channels).

    A quarter of the channels each for the sine and cosine of x, then of y.

    Source: He et al., CVPR 2022; in the order of their open code, so that their weights fit.
    """
    quarter = channels // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.stack((x.flatten(), y.flatten()), 1)[:, :, None] * frequencies
    positions: Tensor = torch.cat((angles.sin(), angles.cos()), 2).flatten(1).float()
    return positions


def table_sides(entries: int) -> tuple[int, int] | None:
    """Side and extras of a relative-position table with that many entries; None if it is none.

    A window of w × w tokens has (2w - 1)² offsets, and with a class token three entries more.
    """
    for extra in (0, 3):
        side = math.isqrt(max(entries - extra, 0))
        if side % 2 and side * side == entries - extra:
            return side, extra
    return None


def resized_table(table: Tensor, side: int) -> Tensor:
    """A relative-position table (n, heads) for another window: (side² + extras, heads).

    Bicubic, on a grid whose steps grow geometrically from the centre: near offsets keep their
    values and far ones are stretched. A smaller window keeps the offsets that it has. The class
    token's three entries stay as they are.

    Source: BEiT's fine-tuning (Bao et al., ICLR 2022), which SimMIM and RingMo follow. timm's
    `resize_rel_pos_bias_table` has the same grid, but is linear without an old SciPy.
    """
    sides = table_sides(len(table))
    if sides is None or not side % 2:
        raise ValueError(f"a table of {len(table)} entries cannot become one of side {side}")
    old, half = sides[0], side // 2
    low, high = 1.0, 1.5  # bounds of the growth of a step, as in the source
    while high - low > 1e-6:
        middle = (low + high) / 2
        reach = sum(middle**i for i in range(old // 2))
        low, high = (low, middle) if reach > half else (middle, high)
    steps = torch.tensor([low**i for i in range(old // 2)], dtype=torch.float64).cumsum(0)
    points = torch.cat((-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps))
    weights = _spline(points, torch.arange(-half, half + 1, dtype=torch.float64))
    grid = table[: old * old].detach().cpu().double().T.reshape(-1, old, old)
    resized = (weights @ grid @ weights.T).flatten(1).T.to(table)
    return torch.cat((resized, table[old * old :]))


def _spline(points: Tensor, at: Tensor) -> Tensor:
    """Weights (len(at), len(points)) of the cubic not-a-knot spline; beyond its ends it is flat."""
    count, at = len(points), at.clamp(points[0], points[-1])
    if count < 4:  # too few for a spline: the polynomial through all of them
        powers = torch.arange(count)
        through: Tensor = torch.linalg.inv(points[:, None] ** powers)
        return at[:, None] ** powers @ through
    width = points.diff()
    left, right = torch.zeros(2, count, count, dtype=points.dtype)
    for i in range(1, count - 1):
        before, after = width[i - 1], width[i]
        left[i, i - 1 : i + 2] = torch.stack((before, 2 * (before + after), after))
        right[i, i - 1 : i + 2] = 6 * torch.stack((1 / before, -1 / before - 1 / after, 1 / after))
    left[0, :3] = torch.stack((width[1], -width[0] - width[1], width[0]))
    left[-1, -3:] = torch.stack((width[-1], -width[-2] - width[-1], width[-2]))
    bend: Tensor = torch.linalg.solve(left, right)  # second derivatives at the points
    cell = torch.bucketize(at, points[1:-1])
    span = width[cell]
    a = (points[cell + 1] - at) / span
    b = 1 - a
    values = torch.eye(count, dtype=points.dtype)
    return (
        a[:, None] * values[cell]
        + b[:, None] * values[cell + 1]
        + ((a**3 - a) * span**2 / 6)[:, None] * bend[cell]
        + ((b**3 - b) * span**2 / 6)[:, None] * bend[cell + 1]
    )
