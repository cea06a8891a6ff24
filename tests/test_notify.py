"""Who is to be told is told: a real mail server, a real webhook, and nobody's run fails for it."""

import json
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from receiver import Receiver
from servers import free_port

from ringmo import config, notify
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.registry import outbox
from ringmo.workspace import Workspace

PASSWORD = "pass word/9"


class Box:
    """What a mail server has taken."""

    def __init__(self) -> None:
        self.mails: list[Message] = []
        self.to: list[list[str]] = []
        self.logins: list[bytes] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        self.mails.append(message_from_bytes(envelope.content))
        self.to.append(envelope.rcpt_tos)
        return "250 OK"

    def login(self, _server: Any, _s: Any, _e: Any, _how: str, data: Any) -> AuthResult:
        self.logins.append(data.password)
        return AuthResult(success=data.password == PASSWORD.encode())


@pytest.fixture
def box(monkeypatch: Any) -> Iterator[Box]:
    made = Box()
    server = Controller(
        made,
        hostname="127.0.0.1",
        port=free_port(),
        authenticator=made.login,
        auth_required=True,
        auth_require_tls=False,
    )
    server.start()
    address = f"ada:pass%20word%2F9@127.0.0.1:{server.port}"
    monkeypatch.setenv("RINGMO_SMTP_URL", f"smtp://{address}")
    yield made
    server.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()


def tell(place: Workspace, about: str = "failure") -> None:
    settings = Config.load(place.params_file).notify
    notify.tell(place, settings, about, "retrain failed", ["the disk is full"], "http://x/runs/1")


def waiting(place: Workspace) -> list[Path]:
    return sorted((place.state / "outbox").glob("*.json"))


def test_a_mail_a_channel_and_a_webhook_are_told(
    workspace: Workspace, box: Box, receiver: Receiver, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RINGMO_WEBHOOK_SECRET", "between us")
    monkeypatch.setenv("RINGMO_SLACK_URL", f"{receiver.url}/services/T0/B0/secret")
    given = {"notify.mail": ["ada@example.org", "bob@example.org"], "notify.slack": True}
    config.edit(workspace.params_file, given | {"notify.webhook": receiver.url})
    notify.check(Config.load(workspace.params_file).notify)
    tell(workspace)
    assert waiting(workspace) == []

    (mail,) = box.mails
    assert mail["Subject"] == "[ringmo] retrain failed" and mail["Message-ID"]
    assert box.to == [["ada@example.org", "bob@example.org"]] and box.logins == [b"pass word/9"]
    body = mail.get_payload(decode=True)
    assert isinstance(body, bytes)
    for said in ("the disk is full", "http://x/runs/1", str(workspace.root)):
        assert said.encode() in body

    said = {json.dumps("text" in json.loads(body)): json.loads(body) for _, body in receiver.got}
    assert said["true"]["text"].startswith("*retrain failed*\nthe disk is full")
    assert said["false"]["type"] == "ringmo.notice"
    assert said["false"]["data"]["lines"] == ["the disk is full"]
    signed = [headers for headers, body in receiver.got if b'"data"' in body]
    assert signed[0]["webhook-signature"].startswith("v1,")


def test_only_what_is_wanted_is_told(workspace: Workspace, box: Box) -> None:
    config.edit(workspace.params_file, {"notify.mail": ["a@b.org"], "notify.about": ["approval"]})
    tell(workspace)
    assert box.mails == []
    tell(workspace, "approval")
    assert len(box.mails) == 1


def test_what_cannot_be_told_waits_and_names_no_secret(
    workspace: Workspace, receiver: Receiver, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("RINGMO_SMTP_URL", "smtp://ada:hush-hush@127.0.0.1:9")
    monkeypatch.setenv("RINGMO_SLACK_URL", f"{receiver.url}/services/hush-hush")
    receiver.status = 500
    config.edit(workspace.params_file, {"notify.mail": ["a@b.org"], "notify.slack": True})
    tell(workspace)
    assert len(waiting(workspace)) == 2
    told = capsys.readouterr().err + "".join(path.read_text() for path in waiting(workspace))
    assert "hush" not in told and "the mail server was not told" in told
    receiver.status = 200
    outbox.deliver(workspace, None)
    assert len(waiting(workspace)) == 1 and len(receiver.got) == 2


def test_a_password_goes_to_no_server_without_tls(workspace: Workspace, monkeypatch: Any) -> None:
    """But to the loopback, where the first test sends one."""
    import smtplib

    sent: list[Any] = []

    class Plain(smtplib.SMTP):
        def connect(self, host: str = "", port: int = 0, *_: Any) -> tuple[int, bytes]:
            return super().connect("127.0.0.1", server.port)

        def login(self, *given: Any, **_: Any) -> Any:
            sent.append(given)

    server = Controller(Box(), hostname="127.0.0.1", port=free_port())
    server.start()
    try:
        monkeypatch.setattr(smtplib, "SMTP", Plain)
        monkeypatch.setenv("RINGMO_SMTP_URL", "smtp://ada:hush@mail.example.org:25")
        config.edit(workspace.params_file, {"notify.mail": ["a@b.org"]})
        tell(workspace)
    finally:
        server.stop()
    assert sent == [] and len(waiting(workspace)) == 1


@pytest.mark.parametrize(
    ("values", "env", "said"),
    [
        ({"notify.mail": ["a@b.org"]}, {}, "RINGMO_SMTP_URL"),
        ({"notify.mail": ["a@b.org"]}, {"RINGMO_SMTP_URL": "mail.b.org"}, "smtp://USER"),
        ({"notify.slack": True}, {}, "RINGMO_SLACK_URL"),
        ({"notify.webhook": "http://h/x"}, {}, "RINGMO_WEBHOOK_SECRET"),
    ],
)
def test_what_is_missing_is_said_before_anything_happens(
    workspace: Workspace, values: Any, env: dict[str, str], said: str, monkeypatch: Any
) -> None:
    for name in ("RINGMO_SMTP_URL", "RINGMO_SLACK_URL", "RINGMO_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    config.edit(workspace.params_file, values)
    with pytest.raises(BadInput, match=said):
        notify.check(Config.load(workspace.params_file).notify)


@pytest.mark.parametrize("address", ["ada", "a@b.org, c@d.org", "a@b\nBcc: x@y"])
def test_no_mail_address_is_refused(workspace: Workspace, address: str) -> None:
    with pytest.raises(BadInput, match="no mail address"):
        config.edit(workspace.params_file, {"notify.mail": [address]})
