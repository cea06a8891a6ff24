"""Who is told what happened while nobody watched: by mail, in a channel, by a webhook.

A message is a file in `.ringmo/outbox` until it has arrived (`registry.outbox`): a server that is
down delays it and fails nothing. Addresses with passwords are read from the environment when it is
sent, and are in no message. The webhook is signed as a promotion's; its event is `ringmo.notice`,
its data what is below.

    about      failure, refused or approval
    subject    one line
    lines      what there is to know
    link       the flow run's page, where there is one
    workspace  where it happened
"""

import json
import smtplib
import ssl
import time
import uuid
from email.message import EmailMessage
from typing import Any
from urllib.parse import unquote, urlsplit

from ringmo.config import Notify
from ringmo.environment import SLACK_URL, SMTP_URL
from ringmo.errors import BadInput
from ringmo.stage import write_json
from ringmo.workspace import Workspace

EVENT = "ringmo.notice"
TIMEOUT_S = 10.0
DELIVERY_S = 30.0  # at night nobody waits for the flow that tells it
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check(settings: Notify) -> None:
    """Whether all that is to be told can be sent.

    Raises:
        BadInput: a server's address, or the secret that signs, is missing or none.
    """
    from ringmo.registry import outbox

    if settings.mail:
        _mail_server()
    if settings.slack:
        _slack()
    if settings.webhook is not None:
        outbox.secret("notify.webhook")


def tell(
    workspace: Workspace,
    settings: Notify,
    about: str,
    subject: str,
    lines: list[str],
    link: str | None = None,
) -> None:
    """Tell those who want to know, now or when they can be reached. Nothing here raises."""
    from ringmo.registry import outbox

    if about not in settings.about:
        return
    now = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    data = {"about": about, "subject": subject, "lines": lines, "link": link}
    message: dict[str, Any] = {
        "type": EVENT,
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": data | {"workspace": str(workspace.root)},
    }
    for kind, to in (
        ("mail", {"to": settings.mail, "sender": settings.sender} if settings.mail else None),
        ("slack", {} if settings.slack else None),
        ("notice", {"url": settings.webhook} if settings.webhook else None),
    ):
        if to is not None:
            identifier = str(uuid.uuid4())
            path = workspace.state / "outbox" / f"{now}-{identifier[:8]}.{kind}.json"
            write_json(path, {"id": identifier, **message, **to})
    outbox.deliver(workspace, None, DELIVERY_S)


def text(data: dict[str, Any]) -> str:
    """What a person reads below the subject."""
    parts = ["\n".join(data["lines"]), data["link"] or "", f"Workspace: {data['workspace']}"]
    return "\n\n".join(part for part in parts if part)


def send(kind: str, message: dict[str, Any]) -> None:
    """Send a message of `tell`.

    Raises:
        OSError, ValueError, BadInput: it did not arrive; no error names a password or an address
            that is one.
    """
    from ringmo.registry import outbox

    if kind == "mail":
        _send_mail(message)
    elif kind == "notice":
        outbox.send_webhook(message["url"], message)
    else:
        data = message["data"]
        body = {"text": f"*{data['subject']}*\n{text(data)}"}
        address = _slack()
        try:
            outbox.post(address, json.dumps(body).encode(), {})
        except Exception as error:  # its text may hold the address, which is the secret
            status = getattr(error, "code", None)
            raise OSError(f"status {status}" if status else type(error).__name__) from None


def _send_mail(message: dict[str, Any]) -> None:
    data, mail = message["data"], EmailMessage()
    mail["Subject"] = " ".join(f"[ringmo] {data['subject']}".split())[:200]
    mail["From"], mail["To"] = message["sender"], ", ".join(message["to"])
    mail["Message-ID"] = f"<{message['id']}@ringmo>"
    mail["Date"] = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime())
    mail.set_content(text(data) + "\n")
    host, port, user, password, always = _mail_server()
    about_tls = ssl.create_default_context()
    try:
        with (
            smtplib.SMTP_SSL(host, port, timeout=TIMEOUT_S, context=about_tls)
            if always
            else smtplib.SMTP(host, port, timeout=TIMEOUT_S)
        ) as server:
            server.ehlo()
            if not always and server.has_extn("starttls"):
                server.starttls(context=about_tls)
                server.ehlo()
                always = True
            if user:
                if not always and host not in LOOPBACK:
                    raise OSError("the mail server offers no TLS: no password is sent")
                server.login(user, password)
            server.send_message(mail)
    except smtplib.SMTPException as error:
        raise OSError(f"the mail server refused: {type(error).__name__}") from None


def _mail_server() -> tuple[str, int, str, str, bool]:
    """Host, port, user, password, and whether TLS comes first."""
    address = SMTP_URL.read()
    if address is None:
        raise BadInput(f"notify.mail is set, and no mail server: set {SMTP_URL.name}")
    try:
        parts = urlsplit(address)
        known = {"smtp": 25, "smtps": 465}
        port = parts.port or known.get(parts.scheme, 0)
    except ValueError:
        port, parts = 0, urlsplit("")
    if not port or not parts.hostname:
        raise BadInput(f"{SMTP_URL.name}: expected smtp://USER:PASSWORD@HOST:PORT, or smtps://…")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return parts.hostname, port, user, password, parts.scheme == "smtps"


def _slack() -> str:
    address = SLACK_URL.read()
    if address is None:
        raise BadInput(f"notify.slack is true, and no webhook: set {SLACK_URL.name}")
    if urlsplit(address).scheme not in ("http", "https"):
        raise BadInput(f"{SLACK_URL.name}: expected https://…")
    return address
