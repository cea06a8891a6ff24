"""The services of docker-compose.yml as plain processes: its commands, its environment, its order.

    with Composed(tmp_path) as servers:
        servers.start("worker")                 # and, before it, all that it depends on
        servers.run("ringmo", "run", "--json")  # as in the worker's container
        servers.pause("mlflow"); servers.go_on("mlflow")
        servers.kill("postgres"); servers.start("postgres")

What an image or Docker itself does, and a process has not, is done here: a port of its own in place
of each container's, folders in place of volumes, PostgreSQL's first start. What is kept in the file
and nowhere else (who waits for whom, what is healthy, every variable and argument) is read from it.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from servers import free_port, postgres_programs

from ringmo import compose_env

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
# Where each service listens inside its container, and by what other names it is called there.
PORTS = {
    "postgres": [5432],
    "s3": [8333, 9333, 8081, 8888],
    "mlflow": [5000],
    "prefect": [4200],
    "worker": [8080],
    "server": [8000],
}
SPACE = {"buckets": "s3", "worker-gpu": "worker"}  # service → whose loopback address it shares
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::?([?-])([^}]*))?\}")
NOT_OURS = ("MLFLOW_", "PREFECT_", "AWS_", "PG", "RINGMO_", "POSTGRES_")
POSTGRES_DATA = "/var/lib/postgresql/data"


def load(env: Mapping[str, str]) -> dict[str, Any]:
    """docker-compose.yml, with its variables filled in as `docker compose` does."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return VARIABLE.sub(one, value) if isinstance(value, str) else value

    def one(match: re.Match[str]) -> str:
        if match.group() == "$$":
            return "$"
        name, how, rest = match.groups()
        if env.get(name):
            return env[name]
        assert how != "?", f"{name}: {rest}"
        return rest or ""

    found: dict[str, Any] = filled(YAML(typ="safe", pure=True).load(COMPOSE))
    return found


