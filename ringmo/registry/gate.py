"""The gate: whether a candidate may take the champion's place, and why.

Both are scored now, on the same test tiles, so that figures of different days or data are never
compared. The rules, in this order:

1. The candidate is the champion: passes, nothing to do.
2. Trained on generated imagery, with a champion trained on real imagery: refused.
3. `encoder`: by the rules of encoder_gate.py.
4. Under gate.TASK.min_value, or over max_value: refused.
5. No champion, or one trained on generated imagery while the candidate is not: passes.
6. The champion's files cannot be used: refused, since there is nothing to compare with; a person
   may promote the candidate with --force.
7. Worse than the champion by more than gate.TASK.max_drop: refused. Else it passes.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ringmo import console, tasks
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import promotion
from ringmo.registry.register import ENCODER, open_bundle
from ringmo.registry.tracker import Tracker, Version
from ringmo.stage import write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle


@dataclass
class Verdict:
    """`reasons` are sentences for people; `figures` are the scores they speak of.

    `checks`: a row a rule, of rule, ok, said and numbers.
    """

    ok: bool
    reasons: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)


def gate(config: Config, workspace: Workspace, task: str, version: Version) -> Verdict:
    """Judge a version against the champion, and write the verdict on it as tags.

    Raises:
        BadInput: the candidate's own bundle cannot be used, or there are no test tiles.
        Unreachable: MLflow does not answer.
    """
    promotion.settle(workspace, task)
    tracker = Tracker(workspace)
    champion = tracker.aliased(task, "champion")
    verdict = _judge(config, workspace, tracker, task, version, champion)
    tracker.tag_version(
        version,
        {
            "verdict": "passed" if verdict.ok else "refused",
            "verdict_reasons": "; ".join(verdict.reasons),
            "verdict_against": str(champion) if champion else "none",
            **verdict.figures,
        },
    )
    return verdict


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
        return Verdict(False, [why])
    if task == ENCODER:
        from ringmo.registry import encoder_gate

        return encoder_gate.judge(config, workspace, tracker, version, champion)

    rule, kind = config.gate[task], tasks.find(task)
    metric = rule.metric or kind.metric
    flips = config.evaluate.flips
    candidate_score = _score(workspace, task, open_bundle(tracker, version), metric, flips)
    value = candidate_score[metric]
    figures: dict[str, Any] = {"candidate_" + metric: value, "gate_tiles": candidate_score["n"]}
    unit = kind.unit(metric)
    scored = f"{metric} {console.figure(value, unit)}"
    if rule.min_value is not None and not value >= rule.min_value:
        least = f"under the least allowed {console.figure(rule.min_value, unit)}"
        return Verdict(False, [f"{version}: {scored}, {least} (gate.{task}.min_value)"], figures)
    if rule.max_value is not None and not value <= rule.max_value:
        most = f"over the most allowed {console.figure(rule.max_value, unit)}"
        return Verdict(False, [f"{version}: {scored}, {most} (gate.{task}.max_value)"], figures)
    if champion is None:
        return Verdict(True, [f"first version: {scored}, no champion to compare with"], figures)
    if champion.generated and not version.generated:
        why = f"the champion {champion} was trained on generated imagery, {version} on real imagery"
        return Verdict(True, [f"{why}: no comparison, {scored}"], figures)
    try:
        champion_score = _score(workspace, task, open_bundle(tracker, champion), metric, flips)
    except BadInput as error:
        how = f"to promote all the same: ringmo promote {version} --force"
        why = f"the champion {champion} cannot be used, so there is nothing to compare with"
        return Verdict(False, [f"{why} ({error}); {how}"], figures)
    figures["champion_" + metric] = champion_score[metric]
    difference = kind.gain(metric, value) - kind.gain(metric, champion_score[metric])
    compared = (
        f"{version} has {scored}, the champion {champion} "
        f"{console.figure(champion_score[metric], unit)}, on the same {candidate_score['n']} test "
        f"tiles"
    )
    # A tile's worth of rounding must not decide between equal scores.
    if not difference >= -rule.max_drop - 1e-9:
        worse, most = (
            console.figure(one, unit, points=True) for one in (-difference, rule.max_drop)
        )
        return Verdict(
            False,
            [f"{compared}: {worse} worse, {most} are allowed (gate.{task}.max_drop)"],
            figures,
        )
    return Verdict(True, [compared], figures)


def _score(
    workspace: Workspace, task: str, model: "Bundle", metric: str, flips: int
) -> dict[str, Any]:
    """Scores on the present test tiles, kept by model, selection and turns: none changes."""
    from hashlib import sha256

    selection = workspace.work("select") / f"{task}.parquet"
    if not selection.is_file():
        raise BadInput(f"{selection} is missing: run `ringmo select` first")
    tiles = sha256(selection.read_bytes()).hexdigest()
    kept = workspace.state / "scores" / f"{model.hash[:24]}-{tiles[:24]}-{flips}.json"
    try:
        found: dict[str, Any] = json.loads(kept.read_text())
        if metric in found and "n" in found:
            return found
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    from ringmo.evaluation.evaluate import score

    scores = score(model, workspace, selection, split="test", flips=flips)
    if not scores["n"]:
        raise BadInput(f"{selection} has no test tiles: the gate has nothing to judge by")
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    if metric not in numbers:
        known = ", ".join(name for name in numbers if name != "n")
        raise BadInput(f"gate.{task}.metric: no figure `{metric}` ({known})")
    write_json(kept, numbers)
    return numbers
