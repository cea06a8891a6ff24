"""The servers of a team as plain processes, each of which can be killed, paused and begun again.

PostgreSQL with a database each for MLflow and Prefect, an S3 server for artifacts and DVC's remote,
MLflow, Prefect's server and a worker.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from false_clock import FalseClock
from servers import S3, MLflow, Postgres, free_port, wait_until

from ringmo.environment import quiet_telemetry
from ringmo.services import PATIENCE, SERVER, WORK_POOL

LIMIT_S = 300


class Rig:
    """Everything that a chain needs but its workspace.

    folder: logs and what the servers keep. false_clock: the worker, and all it starts, can be told
    a wrong time by its `clock`; needs a C compiler.
    """

    def __init__(self, folder: Path, false_clock: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.clock = FalseClock(folder) if false_clock else None
        self.postgres, self.s3 = Postgres(), S3(folder / "s3")
        self.port = free_port()
        self.prefect_url = f"http://127.0.0.1:{self.port}/api"
        self._groups: dict[str, int] = {}  # what this class started itself: name → its group
        self.mlflow: MLflow

    def start(self) -> None:
        self.postgres.start()
        self.s3.start()
        self.databases = [self.postgres.database() for _ in range(2)]
        database = self.postgres.uri(self.databases[0])
        self.mlflow = MLflow(
            database, "s3://bucket/mlflow", kept=True, environment=self.s3.environment
        )
        self._start_prefect()  # side by side: both make their tables
        self.mlflow.start()
        self._answers()
        self._api("POST", "work_pools/", {"name": WORK_POOL, "type": "process"})
        self._start_worker()

    def stop(self) -> None:
        for name in ("worker", "prefect"):
            self._kill_group(name)
        if hasattr(self, "mlflow"):
            self.mlflow.stop()
        self.s3.stop()
        self.postgres.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever works with these servers: the worker, the command line."""
        root = Path(__file__).parents[2]
        return {
            **quiet_telemetry(os.environ),
            **PATIENCE,
            **self.s3.environment,
            "MLFLOW_TRACKING_URI": self.mlflow.url,
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PYTHONPATH": str(root),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            # The same weights in every run of one machine, and faster for models this small.
            "OMP_NUM_THREADS": "1",
        }

    def forget_models(self) -> None:
        """MLflow begins with an empty database: the same bytes are no version that it knows."""
        self.mlflow.stop()
        self.databases[0] = self.postgres.database()
        self.mlflow.database = self.postgres.uri(self.databases[0])
        self.mlflow.start()

    # Faults

    def processes(self, service: str) -> list[psutil.Process]:
        """The living processes of a service."""
        if service in self._groups:
            leader = self._groups[service]
        else:
            server: Any = getattr(self, service)
            leader = server.process.pid
        try:
            first = psutil.Process(leader)
        except psutil.NoSuchProcess:
            return []
        # A worker's flows have groups of their own, and are no part of it.
        mine = [one for one in first.children(recursive=True) if service != "worker"]
        return [first, *mine]

    def kill(self, service: str) -> None:
        """SIGKILL to all its processes."""
        processes = self.processes(service)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def begin_again(self, service: str) -> None:
        """As a supervisor does."""
        if service == "prefect":
            self._start_prefect()
            self._answers()
        elif service == "worker":
            self._start_worker()
        else:
            getattr(self, service).start()

    def signal(self, service: str, number: int) -> None:
        for process in self.processes(service):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    # What Prefect's server says

    def api(self, path: str, body: Any = None) -> Any:
        return self._api("POST" if body is not None else "GET", path, body)

    def _api(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.prefect_url}/{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        limit = time.monotonic() + LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.load(answer)
            except OSError:  # it was just killed
                if time.monotonic() > limit:
                    raise
            time.sleep(0.5)

    # Processes

    def _start(self, name: str, module: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._groups[name] = process.pid

    def _start_prefect(self) -> None:
        database = f"postgresql+asyncpg://ringmo@127.0.0.1:{self.postgres.port}"
        self._start(
            "prefect",
            ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
            quiet_telemetry(os.environ)
            | {
                "PREFECT_HOME": str(self.folder / "prefect"),
                "PREFECT_API_DATABASE_CONNECTION_URL": f"{database}/{self.databases[1]}",
                **SERVER,
            },
        )

    def _start_worker(self) -> None:
        false = self.clock.environment if self.clock else {}
        self._start(
            "worker",
            ["prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"],
            self.environment | false,
        )

    def _answers(self) -> None:
        wait_until(lambda: _healthy(f"{self.prefect_url}/health"), "Prefect's server")

    def _kill_group(self, name: str) -> None:
        if name in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._groups[name], signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
