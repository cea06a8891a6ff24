"""Doctor: each condition that it tells of, really made."""

import http.server
import json
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from servers import S3, free_port

import ringmo
from ringmo import config, doctor, services
from ringmo.cli import main
from ringmo.config import Config
from ringmo.doctor import NOTE, OK, PROBLEM, Finding, Place
from ringmo.workspace import Workspace


def found(check: doctor.Check, place: Workspace | None) -> dict[str, Finding]:
    """What one check finds, by its name; of several of a name the worst."""
    values = Config.load(place.params_file) if place else None
    order = [OK, NOTE, PROBLEM]
    findings = sorted(check(Place(place, values)), key=lambda one: order.index(one.state))
    return {one.check: one for one in findings}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("RINGMO_", "MLFLOW_TRACKING", "PREFECT_API", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_new_workspace_is_well_and_it_takes_seconds(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = {"services.mlflow_port": free_port(), "services.prefect_port": free_port()}
    config.edit(workspace.params_file, ports)
    started = time.process_time()
    assert main(["doctor", "--json", "--workspace", str(workspace.root)]) == 0
    assert time.process_time() - started < 5
    answer = json.loads(capsys.readouterr().out)
    told = {row["check"]: row for row in answer["checks"]}
    assert answer["problems"] == 0
    expected = {"python", "packages", "gpu", "memory", "open files", "disk: workspace", "ports"}
    expected |= {"environment", "telemetry", "dvc.yaml", "params.yaml", "DVC links", "locks"}
    assert expected <= told.keys()
    assert main(["doctor", "--workspace", str(workspace.root)]) == 0
    assert capsys.readouterr().out.endswith("Nothing to mend.\n")
    # It only looks.
    assert {p.name for p in workspace.root.iterdir()} == {
        *("params.yaml", "dvc.yaml", "revisions.yaml", "champion.yaml", ".dvcignore"),
        *(".gitignore", ".dvc", ".ringmo-version"),
    }


def test_outside_a_workspace_the_machine_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    told = {row["check"]: row["state"] for row in json.loads(capsys.readouterr().out)["checks"]}
    assert told["workspace"] == NOTE and "python" in told and "dvc.yaml" not in told
    assert main(["doctor", "--workspace", str(tmp_path)]) == 2


def test_a_key_that_is_wrong_is_a_line_and_the_rest_is_looked_at(workspace: Workspace) -> None:
    text = workspace.params_file.read_text()
    workspace.params_file.write_text(text.replace("keep_runs:", "keep_run:"))
    told = {one.check: one for one in doctor.examine(workspace.root)}
    assert told["params.yaml"].state == PROBLEM and "keep_runs" in told["params.yaml"].found
    assert told["DVC links"].state == OK


def test_what_breaks_or_hangs_is_a_line_and_no_end(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Place) -> Iterator[Finding]:
        yield Finding("first", OK, "")
        raise ZeroDivisionError("by zero")

    def hangs(_: Place) -> Iterator[Finding]:
        time.sleep(60)
        yield Finding("never", OK, "")

    checks = (("breaks", breaks), ("hangs", hangs), ("memory", doctor._memory))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor, "LIMIT_S", 1.0)
    started = time.monotonic()
    told = {one.check: one for one in doctor.examine(workspace.root)}
    assert time.monotonic() - started < 10
    assert told["first"].state == OK and "ZeroDivisionError: by zero" in told["breaks"].found
    assert told["hangs"].state == PROBLEM and "memory" in told


# The machine


def _limited(workspace: Workspace, name: str, kind: int, limit: int) -> dict[str, Any]:
    """What a `ringmo doctor` says that is started under a limit of the system."""
    done = subprocess.run(
        [sys.executable, "-m", "ringmo", "doctor", "--json", "--workspace", str(workspace.root)],
        preexec_fn=lambda: resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1])),
        capture_output=True,
        text=True,
    )
    rows = json.loads(done.stdout)["checks"]
    row: dict[str, Any] = next(row for row in rows if row["check"] == name)
    assert (done.returncode == 1) == any(one["state"] == PROBLEM for one in rows)
    return row


