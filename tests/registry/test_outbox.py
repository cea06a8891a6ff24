"""Whoever is to know of a promotion is told, at least once, and never at its cost."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from receiver import Receiver

from ringmo import config
from ringmo.cli import main
from ringmo.errors import BadInput
from ringmo.registry import outbox, promotion
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

SECRET = "whsec_" + base64.b64encode(b"between us").decode()


@pytest.fixture
def receiver(three: Workspace, monkeypatch: Any) -> Iterator[Receiver]:
    """The webhook of the workspace `three`."""
    made = Receiver()
    monkeypatch.setenv("RINGMO_WEBHOOK_SECRET", SECRET)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    config.edit(three.params_file, {"promotion.webhook": made.url})
    yield made
    made.server.shutdown()


def promote(workspace: Workspace, version: int) -> dict[str, Any]:
    return promotion.promote(workspace, "scene", version, by="ada", reason="better")


def waiting(workspace: Workspace) -> int:
    return len(list((workspace.state / "outbox").glob("*.json")))


def test_a_promotion_is_told_and_signed(three: Workspace, receiver: Receiver) -> None:
    promote(three, 1)
    promote(three, 2)
    promotion.rollback(three, "scene", by="bob", reason="worse on fields")
    assert waiting(three) == 0
    said = [json.loads(body)["data"] for _, body in receiver.got]
    assert [(d["what"], d["from"], d["version"], d["who"]) for d in said] == [
        ("promote", None, 1, "ada"),
        ("promote", 1, 2, "ada"),
        ("rollback", 2, 1, "bob"),
    ]
    headers, body = receiver.got[2]
    now = int(headers["webhook-timestamp"])
    assert abs(now - time.time()) < 60
    signed = f"{headers['webhook-id']}.{now}.".encode() + body
    mac = base64.b64encode(hmac.digest(b"between us", signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{mac}"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 3


@pytest.mark.parametrize("status", [500, 404, 301, 307])
def test_what_is_not_taken_goes_again_with_the_same_id(
    three: Workspace, receiver: Receiver, status: int, capsys: Any
) -> None:
    other = Receiver()
    receiver.status, receiver.to = status, other.url if status < 400 else ""
    assert promote(three, 1)["moved"]
    assert waiting(three) == 1
    noted = capsys.readouterr().err
    assert "1 wait in" in noted and receiver.url not in noted and "between us" not in noted
    receiver.status, receiver.to = 204, ""
    promote(three, 2)
    assert waiting(three) == 0
    first, again, second = (headers["webhook-id"] for headers, _ in receiver.got)
    assert first == again != second
    assert other.got == []  # a redirect is followed nowhere


def test_a_prefect_that_is_busy_for_a_moment_is_asked_again(
    three: Workspace, receiver: Receiver, monkeypatch: Any
) -> None:
    """As its server answers while its SQLite is locked."""
    api = receiver.url.rpartition("/")[0]
    receiver.busy = 2
    assert outbox.ask_prefect(api, "events", [{"id": "a"}]) is None
    assert [json.loads(body) for _, body in receiver.got] == [[{"id": "a"}]] * 3
    monkeypatch.setattr(outbox, "TIMEOUT_S", 0.3)
    receiver.busy = 1000
    with pytest.raises(OSError, match="503"):
        outbox.ask_prefect(api, "events", [])


def test_a_receiver_that_is_down_or_slow_holds_nothing_up(
    three: Workspace, receiver: Receiver
) -> None:
    receiver.delay_s = 30
    started = time.monotonic()
    assert promote(three, 1)["seconds"] < 30
    assert time.monotonic() - started < 29
    receiver.server.shutdown()
    receiver.server.server_close()
    assert promote(three, 2)["moved"]
    assert waiting(three) == 2
    assert str(Tracker(three).aliased("scene", "champion")) == "scene/2"


def test_a_move_that_was_interrupted_is_told_by_who_finishes_it(
    three: Workspace, receiver: Receiver, monkeypatch: Any
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in ("set_alias", "set_status", "retire_claim"):
        with monkeypatch.context() as patch:
            patch.setattr(Tracker, step, killed)
            with pytest.raises(KeyboardInterrupt):
                promote(three, {"set_alias": 1, "set_status": 2, "retire_claim": 3}[step])
        promotion.settle(three, "scene")
    assert {json.loads(body)["data"]["version"] for _, body in receiver.got} == {1, 2, 3}
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 3


def test_without_a_secret_nothing_moves(
    three: Workspace, receiver: Receiver, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.delenv("RINGMO_WEBHOOK_SECRET")
    with pytest.raises(BadInput, match=r"no secret to sign with: set RINGMO_WEBHOOK_SECRET"):
        promote(three, 1)
    assert Tracker(three).aliased("scene", "champion") is None
    for arguments in (["rollback", "scene"], ["run"]):
        assert main([*arguments, "--workspace", str(three.root)]) == 2
        assert "RINGMO_WEBHOOK_SECRET" in capsys.readouterr().err
    monkeypatch.setenv("RINGMO_WEBHOOK_SECRET", "whsec_?")
    with pytest.raises(BadInput, match="Base64"):
        promote(three, 1)


def test_nobody_else_is_told(three: Workspace, monkeypatch: Any) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    promote(three, 1)
    assert not (three.state / "outbox").exists()
    with pytest.raises(ValueError, match="neither http nor https"):
        outbox.post("file:///etc/passwd", b"", {})
    for address in ("file:///etc/passwd", "ftp://a/b", "https://", "https://u:p@host/x"):
        with pytest.raises(BadInput, match=r"promotion\.webhook"):
            config.edit(three.params_file, {"promotion.webhook": address})
