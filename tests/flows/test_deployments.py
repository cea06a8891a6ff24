"""Schedules and signals as Prefect has them: no twins, no backlog, no form with a wrong value."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from uuid import uuid4

import pytest
from imagery import write_class_folders
from prefect_api import api
from receiver import Receiver
from servers import S3, free_port, wait_until
from tiny import TINY

from ringmo import config, services
from ringmo.config import Config
from ringmo.process_group import end_group
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow

DEPLOY = """
import json, sys
from pathlib import Path
from flows.deployment import deploy
from ringmo.config import Config
from ringmo.workspace import Workspace
place = Workspace(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    rows = deploy(Config.load(place.params_file), place)
print(json.dumps(rows))
"""
OPEN = ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace with imagery and a Prefect of its own; no worker yet, MLflow a file."""
    made = init(tmp_path_factory.mktemp("deployments") / "workspace")
    imagery = write_class_folders(tmp_path_factory.mktemp("imagery"))
    given = {"services.prefect_port": free_port(), "ingest.sources": [str(imagery)]}
    # Nothing that the clock begins while a test looks.
    given |= {f"schedule.{name}": "0 0 29 2 *" for name in ("check", "retrain", "pretrain")}
    config.edit(made.params_file, TINY | given | {"run.grace_s": 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made.root.parent}/mlflow.db")
        patch.delenv("PREFECT_API_URL", raising=False)
        try:
            services.up(Config.load(made.params_file), made)
            yield made
        finally:
            services.down(made)


def python(place: Workspace, code: str, *arguments: str) -> Any:
    """What the last line printed says."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.root), *arguments],
        env={**os.environ, **services.environment(place)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def deploy(place: Workspace, times: int = 1, **given: Any) -> list[dict[str, Any]]:
    if given:
        config.edit(place.params_file, {k.replace("__", "."): v for k, v in given.items()})
    rows: list[dict[str, Any]] = python(place, DEPLOY, str(times))
    return rows


def deployments(place: Workspace) -> dict[str, Any]:
    """Flow → its one deployment."""
    found = api(place, "deployments/filter", {})
    assert {one["name"] for one in found} == {place.root.name}
    named = {one["entrypoint"].rpartition(".")[2]: one for one in found}
    assert len(named) == len(found), "twins"
    return named


def crons(one: Any) -> dict[str, str]:
    return {s["slug"]: s["schedule"]["cron"] for s in one["schedules"]}


def triggers(place: Workspace) -> list[str]:
    """Automations of this workspace's deployments; others look after every run of the server."""
    found = api(place, "automations/filter", {})
    return sorted(one["name"] for one in found if str(place.root) in one["name"])


def begin(place: Workspace, flow: str, **parameters: Any) -> str:
    one = deployments(place)[flow]
    asked = {"parameters": {**one["parameters"], **parameters}}
    return str(api(place, f"deployments/{one['id']}/create_flow_run", asked)["id"])


def state(place: Workspace, run: str) -> dict[str, Any]:
    found: dict[str, Any] = api(place, f"flow_runs/{run}")["state"]
    return found


def test_ten_deploys_are_one_and_null_takes_back(place: Workspace) -> None:
    given = {"schedule__uploads": "*/10 * * * *", "scenes__sources": ["scenes"]}
    rows = deploy(place, 10, **given, scenes__model="scene@champion", monitoring__retrain=True)
    made = deployments(place)
    flows = {"retrain", "ringmo_check", "ringmo_drift", "ringmo_uploads", "ringmo_scenes"}
    assert set(made) == flows and len(rows) == 8
    rare = "0 0 29 2 *"
    assert crons(made["retrain"]) == {"schedule-retrain": rare, "schedule-pretrain": rare}
    assert crons(made["ringmo_uploads"]) == {"schedule-uploads": "*/10 * * * *"}
    assert triggers(place) == [
        f"retrain {place.root} after drift",
        f"retrain {place.root} after new imagery",
        f"scenes of {place.root} after a promotion",
    ]
    monthly = next(s for s in made["retrain"]["schedules"] if s["slug"] == "schedule-pretrain")
    assert monthly["parameters"] == {"reason": "monthly", "anew": True}

    off = {"schedule__check": None, "schedule__pretrain": None, "schedule__uploads": None}
    rows = deploy(place, **off, scenes__sources=[], monitoring__retrain=False)
    left = deployments(place)
    assert set(left) == {"retrain", "ringmo_check", "ringmo_drift"}
    assert crons(left["ringmo_check"]) == {} and crons(left["retrain"]) == {
        "schedule-retrain": rare
    }
    assert left["retrain"]["id"] == made["retrain"]["id"]
    removed = {row["deployment"].partition("/")[0] for row in rows if row["schedule"] == "removed"}
    assert removed == {"ringmo-uploads", "ringmo-scenes"}
    assert triggers(place) == [f"retrain {place.root} after new imagery"]
    waits = api(place, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": OPEN}}}})
    assert not [r for r in waits if r["deployment_id"] == made["ringmo_uploads"]["id"]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"settings": {"data": "imagery"}}, "settings.data"),
        ({"settings": {"refresh": "sometimes"}}, "is not one of"),
        ({"settings": {"tasks": ["sceen"]}}, "'scene'"),
        ({"settings": {"recipe": "swin-huge"}}, "swin-b"),
        ({"settings": {"epochs": 3}}, "'epochs' was unexpected"),
        ({"anew": "perhaps"}, "boolean"),
    ],
)
def test_a_form_with_a_wrong_value_is_refused(place: Workspace, given: Any, said: str) -> None:
    if not api(place, "deployments/filter", {}):
        deploy(place)
    with pytest.raises(HTTPError) as refused:
        begin(place, "retrain", **given)
    assert refused.value.code == 409
    assert said in json.loads(refused.value.read())["detail"]


