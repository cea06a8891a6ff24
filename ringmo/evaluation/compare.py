"""The comparison: what the encoders of several methods are worth, at equal compute.

Every method pre-trains one encoder on the same images, for as many steps. Then, for each, on the
same test tiles: k-NN and a linear probe on its frozen features with all labels, and fine-tunings
with few labels a class, several seeds each. Beside them stand the same model from scratch, with
the same fine-tuning; from scratch with the pre-training's images added to its own, which is what
equal compute means to somebody who has no encoder yet; and the histogram yardstick, here by the
same linear probe as the features (`ringmo evaluate` fixes its penalty and comes out lower).

Fewer labels are trained on more often: a small selection is repeated to the length of the largest,
so that every fine-tuning has the same updates, epochs and choices by validation accuracy.

Every piece is kept in .ringmo/compare/ under a digest of what it depends on. A killed comparison
goes on, and one that adds a seed or a label count does only what is new.
"""

import json
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo import config as configuration
from ringmo import console
from ringmo.config import Config
from ringmo.data import store
from ringmo.data.loading import SelectedTiles
from ringmo.data.selection import columns, fewer_labels, resolved
from ringmo.errors import BadInput
from ringmo.evaluation import metrics, pictures, probes
from ringmo.evaluation.evaluate import histograms
from ringmo.evaluation.metrics import Interval
from ringmo.models.backbone import Encoder, encoder
from ringmo.registry import bundle
from ringmo.stage import REVISIONS, Report, forget_checkpoints, run_stage, whole_folder, write_json
from ringmo.training.engine import file_hash
from ringmo.training.finetune import finetune
from ringmo.training.machine import choose_device
from ringmo.training.pretrain import pretrain
from ringmo.workspace import Workspace

REVISION = 1  # raised when results change for the same inputs
TASK: Literal["scene"] = "scene"
BATCH = 256  # tiles answered at a time
SCRATCH, EQUAL_TOTAL, HISTOGRAMS = "scratch", "scratch, equal total", "histograms"
SHOWN = {"ringmo": "RingMo", "simmim": "SimMIM", "mae": "MAE"}
PRETRAINING, KNN, LINEAR = "pretrain", "k-NN", "linear"
SMALL = 5_000_000  # parameters under which a result says little about the papers' models

# Right answers, 1 or 0, of S trainings on N test tiles: (S, N).
Right = NDArray[np.float64]


@dataclass(frozen=True)
class Piece:
    """One pre-training, fine-tuning or probe: `work` writes its rows of results to `file`.

    `images` are those it trains on: its share of the time.
    """

    name: str
    file: Path
    images: int
    work: Callable[[], None]


def run(config: Config, workspace: Workspace) -> Report:
    """The comparison as `ringmo compare` runs it: results in work/compare/ and in MLflow.

    MLflow gets one run in experiment `compare`; the same comparison again is the same run. Where
    it does not answer, the results stand in work/compare/ and are sent later.
    """
    from ringmo.registry.tracker import Forwarder

    with Forwarder(workspace, "compare", {}) as forwarder:
        report = run_stage(workspace, "compare", lambda out: compare(config, workspace, out))
        forwarder.finish(report, workspace.work("compare"))
    return report


