"""Evaluation of a task's model on the test tiles, beside what it must beat.

No figure stands alone: each has its interval, by place, and beside it the same model from scratch,
whoever knows the training labels and never looks, and for scenes colour and gradient histograms.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo import tasks
from ringmo.config import Config, Sensor
from ringmo.data import measures
from ringmo.data.colours import visible
from ringmo.data.loading import SECOND, SelectedTiles, padded, square
from ringmo.errors import BadInput
from ringmo.evaluation import calibration, histogram, metrics, pictures
from ringmo.evaluation.average_precision import IGNORED, RIGHT
from ringmo.evaluation.behaviour import TILES, behaviour
from ringmo.evaluation.measuring import answered, answers_of, batches, measured, trivial
from ringmo.evaluation.metrics import Interval, Measure
from ringmo.evaluation.pictures import Curve
from ringmo.monitoring import reference
from ringmo.registry import bundle
from ringmo.registry.bundle import Bundle
from ringmo.registry.register import REFERENCE
from ringmo.stage import Report, parameters, write_json
from ringmo.tasks.base import Evidence, Task
from ringmo.training.engine import file_hash
from ringmo.training.machine import choose_device
from ringmo.workspace import Workspace

# Ground sampling distances from which on, in metres, tiles are told apart.
GSD_M = (0.0, 0.5, 1.0, 3.0, 10.0)
ECE = "ece"  # the expected calibration error


def evaluate(config: Config, workspace: Workspace, out: Path, task: str) -> Report:
    """Compare work/finetune-TASK/model with work/scratch-TASK/model on the test tiles.

    Writes out/reference.parquet (what production is compared with: `monitoring.reference`),
    out/evidence.npz (what every figure comes from, an array a name, rows in the order of
    its `key`), per_class.json, predictions.parquet and pictures: best.png, typical.png,
    worst.png, confusion.png, precision_recall.png, reliability.png, behaviour.png, where the
    task has what they show.

    Figures: test_FIGURE of all the task's figures; of the main one scratch_FIGURE,
    trivial_FIGURE and difference_to_scratch, above 0 where the model is better; test_ece; drop_…
    for each change of the images. With _low and _high where there is an interval.

    Raises:
        BadInput: no labelled test tiles, or a damaged bundle.
    """
    kind = tasks.find(task)
    device = str(choose_device(config.hardware))
    selection = workspace.work("select") / f"{task}.parquet"
    if not len(SelectedTiles(workspace, selection, "test")):
        raise BadInput(f"{selection} has no labelled test tiles: ingest more labelled imagery")
    model, scratch = (
        bundle.load(workspace.work(f"{stage}@{task}") / "model", device)
        for stage in ("finetune", "scratch")
    )
    test, train = (model.tiles(workspace, selection, split) for split in ("test", "train"))

    flips, samples = config.evaluate.flips, config.evaluate.bootstrap_samples
    places = test.table["place"].astype(str).tolist()
    classes = model.samples(test).classes
    evidence = measured(model, test, flips=flips)
    from_scratch = measured(scratch, test, flips=flips, label="from scratch")
    scratch_classes = scratch.samples(test).classes

    drawn = metrics.drawn(_measure(kind, evidence, classes), places, samples)
    other = metrics.drawn(_measure(kind, from_scratch, scratch_classes), places, samples)
    better = drawn[kind.metric] - other[kind.metric]
    difference = metrics.interval(-better if kind.metric in kind.lower else better)
    without_looking = trivial(model, train, test)
    report = Report(f"evaluate@{task}")
    figures = report.figures
    figures |= {"test_tiles": len(test), "bundle_hash": model.hash}
    figures |= {"metric": kind.metric, "unit": kind.unit(kind.metric)}
    for name, values in drawn.items():
        figures |= rounded(f"test_{name}", metrics.interval(values))
    figures |= rounded(f"scratch_{kind.metric}", metrics.interval(other[kind.metric]))
    figures |= rounded("difference_to_scratch", difference)
    least = kind.figures(without_looking, classes).whole[kind.metric]
    figures[f"trivial_{kind.metric}"] = number(least)
    several = "truth" in evidence and "predicted" not in evidence
    if task == "scene" and config.evaluate.histogram_baseline and not several:
        figures["histogram_accuracy"] = number(_histogram_accuracy(model, train, test))

    changed = behaviour(model, test, evidence, samples, flips)
    for one in changed:
        figures |= rounded(f"drop_{one.change}".replace(" ", "_"), one.drop)

    whole = kind.figures(evidence, classes)
    report.tables = {
        "per_class": [_plain(row) for row in whole.classes],
        "per_sensor": _groups(kind, evidence, classes, test, "sensor", samples),
        "per_gsd": _groups(kind, evidence, classes, test, "gsd_m", samples),
        "behaviour": [
            {"change": one.change, kind.metric: number(one.value), **rounded("drop", one.drop)}
            for one in changed
        ],
    }
    if test.table["source_root"].nunique() > 1:
        groups = _groups(kind, evidence, classes, test, "source_root", samples)
        report.tables["per_source"] = groups
    write_json(out / "per_class.json", report.tables["per_class"])
    meta = model.meta
    of_model = {"model": meta["architecture"], "sensors": meta["sensors"]}
    of_model |= {f"finetune.{task}": meta["settings"]} if "settings" in meta else {}
    write_json(
        out / "params.json",
        parameters(
            report.stage,
            {**of_model, "evaluate": config.evaluate},
            sensor=meta["sensor"],
            tiles={"train": len(train), "test": len(test)},
            selection=file_hash(selection)[:16],
            encoder=str(meta["lineage"].get("encoder"))[:16],
            bundle=model.hash[:16],
        ),
    )
    keys = np.array(test.keys(np.arange(len(test))))
    np.savez_compressed(out / "evidence.npz", allow_pickle=False, key=keys, **evidence)
    reference.write(out / REFERENCE, model, workspace, selection)
    _predictions(out, model, scratch, test, evidence, from_scratch)
    _pictures(out, config, model, test, evidence)
    pictures.drops(
        out / "behaviour.png",
        [(_said_of(one.change), shown(one.drop, figures["unit"])) for one in changed],
        f"{task}: how much worse with changed images, {min(TILES, len(test))} test tiles, "
        f"95 % intervals",
        f"worse by, {'m' if figures['unit'] == 'm' else 'points'} of {kind.metric}",
    )
    report.notes = _said(kind, figures)
    return report


def score(
    model: Bundle, workspace: Workspace, selection: Path, split: str = "test", flips: int = 1
) -> dict[str, Any]:
    """How a task's bundle does on a split of a selection: what the gate compares.

    Classes are matched by name; a class that the bundle does not know is always wrong.

    Returns:
        All the task's figures by name, and n, the number of tiles.

    Raises:
        BadInput: no labelled tiles in the split, or an encoder's bundle.
    """
    tiles = model.tiles(workspace, selection, split)
    if not len(tiles):
        raise BadInput(f"{selection} has no labelled {split} tiles")
    kind, evidence = answers_of(model), measured(model, tiles, flips=flips)
    return {**kind.figures(evidence, model.samples(tiles).classes).whole, "n": len(tiles)}


def _measure(kind: Task, evidence: Evidence, classes: Sequence[str]) -> Measure:
    """The task's figures, and how well the model knows what it knows."""
    calibrated = calibration.reliability(evidence) is not None

    def measure(weights: NDArray[np.int64] | None) -> Mapping[str, float]:
        whole = kind.figures(evidence, classes, weights).whole
        if not calibrated:
            return whole
        found = calibration.reliability(evidence, weights)
        assert found is not None
        return {**whole, ECE: found.error}

    return measure


