"""What Prefect's pages do: its REST interface, asked by tests."""

import json
import time
import urllib.request
from typing import Any
from urllib.error import HTTPError

from ringmo.environment import basic_auth
from ringmo.workspace import Workspace


def api(place: Workspace, path: str, body: Any = None, method: str | None = None) -> Any:
    """The answer of a workspace's own server, None where it is empty; a body is posted as JSON."""
    url = json.loads((place.state / "services.json").read_text())["prefect"]["url"]
    return ask(f"{url}/api/{path}", body, method)


def ask(url: str, body: Any = None, method: str | None = None, login: str | None = None) -> Any:
    """The same of any server; login: user:password."""
    request = urllib.request.Request(
        url,
        json.dumps(body).encode() if body is not None else None,
        {"Content-Type": "application/json"} | (basic_auth(login) if login else {}),
        method=method,
    )
    limit = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                said = answer.read()
                return json.loads(said) if said else None
        except HTTPError as error:
            # Its SQLite is busy for a moment: Prefect's own clients ask again too.
            if error.code != 503 or time.monotonic() > limit:
                raise
        time.sleep(0.5)
