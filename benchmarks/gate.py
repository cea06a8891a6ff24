"""What the gate lets pass: worse, equal and better models, injected at sizes of real test splits.

    python -m benchmarks.gate                    the tables of docs/gate.md, about half an hour
    python -m benchmarks.gate --models 10        a trial

No model is trained. The evidence of two models is drawn, and the gate's own comparison judges it.
How it is drawn (`Split.pair`): places differ in how hard they are, for both models alike. The
champion's answers are drawn by that. The candidate answers as the champion does, but for a share of
the tiles (objects, pixels), some right where it was wrong and some wrong where it was right; the
two shares are such that on all tiles there could be (not just those drawn) its main figure is
better by `gain`. So what is drawn has the pairing of two trainings on the same data, and the test
split is a sample like any other.
"""

import argparse
import functools
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console, tasks
from ringmo.config import Gate
from ringmo.evaluation import average_precision, metrics, paired
from ringmo.evaluation.average_precision import IGNORED, RIGHT, SIZES, THRESHOLDS, WRONG
from ringmo.evaluation.paired import Answers, Tiles
from ringmo.registry import rules
from ringmo.tasks.base import Evidence

MARGIN = 0.03
RIGHT_SHARE = 0.85  # of tiles, objects, pixels that the champion answers right
SPREAD = 8.0  # a place's own share is drawn from a beta distribution with this sum of parameters
CHANGED = 0.10  # of tiles or objects that one model answers right and the other does not
PIXELS = 4096  # of a tile's mask
OBJECTS = 10  # a tile has, on average
SCORE = 0.9  # correlation of two models' scores of one object


@dataclass(frozen=True)
class Split:
    """A test split. tiles are spread over places evenly."""

    name: str
    task: str
    tiles: int
    places: int
    classes: int

    @property
    def names(self) -> list[str]:
        return [f"c{i}" for i in range(self.classes)]

    def of(self, tiles: int, places: int) -> "Split":
        return Split(self.name, self.task, tiles, places, self.classes)

    def pair(self, gain: float, random: np.random.Generator) -> tuple[Answers, Answers, Tiles]:
        """Candidate, champion and tiles; the candidate's main figure is better by `gain` on average
        over splits."""
        net = calibrated(self.task, self.classes, round(gain, 6))
        place = np.arange(self.tiles) * self.places // self.tiles
        candidate, champion = _DRAW[self.task](self, place, net, random)
        tiles = Tiles([f"p{i}" for i in place], {})
        return Answers(candidate, self.names), Answers(champion, self.names), tiles


SPLITS = (
    Split("scene, as AID", "scene", 720, 720, 30),
    Split("scene, large", "scene", 10_000, 10_000, 30),
    Split("scene, in scenes of 10 tiles", "scene", 720, 72, 30),
    Split("segmentation, 12 images in 60 tiles", "segmentation", 60, 12, 6),
    Split("segmentation, 200 images in 1,000 tiles", "segmentation", 1_000, 200, 6),
    Split("detection, 16 images", "detection", 16, 16, 5),
    Split("detection, 200 images", "detection", 200, 200, 5),
)
GAINS = {
    "worse, twice the margin": -2 * MARGIN,
    "worse, the margin": -MARGIN,
    "equal": 0.0,
    "better, the margin": MARGIN,
}


def changed(
    random: np.random.Generator,
    right: NDArray[np.bool_],
    place: NDArray[np.int64],
    net: float,
    share: float = CHANGED,
) -> NDArray[np.bool_]:
    """Which of a champion's right and wrong answers are right of the candidate.

    A share of them changes, `net` more to right than to wrong; places have more or less of it.
    """
    some = random.beta(2, 2, int(place.max(initial=0)) + 1)[place] * 2
    lost = (share - net) / 2 / RIGHT_SHARE * some
    won = (share + net) / 2 / (1 - RIGHT_SHARE) * some
    dice = random.random(len(right))
    answer: NDArray[np.bool_] = np.where(right, dice >= lost, dice < won)
    return answer