def _groups(
    kind: Task,
    evidence: Evidence,
    classes: Sequence[str],
    tiles: SelectedTiles,
    column: str,
    samples: int,
) -> list[dict[str, Any]]:
    """The figures of the tiles that are alike in a column: a row a group, with its main figure's
    interval."""
    named = tiles.table[column].map(gsd_band if column == "gsd_m" else str)
    rows = []
    for name in sorted(set(named), key=_order):
        chosen = (named == name).to_numpy()
        places = tiles.table["place"].astype(str)[chosen].tolist()

        def measure(
            weights: NDArray[np.int64] | None, chosen: NDArray[np.bool_] = chosen
        ) -> Mapping[str, float]:
            of_all = np.zeros(len(chosen), np.int64)
            of_all[chosen] = 1 if weights is None else weights
            return kind.figures(evidence, classes, of_all).whole

        drawn = metrics.drawn(measure, places, samples)
        row: dict[str, Any] = {column.removesuffix("_m"): name, "tiles": int(chosen.sum())}
        for figure, values in drawn.items():
            if figure == kind.metric:
                row |= rounded(figure, metrics.interval(values))
            else:
                row[figure] = number(values[0])
        rows.append(row)
    return rows


def gsd_band(gsd_m: float | None) -> str:
    """Between which distances of GSD_M a tile's lies."""
    if gsd_m is None or np.isnan(gsd_m):
        return "unknown"
    at = int(np.searchsorted(GSD_M, gsd_m, "right"))
    if at == len(GSD_M):
        return f"{GSD_M[-1]:g} m and more"
    return f"{GSD_M[at - 1]:g} to {GSD_M[at]:g} m"


