"""The gate's rules, one by one: figures in, a checked rule out.

A check is a plain dict, so that it can be shown, sent and kept: `rule`, `ok`, `said` (one
sentence), and the numbers it speaks of: `value`, `limit`, and what else there is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ringmo import console
from ringmo.config import Gate
from ringmo.evaluation import paired
from ringmo.evaluation.metrics import Interval
from ringmo.evaluation.paired import Answers, Tiles
from ringmo.tasks.base import Task

Check = dict[str, Any]
TOLD = 5  # classes and slices that fell, in a sentence


def check(rule: str, ok: bool, said: str, **numbers: Any) -> Check:
    """A checked rule; what is no number is None."""
    return {"rule": rule, "ok": bool(ok), "said": said} | {
        name: None if isinstance(value, float) and np.isnan(value) else value
        for name, value in numbers.items()
    }


def bounds(rule: Gate, kind: Task, metric: str, value: float, name: str) -> list[Check]:
    """min_value and max_value, where they are set."""
    unit, checks = kind.unit(metric), []
    for key, limit, side in (
        ("min_value", rule.min_value, "under the least"),
        ("max_value", rule.max_value, "over the most"),
    ):
        if limit is not None:
            ok = value >= limit if key == "min_value" else value <= limit
            said = f"{name} has {metric} {console.figure(value, unit)}, {'not ' * ok}{side} "
            said += f"allowed {console.figure(limit, unit)} (gate.{kind.name}.{key})"
            checks.append(check(key, ok, said, value=value, limit=limit))
    return checks


def against_champion(
    rule: Gate,
    kind: Task,
    metric: str,
    candidate: Answers,
    champion: Answers,
    tiles: Tiles,
    samples: int,
    names: tuple[str, str],
) -> list[Check]:
    """max_drop, and that no class and no slice fell.

    Args:
        samples: of the bootstrap. names: of the candidate and of the champion.
    """
    found = paired.compared(kind, metric, candidate, champion, tiles, samples)
    return [_no_worse(rule, kind, metric, found, tiles, names), _nothing_fell(kind, found)]


def _no_worse(
    rule: Gate,
    kind: Task,
    metric: str,
    found: paired.Compared,
    tiles: Tiles,
    names: tuple[str, str],
) -> Check:
    unit = kind.unit(metric)

    def points(value: float) -> str:
        return console.figure(value, unit, points=True)

    # Rounding must not decide between equal figures.
    ok = bool(found.low >= -rule.max_drop - 1e-9)
    places = len(set(tiles.places))
    said = (
        f"{names[0]} has {metric} {console.figure(found.candidate, unit)}, the champion {names[1]} "
        f"{console.figure(found.champion, unit)}, on the same {len(tiles.places)} test tiles: "
    )
    if found.low >= 0:
        said += f"surely no worse, {points(rule.max_drop)} are allowed"
    elif np.isnan(found.low):
        said += "by how much it may be worse cannot be told"
    else:
        said += (
            f"at most {points(-found.low)} worse (95 % sure), {points(rule.max_drop)} are allowed"
        )
    said += f" (gate.{kind.name}.max_drop)"
    if not ok and found.difference >= -rule.max_drop:
        said += "; more test tiles would tell more: see docs/gate.md"
    if tiles.drawn is not tiles.places:
        where = "one place" if places == 1 else f"{places} places"
        said += f"; all of them are of {where}, so tiles were drawn and not places, and this is "
        said += "less sure than it looks"
    return check(
        "max_drop",
        ok,
        said,
        value=found.difference,
        limit=-rule.max_drop,
        low=found.low,
        candidate=found.candidate,
        champion=found.champion,
        tiles=len(tiles.places),
        places=places,
    )


def _nothing_fell(kind: Task, found: paired.Compared) -> Check:
    fell = [fall for fall in found.falls if fall.surely]
    tested = f"{len(found.falls)} classes and slices"
    few = f"; {found.untested} of too few places were not" if found.untested else ""

    def told(fall: paired.Fall) -> str:
        unit = "%" if fall.what.startswith("class ") else kind.unit(fall.figure)
        ends = " to ".join(console.figure(value, unit) for value in (fall.before, fall.after))
        return f"{fall.what} fell from {fall.figure} {ends}"

    if fell:
        more = f", and {len(fell) - TOLD} more" if len(fell) > TOLD else ""
        said = ", ".join(told(fall) for fall in fell[:TOLD]) + more
        said += f": more than chance explains among {tested}"
    elif found.falls:
        said = f"none of {tested} fell more than chance explains"
    else:
        said = "no class or slice could be tested"
    worst = found.falls[0] if found.falls else None
    return check(
        "classes_and_slices",
        not fell,
        said + few,
        value=worst.p if worst else None,
        limit=worst.allowed if worst else None,
        tested=len(found.falls),
        fell=[
            {
                "what": fall.what,
                "figure": fall.figure,
                "before": fall.before,
                "after": fall.after,
                "p": fall.p,
                "allowed": fall.allowed,
            }
            for fall in fell
        ],
    )


def against_best(
    rule: Gate,
    kind: Task,
    metric: str,
    value: float,
    champions: Mapping[str, float],
    left_out: Sequence[str],
    names: tuple[str, str | None],
) -> Check | None:
    """That the figure is not below that of the best champion there ever was by more than max_drop.

    The figures themselves are compared, not a bound: the best of many is the best by luck too, and
    a bound on top of that would refuse most equal models once there were a few champions.

    Args:
        champions: of each that was champion, and is, its figure on these test tiles. left_out:
            those that could not be asked, and why. names: of the candidate and of the champion.

    Returns:
        None where nobody was champion before the present one.
    """
    passed_over = "".join(f"; {one}" for one in left_out)
    known = {who: one for who, one in champions.items() if not np.isnan(one)}
    if not known.keys() - {names[1]}:
        return check("best_champion", True, passed_over[2:]) if left_out else None
    best = max(known, key=lambda who: kind.gain(metric, known[who]))
    difference = kind.gain(metric, value) - kind.gain(metric, known[best])
    ok = best == names[1] or bool(difference >= -rule.max_drop - 1e-9)
    if best == names[1]:
        said = f"no champion before was better than {best} on these test tiles"
    else:
        unit = kind.unit(metric)
        worse, most = (
            console.figure(one, unit, points=True) for one in (-difference, rule.max_drop)
        )
        said = f"{best}, the best champion so far, has {metric} "
        said += f"{console.figure(known[best], unit)} on these test tiles: {names[0]} is "
        said += "no worse" if difference >= 0 else f"{worse} worse"
        said += f", {most} are allowed (gate.{kind.name}.max_drop)"
    return check(
        "best_champion",
        ok,
        said + passed_over,
        value=difference,
        limit=-rule.max_drop,
        best=best,
        champions=len(known),
    )


def turning(rule: Gate, kind: Task, drops: Mapping[str, Interval], name: str) -> Check:
    """max_turn_drop: that mirroring and turning surely cost no more.

    Args:
        drops: by change what it costs, with its interval.
    """
    assert rule.max_turn_drop is not None
    unit = kind.unit(kind.metric)

    def points(value: float) -> str:
        return console.figure(value, unit, points=True)

    worst = max(drops, key=lambda change: np.nan_to_num(drops[change].low, nan=-np.inf))
    drop = drops[worst]
    ok = not drop.low > rule.max_turn_drop
    turned = f"{worst}°" if worst.startswith("turned") else worst
    said = f"tiles {turned} cost {name} {points(drop.value)} of {kind.metric}"
    if np.isnan(drop.low):
        said += "; how sure that is cannot be told"
    else:
        said += f", at least {points(drop.low)} (95 % interval)"
    limit = f"{points(rule.max_turn_drop)} are allowed (gate.{kind.name}.max_turn_drop)"
    return check(
        "max_turn_drop",
        ok,
        f"{said}, {limit}",
        value=drop.value,
        limit=rule.max_turn_drop,
        low=drop.low,
        change=worst,
    )


def at_most(rule: str, task: str, value: float | None, limit: float, what: str, unit: str) -> Check:
    """A number that may not be larger; what cannot be told does not pass.

    Args:
        what: the sentence up to the number.
    """
    said = f"{what} cannot be told" if value is None else f"{what} {value:,.1f} {unit}"
    allowed = f"{limit:,g} are allowed (gate.{task}.{rule})"
    ok = value is not None and value <= limit
    return check(rule, ok, f"{said}, {allowed}", value=value, limit=limit)
