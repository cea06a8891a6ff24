"""What the world is told: of promotions a webhook and Prefect, of trouble who wants to know
(`ringmo.notify`). Kept on disk until it has arrived.

A message is written before its promotion is FINISHED and removed when it was taken, so each arrives
at least once, and twice with the same id. What cannot be delivered waits in `.ringmo/outbox` and
goes with the next promotion, rollback or run. Nothing here fails a promotion, or holds it up for
more than DELIVERY_S.

The webhook is signed as https://www.standardwebhooks.com has it, for which there are receivers in
many languages. Headers: `webhook-id`, `webhook-timestamp` (Unix seconds, of this attempt) and
`webhook-signature`: `v1,` and the Base64 of HMAC-SHA256(secret, "ID.TIMESTAMP.BODY"). A secret that
begins with `whsec_` goes on in Base64, any other is taken as it is. Redirects are not followed.

Prefect gets an event `ringmo.promotion` of resource `ringmo.model.MODEL`, with the version related
as `ringmo.version.MODEL.NUMBER`, for automations; and flow runs that wait for a person's word on
the version (`flows.approval`) end. It is spoken to without its client, whose import takes longer
than a rollback may.
"""

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ringmo import console, notify
from ringmo.config import Config, Promotion, digest
from ringmo.environment import (
    PREFECT_API_URL,
    PREFECT_AUTH,
    TRACKING_URI,
    WEBHOOK_SECRET,
    basic_auth,
)
from ringmo.errors import BadInput
from ringmo.registry.tracker import Tracker, local_server
from ringmo.stage import write_json
from ringmo.workspace import Workspace

EVENT = "ringmo.promotion"
REGISTRY = "ringmo.registry"  # label of the event's resource: `registry`
TIMEOUT_S = 2.0
DELIVERY_S = 3.0
WHO = {
    "webhook": "the webhook",
    "prefect": "Prefect",
    "mail": "the mail server",
    "slack": "the channel",
    "notice": "the webhook",
}
WAITING = ("SCHEDULED", "PENDING", "PAUSED")  # states of a flow run that nothing works on


def check(settings: Promotion) -> None:
    """Whether what is to be told can be signed.

    Raises:
        BadInput: promotion.webhook is set, and there is no secret to sign with.
    """
    if settings.webhook is not None:
        secret("promotion.webhook")


def question(tracker: Tracker, ref: str) -> str:
    """The tag of flow runs that wait for a person's word on a version of this registry."""
    return f"{ref} {registry(tracker)}"


def registry(tracker: Tracker) -> str:
    """What tells this registry from others that tell the same Prefect."""
    where = tracker.uri if TRACKING_URI.read() else str(tracker.workspace.root)
    return digest(where)[:12]


def put(workspace: Workspace, settings: Promotion, entry: dict[str, Any], tracker: Tracker) -> None:
    """Have an entry of `promotion.history` told to whoever is to know. Put twice is put once."""
    said = digest(entry)
    identifier = "-".join((said[:8], said[8:12], said[12:16], said[16:20], said[20:32]))
    model = entry["model"]
    data = {"model": model, "version": entry["to"]}
    data |= {name: entry[name] for name in ("number", "what", "from", "who", "why", "forced")}
    message = {"id": identifier, "type": EVENT, "timestamp": entry["when"], "data": data}
    message["question"] = question(tracker, f"{model}/{entry['to']}")
    kinds = ["webhook"] * (settings.webhook is not None)
    kinds += ["prefect"] * (prefect_api(workspace) is not None)
    for kind in kinds:
        name = f"{entry['when'].replace(':', '')}-{model}-{entry['number']}.{kind}.json"
        write_json(workspace.state / "outbox" / name, message)


def deliver(
    workspace: Workspace, settings: Promotion | None, patience_s: float = DELIVERY_S
) -> None:
    """Send what waits. Says in a line what goes on waiting, and returns in any case.

    settings: None, where they are as params.yaml says.
    """
    if not any(waiting(workspace)):
        return
    # A thread: the other side may answer so slowly that no single wait is ever too long.
    sending = threading.Thread(target=_send_all, args=(workspace, settings), daemon=True)
    sending.start()
    sending.join(patience_s)
    if sending.is_alive():
        console.note("a message takes long to deliver: it goes again later")


def waiting(workspace: Workspace) -> list[Path]:
    """Messages that nobody has taken yet."""
    return sorted((workspace.state / "outbox").glob("[!.]*.json"))