def _order(name: str) -> tuple[float, str]:
    """Bands by their distances, `unknown` last, names by the alphabet."""
    first = name.split()[0]
    return (float(first) if first.replace(".", "").isdigit() else np.inf, name)


def number(value: float) -> float | None:
    """A figure as it is written down; None where there is nothing to measure."""
    return None if np.isnan(value) else round(float(value), 4) + 0.0  # no -0.0


def rounded(name: str, interval: Interval) -> dict[str, float | None]:
    """An interval as figures NAME, NAME_low and NAME_high."""
    ends = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: number(value) for key, value in ends.items()}


def shown(interval: Interval, unit: str) -> Interval:
    """An interval as people read it: of shares in %."""
    times = 1 if unit == "m" else 100
    return Interval(times * interval.value, times * interval.low, times * interval.high)


def _said_of(change: str) -> str:
    return f"{change}°" if change.startswith("turned") else change


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: number(v) if isinstance(v, float) else v for k, v in row.items()}


def _said(kind: Task, figures: Mapping[str, Any]) -> list[str]:
    """What the figures show, in sentences."""
    low, high = (figures[f"difference_to_scratch_{end}"] for end in ("low", "high"))
    if figures["difference_to_scratch"] is None:
        notes = ["the difference to from-scratch training could not be measured"]
    elif low is None or high is None:
        notes = ["the test tiles are of one place: no figure has an interval"]
    elif low <= 0 <= high:
        notes = ["the difference to from-scratch training is within chance"]
    else:
        better = figures["difference_to_scratch"] > 0
        notes = [f"the encoder makes it {'better' if better else 'worse'} than from scratch"]
    value, least = figures[f"test_{kind.metric}"], figures[f"trivial_{kind.metric}"]
    if value is not None and least is not None:
        ends = [figures[f"test_{kind.metric}_{end}"] for end in ("low", "high")]
        gains = [kind.gain(kind.metric, one) for one in (*ends, value) if one is not None]
        if min(gains) <= kind.gain(kind.metric, least):
            notes.append("it is not surely better than an answer without looking at the image")
    return notes


def _predictions(
    out: Path,
    model: Bundle,
    scratch: Bundle,
    test: SelectedTiles,
    evidence: Evidence,
    from_scratch: Evidence,
) -> None:
    """predictions.parquet, a row a tile: of scenes every class's probability by both models; of
    other tasks how well both answered it (`Task.quality`)."""
    import pandas as pd

    columns: dict[str, Any] = {"key": test.table["key"]}
    if "scores" in evidence and "label" in test.table:
        columns["label"] = test.table["label"].astype(str)
        for prefix, of, which in (("", evidence, model), ("scratch_", from_scratch, scratch)):
            columns[f"{prefix}predicted"] = _names_said(of, which.classes)
            if not prefix:
                columns["confidence"] = of["scores"].max(1)
        for name, of, which in (("model", evidence, model), ("scratch", from_scratch, scratch)):
            each = enumerate(which.classes)
            columns |= {f"{name}:{known}": of["scores"][:, i] for i, known in each}
    else:
        for prefix, of, which in (("", evidence, model), ("scratch_", from_scratch, scratch)):
            columns[f"{prefix}quality"] = answers_of(which).quality(of, which.classes)
    pd.DataFrame(columns).to_parquet(out / "predictions.parquet", index=False)


