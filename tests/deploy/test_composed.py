"""The whole of docker-compose.yml as processes: its servers, its accounts, the chain on them, a
backup of it all onto empty servers."""

import json
import os
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import httpx
import pytest
from composed import Composed
from imagery import write_class_folders
from servers import postgres_programs
from tiny import TINY

from ringmo import config

pytestmark = pytest.mark.slow
LENIENT = {"gate.scene.max_drop": 1.0, "gate.encoder.max_drop": 1.0}
READER = "a-reader-looks-1"
SECOND_VERSION = """
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace
tracker = Tracker(Workspace.find())
(one,) = tracker.versions("scene")
tracker.create_version("scene", one.source, one.run_id, one.tags, "the same once more")
"""
STORED = """
import sys
from ringmo.data.buckets import Bucket
print([len([*Bucket(f"s3://{name}", sys.argv[1]).objects()]) for name in ("artifacts", "dvc")])
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    with Composed(tmp_path_factory.mktemp("composed")) as made:
        made.start("worker")
        made.wait("worker")
        images = write_class_folders(made.folder / "imagery")
        values = TINY | LENIENT | {"ingest.sources": [str(images)]}
        config.edit(made.workspace / "params.yaml", values)
        yield made


@pytest.fixture(scope="module")
def chain(servers: Composed) -> dict[str, Any]:
    """The retraining as its deployment, run by the worker; and what `ringmo run` says after it."""
    deployment = ("prefect", "deployment", "run", "retrain/workspace", "--watch")
    done = servers.run(*deployment, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + servers.log("worker")[-6000:]
    done = servers.run("ringmo", "run", "--json")
    assert done.returncode == 0, done.stderr[-6000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def asked(url: str, user: str | None = None) -> int:
    """The status of an answer to a GET, in an account's name, as NAME:PASSWORD."""
    headers = {"Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_no_server_answers_without_its_password(servers: Composed) -> None:
    mlflow = servers.url("mlflow") + "/api/2.0/mlflow/experiments/get?experiment_id=0"
    prefect = servers.url("prefect") + "/api/admin/version"
    right = {
        mlflow: f"admin:{servers.env['MLFLOW_ADMIN_PASSWORD']}",
        prefect: servers.env["PREFECT_AUTH_STRING"],
    }
    for url, account in right.items():
        assert [asked(url), asked(url, "admin:password1234"), asked(url, account)] == [
            *(401, 401, 200)
        ], url
    assert asked(servers.url("s3") + "/artifacts/") == 403
    psql = [postgres_programs() / "psql", "-h", "127.0.0.1", "-w", "-c", "select 1"]
    port = str(servers.ports["postgres"][5432])
    for user, database, secret in (
        ("postgres", "mlflow", "wrong"),
        ("prefect", "mlflow", servers.env["PREFECT_DB_PASSWORD"]),  # that of the other database
    ):
        env = os.environ | {"PGPASSWORD": secret, "PGPORT": port, "PGUSER": user}
        assert subprocess.run([*psql, "-d", database], env=env, capture_output=True).returncode


def test_the_chain_passes_on_them_as_on_the_embedded_default(chain: dict[str, Any]) -> None:
    assert chain["outcome"] == "Unchanged", chain
    assert chain["data"]["tiles"] == 96 and chain["validation"]["ok"]
    scene = chain["tasks"]["scene"]
    assert scene["champion"] == scene["model"] == "scene/1"
    assert chain["tasks"]["encoder"]["champion"] == "encoder/1"


def test_what_was_made_is_on_the_servers(chain: dict[str, Any], servers: Composed) -> None:
    s3 = servers.url("s3")
    buckets = servers.run("python", "-c", STORED, s3, service="backup")
    assert buckets.returncode == 0, buckets.stderr
    artifacts, dvc = json.loads(buckets.stdout)
    assert artifacts > 20 and dvc > 5
    assert not list((servers.workspace / ".ringmo" / "mlflow").glob("*.db"))
    assert not list((servers.workspace / ".ringmo" / "prefect").glob("*.db*"))
    assert not (servers.workspace / ".ringmo" / "remote").exists()
    # Neither `deploy` nor the worker started servers or workers of their own.
    assert json.loads((servers.workspace / ".ringmo" / "services.json").read_text()) == {}


def test_the_model_server_answers(chain: dict[str, Any], servers: Composed) -> None:
    servers.start("server")
    servers.wait("server")
    image = next((servers.folder / "imagery" / "town").glob("*.jpg")).read_bytes()
    url = servers.url("server") + "/predict/scene"
    assert httpx.post(url, content=image, timeout=60).status_code == 401
    token = {"Authorization": f"Bearer {servers.env['RINGMO_SERVE_TOKEN']}"}
    answer = httpx.post(url, content=image, headers=token, timeout=60)
    assert answer.status_code == 200, answer.text
    servers.stop("server")


def test_a_reader_looks_and_promotes_nothing(chain: dict[str, Any], servers: Composed) -> None:
    """As a person of the role `look` at another machine: a line, exit code 2, nothing changed."""
    admin = servers.client("admin") | {"RINGMO_USER_PASSWORD": READER}
    made = ringmo(admin, "user", "eve", "--role", "look")
    assert made.returncode == 0 and READER not in made.stdout + made.stderr, made.stderr
    reader = servers.client("eve", READER) | {"RINGMO_WORKSPACE": str(servers.workspace)}
    models = ringmo(reader, "models", "--json")
    assert models.returncode == 0, models.stderr
    assert "champion" in models.stdout

    # A second version, which whoever may promote does promote.
    copied = servers.run("python", "-c", SECOND_VERSION)
    assert copied.returncode == 0, copied.stderr
    ada = servers.client("worker") | {"RINGMO_WORKSPACE": str(servers.workspace)}
    moved = ringmo(ada, "promote", "scene/2", "--force", "--by", "ada", "--reason", "a test")
    assert moved.returncode == 0, moved.stderr
    before = ringmo(ada, "models", "--history", "--json").stdout
    for arguments in (["rollback", "scene"], ["promote", "scene/1", "--force"]):
        done = ringmo(reader, *arguments, "--by", "eve")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "eve may not do this: an admin gives another role" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    from ringmo.registry.tracker import Tracker
    from ringmo.workspace import Workspace

    with pytest.MonkeyPatch.context() as patch:
        for name, value in reader.items():
            patch.setenv(name, value)
        tracker = Tracker(Workspace(servers.workspace))
        from ringmo.errors import BadInput

        for forbidden in (
            lambda: tracker.claim_name("promotions/scene/99", {"number": 99}),
            lambda: tracker.set_alias("scene", "champion", 1),
            lambda: tracker.remove_alias("scene", "champion"),
            lambda: tracker.create_run("promotions", "x", {}),
        ):
            with pytest.raises(BadInput, match="eve may not do this"):
                forbidden()
        patch.setenv("MLFLOW_TRACKING_PASSWORD", "no-such-password")
        with pytest.raises(BadInput, match="wants a name and its password"):
            tracker.models()
    assert ringmo(ada, "models", "--history", "--json").stdout == before


@pytest.mark.long
def test_a_backup_comes_back_on_empty_servers(
    chain: dict[str, Any], servers: Composed, tmp_path: Path
) -> None:
    """Made while all servers run; other passwords there."""
    saved = tmp_path / "saved"
    path = {"PATH": os.pathsep.join([str(postgres_programs()), os.environ["PATH"]])}
    done = servers.run("ringmo", "backup", str(saved), service="backup", more=path)
    assert done.returncode == 0, done.stderr
    with Composed(tmp_path / "other") as other:
        other.start("buckets")
        other._complete("buckets")
        other.start("postgres")
        other.wait("postgres")
        endpoint = f"versioning.endpoint={other.url('s3')}"
        restore = ("ringmo", "restore", str(saved), "--set", endpoint)
        done = other.run(*restore, service="backup", more=path)
        assert done.returncode == 0, done.stderr
        for name in ("prefect", "mlflow"):
            assert rows(servers, name) == rows(other, name)
        # Accounts are of the old servers; those of the file have its passwords again.
        admin = other.client("admin", servers.env["MLFLOW_ADMIN_PASSWORD"])
        other.start("mlflow")
        other.wait("mlflow")
        worker = {"RINGMO_USER_PASSWORD": other.env["MLFLOW_WORKER_PASSWORD"]}
        done = ringmo(admin | worker, "user", "worker", "--role", "promote")
        assert done.returncode == 0, done.stderr
        models = [
            json.loads(place.run("ringmo", "models", "--json").stdout) for place in (servers, other)
        ]
        assert models[0] == models[1] and models[0]["models"]
        done = other.run("ringmo", "lineage", "scene@champion", "--verify", "--json")
        assert done.returncode == 0, done.stdout + done.stderr


def rows(servers: Composed, database: str) -> dict[str, int]:
    """Table → rows, of what a database is for: runs, versions, aliases, flows, deployments."""
    wanted = {
        "mlflow": "runs metrics tags experiments model_versions registered_model_aliases users",
        "prefect": "flow flow_run deployment deployment_schedule artifact work_pool",
    }
    count = " union all ".join(
        f"select '{table}', count(*) from {table}" for table in wanted[database].split()
    )
    psql = [postgres_programs() / "psql", "-h", "127.0.0.1", "-U", "postgres", "-AtF", "="]
    secret = {"PGPASSWORD": servers.env["POSTGRES_PASSWORD"]}
    done = subprocess.run(
        [*psql, "-p", str(servers.ports["postgres"][5432]), "-d", database, "-c", count],
        env=os.environ | secret,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {line.split("=")[0]: int(line.split("=")[1]) for line in done.stdout.splitlines()}
    assert all(found.values()), found
    return found


def ringmo(env: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ringmo", *arguments]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=600
    )
