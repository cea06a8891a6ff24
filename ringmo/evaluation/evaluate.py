"""Evaluation on the test tiles, beside from-scratch training, histograms and the commonest class.

No figure stands alone: each has its interval, by place, and what it must beat.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console
from ringmo.config import Config, Sensor
from ringmo.data import measures
from ringmo.data.colours import visible
from ringmo.data.loading import SelectedTiles, square
from ringmo.errors import BadInput
from ringmo.evaluation import histogram, metrics, pictures
from ringmo.registry import bundle
from ringmo.registry.bundle import Bundle
from ringmo.stage import Report, write_json
from ringmo.training.machine import choose_device
from ringmo.workspace import Workspace

CHUNK = 256  # tiles decoded at a time: a test split need not fit in memory


def evaluate(config: Config, workspace: Workspace, out: Path, task: str) -> Report:
    """Compare work/finetune-TASK/model with work/scratch-TASK/model on the test tiles.

    Writes out/predictions.parquet, confusion.png, worst.png and per_class.json.

    Raises:
        BadInput: no labelled test tiles, or a damaged bundle.
    """
    import pandas as pd

    selection = workspace.work("select") / f"{task}.parquet"
    test = SelectedTiles(workspace, selection, "test")
    train = SelectedTiles(workspace, selection, "train")
    if not len(test):
        raise BadInput(f"{selection} has no labelled test tiles: ingest more labelled imagery")
    device = str(choose_device(config.hardware))
    model = bundle.load(workspace.work(f"finetune@{task}") / "model", device)
    scratch = bundle.load(workspace.work(f"scratch@{task}") / "model", device)
    sensor = Sensor.model_validate(model.meta["sensors"][model.meta["sensor"]])

    truth = test.table["label"].astype(str).to_numpy()
    probabilities, from_scratch = _probabilities([model, scratch], test)
    classes = np.array(model.meta["classes"])
    predicted = classes[probabilities.argmax(1)]
    right = predicted == truth
    scratch_right = np.array(scratch.meta["classes"])[from_scratch.argmax(1)] == truth

    samples = config.evaluate.bootstrap_samples
    places = test.table["place"].astype(str).tolist()
    figures: dict[str, Any] = {"test_tiles": len(test), "bundle_hash": model.hash}
    for name, values in (
        ("test_accuracy", right.astype(float)),
        ("scratch_accuracy", scratch_right.astype(float)),
        ("difference_to_scratch", right.astype(float) - scratch_right),
    ):
        interval = metrics.bootstrap_mean(values, places, samples)
        figures[name] = round(interval.value, 4)
        figures[f"{name}_low"] = round(interval.low, 4)
        figures[f"{name}_high"] = round(interval.high, 4)

    # A class that only the test tiles have counts, and is always missed.
    names = sorted({*classes.tolist(), *truth.tolist()})
    matrix = metrics.confusion_matrix(
        _numbers(truth, names), _numbers(predicted, names), len(names)
    )
    by_class = metrics.per_class(matrix)
    figures["test_mean_f1"] = round(by_class.mean_f1, 4)
    rows: list[dict[str, Any]] = [
        {
            "class": name,
            "f1": round(float(by_class.f1[i]), 4),
            "precision": round(float(by_class.precision[i]), 4),
            "recall": round(float(by_class.recall[i]), 4),
            "tiles": int(by_class.support[i]),
        }
        for i, name in enumerate(names)
        if by_class.support[i]
    ]

    train_labels = train.table["label"].astype(str).to_numpy()
    kinds, counts = np.unique(train_labels, return_counts=True)
    figures["majority_accuracy"] = round(float((truth == kinds[counts.argmax()]).mean()), 4)
    if config.evaluate.histogram_baseline:
        guesses = histogram.fit_predict(
            histograms(train, sensor), _numbers(train_labels, names), histograms(test, sensor)
        )
        figures["histogram_accuracy"] = round(float((np.array(names)[guesses] == truth).mean()), 4)

    confidence = probabilities.max(1)
    scratch_names = scratch.meta["classes"]
    predictions = pd.DataFrame(
        {
            "key": test.table["key"],
            "label": truth,
            "predicted": predicted,
            "confidence": confidence,
            "scratch_predicted": np.array(scratch_names)[from_scratch.argmax(1)],
            **{f"model:{name}": probabilities[:, i] for i, name in enumerate(classes)},
            **{f"scratch:{name}": from_scratch[:, i] for i, name in enumerate(scratch_names)},
        }
    )
    predictions.to_parquet(out / "predictions.parquet", index=False)
    write_json(out / "per_class.json", rows)
    pictures.confusion(out / "confusion.png", matrix, names)
    worst = _worst(truth, predicted, confidence, config.evaluate.worst)
    pictures.contact_sheet(
        out / "worst.png",
        [visible(test.image(int(row)), sensor) for row in worst],
        [
            (f"is {truth[row]}", f"said {predicted[row]}", f"{confidence[row]:.0%} sure")
            for row in worst
        ],
        f"{len(worst)} mistakes, the surest first" if len(worst) else "no mistakes",
    )
    if figures["difference_to_scratch_low"] <= 0 <= figures["difference_to_scratch_high"]:
        note = "the difference to from-scratch training is within chance"
    else:
        better = figures["difference_to_scratch"] > 0
        note = f"the encoder makes it {'better' if better else 'worse'} than from scratch"
    return Report(f"evaluate@{task}", figures=figures, tables={"per_class": rows}, notes=[note])


def score(
    model: Bundle, workspace: Workspace, selection: Path, split: str = "test"
) -> dict[str, Any]:
    """How a scene bundle does on a split of a selection: what the gate compares.

    Classes are matched by name; a class that the bundle does not know is always wrong.

    Returns:
        accuracy, mean_f1, n, correct (list of bool) and keys (list of str), in the same order.

    Raises:
        BadInput: no labelled tiles in the split.
    """
    tiles = SelectedTiles(workspace, selection, split)
    if not len(tiles):
        raise BadInput(f"{selection} has no labelled {split} tiles")
    truth = tiles.table["label"].astype(str).to_numpy()
    predicted = np.array(model.meta["classes"])[_probabilities([model], tiles)[0].argmax(1)]
    names = sorted({*model.meta["classes"], *truth.tolist()})
    matrix = metrics.confusion_matrix(
        _numbers(truth, names), _numbers(predicted, names), len(names)
    )
    correct = predicted == truth
    return {
        "accuracy": float(correct.mean()),
        "mean_f1": metrics.per_class(matrix).mean_f1,
        "n": len(tiles),
        "correct": correct.tolist(),
        "keys": tiles.keys(np.arange(len(tiles))),
    }


def _probabilities(models: Sequence[Bundle], tiles: SelectedTiles) -> list[NDArray[np.float32]]:
    """Each model's probabilities (N, classes), every tile decoded once."""
    answers: list[list[NDArray[np.float32]]] = [[] for _ in models]
    with console.progress("evaluate", len(tiles)) as bar:
        for start in range(0, len(tiles), CHUNK):
            rows = range(start, min(start + CHUNK, len(tiles)))
            images = [tiles.image(row) for row in rows]
            for model, answer in zip(models, answers, strict=True):
                answer.append(model.predict(images))
            bar.advance(len(images))
    return [np.concatenate(answer) for answer in answers]


def _numbers(labels: NDArray[Any], names: list[str]) -> NDArray[np.int64]:
    """Positions of labels among sorted names."""
    return np.searchsorted(np.array(names), labels).astype(np.int64)


def histograms(tiles: SelectedTiles, sensor: Sensor) -> NDArray[np.float32]:
    """The yardstick's description (N, D) of every tile; pixels of more than 8 bits are scaled."""

    def describe(row: int) -> NDArray[np.float32]:
        image = tiles.image(row)
        if sensor.dtype != "uint8":
            image = measures.eight_bit(image, sensor)
        return histogram.describe(square(image, histogram.SIDE).permute(1, 2, 0).numpy())

    return np.stack([describe(row) for row in range(len(tiles))])


def _worst(
    truth: NDArray[Any], predicted: NDArray[Any], confidence: NDArray[np.float32], count: int
) -> NDArray[np.int64]:
    """The mistakes of which the model was surest."""
    wrong = np.flatnonzero(predicted != truth)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