def _names_said(evidence: Evidence, classes: Sequence[str]) -> list[str]:
    """The class of each scene; of several those from a probability of one half, with `;`."""
    if "predicted" in evidence:
        return [classes[i] for i in evidence["predicted"]]
    return [
        ";".join(name for name, score in zip(classes, row, strict=True) if score >= 0.5)
        for row in evidence["scores"]
    ]


def _pictures(
    out: Path, config: Config, model: Bundle, test: SelectedTiles, evidence: Evidence
) -> None:
    """All pictures for which there is evidence, but for the behaviour's."""
    kind, count = answers_of(model), config.evaluate.worst
    classes = model.samples(test).classes
    quality = kind.quality(evidence, classes)
    known = np.flatnonzero(~np.isnan(quality))
    order = known[np.argsort(-quality[known], kind="stable")]
    chosen = sheets(order, count)
    if "right" in evidence and "confidence" in evidence:
        wrong = np.flatnonzero(~evidence["right"])
        chosen["worst"] = wrong[np.argsort(-evidence["confidence"][wrong], kind="stable")][:count]
    for name, rows in chosen.items():
        title = f"the {len(rows)} {name} tiles"
        if "scores" in evidence and "label" in test.table:
            if name == "worst" and "right" in evidence:
                title = f"{len(rows)} mistakes, the surest first" if len(rows) else "no mistakes"
            _scenes(out / f"{name}.png", model, test, evidence, rows, title)
        else:
            title = f"{title}: {kind.shows}"
            _answers(out / f"{name}.png", config, model, test, quality, rows, title)

    if "confusion" in evidence:
        matrix = evidence["confusion"].sum(0)
        true = [*model.classes, "others"]
        # Only where there are tiles with a class that the model does not know.
        there = len(true) if matrix[-1].any() else len(model.classes)
        pictures.confusion(
            out / "confusion.png", matrix[:there], true[:there], model.classes, "pixels"
        )
    elif "predicted" in evidence:
        matrix = metrics.confusion_matrix(
            evidence["truth"].argmax(1), evidence["predicted"], len(classes)
        )
        pictures.confusion(out / "confusion.png", matrix, classes, classes, "tiles")
    if curves := dict(_curves(evidence, classes)):
        pictures.precision_recall(out / "precision_recall.png", curves)
    if (found := calibration.reliability(evidence)) is not None:
        pictures.reliability(out / "reliability.png", found)


