"""A task's model on tiles with truth: the evidence that all figures come from.

tiles → sample (→ changed) → answer (→ on turned images too, turned back) → evidence
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ringmo import console
from ringmo.data.loading import SelectedTiles
from ringmo.errors import BadInput
from ringmo.evaluation import metrics
from ringmo.registry.bundle import Bundle, read_size
from ringmo.tasks.base import Evidence, Objects, Sample, Task, joined
from ringmo.tasks.samples import Samples, clockwise
from ringmo.training.augmentation import turned

# Tiles answered at a time hold no more pixels than this: 64 of 256 × 256.
PIXELS = 64 * 256 * 256
MOST = 64
# evaluate.flips → numbers of `training.augmentation.turned`.
TURNS = {1: (0,), 2: (0, 4), 4: (0, 2, 4, 6), 8: tuple(range(8))}

Change = Callable[[Sample], Sample]


def measured(
    bundle: Bundle,
    tiles: SelectedTiles,
    *,
    change: Change | None = None,
    flips: int = 1,
    rows: NDArray[np.int64] | None = None,
    label: str = "evaluate",
) -> Evidence:
    """What the metrics need of a model's answers to tiles, in their order.

    Args:
        tiles: those that `bundle.tiles` gives. change: made of each sample before it is answered.
        flips: 1, 2, 4 or 8 positions of each tile that are answered and put together. rows: only
            these tiles. label: of the progress bar.

    Raises:
        BadInput: an encoder's bundle, or an unreadable tile.
    """
    task = answers_of(bundle)
    samples = bundle.samples(tiles)
    rows = np.arange(len(tiles)) if rows is None else rows
    parts = []
    with console.progress(label, len(rows)) as bar:
        for sample in batches(bundle, samples, rows):
            if change is not None:
                sample = change(sample)
            parts.append(task.evidence(answered(bundle, sample, flips), sample))
            bar.advance(len(sample))
    return joined(parts) if parts else {}


def main_drawn(
    task: Task, evidence: Evidence, classes: Sequence[str], places: Sequence[str], samples: int
) -> NDArray[np.float64]:
    """`metrics.drawn` of the task's main figure alone: (1 + samples,)."""
    if task.metric == "accuracy" and "right" in evidence:  # a mean over tiles: much faster
        return metrics.mean_drawn(evidence["right"].astype(np.float64), places, samples)

    def measure(weights: NDArray[np.int64] | None) -> Mapping[str, float]:
        return {task.metric: task.figures(evidence, classes, weights).whole[task.metric]}

    return metrics.drawn(measure, places, samples)[task.metric]


def trivial(bundle: Bundle, train: SelectedTiles, tiles: SelectedTiles) -> Evidence:
    """The evidence of whoever knows the training labels and never looks at an image."""
    task = answers_of(bundle)
    parts = []
    for sample in batches(bundle, bundle.samples(tiles), np.arange(len(tiles))):
        parts.append(
            task.evidence(task.trivial(train, sample, bundle.classes, bundle.settings), sample)
        )
    return joined(parts) if parts else {}


def answers_of(bundle: Bundle) -> Task:
    """The bundle's task.

    Raises:
        BadInput: it is an encoder.
    """
    if bundle.task is None:
        raise BadInput(f"{bundle.folder} is an encoder, which answers nothing: fine-tune it first")
    return bundle.task


def batches(bundle: Bundle, samples: Samples, rows: NDArray[np.int64]) -> Iterator[Sample]:
    """These tiles, whole, at the size at which the model is asked, as few at a time as must be."""
    size = read_size(bundle.meta)
    together = max(1, min(MOST, PIXELS // size**2))
    for batch in samples.tiles.batches(rows, together, size):
        yield samples.whole(batch)


@torch.inference_mode()
def answered(bundle: Bundle, sample: Sample, flips: int = 1) -> object:
    """What a model says of a sample, perhaps in several positions."""
    task, turns = answers_of(bundle), TURNS[flips]
    answers = [
        task.answer(bundle.model, {name: turned(of, turn) for name, of in sample.images.items()})
        for turn in turns
    ]
    return answers[0] if len(turns) == 1 else task.turned_back(answers, turns)


def turned_sample(sample: Sample, number: int) -> Sample:
    """A sample in another of the eight positions of `training.augmentation.turned`, with its truth.

    Objects stay clockwise.
    """
    side = sample.size

    def moved(objects: Objects) -> Objects:
        x, y = objects.corners.unbind(-1)
        if number >= 4:
            x = side - x
        for _ in range(number % 4):  # a quarter turn: what is on the right comes to the top
            x, y = y, side - x
        return Objects(clockwise(torch.stack((x, y), -1)), objects.labels, objects.difficult)

    return Sample(
        {name: turned(of, number) for name, of in sample.images.items()},
        sample.rows,
        sample.labels,
        None if sample.mask is None else turned(sample.mask, number),
        None if sample.height is None else turned(sample.height, number),
        None if sample.objects is None else [moved(each) for each in sample.objects],
    )


def part(evidence: Evidence, rows: Sequence[int] | NDArray[np.int64]) -> Evidence:
    """The evidence of these tiles alone, in this order."""
    rows = np.asarray(rows, np.int64)
    chosen = {name: of[rows] for name, of in evidence.items() if not name.startswith("object_")}
    if "object_tile" in evidence:
        tile = evidence["object_tile"]
        position = np.full(max([-1, *rows.tolist(), *tile.tolist()]) + 1, -1)
        position[rows] = np.arange(len(rows))
        kept = np.flatnonzero(position[tile] >= 0)
        kept = kept[np.argsort(position[tile[kept]], kind="stable")]
        chosen |= {name: of[kept] for name, of in evidence.items() if name.startswith("object_")}
        chosen["object_tile"] = position[tile[kept]]
    return chosen
