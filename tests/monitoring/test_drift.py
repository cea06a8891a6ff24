"""`ringmo drift` on real versions in MLflow and what a real model recorded."""

import json
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from answering import answered
from html_page import Parsed

from ringmo.cli import main
from ringmo.config import Config, Monitoring
from ringmo.data.loading import SelectedTiles
from ringmo.inference.model import open_bundle
from ringmo.monitoring import drift as drifting
from ringmo.monitoring import record
from ringmo.monitoring.comparison import Finding
from ringmo.registry.register import REFERENCE, register
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def produced(
    place: Workspace,
    model: Any,
    change: Any = None,
    *,
    labels: Any = None,
    names: Any = None,
    pixels: bool = False,
    version: str = "scene/1",
) -> int:
    """The training tiles go through production, perhaps changed; every third of them."""
    tiles = SelectedTiles(place, place.work("select") / "scene.parquet", "train", "rgb")
    rows = [i for i, label in enumerate(tiles.table["label"]) if not labels or label in labels]
    rows = rows[::3]
    settings = Monitoring(share=1.0, pixels=pixels)
    recorder = record.Recorder(place, model, version, settings)
    for start in range(0, len(rows), 20):
        some = rows[start : start + 20]
        images = torch.stack([tiles.small(row, 32) for row in some])
        given = {"rgb": change(images) if change else images}
        called = [names(row) if names else f"made/{row}.png" for row in some]
        recorder.add(given, answered(model, given), called)
    recorder.close()
    return len(rows)


def drift(place: Workspace, capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["drift", "scene", "--json", *arguments, "--workspace", str(place.root)])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, said


def failed(place: Workspace, capsys: Any, *arguments: str) -> str:
    code, said = drift(place, capsys, *arguments)
    assert code == 2 and "\n" not in said["error"]
    return str(said["error"])


def test_a_version_takes_its_reference_along(watched: Workspace, champion: Any) -> None:
    version = Tracker(watched).aliased("scene", "champion")
    assert version is not None
    path = Tracker(watched).version_path(version, REFERENCE, watched.state)
    assert path is not None
    rows = pd.read_parquet(path)
    assert rows["split"].value_counts().to_dict() == {"val": 60, "test": 60}
    selection = watched.work("select") / "scene.parquet"
    for split in ("val", "test"):
        tiles = champion.tiles(watched, selection, split)
        images = [tiles.image(i) for i in range(len(tiles))]
        own = rows[rows["split"] == split]
        assert own["key"].tolist() == tiles.table["key"].tolist()
        assert own["scene"].tolist() == tiles.table["place"].tolist()
        found = np.stack(own["embedding"].tolist())
        assert np.abs(found - champion.embed(images)).max() < 1e-4
        reds = [image[..., 0].mean() for image in images]
        assert np.abs(own["mean:rgb:red"].to_numpy() - reds).max() < 1.0  # they were shrunk


def test_what_has_not_changed_has_not_drifted(
    watched: Workspace, champion: Any, capsys: Any
) -> None:
    count = produced(watched, champion)
    code, said = drift(watched, capsys)
    assert (code, said["drift"], said["model"]) == (0, False, "scene/1")
    assert said["tiles"] == {"reference": 120, "production": count}
    assert said["reference"] == "of scene/1, as registered"
    assert {test["test"] for test in said["tests"]} == {
        "bands",
        "embedding",
        "classes",
        "confidence",
    }


def lost(images: torch.Tensor) -> torch.Tensor:
    images[:, 1] = 0
    return images


def flat(images: torch.Tensor) -> torch.Tensor:
    images[:, 2] = 110
    return images


def darker(images: torch.Tensor) -> torch.Tensor:
    return (images.float() * 0.7).to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "labels", "tests", "part"),
    [
        (lost, None, {"bands", "embedding"}, "rgb green"),
        (flat, None, {"bands"}, "rgb blue"),
        (darker, None, {"bands"}, "rgb red"),
        (None, ["Beach"], {"bands", "embedding"}, None),
    ],
)
def test_each_kind_of_drift_is_found(
    watched: Workspace,
    champion: Any,
    capsys: Any,
    change: Any,
    labels: Any,
    tests: set[str],
    part: str | None,
) -> None:
    produced(watched, champion, change, labels=labels)
    code, said = drift(watched, capsys)
    assert code == 1 and said["drift"]
    found = {test["test"]: test for test in said["tests"] if test["drift"]}
    assert tests <= found.keys()
    parts = {p["of"] for p in found["bands"]["parts"] if p["p"] <= 0.05}
    assert part is None or part in parts
    main(["drift", "scene", "--quiet", "--workspace", str(watched.root)])
    told = capsys.readouterr().out
    assert "production has drifted: bands" in told and "Next: " in told


def test_the_page_shows_the_unusual_tiles_and_trusts_no_name(
    watched: Workspace, champion: Any, capsys: Any, tmp_path: Path
) -> None:
    bad = "<script>alert(1)</script>"
    produced(watched, champion, lost, names=lambda row: f"{bad}{row}#0,0,9,9", pixels=True)
    code, said = drift(watched, capsys, "--html", str(tmp_path / "drift.html"))
    assert code == 1 and said["page"] == str(tmp_path / "drift.html")
    text = (tmp_path / "drift.html").read_text()
    page = Parsed(text)
    assert "production has drifted" in page.text and bad in page.text
    assert page.of("script") == []
    pictures = page.of("img")
    assert len(pictures) == len(said["unusual"]) == 24
    assert all(str(p["src"]).startswith("data:image/jpeg;base64,") for p in pictures)
    assert "http" not in text.replace("http-equiv", "")
    assert len(page.of("polygon")) >= 2 * 3


