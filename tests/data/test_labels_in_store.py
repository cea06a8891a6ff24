"""Masks, boxes and second dates from published layouts into the store, validated and mended."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_imagery import geotiff, pixels, tree, write

from ringmo.config import Config
from ringmo.data import store
from ringmo.data.selection import select
from ringmo.data.store import TileStore
from ringmo.data.validation import validate


def mask(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def fields(folder: Path, count: int = 12) -> Path:
    """Images with masks of two values, the second in ever more columns."""
    for i in range(count):
        write(folder / "images" / f"{i:02}.png", i, "PNG")
        values = np.zeros((40, 48), np.uint8)
        values[:, : 3 + i] = 255
        mask(folder / "masks" / f"{i:02}.png", values)
    return folder


def member(workspace: Any, row: Any, part: str) -> bytes:
    return TileStore(workspace.store).read(
        *(row[f"{part}_{name}"] for name in ("shard", "offset", "size"))
    )


def opened(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_masks_lie_beside_their_images_and_a_corrected_one_moves_nothing_else(
    run, workspace, manifest, tmp_path
):
    source = fields(tmp_path / "in")
    report = run(source)
    assert report.figures["masks"] == report.figures["tiles"] == 12
    rows = manifest().set_index("source")
    for i, row in enumerate(rows.to_dict("records")):
        found = opened(member(workspace, row, "mask"))
        assert (found == (np.arange(48) < 3 + i)).all()
        assert row["mask_shard"] == row["shard"] and row["mask_coding"] == "binary"
        assert list(row["mask_counts"][:2]) == [40 * (45 - i), 40 * (3 + i)]
    assert json.loads((workspace.store / store.CLASSES).read_text()) == {
        "binary": ["background", "object"]
    }
    first = tree(workspace.store)
    assert run(source).figures["unchanged"]
    assert tree(workspace.store) == first

    config = Config.load(workspace.params_file)
    out = tmp_path / "before"
    out.mkdir()
    select(config, workspace, out)
    mask(source / "masks" / "05.png", np.full((40, 48), 255))
    report = run(source)
    assert report.figures["new_tiles"] == 0 and report.figures["new_shards"] == 1
    after = manifest().set_index("source")
    same = [name for name in after.columns if not name.startswith("mask_")]
    assert after[same].equals(rows[same])
    assert (opened(member(workspace, after.loc["images/05.png"], "mask")) == 1).all()
    changed = after.index[after["mask_hash"] != rows["mask_hash"]]
    assert list(changed) == ["images/05.png"]
    # No encoder is trained again for a mask.
    again = tmp_path / "after"
    again.mkdir()
    select(config, workspace, again)
    name = "pretrain.parquet"
    assert (again / name).read_bytes() == (out / name).read_bytes()
    assert tree(workspace.store)["tiles-000000.tar"] == first["tiles-000000.tar"]

    (source / "masks" / "05.png").unlink()
    run(source)
    gone = manifest().set_index("source").loc["images/05.png"]
    assert gone["mask_size"] == 0 and gone["mask_shard"] != gone["mask_shard"]


def test_what_values_mean_may_change_later(run, workspace, manifest, tmp_path):
    source = tmp_path / "in"
    for i in range(4):
        write(source / "images" / f"{i}.png", i, "PNG")
        mask(source / "masks" / f"{i}.png", np.tile(np.arange(48) // 16, (40, 1)))
    run(source)
    assert set(manifest()["mask_coding"]) == {"index"}
    codings = {"mine": {"road": 2, "field": 1, "ignore": 0}}
    run(
        source,
        ingest__mask_codings=codings,
        ingest__about={str(source): {"layout": "masks", "masks": "mine"}},
    )
    rows = manifest()
    assert set(rows["mask_coding"]) == {"mine"}
    assert json.loads((workspace.store / store.CLASSES).read_text()) == {"mine": ["road", "field"]}
    row = rows.to_dict("records")[0]
    assert (opened(member(workspace, row, "mask")) == np.repeat([255, 1, 0], 16)).all()
    codings["mine"] = {"field": 1, "road": 2, "ignore": 0}
    run(source, ingest__mask_codings=codings)
    row = manifest().to_dict("records")[0]
    assert (opened(member(workspace, row, "mask")) == np.repeat([255, 0, 1], 16)).all()


def test_both_dates_are_tiles_of_one_place_and_the_first_names_the_second(run, manifest, tmp_path):
    source = tmp_path / "in"
    for i in range(10):
        write(source / "A" / f"{i}.png", i, "PNG")
        write(source / "B" / f"{i}.png", 500 + i, "PNG")
        mask(source / "label" / f"{i}.png", pixels(i)[..., 0] > 128)
    (source / "B" / "9.png").write_bytes((source / "A" / "9.png").read_bytes())  # no change at all
    report = run(source)
    rows = manifest().set_index("source")
    assert report.figures["pairs"] == 10 and len(rows) == 19
    for i in range(9):
        early, late = rows.loc[f"A/{i}.png"], rows.loc[f"B/{i}.png"]
        assert early["second"] == late["key"] and late["second"] != late["second"]
        assert early["place"] == late["place"] and early["split"] == late["split"]
        assert early["mask_size"] > 0 == late["mask_size"]
    assert rows.loc["A/9.png"]["second"] == rows.loc["A/9.png"]["key"]
    assert run(source).figures["unchanged"]


def test_scenes_are_cut_with_masks_boxes_and_second_dates(run, workspace, manifest, tmp_path):
    source = tmp_path / "in"
    for date, number in (("A", 1), ("B", 2)):
        write(source / date / "s.png", number, "PNG", width=200, height=150)
    values = np.arange(200 * 150).reshape(150, 200) // 5000 % 2 * 255
    mask(source / "label" / "s.png", values)
    run(source, ingest__tile_size=64)
    rows = manifest()
    early = rows[rows["source"] == "A/s.png"]
    assert len(early) == 12 and len(rows) == 24
    late = rows.set_index("key")
    for row in early.to_dict("records"):
        other = late.loc[row["second"]]
        assert (other["source"], other["row"], other["col"]) == ("B/s.png", row["row"], row["col"])
        part = values[row["row"] : row["row"] + 64, row["col"] : row["col"] + 64] // 255
        assert (opened(member(workspace, row, "mask")) == part).all()


def test_labels_that_do_not_fit_set_their_image_aside(run, workspace, tmp_path):
    source = fields(tmp_path / "in")
    mask(source / "masks" / "03.png", np.zeros((10, 10)))
    (source / "masks" / "04.png").write_bytes(b"PK\x03\x04 an archive")
    report = run(source, ingest__max_bad_share=0.5)
    import pyarrow.parquet as pq

    rows = pq.read_table(workspace.store / store.QUARANTINE).to_pylist()
    reasons = {row["source"]: row["reason"] for row in rows}
    assert reasons["images/03.png"] == "its mask has 10x10 pixels, the image 48x40"
    assert "its mask" in reasons["images/04.png"]
    assert report.figures["tiles"] == 10


@pytest.mark.slow
def test_what_ingest_wrote_passes_validation_and_a_broken_label_does_not(
    run, workspace, manifest, tmp_path
):
    from ringmo.errors import AnswerIsNo

    source = fields(tmp_path / "in", 40)
    run(source)
    config = Config.load(workspace.params_file)
    (tmp_path / "one").mkdir()
    verdict = validate(config, workspace, tmp_path / "one")
    assert verdict.figures["broken"] == 0
    rows = manifest()
    rows.loc[3, "mask_width"] = 40
    path = workspace.store / store.MANIFEST
    facts = store.read_facts(path)
    facts.pop("schema", None)
    store.write_table(path, rows, store.COLUMNS, facts)
    (tmp_path / "two").mkdir()
    with pytest.raises(AnswerIsNo, match="mask"):
        validate(config, workspace, tmp_path / "two")
    pages = [page.read_text() for page in (tmp_path / "two" / "docs").rglob("*.html")]
    assert any("images/03.png" in page and "data:image" in page for page in pages)


def reasons(workspace: Any) -> dict[str, str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(workspace.store / store.QUARANTINE).to_pylist()
    return {row["source"]: row["reason"] for row in rows}


def test_dates_of_other_sizes_or_places_are_no_pair(run, workspace, manifest, tmp_path):
    source = tmp_path / "in"
    for i in range(8):
        geotiff(source / "A" / f"{i}.tif", i, 1000.0 * i, 5e6)
        geotiff(source / "B" / f"{i}.tif", 500 + i, 1000.0 * i, 5e6)
        mask(source / "label" / f"{i}.png", pixels(i, 48, 48)[..., 0] > 128)
    geotiff(source / "B" / "0.tif", 500, 0, 5e6, side=40)
    geotiff(source / "B" / "1.tif", 501, 1030, 5e6)
    geotiff(source / "B" / "2.tif", 502, 2000.4, 5e6)  # within a pixel
    geotiff(source / "B" / "3.tif", 503, 3000, 5e6, crs="EPSG:32632")
    for date in ("A", "B"):  # scenes that are cut, of two sizes
        width = 300 if date == "A" else 280
        write(source / date / "9.png", ord(date), "PNG", width=width, height=160)
    report = run(source, ingest__max_bad_share=0.5, ingest__tile_size=64)
    found = reasons(workspace)
    assert found["A/0.tif"] == "its second date has 40x40 pixels, it has 48x48"
    assert found["A/1.tif"] == "its second date lies elsewhere, 30 pixels away"
    assert found["A/3.tif"].startswith("its second date lies elsewhere, ")
    assert found["A/9.png"] == "its second date has 280x160 pixels, it has 300x160"
    assert set(found) == {"A/0.tif", "A/1.tif", "A/3.tif", "A/9.png"}
    assert report.figures["pairs"] == 5
    # What is left of such a pair is imagery; mended, it is a pair again.
    assert {"B/0.tif", "B/1.tif", "B/9.png"} <= set(manifest()["source"])
    geotiff(source / "B" / "0.tif", 500, 0, 5e6)
    report = run(source, ingest__max_bad_share=0.5, ingest__tile_size=64)
    assert "A/0.tif" not in reasons(workspace) and report.figures["pairs"] == 6


def test_made_up_ground_of_ones_own_is_generated(run, workspace, manifest, tmp_path):
    for i in range(3):
        write(tmp_path / "real" / f"{i}.png", i, "PNG")
        write(tmp_path / "made" / f"{i}.png", 100 + i, "PNG")
    sources = tmp_path / "real", tmp_path / "made"
    assert not run(*sources).figures["generated"]
    assert run(*sources, ingest__about={str(sources[1]): {"generated": True}}).figures["generated"]
    rows = manifest()
    assert rows.groupby("source_root")["generated"].agg(set).to_dict() == {
        str(sources[0]): {False},
        str(sources[1]): {True},
    }
    # What is said is not read: nothing was written anew.
    assert set(rows["ingest"]) == {1}


def test_labels_that_only_a_later_copy_has_are_told_of(run, workspace, manifest, tmp_path):
    import pandas as pd
    from PIL import Image as Picture

    for i in range(3):
        write(tmp_path / "plain" / f"{i}.png", i, "PNG")
        write(tmp_path / "masked" / "images" / f"{i}.png", i, "PNG")
        mask = tmp_path / "masked" / "masks" / f"{i}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Picture.fromarray(np.eye(40, 48, dtype=np.uint8)).save(mask)
    about = {str(tmp_path / "masked"): {"layout": "masks", "masks": "binary"}}
    plain, masked = tmp_path / "plain", tmp_path / "masked"
    params = {"ingest__about": about, "ingest__max_bad_share": 1.0}
    run(plain, masked, **params)
    reasons = pd.read_parquet(workspace.store / "quarantine.parquet")["reason"]
    assert set(reasons) == {
        f"same image as {i}.png, which lacks its mask: bring them to that one" for i in range(3)
    }
    # The source with the labels first keeps them.
    run(masked, plain, **params)
    assert manifest()["mask_shard"].notna().sum() == 3


def test_what_labels_there_are_is_told_by_kind(run, workspace, manifest, tmp_path):
    from ringmo.data import class_facts

    for i in range(4):
        write(tmp_path / "in" / "images" / f"{i}.png", i, "PNG")
        mask = tmp_path / "in" / "masks" / f"{i}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        if i:
            from PIL import Image as Picture

            Picture.fromarray(np.eye(40, 48, dtype=np.uint8)).save(mask)
    run(tmp_path / "in")
    found = class_facts.labelled(manifest())
    assert found == {"masks": 3} and class_facts.said(found) == "3 with masks"
    assert class_facts.said({}) == "none"
