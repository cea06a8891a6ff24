"""The alias moves while clients ask: nobody is refused, and nobody hears two versions' words."""

import http.client
import json
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from registered import register_three
from served import Served, png
from small_models import rgb
from tiny import TINY

from ringmo import config
from ringmo.inference.predict import predict
from ringmo.monitoring import record
from ringmo.registry import promotion
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow

CLIENTS, LOAD_S = 8, 20.0
GROWTH_MB = 30  # of memory, between the first seconds of load and the last


class Load:
    """Clients that ask one after the other on connections that stay, each with its own image."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen: list[tuple[float, int, str]] = []  # when, status, version
        self.errors: list[str] = []
        self.answers: dict[tuple[int, str], set[str]] = {}  # image, version → labels and numbers
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        body = png(rgb(number))
        caller = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self._end.is_set():
            try:
                caller.request("POST", "/predict/scene", body)
                answer = caller.getresponse()
                told = json.loads(answer.read())
            except (OSError, http.client.HTTPException) as error:
                if not self._end.is_set():
                    self.errors.append(repr(error))
                return
            version = answer.headers.get("ringmo-version", "")
            self.seen.append((time.monotonic(), answer.status, version))
            said = f"{told.get('version')} {told.get('label')} {told.get('confidence', 0):.3f}"
            self.answers.setdefault((number, version), set()).add(said)

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three versions of `scene`, the first of them the champion."""
    made = init(tmp_path_factory.mktemp("swap") / "workspace")
    config.edit(made.params_file, TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register_three(made)
        promotion.promote(made, "scene", 1, by="test", reason="")
    return made


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Served]:
    served = Served(workspace, "--model", "scene@champion", "--poll", "1")
    yield served
    if served.process.poll() is None:
        served.stop()


def wait(done: Any, what: str, seconds: float = 40) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, what
        time.sleep(0.1)


def memory_mb(served: Served) -> float:
    return float(psutil.Process(served.process.pid).memory_info().rss / 1e6)


