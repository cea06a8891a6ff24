"""Open connections: how many there may be, and how long one may be silent."""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ringmo.inference.server.app import refusal

# Beside the files and sockets of the models, below the 1,024 that a process may commonly have open.
CONNECTIONS = 500


def protocol(silence_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, which itself waits for ever for the head of a request.

    A connection that has not sent the whole head of its next request after `silence_s` seconds is
    closed with 408; one beyond CONNECTIONS, with 503 at once.
    """

    class Connection(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > CONNECTIONS:
                self._send_away(503, f"{CONNECTIONS} connections are open: try again")
            else:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait()
            else:
                self._stop_waiting()

        def _wait(self) -> None:
            if self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(silence_s, self._close_late)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close_late(self) -> None:
            self._send_away(408, f"no whole request after {silence_s:g} s")

        def _send_away(self, status: int, text: str) -> None:
            """No request is there that uvicorn could answer."""
            answer = refusal(status, text, close=True)
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
            lines += [name + b": " + value for name, value in answer.raw_headers]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
            self.transport.close()

    return Connection
