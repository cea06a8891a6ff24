"""The chain as a user runs it: the real command, real servers, real processes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from imagery import write_class_folders
from prefect_api import api
from servers import free_port
from tiny import TINY

from ringmo import config
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow


def ringmo(
    workspace: Workspace, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringmo", *arguments, "--workspace", str(workspace.root)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run(workspace: Workspace, *arguments: str, expect: int = 0, **options: Any) -> dict[str, Any]:
    """`ringmo run --json`, its one JSON object."""
    done = ringmo(workspace, "run", "--json", *arguments, **options)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-6000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def last_artifact(place: Workspace, key: str) -> str:
    """What the newest artifact of a key says, of a flow run."""
    found = api(
        place,
        "artifacts/filter",
        {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1},
    )
    assert found[0]["flow_run_id"]
    return str(found[0]["data"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace with its own servers, which the tests below share, one after the other."""
    made = init(tmp_path_factory.mktemp("chain") / "workspace")
    ports = {"services.mlflow_port": free_port(), "services.prefect_port": free_port()}
    lenient = {"gate.scene.max_drop": 1.0, "gate.encoder.max_drop": 1.0}
    config.edit(made.params_file, TINY | ports | lenient)
    yield made
    ringmo(made, "down")
    assert not [p for p in psutil.process_iter() if str(made.root) in " ".join(_command_line(p))], (
        "something was left running"
    )


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def imagery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_class_folders(tmp_path_factory.mktemp("imagery"))
    # Bad files among good ones never stop a run.
    (folder / "woods" / "empty.jpg").write_bytes(b"")
    (folder / "woods" / "words.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def first(place: Workspace, imagery: Path) -> dict[str, Any]:
    return run(place, "--data", str(imagery))


STAGES = ["validate", "select", "pretrain", "finetune@scene", "scratch@scene", "evaluate@scene"]
ENDS = ["register@encoder", "register@scene", "promote@encoder", "promote@scene"]


def test_a_folder_becomes_a_champion(first: dict[str, Any], place: Workspace) -> None:
    assert first["stages"] == dict.fromkeys(STAGES + ENDS, "done")
    assert first["data"]["tiles"] == 96
    assert first["data"]["set_aside"] == 2
    assert first["validation"]["ok"]
    scene = first["tasks"]["scene"]
    assert scene["champion"] == scene["model"] == "scene/1"
    assert scene["verdict"] == "passed" and scene["promoted"]
    assert first["tasks"]["encoder"]["champion"] == "encoder/1"
    assert 0 <= scene["test_accuracy"] <= 1
    assert 0 <= scene["scratch_accuracy"] <= 1
    names = {r["name"] for r in api(place, "task_runs/filter", {})}
    assert set(STAGES) <= names
    runs = api(place, "artifacts/filter", {})
    assert any(artifact["key"] == "summary" for artifact in runs)
    assert any(artifact["key"] == "mlflow-pretrain" for artifact in runs)
    assert "Passed: " in last_artifact(place, "validation")
    assert float(last_artifact(place, "progress-pretrain")) == 100


def test_unchanged_work_is_not_done_again(first: dict[str, Any], place: Workspace) -> None:
    shards = {p: p.stat().st_mtime_ns for p in place.store.rglob("*") if p.is_file()}
    started = time.monotonic()
    second = run(place)
    took = time.monotonic() - started
    assert second["outcome"] == "Unchanged"
    assert set(second["stages"].values()) == {"cached"}
    assert took < 120  # 13 s when nothing else runs
    assert shards == {p: p.stat().st_mtime_ns for p in place.store.rglob("*") if p.is_file()}
    states = [r["state_name"] for r in api(place, "task_runs/filter", {"limit": 200})]
    assert states.count("Cached") >= len(STAGES)


def test_the_champion_answers_for_an_image(
    first: dict[str, Any], place: Workspace, imagery: Path
) -> None:
    image = next((imagery / "town").glob("*.jpg"))
    done = ringmo(place, "predict", str(image), "--model", "scene@champion", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["predictions"][0]
    assert answer["label"] in {"fields", "harbour", "town", "woods"}
    assert sum(row["probability"] for row in answer["top"]) == pytest.approx(1, abs=1e-3)


def test_every_verb_of_the_registry_speaks(first: dict[str, Any], place: Workspace) -> None:
    for arguments, word in (
        (["models"], "champion"),
        (["models", "--history"], "gate"),
        (["lineage", "scene@champion"], first["data"]["data_version"]),
        (["data", "versions"], first["data"]["data_version"][:8]),
        (["status"], "local"),
        (["run", "--dry-run"], "unchanged"),
    ):
        done = ringmo(place, *arguments)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout, (arguments, done.stdout)
    for verb in ("models", "status"):
        assert isinstance(json.loads(ringmo(place, verb, "--json").stdout), dict)


@pytest.mark.long
def test_a_corrected_label_trains_the_task_and_not_the_encoder(
    first: dict[str, Any], place: Workspace, imagery: Path
) -> None:
    moved = sorted((imagery / "town").glob("*.jpg"))[0]
    shutil.move(moved, imagery / "harbour" / moved.name)
    shards = {p: p.read_bytes() for p in place.store.glob("*.tar")}
    answer = run(place)
    assert answer["stages"]["pretrain"] == "cached"
    assert answer["stages"]["finetune@scene"] == "done"
    assert shards == {p: p.read_bytes() for p in place.store.glob("*.tar")}
    assert answer["tasks"]["scene"]["model"] == "scene/2"
    assert answer["data"]["data_version"] != first["data"]["data_version"]


@pytest.mark.long
def test_new_imagery_adds_shards_and_trains_anew(
    first: dict[str, Any], place: Workspace, imagery: Path
) -> None:
    shards = {p: p.read_bytes() for p in place.store.glob("*.tar")}
    write_class_folders(imagery, each=4, seed=7)
    answer = run(place)
    assert answer["data"]["new_tiles"] == 16
    assert answer["stages"]["pretrain"] == "done"
    after = {p: p.read_bytes() for p in place.store.glob("*.tar")}
    assert {p: after[p] for p in shards} == shards
    assert len(after) > len(shards)

    # The heads on both encoders stood side by side before any was promoted.
    assert answer["tasks"]["encoder"]["champion"] == "encoder/2"
    (row,) = answer["heads"]
    assert (row["champion"], row["champion_encoder"]) == ("scene/2", "encoder/1")
    assert (row["candidate"], row["candidate_encoder"]) == ("scene/3", "encoder/2")
    assert row["difference"] == pytest.approx(row["candidate_value"] - row["champion_value"])
    assert answer["tasks"]["scene"]["champion"] == "scene/3" and answer["left_behind"] == []
    assert "scene/2 on encoder/1" in last_artifact(place, "heads")
    (shown,) = api(
        place,
        "artifacts/filter",
        {"artifacts": {"key": {"any_": ["heads"]}}, "sort": "CREATED_DESC", "limit": 1},
    )
    steps = {
        one["name"]: one
        for one in api(place, "task_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    }
    for model in ("encoder", "scene"):
        assert steps[f"register@{model}"]["end_time"] <= shown["created"]
        assert shown["created"] <= steps[f"promote@{model}"]["start_time"]
    listed = json.loads((place.state / "reports" / "heads.json").read_text())
    assert listed["rows"] == answer["heads"]


@pytest.mark.long
def test_killed_before_promotion_the_next_run_promotes_once(
    first: dict[str, Any], place: Workspace
) -> None:
    """SIGKILL of the flow's process when all is judged and nothing promoted."""
    table = place.state / "reports" / "heads.json"
    before = table.stat().st_mtime_ns
    champion = json.loads(ringmo(place, "models", "scene", "--json").stdout)["models"][0]
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "ringmo", "run", "--set", "finetune.scene.seed=7"),
            *("--workspace", str(place.root)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 300
    while table.stat().st_mtime_ns == before:
        assert child.poll() is None and time.monotonic() < limit, child.communicate()[1][-3000:]
        time.sleep(0.01)
    child.kill()
    child.communicate(timeout=60)
    number = champion["version"] + 1

    def moves() -> list[dict[str, Any]]:
        history = json.loads(ringmo(place, "models", "scene", "--history", "--json").stdout)
        return [row for row in history["history"] if row["to"] == number]

    assert not moves(), "it was killed too late"
    answer = run(place)
    assert {answer["stages"][f"register@{model}"] for model in ("encoder", "scene")} == {"cached"}
    assert answer["stages"]["promote@scene"] == "done"
    assert answer["tasks"]["scene"]["champion"] == f"scene/{number}"
    assert [(row["what"], row["who"]) for row in moves()] == [("promote", "gate")]
    done = ringmo(place, "rollback", "scene", "--by", "ada", "--reason", "a test")
    assert done.returncode == 0, done.stderr
    again = run(place)
    assert again["outcome"] == "Unchanged", "what a person rolled back stays rolled back"
    assert again["tasks"]["scene"]["champion"] == f"scene/{champion['version']}"


ENDS_ALONE = """
import json, sys
from prefect import flow
from flows import retrain
from ringmo.config import Config
from ringmo.workspace import Workspace

@flow
def ends():
    place = Workspace.find(sys.argv[1])
    cached = {}
    failed = retrain._registered(Config.load(place.params_file), place, {"flow_run": ""}, cached)
    return {"failed": failed, "cached": cached}

print(json.dumps(ends()))
"""


@pytest.mark.long
def test_one_that_cannot_be_registered_stops_none_of_the_others(
    first: dict[str, Any], place: Workspace
) -> None:
    addresses = json.loads((place.state / "services.json").read_text())
    env = {
        "MLFLOW_TRACKING_URI": addresses["mlflow"]["url"],
        "PREFECT_API_URL": addresses["prefect"]["url"] + "/api",
    }
    reports = place.state / "reports"
    for report in reports.glob("register-*.json"):
        report.unlink()
    weights = place.work("pretrain") / "encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()  # DVC's cache has the same file
    weights.write_bytes(whole[:-5])
    try:
        done = subprocess.run(
            [sys.executable, "-c", ENDS_ALONE, str(place.root)],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        weights.write_bytes(whole)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert list(told["failed"]) == ["encoder"] and "is damaged" in told["failed"]["encoder"]
    assert not told["cached"]["register@scene"]
    said = json.loads((reports / "register-scene.json").read_text())
    assert said["figures"]["verdict"] == "passed"


def test_a_failed_rule_stops_the_chain_and_leaves_the_champion(
    first: dict[str, Any], place: Workspace, imagery: Path
) -> None:
    before = ringmo(place, "models", "scene", "--json").stdout
    lonely = imagery / "lonely"
    lonely.mkdir()
    shutil.copy(sorted((imagery / "town").glob("*.jpg"))[1], lonely / "one.jpg")
    os.utime(lonely / "one.jpg")
    (imagery / "town" / "moved-away").mkdir()
    sorted((imagery / "town").glob("*.jpg"))[1].rename(imagery.parent / "kept.jpg")
    answer = run(place, expect=1)
    assert "min_per_class" in answer["error"] or "samples" in answer["error"]
    assert "\n" not in answer["error"]
    assert ringmo(place, "models", "scene", "--json").stdout == before
    # What was found is in the flow run and in MLflow, with the pictures.
    told = last_artifact(place, "validation")
    assert told.startswith("**FAILED**")
    assert re.search(r"\| \*\*FAILED\*\* \| labels \| samples \| 1 \| .*\| lonely \|", told)
    link = re.search(r"\((http\S+/runs/(\w+))/artifacts/docs/(rules/samples.html)\)", told)
    assert link is not None
    tracker = Tracker(place)
    judged = tracker.run(link[2])
    assert judged is not None and judged.experiment == "validate" and judged.status == "FAILED"
    assert judged.metrics["failed/samples"] == 1
    assert judged.metrics["broken"] == told.count("| **FAILED** |")
    server = json.loads((place.state / "services.json").read_text())["mlflow"]["url"]
    page = f"{server}/get-artifact?path=docs/{link[3]}&run_uuid={link[2]}"
    with urllib.request.urlopen(page, timeout=30) as answer:
        assert b"data:image/jpeg" in answer.read()
    shutil.rmtree(lonely)
    (imagery.parent / "kept.jpg").rename(imagery / "town" / "back.jpg")


@pytest.mark.long
def test_without_labels_the_chain_ends_after_the_encoder(
    first: dict[str, Any], place: Workspace, imagery: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in imagery.rglob("*.jpg"):
        shutil.copy(image, flat / image.name)
    other = init(tmp_path / "unlabelled")
    config.edit(other.params_file, TINY)
    addresses = json.loads((place.state / "services.json").read_text())
    env = {
        "MLFLOW_TRACKING_URI": addresses["mlflow"]["url"],
        "PREFECT_API_URL": addresses["prefect"]["url"] + "/api",
    }
    done = ringmo(other, "run", "--data", str(flat), env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the chain stopped after the encoder" in done.stdout
    assert not other.work("finetune@scene").exists()


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    other = init(tmp_path / "w")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.edit(other.params_file, {"services.mlflow_port": port})
        done = ringmo(other, "up")
    assert done.returncode == 2
    assert f"port {port} for mlflow is in use" in done.stderr
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_an_unreachable_server_is_said_in_one_line(
    tmp_path: Path, variable: str, imagery: Path
) -> None:
    other = init(tmp_path / "w")
    ports = {"services.mlflow_port": free_port(), "services.prefect_port": free_port()}
    config.edit(other.params_file, TINY | ports)
    env = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        variable: "http://127.0.0.1:9",
    }
    if variable == "MLFLOW_TRACKING_URI":
        env["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    done = ringmo(other, "run", "--data", str(imagery), env=env)
    assert done.returncode == 3, done.stderr
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    ringmo(other, "down")