def test_few_open_files(workspace: Workspace) -> None:
    row = _limited(workspace, "open files", resource.RLIMIT_NOFILE, 256)
    assert row["state"] == PROBLEM and "256" in row["found"] and "ulimit -n" in row["todo"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    made = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if made:
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    # Who may mount nothing: the same figures from the system call.
    real = os.statvfs
    with pytest.MonkeyPatch.context() as patch:
        named = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree")

        def statvfs(path: Any) -> Any:
            if Path(path) != folder:
                return real(path)
            values = (4096, 4096, 512, 512, 512, 6000, 5000, 5000, 0, 255)
            assert len(named) < len(values)
            return os.statvfs_result(values)

        patch.setattr(os, "statvfs", statvfs)
        yield folder


def test_a_disk_without_room(small_disk: Path, workspace: Workspace) -> None:
    (row,) = doctor._room("disk: workspace", small_disk, 1e9)
    assert row.state == PROBLEM and "2.1 MB free" in row.found and "ringmo clean" in row.todo
    (row,) = doctor._room("disk", small_disk, 1.5e6)
    assert row.state == NOTE or "more files" in row.found
    (row,) = doctor._shared_memory(Place(None, None), small_disk)
    assert row.state == PROBLEM and "--shm-size" in row.todo


def test_what_a_run_needs_is_told_by_the_last(workspace: Workspace) -> None:
    assert doctor._needed(workspace)[0] == doctor.FRESH_RUN_BYTES
    weights = workspace.work("pretrain") / "encoder" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x" * 1000)
    assert doctor._needed(workspace)[0] == 2 * 1000 + 9 * 1000


def test_a_card_and_no_cuda_in_pytorch(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's own program is the outside world; PyTorch here is real, and has no card."""
    programs = tmp_path / "bin"
    programs.mkdir()
    shown = programs / "nvidia-smi"
    shown.write_text("#!/bin/sh\necho 'Tesla V100-SXM2-16GB, 16384 MiB, 7.0'\n")
    shown.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    told = found(doctor._gpu, workspace)
    assert told["gpu"].state == PROBLEM and "PyTorch cannot use it" in told["gpu"].found
    assert told["bf16"].state == NOTE
    config.edit(workspace.params_file, {"hardware.precision": "bf16"})
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)  # as built for the processor
    told = found(doctor._gpu, workspace)
    assert "built without CUDA" in told["gpu"].found and told["bf16"].state == PROBLEM
    shown.unlink()
    config.edit(workspace.params_file, {"hardware.accelerator": "cuda"})
    monkeypatch.setenv("PATH", str(programs))
    assert found(doctor._gpu, workspace)["gpu"].state == PROBLEM


def test_pytorch_s_cuda_is_read_without_importing_it() -> None:
    ask = (
        "import sys; from ringmo import doctor; print(doctor._torch_cuda(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    import torch

    assert done.stdout.split() == [str(torch.version.cuda), "False"]


def test_other_versions_than_were_tried(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version's files first on the path, as a second installation has them."""
    (tmp_path / "numpy-1.0.dist-info").mkdir()
    (tmp_path / "numpy-1.0.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = found(doctor._packages, workspace)["packages"]
    assert told.state == PROBLEM and "numpy 1.0" in told.found


def test_a_zone_that_is_none_and_one_that_is_another(workspace: Workspace) -> None:
    config.edit(workspace.params_file, {"schedule.timezone": "Mars/Olympus"})
    assert found(doctor._time_zone, workspace)["time zone"].state == PROBLEM
    config.edit(workspace.params_file, {"schedule.timezone": "Pacific/Kiritimati"})
    assert found(doctor._time_zone, workspace)["time zone"].state == NOTE


# The environment


@pytest.mark.parametrize(
    ("name", "value", "state", "said"),
    [
        ("MLFLOW_TRACKING_URl", "http://mlflow:5000", PROBLEM, "is MLFLOW_TRACKING_URI meant?"),
        ("MLFLOW_TRAKCING_URI", "http://mlflow:5000", PROBLEM, "is MLFLOW_TRACKING_URI meant?"),
        ("mlflow_tracking_uri", "http://mlflow:5000", PROBLEM, "is MLFLOW_TRACKING_URI meant?"),
        ("RINGMO_WORKSPAC", "/data", PROBLEM, "is RINGMO_WORKSPACE meant?"),
        ("RINGMO_COLOUR", "red", NOTE, "RINGMO_WORKSPACE"),
        ("MLFLOW_TRACKING_URI", "mlflow:5000", PROBLEM, "http://mlflow:5000"),
        ("PREFECT_API_URL", "http://prefect:4200", PROBLEM, "http://prefect:4200/api"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon", PROBLEM, ""),
        ("MLFLOW_TRACKING_TOKEN", "t", OK, ""),
    ],
)
def test_variables_that_look_mistyped(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    state: str,
    said: str,
) -> None:
    monkeypatch.setenv(name, value)
    told = found(doctor._variables, workspace)["environment"]
    assert told.state == state and said in told.todo


def test_telemetry_that_somebody_turned_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    told = found(doctor._telemetry, workspace)["telemetry"]
    assert told.state == NOTE and "MLFLOW_DISABLE_TELEMETRY=false" in told.found


def test_secrets_that_others_may_read(workspace: Workspace) -> None:
    env = workspace.root / ".env"
    env.write_text("POSTGRES_PASSWORD=x\n")
    env.chmod(0o644)
    told = found(doctor._secrets, workspace)["secrets"]
    assert told.state == PROBLEM and told.todo == f"chmod 600 {env}"
    subprocess.run(told.todo.split(), check=True)
    assert found(doctor._secrets, workspace)["secrets"].state == OK
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    with (workspace.root / ".dvc" / "config").open("a") as file:
        file.write("    secret_access_key = s\n")
    assert "holds one" in found(doctor._secrets, workspace)["secrets"].found


# Servers


class Named(http.server.BaseHTTPRequestHandler):
    """A server as MLflow and Prefect look to a client; what it is asked decides the test."""

    shift = timedelta()
    release = "9.9.9"
    login: str | None = None

    def do_GET(self) -> None:
        health = self.path.endswith("/health")
        refused = self.login is not None and not health
        if self.login is not None and self.headers.get("Authorization") == self.login:
            refused = False
        body = json.dumps(self.release).encode() if self.path.endswith("/version") else b"{}"
        self.send_response_only(401 if refused else 200)
        self.send_header("Date", format_datetime(datetime.now(UTC) + self.shift, usegmt=True))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def named() -> Iterator[Callable[..., str]]:
    """`named(shift=…, release=…, login=…)` is the address of a server like that."""
    running: list[http.server.ThreadingHTTPServer] = []

    def serve(**how: Any) -> str:
        kind = type("Kind", (Named,), how)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_clock_that_is_apart(
    workspace: Workspace, named: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, state in ((-3600, PROBLEM), (3600, PROBLEM), (10, NOTE)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named(shift=timedelta(seconds=seconds)))
        clock = found(doctor._servers, workspace)["MLflow: clock"]
        assert clock.state == state, seconds
        told = re.search(r"is (\d+) s (behind|ahead)", clock.found)
        assert told and abs(int(told[1]) - abs(seconds)) <= 2
        assert told[2] == ("behind" if seconds < 0 else "ahead")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named())
    assert "MLflow: clock" not in found(doctor._servers, workspace)


def test_a_server_of_another_version(
    workspace: Workspace, named: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = doctor._version("mlflow")
    assert here is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named(release="9.9.9"))
    told = found(doctor._servers, workspace)["MLflow"]
    assert told.state == PROBLEM and "9.9.9" in told.found and here in told.found
    major = here.split(".")[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named(release=f"{major}.0.1"))
    assert found(doctor._servers, workspace)["MLflow"].state == NOTE
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named(release=here))
    assert found(doctor._servers, workspace)["MLflow"].state == OK


def test_nobody_answers(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    told = found(doctor._servers, workspace)
    assert [told[name].state for name in ("MLflow", "Prefect", "S3")] == [PROBLEM] * 3
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:secret@127.0.0.1:9/m")
    row = found(doctor._servers, workspace)["MLflow"]
    assert row.state == PROBLEM and "secret" not in row.found + row.todo


@pytest.fixture(scope="module")
def locked_prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server that wants a login."""
    port, home = free_port(), tmp_path_factory.mktemp("prefect")
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    environment["PREFECT_SERVER_API_AUTH_STRING"] = "ada:lovelace"
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}/api"
        limit = time.monotonic() + 240
        while doctor._asked(f"{url}/health", "ada:lovelace")[0] != 200:
            assert server.poll() is None and time.monotonic() < limit
            time.sleep(0.5)
        yield url
    finally:
        from ringmo.process_group import end_group

        end_group(server.pid, 10)


@pytest.mark.slow
def test_a_login_that_a_real_server_refuses(
    workspace: Workspace, locked_prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", locked_prefect)
    told = found(doctor._servers, workspace)["Prefect"]
    assert told.state == PROBLEM and "wants a login" in told.found
    assert told.todo == "set PREFECT_API_AUTH_STRING"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ada:byron")
    told = found(doctor._servers, workspace)["Prefect"]
    assert told.state == PROBLEM and "refused (401)" in told.found
    assert "byron" not in told.found + told.todo
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ada:lovelace")
    told = found(doctor._servers, workspace)["Prefect"]
    assert told.state == OK and str(doctor._version("prefect")) in told.found


def test_mlflow_s_login(
    workspace: Workspace, named: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = doctor._version("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named(login="Basic YTpi", release=here))
    told = found(doctor._servers, workspace)["MLflow"]
    assert told.state == PROBLEM and "MLFLOW_TRACKING_USERNAME" in told.todo
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "a")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "b")
    assert found(doctor._servers, workspace)["MLflow"].state == OK


def test_buckets_that_can_and_cannot_be_had(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = S3(tmp_path / "s3")

    def asked(url: str) -> Finding:
        remote = {"versioning.remote": url, "versioning.endpoint": f"http://127.0.0.1:{s3.port}"}
        config.edit(workspace.params_file, remote)
        return found(doctor._buckets, workspace)["S3"]

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    row = asked("s3://bucket/tiles")
    assert row.state == PROBLEM, "nobody listens yet"
    s3.start()
    try:
        row = asked("s3://bucket/tiles")
        assert row.state == OK and "read and written" in row.found
        assert not [p for p in (tmp_path / "s3").rglob("*") if p.is_file()], "it left something"
        row = asked("s3://nowhere/tiles")
        assert row.state == PROBLEM and "no such bucket" in row.found
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        row = asked("s3://bucket/tiles")
        assert row.state == PROBLEM and "AWS_SECRET_ACCESS_KEY" in row.found
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        s3.stop()
        s3.start("--read-only")
        assert asked("s3://bucket/tiles").state == PROBLEM, "it takes nothing"
    finally:
        s3.stop()


# The workspace


def test_a_port_that_another_program_has(workspace: Workspace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.edit(workspace.params_file, {"services.mlflow_port": port})
        told = found(doctor._ports, workspace)["ports"]
    assert told.state == PROBLEM and str(port) in told.found
    assert "--set services.mlflow_port" in told.todo


def test_a_service_that_died_and_one_that_does_not_answer(workspace: Workspace) -> None:
    workspace.state.mkdir()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    import psutil

    url = f"http://127.0.0.1:{free_port()}"
    started = psutil.Process(child.pid).create_time()
    entry = {"url": url, "pid": child.pid, "started": started}
    record = workspace.state / "services.json"
    try:
        record.write_text(json.dumps({"prefect": entry}))
        if "prefect" not in services._alive(workspace):  # another way to tell a process
            from ringmo.process_group import born

            entry = entry | {"born": born(child.pid)}
            record.write_text(json.dumps({"prefect": entry}))
        told = found(doctor._own_services, workspace)["services"]
        assert told.state == PROBLEM and "does not answer" in told.found
    finally:
        child.kill()
        child.wait()
    told = found(doctor._own_services, workspace)["services"]
    assert told.state == PROBLEM and "ended by itself" in told.found and told.todo == "ringmo up"


def test_a_workspace_of_another_version(workspace: Workspace) -> None:
    assert found(doctor._made_by, workspace)["made by"].state == OK
    (workspace.root / ".ringmo-version").write_text("0.0.1\n")
    told = found(doctor._made_by, workspace)["made by"]
    assert told.state == NOTE and "0.0.1" in told.found and ringmo.__version__ in told.found
    # What people are told to type must work as they type it: in a shell.
    subprocess.run(told.todo.partition("then: ")[2], shell=True, cwd=workspace.root, check=True)
    assert found(doctor._made_by, workspace)["made by"].state == OK


def test_a_graph_and_parameters_that_drifted(workspace: Workspace) -> None:
    graph = workspace.root / "dvc.yaml"
    text = graph.read_text()
    graph.write_text(text.replace("cmd: ringmo select", "cmd: ringmo choose"))
    told = found(doctor._graph, workspace)["dvc.yaml"]
    assert told.state == PROBLEM and "select" in told.found
    subprocess.run(told.todo.partition(": ")[2].split(), check=True)
    assert found(doctor._graph, workspace)["dvc.yaml"].state == OK
    graph.write_text(f"{text}\n  own:\n    cmd: echo\n")
    assert found(doctor._graph, workspace)["dvc.yaml"].state == NOTE
    (workspace.root / "revisions.yaml").write_text("pretrain: 1\n")
    assert "pretrain" in found(doctor._graph, workspace)["revisions"].found
    params = workspace.params_file.read_text()
    start = params.index("monitoring:")
    workspace.params_file.write_text(params[:start] + params[params.index("clean:", start) :])
    told = found(doctor._parameters, workspace)["params.yaml"]
    assert told.state == NOTE and "monitoring.cron" in told.found


def test_store_and_cache_on_two_disks(workspace: Workspace, tmp_path: Path) -> None:
    assert found(doctor._links, workspace)["DVC links"].state == OK
    far = Path("/dev/shm") / f"ringmo-{os.getpid()}"
    far.mkdir()
    try:
        settings = workspace.root / ".dvc" / "config"
        settings.write_text(settings.read_text().replace("[cache]", f"[cache]\n    dir = {far}"))
        told = found(doctor._links, workspace)["DVC links"]
        assert told.state == NOTE and "twice" in told.todo
        assert not list(far.rglob("*.doctor*"))
    finally:
        shutil.rmtree(far)


def test_locks_of_the_dead_and_of_the_living(workspace: Workspace) -> None:
    assert found(doctor._locks, workspace)["locks"].state == OK
    dead = subprocess.Popen(["true"])
    dead.wait()
    tmp = workspace.root / ".dvc" / "tmp"
    tmp.mkdir(exist_ok=True)
    entry = {"pid": dead.pid, "cmd": "dvc repro"}
    (tmp / "rwlock").write_text(json.dumps({"write": {"work/x": entry}, "read": {}}))
    told = found(doctor._locks, workspace)["locks"]
    assert told.state == NOTE and "which is gone" in told.found
    living = {"pid": os.getppid(), "cmd": "dvc repro"}
    (tmp / "rwlock").write_text(json.dumps({"write": {}, "read": {"work/x": [living]}}))
    assert "at work" in found(doctor._locks, workspace)["locks"].found
    (tmp / "rwlock").write_text("{")
    told = {one.check: one for one in doctor.examine(workspace.root)}
    assert told["locks"].state == PROBLEM and "rwlock is damaged" in told["locks"].found


@pytest.mark.slow
def test_a_promotion_that_is_half_done(workspace: Workspace, monkeypatch: Any) -> None:
    from registered import register_three

    from ringmo.registry import promotion
    from ringmo.registry.tracker import Glance, Tracker

    register_three(workspace)
    promotion.promote(workspace, "scene", 1, by="ada", reason="first")
    assert found(doctor._promotions, workspace)["promotions"].state == OK

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Tracker, "set_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            promotion.promote(workspace, "scene", 2, by="ada", reason="second", force=True)
    told = found(doctor._promotions, workspace)["promotions"]
    assert told.state == PROBLEM and "promote of scene/2 is half done" in told.found
    promotion.settle(workspace, "scene")
    assert found(doctor._promotions, workspace)["promotions"].state == OK
    # What is told in a moment is what MLflow tells.
    tracker = Tracker(workspace)
    aliased = {(row["model"], row["version"], row["alias"]) for row in Glance(workspace).aliased()}
    assert aliased == {
        ("scene", version.version, alias)
        for version in tracker.versions("scene")
        for alias in version.aliases
    }
