"""Runs whose process was killed: found, and begun again, by a real server and a real worker."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect_api import api
from servers import free_port, wait_until

from ringmo import config, services
from ringmo.config import Config
from ringmo.process_group import born
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow
DEPLOY = """
import sys
from datetime import timedelta
from flows import pool, watch
from prefect.client.orchestration import get_client
from prefect.types.entrypoint import EntrypointType
from sleeping_flow import sleeping
watch.AGAIN_S, watch.SILENCE_S = 15, 45
watch.ensure()
watch.ensure()  # again and again, without twins
with get_client(sync_client=True) as client:
    name = pool.ensure(client)
print(sleeping.to_deployment(
    "w", work_pool_name=name, concurrency_limit=1, parameters={"folder": sys.argv[1]},
    entrypoint_type=EntrypointType.MODULE_PATH,
).apply())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    made = init(tmp_path_factory.mktemp("watch") / "workspace")
    config.edit(made.params_file, {"services.prefect_port": free_port()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made.root / 'mlflow.db'}")
        there = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
        patch.setenv("PYTHONPATH", os.pathsep.join(there))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "2")
        services.up(Config.load(made.params_file), made, worker=True)
        yield made
        services.down(made)


@pytest.fixture(scope="module")
def deployment(place: Workspace) -> str:
    """Of the sleeping flow, and the automations, whose patience is a part of what it is."""
    (place.root / "marks").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DEPLOY, str(place.root / "marks")],
        env=services.environment(place),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[-1]


def test_a_clock_far_from_the_server_s_makes_no_run_look_dead_and_none_alive(
    place: Workspace, deployment: str
) -> None:
    """What a flow says of itself is of its own machine's time."""
    related = {
        "prefect.resource.id": "prefect.flow.x",
        "prefect.resource.role": "flow",
        "prefect.resource.name": "retrain",
    }
    flow = api(place, "flows/", {"name": "retrain"})["id"]
    runs = {}
    for hours in (-2, 2):
        body = {"flow_id": flow, "state": {"type": "RUNNING"}}
        runs[hours] = run = api(place, "flow_runs/", body)["id"]
        for apart in (0, hours):
            alive = {
                "id": str(uuid4()),
                "event": "prefect.flow-run.heartbeat",
                "occurred": (datetime.now(UTC) + timedelta(hours=apart)).isoformat(),
                "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
                "related": [related],
                "payload": {},
            }
            api(place, "events", [alive])
            time.sleep(2)

    def states() -> dict[int, str]:
        return {h: api(place, f"flow_runs/{run}")["state"]["name"] for h, run in runs.items()}

    told = time.monotonic()
    while time.monotonic() - told < 30:  # of its patience of 45
        assert states() == {-2: "Running", 2: "Running"}
        time.sleep(1)
    wait_until(lambda: set(states().values()) == {"Crashed"}, lambda: str(states()), 90)


def test_a_run_killed_with_its_worker_is_begun_again(place: Workspace, deployment: str) -> None:
    """Which only the missing heartbeat tells; its flow alone: tests/faults."""
    marks = place.root / "marks"
    names = [one["name"] for one in api(place, "automations/filter", {})]
    assert len([name for name in names if name.startswith("ringmo: ")]) == len(set(names)) == 4
    run = api(place, f"deployments/{deployment}/create_flow_run", {})["id"]
    first = wait_until((marks / "began-0").exists, "the flow to begin")
    first = int((marks / "began-0").read_text())

    def states() -> list[str]:
        found = api(place, "flow_run_states/?flow_run_id=" + run, None)
        return [one["name"] for one in sorted(found, key=lambda one: one["timestamp"])]

    wait_until(lambda: "Running" in states(), "the server to hear of it")
    time.sleep(3)  # and of its first heartbeat
    worker = json.loads((place.state / "services.json").read_text())["worker"]["pid"]
    os.kill(worker, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL)
    # It dies within milliseconds, in which it would be taken for alive and not started anew.
    wait_until(lambda: born(worker) is None, "the worker's end")
    services.up(Config.load(place.params_file), place, worker=True)
    wait_until((marks / "began-1").exists, f"a second try: {states()}")
    wait_until(lambda: states()[-1] == "Completed", f"its end: {states()}")
    assert states().count("Running") == 2 and "Crashed" in states() and "AwaitingRetry" in states()
    assert not (marks / "began-2").exists()
    (limit,) = [
        one for one in api(place, "v2/concurrency_limits/filter", {}) if deployment in one["name"]
    ]
    assert limit["active_slots"] == 0


END_OF = """
import sys, threading, time
from uuid import UUID
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed, Failed, Running
from flows import watch
watch.HEARD_S = 3.0
@flow
def tried() -> None: ...
with get_client(sync_client=True) as client:
    for end in (Completed(name="Refused", message="it is worse"), Failed(message="no room")):
        run = client.create_flow_run(tried, state=Running())
        late = threading.Timer(1, client.set_flow_run_state, (run.id, end))
        late.start()
        found = watch.end_of(str(run.id))
        late.join()
        print(found and (found.type.value, found.name, found.message))
"""


def test_a_second_try_that_waited_for_the_first_ends_as_it_did(place: Workspace) -> None:
    """The first was taken for dead; its end reaches the server just after the workspace is free."""
    done = subprocess.run(
        [sys.executable, "-c", END_OF],
        env=services.environment(place),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["('COMPLETED', 'Refused', 'it is worse')", "None"]


UNHEARD = """
import sys
from pathlib import Path
from prefect.logging import get_logger
from prefect.logging.configuration import setup_logging
from flows import watch
from ringmo import console
setup_logging()
watch.go_on_unheard()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    get_logger("prefect.engine").error("more of the log")
    console.note("and of what people read")
Path(sys.argv[1]).touch()
"""


def test_a_run_outlives_the_reader_of_its_log(tmp_path: Path) -> None:
    """As when its worker is killed: the pipe it writes to has no other end."""
    run = subprocess.Popen(
        [sys.executable, "-c", UNHEARD, str(tmp_path / "went on")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdin and run.stdout and run.stderr
    assert run.stdout.readline() == b"ready\n"
    run.stderr.close()
    run.stdin.write(b"\n")
    run.stdin.close()
    run.wait(60)
    assert (tmp_path / "went on").exists()
