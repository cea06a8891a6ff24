"""The encoder's gate: whether a new encoder may take the champion's place, and why.

An encoder has no answers of its own. Probes tell what classes can be read from its features, k-NN
and a linear classifier that leave it as it is, on every labelled set of the workspace: the test
tiles of each task's selection, which are the same for both encoders. What a tile's class is:

    label     its class; where tiles have several, each by itself (the share of those said or true
              that are both, Godbole and Sarawagi 2004)
    mask      the class of which it has most above the training tiles' mean share: the commonest
              class would often be one and the same for all
    change    whether more of it changed than of the median training tile (of mostly unchanged ones:
              whether anything did), told from how far the two dates' features lie apart
    boxes     the class of most of its objects, or none
    height    the quarter of the training tiles' mean heights that its own is in

The rules, in this order:

1. The candidate does not load: refused.
2. No champion: passes. So does the first one of real imagery after one of generated.
3. No set to judge by (no labels, too few tiles or places, one class): passes, the newest stands.
4. The champion does not load, or one of them does not read the tiles' sensors: refused, since there
   is nothing to compare; a person may promote the candidate with --force.
5. The mean difference over all sets and probes is not shown to be above -max_drop: refused. Shown
   is what 95 % of draws of the test places say (one-sided, paired). One mean, and not a bound for
   each set and probe: of m bounds on equal encoders some fail by chance, the more sets the oftener,
   while the mean of more sets is surer. Whole places are drawn, for all sets at once, so that sets
   which share tiles count as what they are.
6. A set and probe fell by more than max_drop beyond chance, by Holm's correction (1979) of as many
   tests at 5 % together: refused. A mean may hide one set that was given up for the others.

Features are kept by encoder and selection: the champion's are taken once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console, tasks
from ringmo.config import Config, Gate, Sensor, digest
from ringmo.data.loading import BESIDE, BOXES, HEIGHT, IMAGE, MASK, SECOND
from ringmo.data.tables import classes_of
from ringmo.errors import BadInput
from ringmo.registry.register import ENCODER, open_bundle
from ringmo.registry.tracker import Tracker, Version
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from ringmo.data.loading import SelectedTiles
    from ringmo.registry.bundle import Bundle
    from ringmo.registry.gate import Verdict
    from ringmo.tasks.base import Task

REVISION = 1  # of features: raised when they change for the same encoder and tiles
LEAST_TRAIN, LEAST_TEST = 20, 20  # tiles; fewer tell nothing of a few points
LEAST_PLACES = 5  # of the test tiles: of fewer a draw says little
NONE = "none"  # the class of a tile without an object
PROBES = {"knn": "k-NN", "linear": "linear"}

Truth = NDArray[np.int64]  # (N,) numbers of classes, or (N, classes) of 0 and 1


class _LeftOut(Exception):
    """Why a set cannot be judged by."""


@dataclass(frozen=True)
class _Probed:
    """Both encoders on one set. scores: probe → (candidate's, champion's) of each test tile."""

    task: str
    places: list[str]
    scores: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]

    def __str__(self) -> str:
        said = [
            f"{PROBES[probe]} {console.figure(new.mean())} (champion {console.figure(old.mean())})"
            for probe, (new, old) in self.scores.items()
        ]
        return f"{self.task}, {len(self.places)} test tiles: {', '.join(said)}"


def judge(
    config: Config,
    workspace: Workspace,
    tracker: Tracker,
    version: Version,
    champion: Version | None,
) -> "Verdict":
    """Judge an encoder: see the module.

    Raises:
        BadInput: a selection is damaged, or not of the tiles that the store has.
        Unreachable: MLflow does not answer.
    """
    from ringmo.registry.gate import Verdict

    try:
        candidate = _opened(tracker, version)
    except BadInput as error:
        return Verdict(False, [f"{version} cannot be used: {error}"])
    if champion is None:
        return Verdict(True, ["first encoder: no champion to compare with"])
    if champion.generated and not version.generated:
        why = f"the champion {champion} was trained on generated imagery, {version} on real imagery"
        return Verdict(True, [f"{why}: no comparison"])

    sets, left_out, unreadable = [], [], []
    for task in config.tasks:
        try:
            sets.append(_Set(config, workspace, task))
        except _LeftOut as reason:
            left_out.append(f"{task} is left out: {reason}")
    if not sets:
        why = "no labelled set to judge it by: the newest encoder stands"
        return Verdict(True, [why, *left_out])
    instead = f"to promote it all the same: ringmo promote {version} --force"
    try:
        opened = _opened(tracker, champion)
    except BadInput as error:
        why = f"the champion {champion} cannot be used, so there is nothing to compare with"
        return Verdict(False, [f"{why} ({error}); {instead}"])

    probed, kept = [], set[Path]()
    for one in sets:
        try:
            for model, name in ((candidate, version), (opened, champion)):
                one.must_be_read_by(model, str(name))
            scores = [one.scores(model, kept) for model in (candidate, opened)]
        except _LeftOut as reason:
            unreadable.append(f"{one.task} is left out: {reason}")
            continue
        pairs = {probe: (scores[0][probe], scores[1][probe]) for probe in PROBES}
        probed.append(_Probed(one.task, one.places, pairs))
    _forget(workspace, kept)
    if not probed:
        return Verdict(False, [f"nothing to compare {version} by; {instead}", *unreadable])
    verdict = _compared(config, version, champion, probed)
    verdict.reasons += [str(one) for one in probed] + unreadable + left_out
    return verdict


def _opened(tracker: Tracker, version: Version) -> "Bundle":
    model = open_bundle(tracker, version)
    if model.task is not None:
        raise BadInput(f"{version} is a model for {model.meta['kind']}, no encoder")
    return model


class _Set:
    """A task's selection as classes of tiles.

    Raises:
        _LeftOut: it says nothing of an encoder; why.
    """

    def __init__(self, config: Config, workspace: Workspace, task: str) -> None:
        from ringmo.data.loading import SelectedTiles

        self.config, self.workspace, self.task = config, workspace, task
        self.kind = tasks.find(task)
        self.sensors = (config.select.sensor, *config.select.beside)
        self.selection = workspace.work("select") / f"{task}.parquet"
        if not self.selection.is_file():
            raise _LeftOut("nothing is selected for it: run `ringmo select`")
        self.tiles = SelectedTiles(
            workspace,
            self.selection,
            sensor=self.sensors[0],
            task=self.kind,
            beside=self.sensors[1:],
        )
        table = self.tiles.table
        split = table["split"].to_numpy(str)
        if not len(table):
            raise _LeftOut("no tile has labels of it")
        self.truth, known = _truth(self.kind, self.tiles, split == "train")
        self.train, self.val, self.test = (
            np.flatnonzero(known & (split == name)) for name in ("train", "val", "test")
        )
        self.places = table["place"].to_numpy(str)[self.test].tolist()
        places = len(set(self.places))
        if len(self.train) < LEAST_TRAIN or len(self.test) < LEAST_TEST or places < LEAST_PLACES:
            raise _LeftOut(
                f"{len(self.train)} training and {len(self.test)} test tiles of {places} places; "
                f"{LEAST_TRAIN}, {LEAST_TEST} and {LEAST_PLACES} are needed"
            )
        for rows, what in ((self.train, "training"), (self.test, "test")):
            if len(np.unique(self.truth[rows], axis=0)) < 2:
                raise _LeftOut(f"all {what} tiles are of one class")

    def must_be_read_by(self, model: "Bundle", name: str) -> None:
        """Whether an encoder reads the tiles' sensors as params.yaml has them."""
        for sensor in self.sensors:
            ours, theirs = self.config.sensors[sensor], model.meta["sensors"].get(sensor)
            if theirs is None:
                raise _LeftOut(f"{name} does not read {sensor}")
            of = Sensor.model_validate(theirs)
            if (of.bands, of.dtype) != (ours.bands, ours.dtype):
                raise _LeftOut(f"{name} reads another {sensor}: {', '.join(of.bands)}")

    def scores(self, model: "Bundle", kept: set[Path]) -> dict[str, NDArray[np.float64]]:
        """Probe → how right it is on each test tile, from 0 to 1.

        Args:
            kept: takes the file that holds the features.
        """
        import torch

        from ringmo.evaluation import probes

        features = torch.from_numpy(self._features(model, kept))
        train, val, test = features[self.train], features[self.val], features[self.test]

        def said(truth: Truth, probe: str) -> Truth:
            """What a probe says of the test tiles: (test tiles,) numbers of classes."""
            labels, val_labels = (
                torch.from_numpy(np.ascontiguousarray(truth[rows]))
                for rows in (self.train, self.val)
            )
            if probe == "knn":
                return probes.knn(train, labels, test).numpy()
            classes = int(labels.max()) + 1
            return probes.linear_probe(train, labels, val, val_labels, test, classes).numpy()

        truth = self.truth[self.test]
        if self.truth.ndim == 1:
            return {p: (said(self.truth, p) == truth).astype(np.float64) for p in PROBES}
        return {
            probe: _shared(truth, np.stack([said(one, probe) for one in self.truth.T], axis=1))
            for probe in PROBES
        }

    def _features(self, model: "Bundle", kept: set[Path]) -> NDArray[np.float32]:
        """Features (N, C) of all tiles, taken once for an encoder and a selection."""
        from ringmo.evaluation import probes
        from ringmo.training.engine import file_hash

        key = digest(REVISION, model.hash, file_hash(self.selection), self.task, self.sensors)
        file = _folder(self.workspace) / f"{self.task}-{key[:32]}.npy"
        kept.add(file)
        try:
            found: NDArray[np.float32] = np.load(file, allow_pickle=False)
            if len(found) == len(self.tiles):
                return found
        except (OSError, ValueError):
            pass  # none yet, or cut by a full disk
        trunk = model.encoder.to(self._device)

        def of(part: str, sensor: str) -> NDArray[np.float32]:
            return probes.tile_features(trunk, model.meta, self.tiles, sensor, self._device, part)

        first = self.sensors[0]
        parts = [of(IMAGE, first)]
        if SECOND in self.kind.parts:
            parts = [np.abs(of(SECOND, first) - parts[0])]
        parts += [of(BESIDE + sensor, sensor) for sensor in self.sensors[1:]]
        found = np.concatenate(parts, axis=1)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as opened:
            np.save(opened, found, allow_pickle=False)
        temporary.replace(file)
        return found

    @cached_property
    def _device(self) -> "torch.device":
        from ringmo.training.machine import choose_device

        return choose_device(self.config.hardware)


