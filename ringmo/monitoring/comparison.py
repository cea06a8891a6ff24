"""Whether tiles of production look as the reference does: four tests, by permuting scenes.

Tiles of one scene resemble each other, so scenes are what is permuted: under the hypothesis that
nothing has drifted, any of the scenes could have been production's. Each scene counts once.

- bands: each band's mean and deviation, and nodata, by rank sums; the largest of all decides, and
  its distribution under permutation gives each its own p-value (Westfall and Young 1993, maxT).
- embedding: maximum mean discrepancy with Gaussian kernels, unbiased, between scenes (Gretton et
  al., JMLR 2012).
- classes: total variation between the mean answers; of heights rank sums, as of bands.
- confidence: rank sum.

Holm's method (1979) keeps the chance of any false alarm at LEVEL over the four.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05  # chance of any false alarm in one comparison
PERMUTATIONS = 999  # beside the one that is
BANDWIDTHS = (0.5, 1.0, 2.0)  # of the kernels, in units of the median distance
LEAST_TILES = 20  # of each side
MOST = 2000  # tiles of each side that are compared
NEIGHBOURS = 5  # tiles of the reference by which a tile's distance to it is measured
TOGETHER = 512  # tiles whose distances are in memory at a time
MEASURED = ("mean", "deviation", "nodata")  # of bands
Array = NDArray[np.float64]
# What a test finds: value, unit, p, parts.
Found = tuple[float, str, float, list[dict[str, Any]]]


@dataclass(frozen=True)
class Finding:
    """What a test found. value: in the test's own unit (see `unit`).

    p: of this test alone; adjusted: by Holm, over all tests. parts: what it is made of, a row a
    band and measure, or a class.
    """

    test: str
    value: float
    unit: str
    p: float
    adjusted: float
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def drifted(self) -> bool:
        return self.adjusted <= LEVEL


@dataclass(frozen=True)
class Comparison:
    """findings: a test each. distance: of each tile of production, NaN without an embedding, to
    the reference: 1 is what the reference's own farthest hundredth has."""

    findings: list[Finding]
    distance: Array
    tiles: dict[str, int]
    scenes: dict[str, int]

    @property
    def drifted(self) -> bool:
        return any(finding.drifted for finding in self.findings)


def compare(reference: "pd.DataFrame", production: "pd.DataFrame", *, seed: int = 0) -> Comparison:
    """Test production against the reference; both hold rows as `facts` has them, with `scene`.

    Raises:
        BadInput: too few tiles or scenes to find anything.
    """
    sides = {"reference": reference, "production": production}
    for name, rows in sides.items():
        if len(rows) < LEAST_TILES:
            raise BadInput(
                f"{len(rows)} tiles of {name}: at least {LEAST_TILES} are needed to compare: "
                f"wait, or raise monitoring.share"
            )
    scenes = [rows["scene"].astype(str) for rows in sides.values()]
    of_reference, of_production = (np.unique(names, return_inverse=True)[1] for names in scenes)
    counts = int(of_reference.max()) + 1, int(of_production.max()) + 1
    groups = np.concatenate((of_reference, of_production + counts[0]))
    _check_scenes(*counts)
    drawn = _drawn(sum(counts), counts[1], np.random.default_rng(seed))

    found: list[tuple[str, float, str, float, list[dict[str, Any]]]] = []
    shared = [name for name in reference.columns if name in set(production.columns)]
    tables = {
        name: np.concatenate([rows[name].to_numpy(np.float64) for rows in sides.values()])
        for name in shared
        if name.split(":")[0] in (*MEASURED, "class", "answer", "confidence")
    }
    both = _Sides(tables, len(reference), groups, drawn)
    measured = [name for name in tables if name.split(":")[0] in MEASURED]
    found.append(("bands", *both.ranked(measured)))
    embedded = [_embedded(rows) for rows in sides.values()]
    distance = np.full(len(production), np.nan)
    if all(known.any() for known, _ in embedded):
        features = [rows for _, rows in embedded]
        whole = np.concatenate([known for known, _ in embedded])
        if len(features[0]) >= LEAST_TILES and len(features[1]) >= LEAST_TILES:
            found.append(("embedding", *_discrepancy(features, groups[whole], drawn)))
        distance[embedded[1][0]] = distances(*features)
    classes = [name for name in shared if name.startswith("class:")]
    answers = [name for name in shared if name.startswith("answer:")]
    if classes:
        found.append(("classes", *both.variation(classes)))
    elif answers:
        found.append(("answers", *both.ranked(answers)))
    if "confidence" in tables and np.isfinite(tables["confidence"]).any():
        found.append(("confidence", *both.ranked(["confidence"])))
    adjusted = holm([one[3] for one in found])
    return Comparison(
        [Finding(*one[:4], p, one[4]) for one, p in zip(found, adjusted, strict=True)],
        distance,
        {name: len(rows) for name, rows in sides.items()},
        dict(zip(sides, counts, strict=True)),
    )