def compare(config: Config, workspace: Workspace, out: Path) -> Report:
    """Do what of the comparison is missing; write comparison.png, comparison.txt, results.parquet.

    A cell is the accuracy on the test tiles, the mean over the seeds. Its interval, and that of a
    difference, draws seeds and whole places with replacement (`metrics.bootstrap_mean`): it holds
    for other labels, another order and other tiles, but not for another encoder, since each
    method has one. Differences are paired: by tile, and by seed, which fixes the labels.
    `seed_spread` beside each mean is the standard deviation over the seeds alone.

    Raises:
        BadInput: no selection, no labels in two classes, or no test tiles.
        SystemExit: 143 on SIGTERM, after a checkpoint.
    """
    comparison = _Comparison(config, workspace)
    results = _done(comparison.pieces())

    right: dict[tuple[str, str], Right] = {}
    for one in results:
        if one["right"] is not None:
            at = one["row"], one["column"]
            right[at] = np.array([*right.get(at, []), one["right"]], float)
    places = comparison.test.table["place"].astype(str).tolist()
    samples = config.evaluate.bootstrap_samples
    cells = {at: metrics.bootstrap_mean(values, places, samples) for at, values in right.items()}
    first = SHOWN[config.compare.methods[0]]
    differences = {
        (row, column): metrics.bootstrap_mean(right[first, column] - values, places, samples)
        for (row, column), values in right.items()
        if row != first
    }

    report = Report("compare", run_dir=str(comparison.folder.relative_to(workspace.root)))
    report.figures = comparison.facts(results)
    for (row, column), interval in cells.items():
        name = f"{row.lower().replace(',', '')}/{column}".replace(" ", "_")
        for ending, value in _rounded(interval).items():
            report.figures[f"{name}_{ending}".removesuffix("_value")] = value
    report.tables["accuracy"] = [
        {
            "row": row,
            "column": column,
            **_rounded(interval),
            "seeds": len(right[row, column]),
            "seed_spread": round(float(right[row, column].mean(1).std(ddof=1)), 4)
            if len(right[row, column]) > 1
            else None,
        }
        for (row, column), interval in cells.items()
    ]
    report.tables["differences"] = [
        {"of": first, "to": row, "column": column, **_rounded(interval), "says": _says(interval)}
        for (row, column), interval in differences.items()
    ]
    results = [{name: v for name, v in one.items() if name != "right"} for one in results]
    report.tables["results"] = results
    report.notes = _said(differences, first) + comparison.caveats(report.figures, results)

    import pandas as pd

    pd.DataFrame(results).to_parquet(out / "results.parquet", index=False)
    (out / "comparison.txt").write_text(text(report) + "\n")
    counts = config.compare.labels_per_class
    rows = list(dict.fromkeys(row for row, _ in cells))
    pictures.accuracy_by_labels(
        out / "comparison.png",
        counts,
        {row: [cells[row, _column(count)] for count in counts] for row in rows},
        HISTOGRAMS,
        f"Fine-tuned with few labels: {report.figures['parameters'] / 1e6:.2f} M parameters at "
        f"{report.figures['pixels']} pixels\nmean of {_seeds(report.figures)}, "
        f"{report.figures['test_tiles']} test tiles, 95 % intervals",
    )
    return report


def text(report: Report) -> str:
    """The comparison as a person reads it: the table, the differences, and what they say."""
    accuracy, differences = report.tables["accuracy"], report.tables["differences"]
    columns = list(dict.fromkeys(cell["column"] for cell in accuracy))

    def grid(rows: list[dict[str, Any]], name: str, show: Callable[[dict[str, Any]], str]) -> str:
        cells = {(row[name], row["column"]): show(row) for row in rows}
        names = dict.fromkeys(row[name] for row in rows)
        lines = [[n, *(cells.get((n, column), "-") for column in columns)] for n in names]
        return console.table(lines, ["", *columns])

    def value(cell: dict[str, Any]) -> str:
        return f"{100 * cell['value']:.1f} ({100 * cell['low']:.1f} to {100 * cell['high']:.1f})"

    def difference(cell: dict[str, Any]) -> str:
        chance = " ~" if cell["low"] <= 0 <= cell["high"] else ""
        low, high = 100 * cell["low"], 100 * cell["high"]
        return f"{100 * cell['value']:+.1f} ({low:+.1f} to {high:+.1f}){chance}"

    figures = report.figures
    parts = [
        f"Accuracy in % on {figures['test_tiles']} test tiles of {figures['classes']} classes "
        f"(95 % interval), mean of {_seeds(figures)}:",
        grid(accuracy, "row", value),
        f"{differences[0]['of']} minus the others, in points (95 % interval; ~ within chance):",
        grid(differences, "to", difference),
        "\n".join(textwrap.fill(note, 100, subsequent_indent="  ") for note in report.notes),
    ]
    return "\n\n".join(parts)


