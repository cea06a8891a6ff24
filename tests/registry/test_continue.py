"""pretrain.refresh: continue. New imagery trains the champion encoder further, and nothing else."""

from pathlib import Path

import made_store
import pytest

from ringmo import chain
from ringmo import config as configuration
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder as untrained
from ringmo.registry import bundle, lineage, promotion, verify
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker, Version
from ringmo.stage import run_stage
from ringmo.training.pretrain import pretrain
from ringmo.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def _settings(place: Workspace) -> Config:
    configuration.edit(place.params_file, {"pretrain.refresh": "continue"})
    return Config.load(place.params_file)


def _start(place: Workspace) -> str | None:
    named = configuration.read_yaml(place.root / "champion.yaml")["encoder"]
    return None if named is None else str(named)


def _trained(config: Config, place: Workspace) -> Version:
    """As a run does it: who starts, the training, registration; promoted whatever the gate says."""
    chain.bring_start(config, place)
    run_stage(place, "pretrain", lambda out: pretrain(config, place, out))
    version = register(config, place, "encoder", {})
    promotion.promote(place, "encoder", version.version, by="ada", reason="", force=True)
    return version


def test_only_new_imagery_moves_the_start(tracked: Workspace) -> None:
    place, config = tracked, _settings(tracked)
    tiles = made_store.make_store(place, per_class=10)
    made_store.make_selections(place, tiles)
    first = _trained(config, place)
    assert _start(place) is None, "there was no champion to start from"
    assert not chain.bring_start(config, place), "nothing is new: the stage stays cached"

    more = made_store.make_store(place, per_class=12, seed=1)
    made_store.make_selections(place, more)
    assert chain.bring_start(config, place)
    assert _start(place) == first.bundle_hash
    second = _trained(config, place)
    assert second.tags["encoder_hash"] == first.bundle_hash
    assert second.tags["encoder_version"] == "encoder/1"
    assert not chain.bring_start(config, place)

    # Nor does a rollback ask for anything to be trained.
    promotion.rollback(place, "encoder", by="ada", reason="")
    assert Tracker(place).aliased("encoder", "champion") == Tracker(place).version("encoder", 1)
    assert not chain.bring_start(config, place) and _start(place) == first.bundle_hash

    # From the second back to what only the first saw.
    told = lineage.text(lineage.lineage(place, "encoder/2"))
    assert "encoder  encoder/1" in told
    seen = lineage.who_saw(place, str(tiles["key"].iloc[0]))
    hows = {f"{row['model']}/{row['version']}": row["how"][0]["through"] for row in seen["models"]}
    assert hows == {"encoder/1": None, "encoder/2": "encoder/1"}
    links = {(link.of, link.link): link.state for link in verify.verify(place, "encoder/2")}
    assert links["encoder/2", "pretrain: start"] == verify.OK
    assert links["encoder/1", "weights"] == verify.OK


def test_its_weights_are_the_champions_and_no_others(tracked: Workspace, tmp_path: Path) -> None:
    place, config = tracked, _settings(tracked)
    made_store.make_selections(place, made_store.make_store(place, per_class=10))
    first = _trained(config, place)
    made_store.make_selections(place, made_store.make_store(place, per_class=10, seed=1))
    chain.bring_start(config, place)
    still = {"base_lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
    frozen = config.model_copy(update={"pretrain": config.pretrain.model_copy(update=still)})
    report = pretrain(frozen, place, tmp_path)
    assert report.notes[0].startswith(f"from encoder {first.bundle_hash[:12]}")
    was = bundle.load(Tracker(place).bundle_folder(first)).encoder.state_dict()
    now = bundle.load(tmp_path / "encoder").encoder.state_dict()
    own = untrained(config.model, {"rgb": 3}).state_dict()
    names = [name for name, value in was.items() if name.endswith("weight")]
    assert all(now[name].equal(was[name]) for name in names)
    assert not all(own[name].equal(was[name]) for name in names)


def test_another_architecture_is_one_line(tracked: Workspace, tmp_path: Path) -> None:
    place, config = tracked, _settings(tracked)
    made_store.make_selections(place, made_store.make_store(place, per_class=10))
    _trained(config, place)
    made_store.make_selections(place, made_store.make_store(place, per_class=10, seed=1))
    chain.bring_start(config, place)
    wider = config.model.model_copy(update={"embed_dim": 32})
    with pytest.raises(BadInput, match=r"continue: .* set model\.embed_dim=16, or refresh: full"):
        pretrain(config.model_copy(update={"model": wider}), place, tmp_path)


def test_a_file_of_weights_beside_it_is_refused(workspace: Workspace) -> None:
    with pytest.raises(BadInput, match="init: with refresh: continue"):
        configuration.edit(
            workspace.params_file,
            {"pretrain.refresh": "continue", "pretrain.init": "w.safetensors"},
        )
