import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagery as made
import pytest

import benchmarks.__main__ as bench
from benchmarks.child import Failed, measure
from benchmarks.imagery import ROOT, Source, prepare
from ringmo.data.decode import decode

KEYS = {"what", "ours", "baseline", "ratio", "unit", "goal", "reached", "note", "runs"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = made.write_class_folders(tmp_path_factory.mktemp("images"), each=12)
    return Source.find(folder, folder)


def test_images_are_the_same_each_time_and_of_the_size_asked_for(
    source: Source, tmp_path: Path
) -> None:
    twice = [prepare(source, tmp_path / name, 100, 20, val=4) for name in "ab"]
    files = [sorted((one.train / "tiles").iterdir()) for one in twice]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert len(files[0]) == 16 and twice[0].real == 0
    assert {decode(f.read_bytes()).shape for f in files[0]} == {(100, 100, 3)}
    own_size = prepare(source, tmp_path / "own", 64, 20)
    assert own_size.real == 20
    originals = {path.read_bytes() for path in source.files}
    assert {f.read_bytes() for f in (own_size.train / "tiles").iterdir()} <= originals


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(Failed, match="nobody"):
        measure("loaders", 1, contender="nobody", seconds=1)


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(["--only", "loader,stepp"])
    assert left.value.code == 2 and "stepp" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_bench_writes_rows_with_machine_and_versions(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    data = str(source.files[0].parents[1])
    command = [sys.executable, "-m", "benchmarks", "--only", "loader,swin-b,vit-b,pimask"]
    command += ["--images", "64", "--rounds", "1", "--data", data, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["date"] and found["machine"]["cores"] and found["versions"]["torch"]
    assert found["failures"] == []
    rows: list[dict[str, Any]] = found["rows"]
    assert all(row.keys() == KEYS for row in rows)
    measured = [row for row in rows if row["ratio"] is not None]
    assert len(measured) == 7 and all("loader" in row["what"] for row in measured)
    for row in measured:
        assert row["ours"] > 0 and math.isclose(row["ratio"], row["ours"] / row["baseline"])
        assert (row["reached"] is None) == (row["goal"] == "none")
        assert row["what"] in done.stdout
    if found["machine"]["gpu"] is None:
        others = [row for row in rows if "GPU" in row["what"]]
        assert len(others) == 4
        assert all(row["note"] == "not measured: no CUDA device" for row in others)
        assert done.stdout.count("**not measured**") == len(rows) - len(measured)


@pytest.mark.slow
@pytest.mark.long
def test_missing_packages_are_said_loudly(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_installed", lambda name: False)
    monkeypatch.setattr(bench, "LOADS", bench.LOADS[1:2])
    data, out = str(source.files[0].parents[1]), tmp_path / "bench.json"
    arguments = ["--only", "loader", "--images", "48", "--rounds", "1", "--data", data]
    assert bench.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["ours"] is None for row in rows] == [False, True, True]
    assert all("not installed" in row["note"] and row["ours"] is None for row in rows[1:])


@pytest.mark.slow
@pytest.mark.long
def test_each_rung_trains_as_many_steps_to_the_same_loss(source: Source, tmp_path: Path) -> None:
    imagery = prepare(source, tmp_path / "images", 96, 80, val=16)
    common = {"folder": str(imagery.folder), "recipe": "small", "batch": 16, "epochs": 2}
    common |= {"device": "cpu", "workers": 1, "seed": 1}
    losses = {}
    for rung in ("plain", "loader", "augment", "fast", "engine"):
        found = measure("steps", 2, rung=rung, **common)
        assert found["images_per_s"] > 0 and found["memory_mb"] > 50
        losses[rung] = found["loss"]
    assert max(losses.values()) < 1.3 * min(losses.values()), losses
