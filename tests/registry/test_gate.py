"""What may take the champion's place, and what it is told otherwise."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_store import make_selections, make_store

from ringmo.config import Config
from ringmo.registry import gate as gate_module
from ringmo.registry import promotion
from ringmo.registry.gate import gate, yardsticks
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker, Version
from ringmo.workspace import Workspace

TILES = 300
NAMES = ["airport", "forest", "river", "Beach", "Forest", "Port"]


@pytest.fixture
def config(workspace: Workspace) -> Config:
    """Without the rule that has every model answer turned tiles: it has a test of its own."""
    whole = Config.load(workspace.params_file)
    return ruled(whole, max_turn_drop=None)


def ruled(config: Config, **rules: Any) -> Config:
    """With other rules for scenes."""
    changed = config.gate["scene"].model_copy(update=rules)
    return config.model_copy(update={"gate": {"scene": changed}})


@pytest.fixture
def contest(tracked: Workspace, config: Config, make_model: Any) -> Any:
    """`contest(right)` registers a real model whose answers to the test tiles are known already.

    right: how many of the 300 tiles it answers right; which ones differs from model to model, but
    for `wrong_in`, a class of which all are wrong. What it answered lies where the gate keeps what
    models answered.
    """
    manifest = make_store(tracked, per_class=TILES // 3, side=8)
    make_selections(tracked, manifest.assign(split="test"))
    table = pd.read_parquet(tracked.work("select") / "scene.parquet")
    label = np.array([NAMES.index(name) for name in table["label"]])
    seeds = iter(range(100))

    def enter(
        right: int,
        *,
        generated: bool = False,
        champion: bool = False,
        wrong_in: str | None = None,
    ) -> Version:
        seed = next(seeds)
        make_model(seed, generated=generated)
        version = register(config, tracked, "scene", {})
        # Nine in ten of the tiles are as hard for all; of the others each has luck of its own.
        hard = np.random.default_rng(0).random(TILES)
        luck = np.random.default_rng(seed + 1).random(TILES)
        order = np.argsort(np.where(np.arange(TILES) % 10 == 0, luck, hard))
        hit = np.zeros(TILES, bool)
        hit[order[:right]] = True
        if wrong_in:
            hit[label == NAMES.index(wrong_in)] = False
        said = np.where(hit, label, 0)
        write_evidence(tracked, config, version.bundle_hash, table["key"], label, said)
        if champion:
            promotion.promote(tracked, "scene", version.version, by="ada", reason="", force=True)
        return version

    return enter


def write_evidence(
    workspace: Workspace, config: Config, bundle_hash: str, keys: Any, label: Any, said: Any
) -> None:
    kept = gate_module._Evidence(workspace, "scene", config.evaluate.flips)
    kept.folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        kept.path(bundle_hash),
        tile_keys=np.array(list(keys)),
        class_names=np.array(NAMES),
        truth=np.eye(len(NAMES), dtype=int)[label],
        scores=np.eye(len(NAMES), dtype=np.float32)[said],
        label=label,
        predicted=said,
        right=said == label,
        confidence=np.ones(len(said)),
    )


def rule(verdict: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in verdict.checks if one["rule"] == name)
    return found


def test_the_first_version_passes_and_is_said_to_be_first(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    version = contest(120)
    verdict = gate(config, tracked, "scene", version)
    assert verdict.ok and "first version" in verdict.reasons[0]
    tags = Tracker(tracked).versions("scene")[0].tags
    assert tags["verdict"] == "passed" and tags["candidate_accuracy"] == "0.4"
    # The next champion's judgement needs what this one answered: nothing else is kept.
    assert len(list((tracked.state / "evidence" / "scene").iterdir())) == 1


def test_a_candidate_is_told_of_every_rule_it_breaks(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    contest(240, champion=True)
    passed = gate(config, tracked, "scene", contest(243))
    assert passed.ok, passed.reasons
    assert "on the same 300 test tiles" in passed.reasons[0]
    assert passed.figures["champion_accuracy"] == 0.8
    assert passed.figures["difference_to_champion"] == pytest.approx(0.01)

    strict = ruled(config, max_turn_drop=None, min_value=0.75, max_size_mb=1e-3)
    worse = contest(210)
    refused = gate(strict, tracked, "scene", worse)
    broken = ["min_value", "max_drop", "classes_and_slices", "max_size_mb"]
    assert not refused.ok and [one["rule"] for one in refused.checks if not one["ok"]] == broken
    assert refused.reasons == [rule(refused, name)["said"] for name in broken]
    assert rule(refused, "max_drop")["value"] == pytest.approx(-0.1)
    tags = next(v for v in Tracker(tracked).versions("scene") if v.version == worse.version).tags
    assert tags["verdict"] == "refused" and tags["verdict_against"] == "scene/1"
    assert tags["verdict_reasons"] == "; ".join(refused.reasons)
    kept = json.loads(tags["verdict_checks"])
    assert [one["rule"] for one in kept] == [one["rule"] for one in refused.checks]
    json.dumps(refused.checks, allow_nan=False)


def test_a_class_that_fell_refuses_a_model_that_is_as_good_on_the_whole(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    contest(200, champion=True)
    verdict = gate(config, tracked, "scene", contest(300, wrong_in="Port"))
    assert rule(verdict, "max_drop")["value"] == 0
    fell = rule(verdict, "classes_and_slices")
    assert not verdict.ok and [one["what"] for one in fell["fell"]] == ["class Port"]
    assert "class Port fell from f1" in verdict.reasons[-1]


def test_losses_do_not_add_up_over_promotions(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    loose = ruled(config, max_turn_drop=None, max_drop=0.04)
    contest(290, champion=True)
    contest(281, champion=True)  # a person's choice
    candidate = contest(275)
    verdict = gate(loose, tracked, "scene", candidate)
    assert rule(verdict, "max_drop")["ok"] and not verdict.ok
    assert "scene/1" in verdict.reasons[0] and "5.0 points worse" in verdict.reasons[0]
    assert rule(verdict, "best_champion")["best"] == "scene/1"

    # A rollback says that scene/2 was worse than it looked. It is not what others must reach.
    promotion.promote(tracked, "scene", candidate.version, by="ada", reason="", force=True)
    best = contest(299, champion=True)
    promotion.rollback(tracked, "scene", by="ada", reason="wrong on fields")
    verdict = gate(loose, tracked, "scene", contest(280))
    assert rule(verdict, "best_champion")["best"] == "scene/1", best


def test_a_former_champion_without_files_is_left_out_with_a_word(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    gone = contest(290, champion=True)
    contest(240, champion=True)
    for path in (tracked.state / "evidence" / "scene").glob(f"{gone.bundle_hash[:24]}*"):
        path.unlink()
    (Path(gone.source) / "data" / "bundle" / "model.json").unlink()
    verdict = gate(config, tracked, "scene", contest(243))
    assert verdict.ok
    assert "scene/1 was left out" in rule(verdict, "best_champion")["said"]


def test_generated_imagery_never_replaces_real_imagery(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    contest(150, champion=True)
    verdict = gate(config, tracked, "scene", contest(299, generated=True))
    assert not verdict.ok and "generated" in verdict.reasons[0]


def test_real_imagery_replaces_generated_imagery_without_comparison(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    contest(290, generated=True, champion=True)
    contest(295, generated=True, champion=True)
    verdict = gate(config, tracked, "scene", contest(120))
    assert verdict.ok and "no comparison" in verdict.reasons[0]
    assert "scene/1 was left out" in rule(verdict, "best_champion")["said"]


def test_with_an_unreadable_champion_a_person_decides(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    champion = contest(180, champion=True)
    (Path(champion.source) / "data" / "bundle" / "model.json").write_text("{")
    verdict = gate(config, tracked, "scene", contest(270))
    assert not verdict.ok and "--force" in verdict.reasons[0]
    champion_itself = gate(config, tracked, "scene", champion)
    assert champion_itself.ok and not champion_itself.checks


def test_who_was_rolled_back_is_no_yardstick_until_chosen_again() -> None:
    def move(what: str, old: int | None, new: int, status: str = "FINISHED") -> dict[str, Any]:
        return {"what": what, "from": old, "to": new, "status": status}

    first, second = move("promote", None, 1), move("promote", 1, 2)
    back, again = move("rollback", 2, 1), move("promote", 1, 2)
    assert yardsticks([second, first]) == [2, 1]
    assert yardsticks([back, second, first]) == [1]
    assert yardsticks([again, back, second, first]) == [2, 1]
    assert yardsticks([move("promote", 2, 3, "FAILED"), second, first]) == [2, 1]


def test_what_models_answer_is_asked_once_and_anew_when_the_test_tiles_change(
    tracked: Workspace, config: Config, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real answers: nothing is planted here."""
    from ringmo.evaluation import measuring

    asked: list[int] = []
    answered = measuring.answered

    def counted(bundle: Any, sample: Any, flips: int = 1) -> object:
        asked.append(len(sample))
        return answered(bundle, sample, flips)

    monkeypatch.setattr(measuring, "answered", counted)
    manifest = make_store(tracked, per_class=10, side=32)
    make_selections(tracked, manifest.assign(split="test"))
    make_model(1)
    promotion.promote(
        tracked, "scene", register(config, tracked, "scene", {}).version, by="a", reason="",
        force=True,
    )  # fmt: skip
    make_model(2)
    version = register(config, tracked, "scene", {})
    strict = ruled(
        config, max_turn_drop=0.05, max_latency_ms=60_000.0, max_size_mb=100.0,
        max_data_age_days=1.0,
    )  # fmt: skip
    first = gate(strict, tracked, "scene", version)
    # Both models once, four turns of one, and the tile that the time is taken with.
    assert sum(asked) == 6 * 30 + gate_module.WARM_UP + gate_module.TIMED
    for name in ("max_turn_drop", "max_latency_ms", "max_size_mb"):
        assert rule(first, name)["ok"], first.reasons
    assert rule(first, "max_latency_ms")["value"] > 0
    assert not rule(first, "max_data_age_days")["ok"]  # nobody knows of what day the data is
    assert "cannot be told" in first.reasons[-1]

    asked.clear()
    again = gate(config, tracked, "scene", version)
    assert not asked and again.figures == first.figures
    for path in (tracked.state / "evidence" / "scene").iterdir():
        path.write_bytes(path.read_bytes()[:100])  # a kill, or a full disk
    assert gate(config, tracked, "scene", version).figures == first.figures and sum(asked) == 60

    # What its evaluation found on turned tiles is not measured again.
    asked.clear()
    drops = {f"drop_{turn}": "0.3" for turn in ("mirrored", "turned_90", "turned_180")}
    drops |= {"drop_turned_270": "0.2", "drop_turned_90_low": "0.06"}
    judged = dataclasses.replace(version, tags={**version.tags, **drops})
    turned = rule(
        gate(ruled(config, max_turn_drop=0.05), tracked, "scene", judged), "max_turn_drop"
    )
    assert (turned["ok"], turned["change"], turned["low"]) == (False, "turned 90", 0.06)
    assert not asked and "gate.scene.max_turn_drop" in turned["said"]

    make_selections(tracked, manifest.assign(split="test").iloc[::2])
    fewer = gate(config, tracked, "scene", version)
    assert sum(asked) == 30 and fewer.figures["gate_tiles"] == 15
    assert len(list((tracked.state / "evidence" / "scene").iterdir())) == 2


def test_the_age_of_data_is_that_of_its_version(workspace: Workspace) -> None:
    made = datetime.now(UTC) - timedelta(days=40)
    workspace.versions_file.parent.mkdir(exist_ok=True)
    workspace.versions_file.write_text(json.dumps({"version": "ab", "time": made.isoformat()}))
    assert gate_module.data_age_days(workspace, "ab") == pytest.approx(40, abs=0.01)
    assert gate_module.data_age_days(workspace, "cd") is None
    assert gate_module.data_age_days(workspace, None) is None
