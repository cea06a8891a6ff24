"""The same evaluation for tasks with an answer for each pixel, from files to figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ground
import numpy as np
import pandas as pd
import pytest
from imagery import write_class_folders
from PIL import Image
from stages import taught

from ringmo import config
from ringmo.config import Config
from ringmo.data.ingest import ingest
from ringmo.data.selection import select
from ringmo.evaluation import compare
from ringmo.evaluation.evaluate import score
from ringmo.registry import bundle
from ringmo.stage import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = {"best.png", "typical.png", "worst.png", "behaviour.png"}


def settings(task: str) -> dict[str, Any]:
    return {
        "tasks": [task, "scene"],
        "ingest.workers": 1,
        "evaluate.bootstrap_samples": 100,
        f"finetune.{task}.epochs": 12,
        f"finetune.{task}.warmup_epochs": 1,
        f"finetune.{task}.batch_size": 8,
        f"finetune.{task}.drop_path": 0.0,
        f"finetune.{task}.test_resize": 48,
        "compare.initialisations": ["scratch", "work/pretrain/encoder"],
        f"compare.labels.{task}": [4, 40],
        "compare.labels.scene": [3],
        "compare.seeds": [1, 2],
        "compare.finetune_steps": 6,
    }


def prepared(workspace: Any, task: str, *folders: Path) -> Config:
    sources = {"ingest.sources": [str(folder) for folder in folders]}
    config.edit(workspace.params_file, {**settings(task), **sources})
    values = Config.load(workspace.params_file)
    ingest(values, workspace)
    run_stage(workspace, "select", lambda o: select(values, workspace, o))
    return values


@pytest.mark.parametrize(
    ("task", "write", "own"),
    [
        (
            "segmentation",
            ground.write_masks,
            {"confusion.png", "precision_recall.png", "reliability.png"},
        ),
        ("height", ground.write_heights, set()),
    ],
)
@pytest.mark.long
def test_from_files_to_figures_and_a_comparison(
    workspace: Any, tmp_path: Path, task: str, write: Callable[[Path, int], Path], own: set[str]
) -> None:
    folders = [write(tmp_path / "in", 60)]
    if scenes := task == "segmentation":
        folders.append(write_class_folders(tmp_path / "scenes", each=10))
    values = prepared(workspace, task, *folders)
    report = taught(values, workspace, task)
    figures, folder = report.figures, workspace.work(f"evaluate@{task}")
    metric, lower = figures["metric"], task == "height"
    assert (metric, figures["unit"]) == (("mae", "m") if lower else ("miou", "%"))
    value, scratch, blind = (figures[f"{of}_{metric}"] for of in ("test", "scratch", "trivial"))
    # It learns, so it is better than whoever never looks; better means less where it is metres.
    assert (value < blind) if lower else (value > blind)
    sign = -1 if lower else 1
    assert figures["difference_to_scratch"] == pytest.approx(sign * (value - scratch), abs=2e-4)
    low, high = (figures[f"difference_to_scratch_{end}"] for end in ("low", "high"))
    assert low <= figures["difference_to_scratch"] <= high
    for name in ("test", "scratch"):
        ends = [figures[f"{name}_{metric}_{end}"] for end in ("low", "high")]
        assert ends[0] <= figures[f"{name}_{metric}"] <= ends[1]
    lost = next(r for r in report.tables["behaviour"] if r["change"] == "band lost")
    assert lost["drop"] == pytest.approx(sign * (value - lost[metric]), abs=2e-4)
    assert ("test_ece" in figures) is (not lower)
    json.dumps([figures, report.tables], allow_nan=False)

    assert {path.name for path in folder.glob("*.png")} == PICTURES | own
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 300 and picture.height > 100
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert list(predictions.columns) == ["key", "quality", "scratch_quality"]
    assert len(predictions) == figures["test_tiles"]
    with np.load(folder / "evidence.npz", allow_pickle=False) as evidence:
        assert evidence["key"].tolist() == predictions["key"].tolist()
        if lower:
            by_hand = evidence["height_error"].sum() / evidence["height_pixels"].sum()
            assert value == pytest.approx(by_hand, abs=1e-4)
            assert evidence["height_pixels"][0] == 48 * 48
            assert report.tables["per_gsd"][0]["gsd"] == "1 to 3 m"
    model = bundle.load(workspace.work(f"finetune@{task}") / "model")
    found = score(model, workspace, workspace.work("select") / f"{task}.parquet")
    assert found["n"] == figures["test_tiles"]
    assert found[metric] == pytest.approx(value, abs=1e-4)

    # The same task, compared: with few tiles, from an encoder that is there, and from scratch.
    both = run_stage(workspace, "compare", lambda o: compare.compare(values, workspace, o))
    assert [row["task"] for row in both.tables["tasks"]] == [task, "scene"][: 1 + scenes]
    own_rows = {
        name: [row for row in both.tables[name] if row["task"] == task]
        for name in ("measures", "differences")
    }
    cells = {(cell["row"], cell["column"]): cell for cell in own_rows["measures"]}
    rows = ["scratch", "work/pretrain/encoder", "without looking"]
    assert cells.keys() == {(row, column) for column in ("4 tiles", "40 tiles") for row in rows}
    assert cells["without looking", "4 tiles"]["value"] == pytest.approx(blind, abs=1e-4)
    assert cells["scratch", "4 tiles"]["unit"] == figures["unit"]
    for one in own_rows["differences"]:
        first, other = cells["scratch", one["column"]], cells[one["to"], one["column"]]
        assert one["value"] == pytest.approx(sign * (first["value"] - other["value"]), abs=2e-4)
    text = compare.text(both)
    assert ("; less is better" in text) is lower
    assert f"{task}: {metric} in {'metres' if lower else '%'} on" in text
    few = len(pd.read_parquet(workspace.work("select") / f"{task}.parquet").query("split=='train'"))
    assert (f"40 tiles: there are {few}" in text) is (few < 40)
    assert "not at equal compute" in text and "Equal compute" not in text
    assert ("scene is left out: no tile has labels of it" in text) is not scenes
    assert (f"{task}: scratch against work/pretrain/encoder:" in text) is scenes
    assert ("scene/scratch/3_labels" in both.figures) is scenes
    with Image.open(workspace.work("compare") / "comparison.png") as picture:
        assert (picture.width > 1200) is scenes  # a panel a task
