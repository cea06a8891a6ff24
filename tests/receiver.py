"""A webhook's other end."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Receiver:
    """A real HTTP server that keeps what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.status, self.delay_s, self.to = 204, 0.0, ""
        self.busy = 0  # how many it turns away first
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append((headers, body))
                time.sleep(receiver.delay_s)
                receiver.busy -= 1
                self.send_response(503 if receiver.busy >= 0 else receiver.status)
                if receiver.to:
                    self.send_header("Location", receiver.to)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/promotions"
        Thread(target=self.server.serve_forever, daemon=True).start()
