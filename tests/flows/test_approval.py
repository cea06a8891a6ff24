"""A person's word before production: asked in Prefect's pages, while no process waits."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from prefect_api import api
from registered import register_three
from servers import free_port, wait_until
from tiny import TINY

from ringmo import config, services
from ringmo.registry import promotion
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow


def ringmo(place: Workspace, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "ringmo", *arguments, "--json", "--workspace", str(place.root)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Three versions, scene/1 the champion, and Prefect without a worker."""
    made = init(tmp_path_factory.mktemp("approval") / "workspace")
    ports = {"services.mlflow_port": free_port(), "services.prefect_port": free_port()}
    config.edit(made.params_file, TINY | ports)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("PREFECT_API_URL", raising=False)
        try:
            services.up(config.Config.load(made.params_file), made)
            register_three(made)
            promotion.promote(made, "scene", 1, by="ada", reason="first")
            yield made
        finally:
            services.down(made)


def ask(place: Workspace, *questions: tuple[str, list[str]]) -> list[str]:
    """Ids of the flow runs; asked in a process that ends, as `ringmo run` does."""
    code = (
        "import json, sys; from flows.approval import ask; "
        "from ringmo.workspace import Workspace; place = Workspace.find(sys.argv[1]); "
        "print(json.dumps([ask(place, *one) for one in json.loads(sys.argv[2])]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.root), json.dumps(questions)],
        env=services.environment(place),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout.splitlines()[-1])
    assert all("/runs/flow-run/" in address for address in addresses)
    return [address.rpartition("/")[2] for address in addresses]


def state(place: Workspace, run: str, *wanted: str) -> dict[str, Any]:
    """The flow run's state, as soon as it is of one of these types."""
    limit = time.monotonic() + 240
    while True:
        found: dict[str, Any] = api(place, f"flow_runs/{run}")["state"]
        if found["type"] in wanted:
            return found
        assert time.monotonic() < limit and found["type"] not in ("FAILED", "CRASHED"), found
        time.sleep(0.5)


def answer(place: Workspace, run: str, **form: Any) -> str:
    said: str = api(place, f"flow_runs/{run}/resume", {"run_input": form})["status"]
    return said


def champion(place: Workspace) -> str:
    return str(Tracker(place).aliased("scene", "champion"))


def questions(place: Workspace, ref: str) -> list[Any]:
    found = api(place, "flow_runs/filter", {"sort": "START_TIME_ASC"})
    return [run for run in found if run["parameters"].get("ref") == ref]


def test_a_person_says_yes_or_no_in_the_pages(place: Workspace) -> None:
    two, three, again = ask(
        place,
        ("scene/2", ["scene/2 has accuracy 61.0 %, the champion 60.0 %"]),
        ("scene/3", ["a little better"]),
        ("scene/3", ["a little better, said otherwise"]),
    )
    assert again == three and len(questions(place, "scene/3")) == 1
    for run in (two, three):
        state(place, run, "PAUSED")
    # Nothing waits for the answer: no process of a flow run is left, and no slot is taken.
    worker = psutil.Process(services.status(place)["worker"]["pid"])
    wait_until(lambda: not worker.children(recursive=True))
    keys = state(place, two, "PAUSED")["state_details"]["run_input_keyset"]
    form = api(place, f"flow_runs/{two}/input/{keys['schema']}")
    assert set(form["properties"]) == {"approve", "name", "reason"}
    assert "61.0 %" in api(place, f"flow_runs/{two}/input/{keys['description']}")

    assert answer(place, two, approve=True) == "REJECT"  # who says so?
    assert answer(place, two, approve=True, name="Ada", reason="fields are right") == "ACCEPT"
    assert answer(place, three, approve=False, name="Bob", reason="no harbours") == "ACCEPT"
    done, refused = (state(place, run, "COMPLETED") for run in (two, three))
    assert done["name"] == "promoted by Ada"
    assert refused["name"] == "not promoted" and "Bob: no harbours" in refused["message"]
    assert champion(place) == "scene/2"
    entry = promotion.history(place, "scene")[0]
    assert (entry["who"], entry["why"]) == ("Ada", "fields are right")
    # Who has answered is not asked the same again.
    assert ask(place, ("scene/3", ["a little better"])) == [three]


@pytest.mark.long
def test_who_promotes_by_command_has_answered(place: Workspace) -> None:
    before = champion(place)  # as the tests before this one left it
    (run,) = ask(place, ("scene/3", [f"compared with {before}"]))
    state(place, run, "PAUSED")
    moved = ringmo(place, "promote", "scene/3", "--by", "Cleo", "--reason", "tried it")
    assert moved["moved"] and champion(place) == "scene/3"
    done = state(place, run, "COMPLETED")
    assert done["name"] == "promoted by Cleo" and "tried it" in done["message"]
    # Nothing of the question goes on: its end is not waited for either.
    open_runs = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}}}
    tag = questions(place, "scene/3")[0]["tags"]
    assert [r for r in api(place, "flow_runs/filter", open_runs) if r["tags"] == tag] == []

    wanted = {"filter": {"event": {"name": ["ringmo.promotion"]}}}

    def told() -> list[Any]:
        events = api(place, "events/filter", wanted)["events"]
        return [event for event in events if event["payload"]["who"] == "Cleo"]

    (event,) = wait_until(told, "the promotion's event")
    assert event["resource"]["prefect.resource.id"] == "ringmo.model.scene"
    related = {r["prefect.resource.role"]: r["prefect.resource.id"] for r in event["related"]}
    assert related == {
        "champion": "ringmo.version.scene.3",
        "previous": f"ringmo.version.{before.replace('/', '.')}",
    }


@pytest.mark.long
def test_nobody_answers_and_a_verdict_changes(place: Workspace) -> None:
    """One question is approved though the gate has refused the version since, one is left."""
    config.edit(place.params_file, {"promotion.wait_h": 0.01})
    (left,) = ask(place, ("scene/2", ["anybody?"]))
    config.edit(place.params_file, {"promotion.wait_h": 72})
    (late,) = ask(place, ("scene/1", ["as good as it was"]))
    state(place, late, "PAUSED")
    version = next(v for v in Tracker(place).versions("scene") if v.version == 1)
    verdict = {"verdict": "refused", "verdict_reasons": "9 points worse"}
    Tracker(place).tag_version(version, verdict)
    assert answer(place, late, approve=True, name="Ada") == "ACCEPT"
    no = state(place, late, "COMPLETED")
    assert no["name"] == "not promoted" and "9 points worse" in no["message"]
    nobody = state(place, left, "COMPLETED")
    assert nobody["name"] == "not promoted" and "nobody answered" in nobody["message"]
    assert champion(place) == "scene/3"
