"""The page of the tile store: everything inside it, nothing from data that runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from html_page import Parsed
from small_imagery import class_folders, geotiff, write

from ringmo.cli import main
from ringmo.config import Config
from ringmo.data import page
from ringmo.errors import BadInput


def shown(workspace: Any, tmp_path: Path) -> Parsed:
    out = tmp_path / "out" / "data.html"
    page.write(Config.load(workspace.params_file), workspace, out)
    return Parsed(out.read_text())


def test_classes_pictures_and_reasons_are_there(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in")
    write(source / "class0" / "empty.jpg", 1).write_bytes(b"")
    run(source)
    found = shown(workspace, tmp_path)
    for words in ("class0", "class2", "36", "empty file", "No tile has coordinates"):
        assert words in found.text
    images = found.of("img")
    assert len(images) == 3 * page.SHOWN
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    # Self-contained: nothing is fetched, nothing runs.
    assert not found.of("script") and not found.of("link")
    assert not any(
        "http" in str(value) for _, attributes in found.tags for value in attributes.values()
    )


def test_footprints_are_where_they_are(run, workspace, tmp_path):
    for i, (left, top) in enumerate(
        [(500_000, 5_000_000), (500_000, 5_001_000), (501_500, 5_000_000)]
    ):
        geotiff(tmp_path / "in" / f"{i}.tif", i, left, top, side=96, gsd=10)
    run(tmp_path / "in", ingest__tile_size=96)
    found = shown(workspace, tmp_path)
    assert "3 of 3 tiles have coordinates" in found.text and "45.1" in found.text
    footprints = [one for one in found.of("rect") if "fill-opacity" in one]
    assert len(footprints) == 3
    x, y = ([float(str(one[name])) for one in footprints] for name in "xy")
    assert x[0] == pytest.approx(x[1], abs=2) and x[2] > x[0] + 100  # 1.5 km east
    assert y[0] == pytest.approx(y[2], abs=2) and y[1] < y[0] - 60  # 1 km north
    wide, tall = (float(str(footprints[0][name])) for name in ("width", "height"))
    assert wide == pytest.approx(tall, rel=0.03)  # 960 m each way


def test_names_from_outside_are_text(run, workspace, tmp_path):
    hostile = "<script>alert(1)</script>".replace("/", "")
    source = class_folders(tmp_path / "in", classes=1)
    write(source / hostile / "x' onload='y.jpg", 99)
    for i in range(8):
        write(source / hostile / f"{i}.jpg", 200 + i)
    run(source)
    found = shown(workspace, tmp_path)
    assert not found.of("script") and hostile in found.text
    assert not any("onload" in attributes for _, attributes in found.tags)


def test_the_command_says_where_it_is(run, workspace, tmp_path, capsys):
    run(class_folders(tmp_path / "in"))
    assert main(["data", "show", "--workspace", str(workspace.root)]) == 0
    said = capsys.readouterr().out
    (path,) = re.findall(r"file://(\S+)", said)
    assert Path(path).read_text().startswith("<!doctype html>")
    with pytest.raises(BadInput, match=r"Not a directory|File exists"):
        page.write(Config.load(workspace.params_file), workspace, workspace.params_file / "x.html")