def holm(values: list[float]) -> list[float]:
    """p-values adjusted so that whoever trusts those up to LEVEL errs with that chance at most."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(np.argsort(values)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


def _check_scenes(reference: int, production: int) -> None:
    # The least p-value is one in as many ways as there are to choose production's scenes.
    if math.comb(reference + production, production) < 4 / LEVEL:
        raise BadInput(
            f"{production} scenes of production and {reference} of the reference are too few: "
            f"what they differ by could be chance alone; wait for more scenes"
        )


def _drawn(scenes: int, production: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Which scenes are production's, (n, scenes): first as it is, then drawn.

    All ways there are, where they are fewer than PERMUTATIONS: drawn ones would repeat the first.
    """
    ways = math.comb(scenes, production)
    if ways <= 1 + PERMUTATIONS:
        every = np.array(list(itertools.combinations(range(scenes - 1, -1, -1), production)))
        chosen = np.zeros((ways, scenes), np.float32)
        chosen[np.arange(ways)[:, None], every] = 1
        return chosen
    chosen = np.zeros((1 + PERMUTATIONS, scenes), np.float32)
    chosen[0, scenes - production :] = 1
    for row in chosen[1:]:
        row[random.permutation(scenes)[:production]] = 1
    return chosen


def _p(statistics: Array, found: float | None = None) -> float:
    """Of what was found (None: the first) among all."""
    found = float(statistics[0]) if found is None else found
    least = found - 1e-9 * abs(found)  # what is equal but for rounding counts
    return float((statistics >= least).mean())


@dataclass(frozen=True)
class _Sides:
    """Both sides' tiles, the reference's first, and how their scenes are permuted.

    tables: name → (tiles,). first: tiles of the reference. groups: (tiles,), the scene of each.
    drawn: see `_drawn`.
    """

    tables: dict[str, Array]
    first: int
    groups: NDArray[np.int64]
    drawn: NDArray[np.float32]

    @property
    def scenes(self) -> int:
        return int(self.drawn.shape[1])

    def of(self, name: str) -> tuple[Array, Array]:
        """A column of the reference's tiles, and of production's."""
        return self.tables[name][: self.first], self.tables[name][self.first :]

    def mean(self, name: str) -> Array:
        """Over the tiles of each scene, without NaN: (scenes,), NaN where nothing is known."""
        values = self.tables[name]
        known = np.isfinite(values)
        total = np.bincount(self.groups[known], values[known], self.scenes)
        tiles = np.bincount(self.groups[known], minlength=self.scenes)
        means = np.full(self.scenes, np.nan)
        np.divide(total, tiles, out=means, where=tiles > 0)
        return means

    def ranked(self, names: list[str]) -> Found:
        """Rank sums of several columns; the value is the largest shift, in deviations of the
        reference."""
        from scipy.stats import rankdata

        ranks = np.zeros((self.scenes, len(names)))
        for i, name in enumerate(names):
            of_scene = self.mean(name)
            known = np.isfinite(of_scene)
            if known.sum() > 1:
                ranked = rankdata(of_scene[known])
                ranked -= ranked.mean()
                # A band that is the same everywhere says nothing.
                ranks[known, i] = ranked / max(float(ranked.std()), 1e-9)
        # All ranks of a column add up to 0: one side's sum says what the other's is.
        sums = np.abs(self.drawn.astype(np.float64) @ ranks)
        largest = sums.max(1)
        parts: list[dict[str, Any]] = []
        for i, name in enumerate(names):
            before, now = self.of(name)
            before, now = before[np.isfinite(before)], now[np.isfinite(now)]
            if not len(before) or not len(now):
                continue
            spread = max(float(before.std()), 1e-9)
            moved = float(now.mean() - before.mean())
            measure, _, which = name.partition(":")
            parts.append(
                {
                    "of": which.replace(":", " "),
                    "measure": measure,
                    "reference": float(before.mean()),
                    "production": float(now.mean()),
                    "shift": 0.0 if abs(moved) < 1e-9 else float(np.clip(moved / spread, -99, 99)),
                    "p": _p(largest, float(sums[0, i])),
                }
            )
        biggest = max((abs(part["shift"]) for part in parts), default=0.0)
        return biggest, "deviations", _p(largest), parts

    def variation(self, names: list[str]) -> Found:
        """Total variation between the mean answers of both sides' scenes."""
        of_scene = np.stack([np.nan_to_num(self.mean(name)) for name in names], 1)
        n = self.drawn[0].sum()
        m = self.scenes - n
        # Of objects, numbers: as shares of all that there are in a scene of either side.
        scale = max(float(of_scene.sum(1).mean()), 1e-9)
        one = self.drawn.astype(np.float64) @ of_scene
        difference = one / n - (of_scene.sum(0) - one) / m
        statistic = np.abs(difference).sum(1) / 2 / scale
        rows = [
            {
                "of": name.partition(":")[2],
                "reference": float(np.nanmean(self.of(name)[0])),
                "production": float(np.nanmean(self.of(name)[1])),
            }
            for name in names
        ]
        return float(statistic[0]), "total variation", _p(statistic), rows


