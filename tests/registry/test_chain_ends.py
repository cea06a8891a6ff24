"""The chain's end: all is judged before anything is promoted, and nothing is promoted twice."""

import json
from typing import Any

import pytest

from ringmo import chain
from ringmo import config as configuration
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import promotion
from ringmo.registry.gate import Verdict
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker
from ringmo.stage import Report
from ringmo.training.pretrain import pretrain
from ringmo.workspace import Workspace


@pytest.fixture
def selected(tracked: Workspace) -> Workspace:
    """A workspace of which `select` said that there are labels for scene."""
    report = Report("select", figures={"other_tasks": ["height"]})
    report.tables["tasks"] = [{"task": "scene", "tiles": 60, "beside": []}]
    report.write(tracked.work("select") / "report.json")
    return tracked


@pytest.fixture
def lenient(monkeypatch: Any) -> None:
    """A gate of tasks that lets all pass: how it judges is tested elsewhere."""
    from ringmo.registry import gate

    real = gate._judge

    def judge(config: Any, place: Any, tracker: Any, task: str, *models: Any) -> Verdict:
        if task == "encoder":
            return real(config, place, tracker, task, *models)
        figures = {"candidate_accuracy": 0.9, "gate_tiles": 24}
        if models[1] is not None:
            figures["champion_accuracy"] = 0.8
        return Verdict(True, ["good enough"], figures)

    monkeypatch.setattr(gate, "_judge", judge)


Made = Any


@pytest.fixture
def made(selected: Workspace, config: Config, make_model: Any, lenient: None) -> Made:
    """`made(n)`: an encoder and a scene model on it, registered and judged."""

    def make(seed: int) -> list[Report]:
        from ringmo.registry import bundle

        encoder = bundle.load(make_model(seed, kind="encoder"))
        make_model(seed, encoder_hash=encoder.hash)
        return [chain.register(config, selected, model) for model in ("encoder", "scene")]

    return make


def _promote(place: Workspace, model: str) -> None:
    waits = chain.passed(place, model)
    assert waits is not None
    number = int(waits[0].rpartition("/")[2])
    promotion.promote(place, model, number, by="gate", reason="; ".join(waits[1]))


def test_registering_judges_and_promotes_nothing(selected: Workspace, made: Made) -> None:
    encoder, scene = made(1)
    assert encoder.figures["verdict"] == scene.figures["verdict"] == "passed"
    assert scene.figures["encoder"] == "encoder/1"
    assert Tracker(selected).aliased("scene", "champion") is None
    assert chain.passed(selected, "scene") == ("scene/1", ["good enough"])


def test_a_model_brings_its_encoder_along(
    selected: Workspace, config: Config, make_model: Any, lenient: None
) -> None:
    from ringmo.registry import bundle

    encoder = bundle.load(make_model(1, kind="encoder"))
    make_model(2, encoder_hash=encoder.hash)
    assert chain.register(config, selected, "scene").figures["encoder"] == "encoder/1"
    make_model(3, kind="encoder")  # another one now, and damaged: the model's own is known
    (selected.work("pretrain") / "encoder" / "model.safetensors").write_bytes(b"")
    make_model(4, encoder_hash=encoder.hash)
    assert chain.register(config, selected, "scene").figures["encoder"] == "encoder/1"
    make_model(5, encoder_hash="another")
    with pytest.raises(BadInput, match="damaged"):
        chain.register(config, selected, "scene")


def test_both_heads_stand_side_by_side_before_any_is_promoted(
    selected: Workspace, config: Config, made: Made
) -> None:
    made(1)
    (first,) = chain.heads(config, selected)
    assert first["champion"] is None and first["candidate"] == "scene/1"
    assert not chain.heads_shown(config, selected), "who is killed now shows it again"
    chain.keep_heads(config, selected, [first])
    assert chain.heads_shown(config, selected)
    for model in ("encoder", "scene"):
        _promote(selected, model)
    made(2)
    assert not chain.heads_shown(config, selected), "it is of other registrations"
    (row,) = chain.heads(config, selected)
    assert (row["champion"], row["champion_encoder"]) == ("scene/1", "encoder/1")
    assert (row["candidate"], row["candidate_encoder"]) == ("scene/2", "encoder/2")
    assert row["difference"] == pytest.approx(0.1) and row["verdict"] == "passed"
    chain.keep_heads(config, selected, [row])
    kept = json.loads((selected.state / "reports" / "heads.json").read_text())
    assert kept["rows"] == [row]
    cells, _ = chain.heads_table([row])
    assert cells[0][1:4] == (
        "scene/1 on encoder/1: 80.0 %",
        "scene/2 on encoder/2: 90.0 %",
        "10.0 points",
    )
    champion = Tracker(selected).aliased("scene", "champion")
    assert champion is not None and champion.version == 1


