"""The environment variables the platform reads: declared, typed and explained in this one place.

Credentials are read by boto3 from the AWS variables; they are listed so that `ringmo doctor` and
the docs can name them, and their values are never logged.
"""

import base64
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ringmo.errors import BadInput


@dataclass(frozen=True)
class Variable:
    """One variable. `kind` is what its text is read as; `secret` values are never shown."""

    name: str
    kind: type
    meaning: str
    secret: bool = False

    def read(self) -> str | None:
        """The value, or None where it is unset or empty."""
        return os.environ.get(self.name) or None


WORKSPACE = Variable("RINGMO_WORKSPACE", str, "the workspace, where --workspace does not name one")
LOG = Variable("RINGMO_LOG", str, "json: every line of the log as a JSON object; unset: text")
TRACKING_URI = Variable(
    "MLFLOW_TRACKING_URI", str, "MLflow's server; unset: the one of `ringmo up`, else SQLite"
)
TRACKING_USERNAME = Variable(
    "MLFLOW_TRACKING_USERNAME", str, "user of an MLflow server with basic auth"
)
TRACKING_PASSWORD = Variable("MLFLOW_TRACKING_PASSWORD", str, "and the password", secret=True)
PREFECT_API_URL = Variable(
    "PREFECT_API_URL", str, "Prefect's server; unset: the one of `ringmo up`, else a temporary one"
)
PREFECT_AUTH = Variable(
    "PREFECT_API_AUTH_STRING", str, "user:password of a Prefect server with basic auth", secret=True
)
WORKER = Variable(
    "RINGMO_WORKER",
    str,
    "`elsewhere`: others run Prefect's workers; unset: what needs one starts it here",
)
WEBHOOK_SECRET = Variable(
    *("RINGMO_WEBHOOK_SECRET", str, "signs what promotion.webhook and notify.webhook are sent"),
    secret=True,
)
SMTP_URL = Variable(
    *("RINGMO_SMTP_URL", str, "smtp://USER:PASSWORD@HOST:587, or smtps://: who takes notify.mail"),
    secret=True,
)
SLACK_URL = Variable(
    "RINGMO_SLACK_URL", str, "the Slack-compatible webhook of notify.slack", secret=True
)
SERVE_TOKEN = Variable(
    "RINGMO_SERVE_TOKEN", str, "what `ringmo serve` wants to hear from whoever asks", secret=True
)
USER_PASSWORD = Variable(
    "RINGMO_USER_PASSWORD", str, "for `ringmo user`; unset: it makes one up", secret=True
)
# What the servers themselves are told: `ringmo backup` reads the same.
BACKEND_STORE = Variable(
    "MLFLOW_BACKEND_STORE_URI", str, "database of an MLflow server", secret=True
)
S3_ENDPOINT = Variable("MLFLOW_S3_ENDPOINT_URL", str, "S3-compatible store of MLflow's artifacts")
ARTIFACTS = Variable("MLFLOW_ARTIFACTS_DESTINATION", str, "where an MLflow server keeps artifacts")
PREFECT_DATABASE = Variable(
    "PREFECT_SERVER_DATABASE_CONNECTION_URL", str, "database of a Prefect server", secret=True
)

VARIABLES = (
    WORKSPACE,
    LOG,
    TRACKING_URI,
    PREFECT_API_URL,
    PREFECT_AUTH,
    WORKER,
    WEBHOOK_SECRET,
    SMTP_URL,
    SLACK_URL,
    SERVE_TOKEN,
    USER_PASSWORD,
    BACKEND_STORE,
    ARTIFACTS,
    PREFECT_DATABASE,
    TRACKING_USERNAME,
    TRACKING_PASSWORD,
    Variable("PGHOST", str, "PostgreSQL's address, for a backup; so are PGPORT and PGUSER"),
    Variable("PGPASSWORD", str, "and its password", secret=True),
    Variable("MLFLOW_HTTP_REQUEST_TIMEOUT", int, "seconds to wait for MLflow's answer (30)"),
    S3_ENDPOINT,
    Variable("AWS_ACCESS_KEY_ID", str, "S3: sources, DVC remote, artifacts"),
    Variable("AWS_SECRET_ACCESS_KEY", str, "and its secret", secret=True),
    Variable("AWS_SESSION_TOKEN", str, "and its session, where credentials expire", secret=True),
    Variable("AWS_DEFAULT_REGION", str, "S3 region"),
    Variable("AWS_ENDPOINT_URL", str, "address of an S3-compatible store; unset: Amazon's"),
    Variable("AWS_PROFILE", str, "a profile of ~/.aws instead of keys"),
)

# Where a password may stand in an address, and to which variables it belongs instead.
_PARTED = {
    TRACKING_URI.name: ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    PREFECT_API_URL.name: (PREFECT_AUTH.name,),
}
_NO_PASSWORD = ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
_USER = re.compile(r"(?<=://)[^/\s]*@")

# Checked in the installed sources: MLflow wants the word "true", DVC any text.
_QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "DVC_STUDIO_OFFLINE": "1",
    "GX_ANALYTICS_ENABLED": "false",
    # OpenTelemetry's SDK, which MLflow and Prefect bring along: docs/housekeeping.md turns it on.
    "OTEL_SDK_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def quiet_telemetry(env: MutableMapping[str, str]) -> dict[str, str]:
    """`env` with every tool's telemetry off, except where the user has set a switch otherwise."""
    return {**_QUIET, **env}


def shown(text: str) -> str:
    """A text, with the users and passwords left out of the addresses in it."""
    return _USER.sub("", text)


def basic_auth(login: str) -> dict[str, str]:
    """The header of HTTP's basic authentication for user:password."""
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


def part_passwords(env: MutableMapping[str, str]) -> None:
    """Take user and password out of the servers' addresses, into the variables made for them.

    An address is shown, logged and kept with the runs; what belongs to it is not. That of a
    database (postgresql://…) keeps its password, for SQLAlchemy; where it is shown it has none.

    Raises:
        BadInput: an address of S3 with a password, which S3 has no use for.
    """
    for name in _NO_PASSWORD:
        if _USER.search(env.get(name, "")):
            raise BadInput(
                f"{name}: no password in an address: set AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY"
            )
    for name, others in _PARTED.items():
        address = env.get(name, "")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not _USER.search(address):
            continue
        given = [unquote(text) for text in parts.netloc.rpartition("@")[0].split(":", 1)]
        env[name] = shown(address)
        values = given if len(others) == 2 else [":".join(given)]
        for other, value in zip(others, values, strict=False):
            env.setdefault(other, value)