def test_a_new_champion_takes_over_under_load(
    workspace: Workspace, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert server.told["models"] == {"scene": "scene/1"}
    load = Load(server.port)
    began = time.monotonic()
    try:
        wait(lambda: len(load.seen) > 200, "no answers")
        before = memory_mb(server)
        promotion.promote(workspace, "scene", 2, by="test", reason="", force=True)
        wait(lambda: load.seen[-1][2] == "scene/2", f"no change: {server.log}")
        wait(lambda: time.monotonic() > began + LOAD_S, "")
        after = memory_mb(server)
    finally:
        load.stop()
    assert load.errors == [] and {status for _, status, _ in load.seen} == {200}
    assert {version for _, _, version in load.seen} == {"scene/1", "scene/2"}
    first = min(when for when, _, version in load.seen if version == "scene/2")
    # Those that were within when it took over end with the old one; nobody after them.
    assert not [1 for when, _, version in load.seen if version == "scene/1" and when > first + 2]
    # One image, one version: one answer, named by the version in its header.
    for (number, version), said in load.answers.items():
        assert len(said) == 1 and next(iter(said)).startswith(version), (number, said)
    assert after - before < GROWTH_MB
    assert server.metric('ringmo_swaps_total{model="scene"}') == 1
    assert server.metric('ringmo_batch_size_sum{model="scene"}') > server.metric(
        'ringmo_batch_size_count{model="scene"}'
    )


def test_a_version_that_does_not_load_changes_nothing(
    workspace: Workspace, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(workspace)
    third = next(v for v in tracker.versions("scene") if v.version == 3)
    weights = tracker.bundle_folder(third) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    failures = 'ringmo_swap_failures_total{model="scene"}'
    load = Load(server.port)
    try:
        tracker.set_alias("scene", "champion", 3)  # past the promotion, which would refuse it
        wait(lambda: server.metric(failures) == 1, "not tried")
        assert "scene/3 does not load" in server.log and "scene/2 goes on" in server.log
        assert server.get("/ready").status_code == 200
        seen = len(load.seen)
        wait(lambda: len(load.seen) > seen + 100, "no answers")
    finally:
        load.stop()
    assert load.errors == [] and {(s, v) for _, s, v in load.seen} == {(200, "scene/2")}
    assert server.metric(failures) == 1  # not at every look
    weights.write_bytes(whole)
    tracker.set_alias("scene", "champion", 1)
    body = png(rgb(1))
    wait(lambda: server.post("/predict/scene", body).json()["version"] == "scene/1", server.log)


def test_without_the_registry_it_goes_on(workspace: Workspace, server: Served) -> None:
    other = sqlite3.connect(workspace.state / "mlflow" / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")  # and nobody else can read it
    try:
        wait(lambda: server.metric("ringmo_registry_answers") == 0, server.log)
        assert server.post("/predict/scene", png(rgb(1))).json()["version"] == "scene/1"
        assert server.get("/ready").status_code == 200
        assert "scene/1 goes on" in server.log
    finally:
        other.execute("ROLLBACK")
        other.close()
    wait(lambda: server.metric("ringmo_registry_answers") == 1, server.log)


def test_sigterm_while_busy_lets_nobody_down(server: Served) -> None:
    load = Load(server.port)
    wait(lambda: len(load.seen) > 50, "no answers")
    server.process.send_signal(signal.SIGTERM)
    load._end.set()  # refused connections are no errors from here on
    assert server.process.wait(60) == 0
    load.stop()
    assert load.errors == [] and {status for _, status, _ in load.seen} == {200}
    assert "every request that was let in was answered" in server.log
    with pytest.raises(OSError):
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=5).connect()


def test_what_cannot_be_served_is_said_before_it_listens(
    workspace: Workspace, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringmo.cli import main

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(workspace.root)
    for arguments, says in (
        (["--model", "scene@none"], "no such version"),
        (["--model", "nothing@champion"], "no registered model"),
        (["--root", str(tmp_path / "none")], "no such folder"),
        (["--queue", "0"], "at least 1"),
        (["--port", "65536"], "--port 65536: from 0 to 65535"),
        (["--port", "-1"], "--port -1: from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: no name or address"),
        (["--host", "a..b"], "--host a..b: no name or address"),
        (["--model", "scene/1", "--model", "scene/1"], "twice"),
    ):
        assert main(["serve", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("ringmo: ") == 1


def test_production_is_sampled_by_version(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server and by `ringmo predict`, of small images and of scenes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    where = record.folder(workspace, "scene")
    shutil.rmtree(where, ignore_errors=True)
    config.edit(workspace.params_file, {"monitoring.share": 1.0})
    served = Served(workspace, "--model", "scene/3", "--root", str(workspace.root))
    try:
        for number in range(3):
            assert served.post("/predict/scene", png(rgb(number))).status_code == 200
        scene = workspace.root / "scene.png"
        scene.write_bytes(png(rgb(9, 200, 1100)))
        window = {"col": 8, "row": 0, "width": 64, "height": 48}
        asked = {"image": {"path": "scene.png", "window": window}}
        assert served.post("/predict/scene", asked).status_code == 200
        load = Load(served.port)
        wait(lambda: len(load.seen) > 50, "no answers")
        served.process.send_signal(signal.SIGTERM)
        load._end.set()
        assert served.process.wait(60) == 0
        load.stop()
    finally:
        if served.process.poll() is None:
            served.stop()
    late = len(load.seen)
    small = workspace.root / "small.png"
    small.write_bytes(png(rgb(10)))
    predict(workspace, [str(small), str(scene)], "scene/2", out=workspace.root / "answers")

    rows = pd.concat(pd.read_parquet(part) for part in where.rglob("*.parquet"))
    by = dict(list(rows.groupby("version")))
    assert set(by) == {"scene/2", "scene/3"}
    # As many rows as answers, also of those that were given while it ended.
    assert len(by["scene/3"]) == 4 + late and f"{scene}#8,0,64,48" in set(by["scene/3"]["name"])
    assert set(by["scene/2"]["scene"]) == {str(small), str(scene)}
    assert (by["scene/2"]["scene"] == str(scene)).sum() > 10
    assert all(len(embedding) for embedding in rows["embedding"])
