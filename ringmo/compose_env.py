"""The `.env` beside docker-compose.yml: a random password for each that the file asks for."""

import os
import secrets
from pathlib import Path

from ringmo.errors import BadInput

COMPOSE_FILE = "docker-compose.yml"
TEMPLATE = """\
# Read by `docker compose`. Made by `ringmo deploy --init-env`; whoever can read this can do all.

# What volumes and containers are called for.
COMPOSE_PROJECT_NAME=ringmo
# cpu, or gpu where this machine has NVIDIA's container toolkit.
COMPOSE_PROFILES=cpu
# Imagery to train on, seen as /imagery inside; where `backup` writes, seen as /backups.
RINGMO_IMAGERY=./imagery
RINGMO_BACKUPS=./backups
# 127.0.0.1: the servers answer this machine alone. Another address: docs/team.md first.
RINGMO_BIND=127.0.0.1

# PostgreSQL: its superuser, and an owner for each database.
POSTGRES_PASSWORD={secret}
MLFLOW_DB_PASSWORD={secret}
PREFECT_DB_PASSWORD={secret}

# S3 of artifacts and data versions.
S3_ACCESS_KEY={name}
S3_SECRET_KEY={secret}

# MLflow: accounts `admin`, `worker` and `server`, and what its forms are signed with.
MLFLOW_ADMIN_PASSWORD={secret}
MLFLOW_WORKER_PASSWORD={secret}
MLFLOW_SERVER_PASSWORD={secret}
MLFLOW_FLASK_SERVER_SECRET_KEY={secret}

# Prefect's one account, as NAME:PASSWORD.
PREFECT_AUTH_STRING=ringmo:{secret}

# What whoever asks the model server must show.
RINGMO_SERVE_TOKEN={secret}
"""
SECRET_BYTES = 24  # 32 letters, digits, - and _: nothing that a shell or a URI reads otherwise


def write(folder: Path) -> Path:
    """Write `.env` with mode 0600, whole or not at all; returns its path.

    Raises:
        BadInput: there is one already, no docker-compose.yml is there, or it cannot be written.
    """
    path = folder / ".env"
    if not (folder / COMPOSE_FILE).is_file():
        raise BadInput(f"{folder} has no {COMPOSE_FILE}: go to the folder of ringmo's sources")
    text = TEMPLATE
    while "{secret}" in text:
        text = text.replace("{secret}", secrets.token_urlsafe(SECRET_BYTES), 1)
    text = text.replace("{name}", secrets.token_hex(10))
    temporary = folder / f".env.{secrets.token_hex(4)}.tmp"
    try:
        with os.fdopen(
            os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w"
        ) as file:
            file.write(text)
        try:
            os.link(temporary, path)  # fails where there is one: what is in it is in use
        except FileExistsError:
            raise BadInput(
                f"{path} exists, and is left as it is: the servers' data is locked by what it holds"
            ) from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path