def test_tiles_of_files_that_are_still_there_are_cut_out_again(
    watched: Workspace, champion: Any, capsys: Any, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "scene.png")
    (tmp_path / "secret.vrt").write_text("<VRTDataset/>")
    given = {0: f"{tmp_path}/scene.png#8,8,32,32", 3: f"{tmp_path}/secret.vrt#0,0,9,9"}
    produced(watched, champion, lost, names=lambda row: given.get(row, f"/vsicurl/http://x/{row}"))
    monkey = pytest.MonkeyPatch()
    monkey.setattr("ringmo.monitoring.drift.UNUSUAL", 1000)
    drift(watched, capsys, "--html", str(tmp_path / "drift.html"))
    monkey.undo()
    assert len(Parsed((tmp_path / "drift.html").read_text()).of("img")) == 1


def test_bad_input_is_one_line(watched: Workspace, champion: Any, capsys: Any) -> None:
    assert "production has recorded nothing of scene here" in failed(watched, capsys)
    produced(watched, champion)
    today = datetime.now(UTC).date()
    (folder,) = record.folder(watched, "scene").iterdir()
    folder.rename(folder.with_name((today - timedelta(days=10)).isoformat()))
    said = failed(watched, capsys)
    assert f"the last day with tiles is {today - timedelta(days=10)}" in said
    assert drift(watched, capsys, "--days", "20")[0] == 0
    since = (today - timedelta(days=10)).isoformat()
    assert drift(watched, capsys, "--since", since)[0] == 0
    assert "expected a date" in failed(watched, capsys, "--since", "yesterday")
    later = (today + timedelta(days=2)).isoformat()
    assert "is not yet" in failed(watched, capsys, "--since", later)
    assert "at least 1" in failed(watched, capsys, "--days", "0")
    other = failed(watched, capsys, "--model", "scene/2", "--days", "20")
    assert "nothing of scene/2" in other and "but of scene/1 (60 tiles)" in other
    assert "no such version" in failed(watched, capsys, "--model", "scene/9")
    code = main(["drift", "change", "--workspace", str(watched.root)])
    assert code == 2 and "no registered model `change`" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["drift", "weather", "--workspace", str(watched.root)])
    assert caught.value.code == 2


def test_a_restarted_scene_counts_once_and_a_damaged_file_not_at_all(
    watched: Workspace, champion: Any, capsys: Any
) -> None:
    count = produced(watched, champion)
    produced(watched, champion)
    (folder,) = record.folder(watched, "scene").iterdir()
    (folder / "part-0-damaged.parquet").write_bytes(b"PAR1 and no more")
    (folder / ".part-0-killed.parquet.tmp").write_bytes(b"PAR1")
    code, said = drift(watched, capsys)
    assert code == 0 and said["tiles"]["production"] == count
    # The newest rows in a file whose damage does not show in the columns that are read first.
    whole = max(folder.glob("part-1*.parquet"))
    column = pq.ParquetFile(whole).metadata.row_group(0).column(10)
    data = bytearray(whole.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    (folder / "part-9-torn.parquet").write_bytes(data)
    assert "none of the files since" in failed(watched, capsys)


def test_findings_are_told_in_words() -> None:
    def finding(test: str, before: float, now: float) -> Finding:
        part = {"of": "ship", "reference": before, "production": now}
        return Finding(test, 1.0, "x", 0.001, 0.004, [part])

    assert drifting.said(finding("confidence", 0.9, 0.6), "scene") == "less sure: 90 % → 60 %"
    assert drifting.said(finding("confidence", 0.6, 0.9), "scene") == "more sure: 60 % → 90 %"
    assert drifting.said(finding("classes", 0.8, 0.2), "scene") == "ship 80 % → 20 %"
    # Of boxes there is a number in a tile, however few.
    assert drifting.said(finding("classes", 0.8, 0.2), "detection") == "ship 0.8 → 0.2"


def test_an_older_version_has_its_reference_made(
    watched: Workspace, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_bundle("scene/2", workspace=watched.root)
    produced(watched, model, version="scene/2")
    selection = watched.work("select") / "scene.parquet"
    kept = selection.read_bytes()
    for there in (True, False):  # by the selection, or by what the version says that it saw
        if not there:
            selection.write_bytes(b"")
        try:
            code, said = drift(watched, capsys, "--model", "scene/2")
        finally:
            selection.write_bytes(kept)
        assert code == 0 and said["tiles"]["reference"] == 120
        assert said["reference"] == "made now from the tile store: the version has none"
        assert (
            "made from the tile store"
            in drift(watched, capsys, "--model", "scene/2")[1]["reference"]
        )
        shutil.rmtree(watched.state / "references")
    monkeypatch.setattr(Workspace, "store", property(lambda self: self.root / "gone"))
    assert "scene/2 has no reference" in failed(watched, capsys, "--model", "scene/2")


def test_a_large_production_is_sampled(
    watched: Workspace, champion: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    produced(watched, champion)
    monkeypatch.setattr("ringmo.monitoring.drift.MOST", 25)
    assert drift(watched, capsys)[1]["tiles"]["production"] == 25


def test_registering_again_changes_nothing(watched: Workspace) -> None:
    before = Tracker(watched).versions("scene")
    register(Config.load(watched.params_file), watched, "scene", {})
    assert [str(v) for v in Tracker(watched).versions("scene")] == [str(v) for v in before]


def test_days_are_utc(watched: Workspace) -> None:
    where = record.folder(watched, "scene")
    for name in ("2026-01-02", "2026-01-01", "notes"):
        (where / name).mkdir(parents=True)
    assert [day for day, _ in record.days(where)] == [date(2026, 1, 1), date(2026, 1, 2)]