def _truth(
    kind: "Task", tiles: "SelectedTiles", train: NDArray[np.bool_]
) -> tuple[Truth, NDArray[np.bool_]]:
    """Classes of tiles, and of which tiles they are known.

    Args:
        train: which tiles train.
    """
    parts, table = kind.parts, tiles.table
    if "label" in parts:
        return _of_labels(table["label"].astype(str).tolist(), train)
    if MASK in parts:
        shares, known = _shares(table["mask_counts"], kind.mask_names(tiles))
        if SECOND in parts:
            changed = shares[:, 1]
            usual = np.median(changed[known & train]) if (known & train).any() else 0.0
            return (changed > usual).astype(np.int64), known
        mean = shares[known & train].mean(0) if (known & train).any() else 0.0
        return (shares - mean).argmax(1).astype(np.int64), known
    if BOXES in parts:
        classes = []
        for names in table["boxes_classes"]:
            there = sorted(str(name) for name in names)
            classes.append(max(there, key=there.count) if there else NONE)
        return _of_labels(classes, train)
    if HEIGHT in parts:
        heights = table["height_mean"].to_numpy(np.float64)
        known = ~np.isnan(heights)
        if not (known & train).any():
            return np.zeros(len(heights), np.int64), known
        bounds = np.quantile(heights[known & train], (0.25, 0.5, 0.75))
        return np.searchsorted(bounds, heights, side="left").astype(np.int64), known
    raise _LeftOut("its labels are no classes of tiles")


