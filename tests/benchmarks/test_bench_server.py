import json
import subprocess
import sys
from pathlib import Path

import imagery as made
import pytest

from benchmarks.imagery import ROOT

pytestmark = pytest.mark.slow


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
