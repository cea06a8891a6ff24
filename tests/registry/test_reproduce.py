"""A registered model is made again from its lineage alone, or it is said what is missing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringmo import config as params
from ringmo import hardware
from ringmo.config import Config
from ringmo.data import versions
from ringmo.errors import BadInput, RingmoError, Unreachable
from ringmo.registry import register, reproduce
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

pytestmark = pytest.mark.slow


def _files(workspace: Workspace) -> dict[Path, tuple[int, int]]:
    """Every file of a workspace but what MLflow and DVC note for themselves, with size and time."""
    own = (workspace.state / "mlflow", workspace.root / ".dvc" / "tmp")
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in workspace.root.rglob("*")
        if path.is_file() and not any(path.is_relative_to(folder) for folder in own)
    }


@pytest.mark.long
def test_interrupted_it_goes_on_and_ends_with_the_same_bits(
    made: Workspace, tmp_path: Path
) -> None:
    before, to = _files(made), tmp_path / "again"
    command = [sys.executable, "-m", "ringmo", "reproduce", "scene@champion", "--to", str(to)]
    command += ["--workspace", str(made.root)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    begun = to / ".ringmo" / "running" / "pretrain.json"
    limit = time.monotonic() + 300
    while not begun.exists() and first.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=120) == 130
    selected = (to / "work" / "select" / "report.json").stat().st_mtime_ns

    done = reproduce.reproduce(made, "scene@champion", to)
    assert done["reproduced"] and done["identical"] and done["reasons"] == []
    trained = {row["stage"] for row in done["weights"]}
    assert trained == {"pretrain", "scratch@scene", "finetune@scene"}
    assert all(row["same"] for row in done["inputs"]) and len(done["inputs"]) >= 9
    figures = {(row["stage"], row["figure"]): row["same"] for row in done["figures"]}
    assert set(figures.values()) == {"same"}
    assert ("evaluate@scene", "test_accuracy") in figures and ("pretrain", "val_loss") in figures
    text = reproduce.text(done)
    assert "weights: identical" in text and "0.0 to" in text
    assert (to / "work" / "select" / "report.json").stat().st_mtime_ns == selected
    assert (to / "work" / "finetune-scene" / "model" / "model.safetensors").read_bytes() == (
        made.work("finetune@scene") / "model" / "model.safetensors"
    ).read_bytes()
    assert _files(made) == before
    # Not a second copy of the imagery.
    shard = "data/store/tiles-000000.tar"
    assert (to / shard).stat().st_nlink > 1


@pytest.fixture
def tagged(made: Workspace) -> Iterator[Any]:
    """`tagged(name=value)` changes tags of scene/1, until the test has ended."""
    tracker = Tracker(made)
    version = tracker.version("scene", 1)
    assert version is not None
    yield lambda **tags: tracker.tag_version(version, tags)
    tracker.tag_version(version, version.tags)


def test_an_unknown_commit_is_missing(made: Workspace, tagged: Any, tmp_path: Path) -> None:
    tagged(code_version="0" * 40, code_clean="true")
    with pytest.raises(BadInput, match=r"code: 0{20} is not in this code's repository"):
        reproduce.reproduce(made, "scene/1", tmp_path / "again")


def _lineage(made: Workspace) -> Path:
    tracker = Tracker(made)
    version = tracker.version("scene", 1)
    assert version is not None
    return tracker.lineage_folder(version)


def test_a_patch_that_is_gone_is_missing(made: Workspace, tagged: Any, tmp_path: Path) -> None:
    tagged(code_clean="false")
    patch, away = _lineage(made) / "source.patch", tmp_path / "away"
    if patch.exists():
        patch.rename(away)
    try:
        with pytest.raises(BadInput, match=r"source\.patch: the code was not as commit"):
            reproduce.reproduce(made, "scene/1", tmp_path / "again")
    finally:
        if away.exists():
            away.rename(patch)


def test_lineage_files_that_are_gone_are_named(made: Workspace, tmp_path: Path) -> None:
    lock, away = _lineage(made) / "dvc.lock", tmp_path / "away"
    lock.rename(away)
    try:
        with pytest.raises(BadInput, match=r"dvc\.lock: not among its lineage files"):
            reproduce.reproduce(made, "scene/1", tmp_path / "again")
    finally:
        away.rename(lock)


def _planned(made: Workspace, to: Path) -> Any:
    tracker = Tracker(made)
    version = tracker.version("scene", 1)
    assert version is not None
    to.mkdir()
    kept = reproduce._origins(tracker, version)
    encoder = reproduce._encoder(tracker, version)
    plan = reproduce._Plan(version, kept, encoder, Workspace(to))
    reproduce._prepare(made, tracker, plan)
    return plan


@pytest.fixture
def no_data(made: Workspace, tmp_path: Path) -> Iterator[Workspace]:
    """Neither the store nor DVC's cache is here."""
    places = {made.store: tmp_path / "store", made.root / ".dvc" / "cache": tmp_path / "cache"}
    text = made.params_file.read_text()
    for place, away in places.items():
        shutil.move(place, away)
    yield made
    made.params_file.write_text(text)
    for place, away in places.items():
        shutil.rmtree(place, ignore_errors=True)
        shutil.move(away, place)