def read_env(path: Path) -> dict[str, str]:
    """A `.env` file of plain NAME=VALUE lines."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


class Composed:
    """The services, none of them started; `folder` keeps their data, logs and the workspace."""

    def __init__(self, folder: Path, profile: str = "cpu") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(COMPOSE, folder / COMPOSE.name)
        self.env = read_env(compose_env.write(folder))
        self.file = load(self.env)
        self.services: dict[str, dict[str, Any]] = {
            name: service
            for name, service in self.file["services"].items()
            if profile in service.get("profiles", [profile]) or "tools" in service["profiles"]
        }
        self.ports = {
            name: {inside: _free_port() for inside in inside_ports}
            for name, inside_ports in PORTS.items()
        }
        # PostgreSQL refuses root, and nobody may look into pytest's folders.
        self.database = Path(tempfile.mkdtemp(prefix="ringmo-composed-"))
        self.user = "nobody" if os.getuid() == 0 else None
        if self.user:
            account = pwd.getpwnam(self.user)
            os.chown(self.database, account.pw_uid, account.pw_gid)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.done: set[str] = set()

    def __enter__(self) -> "Composed":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def workspace(self) -> Path:
        """The folder that is /workspace inside."""
        return self.folder / "workspace"

    def url(self, service: str, inside: int | None = None) -> str:
        """Address of a service from here."""
        return f"http://127.0.0.1:{self.ports[service][inside or PORTS[service][0]]}"

    def log(self, service: str) -> str:
        return (self.folder / "logs" / f"{service}.log").read_text(errors="replace")

    def start(self, *services: str) -> None:
        """Start services after what they depend on, each when that is as the file wants it."""
        for name in services:
            for other, how in self.services[name].get("depends_on", {}).items():
                self.start(other)
                if how["condition"] == "service_healthy":
                    self.wait(other)
                elif how["condition"] == "service_completed_successfully":
                    self._complete(other)
            if name in self.done or self.alive(name):
                continue
            if name == "postgres":
                self._first_start()
            self.processes[name] = self._spawn(name, self._command(name), self.environment(name))

    def wait(self, service: str, limit_s: float = 300) -> None:
        """Until its own health check passes."""
        limit = time.monotonic() + limit_s
        while not self.healthy(service):
            assert self.alive(service), f"{service} ended: {self.log(service)[-3000:]}"
            assert time.monotonic() < limit, (
                f"{service} is not healthy: {self.log(service)[-3000:]}"
            )
            time.sleep(0.5)

    def healthy(self, service: str) -> bool:
        """Whether its health check passes now."""
        _, *test = self._placed(service, self.services[service]["healthcheck"]["test"])
        try:
            checked = subprocess.run(
                self._program(test),
                env=self.environment(service),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=30,
            )
        except subprocess.TimeoutExpired:
            return False
        return checked.returncode == 0

    def alive(self, service: str) -> bool:
        process = self.processes.get(service)
        return process is not None and process.poll() is None

    def pause(self, service: str) -> None:
        """As `docker compose pause`."""
        os.killpg(self.processes[service].pid, signal.SIGSTOP)

    def go_on(self, service: str) -> None:
        os.killpg(self.processes[service].pid, signal.SIGCONT)

    def kill(self, service: str) -> None:
        """SIGKILL for all its processes; `start` starts it again, as `restart:` would."""
        self._end(service, signal.SIGKILL, 30)

    def stop(self, *services: str) -> None:
        """SIGTERM, and SIGKILL after a while; without a name for all, and their data go."""
        for name in services or list(self.processes)[::-1]:
            # As its image does: by SIGTERM it would wait for whoever is connected.
            how = signal.SIGINT if name == "postgres" else signal.SIGTERM
            self._end(name, how, 20)
        if not services:
            shutil.rmtree(self.database, ignore_errors=True)

    def run(
        self,
        *command: str,
        service: str = "worker",
        timeout: float = 600,
        more: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command beside a service, as `docker compose exec` or `run --rm` runs it; `more`: what
        its image has beside the file's variables."""
        return subprocess.run(
            self._program(self._placed(service, list(command))),
            env=self.environment(service) | dict(more or {}),
            cwd=self._folder(service),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def environment(self, service: str) -> dict[str, str]:
        """What the file says, beside what a process needs here; nothing of this test's own."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(NOT_OURS)}
        binaries = [str(Path(sys.executable).parent)]
        if service == "postgres":
            binaries.append(str(postgres_programs()))
        own["PATH"] = os.pathsep.join([*binaries, own.get("PATH", os.defpath)])
        own["PYTHONPATH"] = os.pathsep.join([str(ROOT), *own.get("PYTHONPATH", "").split(":")])
        own["DVC_SITE_CACHE_DIR"] = str(self.folder / "dvc-site")
        said = self.services[service].get("environment", {})
        placed = {key: self._placed(service, str(value)) for key, value in said.items()}
        if "PGHOST" in placed:
            placed["PGHOST"], placed["PGPORT"] = "127.0.0.1", str(self.ports["postgres"][5432])
        if "PREFECT_WORKER_WEBSERVER_PORT" in placed:
            placed["PREFECT_WORKER_WEBSERVER_PORT"] = str(self.ports["worker"][8080])
        return own | placed

    def client(self, user: str = "admin", password: str | None = None) -> dict[str, str]:
        """What somebody at this machine sets to work with the servers, in an account's name."""
        secret = password or self.env[f"MLFLOW_{user.upper()}_PASSWORD"]
        return {
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": secret,
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_API_AUTH_STRING": self.env["PREFECT_AUTH_STRING"],
        }

    # What Docker does

    def _command(self, service: str) -> list[str]:
        said = self.services[service]
        command = [*said.get("entrypoint", []), *said.get("command", [])]
        if service == "postgres":
            # No socket: a folder for one is not everybody's to write in.
            command = ["postgres", "-D", POSTGRES_DATA, "-p", "5432"]
            command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        return self._program(self._placed(service, command))

    def _program(self, command: list[str]) -> list[str]:
        """The program as it is called here."""
        first, *rest = command
        if first in ("mlflow", "prefect", "ringmo"):
            return [sys.executable, "-m", first, *rest]
        if first == "python":
            return [sys.executable, *rest]
        return command

    def _placed(self, service: str, value: Any) -> Any:
        """A value of the file with this machine's addresses and folders in place of Docker's."""
        if isinstance(value, list):
            return [self._placed(service, one) for one in value]
        text = str(value)
        for name, ports in self.ports.items():
            for inside, here in ports.items():
                text = re.sub(rf"\b{name}:{inside}\b", f"127.0.0.1:{here}", text)
        ours = self.ports.get(SPACE.get(service, service), {})
        for inside, here in ours.items():
            text = re.sub(rf"\b127\.0\.0\.1:{inside}\b", f"127.0.0.1:{here}", text)
            text = re.sub(rf"(?<=port=){inside}\b", str(here), text)
            text = str(here) if text == str(inside) else text
        text = text.replace("0.0.0.0", "127.0.0.1")
        for inside_path, here_path in self._volumes(service):
            text = re.sub(rf"(?<![\w./-]){inside_path}(?![\w.-])", str(here_path), text)
        return text

    def _volumes(self, service: str) -> list[tuple[str, Path]]:
        found = []
        for volume in self.services[service].get("volumes", []):
            source, inside, *_ = volume.split(":")
            if source == "postgres":
                place = self.database / "data"
            elif source.startswith("./deploy/"):
                place = ROOT / source
            else:
                place = self.folder / Path(source).name
                place.mkdir(exist_ok=True)
            found.append((inside, place))
        return sorted(found, key=lambda one: -len(one[0]))

    def _folder(self, service: str) -> Path:
        folder = Path(self._placed(service, self.services[service].get("working_dir", "/")))
        return folder if folder.is_dir() else self.folder

    def _spawn(
        self, service: str, command: list[str], env: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "logs" / f"{service}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                env=env,
                cwd=self.database if service == "postgres" else self._folder(service),
                user=self.user if service == "postgres" else None,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _complete(self, service: str) -> None:
        if service in self.done:
            return
        code = self.processes[service].wait(300)
        assert code == 0, f"{service} ended with {code}: {self.log(service)[-3000:]}"
        self.done.add(service)

    def _end(self, service: str, how: signal.Signals, limit_s: float) -> None:

        process = self.processes.pop(service, None)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, how)
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            for child in children:  # a session of their own: what a worker or DVC started
                with contextlib.suppress(ProcessLookupError, psutil.Error):
                    child.kill()
            psutil.wait_procs(children, timeout=10)
        process.wait(30)

    def _first_start(self) -> None:
        """What postgres's image does with an empty volume: initdb, and its scripts."""
        data = self.database / "data"
        if data.exists():
            return
        programs, env = postgres_programs(), self.environment("postgres")
        secret = self.database / "superuser"
        secret.write_text(env["POSTGRES_PASSWORD"])
        how: dict[str, Any] = {"user": self.user, "cwd": self.database, "check": True}
        how |= {"env": env | {"LC_ALL": "C", "PGPASSWORD": env["POSTGRES_PASSWORD"]}}
        quiet = {"stdout": subprocess.DEVNULL}
        if self.user:
            os.chown(secret, pwd.getpwnam(self.user).pw_uid, -1)
        command = [programs / "initdb", "-D", data, "-U", "postgres", "-E", "UTF8", "--no-sync"]
        command += [f"--pwfile={secret}", *env["POSTGRES_INITDB_ARGS"].split()]
        subprocess.run(command, **how, **quiet)
        secret.unlink()
        process = self._spawn("postgres", self._command("postgres"), env)
        self.processes["postgres"] = process
        self.wait("postgres", 60)
        where = ["-h", "127.0.0.1", "-p", str(self.ports["postgres"][5432]), "-U", "postgres"]
        script = (ROOT / "deploy" / "databases.sql").read_bytes()
        ask = [programs / "psql", "-v", "ON_ERROR_STOP=1", "--no-psqlrc", *where, "-d", "postgres"]
        subprocess.run(ask, input=script, **how, **quiet)
        self.stop("postgres")


def _free_port() -> int:
    """One that is free, and so is the one 10,000 above it, where SeaweedFS's programs talk."""
    while True:
        port = free_port()
        with socket.socket() as above, contextlib.suppress(OSError):
            above.bind(("127.0.0.1", port + 10_000))
            return port
