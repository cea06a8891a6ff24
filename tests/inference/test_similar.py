"""The nearest tiles: exactly those, from the store or a file, each embedded once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_store import COLOURS, make_store, png
from small_models import rgb, sar, write_model
from test_embed import config, write_scene

from ringmo.cli import main
from ringmo.config import edit
from ringmo.data.decode import decode
from ringmo.data.store import TileStore
from ringmo.errors import BadInput
from ringmo.inference import embed as embedding
from ringmo.inference import similar as searching
from ringmo.inference.similar import similar, text
from ringmo.registry import bundle
from ringmo.workspace import Workspace


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", sensors=("rgb", "sar"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A new one of the class Forest."""
    noise = np.random.default_rng(99).normal(0, 12, (48, 48, 3))
    path = tmp_path / "query.png"
    path.write_bytes(png(np.clip(np.array(COLOURS["Forest"]) + noise, 0, 255).astype(np.uint8)))
    return path


def by_hand(workspace: Workspace, model: Path, image: Path) -> dict[str, float]:
    """Key → cosine, of the tiles of the store one by one."""
    own, store = bundle.load(model), TileStore(workspace.store)
    (wanted,) = own.embed([decode(image.read_bytes())], sensor="rgb").astype(np.float64)
    cosines = {}
    for row in store.manifest().itertuples():
        pixels = decode(store.read(row.shard, row.offset, row.size))
        (v,) = own.embed([pixels], sensor="rgb").astype(np.float64)
        cosines[row.key] = v @ wanted / np.linalg.norm(v) / np.linalg.norm(wanted)
    return cosines


