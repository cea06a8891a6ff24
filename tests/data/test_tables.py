"""Tables of labels: one class or several an image, in a list's place or beside the images."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_imagery import class_folders, write

from ringmo.config import Config
from ringmo.data import class_facts, facts, places, tables
from ringmo.data.sources import list_images
from ringmo.data.validation import validate
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import run_stage


def images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write(folder / name, number, "PNG")
    return folder


def labels(source: Path, which: str = "auto") -> dict[str, str | None]:
    return {image.path: image.label for image in list_images("in", source, which).images}


SEVERAL = {
    "label column": "path,label\na.png,water;ship\nb.png,ship\nc.png,\n",
    "semicolons": "path;label\na.png;ship\na.png;water\nb.png;ship\nc.png;\n",
    "tabs": "file name\tfilename\tTags\n1\ta.png\tship; water\n2\tb.png\tship\n3\tc.png\t\n",
    "a column a class": "IMAGE\\LABEL,ship,water\na.png,1,1\nb.png,1,0\nc.png,0,0\n",
    "without suffixes": "image_name,split,ship,water\na,train,1,1\nb,val,1.0,0.0\nc,test,0,\n",
    "a row a class": '"path","label"\n"a.png",ship\n"a.png",water\n"b.png",ship\n"c.png",""\n',
    "names and numbers": "Filename,Label,ClassName\na.png,9,ship;water\nb.png,8,ship\nc.png,,\n",
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_a_table_is_a_list_or_lies_beside_the_images(tmp_path, name):
    expected = {"a.png": "ship;water", "b.png": "ship", "c.png": None}
    folder = images(tmp_path / "in", "a.png", "b.png", "c.png")
    table = folder / "labels.csv"
    table.write_text(SEVERAL[name])
    assert labels(table) == expected
    listing = list_images("in", folder, "auto")
    assert {image.path: image.label for image in listing.images} == expected
    assert listing.other_files == 0
    assert any("3 of 3 images have a label by labels.csv" in note for note in listing.notes)
    assert labels(folder, "none") == dict.fromkeys(expected)


def test_a_table_says_more_than_folders(tmp_path):
    folder = images(tmp_path, "Beach/0.png", "Port/0.png", "Port/1.png", "Port/sub/1.png")
    assert set(labels(folder).values()) == {"Beach", "Port", "sub"}
    (folder / "table.csv").write_text("file,label\nBeach/0.png,sand;sea\n1.png,ship\ngone.png,x\n")
    # 1.png could be either of two; neither folder is a class any more.
    assert labels(folder) == dict.fromkeys(labels(folder)) | {"Beach/0.png": "sand;sea"}
    notes = list_images("in", folder, "auto").notes
    assert any("2 rows are of no image here, or of several" in note for note in notes)


def test_other_tables_are_no_labels(tmp_path):
    folder = class_folders(tmp_path / "in", classes=2, each=2)
    (folder / "boxes.csv").write_text("image,xmin,ymin,label\n0000.jpg,1,2,ship\n")
    (folder / "stations.csv").write_text("station,depth\n1,2\n")
    (folder / "centres.csv").write_text("image,lat,lon\n0000.jpg,1.5,2\n")
    (folder / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    listing = list_images("in", folder, "auto")
    assert {image.label for image in listing.images} == {"class0", "class1"}
    assert listing.other_files == 4


def test_semicolons_in_paths_are_a_part_of_them(tmp_path):
    folder = images(tmp_path / "in", "a;b/0;1.png", "c/0.png")
    assert labels(folder) == {"a;b/0;1.png": "a,b", "c/0.png": "c"}
    listed = folder / "list.txt"
    listed.write_text("a;b/0;1.png\tship; water;ship\nc/0.png\tfield\n")
    assert labels(listed) == {"a;b/0;1.png": "ship;water", "c/0.png": "field"}
    listed.write_text("a;b/0;1.png\nc/0.png\n")
    assert labels(listed) == {"a;b/0;1.png": "a,b", "c/0.png": "c"}
    (folder / "table.csv").write_text("path,label\na;b/0;1.png,x;y\nc/0.png,y\n")
    assert labels(folder / "table.csv") == {"a;b/0;1.png": "x;y", "c/0.png": "y"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("station,label\n1,2\n", "no column names the image"),
        ("", "no column names the image: .*it has: none"),
        ("path\na.png\n", "no column of labels"),
        ("path,ship,water\na.png,1,2\n", "line 2: water: 0 or 1 expected, found 2"),
        ("path,label\na.png,ship,more\n", "line 2: 3 cells, the header has 2"),
        ("path,label\na.png,ship\n ,ship\n", "line 3: names no image"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, text, said):
    folder = images(tmp_path, "a.png")
    (folder / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=said) as error:
        list_images("in", folder / "t.csv", "auto")
    assert "\n" not in str(error.value) and "t.csv" in str(error.value)
    (folder / "t.csv").write_bytes(b"path,label\na.png,\xff\xff\n")
    with pytest.raises(BadInput, match="no text in UTF-8"):
        list_images("in", folder / "t.csv", "auto")


def test_a_label_counts_for_each_of_its_classes():
    assert tables.joined(["b", " a", "b", ""]) == "a;b" and tables.joined([" "]) is None
    assert tables.by_class({"a;b": 2, "b": 3, "c": 1}) == {"a": 2, "b": 5, "c": 1}


def test_every_class_of_many_is_in_every_split():
    """19 classes in thousands of combinations, as BigEarthNet's."""
    random = np.random.default_rng(2)
    often = np.geomspace(0.4, 0.02, 19)
    rows = []
    for i in range(3000):
        seen = [f"c{c:02d}" for c in np.flatnonzero(random.random(19) < often)]
        rows.append({"key": f"{i:016x}", "label": tables.joined(seen), "source": str(i)})
    new = pd.DataFrame(rows).assign(
        source_root="r", crs=None, second=None, std=0.0, phash="0" * 16, sensor="rgb",
        minx=np.nan, miny=np.nan, maxx=np.nan, maxy=np.nan, shard="s", offset=0, size=1,
        row=0, col=0, width=64, height=64,
    )  # fmt: skip
    settings: dict[str, Any] = {"near_bits": 3, "blank_std": 2.0, "seed": 42}

    def placed(known: Any, table: Any) -> Any:
        shares = {"test": 0.2, "val": 0.1}
        none = lambda *where: b""  # noqa: E731
        return places.assign(known, table, shares=shares, fetch=none, **settings)[0]

    whole = placed(new.iloc[:0], new)
    half = placed(new.iloc[:0], new.iloc[:1500])
    later = pd.concat([half, placed(half, new.iloc[1500:])])
    for table in (whole, later):
        counts: dict[str, Counter[str]] = {}
        for label, split in zip(table["label"], table["split"], strict=True):
            for name in [] if label != label or label is None else label.split(";"):
                counts.setdefault(name, Counter())[split] += 1
        assert len(counts) == 19
        for of in counts.values():
            total = sum(of.values())
            assert abs(of["test"] / total - 0.2) < 0.05 and abs(of["val"] / total - 0.1) < 0.04
    # In whatever order they come.
    mixed = placed(new.iloc[:0], new.sample(frac=1, random_state=1)).set_index("key")["split"]
    assert mixed.loc[whole["key"]].tolist() == whole["split"].tolist()


