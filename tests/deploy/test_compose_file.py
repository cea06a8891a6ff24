"""docker-compose.yml without Docker: Compose's schema, and what the file promises."""

import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from composed import COMPOSE, ROOT, load, read_env
from ruamel.yaml import YAML

from ringmo import compose_env
from ringmo.cli import main
from ringmo.errors import BadInput

ONCE = {"buckets", "accounts", "workspace", "deploy", "backup"}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / COMPOSE.name).write_bytes(COMPOSE.read_bytes())
    return read_env(compose_env.write(tmp_path))


@pytest.fixture
def services(env: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = load(env)["services"]
    return found


def test_it_is_as_compose_specifies() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(COMPOSE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_schema_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("restart: unless-stopped", "restarts: always"))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, str(wrong)], capture_output=True).returncode == 1


def test_every_service_is_looked_after(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name
        assert name in ONCE or service["healthcheck"]["test"][0] == "CMD", name
        assert service["user"] in ("10001:10001", "postgres"), f"{name} runs as root"
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_servers_answer_the_loopback_address_alone(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"s3", "mlflow", "prefect", "server"}
    for ports in published.values():
        assert all(port.startswith("127.0.0.1:") for port in ports)
    assert services["postgres"]["networks"] == ["data"]


def test_images_are_pinned(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE)
    bases = list(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE))
    for image in [*bases, *(service["image"] for service in services.values())]:
        name, _, tag = image.partition(":")
        assert name in stages or (tag and tag != "latest"), image
    # Its clients refuse a server newer than themselves.
    assert re.search(r"postgres:(\d+)", services["postgres"]["image"]).group(1) == (  # type: ignore[union-attr]
        re.search(r"postgresql-client-(\d+)", dockerfile).group(1)  # type: ignore[union-attr]
    )
    assert "USER 10001:10001" in dockerfile


def test_no_password_is_in_the_file_or_has_a_default() -> None:
    text = COMPOSE.read_text()
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    assert len(wanted) == 11
    for name in re.findall(r"^\s*(\w*(?:PASSWORD|SECRET|TOKEN|AUTH_STRING)\w*): (.*)$", text, re.M):
        assert re.match(r"\$\{\w+:\?", name[1]), name
    with pytest.raises(AssertionError, match="init-env"):
        load({})


def test_no_secret_is_an_argument(services: dict[str, Any], env: dict[str, str]) -> None:
    secrets = {v for k, v in env.items() if re.search("PASSWORD|SECRET|TOKEN|KEY", k)}
    secrets.add(env["PREFECT_AUTH_STRING"].partition(":")[2])
    assert len(secrets) == 11
    for name, service in services.items():
        said = str([service.get("command"), service.get("entrypoint"), service.get("healthcheck")])
        assert not [one for one in secrets if one in said], name


def test_the_env_file_has_just_what_is_asked_for_and_is_never_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", "--init-env"]) == 2
    assert "go to the folder of ringmo's sources" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / COMPOSE.name).write_bytes(COMPOSE.read_bytes())

    assert main(["deploy", "--init-env"]) == 0
    told = capsys.readouterr().out
    path = tmp_path / ".env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    env = read_env(path)
    wanted = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text())) <= set(env)
    assert set(env) - wanted == {"COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"}
    assert not [value for name, value in env.items() if value in told and len(value) > 16]
    long = [value for value in env.values() if len(value) >= 20]
    assert len(set(long)) == len(long) == 11

    before = path.read_bytes()
    assert main(["deploy", "--init-env"]) == 2
    assert "is left as it is" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {".env", COMPOSE.name}


def test_two_workers_are_never_up_at_once(services: dict[str, Any]) -> None:
    assert services["worker"]["profiles"] == ["cpu"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert services["worker"]["command"] == services["worker-gpu"]["command"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / COMPOSE.name).mkdir()
    with pytest.raises(BadInput, match="has no docker-compose"):
        compose_env.write(tmp_path)


def test_what_an_image_must_not_hold_is_left_out() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".env", ".git", ".ringmo", "data/store", "work"} <= set(ignored)
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "name" not in YAML(typ="safe").load(COMPOSE)  # Debian's docker-compose knows none
