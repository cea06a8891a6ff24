"""The gate: whether a candidate may take the champion's place, and why.

Everybody answers the present test tiles, so that figures of different days or data are never
compared: the candidate, the champion, and whoever was champion before. What they answered is kept
(`_Evidence`), so nobody is asked twice. The rules of a task's model are in rules.py; a candidate
that breaks any is refused and told all that it broke. Before them:

1. The candidate is the champion: passes, nothing to do.
2. Trained on generated imagery, with a champion trained on real imagery: refused.
3. `encoder`: by the rules of encoder_gate.py.

And beside them:

4. No champion, or one trained on generated imagery while the candidate is not: no comparison.
5. The champion's files cannot be used: refused, since there is nothing to compare with; a person
   may promote the candidate with --force.
"""

import dataclasses
import json
import statistics
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import console, tasks
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import promotion
from ringmo.registry.register import ENCODER, open_bundle
from ringmo.registry.tracker import Tracker, Version, claim
from ringmo.stage import REVISIONS
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.data.loading import SelectedTiles
    from ringmo.evaluation.metrics import Interval
    from ringmo.evaluation.paired import Answers
    from ringmo.registry.bundle import Bundle

TURNS = ("mirrored", "turned 90", "turned 180", "turned 270")
WARM_UP, TIMED = 3, 15  # answers to one tile, before and while the time is taken
TAG = 5000  # characters that a tag may have


@dataclass
class Verdict:
    """`reasons` are sentences for people: of a refusal every rule that was broken. `figures` are
    the scores they speak of; `checks` every rule that was looked at, as rules.py has them."""

    ok: bool
    reasons: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)


def gate(config: Config, workspace: Workspace, task: str, version: Version) -> Verdict:
    """Judge a version against the champion, and write the verdict on it as tags.

    The champion keeps the verdict that it was promoted by.

    Raises:
        BadInput: the candidate's own bundle cannot be used, or there are no test tiles.
        Unreachable: MLflow does not answer.
    """
    promotion.settle(workspace, task)
    tracker = Tracker(workspace)
    champion = tracker.aliased(task, "champion")
    verdict = _judge(config, workspace, tracker, task, version, champion)
    if champion is not None and champion.version == version.version and "verdict" in champion.tags:
        return verdict
    tracker.tag_version(
        version,
        {
            "verdict": "passed" if verdict.ok else "refused",
            "verdict_reasons": "; ".join(verdict.reasons),
            "verdict_against": str(champion) if champion else "none",
            "verdict_checks": _fitting(verdict.checks),
            **verdict.figures,
        },
    )
    return verdict


def yardsticks(moves: Iterable[Mapping[str, Any]]) -> list[int]:
    """Versions that were champion and still count as good, newest first.

    A rollback says that a champion was worse than its figures: from then on it is no yardstick,
    until somebody makes it champion again.

    Args:
        moves: `promotion.history`, newest first.
    """
    counts: dict[int, bool] = {}
    for move in moves:
        if move["status"] == "FINISHED":
            counts.setdefault(move["to"], True)
            if move["what"] == "rollback" and move["from"] is not None:
                counts.setdefault(move["from"], False)
    return [number for number, good in counts.items() if good]


def _judge(
    config: Config,
    workspace: Workspace,
    tracker: Tracker,
    task: str,
    version: Version,
    champion: Version | None,
) -> Verdict:
    if champion is not None and champion.version == version.version:
        return Verdict(True, [f"{version} is the champion already"])
    if champion is not None and version.generated and not champion.generated:
        why = f"{version} was trained on generated imagery, the champion {champion} on real imagery"
        return Verdict(False, [why], checks=[{"rule": "generated", "ok": False, "said": why}])
    if task == ENCODER:
        from ringmo.registry import encoder_gate

        return encoder_gate.judge(config, workspace, tracker, version, champion)
    with claim(workspace.state / f"gate-{task}.lock"):  # nobody else tidies the evidence up
        return _Judgement(config, workspace, tracker, task, version).verdict(champion)