@pytest.mark.slow
def test_classes_of_many_are_judged_shown_and_remembered_one_by_one(
    run, workspace, manifest, tmp_path
):
    import json

    from ringmo.data import page

    rows = ["path,label"]
    for i in range(60):
        write(tmp_path / "in" / f"{i}.png", i, "PNG")
        seen = ["field"] * (i % 2 == 0) + ["town"] * (i % 3 == 0) + ["water"] * (i % 4 != 0)
        rows.append(f"{i}.png,{';'.join(seen)}")
    (tmp_path / "in" / "labels.csv").write_text("\n".join(rows))
    report = run(tmp_path / "in")
    counts = {"field": 30, "town": 20, "water": 45}
    assert report.figures["classes"] == 3
    assert report.figures["labelled"] == manifest()["label"].notna().sum() == 60
    assert report.tables["classes"] == [{"class": n, "tiles": c} for n, c in counts.items()]
    history = json.loads((workspace.store / "history.json").read_text())
    assert history["ingests"][-1]["classes"] == counts
    config = Config.load(workspace.params_file)
    judged = run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    assert judged.figures["broken"] == 0
    tiles = facts.read(workspace.store / "manifest.parquet")
    frame = class_facts.of_classes(config, tiles, class_facts.summary_of(tiles), [], {}).set_index(
        "name"
    )
    assert frame["samples"].to_dict() == counts
    splits = manifest().assign(has=manifest()["label"].str.contains("town"))
    for split in ("train", "val", "test"):
        assert frame.loc["town", split] == (splits["has"] & (splits["split"] == split)).sum()
    some = class_facts.rows_of_class(config, tiles, "scene", "town", {})
    assert some and all("town" in tiles["label"][row].as_py() for row in some)
    found = page.write(config, workspace, tmp_path / "page.html")
    assert found["classes"] == 3
    text = (tmp_path / "page.html").read_text()
    assert "<b>town</b> <span class='note'>rgb, 20 tiles" in text and "field;town" not in text
    # Another label is no new pixels; a class that vanishes is told.
    (tmp_path / "in" / "labels.csv").write_text("\n".join(rows).replace("water", "field"))
    assert run(tmp_path / "in").figures["new_tiles"] == 0
    with pytest.raises(AnswerIsNo, match="no_class_vanished"):
        run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