def sheets(order: NDArray[np.int64], count: int) -> dict[str, NDArray[np.int64]]:
    """The tiles on each sheet, of tiles from the best to the worst, at most so many.

    Of fewer tiles than two sheets hold, each half is on one: no tile is among the best and the
    worst.
    """
    middle, better = max(0, (len(order) - count) // 2), (len(order) + 1) // 2
    return {
        "best": order[: min(count, better)],
        "typical": order[middle : middle + count],
        "worst": order[better:][::-1][:count],
    }


def _scenes(
    path: Path,
    model: Bundle,
    test: SelectedTiles,
    evidence: Evidence,
    rows: NDArray[np.int64],
    title: str,
) -> None:
    """Tiles with their label and what the model says."""
    sensor = next(iter(model.sensors.values()))
    said, truth = _names_said(evidence, model.classes), test.table["label"].astype(str)
    pictures.contact_sheet(
        path,
        [visible(test.image(int(row)), sensor) for row in rows],
        [
            (
                f"is {truth.iloc[row]}",
                f"said {said[row] or 'none'}",
                f"{evidence['scores'][row].max():.0%} sure",
            )
            for row in rows
        ],
        title,
    )


def _answers(
    path: Path,
    config: Config,
    model: Bundle,
    test: SelectedTiles,
    quality: NDArray[np.float64],
    rows: NDArray[np.int64],
    title: str,
) -> None:
    """Tiles with their truth and the answer, as the task shows them."""
    kind, samples = answers_of(model), model.samples(test)
    sensor = next(iter(model.sensors.values()))
    sheets = []
    for sample in batches(model, samples, rows):
        answer = answered(model, sample, config.evaluate.flips)
        for at, row in enumerate(sample.rows):
            tiles = [test.image(int(row))]
            if SECOND in kind.parts:
                tiles.append(test.other(SECOND, int(row)))
            images = [_square(visible(tile, sensor)) for tile in tiles]
            sheets.append(kind.shown(images, answer, sample, at, samples.classes))
    unit = kind.unit(kind.metric)
    said = [
        f"{-quality[row]:.2f} m off" if unit == "m" else f"quality {100 * quality[row]:.0f} %"
        for row in rows
    ]
    sources = [str(test.table["source"].iloc[row]) for row in rows]
    captions = [f"{s}, {o}" for s, o in zip(said, sources, strict=True)]
    pictures.answers(path, sheets, captions, title, kind.legend(samples.classes))


def _square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 1 or 3) as a padded square (S, S, 3)."""
    return padded(np.repeat(picture, 3, 2) if picture.shape[2] == 1 else picture)


def _curves(evidence: Evidence, classes: Sequence[str]) -> Iterator[tuple[str, Curve]]:
    """Precision over recall of each class that the tiles have; of objects at an overlap of 0.5."""
    if "scores" in evidence and "truth" in evidence:
        for i in range(evidence["scores"].shape[1]):
            if evidence["truth"][:, i].any():
                scores, true = evidence["scores"][:, i], evidence["truth"][:, i]
                yield classes[i], _curve(scores, true, int(true.sum()))
    if "scores_pixels" in evidence:
        pixels = evidence["scores_pixels"].sum(0, dtype=np.int64)
        for i, (every, right) in enumerate(pixels.transpose(0, 2, 1)):
            if right.any():
                yield classes[i], _binned_curve(every, right)
    if "object_outcome" in evidence:
        outcome, score = evidence["object_outcome"][:, 0, 0], evidence["object_score"]
        for i in np.unique(evidence["object_class"]):
            counted = (evidence["object_class"] == i) & (outcome != IGNORED)
            answers = counted & ~np.isnan(score)
            there = int((counted & np.isnan(score)).sum())
            if there:
                yield classes[i], _curve(score[answers], outcome[answers] == RIGHT, there, True)


def _curve(scores: NDArray[Any], right: NDArray[Any], there: int, falling: bool = False) -> Curve:
    """Precision over recall of answers (n,), right or not, of which `there` could be found.

    Args:
        falling: precision is the best at this recall or beyond, as is usual for objects.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order].astype(np.float64))
    precision = hits / np.arange(1, len(hits) + 1)
    # Of equally sure answers none comes first: the curve has a point where the score changes.
    last = np.flatnonzero(np.diff(scores[order].astype(np.float64), append=-np.inf))
    recall, precision = hits[last] / there, precision[last]
    if falling:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    return Curve(recall, precision, float((steps * precision).sum()))


def _binned_curve(every: NDArray[np.int64], right: NDArray[np.int64]) -> Curve:
    """Precision over recall of answers counted by score, all and those that are right: (bins,).

    Answers in one bin count as equally sure.
    """
    filled = np.flatnonzero(every)[::-1]
    hits, answers = np.cumsum(right[filled]), np.cumsum(every[filled])
    recall, precision = hits / right.sum(), hits / answers
    steps = np.diff(recall, prepend=0.0)
    return Curve(recall, precision, float((steps * precision).sum()))


def _histogram_accuracy(model: Bundle, train: SelectedTiles, test: SelectedTiles) -> float:
    """The yardstick's accuracy."""
    sensor = next(iter(model.sensors.values()))
    truth, known = (tiles.table["label"].astype(str).to_numpy() for tiles in (test, train))
    names = np.unique(known)
    guesses = histogram.fit_predict(
        histograms(train, sensor), np.searchsorted(names, known), histograms(test, sensor)
    )
    return float((names[guesses] == truth).mean())


def histograms(tiles: SelectedTiles, sensor: Sensor) -> NDArray[np.float32]:
    """The yardstick's description (N, D) of every tile; pixels of more than 8 bits are scaled."""

    def describe(row: int) -> NDArray[np.float32]:
        image = tiles.image(row)
        if sensor.dtype != "uint8":
            image = measures.eight_bit(image, sensor)
        return histogram.describe(square(image, histogram.SIDE).permute(1, 2, 0).numpy())

    return np.stack([describe(row) for row in range(len(tiles))])