def test_data_that_nobody_has_is_missing(no_data: Workspace, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        reproduce.reproduce(no_data, "scene/1", tmp_path / "again")
    assert "files are not in DVC's cache, and there is no remote at" in str(error.value)


def test_a_remote_that_does_not_answer_is_said(
    no_data: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    dead = {"versioning.remote": "s3://bucket/x", "versioning.endpoint": "http://127.0.0.1:9"}
    params.edit(no_data.params_file, dead)
    with pytest.raises(Unreachable, match="not in DVC's cache"):
        reproduce.reproduce(no_data, "scene/1", tmp_path / "again")


def test_data_comes_from_the_remote(made: Workspace, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    text = made.params_file.read_text()
    params.edit(made.params_file, {"versioning.remote": str(remote)})
    away = {made.store: tmp_path / "store", made.root / ".dvc" / "cache": tmp_path / "cache"}
    try:
        versions.push(made, Config.load(made.params_file))
        for place, hidden in away.items():
            shutil.move(place, hidden)
        plan = _planned(made, tmp_path / "again")
    finally:
        made.params_file.write_text(text)
        for place, hidden in away.items():
            if hidden.exists():
                shutil.rmtree(place, ignore_errors=True)
                shutil.move(hidden, place)
    assert plan.missing == []
    # The verdict on the data is in no cache: the rules run again.
    assert plan.stages[0] == "validate"
    for name in ("manifest.parquet", "tiles-000000.tar"):
        assert (plan.place.store / name).read_bytes() == (made.store / name).read_bytes()


def test_a_damaged_shard_is_missing(made: Workspace, tmp_path: Path) -> None:
    files = versions.listed((_lineage(made) / "outs" / "data" / "store.json").read_bytes())
    shard = versions.Cache(made).file(files["tiles-000000.tar"])
    data, away = shard.read_bytes(), tmp_path / "away"
    shard.rename(away)
    shard.write_bytes(data[:-1] + b"!")
    try:
        plan = _planned(made, tmp_path / "again")
    finally:
        away.replace(shard)
    assert [line for line in plan.missing if "tiles-000000.tar" in line and "damaged" in line]


def test_the_encoder_s_own_record_stands_for_a_selection_that_was_kept(
    made: Workspace, tmp_path: Path
) -> None:
    plan = _planned(made, tmp_path / "again")
    reproduce._kept_selection(Tracker(made), plan)
    kept = (plan.place.state / "kept-selection.parquet").read_bytes()
    assert kept == (made.work("select") / "pretrain.parquet").read_bytes()


def test_another_commit_s_code_is_laid_beside_with_its_patch(
    made: Workspace, tagged: Any, tmp_path: Path
) -> None:
    commit = register._git("rev-parse", "HEAD")
    assert commit is not None
    tagged(code_version=commit.decode().strip(), code_clean="false")
    patch = _lineage(made) / "source.patch"
    before = patch.read_bytes() if patch.exists() else None
    lines = "--- /dev/null\n+++ b/ringmo/added.py\n@@ -0,0 +1 @@\n+ADDED = 1\n"
    patch.write_text(
        "diff --git a/ringmo/added.py b/ringmo/added.py\nnew file mode 100644\n" + lines
    )
    try:
        plan = _planned(made, tmp_path / "again")
    finally:
        patch.unlink()
        if before is not None:
            patch.write_bytes(before)
    assert plan.missing == [] and plan.code == plan.place.root / "code"
    assert (plan.code / "ringmo" / "added.py").read_text() == "ADDED = 1\n"
    found = subprocess.run(
        [sys.executable, "-c", "import ringmo; print(ringmo.__file__)"],
        env=os.environ | {"PYTHONPATH": str(plan.code)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(plan.code / "ringmo" / "__init__.py")


def test_a_folder_of_something_else_is_left_alone(made: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        reproduce.reproduce(made, "scene/1", tmp_path)
    with pytest.raises(RingmoError, match="the workspace itself"):
        reproduce.reproduce(made, "scene/1", made.root)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_another_machine_is_a_reason_and_its_figures_must_lie_within() -> None:
    here = hardware.described()
    packages = {**here["packages"], "torch": "1.0"}
    there = here | {"cpu": "another", "packages": packages}
    assert hardware.differences(here, here) == []
    assert hardware.differences(there, here) == [
        f"cpu was another, is {here['cpu']}",
        f"torch was 1.0, is {here['packages']['torch']}",
    ]
    was = {"test_accuracy": 0.8, "test_accuracy_low": 0.7, "test_accuracy_high": 0.9, "steps": 10}
    was |= {"images_per_s": 3.0, "generated": False}
    rows = reproduce._figures("evaluate@scene", was, was | {"test_accuracy": 0.71})
    assert [row["same"] for row in rows] == [reproduce.WITHIN, reproduce.SAME]
    (row, _) = reproduce._figures("evaluate@scene", was, was | {"test_accuracy": 0.69})
    assert row["same"] == reproduce.DIFFERS
