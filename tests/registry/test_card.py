"""The card says what is recorded, in the registry alone, and nothing that is not."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ground
import numpy as np
import pytest
import rasterio
from html_page import Parsed
from PIL import Image
from registered_chain import first_champions
from stages import prepared, taught
from tiny import TINY

from ringmo import config
from ringmo.cli import main
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import card, card_page, promotion
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker
from ringmo.stage import Report
from ringmo.workspace import Workspace, init

HOSTILE, PIPED = "<script>alert(1)<script>", "a|b*c"
CHANGES = {
    **TINY,
    "tasks": ["scene", "segmentation"],
    "ingest.workers": 1,
    "validate.min_per_class": 1,
    "evaluate.bootstrap_samples": 100,
    "finetune.segmentation.epochs": 2,
    "finetune.segmentation.warmup_epochs": 1,
    "finetune.segmentation.batch_size": 8,
    "card.price_per_hour": 2.5,
    "card.contact": "maps@example.org",
}


def scenes(root: Path) -> Path:
    """Two classes of GeoTIFFs, 32 × 32 pixels of 10 m, in UTM zone 32; returns root."""
    random = np.random.default_rng(3)
    for number in range(24):
        name, bright = ((HOSTILE, 60), (PIPED, 160))[number % 2]
        pixels = random.normal(bright, 20, (3, 32, 32)).clip(0, 255).astype(np.uint8)
        corner = 500_000 + 2000 * number, 5_000_000 + 5000 * (number % 5)
        profile = {"driver": "GTiff", "width": 32, "height": 32, "count": 3, "dtype": "uint8"}
        profile |= {
            "crs": "EPSG:32632",
            "transform": rasterio.Affine(10, 0, corner[0], 0, -10, corner[1]),
        }
        (root / name).mkdir(parents=True, exist_ok=True)
        with rasterio.open(root / name / f"{number}.tif", "w", **profile) as file:
            file.write(pixels)
    return root


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory, fresh_database: Path, one_thread: None) -> Any:
    """A workspace with an encoder and two task models in its registry, and nothing else left."""
    folder = tmp_path_factory.mktemp("card")
    made = init(folder / "workspace")
    database = made.state / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    shutil.copyfile(fresh_database, database)
    sources = [str(scenes(folder / "scenes")), str(ground.write_masks(folder / "masks", 24))]
    about = {sources[0]: {"licence": "CC-BY-4.0 <b>"}}
    changes = {**CHANGES, "ingest.sources": sources, "ingest.about": about}
    config.edit(made.params_file, changes)
    values = Config.load(made.params_file)
    prepared(values, made)
    for task in values.tasks:
        taught(values, made, task)
    first_champions(values, made)
    for name in ("work", "data"):
        shutil.rmtree(made.root / name)
    config.edit(made.params_file, {"ingest.about": {}, "card.contact": None})
    return made


def pages(workspace: Workspace, ref: str, out: Path) -> tuple[str, Parsed]:
    told = card.write(workspace, ref, out)
    return Path(told["markdown"]).read_text(), Parsed(Path(told["html"]).read_text())


def test_a_card_is_written_from_the_registry_alone(gone: Workspace, tmp_path: Path) -> None:
    markdown, page = pages(gone, "scene@champion", tmp_path)
    for said in (
        *(
            "Intended use",
            "Limits",
            "2 classes",
            "rgb (red, green, blue)",
            "32 × 32 pixels at 10 m",
        ),
        *("From scratch", "Without looking", "CC-BY-4.0 <b>", "24 of 24 tiles have coordinates"),
        *("45.", "not recorded", "first version", "maps@example.org", "cost at 2.5 EUR an hour"),
        *("Energy was not measured", "ringmo reproduce scene/1", "pretrain, encoder/1"),
        *("Sun et al., IEEE TGRS 2022", "By class", "mirrored", "turned 90°"),
    ):
        assert said in page.text, said
    assert "emissions" not in page.text and "CO2" not in page.text
    version = Tracker(gone).version("scene", 1)
    assert version is not None
    accuracy = f"{100 * float(version.tags['test_accuracy']):.1f} %"
    assert accuracy in page.text and accuracy in markdown
    # What the selection held, class by class, as it was when it was there.
    rows = {row["class"]: row for row in _origins(version)["data"]["classes"]}
    assert sum(rows[HOSTILE][s] + rows[PIPED][s] for s in ("train", "val", "test")) == 24
    # Self-contained: nothing is fetched, nothing runs; the pictures are inside.
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    assert page.of("img") and all(str(i["src"]).startswith("data:image/") for i in page.of("img"))
    assert len([r for r in page.of("rect") + page.of("circle") if "fill-opacity" in r]) == 24


def test_names_from_outside_stay_text(gone: Workspace, tmp_path: Path) -> None:
    markdown, page = pages(gone, "scene/1", tmp_path)
    assert HOSTILE in page.text and PIPED in page.text and "CC-BY-4.0 <b>" in page.text
    assert not page.of("script")
    outside = re.sub(r"```.*?```", "", markdown, flags=re.S)
    assert "<" not in outside and "&lt;script&gt;alert(1)&lt;script&gt;" in outside
    assert r"a\|b\*c" in outside and "a|b" not in outside


def _cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def _origins(version: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (Path(version.source) / "card-data" / "data.json").read_text()
    )
    return found


def test_every_row_of_a_markdown_table_has_the_cells_of_its_head(
    gone: Workspace, tmp_path: Path
) -> None:
    for ref in ("scene/1", "segmentation/1", "encoder/1"):
        markdown, _ = pages(gone, ref, tmp_path / ref.replace("/", "-"))
        blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M)
        assert len(blocks) > 3
        for block in blocks:
            assert len({_cells(line) for line in block.splitlines()}) == 1, block


def test_a_dense_model_s_card_counts_pixels(gone: Workspace, tmp_path: Path) -> None:
    _, page = pages(gone, "segmentation/1", tmp_path)
    for said in (
        *("gives every pixel a class", "miou", "UPerNet", "share of training pixels", "By class"),
        *("test, pixels", "No tile has coordinates on Earth", "Only", "ground sampling distance"),
    ):
        assert said in page.text, said
    assert "tiles have coordinates," not in page.text


def test_an_encoder_s_card_has_its_loss_and_its_pictures(gone: Workspace, tmp_path: Path) -> None:
    _, page = pages(gone, "encoder/1", tmp_path)
    for said in ("val_loss", "An encoder has no answers", "ringmo embed", "Original, masked"):
        assert said in page.text, said
    assert page.of("img") and "None" not in page.text


def test_the_card_is_the_run_s_artifact_and_is_replaced(gone: Workspace, tmp_path: Path) -> None:
    tracker = Tracker(gone)
    version = tracker.version("scene", 1)
    assert version is not None
    assert card.attach(gone, version) == "card/scene-1.html"
    attached = Path(tracker.artifact_uri(version.run_id)) / "card"
    assert sorted(path.name for path in attached.iterdir()) == ["scene-1.html", "scene-1.md"]
    assert "in the owner" not in (attached / "scene-1.html").read_text()
    tracker.tag_version(version, {"verdict_checks": [{"rule": "x", "ok": False, "said": "<i>"}]})
    config.edit(gone.params_file, {"card.limits": "Not for <b>harbours</b>."})
    try:
        card.attach(gone, version)
    finally:
        config.edit(gone.params_file, {"card.limits": None})
    said = Parsed((attached / "scene-1.html").read_text())
    assert "Not for <b>harbours</b>." in said.text and "refused<i>" in said.text
    assert len(list(attached.iterdir())) == 2


def test_moves_of_the_champion_are_on_the_card(gone: Workspace, tmp_path: Path) -> None:
    _, page = pages(gone, "scene/1", tmp_path)
    assert promotion.history(gone, "scene")[0]["who"] == "gate"
    for said in ("champion", "gate: passed", "promote", "no champion was there"):
        assert said in page.text, said


def test_energy_cost_and_emissions_are_told_where_they_were_measured(
    tracked: Workspace, make_model: Any, tmp_path: Path
) -> None:
    make_model(accuracy=0.61)
    stage, trained = "finetune@scene", {"seconds_training": 7200}
    Report(stage, figures=trained, seconds=60).write(tracked.work(stage) / "report.json")
    # What it took is beside the output, in the report of the execution.
    took = {"energy_wh": 1500, "energy_source": "NVML"}
    Report(stage, figures=trained | took, seconds=60).write(tracked.report_file(stage))
    config.edit(tracked.params_file, {"card.price_per_hour": 2, "card.grams_co2_per_kwh": 300})
    register(Config.load(tracked.params_file), tracked, "scene", {})
    _, page = pages(tracked, "scene/1", tmp_path)
    for said in (
        "2.0 h",
        "1.5 kWh",
        "NVML",
        "4.00 EUR",
        "450 g",
        "of some stages was not measured",
    ):
        assert said in page.text, said


def test_what_is_not_recorded_is_said_so(
    tracked: Workspace, make_model: Any, tmp_path: Path, capsys: Any
) -> None:
    """A version from before there were origins, and a bundle that nobody registered."""
    make_model()
    version = register(Config.load(tracked.params_file), tracked, "scene", {"generated": True})
    for name in ("card-data", "evaluation", "lineage"):
        shutil.rmtree(Path(version.source) / name)
    markdown, page = pages(tracked, "scene/1", tmp_path / "old")
    for said in ("GENERATED", "Not judged".lower(), "What it was trained on is not recorded"):
        assert said in page.text, said
    assert markdown.count("not recorded") >= 4 and "50.0 %" in page.text

    folder = make_model(2, folder=tmp_path / "bundle")
    out = tmp_path / "new"
    arguments = ["card", str(folder), "--out", str(out), "--workspace", str(tracked.root), "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["attached"] is None and "not registered" in (out / "card.html").read_text()

    assert main(["card", "scene/9", "--workspace", str(tracked.root)]) == 2
    assert "no such version" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"Not a directory|File exists"):
        card.write(tracked, "scene/1", tmp_path / "file" / "x")


@pytest.mark.slow
@pytest.mark.parametrize("server", [True], indirect=True)
@pytest.mark.long
def test_a_server_that_keeps_the_files_gives_the_card_what_it_needs(
    workspace: Workspace, make_model: Any, server: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    make_model(accuracy=0.61)
    Image.new("RGB", (40, 30)).save(workspace.work("evaluate@scene") / "worst.png")
    register(Config.load(workspace.params_file), workspace, "scene", {})
    shutil.rmtree(workspace.root / "work")
    told = card.write(workspace, "scene/1", tmp_path)
    page = Parsed(Path(told["html"]).read_text())
    assert "61.0 %" in page.text and len(page.of("img")) == 1
    assert told["page"].startswith(server.url) and told["attached"] == "card/scene-1.html"


def test_markdown_stays_one_line_a_cell() -> None:
    table = card_page.Table(("a", "b"), [("x\ny | `z`", card_page.Share(0.125))])
    one = card_page.Card("t_t", "_l_", [], [], [], [card_page.Section("# s", [table])])
    text = card_page.as_markdown(one)
    assert r"| x y \| \`z\` | 12.5 % |" in text and r"\_l\_" in text and "# t_t" in text


def test_a_damaged_picture_spoils_no_card() -> None:
    damaged = card.PNG + b"x" * card_page.INLINE_BYTES
    assert card_page.inline(damaged).startswith("data:image/png;base64,")
