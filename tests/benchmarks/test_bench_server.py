import json
import subprocess
import sys
from pathlib import Path

import imagery as made
import pytest

from benchmarks import server
from benchmarks.imagery import ROOT
from benchmarks.table import Row


def runs(rate: float, *p99_ms: float) -> list[dict[str, dict[str, float]]]:
    return [
        {"rate": {"8": rate + i, "1": rate}, "p99_ms": {"8": wait, "1": wait}}
        for i, wait in enumerate(p99_ms)
    ]


@pytest.mark.parametrize(
    ("ours", "reached"),
    [
        (runs(200, 10, 10, 10), True),
        (runs(199, 10, 10, 10), False),  # 200 against 101 in the middle: not twice as often
        (runs(300, 10, 20, 20), True),  # as long as the peer's
        (runs(300, 10, 21, 21), False),  # more often, and yet some wait longer
        (runs(300, 10, 10, 500), True),  # medians
    ],
)
def test_the_goal_is_reached_only_where_nobody_waits_longer(
    ours: list[dict[str, dict[str, float]]], reached: bool
) -> None:
    row, alone = Row("x", "images/s", "y"), Row("x", "images/s", "y")
    peer = runs(99.5, 20, 20, 20)
    server._compare(row, 8, ours, peer)
    assert row.reached == reached and row.baseline == 100.5
    assert row.ratio == pytest.approx((ours[0]["rate"]["8"] + 1) / 100.5)
    server._compare(alone, 1, ours, peer)
    assert alone.reached is None  # of one client nothing is asked


@pytest.mark.slow
@pytest.mark.long
def test_the_server_is_measured_and_answers_as_mlflow_does(tmp_path: Path) -> None:
    """Ours and MLflow's own, each started, asked and stopped; both must name the same classes."""
    made.write_class_folders(tmp_path / "images", each=2)
    folder = str(tmp_path / "server")

    def child(**spec: object) -> dict[str, dict[str, float]]:
        command = [sys.executable, "-m", "benchmarks.server", json.dumps({"cores": 2, **spec})]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    child(job="make", folder=folder, images=str(tmp_path / "images"))
    for contender in ("ours", "mlflow"):
        about = {"contender": contender, "workers": 1, "threads": 1, "clients": [2]}
        found = child(job="serve", folder=folder, seconds=0.5, **about)
        assert found["rate"]["2"] > 0 and found["p99_ms"]["2"] >= found["p50_ms"]["2"] > 0