def test_two_workspaces_of_one_name_have_deployments_of_their_own(
    place: Workspace, tmp_path: Path
) -> None:
    other = init(tmp_path / place.root.name)
    config.edit(other.params_file, {"schedule.check": None, "schedule.retrain": None})
    url = json.loads((place.state / "services.json").read_text())["prefect"]["url"]
    before = api(place, "deployments/filter", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", f"{url}/api")
        rows = python(other, DEPLOY, "1")
    names = {row["deployment"].partition("/")[2] for row in rows}
    assert len(names) == 1 and names != {place.root.name}
    found = api(place, "deployments/filter", {})
    after = {one["id"]: one["parameters"] for one in found}
    assert all(after[one["id"]] == one["parameters"] for one in before)
    for one in found:
        if one["parameters"]["workspace"] == str(other.root):
            api(place, f"deployments/{one['id']}", method="DELETE")


def missed_for_a_week(place: Workspace) -> list[str]:
    """Seven runs that Prefect's own scheduler made, one a day over the last week, and no worker.

    The schedule makes them within seconds; that they were days is then written to its database.
    """
    one = deployments(place)["ringmo_drift"]
    start = datetime.now(UTC) + timedelta(seconds=12)
    rule = f"DTSTART:{start:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=SECONDLY;INTERVAL=1;COUNT=7"
    schedules = [{"schedule": {"rrule": rule, "timezone": "UTC"}, "active": True}]
    api(place, f"deployments/{one['id']}/schedules", schedules)

    def made() -> list[Any]:
        wanted = {"deployments": {"id": {"any_": [one["id"]]}}}
        wanted["flow_runs"] = {"state": {"type": {"any_": ["SCHEDULED"]}}}
        found: list[Any] = api(place, "flow_runs/filter", wanted)
        return found

    wait_until(lambda: len(made()) == 7, made)
    wait_until(lambda: datetime.now(UTC) > start + timedelta(seconds=8))
    runs = sorted(made(), key=lambda run: run["expected_start_time"])
    database = sqlite3.connect(place.state / "prefect" / "prefect.db", timeout=60)
    with database:
        for days, run in zip(range(7, 0, -1), runs, strict=True):
            for name in ("expected_start_time", "next_scheduled_start_time"):
                database.execute(
                    f"UPDATE flow_run SET {name} = datetime({name}, ?) WHERE id = ?",
                    (f"-{days} days", run["id"]),
                )
    database.close()
    return [run["id"] for run in runs]


@pytest.fixture
def worker(place: Workspace) -> Iterator[Callable[[], None]]:
    """Called, it starts one; it ends with the test, and the flow runs that it began."""

    def up() -> None:
        services.up(Config.load(place.params_file), place, worker=True)

    yield up
    record = place.state / "services.json"
    running = json.loads(record.read_text())
    if entry := running.pop("worker", None):
        end_group(entry["pid"], 5)
        record.write_text(json.dumps(running))


@pytest.mark.parametrize(("missed", "done"), [("once", 1), ("skip", 0)])
@pytest.mark.long
def test_a_week_without_a_worker_is_no_backlog(
    place: Workspace, worker: Callable[[], None], missed: str, done: int
) -> None:
    deploy(place, schedule__missed=missed)
    runs = missed_for_a_week(place)
    worker()
    ended = ("COMPLETED", "CANCELLED", "FAILED", "CRASHED")
    wait_until(
        lambda: all(state(place, run)["type"] in ended for run in runs),
        lambda: [state(place, run) for run in runs],
    )
    states = [state(place, run) for run in runs]
    names = sorted(one["name"] for one in states)
    assert names == ["Missed"] * (7 - done) + ["nothing to compare"] * done
    # Of those that were left out hardly any was even begun.
    began = [run for run in runs if api(place, f"flow_runs/{run}")["run_count"]]
    assert len(began) <= 2


def test_runs_that_meet(place: Workspace, worker: Callable[[], None]) -> None:
    """One goes on, since somebody else is at the store, and others become due."""
    import fcntl

    place.state.mkdir(exist_ok=True)
    with (place.state / "ingest.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deploy(place, schedule__overlap="queue")
        worker()
        first = begin(place, "retrain")
        wait_until(lambda: ingests(place, first), lambda: state(place, first))
        second = begin(place, "retrain")
        wait_until(
            lambda: state(place, second)["name"] == "AwaitingConcurrencySlot",
            lambda: state(place, second),
        )
        cancel(place, second)

        deploy(place, schedule__overlap="skip")
        third = begin(place, "retrain")
        wait_until(lambda: state(place, third)["type"] == "CANCELLED", lambda: state(place, third))
        assert state(place, first)["type"] == "RUNNING"

        deploy(place, schedule__overlap="replace")
        fourth = begin(place, "retrain")
        wait_until(lambda: state(place, first)["type"] == "CANCELLED", lambda: state(place, first))
        wait_until(lambda: ingests(place, fourth), lambda: state(place, fourth))
        cancel(place, fourth)
        wait_until(lambda: state(place, fourth)["type"] == "CANCELLED", limit_s=60)


def ingests(place: Workspace, run: str) -> bool:
    found = api(place, "task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return any(r["name"] == "ingest" and r["state_type"] == "RUNNING" for r in found)


def cancel(place: Workspace, run: str) -> None:
    api(place, f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})


HOLD = """
import sys, time
from pathlib import Path
from flows import slots
from ringmo.config import Config
from ringmo.workspace import Workspace
place = Workspace(Path(sys.argv[1]))
with slots.slot(Config.load(place.params_file), sys.argv[2], int(sys.argv[3])):
    print("holds", flush=True)
    time.sleep(float(sys.argv[4]))
"""


def hold(place: Workspace, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place.root), *arguments],
        env={**os.environ, **services.environment(place), "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def cards(place: Workspace) -> int:
    """Twelfths of this machine that are taken."""
    found = api(place, "v2/concurrency_limits/filter", {})
    return sum(one["active_slots"] for one in found if one["name"].startswith("ringmo-cpu-"))


def test_two_trainings_share_no_card_and_a_dead_one_holds_none(place: Workspace) -> None:
    first = hold(place, "pretrain", "1", "600")
    assert first.stdout and first.stdout.readline() == "holds\n"
    second = hold(place, "finetune@scene", "1", "0")
    beside = hold(place, "evaluate@scene", "1", "0")  # it trains nothing, and waits for nobody
    assert beside.stdout and beside.stdout.readline() == "holds\n"
    time.sleep(3)
    assert second.poll() is None and cards(place) == 12

    # The server dies, and comes back with the leases that it gave.
    server = json.loads((place.state / "services.json").read_text())["prefect"]
    os.killpg(server["pid"], signal.SIGKILL)
    time.sleep(1)
    services.up(Config.load(place.params_file), place)
    assert second.poll() is None and cards(place) == 12

    first.kill()
    first.wait()
    leases = place.state / "prefect" / "concurrency_leases"
    passed = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    index = json.loads((leases / "expirations.json").read_text())
    for name in index:  # minutes later
        lease = json.loads((leases / f"{name}.json").read_text())
        (leases / f"{name}.json").write_text(json.dumps(lease | {"expiration": passed}))
    (leases / "expirations.json").write_text(json.dumps(dict.fromkeys(index, passed)))
    assert second.stdout and second.stdout.readline() == "holds\n"
    assert second.wait(60) == 0
    wait_until(lambda: cards(place) == 0)

    # Two that share it on purpose do.
    pair = [hold(place, stage, "2", "600") for stage in ("finetune@scene", "scratch@scene")]
    try:
        for one in pair:
            assert one.stdout and one.stdout.readline() == "holds\n"
        assert cards(place) == 12
    finally:
        for one in pair:
            one.kill()
            one.wait()


FLOW = """
import importlib, json, sys
module, name = sys.argv[2].split(":")
flow = getattr(importlib.import_module(module), name)
state = flow(sys.argv[1], **json.loads(sys.argv[3]), return_state=True)
print(json.dumps({"type": state.type.value, "name": state.name, "message": state.message}))
"""


def told_runs(place: Workspace, flow: str, **parameters: Any) -> list[Any]:
    """Flow runs that wait for a worker, with these parameters."""
    one = deployments(place)[flow]
    open_runs = {"flow_runs": {"state": {"type": {"any_": OPEN}}}}
    found = api(place, "flow_runs/filter", open_runs)
    return [
        run
        for run in found
        if run["deployment_id"] == one["id"]
        and not run["auto_scheduled"]
        and run["parameters"].items() >= parameters.items()
    ]


def test_an_upload_starts_one_retraining(
    place: Workspace, tmp_path: Path, monkeypatch: Any
) -> None:
    """Real objects in a real bucket, whose relay posts an event to Prefect as docs/schedules.md has
    it."""
    store = S3(tmp_path / "s3")
    uploaded = write_class_folders(tmp_path / "imagery")
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    sources = {"ingest__sources": ["s3://bucket/new"], "schedule__uploads": "0 0 29 2 *"}
    store.start()
    try:
        endpoint = f"http://127.0.0.1:{store.port}"
        deploy(place, **sources, ingest__endpoint=endpoint, schedule__overlap="queue")

        def look() -> str:
            what = ("flows.uploads:ringmo_uploads", json.dumps({"settle_s": 1}))
            answer: str = python(place, FLOW, *what)["name"]
            return answer

        assert look() == "no answer"  # nothing lies there yet
        shutil.copytree(uploaded / "town", store.folder / "bucket" / "new" / "town")
        assert look() == "told"
        wait_until(lambda: told_runs(place, "retrain", reason="new imagery"))
        assert look() == "told before"
        shutil.copytree(uploaded / "woods", store.folder / "bucket" / "new" / "woods")
        assert look() == "cooling down"
        assert len(told_runs(place, "retrain", reason="new imagery")) == 1
        for run in told_runs(place, "retrain"):
            api(place, f"flow_runs/{run['id']}", method="DELETE")

        event = {
            "id": str(uuid4()),
            "event": "ringmo.bucket",
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": "ringmo.bucket.bucket"},
        }
        api(place, "events", [event])
        wait_until(lambda: told_runs(place, "ringmo_uploads"))
    finally:
        store.stop()


@pytest.mark.long
def test_the_nightly_check_takes_in_and_judges_and_tells_of_failures(
    place: Workspace, tmp_path: Path, monkeypatch: Any
) -> None:
    imagery, receiver = write_class_folders(tmp_path / "imagery"), Receiver()
    monkeypatch.setenv("RINGMO_WEBHOOK_SECRET", "between us")
    given = {"ingest.sources": [str(imagery)], "ingest.endpoint": None}
    config.edit(place.params_file, given | {"notify.webhook": receiver.url})

    def check() -> dict[str, Any]:
        answer: dict[str, Any] = python(place, FLOW, "flows.check:ringmo_check", "{}")
        return answer

    first = check()
    assert first["name"] == "new imagery" and "96 new images" in first["message"], first
    started = time.monotonic()
    assert check()["name"] == "nothing new"
    assert time.monotonic() - started < 120
    assert receiver.got == []
    shutil.rmtree(imagery / "town")
    broken = check()
    assert broken["type"] == "FAILED" and "town" in broken["message"], broken
    shutil.rmtree(imagery)
    silent = check()
    assert silent["type"] == "FAILED" and "no such folder" in silent["message"]
    notices = [json.loads(body) for _, body in receiver.got]
    assert [notice["type"] for notice in notices] == ["ringmo.notice"] * 2
    for notice, ended in zip(notices, (broken, silent), strict=True):
        assert notice["data"]["lines"] == [ended["message"]]
        assert "/runs/flow-run/" in notice["data"]["link"]
