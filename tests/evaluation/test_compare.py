import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ringmo import config
from ringmo.cli import main
from ringmo.config import Config
from ringmo.data.loading import SelectedTiles
from ringmo.errors import BadInput
from ringmo.evaluation import compare
from ringmo.registry import bundle
from ringmo.stage import Report, run_stage
from ringmo.training import engine

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_BY_TWO = {
    "compare.initialisations": ["ringmo", "simmim", "scratch"],
    "compare.labels.scene": [2, 6],
    "compare.seeds": [1, 2],
    "compare.finetune_steps": 3,
    "evaluate.bootstrap_samples": 200,
    "finetune.scene.checkpoint_every_s": 1000,
    "pretrain.checkpoint_every_s": 1000,
}
ONE_EACH = {
    "compare.initialisations": ["ringmo", "scratch"],
    "compare.labels.scene": [2],
    "compare.seeds": [1],
    "compare.scratch_equal_total": False,
}
ROWS = [
    *("RingMo", "SimMIM", "scratch", "scratch, equal total", "histograms", "without looking"),
]
COLUMNS = ["k-NN", "linear", "2 labels", "6 labels"]


@pytest.fixture
def filled(workspace: Any) -> Any:
    config.edit(workspace.params_file, {**TWO_BY_TWO, **ONE_EACH})
    made_store.make_selections(workspace, made_store.make_store(workspace))
    return workspace


def compared(workspace: Any, **changes: Any) -> Report:
    config.edit(workspace.params_file, {k.replace("__", "."): v for k, v in changes.items()})
    values = Config.load(workspace.params_file)
    return run_stage(workspace, "compare", lambda out: compare.compare(values, workspace, out))


