"""The comparison: what ways to begin are worth for each task, at equal compute.

Every method pre-trains one encoder on the same images, for as many steps; others are there already:
timm's weights from ImageNet, a registered encoder, a bundle's folder. Then, for each task and on
its test tiles: fine-tunings with few labels, several seeds each, and for scenes k-NN and a linear
probe on frozen features with all labels. Beside them stand the same model from scratch, with the
same fine-tuning; from scratch with the pre-training's images added to its own, which is what equal
compute means to somebody who has no encoder yet; whoever knows the training labels and never looks
at an image; and for scenes the histogram yardstick, here by the same linear probe as the features
(`ringmo evaluate` fixes its penalty and comes out lower).

Fewer labels are trained on more often: a small selection is repeated to the length of the largest,
so that every fine-tuning has the same updates, epochs and choices by validation tiles.

Every piece is kept in .ringmo/compare/ under a digest of what it depends on: its figures, and the
evidence of every test tile. A killed comparison goes on, and one that adds a seed, a task or a
label count does only what is new.
"""

import hashlib
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo import config as configuration
from ringmo import console, tasks
from ringmo.config import Config
from ringmo.data import store
from ringmo.data.loading import SelectedTiles
from ringmo.data.selection import columns, fewer_labels, resolved
from ringmo.errors import BadInput
from ringmo.evaluation import imagenet, measuring, metrics, pictures, probes
from ringmo.evaluation.evaluate import histograms, number, rounded, shown
from ringmo.evaluation.metrics import Interval
from ringmo.models.backbone import Encoder, encoder
from ringmo.registry import bundle
from ringmo.registry.bundle import Bundle
from ringmo.stage import (
    REVISIONS,
    Report,
    forget_checkpoints,
    parameters,
    run_stage,
    whole_folder,
    write_json,
)
from ringmo.tasks.base import Evidence
from ringmo.training.engine import file_hash
from ringmo.training.finetune import finetune
from ringmo.training.machine import choose_device
from ringmo.training.pretrain import pretrain
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

REVISION = 2  # raised when results change for the same inputs
SCRATCH, EQUAL_TOTAL = "scratch", "scratch, equal total"
HISTOGRAMS, BLIND = "histograms", "without looking"
SHOWN = {"ringmo": "RingMo", "simmim": "SimMIM", "mae": "MAE", "imagenet": "ImageNet"}
METHODS = ("ringmo", "simmim", "mae")  # of pre-training
PRETRAINING, KNN, LINEAR = "pretrain", "k-NN", "linear"
SMALL = 5_000_000  # parameters under which a result says little about the papers' models

Draws = NDArray[np.float64]  # what `metrics.drawn` gives of one figure


@dataclass(frozen=True)
class Piece:
    """One pre-training, fine-tuning or probe: `work` writes its rows of results to `file`.

    `images` are those it trains on: its share of the time.
    """

    name: str
    file: Path
    images: int
    work: Callable[[], None]


@dataclass(frozen=True)
class Start:
    """Where a fine-tuning begins. name: as in params.yaml. folder: of the encoder's bundle; None:
    from scratch. key: what a result depends on."""

    name: str
    folder: Path | None
    key: str

    @property
    def row(self) -> str:
        return SHOWN.get(self.name, self.name)


def run(config: Config, workspace: Workspace) -> Report:
    """The comparison as `ringmo compare` runs it: results in work/compare/ and in MLflow.

    MLflow gets one run in experiment `compare`; the same comparison again is the same run. Where
    it does not answer, the results stand in work/compare/ and are sent later.
    """
    from ringmo.registry.forward import Forwarder

    with Forwarder(workspace, "compare", {}) as forwarder:
        report = run_stage(workspace, "compare", lambda out: compare(config, workspace, out))
        forwarder.finish(report, workspace.work("compare"))
    return report