def _of_labels(labels: Sequence[str], train: NDArray[np.bool_]) -> tuple[Truth, NDArray[np.bool_]]:
    """Classes by name; -1 for one that no training tile has, which both miss."""
    known = np.ones(len(labels), bool)
    each = [classes_of(label) for label in labels]
    there = sorted(
        {name for names, trains in zip(each, train, strict=True) if trains for name in names}
    )
    number = {name: i for i, name in enumerate(there)}
    if all(len(names) == 1 for names in each):
        return np.array([number.get(names[0], -1) for names in each], np.int64), known
    several = np.zeros((len(each), len(there)), np.int64)
    for row, names in enumerate(each):
        several[row, [number[name] for name in names if name in number]] = 1
    return several, known


def _shares(
    counts: Iterable[Sequence[int]], names: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Of each tile what share of its known pixels each class has, and whether any is known."""
    number = {name: i for i, name in enumerate(dict.fromkeys(name for of in names for name in of))}
    pixels = np.zeros((len(names), len(number)))
    for row, (of, count) in enumerate(zip(names, counts, strict=True)):
        # Its last count is of what nobody knows.
        for name, pixel_count in zip(of, count[:-1], strict=False):
            pixels[row, number[name]] += pixel_count
    total = pixels.sum(1)
    return pixels / np.maximum(total, 1)[:, None], total > 0


def _shared(truth: Truth, said: Truth) -> NDArray[np.float64]:
    """Of several classes a tile, the share of those said or true that are both: (N,)."""
    both, either = (truth & said).sum(1), (truth | said).sum(1)
    shares: NDArray[np.float64] = np.divide(both, either, out=np.ones(len(truth)), where=either > 0)
    return shares


def _compared(
    config: Config, version: Version, champion: Version, sets: Sequence[_Probed]
) -> "Verdict":
    """Rules 5 and 6."""
    from ringmo.evaluation import metrics, paired
    from ringmo.registry import rules
    from ringmo.registry.gate import Verdict

    max_drop = config.gate.get(ENCODER, Gate.model_validate({})).max_drop
    names = [(one.task, probe) for one in sets for probe in PROBES]
    # A test of Holm's must be able to fail: the least share that draws can show is one of them.
    samples = max(config.evaluate.bootstrap_samples, round(2 * len(names) / paired.LEVEL))
    drawn = _drawn(sets, samples)
    mean = drawn[""]
    bound = metrics.lower_bound(mean)
    tiles = sum(len(one.places) for one in sets)
    # A tile's worth of rounding must not decide between equal encoders.
    ok = bool(bound >= -max_drop - 1e-9)

    def points(value: float) -> str:
        return console.figure(value, points=True)

    sense = "better" if mean[0] >= 0 else "worse"
    said = (
        f"{version} reads classes {points(abs(mean[0]))} {sense} than the champion {champion}, on "
        f"average of {len(sets)} labelled set{'s' if len(sets) > 1 else ''} by k-NN and linear "
        f"probes; "
        + (f"at most {points(-bound)} worse" if bound < 0 else "not worse")
        + f" (95 %), {points(max_drop)} are allowed (gate.encoder.max_drop)"
    )
    checks = [
        rules.check(
            "max_drop", ok, said, value=float(mean[0]), limit=-max_drop, low=bound, tiles=tiles
        )
    ]
    figures: dict[str, Any] = {
        "difference_to_champion": round(float(mean[0]), 6),
        "difference_to_champion_low": round(bound, 6),
        "gate_tiles": tiles,
    }
    chances = {name: _chance(drawn[f"{name[0]}/{name[1]}"], -max_drop) for name in names}
    fell = _fell(chances)
    for one in sets:
        for probe, (new, old) in one.scores.items():
            failed = (one.task, probe) in fell
            difference = float(new.mean() - old.mean())
            said = f"{one.task}, {PROBES[probe]}: {points(abs(difference))} "
            said += "better" if difference >= 0 else "worse"
            if failed:
                said += f", more than the {points(max_drop)} allowed, and not by chance (Holm, 5 %)"
            checks.append(
                rules.check(
                    f"{one.task}.{probe}",
                    not failed,
                    said,
                    value=difference,
                    limit=-max_drop,
                    p=chances[one.task, probe],
                    candidate=float(new.mean()),
                    champion=float(old.mean()),
                    tiles=len(one.places),
                )
            )
            figures[f"candidate_{one.task}_{probe}"] = round(float(new.mean()), 6)
            figures[f"champion_{one.task}_{probe}"] = round(float(old.mean()), 6)
    broken = [check["said"] for check in checks[1:] if not check["ok"]]
    return Verdict(ok and not broken, [checks[0]["said"], *broken], figures, checks)


def _drawn(sets: Sequence[_Probed], samples: int) -> dict[str, NDArray[np.float64]]:
    """`metrics.drawn` of the differences: of `TASK/PROBE`, and under "" their mean."""
    from ringmo.evaluation import metrics

    ends = np.cumsum([0, *(len(one.places) for one in sets)])

    def measure(weights: NDArray[np.int64] | None) -> Mapping[str, float]:
        found = {}
        for one, start, end in zip(sets, ends[:-1], ends[1:], strict=True):
            weight = np.ones(end - start) if weights is None else weights[start:end]
            for probe, (new, old) in one.scores.items():
                total = weight.sum()
                mean = float(weight @ (new - old) / total) if total else float("nan")
                found[f"{one.task}/{probe}"] = mean
        return {"": float(np.mean(list(found.values()))), **found}

    return metrics.drawn(measure, [place for one in sets for place in one.places], samples)


def _chance(drawn: NDArray[np.float64], least: float) -> float:
    """How likely draws are not below `least`: the one-sided p-value of having fallen under it."""
    known = drawn[1:][~np.isnan(drawn[1:])]
    return float((1 + (known >= least - 1e-9).sum()) / (1 + len(known)))


def _fell(chances: Mapping[tuple[str, str], float]) -> set[tuple[str, str]]:
    """Those that have fallen, by Holm's correction of all."""
    from ringmo.evaluation import paired

    names = sorted(chances, key=lambda name: chances[name])
    held = paired.holm([chances[name] for name in names])
    return {name for name, (_, surely) in zip(names, held, strict=True) if surely}


def _folder(workspace: Workspace) -> Path:
    return workspace.state / "features"


def _forget(workspace: Workspace, kept: set[Path]) -> None:
    """Remove features that this judgement did not need: of older encoders and selections."""
    for file in _folder(workspace).glob("*.npy"):
        if file not in kept:
            file.unlink(missing_ok=True)
