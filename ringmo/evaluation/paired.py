"""Whether one model is worse than another on the same test tiles, and how sure that is.

Both answered the same tiles, and their figures come from the same draws of places. So what makes
a place hard for both falls out of the difference, which is much surer than either figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.evaluation import average_precision, metrics
from ringmo.evaluation.measuring import main_drawn, part
from ringmo.tasks.base import Evidence, Task

LEVEL = 1 - metrics.CONFIDENCE
# Of fewer than five places all may be worse by chance alone more often than LEVEL: 1/2^4 > 0.05.
FEWEST = 5
WHOLE = ""


@dataclass(frozen=True)
class Answers:
    """A model's evidence on the test tiles, and its classes' names by number, with those that only
    these tiles have."""

    evidence: Evidence
    classes: Sequence[str]


@dataclass(frozen=True)
class Tiles:
    """The test tiles. places: of each the place. groups: by what they are told apart (sensor, …),
    of each tile in which group it is."""

    places: Sequence[str]
    groups: Mapping[str, Sequence[str]]

    @property
    def drawn(self) -> Sequence[str]:
        """Of each tile what is drawn with it: its place; itself, where places are too few."""
        if len(set(self.places)) >= FEWEST:
            return self.places
        return [str(i) for i in range(len(self.places))]


@dataclass(frozen=True)
class Fall:
    """How a class or group did. what: `class river`, `sensor s1`. figure: its name; before and
    after: the champion's and the candidate's. p: of its not having fallen; allowed: how large that
    may be, at most, for it to count among all the others; surely: it does."""

    what: str
    figure: str
    before: float
    after: float
    p: float
    allowed: float
    surely: bool


@dataclass(frozen=True)
class Compared:
    """A candidate beside a champion. difference: how much better it is, whatever is better in this
    figure; low: the one-sided 95 % bound below it. falls: of all classes and groups that could be
    tested, the surest first; untested: how many could not."""

    candidate: float
    champion: float
    difference: float
    low: float
    falls: list[Fall]
    untested: int


def compared(
    task: Task,
    metric: str,
    candidate: Answers,
    champion: Answers,
    tiles: Tiles,
    samples: int,
) -> Compared:
    """Both models' figures of the same tiles, and how sure their difference is.

    Args:
        metric: one of the task's figures of the whole. samples: of the bootstrap; more are drawn
            where so many classes and groups are tested that these could not tell.

    A class or group has fallen if a paired bootstrap test says so after Holm's correction for
    their number, so that of twenty equal models one is blamed for any. Classes and groups of fewer
    than FEWEST places are not tested: nothing could be sure of them.

    Sources: Hall and Wilson, Biometrics 1991 (draws are centred on no difference); Holm,
    Scandinavian Journal of Statistics 1979.
    """
    drawn = tiles.drawn
    units = np.unique(np.asarray(drawn, dtype=str), return_inverse=True)[1]
    known = set(candidate.classes) & set(champion.classes)
    counts = {
        f"class {name}": len(np.unique(units[there]))
        for name, there in present(candidate)
        if name in known and there.any()
    }
    groups: dict[str, NDArray[np.int64]] = {}
    for column, names in tiles.groups.items():
        if len(set(names)) > 1:
            for name in sorted(set(names)):
                rows = np.flatnonzero(np.asarray(names) == name)
                groups[f"{column} {name}"] = rows
                counts[f"{column} {name}"] = len(np.unique(units[rows]))
    tested = {what: count for what, count in counts.items() if count >= FEWEST}
    # Where no draw at all says "not fallen", p is 1 in their number: twice what Holm asks for.
    samples = max(samples, round(2 * len(tested) / LEVEL))

    both = [
        _with_classes(task, metric, answers, drawn, samples) for answers in (candidate, champion)
    ]
    sign = -1 if metric in task.lower else 1
    difference = sign * (both[0][WHOLE] - both[1][WHOLE])
    falls = []
    for what, count in tested.items():
        if what in groups:
            rows = groups[what]
            names = [drawn[row] for row in rows.tolist()]
            after, before = (
                _drawn(task, metric, part(answers.evidence, rows), answers.classes, names, samples)
                for answers in (candidate, champion)
            )
            figure, gained = metric, sign * (after - before)
        else:
            if what not in both[0] or what not in both[1]:
                continue
            after, before = both[0][what], both[1][what]
            figure, gained = _class_figure(task, candidate), after - before
        falls.append((chance_of(gained, count), what, figure, float(before[0]), float(after[0])))
    return Compared(
        float(both[0][WHOLE][0]),
        float(both[1][WHOLE][0]),
        float(difference[0]),
        lower_bound(difference, len(set(drawn))),
        _holm(falls),
        len(counts) - len(tested),
    )


def value(task: Task, metric: str, answers: Answers) -> float:
    """A figure of all tiles."""
    return task.figures(answers.evidence, answers.classes).whole[metric]


def lower_bound(values: NDArray[np.float64], count: int) -> float:
    """`metrics.lower_bound` of a difference drawn from so many places, wider where they are few.

    A bootstrap of few places claims too much: its draws spread by sqrt((n - 1) / n) too little,
    and have the normal's tails where Student's are due. So a lower quantile is read.

    Source: Hesterberg, The American Statistician 2015, "expanded percentile interval".
    """
    from scipy.special import stdtrit

    if count < 2:
        return float("nan")
    tail = NormalDist().cdf(float(stdtrit(count - 1, LEVEL)) * (count / (count - 1)) ** 0.5)
    return metrics.lower_bound(values, 1 - tail)


def chance_of(gained: NDArray[np.float64], count: int) -> float:
    """How probable a fall as large as this is where there is none: one-sided, paired.

    Never less than 1 / 2^count: so often count places that are no worse all look worse.

    Args:
        gained: a difference from `metrics.drawn`, (1 + samples,). count: places that it is of.
    """
    fell, drawn = gained[0], gained[1:][~np.isnan(gained[1:])]
    if not fell < 0 or not len(drawn):
        return 1.0
    # Draws lie around the fall as falls by chance lie around 0.
    as_large = int((drawn - fell <= fell).sum())
    return max((1 + as_large) / (1 + len(drawn)), 0.5**count)


def _holm(found: list[tuple[float, str, str, float, float]]) -> list[Fall]:
    """What was found, the surest first, each told whether it holds among all."""
    found = sorted(found)
    held = holm([p for p, *_ in found])
    return [
        Fall(what, figure, before, after, p, allowed, surely)
        for (p, what, figure, before, after), (allowed, surely) in zip(found, held, strict=True)
    ]


def holm(chances: Sequence[float]) -> list[tuple[float, bool]]:
    """Of p-values, the smallest first: how large each may be, and whether it holds, so that all
    together are wrong at LEVEL (Holm's step-down procedure)."""
    held, going = [], True
    for i, p in enumerate(chances):
        allowed = LEVEL / (len(chances) - i)
        going = going and p <= allowed
        held.append((allowed, going))
    return held


def _with_classes(
    task: Task, metric: str, answers: Answers, names: Sequence[str], samples: int
) -> dict[str, NDArray[np.float64]]:
    """The figure of the whole, under WHOLE, and each class's leading one, draw by draw."""
    if "label" in answers.evidence and metric == "accuracy":
        return _of_scenes(answers, names, samples)
    evidence, lead = _lean(answers.evidence, metric), _class_figure(task, answers)

    def measure(weights: NDArray[np.int64] | None) -> Mapping[str, float]:
        found = task.figures(evidence, answers.classes, weights)
        rows = {f"class {row['class']}": row[lead] for row in found.classes}
        return {WHOLE: found.whole[metric], **rows}

    return metrics.drawn(measure, names, samples)


def _of_scenes(
    answers: Answers, names: Sequence[str], samples: int
) -> dict[str, NDArray[np.float64]]:
    """Accuracy and each class's F1 of scenes of one class, all draws at once: the same figures.

    They are ratios of counts, which are added up for whole places first and then for all draws in
    one product: of 10,000 tiles 50 times as fast.
    """
    of, count = answers.evidence, len(answers.classes)
    _, unit = np.unique(np.asarray(names, dtype=str), return_inverse=True)
    units = int(unit.max()) + 1

    def counts(number: NDArray[np.int64], counted: NDArray[Any] | None = None) -> NDArray[Any]:
        cells = np.bincount(unit * count + number, counted, units * count)
        return cells.reshape(units, count).astype(np.float32)

    hit, real = counts(of["predicted"], of["right"]), counts(of["label"])
    both = real + counts(of["predicted"])
    rows = [np.ones(units, np.int64), *metrics.place_draws(units, samples)]
    # Whole numbers below 2^24: exact in float32.
    drawn = np.stack(rows).astype(np.float32)
    hits, seen, all_ = ((drawn @ of).astype(np.float64) for of in (hit, real, both))
    f1 = np.where(seen > 0, 2 * hits / np.maximum(all_, 1), np.nan)
    found = {f"class {name}": f1[:, i] for i, name in enumerate(answers.classes) if seen[0, i]}
    return {WHOLE: hits.sum(1) / seen.sum(1), **found}


def _drawn(
    task: Task,
    metric: str,
    evidence: Evidence,
    classes: Sequence[str],
    names: Sequence[str],
    samples: int,
) -> NDArray[np.float64]:
    """The figure of these tiles alone, draw by draw: (1 + samples,)."""
    if metric == task.metric:
        return main_drawn(task, _lean(evidence, metric), classes, names, samples)
    return _with_classes(task, metric, Answers(evidence, classes), names, samples)[WHOLE]


def _class_figure(task: Task, answers: Answers) -> str:
    """What a class is judged by: the first figure that its row tells."""
    rows = task.figures(answers.evidence, answers.classes).classes
    return next((name for row in rows for name in row if name != "class"), "")


def _lean(evidence: Evidence, metric: str) -> Evidence:
    """The same evidence, so that a thousand draws of this figure and of classes cost less."""
    if "object_outcome" in evidence and metric == "map50":
        return average_precision.at_half(evidence)
    # Counts of pixels are summed as float64: once made so, and not for each draw.
    counts = ("confusion", "boundary")
    return {n: of.astype(np.float64) if n in counts else of for n, of in evidence.items()}


def present(answers: Answers) -> list[tuple[str, NDArray[np.bool_]]]:
    """Each class by name, and which tiles have it in truth: bool (tiles,). Of heights none."""
    evidence, names = answers.evidence, answers.classes
    if "truth" in evidence:
        there = evidence["truth"] > 0
    elif "confusion" in evidence:
        # The last row is of all classes that the model does not know.
        there = evidence["confusion"].sum(2)[:, :-1] > 0
    elif "objects" in evidence:
        there = np.zeros((len(evidence["objects"]), 0), np.bool_)
    else:
        return []
    there = np.pad(there, ((0, 0), (0, max(0, len(names) - there.shape[1]))))
    if "object_tile" in evidence:
        true = np.ones(len(evidence["object_tile"]), np.bool_)
        if "object_score" in evidence:
            true = np.isnan(evidence["object_score"])
        there[evidence["object_tile"][true], evidence["object_class"][true]] = True
    return [(name, there[:, i]) for i, name in enumerate(names)]