def compare(config: Config, workspace: Workspace, out: Path) -> Report:
    """Do what of the comparison is missing; write comparison.png, comparison.txt, results.parquet.

    A cell is the task's main figure on its test tiles, the mean over the seeds. Its interval, and
    that of a difference, draws seeds and whole places with replacement: it holds for other labels,
    another order and other tiles, but not for another encoder, since each row has one. Differences
    are paired: by tile, and by seed, which fixes the labels; above 0 the first row is better.
    `seed_spread` beside each mean is the standard deviation over the seeds alone.

    Raises:
        BadInput: no selection, nothing to train a task on or to test it on, or an encoder that
            is not there.
        SystemExit: 143 on SIGTERM, after a checkpoint.
    """
    comparison = _Comparison(config, workspace)
    results = _done(comparison.pieces())
    first = comparison.first

    report = Report("compare", run_dir=str(comparison.folder.relative_to(workspace.root)))
    report.figures = comparison.facts(results)
    report.tables["tasks"] = [task.facts() for task in comparison.tasks]
    measures: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    panels: dict[str, dict[str, dict[int, Interval]]] = {}
    for task in comparison.tasks:
        drawn = comparison.drawn(task, results)
        sign, unit = (-1 if task.metric in task.kind.lower else 1), task.kind.unit(task.metric)
        about = {"task": task.name, "figure": task.metric, "unit": unit}
        lines: dict[str, dict[int, Interval]] = {}
        for (row, column), trainings in drawn.items():
            interval = metrics.interval(metrics.over_trainings(trainings))
            whole = np.array([values[0] for values in trainings])
            measures.append(
                {
                    **about,
                    "row": row,
                    "column": column,
                    **_ends(interval),
                    "seeds": len(trainings),
                    "seed_spread": number(whole.std(ddof=1)) if len(whole) > 1 else None,
                }
            )
            name = f"{task.name}/{row.lower().replace(',', '')}/{column}".replace(" ", "_")
            report.figures |= rounded(name, interval)
            if row != first and (first, column) in drawn:
                differences.append(
                    {
                        **about,
                        "of": first,
                        "to": row,
                        "column": column,
                        **_difference(drawn[first, column], trainings, sign, unit),
                    }
                )
            for labels in task.labels:
                if labels is not None and task.column(labels) == column:
                    lines.setdefault(row, {})[labels] = shown(interval, unit)
        if lines:
            label = f"{task.name}: {task.metric}, {unit}"
            panels[f"{label}|{task.counted}"] = lines
    report.tables |= {"measures": measures, "differences": differences}
    results = [{k: v for k, v in one.items() if k != "evidence"} for one in results]
    report.tables["results"] = results
    report.notes = _said(differences) + comparison.caveats(report, results)

    import pandas as pd

    pd.DataFrame(results).to_parquet(out / "results.parquet", index=False)
    (out / "comparison.txt").write_text(text(report) + "\n")
    tested = ", ".join(f"{task.name} {len(task.test)}" for task in comparison.tasks)
    pictures.by_labels(
        out / "comparison.png",
        panels,
        f"Fine-tuned with few labels: {report.figures['parameters'] / 1e6:.2f} M parameters at "
        f"{report.figures['pixels']} pixels\nmean of {_seeds(report.figures)}, "
        f"test tiles: {tested}; 95 % intervals",
        HISTOGRAMS,
    )
    return report


def text(report: Report) -> str:
    """The comparison as a person reads it: the tables, the differences, and what they say."""
    parts = []
    for task in report.tables["tasks"]:
        measures, differences = (
            [row for row in report.tables[name] if row["task"] == task["task"]]
            for name in ("measures", "differences")
        )
        unit = task["unit"]
        said = "metres" if unit == "m" else "%"
        of = f"of {task['classes']} classes " if task["classes"] else ""
        parts += [
            f"{task['task']}: {task['figure']} in {said} on {task['test_tiles']} test tiles {of}"
            f"(95 % interval), mean of {_seeds(report.figures)}"
            f"{'; less is better' if task['lower'] else ''}:",
            _grid(measures, "row", unit),
        ]
        if differences:
            points = "metres" if unit == "m" else "points"
            parts += [
                f"{differences[0]['of']} against the others, in {points}: above 0 it is better "
                f"(95 % interval; ~ within chance):",
                _grid(differences, "to", unit, signed=True),
            ]
    notes = [textwrap.fill(note, 100, subsequent_indent="  ") for note in report.notes]
    return "\n\n".join([*parts, "\n".join(notes)])


def _grid(rows: list[dict[str, Any]], name: str, unit: str, signed: bool = False) -> str:
    columns = list(dict.fromkeys(row["column"] for row in rows))
    cells = {(row[name], row["column"]): _cell(row, unit, signed) for row in rows}
    names = dict.fromkeys(row[name] for row in rows)
    lines = [[n, *(cells.get((n, column), "-") for column in columns)] for n in names]
    return console.table(lines, ["", *columns])


