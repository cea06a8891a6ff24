"""What may take the champion encoder's place, by what probes read from its features."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_tasks
import numpy as np
import pandas as pd
import pytest
import torch
from made_store import make_selections, make_store
from safetensors.torch import load_file

from ringmo import config as configuration
from ringmo.config import Config
from ringmo.data.store import COLUMNS, MANIFEST, write_table
from ringmo.errors import BadInput
from ringmo.evaluation import probes
from ringmo.registry import bundle, encoder_gate, promotion
from ringmo.registry.gate import gate
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker, Version
from ringmo.workspace import Workspace

PER_CLASS = 40  # of three classes: 24 test tiles


@pytest.fixture
def scenes(tracked: Workspace) -> Workspace:
    """A workspace with labelled tiles of three colours."""
    make_selections(tracked, make_store(tracked, PER_CLASS))
    return tracked


Enter = Callable[..., Version]


@pytest.fixture
def enter(tracked: Workspace, config: Config, make_model: Any) -> Enter:
    """`enter(seed)` registers an encoder; `blind`: one whose features say nothing."""

    def made(seed: int, *, blind: bool = False, champion: bool = False, **how: Any) -> Version:
        folder = make_model(seed, kind="encoder", **how)
        if blind:
            read = bundle.load(folder)
            with torch.no_grad():
                for parameter in read.model.parameters():
                    parameter.zero_()
            meta = {k: v for k, v in read.meta.items() if k not in ("schema", "weights_sha256")}
            bundle.write(folder, read.model, meta)
        version = register(config, tracked, "encoder", {})
        if champion:
            promotion.promote(tracked, "encoder", version.version, by="ada", reason="", force=True)
        return version

    return made


def test_the_first_encoder_passes_and_its_verdict_is_kept(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    verdict = gate(config, scenes, "encoder", enter(1))
    assert verdict.ok and "first encoder" in verdict.reasons[0]
    assert Tracker(scenes).versions("encoder")[0].tags["verdict"] == "passed"


def test_an_encoder_as_good_as_the_champion_passes_and_a_blind_one_does_not(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    enter(1, champion=True)
    as_good = gate(config, scenes, "encoder", enter(2))
    assert as_good.ok, as_good.reasons
    assert as_good.figures["candidate_scene_knn"] > 0.8  # the colours are easy
    assert as_good.figures["gate_tiles"] == 24
    tags = Tracker(scenes).versions("encoder")[0].tags
    assert tags["verdict_against"] == "encoder/1"
    assert float(tags["difference_to_champion"]) == as_good.figures["difference_to_champion"]

    blind = gate(config, scenes, "encoder", enter(3, blind=True))
    assert not blind.ok
    assert "3.0 points are allowed (gate.encoder.max_drop)" in blind.reasons[0]
    assert "not by chance" in blind.reasons[1]
    broken = [check["rule"] for check in blind.checks if not check["ok"]]
    assert broken == ["max_drop", "scene.knn", "scene.linear"]
    (mean, *_) = blind.checks
    assert mean["low"] <= mean["value"] < -0.3 and mean["limit"] == -0.03

    values = config.model_copy(
        update={"gate": config.gate | {"encoder": configuration.Gate(max_drop=1.0)}}
    )
    assert gate(values, scenes, "encoder", Tracker(scenes).versions("encoder")[0]).ok


def test_features_are_taken_once_for_an_encoder_and_a_selection(
    scenes: Workspace, config: Config, enter: Enter, monkeypatch: Any
) -> None:
    asked: list[int] = []
    real = probes.tile_features

    def counted(*given: Any, **more: Any) -> Any:
        asked.append(1)
        return real(*given, **more)

    monkeypatch.setattr(probes, "tile_features", counted)
    enter(1, champion=True)
    second = enter(2)
    first_time = gate(config, scenes, "encoder", second)
    assert len(asked) == 2
    assert gate(config, scenes, "encoder", second).figures == first_time.figures
    assert len(asked) == 2
    gate(config, scenes, "encoder", enter(3))  # the champion's are there
    assert len(asked) == 3
    kept = list((scenes.state / "features").iterdir())
    assert len(kept) == 2, "those of encoder/2 are of no use any more"
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # a full disk
    gate(config, scenes, "encoder", Tracker(scenes).versions("encoder")[0])
    assert len(asked) == 4
    # Another selection has features of its own.
    shutil.rmtree(scenes.store)
    make_selections(scenes, make_store(scenes, PER_CLASS, seed=5))
    gate(config, scenes, "encoder", Tracker(scenes).versions("encoder")[0])
    assert len(asked) == 6


def test_without_labels_or_with_too_few_the_newest_stands(
    tracked: Workspace, config: Config, enter: Enter
) -> None:
    enter(1, champion=True)
    verdict = gate(config, tracked, "encoder", enter(2))
    assert verdict.ok and "the newest encoder stands" in verdict.reasons[0]
    assert (
        verdict.reasons[1] == "scene is left out: nothing is selected for it: run `ringmo select`"
    )
    make_selections(tracked, make_store(tracked, per_class=10))
    verdict = gate(config, tracked, "encoder", Tracker(tracked).versions("encoder")[0])
    assert verdict.ok and "the newest encoder stands" in verdict.reasons[0]
    assert "18 training and 6 test tiles of 6 places" in verdict.reasons[1]


def test_a_bundle_that_does_not_load_is_refused_with_its_reason(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    champion = enter(1, champion=True)
    candidate = enter(2)
    weights = Path(candidate.source) / "data" / "bundle" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    verdict = gate(config, scenes, "encoder", candidate)
    assert not verdict.ok and "encoder/2 cannot be used" in verdict.reasons[0]
    assert "damaged" in verdict.reasons[0]
    weights.write_bytes(whole)
    (Path(champion.source) / "data" / "bundle" / "model.json").write_text("{")
    verdict = gate(config, scenes, "encoder", candidate)
    assert not verdict.ok and "ringmo promote encoder/2 --force" in verdict.reasons[0]


def test_encoders_of_other_sensors_are_not_compared(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    enter(1, champion=True)
    s1 = config.model_copy(
        update={"select": config.select.model_copy(update={"sensor": "s1"})},
    )
    # Tiles of radar, which neither reads.
    table = pd.read_parquet(scenes.store / "manifest.parquet")
    write_table(scenes.store / MANIFEST, table.assign(sensor="s1"), COLUMNS)
    verdict = gate(s1, scenes, "encoder", enter(2))
    assert not verdict.ok and "nothing to compare encoder/2 by" in verdict.reasons[0]
    assert "encoder/2 does not read s1" in verdict.reasons[1]


def test_real_and_generated_imagery_are_no_match(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    enter(1, generated=True, champion=True)
    verdict = gate(config, scenes, "encoder", enter(2, blind=True))
    assert verdict.ok and "no comparison" in verdict.reasons[0]
    promotion.promote(scenes, "encoder", 2, by="gate", reason="", force=True)
    verdict = gate(config, scenes, "encoder", enter(3, generated=True))
    assert not verdict.ok and "generated" in verdict.reasons[0]


@pytest.mark.parametrize("task", ["segmentation", "change", "detection", "oriented", "height"])
def test_labels_of_every_kind_are_classes_of_tiles(
    tracked: Workspace, task: str, enter: Enter, monkeypatch: Any
) -> None:
    monkeypatch.setattr(encoder_gate, "LEAST_TEST", 4)  # the made-up world has 40 tiles
    monkeypatch.setattr(encoder_gate, "LEAST_PLACES", 3)
    values = made_tasks.selected(tracked, tracked.root / "in", task)
    enter(1, champion=True)
    verdict = gate(values, tracked, "encoder", enter(2, blind=True))
    assert f"candidate_{task}_linear" in verdict.figures, verdict.reasons
    assert any(reason.startswith(f"{task}, ") for reason in verdict.reasons)
    blind = [np.ptp(np.load(one), axis=0).max() for one in (tracked.state / "features").iterdir()]
    assert min(blind) == 0 < max(blind), "one encoder sees, the other does not"


def test_equal_encoders_are_not_refused_for_many_sets() -> None:
    """Of eight sets that differ by chance alone, one is often worse than max_drop; the mean is not.

    The share that passes is far above what sixteen bounds, one for each set and probe, let through.
    """
    random = np.random.default_rng(0)
    passed = singly = 0
    for _ in range(12):
        sets = []
        for i in range(8):
            hard = random.random(200)
            scores = {
                probe: tuple((random.random(200) < hard).astype(float) for _ in range(2))
                for probe in encoder_gate.PROBES
            }
            places = [f"{i}-{place}" for place in range(200)]
            sets.append(encoder_gate._Probed(f"set{i}", places, scores))
        verdict = _compared(sets)
        passed += verdict.ok
        drawn = encoder_gate._drawn(sets, 200)
        singly += all(
            np.quantile(values[1:], 0.05) >= -0.03 for name, values in drawn.items() if name
        )
    assert passed >= 8 and singly == 0, (passed, singly)


def test_one_set_given_up_for_the_others_is_refused() -> None:
    random = np.random.default_rng(1)
    sets = []
    for i, (old, new) in enumerate([(0.6, 0.9), (0.6, 0.9), (0.8, 0.5)]):
        scores = {
            probe: tuple((random.random(300) < share).astype(float) for share in (new, old))
            for probe in encoder_gate.PROBES
        }
        sets.append(
            encoder_gate._Probed(f"set{i}", [f"{i}-{place}" for place in range(300)], scores)
        )
    verdict = _compared(sets)
    assert not verdict.ok
    assert verdict.figures["difference_to_champion_low"] > 0, "on average it is better"
    assert [check["rule"] for check in verdict.checks if not check["ok"]] == [
        "set2.knn",
        "set2.linear",
    ]


def _compared(sets: Any) -> Any:
    values = Config.load(Path(__file__).parents[2] / "params.yaml")
    values = values.model_copy(
        update={"evaluate": values.evaluate.model_copy(update={"bootstrap_samples": 200})}
    )
    new, old = (Version("encoder", n, {}, (), "r", "s", 0.0) for n in (2, 1))
    return encoder_gate._compared(values, new, old, sets)


def test_tiles_of_several_classes_are_judged_class_by_class(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    selection = scenes.work("select") / "scene.parquet"
    table = pd.read_parquet(selection)
    names = {"Beach": "Beach;Sand", "Forest": "Forest", "Port": "Port;Sand"}
    table.assign(label=table["label"].map(names)).to_parquet(selection, index=False)
    enter(1, champion=True)
    verdict = gate(config, scenes, "encoder", enter(2, blind=True))
    assert verdict.figures["champion_scene_linear"] > 0.8
    # Whoever sees nothing says the classes that most tiles have: sand.
    assert verdict.figures["candidate_scene_linear"] == pytest.approx(1 / 3, abs=0.01)
    assert not verdict.ok


def test_two_tasks_on_the_same_tiles_are_two_sets_of_one_draw(
    scenes: Workspace, config: Config, enter: Enter
) -> None:
    same = encoder_gate._Probed(
        "one", list("abcdefgh"), {p: (np.arange(8) % 2.0, np.zeros(8)) for p in encoder_gate.PROBES}
    )
    twin = encoder_gate._Probed("two", same.places, same.scores)
    drawn = encoder_gate._drawn([same, twin], 50)
    assert np.array_equal(drawn["one/knn"], drawn["two/linear"])
    assert np.array_equal(drawn["one/knn"], drawn[""])


def test_only_max_drop_counts_for_the_encoder(workspace: Workspace) -> None:
    configuration.edit(workspace.params_file, {"gate.encoder.max_drop": 0.1})
    assert Config.load(workspace.params_file).gate["encoder"].max_drop == 0.1
    with pytest.raises(BadInput, match=r"gate\.encoder\.min_value: .* leave it out"):
        configuration.edit(workspace.params_file, {"gate.encoder.min_value": 0.5})
    with pytest.raises(BadInput, match="`encoder` is no task"):
        configuration.edit(workspace.params_file, {"tasks": ["encoder"]})


def test_the_weights_of_a_blind_encoder_are_zero(enter: Enter, tracked: Workspace) -> None:
    """What the tests above rest on."""
    enter(4, blind=True)
    tensors = load_file(tracked.work("pretrain") / "encoder" / "model.safetensors")
    assert not any(v.any() for name, v in tensors.items() if name.endswith(("weight", "bias")))