class _Judgement:
    """A task's candidate before the rules."""

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        tracker: Tracker,
        task: str,
        version: Version,
    ) -> None:
        from ringmo.evaluation import paired
        from ringmo.evaluation.evaluate import gsd_band
        from ringmo.training.machine import choose_device

        self.config, self.workspace, self.tracker = config, workspace, tracker
        self.version, self.kind, self.rule = version, tasks.find(task), config.gate[task]
        self.metric = self.rule.metric or self.kind.metric
        self.device = str(choose_device(config.hardware))
        self.evidence = _Evidence(workspace, task, config.evaluate.flips)
        self.model = self._opened(version)
        self.test = self.model.tiles(workspace, self.evidence.selection, "test")
        if not len(self.test):
            raise BadInput(
                f"{self.evidence.selection} has no test tiles: the gate has nothing to judge by"
            )
        table = self.test.table
        columns = {"sensor": table["sensor"], "source": table["source_root"]}
        columns["resolution"] = table["gsd_m"].map(gsd_band)
        self.tiles = paired.Tiles(
            [str(place) for place in table["place"]],
            {name: [str(value) for value in of] for name, of in columns.items()},
        )
        self.candidate = self.evidence.of(self.model, self.test)
        self.value = self._value(self.candidate)

    def verdict(self, champion: Version | None) -> Verdict:
        from ringmo.registry import rules

        unit, name = self.kind.unit(self.metric), str(self.version)
        figures: dict[str, Any] = {
            f"candidate_{self.metric}": self.value,
            "gate_tiles": len(self.test),
        }
        checks = rules.bounds(self.rule, self.kind, self.metric, self.value, name)
        former: dict[str, float] = {}
        scored = f"{self.metric} {console.figure(self.value, unit)}"
        if champion is None:
            said = f"{name} is the first version: {scored}, no champion to compare with"
            checks.append(rules.check("max_drop", True, said))
        elif champion.generated and not self.version.generated:
            said = (
                f"the champion {champion} was trained on generated imagery, {name} on real "
                f"imagery: no comparison, {scored}"
            )
            checks.append(rules.check("max_drop", True, said))
        else:
            try:
                answers = self.evidence.of(self._opened(champion), self.test)
            except BadInput as error:
                said = (
                    f"the champion {champion} cannot be used, so there is nothing to compare with "
                    f"({error}); to promote all the same: ringmo promote {name} --force"
                )
                checks.append(rules.check("max_drop", False, said))
            else:
                samples = self.config.evaluate.bootstrap_samples
                compared = rules.against_champion(
                    self.rule,
                    self.kind,
                    self.metric,
                    self.candidate,
                    answers,
                    self.tiles,
                    samples,
                    (name, str(champion)),
                )
                checks += compared
                former[str(champion)] = self._value(answers)
                figures[f"champion_{self.metric}"] = former[str(champion)]
                figures["difference_to_champion"] = compared[0]["value"]
                figures["difference_to_champion_low"] = compared[0]["low"]
        more, left_out = self._former(champion)
        champions, names = former | more, (name, str(champion) if champion else None)
        best = rules.against_best(
            self.rule, self.kind, self.metric, self.value, champions, left_out, names
        )
        if best is not None:
            checks.append(best)
        checks += self._fitness()
        self.evidence.forget_others()
        failed = [check["said"] for check in checks if not check["ok"]]
        reasons = failed or [check["said"] for check in checks]
        return Verdict(not failed, reasons, figures, checks)

    def _value(self, answers: "Answers") -> float:
        whole = self.kind.figures(answers.evidence, answers.classes).whole
        if self.metric not in whole:
            raise BadInput(
                f"gate.{self.kind.name}.metric: no figure `{self.metric}` ({', '.join(whole)})"
            )
        return whole[self.metric]

    def _opened(self, version: Version) -> "Bundle":
        """The version's model, checked, on this machine's device."""
        model = open_bundle(self.tracker, version)
        return dataclasses.replace(model, model=model.model.to(self.device), device=self.device)

    def _former(self, champion: Version | None) -> tuple[dict[str, float], list[str]]:
        """Figures of champions before on the present test tiles; which were left out, and why."""
        moves = promotion.history(self.workspace, self.kind.name)
        known = {one.version: one for one in self.tracker.versions(self.kind.name)}
        own = {self.version.version} | ({champion.version} if champion else set())
        values: dict[str, float] = {}
        left_out: list[str] = []
        for number in [number for number in yardsticks(moves) if number not in own]:
            former = known.get(number)
            if former is None:
                left_out.append(f"{self.kind.name}/{number} was left out: it was deleted")
            elif former.generated and not self.version.generated:
                left_out.append(f"{former} was left out: it was trained on generated imagery")
            else:
                try:
                    answers = self.evidence.kept(former.bundle_hash, self.test)
                    if answers is None:
                        answers = self.evidence.of(self._opened(former), self.test)
                    values[str(former)] = self._value(answers)
                except BadInput as error:
                    left_out.append(f"{former} was left out: {error}")
        return values, left_out

    def _fitness(self) -> list[dict[str, Any]]:
        """What a candidate must be whoever is champion, as far as params.yaml has rules for it."""
        from ringmo.registry import rules

        rule, task, name = self.rule, self.kind.name, str(self.version)
        checks = []
        if rule.max_turn_drop is not None:
            checks.append(rules.turning(rule, self.kind, self._drops(), name))
        if rule.max_latency_ms is not None:
            taken = latency_ms(self.model, self.test)
            what = f"one tile takes {name} on {self.device}"
            checks.append(
                rules.at_most("max_latency_ms", task, taken, rule.max_latency_ms, what, "ms")
            )
        if rule.max_size_mb is not None:
            size = sum(path.stat().st_size for path in self.model.folder.iterdir()) / 1e6
            what = f"the files of {name} have"
            checks.append(rules.at_most("max_size_mb", task, size, rule.max_size_mb, what, "MB"))
        if rule.max_data_age_days is not None:
            data = self.version.tags.get("data_version")
            age = data_age_days(self.workspace, data)
            what = f"the age of data version {(data or 'unknown')[:8]}, which {name} learnt from,"
            what += " is" if age is not None else ""
            limit = rule.max_data_age_days
            checks.append(rules.at_most("max_data_age_days", task, age, limit, what, "days"))
        return checks

    def _drops(self) -> "dict[str, Interval]":
        """What mirroring and turning cost: as its evaluation found, or measured now."""
        from ringmo.evaluation.behaviour import behaviour
        from ringmo.evaluation.metrics import Interval

        found: dict[str, Interval] = {}
        for change in TURNS:
            name = f"drop_{change}".replace(" ", "_")
            ends = [self.version.figure(name + end) for end in ("", "_low", "_high")]
            # An evaluation on tiles of one place has no ends.
            known = [float("nan") if value is None else value for value in ends]
            if ends[0] is not None:
                found[change] = Interval(*known)
        if len(found) == len(TURNS):
            return found
        samples = self.config.evaluate.bootstrap_samples
        evidence, flips = self.candidate.evidence, self.config.evaluate.flips
        done = behaviour(self.model, self.test, evidence, samples, flips, only=TURNS)
        return {one.change: one.drop for one in done}