def _send_all(workspace: Workspace, settings: Promotion | None) -> None:
    refused: set[str] = set()
    if settings is None:
        settings = Config.load(workspace.params_file).promotion
    with contextlib.suppress(BlockingIOError), (workspace.state / "outbox.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # somebody else is sending just now
        for path in waiting(workspace):
            kind = path.name.split(".")[-2]
            if kind in refused:
                continue
            try:
                message = json.loads(path.read_text())
                if kind == "prefect":
                    _send_prefect(workspace, message)
                elif kind != "webhook":
                    notify.send(kind, message)
                elif settings.webhook is not None:  # else nobody is to be told any more
                    send_webhook(settings.webhook, message)
            except (OSError, http.client.HTTPException, ValueError, BadInput) as error:
                refused.add(kind)
                count = sum(f".{kind}." in other.name for other in waiting(workspace))
                console.note(
                    f"{WHO[kind]} was not told ({error}); {count} wait in {path.parent} for the "
                    f"next promote, rollback or run"
                )
            else:
                path.unlink(missing_ok=True)


def secret(key: str) -> bytes:
    """What signs a webhook's messages.

    Raises:
        BadInput: there is none, though `key` in params.yaml names a webhook.
    """
    text = WEBHOOK_SECRET.read()
    if text is None:
        raise BadInput(
            f"{key} is set, and there is no secret to sign with: set {WEBHOOK_SECRET.name}, or "
            f"{key} to null"
        )
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise BadInput(f"{WEBHOOK_SECRET.name}: after whsec_ Base64 was expected") from None


def send_webhook(url: str, message: dict[str, Any]) -> None:
    """Send a message's type, timestamp and data, signed.

    Raises:
        OSError, ValueError, BadInput: it did not arrive.
    """
    body = json.dumps({name: message[name] for name in ("type", "timestamp", "data")}).encode()
    now = str(int(time.time()))
    signed = f"{message['id']}.{now}.".encode() + body
    signature = base64.b64encode(
        hmac.new(secret("a webhook"), signed, hashlib.sha256).digest()
    ).decode()
    headers = {
        "webhook-id": message["id"],
        "webhook-timestamp": now,
        "webhook-signature": f"v1,{signature}",
    }
    post(url, body, headers)


def _send_prefect(workspace: Workspace, message: dict[str, Any]) -> None:
    address = prefect_api(workspace)
    if address is None:
        raise OSError("its server is down")
    data = message["data"]
    related = [
        {
            "prefect.resource.id": f"ringmo.version.{data['model']}.{version}",
            "prefect.resource.role": role,
        }
        for role, version in (("champion", data["version"]), ("previous", data["from"]))
        if version
    ]
    event = {
        "id": message["id"],
        "event": EVENT,
        "occurred": message["timestamp"],
        "resource": {
            "prefect.resource.id": f"ringmo.model.{data['model']}",
            "prefect.resource.name": data["model"],
            REGISTRY: message["question"].rpartition(" ")[2],
        },
        "related": related,
        "payload": data,
    }
    ask_prefect(address, "events", [event])
    waiting = {
        "tags": {"all_": [message["question"]]},
        "state": {"type": {"any_": list(WAITING)}},
    }
    state = {
        "type": "COMPLETED",
        "name": f"promoted by {data['who']}",
        "message": f"{data['model']}/{data['version']} is the champion. {data['why']}".strip(),
    }
    for run in ask_prefect(address, "flow_runs/filter", {"flow_runs": waiting}):
        asked = {"state": state, "force": True}
        ask_prefect(address, f"flow_runs/{run['id']}/set_state", asked)


def prefect_api(workspace: Workspace) -> str | None:
    """Address of Prefect's API: the environment's, or that of the workspace's own server."""
    if named := PREFECT_API_URL.read():
        return named.rstrip("/")
    local = local_server(workspace, "prefect")
    return f"{local}/api" if local else None


def ask_prefect(address: str, path: str, body: Any) -> Any:
    """The answer of Prefect's REST interface: importing Prefect takes seconds.

    Raises:
        OSError, ValueError: it does not answer, refuses, or is something else.
    """
    login = PREFECT_AUTH.read()
    headers = basic_auth(login) if login else {}
    limit = time.monotonic() + TIMEOUT_S
    while True:
        try:
            answer = post(f"{address}/{path}", json.dumps(body).encode(), headers)
            return json.loads(answer) if answer else None
        except urllib.error.HTTPError as error:
            # Its SQLite is busy for a moment: Prefect's own clients ask again too.
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > limit:
                raise
        time.sleep(0.2)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Nowhere: what was signed for one address is not for another."""


def post(url: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The answer to JSON that is posted. Redirects are not followed.

    Raises:
        OSError: no answer, or a status of 300 and more. ValueError: no http(s) address.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("neither http nor https")
    about = {"Content-Type": "application/json", "User-Agent": "ringmo", **headers}
    request = urllib.request.Request(url, body, about)
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as answer:
        read: bytes = answer.read(1 << 24)
        return read
