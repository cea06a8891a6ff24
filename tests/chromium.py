"""Chromium without a window, as a test drives it: over its own protocol (CDP) on a WebSocket."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect


class Chromium:
    """One page. `with Chromium(folder, url) as page: page.value("document.title")`."""

    def __init__(self, folder: Path, url: str, size: tuple[int, int] = (1100, 900)) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, "no Chromium: apt-get install chromium"
        self.process = subprocess.Popen(
            [
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", "--remote-debugging-port=0"),
                *("--disable-background-networking", "--disable-component-update"),
                *(f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(folder)},
        )
        self._numbers = itertools.count(1)
        self.requested: list[str] = []
        self.complaints: list[str] = []
        port = self._port(folder)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.process.terminate()
        self.process.wait(20)

    def _port(self, folder: Path) -> int:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            try:
                return int((folder / "DevToolsActivePort").read_text().split()[0])
            except (OSError, IndexError):
                assert self.process.poll() is None, "Chromium ended"
                time.sleep(0.05)
        raise TimeoutError("Chromium did not start")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=60))
            if told.get("method") == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            if told.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["params"])[:500])
            if (
                told.get("method") == "Log.entryAdded"
                and told["params"]["entry"]["level"] == "error"
            ):
                self.complaints.append(told["params"]["entry"]["text"])
            if told.get("id") == number:
                assert "error" not in told, told["error"]
                return told["result"]

    def value(self, expression: str) -> Any:
        """What JavaScript says in the page, awaited."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        # Before the page is there, nothing in it is.
        asked = f"(() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }})()"
        while not self.value(asked):
            assert time.monotonic() < limit, (
                f"{condition}: {self.value('document.body?.innerText')}"
            )
            time.sleep(0.1)

    def choose(self, selector: str, path: Path) -> None:
        """A file for an <input type=file>, as a person chooses one."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop(self, selector: str, path: Path) -> None:
        """A file dropped on an element."""
        data = base64.b64encode(path.read_bytes()).decode()
        self.value(f"""(() => {{
            const bytes = Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "{path.name}"));
            document.querySelector("{selector}").dispatchEvent(
                new DragEvent("drop", {{dataTransfer: transfer, bubbles: true, cancelable: true}}));
        }})()""")
