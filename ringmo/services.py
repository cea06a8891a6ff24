"""The local servers of a workspace: MLflow, Prefect and a worker, on the loopback address.

Each is a process group of its own, recorded in .ringmo/services.json with when it began, so
that `down` ends just those and never a stranger that got the same process number.
"""

import fcntl
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import console
from ringmo.environment import WORKER, quiet_telemetry, shown
from ringmo.errors import BadInput, Unreachable
from ringmo.process_group import born, end_group
from ringmo.stage import write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.config import Config

WORK_POOL = "ringmo"
# Of whoever asks Prefect's server: how a run outlives it, and how it tells that it lives.
PATIENCE = {
    # Seconds between the signs of life by which the server tells a killed flow from a long one
    # (`flows.watch`). Prefect's own is minutes.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # Waits of 2, 4, 8 … seconds: eight minutes without a server, where Prefect's own is one.
    "PREFECT_CLIENT_MAX_RETRIES": "8",
}
# Of the server, which is started again now and then.
SERVER = {
    # Slots that are taken must be known then, else runs that hold one are cancelled when they next
    # ask for it. Prefect's own is its memory.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    # And a run that crashed around that time must be begun again.
    "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.event_order",
}
# With RINGMO_LOG=json: Prefect's console in our words. Its own form has other names.
JSON_LOG = {
    "PREFECT_LOGGING_FORMATTERS_JSON_CLASS": "ringmo.console.JsonFormatter",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json",
    "PREFECT_LOGGING_COLORS": "false",
}
START_LIMIT_S = 600.0  # for a process that lives: a busy machine takes minutes
GRACE_S = 15.0