@pytest.mark.parametrize("chunk", [searching.ROWS, 4])
def test_the_nearest_are_those_of_a_comparison_one_by_one(
    workspace: Workspace, model: Path, image: Path, chunk: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(searching, "ROWS", chunk)
    made = make_store(workspace, per_class=8).set_index("key")
    found = similar(config(workspace), workspace, image, str(model), top=5)
    cosines = by_hand(workspace, model, image)
    nearest = sorted(cosines, key=lambda key: -cosines[key])[:5]
    assert found["searched"] == 24 and [one["key"] for one in found["similar"]] == nearest
    for one in found["similar"]:
        assert np.isclose(one["score"], cosines[one["key"]], atol=1e-5)
        assert one["label"] == made.loc[one["key"], "label"] == "Forest"
        assert one["source"] == f"made/{made.loc[one['key'], 'source']}"
        assert one["longitude"] is None
    assert "Forest" in text(found) and found["page"] in text(found)
    page = Path(found["page"]).read_text()
    assert page.count("<img ") == 6 and page.count("data:image/jpeg") == 6


def test_each_tile_is_embedded_once_and_what_left_is_not_found(
    workspace: Workspace, model: Path, image: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(searching, "PART", 8)
    monkeypatch.setattr(embedding, "BATCH", 4)
    passed = []
    own_small = embedding._small

    def small(pixels: Any, *rest: Any) -> Any:
        passed.append(pixels)
        return own_small(pixels, *rest)

    monkeypatch.setattr(embedding, "_small", small)

    def search(**options: Any) -> dict[str, Any]:
        passed.clear()
        return similar(config(workspace), workspace, image, str(model), **options)

    first = make_store(workspace, per_class=6)
    before = search(top=18)
    assert len(passed) == 18
    folder = workspace.state / "embeddings" / bundle.load(model).hash[:16]
    files = {path: path.read_bytes() for path in folder.glob("*.parquet")}
    assert len(files) == 3
    assert search(top=18) == before and not passed

    second = make_store(workspace, per_class=9)
    new = set(second["key"]) - set(first["key"])
    assert 0 < len(set(first["key"]) & set(second["key"])) < 18  # some left, some stay
    after = search(top=100)
    assert len(passed) == len(new) and after["searched"] == 27
    assert {one["key"] for one in after["similar"]} == set(second["key"])
    assert all(path.read_bytes() == data for path, data in files.items())


def test_a_corrected_label_is_told_without_embedding_again(
    workspace: Workspace, model: Path, image: Path
) -> None:
    from ringmo.data.store import COLUMNS, MANIFEST, write_table

    made = make_store(workspace, per_class=3)
    similar(config(workspace), workspace, image, str(model))
    made["label"] = "Wood"
    write_table(workspace.store / MANIFEST, made, COLUMNS)
    found = similar(config(workspace), workspace, image, str(model))
    assert {one["label"] for one in found["similar"]} == {"Wood"}


def test_only_the_last_models_embeddings_are_kept(
    workspace: Workspace, image: Path, tmp_path: Path
) -> None:
    make_store(workspace, per_class=2)
    hashes = []
    for seed in range(4):
        model = write_model(tmp_path / str(seed), seed=seed)
        similar(config(workspace), workspace, image, str(model))
        hashes.append(bundle.load(model).hash[:16])
    kept = {path.name for path in (workspace.state / "embeddings").iterdir()}
    assert kept == set(hashes[1:])


def test_a_file_of_embeddings_is_searched_and_its_windows_are_shown(
    workspace: Workspace, model: Path, tmp_path: Path
) -> None:
    """Of scenes: the window that the image was cut from, where it lies on Earth."""
    edit(workspace.params_file, {"ingest.tile_size": 64})
    scene = rgb(2, 128, 192)
    write_scene(tmp_path / "scene.tif", scene)
    write_scene(tmp_path / "radar.tif", sar(3))
    out = tmp_path / "tiles.parquet"
    embedding.embed(config(workspace), workspace, str(tmp_path / "*.tif"), str(model), out)
    image = tmp_path / "query.png"
    image.write_bytes(png(scene[64:128, 128:192]))
    found = similar(config(workspace), workspace, image, str(model), out, 3, tmp_path / "page.html")
    assert found["searched"] == 6 and found["data_version"] is None
    best = found["similar"][0]
    assert (best["row"], best["col"]) == (64, 128) and np.isclose(best["score"], 1, atol=1e-5)
    assert best["source"] == str(tmp_path / "scene.tif")
    # 1,600 m east of 3° E and 960 m south of the corner at 5,000 km.
    assert np.isclose(best["longitude"], 3 + 1.6 / 78.5, atol=1e-4)
    assert np.isclose(best["latitude"], 45.153477 - 0.96 / 111.1, atol=1e-4)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") == 4
    assert f"mlat={best['latitude']}&amp;mlon={best['longitude']}" in page
    assert (tmp_path / "scene.tif").as_uri() in page

    (tmp_path / "scene.tif").unlink()
    similar(config(workspace), workspace, image, str(model), out, 3, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("class=none") == 3


def test_what_cannot_be_compared_is_refused(
    workspace: Workspace, model: Path, image: Path, tmp_path: Path
) -> None:
    make_store(workspace, per_class=2)
    out, now = tmp_path / "tiles.parquet", config(workspace)
    other = write_model(tmp_path / "other", seed=5)
    embedding.embed(now, workspace, "store", str(other), out)
    cases = [
        ({"among": out}, "written by another model"),
        ({"among": workspace.store / "manifest.parquet"}, "is no file that `ringmo embed` wrote"),
        ({"among": image}, "query.png"),
        ({"top": 0}, "--top 0: at least 1"),
    ]
    for options, said in cases:
        with pytest.raises(BadInput, match=said):
            similar(now, workspace, image, str(model), **options)
    write_scene(tmp_path / "scene.tif", rgb(2, 600, 600))
    with pytest.raises(BadInput, match="600 x 600 pixels are a scene, not a tile"):
        similar(now, workspace, tmp_path / "scene.tif", str(model))
    write_scene(tmp_path / "radar.tif", sar(3))
    with pytest.raises(BadInput, match="no tile of sensor sar"):
        similar(now, workspace, tmp_path / "radar.tif", str(model))


def test_the_command_tells_a_table_or_json(
    workspace: Workspace, model: Path, image: Path, capsys: Any
) -> None:
    make_store(workspace, per_class=3)
    arguments = ["similar", str(image), "--workspace", str(workspace.root), "--model", str(model)]
    assert main([*arguments, "--top", "2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["score", "label", "source"] and "Forest" in table[2]
    assert main([*arguments, "--top", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["similar"]) == 2
    assert main(["similar", "nowhere.png", *arguments[2:]]) == 2