def _cell(cell: Mapping[str, Any], unit: str, signed: bool = False) -> str:
    value, low, high = (cell[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    times, form = (1, ".2f") if unit == "m" else (100, ".1f")
    form = f"{'+' if signed else ''}{form}"
    if low is None or high is None:
        return f"{times * value:{form}}"
    chance = " ~" if signed and low <= 0 <= high else ""
    return f"{times * value:{form}} ({times * low:{form}} to {times * high:{form}}){chance}"


class _Task:
    """One task of the comparison: its tiles, and how long everything is trained on them."""

    def __init__(self, config: Config, workspace: Workspace, name: str) -> None:
        self.name, self.kind = name, tasks.find(name)
        self.metric, self.settings = self.kind.metric, config.finetune[name]
        self.selection = workspace.work("select") / f"{name}.parquet"
        first, *beside = (config.select.sensor, *config.select.beside)
        self.train, self.val, self.test = (
            SelectedTiles(workspace, self.selection, split, first, task=self.kind, beside=beside)
            for split in ("train", "val", "test")
        )
        try:
            self.classes = self.kind.classes(self.train, self.settings)
        except BadInput as error:
            raise BadInput(f"{self.selection}: {error}") from None
        if not len(self.test):
            raise BadInput(
                f"{self.selection} has no labelled test tiles for {name}: ingest more labelled "
                f"imagery"
            )
        self.selection_hash = file_hash(self.selection)
        self.columns = columns(config, name)
        self.places = self.test.table["place"].astype(str).tolist()
        self.probed = name == "scene" and not self.settings.multi_label
        asked = config.compare.labels.get(name, [])
        self.labels: list[int | None] = [*asked] or [None]

        # Every fine-tuning's selection is as long as the largest, and never less than a batch.
        batch = self.settings.batch_size
        largest = self.fewer(max(asked, default=None), 0)
        self.length = max(len(largest), batch)
        self.epoch_images = self.length // batch * batch
        self.epochs = max(1, round(config.compare.finetune_steps * batch / self.epoch_images))

    @property
    def counted(self) -> str:
        """What its numbers of labels count."""
        return "labels per class" if self.name == "scene" else "training tiles"

    def column(self, labels: int | None) -> str:
        one = "label" if self.name == "scene" else "tile"
        return f"all {one}s" if labels is None else f"{labels} {one}{'s' if labels > 1 else ''}"

    def fewer(self, labels: int | None, seed: int) -> "pd.DataFrame":
        """The training tiles of a number of labels and a seed; fewer are always among more."""
        table = self.train.table
        if labels is None:
            return table
        if self.name == "scene":
            return fewer_labels(table, labels, seed)
        order = table["key"].map(lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
        return table.loc[order.sort_values().index[:labels].sort_values()]

    def write_selection(self, path: Path, labels: int | None, seed: int) -> None:
        """The training tiles of this seed, repeated to the common length, and all of val."""
        import pandas as pd

        few = self.fewer(labels, seed)
        repeated = few.iloc[np.resize(np.arange(len(few)), self.length)]
        store.write_table(path, pd.concat([repeated, self.val.table]), self.columns)

    def numbers(self, tiles: SelectedTiles) -> NDArray[np.int64]:
        """Class numbers of scenes; -1 for a class that no training tile has: always missed."""
        known = {name: i for i, name in enumerate(self.classes)}
        return np.array([known.get(str(label), -1) for label in tiles.table["label"]], np.int64)

    def guessed(self, guesses: Tensor) -> Evidence:
        """The evidence of scenes of which only the class is said: (N,) numbers of classes."""
        said, count = guesses.cpu().numpy(), len(self.classes)
        truth = self.numbers(self.test)
        # One class more, of those that only test tiles have.
        there = np.eye(count + 1, dtype=np.int64)[np.where(truth < 0, count, truth)]
        scores = np.eye(count, dtype=np.float32)[said]
        return {
            "truth": there,
            "scores": scores,
            "label": there.argmax(1),
            "predicted": said,
            "right": said == truth,
            "confidence": scores.max(1),
        }

    def value(self, evidence: Evidence, classes: Sequence[str]) -> float:
        return self.kind.figures(evidence, classes).whole[self.metric]

    def facts(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "figure": self.metric,
            "unit": self.kind.unit(self.metric),
            "lower": self.metric in self.kind.lower,
            "classes": len(self.classes),
            "train_tiles": len(self.train),
            "val_tiles": len(self.val),
            "test_tiles": len(self.test),
            "finetune_images": self.epochs * self.epoch_images,
        }


class _Comparison:
    """What all pieces share, and how each is made."""

    def __init__(self, config: Config, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        self.left_out: list[str] = []
        self.tasks = [_Task(config, workspace, name) for name in self._task_names()]
        self.sensor, self.sensors = config.select.sensor, resolved(config, workspace)
        self.device = choose_device(config.hardware)
        self.kept = workspace.state / "compare"
        self.kept.mkdir(parents=True, exist_ok=True)
        unlabelled = workspace.work("select") / "pretrain.parquet"
        self.pretrained_by = configuration.digest(
            1,  # of the encoders, which REVISION leaves alone
            REVISIONS["pretrain"],
            file_hash(unlabelled),
            config.model,
            config.pretrain,
            {name: sensor.described() for name, sensor in self.sensors.items()},
        )
        seen = len(SelectedTiles(workspace, unlabelled, "train"))
        batch = config.pretrain.batch_size
        self.pretrain_images = seen // batch * batch * config.pretrain.epochs
        self.starts = [
            start for name in config.compare.initialisations if (start := self._start(name))
        ]
        if not self.starts:
            raise BadInput(
                f"compare.initialisations: nothing is left to compare: {' '.join(self.left_out)}"
            )
        self.first = self.starts[0].row

        # The comparison's own folder holds what goes to MLflow.
        sections: dict[str, Any] = {
            "model": config.model,
            "pretrain": config.pretrain,
            **{f"finetune.{task.name}": task.settings for task in self.tasks},
            "compare": config.compare,
        }
        params = {name: section.model_dump(mode="json") for name, section in sections.items()}
        whole = configuration.digest(
            REVISION,
            self.pretrained_by,
            [task.selection_hash for task in self.tasks],
            [start.key for start in self.starts],
            params,
        )
        self.folder = workspace.run_dir("compare", whole)
        self.folder.mkdir(parents=True, exist_ok=True)
        count = {
            split: sum(len(getattr(task, split)) for task in self.tasks)
            for split in ("train", "val", "test")
        }
        about = parameters("compare", params, sensor=self.sensor, tiles=count, revision=REVISION)
        write_json(self.folder / "params.json", about)

    def _task_names(self) -> list[str]:
        """The tasks asked for; where none are, those of the workspace that have labels."""
        if self.config.compare.tasks is not None:
            return self.config.compare.tasks
        selections = {
            name: SelectedTiles(self.workspace, self.workspace.work("select") / f"{name}.parquet")
            for name in self.config.tasks
        }
        labelled = [name for name, tiles in selections.items() if len(tiles)]
        if not labelled:
            return self.config.tasks[:1]  # which says what is missing
        without = [name for name in self.config.tasks if name not in labelled]
        self.left_out += [f"{name} is left out: no tile has labels of it." for name in without]
        return labelled

    def _start(self, name: str) -> Start | None:
        """Where an initialisation begins; None where it cannot be had."""
        if name == SCRATCH:
            sensor = self.sensors[self.sensor].described()
            key = configuration.digest(self.config.model, sensor, self.config.pretrain.seed)
            return Start(name, None, key)
        if name in METHODS:
            # Whether the model can do it is asked before anything runs.
            _changed(self.config, {"pretrain.method": name})
            key = configuration.digest(self.pretrained_by, name)[:16]
            return Start(name, self.kept / f"encoder-{name}-{key}" / "encoder", key)
        if name == "imagenet":
            found = imagenet.weights(self.config.model, self.sensors[self.sensor], self.workspace)
            if isinstance(found, str):
                self.left_out.append(f"ImageNet is left out: {found}.")
                return None
            sensor = self.sensors[self.sensor].described()
            key = configuration.digest(file_hash(found.file), found.model, sensor)[:16]
            return Start(name, self.kept / f"encoder-{name}-{key}" / "encoder", key)
        return self._given(name)

    def _given(self, name: str) -> Start:
        """An encoder that is there: a registered version, or a bundle's folder."""
        from ringmo.inference.model import open_bundle

        folder = self.workspace.root / name
        there = (folder / bundle.META).is_file()
        found = open_bundle(folder if there else name, workspace=self.workspace.root)
        meta = found.meta
        if found.task is not None:
            raise BadInput(
                f"compare.initialisations: {name} is a model for {meta['kind']}: name an encoder"
            )
        if self.sensor not in meta["sensors"]:
            raise BadInput(
                f"compare.initialisations: {name} reads {', '.join(meta['sensors'])}, not "
                f"`{self.sensor}` (select.sensor)"
            )
        return Start(name, found.folder, meta["weights_sha256"])

    @property
    def methods(self) -> list[Start]:
        return [start for start in self.starts if start.name in METHODS]

    def pieces(self) -> list[Piece]:
        """Everything to do, in order: encoders, then task by task probes, fine-tunings seed by
        seed, and yardsticks."""
        chosen = self.config.compare
        pieces = [self._encoder(start) for start in self.methods]
        pieces += [self._imagenet(start) for start in self.starts if start.name == "imagenet"]
        for task in self.tasks:
            if task.probed:
                pieces += [self._probes(task, start) for start in self.starts]
            for seed in chosen.seeds:
                for labels in task.labels:
                    pieces += [self._finetuning(task, s, labels, seed) for s in self.starts]
                    if chosen.scratch_equal_total and self.methods:
                        scratch = self._start(SCRATCH)
                        assert scratch is not None
                        pieces.append(self._finetuning(task, scratch, labels, seed, True))
            if task.probed:
                pieces.append(self._histograms(task, None, None))
                pieces += [
                    self._histograms(task, labels, seed)
                    for seed in chosen.seeds
                    for labels in task.labels
                    if labels is not None
                ]
            pieces.append(self._blind(task))
        return pieces

    def _encoder(self, start: Start) -> Piece:
        """The encoder of a method, kept as a bundle."""
        assert start.folder is not None
        folder, last = start.folder.parent, self.config.pretrain.epochs
        # Pictures and accuracies on the way cost time and change nothing.
        changes = {"method": start.name, "picture_every": last, "knn_every": last}
        changes["refresh"] = "full"  # a method's encoder is trained, whatever the chain takes
        config = _changed(self.config, {f"pretrain.{k}": v for k, v in changes.items()})

        def work() -> None:
            with whole_folder(folder) as out:
                report = pretrain(config, self.workspace, out)
                row = _row(None, start.row, PRETRAINING, report=report)
                write_json(out / "rows.json", [row])
            forget_checkpoints(self.workspace, report)

        name = f"{start.row}, pre-training"
        return Piece(name, folder / "rows.json", self.pretrain_images, work)

    def _imagenet(self, start: Start) -> Piece:
        """timm's weights as an encoder's bundle."""
        assert start.folder is not None
        folder = start.folder.parent

        def work() -> None:
            sensor = self.sensors[self.sensor]
            found = imagenet.weights(self.config.model, sensor, self.workspace)
            assert not isinstance(found, str)  # it was there when the comparison began
            with whole_folder(folder) as out:
                imagenet.write(out / "encoder", found, self.sensor, sensor)
                write_json(out / "rows.json", [])

        return Piece(f"{start.row}, weights", folder / "rows.json", 0, work)

    def _probes(self, task: _Task, start: Start) -> Piece:
        """k-NN and linear probe, with all labels, on an encoder's or on random features."""
        file = self._file(task, f"probes-{_plain(start.name)}", start.key, task.selection_hash)

        def work() -> None:
            if start.folder is not None:
                read = bundle.load(start.folder, str(self.device))
                model, meta = read.encoder, read.meta
            else:
                model, meta = self._random()
            train, val, test = (
                torch.from_numpy(probes.tile_features(model, meta, tiles, self.sensor, self.device))
                for tiles in (task.train, task.val, task.test)
            )
            labels, val_labels = (
                torch.from_numpy(task.numbers(tiles)) for tiles in (task.train, task.val)
            )
            guesses = {
                KNN: probes.knn(train, labels, test),
                LINEAR: probes.linear_probe(
                    train, labels, val, val_labels, test, len(task.classes)
                ),
            }
            self._write(
                file,
                [
                    (_row(task, start.row, column), task.guessed(guess), _with_others(task.classes))
                    for column, guess in guesses.items()
                ],
            )

        return Piece(f"{task.name}: {start.row}, probes", file, 0, work)

    def _finetuning(
        self, task: _Task, start: Start, labels: int | None, seed: int, equal_total: bool = False
    ) -> Piece:
        """A fine-tuning with few labels.

        equal_total: as long as pre-training and fine-tuning together.
        """
        row = EQUAL_TOTAL if equal_total else start.row
        more = round(self.pretrain_images / task.epoch_images) if equal_total else 0
        epochs = task.epochs + more
        changes = {
            "epochs": epochs,
            "warmup_epochs": min(task.settings.warmup_epochs, epochs - 1),
            "seed": seed,
        }
        config = _changed(self.config, {f"finetune.{task.name}.{k}": v for k, v in changes.items()})
        file = self._file(
            task,
            f"{_plain(start.name)}-{'all' if labels is None else labels}-{seed}",
            start.key,
            REVISIONS["finetune"],
            task.selection_hash,
            task.length,
            labels,
            config.select.beside,
            config.finetune[task.name],
        )

        def work() -> None:
            scratch = self.kept / f".{file.stem}"
            scratch.mkdir(exist_ok=True)
            task.write_selection(scratch / "selection.parquet", labels, seed)
            report = finetune(
                config,
                self.workspace,
                scratch,
                task.name,
                from_scratch=start.folder is None,
                encoder=start.folder,
                selection=scratch / "selection.parquet",
            )
            tuned = bundle.load(scratch / "model", str(self.device))
            tiles = tuned.tiles(self.workspace, task.selection, "test")
            evidence = measuring.measured(tuned, tiles, flips=config.evaluate.flips)
            about = _row(task, row, task.column(labels), labels, seed, report)
            self._write(file, [(about, evidence, tuned.samples(tiles).classes)])
            forget_checkpoints(self.workspace, report)
            shutil.rmtree(scratch)

        name = f"{task.name}: {row}, {task.column(labels)}, seed {seed}"
        return Piece(name, file, epochs * task.epoch_images, work)

    def _histograms(self, task: _Task, labels: int | None, seed: int | None) -> Piece:
        """Logistic regression on histograms, with few labels or (None) with all."""
        file = self._file(task, f"{HISTOGRAMS}-{labels}-{seed}", task.selection_hash)

        def work() -> None:
            train, val, test = self._described[task.name]
            chosen = torch.ones(len(train), dtype=torch.bool)
            if labels is not None and seed is not None:
                few = task.fewer(labels, seed)["key"]
                chosen = torch.tensor(task.train.table["key"].isin(few).tolist())
            guesses = probes.linear_probe(
                train[chosen],
                torch.from_numpy(task.numbers(task.train))[chosen],
                val,
                torch.from_numpy(task.numbers(task.val)),
                test,
                len(task.classes),
            )
            column = LINEAR if labels is None else task.column(labels)
            about = _row(task, HISTOGRAMS, column, labels, seed)
            self._write(file, [(about, task.guessed(guesses), _with_others(task.classes))])

        name = "all labels" if labels is None else f"{task.column(labels)}, seed {seed}"
        return Piece(f"{task.name}: {HISTOGRAMS}, {name}", file, 0, work)

    def _blind(self, task: _Task) -> Piece:
        """Whoever knows all training labels and never looks at an image: a row for all columns."""
        shown = {task.column(labels): labels for labels in task.labels}
        size = task.settings.sized(self.config.model).image_size
        settings = task.settings.model_dump(mode="json")
        sensors = {
            name: self.sensors[name].described()
            for name in (self.sensor, *self.config.select.beside)
        }
        meta = {
            "kind": task.name,
            "classes": task.classes,
            "settings": settings,
            "sensors": sensors,
            "sensor": self.sensor,
            "image_size": size,
            "resize": task.settings.test_resize or size,
        }
        file = self._file(task, _plain(BLIND), task.selection_hash, meta, list(shown))

        def work() -> None:
            nobody = Bundle(self.kept, meta, nn.Identity(), "", str(self.device), {})
            evidence = measuring.trivial(nobody, task.train, task.test)
            classes = nobody.samples(task.test).classes
            about = [_row(task, BLIND, column, labels) for column, labels in shown.items()]
            self._write(file, [(one, evidence, classes) for one in about])

        return Piece(f"{task.name}: {BLIND}", file, 0, work)

    def _file(self, task: _Task, name: str, *key: Any) -> Path:
        digest = configuration.digest(REVISION, *key)[:16]
        return self.kept / f"{task.name}-{name}-{digest}.json"

    def _write(
        self, file: Path, rows: Sequence[tuple[dict[str, Any], Evidence, Sequence[str]]]
    ) -> None:
        """Rows with their evidence beside them; the rows last, since they say that all is there."""
        written = []
        for at, (row, evidence, classes) in enumerate(rows):
            path = file.with_name(f"{file.stem}-{at}.npz")
            temporary = path.with_suffix(".tmp.npz")
            np.savez_compressed(temporary, allow_pickle=False, **evidence)
            temporary.replace(path)
            task = next(task for task in self.tasks if task.name == row["task"])
            value = number(task.value(evidence, classes))
            beside = {"file": path.name, "classes": list(classes)}
            written.append({**row, "value": value, "evidence": beside})
        write_json(file, written)

    def drawn(
        self, task: _Task, results: Sequence[dict[str, Any]]
    ) -> dict[tuple[str, str], list[Draws]]:
        """The main figure on all test tiles and on each draw of places, for each training of a
        row and column. Those of one task belong together, draw by draw."""
        cells: dict[tuple[str, str], list[Draws]] = {}
        samples = self.config.evaluate.bootstrap_samples
        for one in results:
            if one["task"] == task.name:
                with np.load(self.kept / one["evidence"]["file"], allow_pickle=False) as read:
                    evidence = {name: read[name] for name in read.files}
                values = measuring.main_drawn(
                    task.kind, evidence, one["evidence"]["classes"], task.places, samples
                )
                cells.setdefault((one["row"], one["column"]), []).append(values)
        return cells

    def _random(self) -> tuple[Encoder, dict[str, Any]]:
        """An untrained encoder, and what `bundle.features` must know of it."""
        sensor = self.sensors[self.sensor]
        torch.manual_seed(self.config.pretrain.seed)
        model = encoder(self.config.model, {self.sensor: len(sensor.bands)}).to(self.device).eval()
        sensors = {self.sensor: sensor.described()}
        return model, {"sensors": sensors, "image_size": self.config.model.image_size}

    @cached_property
    def _described(self) -> dict[str, list[Tensor]]:
        """Histograms of train, val and test tiles of the tasks that have them."""
        return {
            task.name: [
                torch.from_numpy(histograms(tiles, self.sensors[self.sensor]))
                if len(tiles)
                else torch.zeros(0, 1)
                for tiles in (task.train, task.val, task.test)
            ]
            for task in self.tasks
            if task.probed
        }

    def facts(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """What was compared, and how much of it."""
        model = self._random()[0]
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "pixels": self.config.model.image_size,
            "seeds": len(self.config.compare.seeds),
            "pretrain_images": self.pretrain_images if self.methods else 0,
            "minutes": round(sum(one["seconds"] or 0 for one in results) / 60, 1),
            "generated": any(task.train.generated for task in self.tasks),
        }

    def caveats(self, report: Report, results: list[dict[str, Any]]) -> list[str]:
        """What a reader must know so as not to take the tables for more than they are."""
        chosen, facts, said = self.config.compare, report.figures, list(self.left_out)
        took = {one["row"]: one["seconds"] for one in results if one["column"] == PRETRAINING}
        if took:
            seconds = ", ".join(f"{row} {value:.0f} s" for row, value in took.items())
            tuned = ", ".join(
                f"{task.name} {task.epochs * task.epoch_images:,} "
                f"({task.epochs * task.epoch_images // task.settings.batch_size:,} updates)"
                for task in self.tasks
            )
            total = f" `{EQUAL_TOTAL}` was fine-tuned for both together."
            said.append(
                f"Equal compute: each pre-training saw {facts['pretrain_images']:,} images "
                f"({self.config.pretrain.epochs} epochs; {seconds}), each fine-tuning the same "
                f"number, however few its labels: {tuned}. `{SCRATCH}` had no pre-training, so "
                f"less compute in all.{total if chosen.scratch_equal_total else ''}"
            )
        given = [start.row for start in self.starts if start.name not in (*METHODS, SCRATCH)]
        if given:
            said.append(
                f"{', '.join(given)}: trained elsewhere, on other images and for other lengths, "
                f"perhaps of another architecture: not at equal compute."
            )
        if any(task.probed for task in self.tasks):
            said.append(
                f"k-NN and linear: on frozen features, all training labels; `{SCRATCH}` is an "
                f"untrained encoder there. `{HISTOGRAMS}`: the linear probe on colour and "
                f"gradient histograms, with the labels of its column."
            )
        said += [
            f"`{BLIND}`: the commonest class, no change, no object or the mean height of all "
            f"training labels.",
            "All validation tiles choose the epoch and the probes' penalty, also where labels are "
            "few: " + ", ".join(f"{task.name} {len(task.val)}" for task in self.tasks) + ".",
            "One encoder a row: the intervals hold for other labels and tiles, not for another "
            "pre-training.",
        ]
        for task in self.tasks:
            said += self._short_of(task)
        if facts["parameters"] < SMALL:
            said.append(
                f"This is small: {facts['parameters'] / 1e6:.2f} M parameters, {facts['pixels']} "
                f"pixels, {facts['minutes']:.1f} min of training. It says how these compare at "
                f"this size, not how good they are at the papers'."
            )
        if facts["generated"]:
            said.append("The imagery is made up: this says nothing about real imagery.")
        return said

    def _short_of(self, task: _Task) -> list[str]:
        """Where there are fewer labels than a column's name says."""
        said = []
        asked = [labels for labels in task.labels if labels is not None]
        if task.name == "scene":
            counts = task.train.table["label"].astype(str).value_counts()
            for labels in asked:
                if short := int((counts < labels).sum()):
                    said.append(
                        f"{task.column(labels)}: {short} of {len(counts)} classes have fewer "
                        f"(the least {counts.min()}) and gave all they have."
                    )
            return said
        return [
            f"{task.name}, {task.column(labels)}: there are {len(task.train)}."
            for labels in asked
            if labels > len(task.train)
        ]


def _done(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Do the pieces that are not there yet; the rows of all."""
    rows: list[dict[str, Any]] = []
    left = sum(piece.images for piece in pieces if not piece.file.exists())
    done, seconds = 0, 0.0
    for count, piece in enumerate(pieces, 1):
        if not piece.file.exists():
            started = time.monotonic()
            piece.work()
            seconds += time.monotonic() - started
            done, left = done + piece.images, left - piece.images
            minutes = f"; about {seconds / done * left / 60:.0f} min left" if done and left else ""
            said = ", ".join(
                f"{one['column']} {console.figure(one['value'], one['unit'])}"
                for one in _read(piece.file)
                if one["value"] is not None
            )
            console.note(f"compare {count}/{len(pieces)}: {piece.name}: {said or 'done'}{minutes}")
        rows += _read(piece.file)
    return rows


def _read(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def _row(
    task: _Task | None,
    row: str,
    column: str,
    labels: int | None = None,
    seed: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """One line of results.parquet."""
    figures = report.figures if report else {}
    metric = task.metric if task else None
    return {
        "task": task.name if task else None,
        "row": row,
        "column": column,
        "labels": labels,
        "seed": seed,
        "figure": metric,
        "unit": task.kind.unit(task.metric) if task else None,
        "value": None,
        "val_value": figures.get(f"val_{metric}"),
        "steps": figures.get("steps"),
        "seconds": figures.get("seconds_training"),
    }


def _with_others(classes: Sequence[str]) -> list[str]:
    """Names of classes, and one for those that only test tiles have."""
    return [*classes, "others"]


def _plain(name: str) -> str:
    """A name as part of a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _seeds(figures: Mapping[str, Any]) -> str:
    return f"{figures['seeds']} seed{'s' if figures['seeds'] > 1 else ''}"


def _ends(interval: Interval) -> dict[str, float | None]:
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: number(value) for name, value in ends.items()}


def _difference(
    first: Sequence[Draws], other: Sequence[Draws], sign: int, unit: str
) -> dict[str, Any]:
    """The paired difference, above 0 where the first is better.

    Training by training where both have the same seeds; where one has a single training for all
    seeds (the yardsticks), it stands against each.
    """
    count = max(len(first), len(other))
    pairs = zip(
        list(first) * (count // len(first)), list(other) * (count // len(other)), strict=True
    )
    interval = metrics.interval(metrics.over_trainings([sign * (one - two) for one, two in pairs]))
    return {**_ends(interval), "says": _says(interval, unit)}


def _says(interval: Interval, unit: str) -> str:
    """A difference in plain words."""
    if np.isnan([interval.value, interval.low, interval.high]).any():
        return "not measured"
    if interval.low <= 0 <= interval.high:
        return "within chance"
    much = console.figure(abs(interval.value), unit, points=True)
    return f"{'better' if interval.value > 0 else 'worse'} by {much}"


def _said(differences: Sequence[dict[str, Any]]) -> list[str]:
    """What the differences show: a sentence for each row that the first is compared with."""
    said = []
    several = len({one["task"] for one in differences}) > 1
    for task, other in dict.fromkeys((one["task"], one["to"]) for one in differences):
        verdicts: dict[str, list[str]] = {}
        for one in differences:
            if (one["task"], one["to"]) == (task, other):
                words = one["says"]
                kind = words.split()[0] if " by " in words else words
                much = f" ({_cell({**one, 'low': None}, one['unit'], signed=True)})"
                verdicts.setdefault(kind, []).append(
                    one["column"] + (much if " by " in words else "")
                )
        order = ("better", "worse", "within chance", "not measured")
        parts = [f"{kind}: {', '.join(verdicts[kind])}" for kind in order if kind in verdicts]
        of = f"{task}: " if several else ""
        said.append(f"{of}{differences[0]['of']} against {other}: {'; '.join(parts)}.")
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