def test_what_passed_is_promoted_by_itself_once(selected: Workspace, made: Made) -> None:
    made(1)
    _promote(selected, "scene")
    assert chain.passed(selected, "scene") is None
    made(2)
    _promote(selected, "scene")
    promotion.rollback(selected, "scene", by="ada", reason="wrong on fields")
    made(2)
    assert chain.passed(selected, "scene") is None, "what a person rolled back stays so"


@pytest.mark.long
def test_a_verdict_against_another_champion_is_found_anew(
    selected: Workspace, config: Config, made: Made
) -> None:
    made(1)
    assert chain.registered(config, selected, "scene"), "killed here, it is not judged again"
    _promote(selected, "scene")
    made(2)
    assert chain.registered(config, selected, "scene")
    made(3)
    promotion.promote(selected, "scene", 2, by="ada", reason="I like it", force=True)
    assert not chain.registered(config, selected, "scene"), "scene/3 was compared with scene/1"
    (_, scene) = made(3)
    assert scene.figures["against"] == "scene/2"
    _promote(selected, "scene")
    assert chain.registered(config, selected, "scene")


def test_a_promotion_that_was_killed_half_way_is_finished_and_not_repeated(
    selected: Workspace, made: Made, monkeypatch: Any
) -> None:
    made(1)
    _promote(selected, "scene")
    made(2)
    with monkeypatch.context() as killed:
        # The entry is written, and then no alias moves any more.
        def dies(*_: Any) -> None:
            raise KeyboardInterrupt

        killed.setattr(Tracker, "set_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            _promote(selected, "scene")
    assert chain.passed(selected, "scene") is None
    champion = Tracker(selected).aliased("scene", "champion")
    assert champion is not None and champion.version == 2
    assert [row["to"] for row in promotion.history(selected, "scene")] == [2, 1]


def test_champions_on_another_encoder_are_named_with_what_to_type(
    selected: Workspace, config: Config, made: Made, make_model: Any
) -> None:
    made(1)
    _promote(selected, "encoder")
    _promote(selected, "scene")
    assert chain.left_behind(config, selected) == []
    # By a person, or from another workspace: an encoder that is not this workspace's.
    make_model(7, kind="encoder")
    register(config, selected, "encoder", {})
    promotion.promote(selected, "encoder", 2, by="ada", reason="", force=True)
    (row,) = chain.left_behind(config, selected)
    assert (row["model"], row["encoder"]) == ("scene/1", "encoder/1")
    assert row["next"] == "run --task scene --set pretrain.refresh=champion"
    # Once it is, a task that is not among this workspace's is told how it gets there.
    chain.register(config, selected, "encoder")
    other = config.model_copy(update={"tasks": ["height"]})
    (row,) = chain.left_behind(other, selected)
    assert row["next"] is None, "no tile has labels of scene any more"


def test_the_champion_encoder_is_taken_as_it_is(
    selected: Workspace, config: Config, made: Made, make_model: Any, tmp_path: Any
) -> None:
    with pytest.raises(BadInput, match="no encoder is champion yet"):
        chain.bring_champion(_taking(config), selected)
    made(1)
    _promote(selected, "encoder")
    make_model(2, kind="encoder")
    chain.bring_champion(_taking(config), selected)
    report = pretrain(_taking(config), selected, tmp_path)
    champion = Tracker(selected).aliased("encoder", "champion")
    assert champion is not None
    assert report.figures["taken"] == champion.bundle_hash[:16]
    from ringmo.registry import bundle

    assert bundle.load(tmp_path / "encoder").hash == champion.bundle_hash
    wider = _taking(config).model_copy(
        update={"model": config.model.model_copy(update={"embed_dim": 32})}
    )
    with pytest.raises(BadInput, match=r"another architecture: set model\.embed_dim=16"):
        pretrain(wider, selected, tmp_path / "wider")
    chain.bring_champion(config, selected)
    named = configuration.read_yaml(selected.root / "champion.yaml")
    assert named == {"encoder": None}, "a training of one's own depends on no champion"


def _taking(config: Config) -> Config:
    changed = config.pretrain.model_copy(update={"refresh": "champion"})
    return config.model_copy(update={"pretrain": changed})