def _embedded(rows: "pd.DataFrame") -> tuple[NDArray[np.bool_], Array]:
    """Which rows have an embedding, and these."""
    if "embedding" not in rows:
        return np.zeros(len(rows), bool), np.zeros((0, 0))
    known = rows["embedding"].notna().to_numpy()
    if not known.any():
        return known, np.zeros((0, 0))
    return known, np.stack(rows["embedding"][known].tolist()).astype(np.float64)


def _discrepancy(
    features: list[Array], groups: NDArray[np.int64], drawn: NDArray[np.float32]
) -> Found:
    """The maximum mean discrepancy of scenes; of one scene and another all pairs of tiles count."""
    both = np.concatenate(features)
    both = (both - both.mean(0)) / np.maximum(both.std(0), 1e-6)
    kernel = _kernel(both.astype(np.float32))
    scenes = drawn.shape[1]
    tiles = np.bincount(groups, minlength=scenes).astype(np.float32)
    if scenes == len(both):
        kernel = kernel[np.ix_(np.argsort(groups), np.argsort(groups))]
    else:
        member = np.zeros((scenes, len(both)), np.float32)
        member[groups, np.arange(len(both))] = 1 / tiles[groups]
        kernel = np.asarray(member @ kernel @ member.T, np.float32)
    # Scenes without an embedding are on neither side.
    chosen = drawn * (tiles > 0)
    others = (1 - drawn) * (tiles > 0)
    np.fill_diagonal(kernel, 0)  # unbiased: no scene is compared with itself
    reached = (chosen @ kernel).astype(np.float64)
    own = (reached * chosen).sum(1)
    across = (reached * others).sum(1)
    rest = float(kernel.sum(dtype=np.float64)) - own - 2 * across
    n, m = chosen.sum(1).astype(np.float64), others.sum(1).astype(np.float64)
    pairs = n * (n - 1), m * (m - 1)
    statistic = (
        np.divide(own, pairs[0], out=np.zeros_like(own), where=pairs[0] > 0)
        + np.divide(rest, pairs[1], out=np.zeros_like(rest), where=pairs[1] > 0)
        - 2 * across / np.maximum(n * m, 1)
    )
    return float(statistic[0]), "squared discrepancy", _p(statistic), []


def _kernel(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of Gaussian kernels of several widths about the median distance: (n, n)."""
    lengths = (rows**2).sum(1)
    squared = np.maximum(lengths[:, None] + lengths - 2 * rows @ rows.T, 0)
    few = squared[:: max(1, len(rows) // 500), :: max(1, len(rows) // 500)]
    median = max(float(np.median(few[few > 0])) if (few > 0).any() else 1.0, 1e-12)
    kernel: NDArray[np.float32] = np.zeros_like(squared)
    for width in BANDWIDTHS:
        kernel += np.exp(squared * np.float32(-0.5 / (median * width**2)))
    kernel /= len(BANDWIDTHS)
    return kernel


def distances(reference: Array, production: Array) -> Array:
    """How far each tile of production (n, C) is from the reference (m, C): 1 is usual at most.

    The mean distance to the NEIGHBOURS nearest tiles of the reference, divided by what the
    reference's own tiles have among the others in 99 of 100 cases.
    """
    spread = np.maximum(reference.std(0), 1e-6)
    own, other = (reference / spread), (production / spread)
    near = min(NEIGHBOURS, len(own) - 1)
    usual = np.quantile(_nearest(own, own, near, itself=True), 0.99)
    return _nearest(other, own, near, itself=False) / max(float(usual), 1e-9)


def _nearest(rows: Array, among: Array, near: int, *, itself: bool) -> Array:
    lengths = (among**2).sum(1)
    found = np.empty(len(rows))
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        squared = np.maximum((some**2).sum(1)[:, None] + lengths - 2 * some @ among.T, 0)
        if itself:
            squared[np.arange(len(some)), start + np.arange(len(some))] = np.inf
        nearest = np.partition(squared, near - 1, axis=1)[:, :near]
        found[start : start + len(some)] = np.sqrt(nearest).mean(1)
    return found