def hardness(random: np.random.Generator, place: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each tile the share that the champion answers right where it lies."""
    share = random.beta(
        RIGHT_SHARE * SPREAD, (1 - RIGHT_SHARE) * SPREAD, int(place.max(initial=0)) + 1
    )
    return np.asarray(share[place])


def scenes(
    split: Split, place: NDArray[np.int64], net: float, random: np.random.Generator
) -> tuple[Evidence, Evidence]:
    """Tiles of one class each; a wrong answer is any other class, the same one for both."""
    truth = random.integers(0, split.classes, split.tiles)
    other = (truth + random.integers(1, split.classes, split.tiles)) % split.classes
    right = random.random(split.tiles) < hardness(random, place)

    def evidence(right: NDArray[np.bool_]) -> Evidence:
        said = np.where(right, truth, other)
        scores = np.full((split.tiles, split.classes), 0.1 / split.classes, np.float32)
        scores[np.arange(split.tiles), said] = 0.9
        return {
            "truth": np.eye(split.classes, dtype=np.int64)[truth],
            "scores": scores,
            "label": truth,
            "predicted": said,
            "right": right,
            "confidence": scores.max(1),
        }

    return evidence(changed(random, right, place, net)), evidence(right)


def masks(
    split: Split, place: NDArray[np.int64], net: float, random: np.random.Generator
) -> tuple[Evidence, Evidence]:
    """Tiles of one to three classes, of whose pixels a share is said to be another of the split's.

    The share of wrong pixels is the tile's; the candidate's differs from the champion's by a factor
    of its own for each place, and for each tile, of a deviation of 0.15.
    """
    classes = split.classes
    kept = random.random((split.tiles, classes)) < 2 / classes
    kept[np.arange(split.tiles), random.integers(0, classes, split.tiles)] = True
    share = random.gamma(1.0, size=(split.tiles, classes)) * kept
    pixels = np.rint(PIXELS * share / share.sum(1, keepdims=True)).astype(np.int64)
    wrong = 1 - hardness(random, place)
    of_place = random.normal(0, 0.15, int(place.max(initial=0)) + 1)[place]
    factor = np.exp(of_place + random.normal(0, 0.15, split.tiles) - 0.15**2)
    towards = random.dirichlet(np.ones(classes), split.tiles)

    def evidence(wrong: NDArray[np.float64]) -> Evidence:
        lost = np.rint(pixels * np.clip(wrong, 0, 1)[:, None]).astype(np.int64)
        confusion = np.zeros((split.tiles, classes + 1, classes), np.int64)
        confusion[:, :classes] = np.rint(lost[:, :, None] * towards[:, None, :]).astype(np.int64)
        step = np.arange(classes)
        confusion[:, step, step] += pixels - lost
        none = np.zeros(0, np.int64)
        names = ("object_tile", "object_class", "object_pixels", "object_boundary")
        edges = np.zeros((split.tiles, classes, 4), np.int64)
        return {"confusion": confusion, "boundary": edges, **dict.fromkeys(names, none)}

    return evidence(wrong * factor * (1 - net)), evidence(wrong)


def objects(
    split: Split, place: NDArray[np.int64], net: float, random: np.random.Generator
) -> tuple[Evidence, Evidence]:
    """Objects that are found or not, with scores; and half as many answers to nothing."""
    count = random.poisson(OBJECTS, split.tiles)
    tile = np.repeat(np.arange(split.tiles), count)
    label = random.integers(0, split.classes, len(tile))
    found = random.random(len(tile)) < hardness(random, place)[tile]
    ghosts = np.repeat(np.arange(split.tiles), random.poisson(OBJECTS / 2, split.tiles))
    ghost_label = random.integers(0, split.classes, len(ghosts))
    # Of an object both models are about as sure; of what is none less so.
    sure = random.normal(1.5, 1, len(tile)), random.normal(0, 1, len(ghosts))
    shape = (len(SIZES), len(THRESHOLDS))

    def evidence(found: NDArray[np.bool_], noise: float) -> Evidence:
        own, none = (of * (1 - noise) ** 0.5 + random.normal(0, noise**0.5, len(of)) for of in sure)
        score = np.concatenate([own[found], none, np.full(len(tile), np.nan)])
        which = np.concatenate([tile[found], ghosts, tile])
        settled = np.full((len(score), *shape), IGNORED, np.int8)
        right = np.zeros(len(score), np.bool_)
        right[: found.sum()] = True
        settled[:, 0, :] = np.where(right, RIGHT, WRONG)[:, None]
        settled[-len(tile) :, 0, :] = RIGHT
        return {
            "objects": count.astype(np.float64),
            "object_tile": which,
            "object_class": np.concatenate([label[found], ghost_label, label]),
            "object_score": score.astype(np.float32),
            "object_right": right,
            "object_outcome": settled,
        }

    better = changed(random, found, place[tile], net)
    return evidence(better, 1 - SCORE), evidence(found, 1 - SCORE)


_DRAW = {"scene": scenes, "segmentation": masks, "detection": objects}


def calibrated(task: str, classes: int, gain: float) -> float:
    """The `net` with which a task's main figure is better by `gain` on a very large split."""
    if task == "scene":
        return gain  # accuracy is the share itself
    nets, gains = _gains(task, classes)
    return float(np.interp(gain, gains, nets))


@functools.cache
def _gains(task: str, classes: int) -> tuple[NDArray[np.float64], list[float]]:
    """Some values of `net`, and how much better each makes the main figure."""
    kind, large = tasks.find(task), Split("", task, 4_000, 4_000, classes)
    nets = np.linspace(-1, 1, 9) * (0.9 * CHANGED if task == "detection" else 0.6)

    def value(of: Evidence) -> float:
        lean = average_precision.at_half(of) if task == "detection" else of
        return kind.figures(lean, large.names).whole[kind.metric]

    gains = []
    for net in nets:
        pairs = [
            _DRAW[task](large, np.arange(large.tiles), net, np.random.default_rng(seed))
            for seed in range(3)
        ]
        gains.append(float(np.mean([value(first) - value(second) for first, second in pairs])))
    return nets, gains


def judged(split: Split, gain: float, seed: int, samples: int) -> list[dict[str, Any]]:
    """What the gate's rules say of one injected model."""
    random = np.random.default_rng((seed, split.tiles, split.places, round(1e6 * (gain + 1))))
    candidate, champion, tiles = split.pair(gain, random)
    kind = tasks.find(split.task)
    rule = Gate(max_drop=MARGIN)
    return rules.against_champion(
        rule, kind, kind.metric, candidate, champion, tiles, samples, ("candidate", "champion")
    )


def passes(split: Split, gain: float, models: int, samples: int) -> tuple[float, float]:
    """The share of injected models that pass; and of those of which a class is blamed."""
    found = [judged(split, gain, seed, samples) for seed in range(models)]
    passed = [all(check["ok"] for check in checks) for checks in found]
    blamed = [bool(check["fell"]) for checks in found for check in checks if "fell" in check]
    return float(np.mean(passed)), float(np.mean(blamed))


def after(champions: int, tiles: int, models: int) -> tuple[float, float]:
    """The share of equal models not refused for the best of so many equal champions on scenes: by a
    bound against it, as against the champion; and as the gate does it."""
    rule, kind = Gate(max_drop=MARGIN), tasks.find("scene")
    place, names = np.arange(tiles), [str(i) for i in range(tiles)]
    by_bound = by_figure = 0
    for seed in range(models):
        random = np.random.default_rng((seed, champions))
        common = random.random(tiles) < hardness(random, place)
        # Of two that differ by half of it from a third, the whole of it is between.
        *former, candidate = (
            changed(random, common, place, 0.0, CHANGED / 2) for _ in range(champions + 1)
        )
        best = max(former, key=lambda right: right.mean())
        differences = metrics.mean_drawn(candidate.astype(float) - best, names, 500)
        by_bound += paired.lower_bound(differences, tiles) >= -MARGIN
        figures = {f"scene/{i}": float(right.mean()) for i, right in enumerate(former)}
        said = rules.against_best(
            rule, kind, "accuracy", float(candidate.mean()), figures, [], ("candidate", None)
        )
        by_figure += said is not None and said["ok"]
    return by_bound / models, by_figure / models


GROWN = {  # places, and tiles of each
    SPLITS[0]: ((100, 1), (200, 1), (400, 1), (800, 1), (1_600, 1)),
    SPLITS[3]: ((12, 5), (25, 5), (50, 5)),
    SPLITS[5]: ((16, 1), (50, 1), (100, 1), (200, 1)),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description="What the gate lets pass."
    )
    parser.add_argument("--models", type=int, default=50, help="injected of each kind: default 50")
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap: default 1000")
    given = parser.parse_args(arguments)

    rows = []
    for split in SPLITS:
        started, cells, blamed = time.monotonic(), [], 0.0
        for gain in GAINS.values():
            passed, fell = passes(split, gain, given.models, given.samples)
            cells.append(share(passed))
            blamed = fell if gain == 0 else blamed
        rows.append([split.name, *cells, share(blamed)])
        console.note(f"{split.name}: {cells} ({time.monotonic() - started:.0f} s)")
    print(table(["test split", *GAINS, "equal, a class blamed"], rows), flush=True)

    rows = []
    for split, sizes in GROWN.items():
        for places, each in sizes:
            grown = split.of(places * each, places)
            passed, _ = passes(grown, 0.0, given.models, given.samples)
            rows.append([split.task, str(places), str(places * each), share(passed)])
            console.note(str(rows[-1]))
    print(table(["task", "places", "tiles", "an equal model passes"], rows), flush=True)

    rows = [
        [str(champions), *(share(one) for one in after(champions, 720, 4 * given.models))]
        for champions in (1, 5, 30)
    ]
    print(table(["equal champions before", "by a bound", "by the figures themselves"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