class Counted:
    """Counts trainings, and dies instead of beginning one more than it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[str] = []
        self.finished: list[str] = []
        self.die_at: int | None = None
        for name in ("pretrain", "finetune"):
            monkeypatch.setattr(compare, name, self._counted(name, getattr(compare, name)))

    def _counted(self, name: str, work: Any) -> Any:
        def counted(*given: Any, **named: Any) -> Any:
            self.began.append(name)
            report = work(*given, **named)
            if len(self.began) == self.die_at:
                raise KeyboardInterrupt  # the training is done, its result not yet on record
            self.finished.append(name)
            return report

        return counted


@pytest.mark.long
def test_a_comparison_has_every_cell_and_says_what_it_shows(
    filled: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Counted(monkeypatch)
    config.edit(filled.params_file, TWO_BY_TWO)
    report = compared(filled, compare__scratch_equal_total=True)
    # Two encoders; two labels counts x two seeds x (two encoders, scratch, scratch for longer).
    assert Counter(counted.finished) == {"pretrain": 2, "finetune": 16}
    said = capsys.readouterr().err
    assert "compare 1/27: RingMo, pre-training: done; about" in said
    assert "compare 26/27: scene: histograms, 6 labels, seed 2: 6 labels 100.0 %" in said

    cells = {(cell["row"], cell["column"]): cell for cell in report.tables["measures"]}
    missing = {(row, c) for row in ROWS[3::2] for c in COLUMNS[:2]} | {("histograms", "k-NN")}
    assert cells.keys() == {(r, c) for r in ROWS for c in COLUMNS} - missing
    for (row, column), cell in cells.items():
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
        assert cell["seeds"] == (2 if "labels" in column and row != ROWS[-1] else 1)
        named = f"scene/{row.lower().replace(',', '')}/{column}".replace(" ", "_")
        assert report.figures[named] == cell["value"]
    # Plain colours: what reads colours is right, and trained features tell them apart.
    assert cells["histograms", "2 labels"]["value"] == 1.0
    assert cells["RingMo", "linear"]["value"] == 1.0
    assert cells["without looking", "2 labels"]["value"] == pytest.approx(1 / 3, abs=1e-4)

    results = pd.read_parquet(filled.work("compare") / "results.parquet")
    tuned = results[results["labels"].notna()]
    for (row, column), group in tuned.groupby(["row", "column"]):
        if row != ROWS[-1]:
            assert sorted(group["seed"]) == [1, 2]
        assert group["value"].mean() == pytest.approx(cells[row, column]["value"], abs=2e-4)
    # Equal compute: 36 training tiles pre-train in 2 epochs of 3 steps of 12; fine-tuning has 3
    # steps, one an epoch; both together are 9.
    steps = {row: set(group["steps"].dropna()) for row, group in tuned.groupby("row")}
    assert steps == {
        "RingMo": {3},
        "SimMIM": {3},
        "scratch": {3},
        "scratch, equal total": {9},
        "histograms": set(),
        "without looking": set(),
    }
    before = results[results["column"] == "pretrain"]
    assert before["row"].tolist() == ROWS[:2] and set(before["steps"]) == {6}
    assert (before["seconds"] > 0).all()

    # The difference is paired: by hand from the kept evidence.
    answers = {}
    for method in ("ringmo", "simmim"):
        kept = [
            next((filled.state / "compare").glob(f"scene-{method}-6-{seed}-*.npz"))
            for seed in (1, 2)
        ]
        answers[method] = np.array([np.load(path)["right"] for path in kept], float)
    difference = next(
        one
        for one in report.tables["differences"]
        if (one["to"], one["column"]) == ("SimMIM", "6 labels")
    )
    assert difference["value"] == pytest.approx(
        (answers["ringmo"] - answers["simmim"]).mean(), abs=1e-4
    )
    assert {one["to"] for one in report.tables["differences"]} == set(ROWS[1:])
    inside = difference["low"] <= 0 <= difference["high"]
    assert (difference["says"] == "within chance") == inside

    text = compare.text(report)
    assert (filled.work("compare") / "comparison.txt").read_text() == text + "\n"
    for part in (*ROWS, *COLUMNS, "This is small: 0.0", "Equal compute", "made up", "One encoder"):
        assert part in text
    assert report.figures["generated"] is True and report.figures["parameters"] > 1000
    with Image.open(filled.work("compare") / "comparison.png") as picture:
        picture.load()
        assert picture.width > 500
    # Nothing is kept that nobody needs: no checkpoint, no model of a fine-tuning.
    assert not list((filled.state / "runs").glob("*/checkpoints"))
    assert not list((filled.state / "compare").glob(".*"))
    assert len(list((filled.state / "compare").rglob("model.safetensors"))) == 2


@pytest.mark.long
def test_killed_comparison_goes_on_and_ends_the_same(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared(filled)
    shutil.rmtree(filled.state / "compare")
    counted = Counted(monkeypatch)
    for at in (1, 3):
        counted.die_at = at
        with pytest.raises(KeyboardInterrupt):
            compared(filled)
    # What was trained and not yet on record is found trained.
    monkeypatch.setattr(engine.Trainer, "update", lambda *_: pytest.fail("trained again"))
    counted.die_at = None
    with pytest.raises(pytest.fail.Exception):
        compared(filled)  # the last training never began before
    monkeypatch.undo()
    counted = Counted(monkeypatch)
    report = compared(filled)
    assert counted.finished == ["finetune"]
    for name in ("measures", "differences"):
        assert report.tables[name] == whole.tables[name]
    assert compared(filled).tables == report.tables
    assert counted.finished == ["finetune"]
    compared(filled, compare__seeds=[1, 2])  # only what is new
    assert counted.finished == ["finetune"] * 3


def test_fewer_labels_are_seen_more_often_and_are_among_more(filled: Any) -> None:
    config.edit(filled.params_file, {"compare.labels.scene": [2, 6]})
    task = compare._Task(Config.load(filled.params_file), filled, "scene")
    selections = {}
    for labels, seed in ((2, 1), (6, 1), (2, 2)):
        path = filled.state / f"{labels}-{seed}.parquet"
        task.write_selection(path, labels, seed)
        selections[labels, seed] = SelectedTiles(filled, path, "train").table["key"]
        val = SelectedTiles(filled, path, "val").table["key"]
        assert sorted(val) == sorted(task.val.table["key"])
        assert len(SelectedTiles(filled, path)) == len(val) + 18
    few, more, other = selections.values()
    assert few.value_counts().tolist() == [3] * 6 and more.value_counts().tolist() == [1] * 18
    assert set(few) < set(more) and set(few) != set(other)


def test_more_labels_than_there_are_is_said_not_refused(filled: Any) -> None:
    report = compared(
        filled,
        compare__initialisations=["simmim", "scratch"],
        compare__labels__scene=[50],
    )
    (said,) = [note for note in report.notes if "fewer" in note]
    assert said == "50 labels: 3 of 3 classes have fewer (the least 12) and gave all they have."
    assert {cell["row"] for cell in report.tables["measures"]} == {*ROWS[1:3], *ROWS[4:]}
    assert {one["of"] for one in report.tables["differences"]} == {"SimMIM"}
    assert all(cell["seed_spread"] is None for cell in report.tables["measures"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compare.initialisations": ["ringmoo"]}, "did you mean `ringmo`"),
        ({"compare.initialisations": ["ringmo", "ringmo"]}, "each may stand here once"),
        ({"compare.labels.scene": [0]}, "compare.labels.scene.0"),
        ({"compare.labels.scene": [5, 5]}, "scene: each may stand here once"),
        ({"compare.labels.scenes": [5]}, "`scenes` has no section in finetune"),
        ({"compare.tasks": ["scenes"]}, "compare.tasks: `scenes` is not among tasks"),
        ({"compare.seeds": []}, "compare.seeds"),
        ({"compare.step": 5}, "compare.step: no such key; known here: tasks"),
    ],
)
def test_misspelt_settings_are_one_line(workspace: Any, change: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        config.edit(workspace.params_file, change)
    assert "\n" not in str(raised.value)


def test_a_method_that_the_model_cannot_do_is_refused_before_anything_runs(filled: Any) -> None:
    with pytest.raises(BadInput, match=r"pretrain\.method: mae .* needs model\.backbone"):
        compared(filled, compare__initialisations=["ringmo", "mae"])
    assert not list((filled.state / "compare").glob("encoder-*"))


def test_no_labels_are_refused_in_one_line(filled: Any) -> None:
    path = filled.work("select") / "scene.parquet"
    pd.read_parquet(path).iloc[:0].to_parquet(path, index=False)
    with pytest.raises(BadInput, match="0 labelled tiles to train on, of 0 classes") as raised:
        compared(filled)
    assert "\n" not in str(raised.value)
    path.unlink()
    with pytest.raises(BadInput, match="run `ringmo select`"):
        compared(filled)


@pytest.mark.slow
def test_one_command_from_folder_to_table_and_mlflow(
    workspace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imagery import CLASSES, write_class_folders

    from ringmo.registry.tracker import Tracker

    config.edit(workspace.params_file, {**TWO_BY_TWO, **ONE_EACH})
    folder = write_class_folders(tmp_path / "imagery", each=12)
    command = ["compare", "--data", str(folder), "--set", "compare.seeds=[7]", "--json"]
    command += ["--workspace", str(workspace.root)]
    for _ in range(2):  # the second finds everything done, and is the same run
        assert main(command) == 0
        answer = json.loads(capsys.readouterr().out)
    assert answer["tables"]["tasks"][0]["classes"] == len(CLASSES)
    tracker = Tracker(workspace)
    (run,) = tracker.runs("compare")
    assert run.status == "FINISHED" and run.tags["data_version"]
    assert run.metrics["scene/ringmo/k-NN"] == answer["figures"]["scene/ringmo/k-NN"]
    artifacts = Path(tracker.artifact_uri(run.id))
    figures = json.loads((artifacts / "tables" / "figures.json").read_text())
    (row,) = (row for row in figures["data"] if row[0] == "scene/histograms/2_labels")
    assert row[2] <= row[1] == run.metrics[row[0]] <= row[3]
    for name in ("comparison.png", "comparison.txt", "results.parquet", "tables/measures.json"):
        assert (artifacts / name).is_file()
    table = json.loads((artifacts / "tables" / "measures.json").read_text())
    assert len(table["data"]) == len(answer["tables"]["measures"])
    assert bundle.load_meta(next((workspace.state / "compare").glob("encoder-*/encoder")))
