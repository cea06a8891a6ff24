import json
import math
import subprocess
import sys
from pathlib import Path

import imagery as made
import pytest
import torch

from benchmarks import rotated as bench
from benchmarks.imagery import ROOT
from ringmo.models import rotated


def test_rotated_boxes_with_other_answers_are_no_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = {"boxes": 200, "job": "nms", "contender": "ours"}
    assert bench.measured(spec)["boxes_per_s"] > 0
    monkeypatch.setattr(rotated, "nms", lambda boxes, scores, threshold: torch.arange(200))
    with pytest.raises(SystemExit, match="other answers"):
        bench.measured(spec)


@pytest.mark.slow
@pytest.mark.long
def test_rotated_boxes_are_measured_against_shapely(tmp_path: Path) -> None:
    made.write_class_folders(tmp_path / "images", each=2)
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks", "--only", "rotated", "--images", "300"]
    command += ["--rounds", "1", "--data", str(tmp_path / "images"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["failures"] == [] and len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["unit"] == "boxes/s" and "shapely" in row["what"]
        assert row["ours"] > 0 and math.isclose(row["ratio"], row["ours"] / row["baseline"])
