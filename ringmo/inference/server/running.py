"""`ringmo serve`: from the command line to a clean end."""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from ringmo import console
from ringmo.config import Monitoring
from ringmo.data.buckets import Bucket
from ringmo.environment import SERVE_TOKEN
from ringmo.errors import BadInput
from ringmo.inference.server.app import LOOPBACK, Limits, Server, application
from ringmo.inference.server.batching import Engine
from ringmo.inference.server.connections import protocol
from ringmo.inference.server.measures import Measures
from ringmo.inference.server.models import Models
from ringmo.workspace import Workspace

GRACE_S = 5.0  # beyond a request's time, which body and answer each may take


class _Announcing(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self.models = models

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.servers:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        rows = [(slot.name, slot.loaded.version) for slot in self.models.slots.values()]
        name = rows[0][0]
        text = console.table(rows, ("model", "version"))
        next_ = f"curl --data-binary @IMAGE {url}/predict/{name}   (or open {url}/)"
        console.result({"url": url, "models": dict(rows)}, f"{text}\n\n{url}\nNext: {next_}")


def serve(
    workspace: Workspace,
    refs: Sequence[str],
    *,
    host: str,
    port: int,
    root: Path | Bucket | None,
    limits: Limits,
    batch_size: int,
    poll_s: float,
    device: str,
    monitoring: Monitoring,
) -> None:
    """Serve models until SIGTERM or SIGINT, then finish what was let in.

    Raises:
        BadInput: a model that cannot answer, no folder, or an address that cannot be had.
        Unreachable: the registry does not answer.
    """
    if isinstance(root, Bucket):
        next(root.objects(), None)  # no such bucket, no credentials: said now
    elif root is not None and not root.is_dir():
        raise BadInput(f"--root {root}: no such folder")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError):
        raise BadInput(f"--host {host}: no name or address that is known here") from None
    token = SERVE_TOKEN.read()
    if host not in LOOPBACK and token is None:
        console.note(
            f"serve: {host} is no loopback address, and anybody may ask: set {SERVE_TOKEN.name}"
        )
    measures = Measures()
    models = Models(workspace, refs, device, measures, monitoring)
    models.load()
    folder = root.resolve() if isinstance(root, Path) else root
    server = Server(models, Engine(batch_size, measures), measures, limits, folder)
    config = uvicorn.Config(
        application(server, token, host),
        host=host,
        port=port,
        http=protocol(limits.seconds),
        log_level="error",
        log_config=None if console.log_is_json() else uvicorn.config.LOGGING_CONFIG,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(2 * limits.seconds + GRACE_S),
    )
    running = _Announcing(config, models)
    # uvicorn raises the signal once more when all is done: then it has nothing to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    models.follow(poll_s)
    try:
        running.run()
    except SystemExit:
        raise BadInput(
            f"{host}:{port} cannot be had: is another server there (--port), or is it no address "
            f"of this machine (--host)?"
        ) from None
    finally:
        models.stop()
        models.close()
    lost = f"{server.cut_off} of the requests that were let in were cut off"
    every = "every request that was let in was answered"
    console.note(f"serve: ended; {lost if server.cut_off else every}")
    if server.engine.alive:
        # A batch that nobody waits for still computes, and Python's own end would abort under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
