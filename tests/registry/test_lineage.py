"""From a model's name to what made it, and errors that say what there is."""

from pathlib import Path
from typing import Any

import pytest

from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import lineage, promotion
from ringmo.registry.register import register
from ringmo.workspace import Workspace


@pytest.fixture
def chain(tracked: Workspace, config: Config, make_model: Any) -> Workspace:
    make_model(1, kind="encoder")
    encoder = register(config, tracked, "encoder", {"data_version": "0a1b2c.dir"})
    make_model(2, encoder_hash=encoder.bundle_hash, accuracy=0.61)
    tags = {"data_version": "0a1b2c.dir", "flow_run": "f7", "verdict": "passed"}
    register(config, tracked, "scene", tags)
    promotion.promote(tracked, "scene", by="gate", reason="first")
    return tracked


def test_a_reference_names_a_version(chain: Workspace, make_model: Any, tmp_path: Path) -> None:
    assert str(lineage.resolve(chain, "scene@champion")) == "scene/1"
    assert str(lineage.resolve(chain, "scene/1")) == "scene/1"
    folder = make_model(3, folder=tmp_path / "bundle")
    assert lineage.resolve(chain, str(folder)).version == 0


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("scene/7", "scene/1"),
        ("scene@previous", "@champion"),
        ("sceen@champion", "encoder, scene"),
        ("what is this", "no model's name"),
    ],
)
def test_an_unknown_reference_is_told_what_there_is(chain: Workspace, ref: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        lineage.resolve(chain, ref)


def test_lineage_leads_from_production_to_the_data(chain: Workspace) -> None:
    tree = lineage.lineage(chain, "scene@champion")

    def find(part: dict[str, Any], what: str) -> list[str]:
        here = [part["name"]] if part["what"] == what else []
        return here + [name for child in part["from"] for name in find(child, what)]

    assert find(tree, "encoder") == ["encoder/1"]
    assert find(tree, "data") == ["0a1b2c.dir", "0a1b2c.dir"]  # the task's and the encoder's
    assert find(tree, "selection") == ["5e1ec7", "5e1ec7"]
    assert find(tree, "flow run") == ["f7"]
    assert len(find(tree, "code")) == 2
    text = lineage.text(tree)
    assert text.startswith("model  scene/1") and "└─" in text and "encoder/1" in text


def test_models_are_listed_with_their_figures(chain: Workspace) -> None:
    rows = lineage.models(chain)
    assert [(row["model"], row["version"]) for row in rows] == [("encoder", 1), ("scene", 1)]
    scene = lineage.models(chain, "scene")[0]
    assert (scene["metric"], scene["unit"], scene["value"]) == (
        "accuracy",
        "%",
        0.61,
    ) and "champion" in scene["aliases"]
    assert scene["encoder"] == "encoder/1" and scene["generated"] is False
    assert "61.0 %" in lineage.models_text(rows)
    assert lineage.models(chain, "nothing") == []
