"""What is told to programs: logs as objects, in children and servers too; spans only when asked."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagery import write_class_folders
from servers import free_port

from ringmo import config, console, process_group, services
from ringmo.config import Config
from ringmo.workspace import Workspace


def objects(text: str) -> list[dict[str, Any]]:
    """Every line as the object that it must be."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "process", "message"} <= one.keys() for one in found), text
    return found


def ringmo(workspace: Workspace, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringmo", *arguments, "--workspace", str(workspace.root)],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def test_every_line_of_a_stage_and_its_processes_is_an_object(
    workspace: Workspace, tmp_path: Path
) -> None:
    """An ingest with Dask's processes and a bad file, and a validation that DVC starts."""
    folder = write_class_folders(tmp_path / "in", 8)
    (folder / "town" / "empty.jpg").write_bytes(b"")
    config.edit(workspace.params_file, {"ingest.sources": [str(folder)], "ingest.workers": 2})
    done = ringmo(workspace, "--log", "json", "ingest", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["tiles"] == 32
    objects(done.stderr)

    follow = (
        "import os, sys; from pathlib import Path; from ringmo.data import versions\n"
        "from ringmo.process_group import run_group; from ringmo.workspace import Workspace\n"
        "place = Workspace(Path(sys.argv[1]))\n"
        "command = versions.repro_command(place, 'validate')\n"
        "sys.exit(run_group(command, place.root, dict(os.environ), 5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", follow, str(workspace.root)],
        env=os.environ | {"RINGMO_LOG": "json"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [one["message"] for one in objects(done.stderr)]
    assert any("Running stage 'validate'" in line for line in said), "DVC's own lines too"


def test_errors_are_objects_with_their_exit_code(workspace: Workspace) -> None:
    done = ringmo(workspace, "run", "--data", "/nowhere", RINGMO_LOG="json")
    (said,) = objects(done.stderr)
    assert (done.returncode, said["level"], said["exit_code"]) == (2, "error", 2)
    assert "no such folder" in said["message"]
    # Without it, a line for people as ever.
    done = ringmo(workspace, "run", "--data", "/nowhere")
    assert done.stderr.startswith("ringmo: /nowhere: no such folder")


def test_what_nobody_catches_and_libraries_say_is_an_object() -> None:
    broken = (
        "import logging, warnings; from ringmo import console; console.speak_json()\n"
        "logging.getLogger('library').warning('odd %d', 7); warnings.warn('old')\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.exception('caught')\n"
        "raise LookupError('lost')"
    )
    done = subprocess.run(
        [sys.executable, "-c", broken],
        env=os.environ | {"RINGMO_LOG": "json"},
        capture_output=True,
        text=True,
    )
    odd, old, caught, lost = objects(done.stderr)
    assert (odd["message"], odd["level"], odd["logger"]) == ("odd 7", "warning", "library")
    assert "old" in old["message"]
    assert "ZeroDivisionError" in caught["traceback"]
    assert lost["level"] == "critical" and "LookupError: lost" in lost["traceback"]


def test_progress_has_figures_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGMO_LOG", "json")
    with console.Progress("tiles", 10, every_s=0) as bar:
        bar.to(4, "half of them")
    (said,) = objects(capsys.readouterr().err)
    assert (said["step"], said["done"], said["total"]) == ("tiles", 4, 10)


def test_a_child_s_text_becomes_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGMO_LOG", "json")
    script = 'echo plain; echo; echo \'{"message": "own"}\' >&2; echo 17'
    process_group.run_group(["sh", "-c", script], tmp_path, dict(os.environ), 5)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert sorted(str(line["message"]) for line in lines) == ["17", "own", "plain"]


# OpenTelemetry


class Collector:
    """An OTLP collector as far as a test needs one: it notes what is posted to it."""

    def __init__(self) -> None:
        got: list[tuple[str, bytes]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.got = got
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


FLOW = """
import os, sys
from pathlib import Path
from ringmo import services
from ringmo.workspace import Workspace

place = Workspace(Path(sys.argv[1]))
os.environ.update(services.environment(place))
from flows.drift import ringmo_drift
assert ringmo_drift(str(place.root), return_state=True).name == "nothing to compare"
"""


@pytest.mark.slow
def test_spans_are_sent_when_asked_for_and_flows_speak_in_objects(
    workspace: Workspace, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server for two promises: nothing is sent by itself, and Prefect's lines are objects."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.root}/mlflow.db")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("RINGMO_LOG", "json")
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)  # a command of an earlier test
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setattr(services, "START_LIMIT_S", 600.0)
    config.edit(workspace.params_file, {"services.prefect_port": free_port()})
    services.up(Config.load(workspace.params_file), workspace)
    try:
        assert "OTEL_SDK_DISABLED" not in os.environ

        def run(*before: str, **env: str) -> None:
            command = [*before, sys.executable, "-c", FLOW, str(workspace.root)]
            done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            said = objects(done.stderr)
            assert any(one.get("logger") == "prefect.flow_runs" for one in said)

        run()
        time.sleep(1)
        assert collector.got == [], "off is the default, wherever the address points"
        instrument = str(Path(sys.executable).with_name("opentelemetry-instrument"))
        run(instrument, OTEL_SDK_DISABLED="false", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
        traces = [body for path, body in collector.got if path == "/v1/traces"]
        assert any(b"nothing to compare" in body for body in traces), collector.got
        # Of parameters their types alone.
        assert not any(str(workspace.root).encode() in body for body in traces)
    finally:
        services.down(workspace)


@pytest.mark.slow
@pytest.mark.long
def test_mlflow_s_log_is_objects(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "none")  # nobody asks it
    monkeypatch.setattr(services, "START_LIMIT_S", 600.0)
    monkeypatch.setenv("RINGMO_LOG", "json")
    config.edit(workspace.params_file, {"services.mlflow_port": free_port()})
    services.up(Config.load(workspace.params_file), workspace)
    services.down(workspace)
    lines = (workspace.state / "logs" / "mlflow.log").read_text().splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert any(one["logger"].startswith("uvicorn") for one in told)
    plain = [line for line in lines if line.strip() and not line.startswith("{")]
    assert len(plain) < 5, plain  # what it says before its log is set up
