"""Behaviour: how much worse a model gets when its images change as they may in use.

Seen from above there is no up: a mirrored or turned tile is the same ground, and the truth turns
with it. Light, noise and a band that fails change the image and not the truth (behavioural tests
as of Ribeiro et al., ACL 2020: invariance).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ringmo.data.loading import SelectedTiles
from ringmo.evaluation import metrics
from ringmo.evaluation.measuring import (
    Change,
    answers_of,
    main_drawn,
    measured,
    part,
    turned_sample,
)
from ringmo.evaluation.metrics import Interval
from ringmo.registry.bundle import Bundle
from ringmo.tasks.base import SECOND, Evidence, Sample

# Models read bands of mean 0 and deviation 1, so that changes have one size for all sensors.
# A fifth of the range from mean - deviation to mean + deviation: of aerial RGB, which is about
# 120 ± 58, as much as multiplying by 1.2 or 0.8.
BRIGHTNESS = 0.4
NOISE = 0.2  # deviation, of Gaussian noise: 12 grey levels of aerial RGB
TILES = 500  # at most, evenly chosen: each change answers them once more


@dataclass(frozen=True)
class Behaviour:
    """What one change does. value: the main figure with it. drop: how much worse, with its paired
    interval; in the figure's unit, above 0: worse."""

    change: str
    value: float
    drop: Interval


def changes(bundle: Bundle) -> dict[str, list[Change]]:
    """The changes by name; the figure of one is the mean over its parts (each band in turn)."""
    named: dict[str, list[Change]] = {"mirrored": [_turn(4)]}
    named |= {f"turned {90 * number}": [_turn(number)] for number in (1, 2, 3)}
    named |= {"brighter": [_brighter(BRIGHTNESS)], "darker": [_brighter(-BRIGHTNESS)]}
    named["noise"] = [noisy]
    bands = [(name, band) for name, of in bundle.sensors.items() for band in range(len(of.bands))]
    if len(bands) > 1:
        named["band lost"] = [_without(bundle, name, band) for name, band in bands]
    return named


def behaviour(
    bundle: Bundle,
    tiles: SelectedTiles,
    evidence: Evidence,
    samples: int,
    flips: int = 1,
    only: Collection[str] | None = None,
) -> list[Behaviour]:
    """The drop of the task's main figure with every change.

    Args:
        evidence: of all these tiles, unchanged. samples: of the bootstrap over places. only: these
            changes, by name; None: all.
    """
    task = answers_of(bundle)
    classes = bundle.samples(tiles).classes
    rows = np.unique(np.linspace(0, len(tiles) - 1, min(TILES, len(tiles))).astype(np.int64))
    places = tiles.table["place"].astype(str).to_numpy()[rows].tolist()

    def drawn(of: Evidence) -> NDArray[np.float64]:
        return main_drawn(task, of, classes, places, samples)

    before, sign = drawn(part(evidence, rows)), -1 if task.metric in task.lower else 1
    found = []
    for name, parts in changes(bundle).items():
        if only is not None and name not in only:
            continue
        after = np.mean(
            [
                drawn(measured(bundle, tiles, change=change, flips=flips, rows=rows, label=name))
                for change in parts
            ],
            axis=0,
        )
        drop = metrics.interval(sign * (before - after))
        found.append(Behaviour(name, float(after[0]), drop))
    return found


def _turn(number: int) -> Change:
    return lambda sample: turned_sample(sample, number)


def _brighter(by: float) -> Change:
    return lambda sample: _changed(sample, lambda _, of: of + by)


def noisy(sample: Sample) -> Sample:
    """With Gaussian noise: the same for the same tile, another for each of its images."""
    order = {name: number for number, name in enumerate(sorted(sample.images))}

    def noise(name: str, of: torch.Tensor) -> torch.Tensor:
        seeds = [int(row) * len(order) + order[name] for row in sample.rows]
        drawn = [
            torch.randn(of.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return of + NOISE * torch.stack(drawn).to(of.device)

    return _changed(sample, noise)


def _without(bundle: Bundle, sensor: str, band: int) -> Change:
    """One band at its mean everywhere, at both dates."""
    first = next(iter(bundle.sensors))

    def lose(name: str, of: torch.Tensor) -> torch.Tensor:
        if (first if name == SECOND else name) != sensor:
            return of
        of = of.clone()
        of[:, band] = 0
        return of

    return lambda sample: _changed(sample, lose)


def _changed(sample: Sample, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Sample:
    """A sample with other images and the same truth."""
    images = {name: change(name, of) for name, of in sample.images.items()}
    return Sample(images, sample.rows, sample.labels, sample.mask, sample.height, sample.objects)
