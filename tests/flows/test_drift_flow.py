"""Drift in Prefect: compared by a flow, told once, and taken as the signal to retrain."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_api import api
from registered import write_model
from servers import free_port, wait_until
from tiny import TINY

from ringmo import config, services
from ringmo.config import Config, Monitoring
from ringmo.monitoring import record
from ringmo.registry import bundle, promotion
from ringmo.registry.register import register
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """scene/1, the champion, whose production is darker than its reference; Prefect, no worker."""
    made = init(tmp_path_factory.mktemp("drift") / "workspace")
    ports = {"services.mlflow_port": free_port(), "services.prefect_port": free_port()}
    given = {"monitoring.retrain": True, "monitoring.cron": "0 6 * * *"}
    config.edit(made.params_file, TINY | ports | given)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("PREFECT_API_URL", raising=False)
        try:
            services.up(Config.load(made.params_file), made)
            champion(made)
            yield made
        finally:
            services.down(made)


def champion(place: Workspace) -> None:
    import torch

    from ringmo.monitoring.record import write_table
    from ringmo.registry.register import REFERENCE

    folder = write_model(place, 1)
    model = bundle.load(folder)
    torch.manual_seed(0)
    images = torch.randint(40, 250, (60, 3, 32, 32), dtype=torch.uint8)
    recorded(place, model, images)
    (part,) = (place.state / "production").rglob("*.parquet")
    import pandas as pd

    rows = pd.read_parquet(part).to_dict("records")
    write_table(place.work("evaluate@scene") / REFERENCE, rows)
    part.unlink()
    register(Config.load(place.params_file), place, "scene", {"verdict": "passed"})
    promotion.promote(place, "scene", 1, by="ada", reason="first")
    recorded(place, model, (images.float() * 0.6).to(torch.uint8))


def recorded(place: Workspace, model: Any, images: Any) -> None:
    import torch

    recorder = record.Recorder(place, model, "scene/1", Monitoring(share=1.0))
    with torch.inference_mode():
        answer = model.task.answer(model.model, model.normalised({"rgb": images}))
    recorder.add({"rgb": images}, answer, [f"{i}.png" for i in range(len(images))])
    recorder.close()


def python(place: Workspace, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.root)],
        env={**os.environ, **services.environment(place)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def watch(place: Workspace) -> dict[str, Any]:
    """The flow run's state."""
    code = (
        "import sys, json; from flows.drift import ringmo_drift; "
        "s = ringmo_drift(sys.argv[1], return_state=True); "
        "print(json.dumps({'name': s.name, 'message': s.message}))"
    )
    answer: dict[str, Any] = json.loads(python(place, code).splitlines()[-1])
    return answer


def events(place: Workspace) -> list[dict[str, Any]]:
    wanted = {"filter": {"event": {"name": ["ringmo.drift"]}}}
    found: list[dict[str, Any]] = api(place, "events/filter", wanted)["events"]
    return found


def retrainings(place: Workspace) -> list[dict[str, Any]]:
    found = api(place, "flow_runs/filter", {"flows": {"name": {"any_": ["retrain"]}}})
    return [run for run in found if run["parameters"].get("reason") == "drift"]


def test_a_drift_is_told_once_and_starts_a_retraining(place: Workspace) -> None:
    deploy = (
        "import sys, json; from pathlib import Path; from flows.deployment import deploy; "
        "from ringmo.config import Config; from ringmo.workspace import Workspace; "
        "w = Workspace(Path(sys.argv[1])); "
        "deploy(Config.load(w.params_file), w); "
        "print(json.dumps(deploy(Config.load(w.params_file), w)))"
    )
    rows = json.loads(python(place, deploy).splitlines()[-1])
    by_flow = {row["deployment"].partition("/")[0]: row for row in rows if row["schedule"]}
    assert by_flow["ringmo-drift"]["schedule"] == "0 6 * * *"
    assert len(api(place, "deployments/filter", {})) == 3
    every = {one["name"] for one in api(place, "automations/filter", {})}
    names = {name for name in every if str(place.root) in name}  # others look after every run
    assert names == {f"retrain {place.root} after {why}" for why in ("drift", "new imagery")}

    state = watch(place)
    assert state["name"] == "drift", state
    assert "scene/1: production has drifted: bands" in state["message"]
    wait_until(lambda: len(events(place)) == 1)
    (event,) = events(place)
    assert event["resource"]["prefect.resource.id"] == "ringmo.model.scene"
    assert event["payload"]["model"] == "scene/1" and "bands" in event["payload"]["tests"]
    artifacts = api(place, "artifacts/filter", {"artifacts": {"key": {"any_": ["drift-scene"]}}})
    assert "production has drifted" in artifacts[0]["data"]
    assert (place.state / "drift" / "scene.html").is_file()
    wait_until(lambda: len(retrainings(place)) == 1)
    assert retrainings(place)[0]["parameters"]["workspace"] == str(place.root)

    again = watch(place)
    assert again["name"] == "drift" and "told less than 7 d ago" in again["message"]
    time.sleep(3)
    assert len(events(place)) == 1 and len(retrainings(place)) == 1
    # A week later, or with no rest wanted, it is told again.
    config.edit(place.params_file, {"monitoring.quiet_days": 0})
    assert "told less" not in watch(place)["message"]
    wait_until(lambda: len(events(place)) == 2)


@pytest.mark.long
def test_nothing_to_compare_is_no_failure(place: Workspace) -> None:
    import shutil

    shutil.rmtree(place.state / "production")
    state = watch(place)
    assert state["name"] == "nothing to compare"
    assert "has recorded nothing of scene" in state["message"]
