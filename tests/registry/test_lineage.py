"""From a model's name to what made it, from a pixel to who saw it, and errors that help."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import lineage, listing, promotion
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
    assert str(listing.resolve(chain, "scene@champion")) == "scene/1"
    assert str(listing.resolve(chain, "scene/1")) == "scene/1"
    folder = make_model(3, folder=tmp_path / "bundle")
    assert listing.resolve(chain, str(folder)).version == 0


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
        listing.resolve(chain, ref)


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
    rows = listing.models(chain)
    assert [(row["model"], row["version"]) for row in rows] == [("encoder", 1), ("scene", 1)]
    scene = listing.models(chain, "scene")[0]
    assert (scene["metric"], scene["unit"], scene["value"]) == (
        "accuracy",
        "%",
        0.61,
    ) and "champion" in scene["aliases"]
    assert scene["encoder"] == "encoder/1" and scene["generated"] is False
    assert "61.0 %" in listing.models_text(rows)
    assert listing.models(chain, "nothing") == []


def _parts(part: dict[str, Any], what: str) -> list[dict[str, Any]]:
    here = [part] if part["what"] == what else []
    return here + [found for child in part["from"] for found in _parts(child, what)]


@contextlib.contextmanager
def nothing_left_but_mlflow(made: Workspace) -> Iterator[None]:
    """The store, the stages' outputs, DVC's cache and the log of versions are away."""
    away = made.root.parent / "away"
    away.mkdir()
    for name in ("data", "work", ".dvc", "dvc.lock"):
        (made.root / name).rename(away / name)
    try:
        yield
    finally:
        for path in away.iterdir():
            path.rename(made.root / path.name)
        away.rmdir()


@pytest.mark.slow
@pytest.mark.long
def test_sources_have_their_shares_also_when_only_mlflow_is_left(made: Workspace) -> None:
    with nothing_left_but_mlflow(made):
        tree = lineage.lineage(made, "scene@champion")
    (selection, of_encoder) = _parts(tree, "selection")
    town, country = _parts(selection, "source")
    assert town["name"] == str(made.root.parent / "town")
    assert (town["facts"]["share"], town["facts"]["tiles"]) == ("66.7 %", 64)
    assert (country["facts"]["share"], country["facts"]["in the data version"]) == ("33.3 %", 32)
    classes = [part["facts"]["training tiles by class"] for part in (town, country, selection)]
    assert sorted(classes[2]) == ["fields", "harbour", "town", "woods"]
    assert all(classes[0][name] + classes[1][name] == classes[2][name] for name in classes[2])
    assert sum(classes[2].values()) == selection["facts"]["train"]
    assert selection["facts"]["tiles"] == 96
    # Test tiles are none of the encoder's, nor are labels.
    assert of_encoder["facts"]["tiles"] == 96 - selection["facts"]["test"]
    assert "training tiles by class" not in of_encoder["facts"]
    (machine,) = {part["facts"]["machine"] for part in _parts(tree, "fine-tuning")}
    assert "torch" in machine and "threads" in machine


def _how(answer: dict[str, Any], model: str) -> list[tuple[str, str | None, str, dict[str, int]]]:
    (row,) = (row for row in answer["models"] if row["model"] == model)
    return [(how["training"], how["through"], how["by"], how["tiles"]) for how in row["how"]]


def _a_tile(made: Workspace, split: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    rows = pq.read_table(made.store / "manifest.parquet").to_pylist()
    return next(row for row in rows if row["split"] == split)


@pytest.mark.slow
def test_an_image_is_known_by_its_bytes_wherever_it_lies_now(
    made: Workspace, tmp_path: Path
) -> None:
    seen, held = _a_tile(made, "train"), _a_tile(made, "test")
    moved = tmp_path / "renamed.jpg"
    shutil.copyfile(f"{seen['source_root']}/{seen['source']}", moved)
    other = tmp_path / "test.jpg"
    shutil.copyfile(f"{held['source_root']}/{held['source']}", other)
    with nothing_left_but_mlflow(made):
        answer = lineage.who_saw(made, str(moved))
        tested = lineage.who_saw(made, str(other))
    assert answer["as"] == "file"
    assert [row["model"] for row in answer["models"]] == ["scene", "encoder"]
    assert answer["models"][0]["aliases"] == ["champion", "candidate"]
    assert _how(answer, "scene") == [
        ("fine-tuning scene", None, "its bytes", {"train": 1}),
        ("pre-training", "encoder/1", "its bytes", {"train": 1}),
    ]
    assert _how(tested, "scene") == [("fine-tuning scene", None, "its bytes", {"test": 1})]
    assert [row["model"] for row in tested["models"]] == ["scene"]
    moved.write_bytes(moved.read_bytes() + b"!")
    assert lineage.who_saw(made, str(moved))["models"] == []


@pytest.mark.slow
def test_an_image_that_was_changed_is_known_by_its_path(made: Workspace) -> None:
    row = _a_tile(made, "train")
    path = Path(row["source_root"]) / row["source"]
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"!")
        answer = lineage.who_saw(made, str(path))
    finally:
        path.write_bytes(before)
    assert {how[2] for how in _how(answer, "scene")} == {"its path, with other bytes"}


@pytest.mark.slow
def test_sources_keys_and_data_versions_are_told_apart(made: Workspace) -> None:
    woods = lineage.who_saw(made, "woods/*")
    assert (woods["as"], sum(_how(woods, "scene")[0][3].values())) == ("source", 24)
    country = lineage.who_saw(made, str(made.root.parent / "country"))
    assert (country["as"], sum(_how(country, "scene")[0][3].values())) == ("source", 32)
    row = _a_tile(made, "val")
    tile = lineage.who_saw(made, row["key"])
    assert (tile["as"], _how(tile, "encoder")[0][3]) == ("tile", {"val": 1})
    one = lineage.who_saw(made, row["source"])
    assert (one["as"], _how(one, "encoder")[0][3]) == ("source", {"val": 1})
    version = listing.resolve(made, "scene/1").tags["data_version"]
    data = lineage.who_saw(made, version[:8])
    assert data["as"] == "data version" and len(data["models"]) == 2
    nobody = lineage.who_saw(made, "Beach/*")
    assert nobody["models"] == [] and "No registered model saw" in lineage.who_saw_text(nobody)


def test_a_version_that_does_not_say_what_it_saw_is_named(chain: Workspace) -> None:
    answer = lineage.who_saw(chain, "woods/*")
    assert answer["silent"] == ["encoder/1", "scene/1"]
    assert "Not known of encoder/1, scene/1" in lineage.who_saw_text(answer)


def test_the_page_needs_no_network(chain: Workspace, tmp_path: Path) -> None:
    from ringmo.registry import lineage_page

    tree = lineage.lineage(chain, "scene@champion")
    tree["from"].append({"what": "source", "name": "<b>", "facts": {"share": "25 %"}, "from": []})
    page = tmp_path / "lineage.html"
    lineage_page.write(tree, page)
    text = page.read_text()
    assert "scene/1" in text and "encoder/1" in text and "width:25%" in text
    assert "http" not in text.replace("http://127.0.0.1", "") and "<b>" not in text
