"""More than can be served, larger than is taken, slower than is waited for, and by whom."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import Served, png, write_task_model
from small_models import rgb

from ringmo.inference.server.connections import CONNECTIONS
from ringmo.workspace import init

pytestmark = pytest.mark.slow

TOKEN = "correct horse"
WITH_TOKEN = {"authorization": f"Bearer {TOKEN}"}
GONE = 'ringmo_requests_total{model="scene",status="%d"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("limits")
    limits = ("--queue", "2", "--max-body", "20000", "--max-side", "64", "--time-limit", "4")
    served = Served(
        init(folder / "workspace"),
        *("--model", str(write_task_model(folder / "scene", "scene")), *limits),
        environment={"RINGMO_SERVE_TOKEN": TOKEN},
        headers=WITH_TOKEN,
    )
    yield served
    assert served.stop() == 0, served.log


def test_only_bearers_of_the_token_are_answered(server: Served) -> None:
    for headers in ({}, {"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN}x"}):
        for path in ("/models", "/metrics"):
            refused = httpx.get(server.url + path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer" and TOKEN not in refused.text
        post = httpx.post(server.url + "/predict/scene", content=png(rgb(1)), headers=headers)
        assert post.status_code == 401
    for path in ("/", "/docs", "/health", "/ready", "/openapi.json"):
        assert httpx.get(server.url + path).status_code == 200
    assert server.post("/predict/scene", png(rgb(1))).status_code == 200
    assert TOKEN not in server.log


def test_a_body_too_large_is_cut_off_whether_or_not_it_says_its_length(server: Served) -> None:
    answer = server.post("/predict/scene", bytes(20_001))
    assert answer.status_code == 413 and "--max-body" in answer.text
    sent = 0

    def pieces() -> Iterator[bytes]:  # no Content-Length: chunked, and no end
        nonlocal sent
        while sent < 100_000_000:
            sent += 10_000
            yield bytes(10_000)

    try:
        answer = httpx.post(
            server.url + "/predict/scene", content=pieces(), headers=WITH_TOKEN, timeout=30
        )
        assert answer.status_code == 413
    except httpx.WriteError:  # cut off before it listened for the answer
        pass
    assert sent < 40_000_000
    wide = server.post("/predict/scene", png(rgb(1, 20, 65)))
    assert wide.status_code == 413 and "--max-side" in wide.text
    assert server.post("/predict/scene", png(rgb(1))).status_code == 200


def test_who_finds_it_full_is_told_to_come_again_and_who_is_slow_is_sent_away(
    server: Served,
) -> None:
    head = "POST /predict/scene HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    head += f"Authorization: Bearer {TOKEN}\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    for caller in slow:
        caller.sendall(head.encode() + b"half")
    limit = time.monotonic() + 3
    while server.metric("ringmo_requests_within") < 2:
        assert time.monotonic() < limit
    full = server.post("/predict/scene", png(rgb(1)))
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert server.get("/ready").status_code == 200
    for caller in slow:
        caller.settimeout(20)
        assert b" 408 " in caller.recv(1000).split(b"\r\n")[0]
        caller.close()
    assert server.metric(GONE % 429) == 1 and server.metric(GONE % 408) == 2
    assert server.post("/predict/scene", png(rgb(1))).status_code == 200


def test_who_sends_no_request_does_not_stay(server: Served) -> None:
    """Silent, in the middle of a head, and in that of the second request of one connection."""
    whole = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    callers = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(3)]
    callers[1].sendall(whole[:20].encode())
    callers[2].sendall(whole.encode())
    heard = b""
    while b"alive" not in heard:
        heard += callers[2].recv(4096)
    callers[2].sendall(whole[:20].encode())
    began = time.monotonic()
    for caller in callers:
        heard = caller.recv(4096)
        assert heard.startswith(b"HTTP/1.1 408") and b"no whole request after 4 s" in heard
        assert caller.recv(4096) == b"", "and it is closed"
        caller.close()
    assert time.monotonic() - began < 8


def test_connections_beyond_the_limit_are_told_so_and_closed(server: Served) -> None:
    address = ("127.0.0.1", server.port)
    first = socket.create_connection(address, 20)
    held = [socket.create_connection(address, 20) for _ in range(CONNECTIONS + 20)]
    full = 0
    for caller in held[-20:]:
        full += b" 503 " in caller.recv(4096).split(b"\r\n")[0]
    assert full == 20
    first.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert first.recv(12) == b"HTTP/1.1 200", "who was there before is answered"
    for caller in (first, *held):
        caller.close()
    assert server.post("/predict/scene", png(rgb(1))).status_code == 200


def test_scenes_by_name_need_a_root(server: Served) -> None:
    answer = server.post("/predict/scene", {"image": {"path": "scene.tif"}})
    assert answer.status_code == 403 and "--root" in answer.text


def test_a_request_without_an_answer_in_time_is_given_up(tmp_path: Path) -> None:
    """A model of seconds an image, a time limit of one: 504, and the next request is answered."""
    served = Served(
        init(tmp_path / "workspace"),
        *("--model", str(write_task_model(tmp_path / "segmentation", "segmentation"))),
        *("--time-limit", "1", "--max-side", "3000"),
    )
    late = served.post("/predict/segmentation", png(rgb(1, 3000, 3000)))
    assert late.status_code == 504 and "no answer after 1 s" in late.text
    assert served.get("/health").status_code == 200
    assert served.stop() == 0
