"""What may take the champion's place, and what it is told otherwise."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ringmo.config import Config
from ringmo.registry import promotion
from ringmo.registry.gate import gate
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker, Version
from ringmo.workspace import Workspace


@pytest.fixture
def contest(tracked: Workspace, config: Config, make_model: Any) -> Any:
    """`contest(accuracy, generated)` registers a model whose test score is known already.

    Scores are kept by model and selection: the one kept here is what the gate reads.
    """
    selection = tracked.work("select") / "scene.parquet"
    selection.parent.mkdir(parents=True)
    selection.write_bytes(b"the test tiles")
    tiles = sha256(selection.read_bytes()).hexdigest()[:24]
    seeds = iter(range(100))

    def enter(accuracy: float, *, generated: bool = False, champion: bool = False) -> Version:
        make_model(next(seeds), generated=generated)
        version = register(config, tracked, "scene", {})
        kept = tracked.state / "scores" / f"{version.bundle_hash[:24]}-{tiles}-1.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"accuracy": accuracy, "mean_f1": accuracy, "n": 500}))
        if champion:
            promotion.promote(tracked, "scene", version.version, by="ada", reason="", force=True)
        return version

    return enter


def test_the_first_version_passes_and_is_said_to_be_first(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    version = contest(0.4)
    verdict = gate(config, tracked, "scene", version)
    assert verdict.ok and "first version" in verdict.reasons[0]
    tags = Tracker(tracked).versions("scene")[0].tags
    assert tags["verdict"] == "passed" and tags["candidate_accuracy"] == "0.4"


@pytest.mark.parametrize(("accuracy", "ok"), [(0.61, True), (0.57, True), (0.569, False)])
def test_a_candidate_may_be_worse_by_max_drop_and_no_more(
    tracked: Workspace, config: Config, contest: Any, accuracy: float, ok: bool
) -> None:
    contest(0.60, champion=True)
    verdict = gate(config, tracked, "scene", contest(accuracy))  # max_drop is 0.03
    assert verdict.ok is ok
    assert verdict.figures["champion_accuracy"] == 0.60
    assert "500 test tiles" in verdict.reasons[0]
    assert Tracker(tracked).versions("scene")[0].tags["verdict"] == ("passed" if ok else "refused")


def test_under_the_least_value_nothing_passes_not_even_the_first(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    rule = config.gate["scene"].model_copy(update={"min_value": 0.5})
    strict = config.model_copy(update={"gate": {"scene": rule}})
    verdict = gate(strict, tracked, "scene", contest(0.4))
    assert not verdict.ok and "min_value" in verdict.reasons[0]


def test_generated_imagery_never_replaces_real_imagery(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    contest(0.5, champion=True)
    verdict = gate(config, tracked, "scene", contest(0.99, generated=True))
    assert not verdict.ok and "generated" in verdict.reasons[0]


def test_real_imagery_replaces_generated_imagery_without_comparison(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    contest(0.99, generated=True, champion=True)
    verdict = gate(config, tracked, "scene", contest(0.4))
    assert verdict.ok and "no comparison" in verdict.reasons[0]


def test_with_an_unreadable_champion_a_person_decides(
    tracked: Workspace, config: Config, contest: Any
) -> None:
    champion = contest(0.6, champion=True)
    (Path(champion.source) / "data" / "bundle" / "model.json").write_text("{")
    verdict = gate(config, tracked, "scene", contest(0.9))
    assert not verdict.ok and "--force" in verdict.reasons[0]


def test_the_champion_itself_passes(tracked: Workspace, config: Config, contest: Any) -> None:
    champion = contest(0.6, champion=True)
    assert gate(config, tracked, "scene", champion).ok
