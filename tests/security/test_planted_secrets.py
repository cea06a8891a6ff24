"""Every secret that the platform is given, planted: none may be found again where it worked.

One real chain on servers that want passwords (MLflow, Prefect, S3), with everything that comes
after it, and runs that are refused; then each file that came to be is searched, all that was
printed, and the command lines of all processes while it ran.
"""

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import boto3
import psutil
import pytest
from imagery import write_class_folders
from prefect_api import ask
from served import Served
from servers import S3, MLflow, free_port
from tiny import TINY

from ringmo import config
from ringmo.environment import VARIABLES
from ringmo.workspace import init

pytestmark = pytest.mark.slow

# Folders of classes whose names a shell would run.
ODD = {"fields": "$(touch executed)", "harbour": "a; touch executed #", "town": "`touch executed`"}


def planted(what: str) -> str:
    return f"planted-{what}-{secrets.token_hex(8)}"


class Watch:
    """Command lines of all processes, as long as the block lasts, that hold one of the values."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values, self.found, self.looks = values, set[str](), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.looks += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes().decode(errors="replace")
                except OSError:
                    continue
                held = [name for name, value in self.values.items() if value in line]
                self.found |= {f"{name}: {line[:200]!r}" for name in held}


class Team:
    """A workspace on servers that each want a password, and what was said there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.secrets = {v.name: planted(v.name.lower()) for v in VARIABLES if v.secret}
        self.secrets |= {"mlflow": planted("mlflow"), "prefect": planted("prefect")}
        self.s3 = S3(root / "buckets", "key", self.secrets["AWS_SECRET_ACCESS_KEY"])
        self.printed: list[str] = []
        self.told: list[dict[str, str]] = []
        self.home = root / "home"
        self.home.mkdir()
        self.workspace = init(root / "workspace")

    def start(self) -> None:
        self.s3.start()
        (self.root / "mlflow").mkdir()
        auth = self.root / "mlflow-auth.ini"
        auth.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{self.root / 'mlflow' / 'users.db'}\n"
            f"admin_username = admin\nadmin_password = {self.secrets['mlflow']}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        self.mlflow = MLflow(
            f"sqlite:///{self.root / 'mlflow' / 'mlflow.db'}",
            str(self.root / "mlflow" / "artifacts"),
            kept=True,
            environment={
                "MLFLOW_AUTH_CONFIG_PATH": str(auth),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
            },
            app="basic-auth",
        )
        self._prefect()
        self.mlflow.start()
        auth.unlink()  # whoever runs MLflow keeps it; here it would only be found again
        self._receiver()
        values = TINY | {
            "ingest.sources": ["s3://bucket/imagery"],
            "ingest.endpoint": self.s3_url,
            "versioning.remote": "s3://bucket/remote",
            "versioning.endpoint": self.s3_url,
            "promotion.webhook": self.receiver_url,
            "monitoring.share": 1.0,
            "validate.min_per_class": 1,
        }
        config.edit(self.workspace.params_file, values)
        source = write_class_folders(self.root / "imagery", 12)
        for name, odd in ODD.items():
            (source / name).rename(source / odd)
        client = boto3.client(
            "s3",
            endpoint_url=self.s3_url,
            aws_access_key_id="key",
            aws_secret_access_key=self.secrets["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )
        for path in sorted(source.rglob("*.jpg")):
            key = f"imagery/{path.relative_to(source).as_posix()}"
            client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
        self._up()

    @property
    def s3_url(self) -> str:
        return f"http://127.0.0.1:{self.s3.port}"

    def _prefect(self) -> None:
        self.prefect_port = free_port()
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        log = (self.root / "prefect.log").open("wb")
        self.prefect = subprocess.Popen(
            [*command, "--port", str(self.prefect_port)],
            env={
                **os.environ,
                "HOME": str(self.home),
                "PREFECT_HOME": str(self.root / "prefect"),
                "PREFECT_SERVER_API_AUTH_STRING": f"admin:{self.secrets['prefect']}",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

    def _up(self) -> None:
        limit = time.monotonic() + 300
        while True:
            try:
                self.api("health")
                return
            except (OSError, HTTPError):
                assert time.monotonic() < limit and self.prefect.poll() is None
                time.sleep(0.5)

    def _receiver(self) -> None:
        team = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                team.told.append(dict(self.headers.items()))
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.receiver_url = f"http://127.0.0.1:{self.receiver.server_port}/"
        threading.Thread(target=self.receiver.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.ringmo("down")
        self.receiver.shutdown()
        self.mlflow.stop()
        for child in [*psutil.Process(self.prefect.pid).children(recursive=True), self.prefect]:
            child.kill()
        self.prefect.wait()
        self.s3.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What a user sets: passwords in variables of their own, and in addresses too."""
        given = {name: value for name, value in self.secrets.items() if name.isupper()}
        # These two stand in the addresses, as people write them.
        for name in ("MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"):
            given.pop(name)
        return {
            **{k: v for k, v in os.environ.items() if k not in given},
            **self.s3.environment,
            **given,
            "HOME": str(self.home),
            "MLFLOW_TRACKING_URI": f"http://admin:{self.secrets['mlflow']}@127.0.0.1:{self.mlflow.port}",
            "PREFECT_API_URL": f"http://admin:{self.secrets['prefect']}@127.0.0.1:"
            f"{self.prefect_port}/api",
        }

    def ringmo(self, *arguments: str, **other: str) -> tuple[int, str]:
        """A command's exit code, and all that it printed. other: variables that differ."""
        done = subprocess.run(
            [sys.executable, "-m", "ringmo", *arguments, "--workspace", str(self.workspace.root)],
            env=self.environment | other,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        self.printed.append(done.stdout + done.stderr)
        return done.returncode, done.stdout + done.stderr

    def api(self, path: str, body: Any = None) -> Any:
        """Prefect's answer, as its pages ask."""
        url = f"http://127.0.0.1:{self.prefect_port}/api/{path}"
        return ask(url, body, login=f"admin:{self.secrets['prefect']}")

    def run_of(self, deployment: str, workspace: str) -> str:
        """The last state of a run of a deployment, which the worker carries out."""
        made = self.api(f"deployments/name/{deployment}/{workspace}")
        run = self.api(f"deployments/{made['id']}/create_flow_run", {})["id"]
        limit = time.monotonic() + 600
        while (state := self.api(f"flow_runs/{run}")["state"]["type"]) not in (
            *("COMPLETED", "FAILED", "CRASHED", "CANCELLED"),
        ):
            assert time.monotonic() < limit, state
            time.sleep(0.5)
        return str(state)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    made = Team(tmp_path_factory.mktemp("team"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def forms(secret: str) -> set[bytes]:
    """A secret as it is, and as it goes over the wire with its user."""
    return {secret.encode(), base64.b64encode(f"admin:{secret}".encode())}


def test_no_planted_secret_is_found_again(team: Team) -> None:
    with Watch(team.secrets) as watch:
        code, said = team.ringmo("run")
        assert code == 0 and "scene/1 (champion" in said, said[-6000:]
        image = next((team.root / "imagery").rglob("*.jpg"))
        token = team.secrets["RINGMO_SERVE_TOKEN"]
        for words in (
            ("status",),
            ("models", "--history"),
            ("predict", str(image), "--model", "scene@champion", "--json"),
            ("card", "scene@champion"),
            ("lineage", "scene@champion", "--json"),
            ("deploy",),
        ):
            code, said = team.ringmo(*words)
            assert code == 0, (words, said[-3000:])
        assert team.run_of("retrain", team.workspace.root.name) == "COMPLETED"
        server = Served(team.workspace, "--model", "scene@champion", environment=team.environment)
        wrong = server.post("/predict/scene", image.read_bytes(), authorization="Bearer no")
        right = server.post("/predict/scene", image.read_bytes(), authorization=f"Bearer {token}")
        assert (wrong.status_code, right.status_code) == (401, 200)
        assert server.stop() == 0
        team.printed += [server.log, json.dumps(server.told), wrong.text, right.text]

        # Each who refuses, told another secret, which must not be found either.
        others = {name: planted(f"wrong-{name}") for name in ("mlflow", "prefect", "s3", "db")}
        team.secrets |= others
        addresses = {
            "MLFLOW_TRACKING_URI": f"http://admin:{others['mlflow']}@127.0.0.1:{team.mlflow.port}",
            "PREFECT_API_URL": f"http://admin:{others['prefect']}@127.0.0.1:{team.prefect_port}/api",
        }
        # A database that is none.
        database = f"postgresql+psycopg2://ringmo:{others['db']}@127.0.0.1:1/ringmo"
        (team.root / "imagery" / "woods" / "woods_0_000.jpg").unlink()
        for words, changed in (
            (("run",), {"MLFLOW_TRACKING_URI": addresses["MLFLOW_TRACKING_URI"]}),
            (("models",), {"MLFLOW_TRACKING_URI": database}),
            (("run",), {"PREFECT_API_URL": addresses["PREFECT_API_URL"]}),
            (("ingest",), {"AWS_SECRET_ACCESS_KEY": others["s3"]}),
            (("run",), {"AWS_ENDPOINT_URL": f"http://key:{others['s3']}@127.0.0.1:1"}),
        ):
            code, said = team.ringmo(*words, **changed)
            assert code in (2, 3), (words, said[-3000:])
            # Prefect shows its own trace of what a flow raises.
            assert "Traceback" not in said or words[0] == "run", said[-3000:]
    # On a command line a secret is for all to see, who types it there or not.
    for key, address in (
        ("ingest.endpoint", f"http://key:{others['s3']}@127.0.0.1:1"),
        ("promotion.webhook", f"https://me:{others['s3']}@example.org"),
    ):
        code, said = team.ringmo("run", "--set", f"{key}={address}")
        assert code == 2 and len(said.strip().splitlines()) == 1, said[-3000:]
    assert watch.looks > 100 and not watch.found, watch.found
    assert team.told and all("Webhook-Signature" in headers for headers in team.told)
    assert not list(team.root.rglob("executed"))

    leaks = []
    for path in sorted(team.root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            leaks += [
                f"{name} in {path.relative_to(team.root)}"
                for name, value in team.secrets.items()
                if any(form in data for form in forms(value))
            ]
    leaks += [
        f"{name} was printed: {text[max(0, text.find(value) - 200) : text.find(value) + 60]}"
        for name, value in team.secrets.items()
        for text in team.printed
        if value in text
    ]
    assert not leaks, "\n".join(leaks)


def test_this_very_test_would_find_it(team: Team, tmp_path: Path) -> None:
    """The databases are among what was searched, and hold what the chain wrote."""
    mlflow, prefect = team.root / "mlflow" / "mlflow.db", team.root / "prefect" / "prefect.db"
    assert b"scene" in mlflow.read_bytes() and b"retrain" in prefect.read_bytes()
    value = planted("seen")
    with Watch({"x": value}) as watch:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1)", value], check=True)
    assert watch.found