class _Comparison:
    """What all pieces share, and how each is made."""

    def __init__(self, config: Config, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        selection = workspace.work("select") / f"{TASK}.parquet"
        self.train, self.val, self.test = (
            SelectedTiles(workspace, selection, split) for split in ("train", "val", "test")
        )
        self.classes = sorted({str(label) for label in self.train.table["label"]})
        if len(self.classes) < 2 or not len(self.test):
            raise BadInput(
                f"{selection} has {len(self.train)} labelled tiles of {len(self.classes)} classes "
                f"to train on and {len(self.test)} to test on: ingest imagery in two or more "
                f"class folders"
            )
        self.truth = self._numbers(self.test)
        self.sensor, self.sensors = config.select.sensor, resolved(config, workspace)
        self.device = choose_device(config.hardware)
        self.kept = workspace.state / "compare"
        self.kept.mkdir(parents=True, exist_ok=True)
        self.selection_hash = file_hash(selection)
        unlabelled = workspace.work("select") / "pretrain.parquet"
        self.pretrained_by = configuration.digest(
            REVISION,
            REVISIONS["pretrain"],
            file_hash(unlabelled),
            config.model,
            config.pretrain,
            {name: sensor.described() for name, sensor in self.sensors.items()},
        )

        # Every fine-tuning's selection is as long as the largest, and never less than a batch.
        settings = config.finetune[TASK]
        largest = fewer_labels(self.train.table, max(config.compare.labels_per_class), 0)
        self.length = max(len(largest), settings.batch_size)
        self.epoch_images = self.length // settings.batch_size * settings.batch_size
        wanted = config.compare.finetune_steps * settings.batch_size
        self.epochs = max(1, round(wanted / self.epoch_images))
        seen = len(SelectedTiles(workspace, unlabelled, "train"))
        batch = config.pretrain.batch_size
        self.pretrain_images = seen // batch * batch * config.pretrain.epochs
        self.more_epochs = round(self.pretrain_images / self.epoch_images)

        # The comparison's own folder holds what goes to MLflow.
        sections = {
            "model": config.model,
            "pretrain": config.pretrain,
            f"finetune.{TASK}": settings,
            "compare": config.compare,
        }
        params = {name: section.model_dump(mode="json") for name, section in sections.items()}
        whole = configuration.digest(self.pretrained_by, self.selection_hash, params)
        self.folder = workspace.run_dir("compare", whole)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "params.json", configuration.flatten(params))

    def pieces(self) -> list[Piece]:
        """Everything to do, in order: encoders, probes, fine-tunings seed by seed, histograms."""
        chosen = self.config.compare
        pieces = [self._encoder(method) for method in chosen.methods]
        pieces += [self._probes(method) for method in (*chosen.methods, None)]
        for seed in chosen.seeds:
            for labels in chosen.labels_per_class:
                pieces += [
                    self._finetuning(method, labels, seed) for method in (*chosen.methods, None)
                ]
                if chosen.scratch_equal_total:
                    pieces.append(self._finetuning(None, labels, seed, equal_total=True))
        pieces.append(self._histograms(None, None))
        pieces += [
            self._histograms(labels, seed)
            for seed in chosen.seeds
            for labels in chosen.labels_per_class
        ]
        return pieces

    def _encoder_folder(self, method: str) -> Path:
        return (
            self.kept / f"encoder-{method}-{configuration.digest(self.pretrained_by, method)[:16]}"
        )

    def _encoder(self, method: str) -> Piece:
        """The encoder of a method, kept as a bundle."""
        folder, last = self._encoder_folder(method), self.config.pretrain.epochs
        # Pictures and accuracies on the way cost time and change nothing.
        changes = {"method": method, "picture_every": last, "knn_every": last}
        config = _changed(self.config, {f"pretrain.{k}": v for k, v in changes.items()})

        def work() -> None:
            with whole_folder(folder) as out:
                report = pretrain(config, self.workspace, out)
                row = _row(SHOWN[method], PRETRAINING, None, None, report)
                write_json(out / "rows.json", [row])
            forget_checkpoints(self.workspace, report)

        name = f"{SHOWN[method]}, pre-training"
        return Piece(name, folder / "rows.json", self.pretrain_images, work)

    def _probes(self, method: str | None) -> Piece:
        """k-NN and linear probe, with all labels, on a method's or on random features."""
        row = SHOWN[method] if method else SCRATCH
        key = self._encoder_folder(method).name if method else self._random_key()
        file = self._file(f"probes-{method or SCRATCH}", key)

        def work() -> None:
            if method:
                read = bundle.load(self._encoder_folder(method) / "encoder", str(self.device))
                model, meta = read.model, read.meta
            else:
                model, meta = self._random()
            train, val, test = (
                torch.from_numpy(self._answers(model, meta, tiles))
                for tiles in (self.train, self.val, self.test)
            )
            labels, val_labels = (
                torch.from_numpy(self._numbers(tiles)) for tiles in (self.train, self.val)
            )
            guesses = {
                KNN: probes.knn(train, labels, test),
                LINEAR: probes.linear_probe(
                    train, labels, val, val_labels, test, len(self.classes)
                ),
            }
            rows = [
                _row(row, column, None, None, right=guess.numpy() == self.truth)
                for column, guess in guesses.items()
            ]
            write_json(file, rows)

        return Piece(f"{row}, probes", file, 0, work)

    def _finetuning(
        self, method: str | None, labels: int, seed: int, equal_total: bool = False
    ) -> Piece:
        """A fine-tuning with few labels, from a method's encoder or from scratch (None).

        equal_total: as long as pre-training and fine-tuning together.
        """
        row = SHOWN[method] if method else EQUAL_TOTAL if equal_total else SCRATCH
        epochs = self.epochs + (self.more_epochs if equal_total else 0)
        settings = self.config.finetune[TASK]
        changes = {
            "epochs": epochs,
            "warmup_epochs": min(settings.warmup_epochs, epochs - 1),
            "seed": seed,
        }
        config = _changed(self.config, {f"finetune.{TASK}.{k}": v for k, v in changes.items()})
        file = self._file(
            f"{method or SCRATCH}-{labels}-{seed}",
            self._encoder_folder(method).name if method else self._random_key(),
            REVISIONS["finetune"],
            self.selection_hash,
            self.length,
            labels,
            config.finetune[TASK],
        )

        def work() -> None:
            scratch = self.kept / f".{file.stem}"
            scratch.mkdir(exist_ok=True)
            self._write_selection(scratch / "selection.parquet", labels, seed)
            report = finetune(
                config,
                self.workspace,
                scratch,
                TASK,
                from_scratch=method is None,
                encoder=self._encoder_folder(method) / "encoder" if method else None,
                selection=scratch / "selection.parquet",
            )
            tuned = bundle.load(scratch / "model", str(self.device))
            answers = self._answers(tuned.model, tuned.meta, self.test)
            known = np.searchsorted(self.classes, tuned.meta["classes"])
            right = known[answers.argmax(1)] == self.truth
            write_json(file, [_row(row, _column(labels), labels, seed, report, right)])
            forget_checkpoints(self.workspace, report)
            shutil.rmtree(scratch)

        name = f"{row}, {_column(labels)}, seed {seed}"
        return Piece(name, file, epochs * self.epoch_images, work)

    def _histograms(self, labels: int | None, seed: int | None) -> Piece:
        """Logistic regression on histograms, with few labels or (None) with all."""
        file = self._file(f"{HISTOGRAMS}-{labels}-{seed}", self.selection_hash)

        def work() -> None:
            train, val, test = self._described
            keys = self.train.table["key"]
            if labels is not None and seed is not None:
                table = fewer_labels(self.train.table, labels, seed)
                chosen = torch.tensor(keys.isin(table["key"]).tolist())
            else:
                chosen = torch.ones(len(keys), dtype=torch.bool)
            numbers, val_numbers = self._numbers(self.train), self._numbers(self.val)
            guesses = probes.linear_probe(
                train[chosen],
                torch.from_numpy(numbers)[chosen],
                val,
                torch.from_numpy(val_numbers),
                test,
                len(self.classes),
            )
            column = LINEAR if labels is None else _column(labels)
            right = guesses.numpy() == self.truth
            write_json(file, [_row(HISTOGRAMS, column, labels, seed, right=right)])

        name = "all labels" if labels is None else f"{_column(labels)}, seed {seed}"
        return Piece(f"{HISTOGRAMS}, {name}", file, 0, work)

    def _file(self, name: str, *key: Any) -> Path:
        return self.kept / f"{name}-{configuration.digest(REVISION, *key)[:16]}.json"

    def _random(self) -> tuple[Encoder, dict[str, Any]]:
        """An untrained encoder, and what `bundle.answer` must know of it."""
        sensor = self.sensors[self.sensor]
        torch.manual_seed(self.config.pretrain.seed)
        model = encoder(self.config.model, {self.sensor: len(sensor.bands)}).to(self.device).eval()
        sensors = {self.sensor: sensor.described()}
        return model, {"sensors": sensors, "image_size": self.config.model.image_size}

    def _random_key(self) -> str:
        sensor = self.sensors[self.sensor].described()
        return configuration.digest(self.config.model, sensor, self.config.pretrain.seed)

    def _answers(
        self, model: nn.Module, meta: dict[str, Any], tiles: SelectedTiles
    ) -> NDArray[np.float32]:
        """Features of an encoder, or a classifier's probabilities, of every tile, uncropped."""
        order = np.arange(len(tiles))
        answers = [
            bundle.features(model, batch.images.to(self.device), meta, self.sensor)
            for batch in tiles.batches(order, BATCH, bundle.read_size(meta))
        ]
        return np.concatenate(answers) if answers else np.zeros((0, 1), np.float32)

    def _numbers(self, tiles: SelectedTiles) -> NDArray[np.int64]:
        """Class numbers of tiles; -1 for a class that no training tile has: always missed."""
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number.get(str(label), -1) for label in tiles.table["label"]], np.int64)

    def _write_selection(self, path: Path, labels: int, seed: int) -> None:
        """The training tiles of this seed, repeated to the common length, and all of val."""
        import pandas as pd

        few = fewer_labels(self.train.table, labels, seed)
        repeated = few.iloc[np.resize(np.arange(len(few)), self.length)]
        store.write_table(path, pd.concat([repeated, self.val.table]), columns(self.config, TASK))

    @cached_property
    def _described(self) -> tuple[Tensor, Tensor, Tensor]:
        """Histograms of train, val and test tiles."""
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(histograms(tiles, self.sensors[self.sensor]))
            for tiles in (self.train, self.val, self.test)
        )

    def facts(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """What was compared, and how much of it."""
        chosen, model = self.config.compare, self._random()[0]
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "pixels": self.config.model.image_size,
            "seeds": len(chosen.seeds),
            "classes": len(self.classes),
            "train_tiles": len(self.train),
            "test_tiles": len(self.test),
            "pretrain_images": self.pretrain_images,
            "finetune_images": self.epochs * self.epoch_images,
            "minutes": round(sum(one["seconds"] or 0 for one in results) / 60, 1),
            "generated": self.train.generated,
        }

    def caveats(self, facts: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
        """What a reader must know so as not to take the table for more than it is."""
        chosen, batch = self.config.compare, self.config.finetune[TASK].batch_size
        took = {one["row"]: one["seconds"] for one in results if one["column"] == PRETRAINING}
        seconds = ", ".join(f"{row} {value:.0f} s" for row, value in took.items())
        millions = facts["parameters"] / 1e6
        said = [
            f"Equal compute: each pre-training saw {facts['pretrain_images']:,} images "
            f"({self.config.pretrain.epochs} epochs; {seconds}), each fine-tuning "
            f"{facts['finetune_images']:,} ({self.epochs * self.epoch_images // batch:,} updates), "
            f"however few its labels. `{SCRATCH}` had no pre-training, so less compute in all"
            + (
                f"; `{EQUAL_TOTAL}` was fine-tuned for both together."
                if chosen.scratch_equal_total
                else "."
            ),
            f"k-NN and linear: on frozen features, all {facts['train_tiles']:,} training labels; "
            f"`{SCRATCH}` is an untrained encoder there. `{HISTOGRAMS}`: the linear probe on "
            f"colour and gradient histograms, with the labels of its column.",
            f"All {len(self.val)} validation tiles choose the epoch and the probes' penalty, also "
            f"where labels are few.",
            "One encoder a method: the intervals hold for other labels and tiles, not for another "
            "pre-training.",
        ]
        counts = self.train.table["label"].astype(str).value_counts()
        for labels in chosen.labels_per_class:
            short = int((counts < labels).sum())
            if short:
                said.append(
                    f"{_column(labels)}: {short} of {len(counts)} classes have fewer "
                    f"(the least {counts.min()}) and gave all they have."
                )
        if facts["parameters"] < SMALL:
            said.append(
                f"This is small: {millions:.2f} M parameters, {facts['pixels']} pixels, "
                f"{facts['minutes']:.1f} min of training. It says how the methods compare at "
                f"this size, not how good they are at the papers'."
            )
        if facts["generated"]:
            said.append("The imagery is made up: this says nothing about real imagery.")
        return said


def _done(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Do the pieces that are not there yet; the rows of all."""
    rows: list[dict[str, Any]] = []
    left = sum(piece.images for piece in pieces if not piece.file.exists())
    done, seconds = 0, 0.0
    for number, piece in enumerate(pieces, 1):
        if not piece.file.exists():
            started = time.monotonic()
            piece.work()
            seconds += time.monotonic() - started
            done, left = done + piece.images, left - piece.images
            minutes = f"; about {seconds / done * left / 60:.0f} min left" if done and left else ""
            accuracies = ", ".join(
                f"{one['column']} {one['accuracy']:.1%}"
                for one in _read(piece.file)
                if one["accuracy"] is not None
            )
            console.note(
                f"compare {number}/{len(pieces)}: {piece.name}: {accuracies or 'done'}{minutes}"
            )
        rows += _read(piece.file)
    return rows


def _read(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def _row(
    row: str,
    column: str,
    labels: int | None,
    seed: int | None,
    report: Report | None = None,
    right: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """One line of results.parquet, and which test tiles were right."""
    figures = report.figures if report else {}
    return {
        "row": row,
        "column": column,
        "labels": labels,
        "seed": seed,
        "accuracy": None if right is None else round(float(right.mean()), 4),
        "val_accuracy": figures.get("val_accuracy"),
        "steps": figures.get("steps"),
        "seconds": figures.get("seconds_training"),
        "right": None if right is None else right.astype(int).tolist(),
    }


def _column(labels: int) -> str:
    return f"{labels} label{'s' if labels > 1 else ''}"


def _seeds(figures: dict[str, Any]) -> str:
    return f"{figures['seeds']} seed{'s' if figures['seeds'] > 1 else ''}"


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(interval).items()}


def _says(interval: Interval) -> str:
    """A difference in plain words."""
    if interval.low <= 0 <= interval.high:
        return "within chance"
    return (
        f"{'better' if interval.value > 0 else 'worse'} by {abs(100 * interval.value):.1f} points"
    )


def _said(differences: dict[tuple[str, str], Interval], first: str) -> list[str]:
    """What the differences show: a sentence for each row that the first is compared with."""
    said = []
    for other in dict.fromkeys(row for row, _ in differences):
        verdicts: dict[str, list[str]] = {"better": [], "worse": [], "within chance": []}
        for (row, column), interval in differences.items():
            if row == other:
                words = _says(interval)
                kind = words if words in verdicts else words.split()[0]
                points = "" if kind == words else f" ({100 * interval.value:+.1f})"
                verdicts[kind].append(column + points)
        parts = [f"{kind}: {', '.join(columns)}" for kind, columns in verdicts.items() if columns]
        said.append(f"{first} against {other}: {'; '.join(parts)}.")
    return said


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with values at dotted keys replaced, and checked again."""
    values = config.model_dump(mode="json", by_alias=True)
    for key, value in changes.items():
        place = values
        *parents, last = key.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return Config.check(values, "compare")