def up(config: "Config", workspace: Workspace, *, worker: bool = False) -> dict[str, Any]:
    """Start what does not run yet, wait until it answers, and say where it is.

    A server named by MLFLOW_TRACKING_URI or PREFECT_API_URL is used instead of a local one.

    Raises:
        BadInput: a port is in use by another program.
        Unreachable: a server did not come up, or a named one does not answer.
    """
    workspace.state.mkdir(exist_ok=True)
    with (workspace.state / "services.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = _alive(workspace)
        started = []
        for name in ("mlflow", "prefect"):
            if name not in running and not _elsewhere(name):
                port = getattr(config.services, f"{name}_port")
                check_port(name, port)
                started.append(name)
        for name in started:
            running[name] = _start(workspace, name, getattr(config.services, f"{name}_port"))
        write_json(_record(workspace), running)
        if started:
            console.note(f"starting {' and '.join(started)} …")
        try:
            for name in ("mlflow", "prefect"):
                if url := _elsewhere(name):
                    if url.startswith("http"):
                        _check_elsewhere(name, url)
                else:
                    _wait(workspace, name, running[name])
            if worker and "worker" not in running and WORKER.read() != "elsewhere":
                running["worker"] = _start_worker(workspace)
                write_json(_record(workspace), running)
        except BaseException:
            for name in started:
                end_group(running.pop(name)["pid"], GRACE_S)
            write_json(_record(workspace), running)
            raise
    return status(workspace)


def down(workspace: Workspace) -> list[str]:
    """End the services that `up` or `run` started here; returns their names."""
    running = _alive(workspace)
    order: list[str] = [name for name in ("worker", "prefect", "mlflow") if name in running]
    for name in order:
        end_group(running[name]["pid"], GRACE_S)
    _record(workspace).unlink(missing_ok=True)
    return order


def status(workspace: Workspace) -> dict[str, Any]:
    """Name → {url, pid or None, where: local|environment|down}."""
    running = _alive(workspace)
    rows: dict[str, Any] = {}
    for name in ("mlflow", "prefect", "worker"):
        url = shown(_elsewhere(name) or "").removesuffix("/api")
        # Children of `ringmo` are told of the local servers through the environment too.
        if url and url != running.get(name, {}).get("url"):
            rows[name] = {"url": url, "pid": None, "where": "environment"}
        elif name in running:
            rows[name] = {
                "url": running[name]["url"],
                "pid": running[name]["pid"],
                "where": "local",
            }
        else:
            rows[name] = {"url": None, "pid": None, "where": "down"}
    return rows


def status_text(rows: dict[str, Any]) -> str:
    text = console.table(
        [(name, row["where"], row["url"] or "", row["pid"] or "") for name, row in rows.items()],
        ("service", "state", "address", "process"),
    )
    local = any(row["where"] == "local" for row in rows.values())
    return text + ("\nEnd them with: ringmo down" if local else "\nStart them with: ringmo up")


def environment(workspace: Workspace) -> dict[str, str]:
    """Environment in which children find the workspace's servers, and this installation first."""
    names = quiet_telemetry(dict(os.environ))
    names["PREFECT_HOME"] = os.environ.get("PREFECT_HOME", str(workspace.state / "prefect"))
    running = _alive(workspace)
    if "PREFECT_API_URL" not in os.environ and "prefect" in running:
        names["PREFECT_API_URL"] = f"{running['prefect']['url']}/api"
    for name, value in PATIENCE.items():
        names.setdefault(name, value)
    if console.log_is_json():
        names |= JSON_LOG
    names["RINGMO_WORKSPACE"] = str(workspace.root)
    binaries = str(Path(sys.executable).parent)
    if binaries not in names.get("PATH", "").split(os.pathsep)[:1]:
        names["PATH"] = os.pathsep.join([binaries, names.get("PATH", "")])
    return names


def mlflow_store(workspace: Workspace) -> tuple[str, str]:
    """SQLite address and artifact folder of the workspace's own MLflow."""
    folder = workspace.state / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts")


def _record(workspace: Workspace) -> Path:
    return workspace.state / "services.json"


def _elsewhere(name: str) -> str | None:
    """Address of a service that the environment names."""
    variable = {"mlflow": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}.get(name)
    return os.environ.get(variable) if variable else None


def recorded(workspace: Workspace) -> dict[str, Any]:
    """Name → url, pid and more of each service that was started here and not ended by `down`."""
    try:
        found: dict[str, Any] = json.loads(_record(workspace).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def _alive(workspace: Workspace) -> dict[str, Any]:
    """Recorded services whose process still is the one that was started."""
    alive = {}
    for name, entry in recorded(workspace).items():
        now = born(entry["pid"])
        if now is not None and now == entry.get("born"):
            alive[name] = entry
    return alive


def check_port(name: str, port: int) -> None:
    """Whether a service of this workspace may listen there.

    Raises:
        BadInput: another program does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadInput(
                f"port {port} for {name} is in use by another program: end it, or choose another "
                f"with `ringmo run --set services.{name}_port=NUMBER`"
            ) from None


def _start(workspace: Workspace, name: str, port: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}"
    if name == "mlflow":
        database, artifacts = mlflow_store(workspace)
        command = [
            *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", database),
            # Clients write artifacts themselves: with the server down they still can.
            *("--default-artifact-root", artifacts, "--no-serve-artifacts"),
            *(("--uvicorn-opts", _uvicorn_log(workspace)) if console.log_is_json() else ()),
        ]
    else:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return _spawn(workspace, name, command, url)


def _uvicorn_log(workspace: Workspace) -> str:
    """uvicorn's options for a log of JSON objects."""
    handler = {"class": "logging.StreamHandler", "formatter": "json"}
    path = workspace.state / "logs" / "uvicorn.json"
    write_json(
        path,
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": "ringmo.console.JsonFormatter"}},
            "handlers": {"stderr": handler},
            "root": {"handlers": ["stderr"], "level": "INFO"},
            "loggers": {
                name: {"handlers": ["stderr"], "level": "INFO", "propagate": False}
                for name in ("mlflow", "alembic", "uvicorn", "uvicorn.access")
            },
        },
    )
    return f"--log-config {shlex.quote(str(path))}"


def _start_worker(workspace: Workspace) -> dict[str, Any]:
    pool = ["prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
    return _spawn(workspace, "worker", pool, "")


def _spawn(workspace: Workspace, name: str, module: list[str], url: str) -> dict[str, Any]:
    logs = workspace.state / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    env = environment(workspace)
    # The servers are local ones: what the environment says about others is not for them.
    env.pop("MLFLOW_TRACKING_URI", None) if name == "mlflow" else None
    if name == "mlflow":
        # Its job runner is eight processes and 2 GB for features that nothing here uses.
        env.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        if console.log_is_json():
            # uvicorn's settings are for all of its process; MLflow's own would come on top.
            env |= {"MLFLOW_CONFIGURE_LOGGING": "false", "PYTHONWARNINGS": "ignore"}
    if name == "prefect":
        # Its pages would ask port 4200, whatever its own is.
        env.setdefault("PREFECT_SERVER_UI_API_URL", f"{url}/api")
        env.setdefault("PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT", "false")
        env = {**SERVER, **env}
        # Flow runs that ended 90 days ago go by themselves: else its database grows for ever.
        env.setdefault("PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED", "events,flow_runs")
    with (logs / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=workspace.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return {"url": url, "pid": process.pid, "born": born(process.pid)}


def _wait(workspace: Workspace, name: str, entry: dict[str, Any]) -> None:
    path = "/health" if name == "mlflow" else "/api/health"
    limit = time.monotonic() + START_LIMIT_S
    log = workspace.state / "logs" / f"{name}.log"
    while time.monotonic() < limit:
        if _answers(entry["url"] + path):
            return
        if name not in _alive(workspace):
            raise Unreachable(f"{name} ended while starting: see {log}")
        time.sleep(0.5)
    raise Unreachable(f"{name} did not answer within {START_LIMIT_S:.0f} s: see {log}")


def _check_elsewhere(name: str, url: str) -> None:
    path = "/health"
    for _ in range(3):
        if _answers(url.rstrip("/") + path):
            return
        time.sleep(1)
    variable = {"mlflow": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}[name]
    raise Unreachable(
        f"{name} at {shown(url)} does not answer ({variable}): is it up, is the address right?"
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # somebody is there; who may do what is asked later
    except (OSError, ValueError):
        return False