def latency_ms(model: "Bundle", tiles: "SelectedTiles") -> float:
    """Milliseconds of an answer to one tile of the test's size, the median of several."""
    import numpy as np
    import torch

    from ringmo.evaluation.measuring import answered, batches

    (sample,) = batches(model, model.samples(tiles), np.arange(1))
    times = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        answered(model, sample)
        if model.device != "cpu":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP:])


def data_age_days(workspace: Workspace, version: str | None) -> float | None:
    """Days since a data version was made; None where the log does not know it."""
    from ringmo.data.versions import versions

    for row in versions(workspace):
        if version and row["version"] == version:
            made = datetime.fromisoformat(row["time"])
            return (datetime.now(UTC) - made).total_seconds() / 86400
    return None


class _Evidence:
    """What models answered to the present test tiles of a task, kept as files of plain arrays.

    A file's name says of which model, selection and turns, and by which revision of the evaluation
    it is: none ever changes. `forget_others` removes those that no judgement needs any more.
    """

    def __init__(self, workspace: Workspace, task: str, flips: int) -> None:
        self.workspace, self.flips = workspace, flips
        self.selection = workspace.work("select") / f"{task}.parquet"
        if not self.selection.is_file():
            raise BadInput(f"{self.selection} is missing: run `ringmo select` first")
        tiles = sha256(self.selection.read_bytes()).hexdigest()[:24]
        self.of_what = f"{tiles}-{flips}-{REVISIONS['evaluate']}"
        self.folder = workspace.state / "evidence" / task
        self.used: set[Path] = set()

    def of(self, model: "Bundle", test: "SelectedTiles") -> "Answers":
        """A model's answers to these tiles: from its file, or asked for now.

        Raises:
            BadInput: it does not read these very tiles.
        """
        import numpy as np

        from ringmo.evaluation.measuring import measured
        from ringmo.evaluation.paired import Answers

        found = self.kept(model.hash, test)
        if found is not None:
            return found
        tiles, rows = model.tiles(self.workspace, self.selection, "test"), np.arange(len(test))
        if len(tiles) != len(test) or tiles.keys(rows) != test.keys(rows):
            raise BadInput(
                f"it reads {', '.join(model.sensors)}, which are {len(tiles)} of the test tiles: "
                f"not the {len(test)} that the candidate reads"
            )
        answers = Answers(measured(model, tiles, flips=self.flips), model.samples(tiles).classes)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(model.hash)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                tile_keys=np.array(test.keys(rows)),
                class_names=np.array(answers.classes, dtype=str),
                **answers.evidence,
            )
        temporary.replace(path)
        self.used.add(path)
        return answers

    def kept(self, bundle_hash: str, test: "SelectedTiles") -> "Answers | None":
        """A model's answers from its file; None where there is none, or a damaged one."""
        import numpy as np

        from ringmo.evaluation.paired import Answers

        path = self.path(bundle_hash)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            keys, names = arrays.pop("tile_keys").tolist(), arrays.pop("class_names").tolist()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        if keys != test.keys(np.arange(len(test))):
            return None
        self.used.add(path)
        return Answers(arrays, names)

    def path(self, bundle_hash: str) -> Path:
        return self.folder / f"{bundle_hash[:24]}-{self.of_what}.npz"

    def forget_others(self) -> None:
        """Remove what this judgement did not use: of other selections, of refused candidates."""
        for path in self.folder.glob("*"):
            if path not in self.used:
                path.unlink(missing_ok=True)


def _fitting(checks: list[dict[str, Any]]) -> str | None:
    """Checks as a tag's text: whole JSON, if need be with shorter sentences."""
    said = 1000
    while checks:
        short = [check | {"said": check["said"][:said]} for check in checks]
        text = json.dumps([{k: v for k, v in one.items() if k != "fell"} for one in short])
        if len(text) <= TAG:
            return text
        said //= 2
    return None
