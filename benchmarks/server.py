"""The HTTP server against `mlflow models serve`, on one bundle and the same encoded images.

    python -m benchmarks.server '{"job": "make", "folder": "F", "images": "TILES", "cores": 2}'
    python -m benchmarks.server '{"job": "serve", "folder": "F", "contender": "mlflow",
                                  "workers": 2, "threads": 1, "clients": [1, 8, 64],
                                  "seconds": 6, "cores": 2}'

A bundle of recipes/small.yaml's size, untrained: what it says does not change what it costs. The
peer gets the very pyfunc that the registry keeps, with a signature beside it that says that the
column `image` is binary: else MLflow takes no encoded image over HTTP.

Each server runs in processes of its own, and so do the clients: so many connections that stay open,
each with one request at a time (a closed loop), the next as soon as the answer is there. Requests
are made before the clock starts, so that the clients cost little. Every answer is looked at: a
status other than 200 is no measurement, and the first answers of both must name the same class.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.child import begin
from benchmarks.imagery import ROOT
from benchmarks.table import Bench, Row

CLIENTS = (1, 8, 64)
GOAL = {1: None, 8: 2.0, 64: 2.0}
SIDE, IMAGES, CORES = 150, 256, 2
SECONDS, TRIED_SECONDS, WARM_S = 6.0, 3.0, 1.0
# Processes and PyTorch's threads in each, tried for both; ours is one process always.
TRIED = {
    "ours": [("ours", 1, 1), ("ours", 1, 2)],
    "mlflow": [("mlflow", w, t) for w, t in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))],
}
START_S = 240
RECIPE = "small"


def rows(bench: Bench) -> None:
    """Answers a second at 1, 8 and 64 clients, ours and the peer's in turn."""
    brief = bench.images is not None
    imagery = bench.prepare(SIDE, bench.images or IMAGES)
    folder = str(bench.scratch / "server")
    tiles = str(imagery.folder / "train" / "tiles")
    named = {
        n: Row(_title(n), "images/s", f"≥ {g:g} times" if g else "none") for n, g in GOAL.items()
    }
    bench.rows += named.values()
    made = bench.tried(
        "the server's bundle", "server", CORES, job="make", folder=folder, images=tiles
    )

    def once(contender: str, workers: int, threads: int, seconds: float) -> Any:
        return bench.tried(
            f"server, {contender} with {workers} workers of {threads} threads",
            "server",
            CORES,
            job="serve",
            folder=folder,
            contender=contender,
            workers=workers,
            threads=threads,
            clients=CLIENTS,
            seconds=seconds,
        )

    settings = [
        setting for name in TRIED for setting in (TRIED[name][:1] if brief else TRIED[name])
    ]
    long, short = (0.5, 0.5) if brief else (SECONDS, TRIED_SECONDS)
    tried = {setting: once(*setting, short) for setting in settings} if made else {}
    if not made or not all(tried.values()):
        for row in named.values():
            row.note = "not measured: failed, see below"
        return
    best = {
        (who, n): max(
            (one for one in settings if one[0] == who), key=lambda s: tried[s]["rate"][str(n)]
        )
        for who in TRIED
        for n in CLIENTS
    }
    runs: dict[Any, list[dict[str, Any]]] = {setting: [] for setting in best.values()}
    for _ in range(bench.rounds):
        for setting in runs:
            if found := once(*setting, long):
                runs[setting].append(found)
    for count, row in named.items():
        ours, peer = (runs[best[who, count]] for who in TRIED)
        if not ours or not peer:
            row.note = "not measured: failed, see below"
            continue
        _compare(row, count, ours, peer)
        for who in TRIED:
            _, workers, threads = best[who, count]
            of = ", ".join(f"{w}×{t}" for name, w, t in settings if name == who)
            row.note += f"; {who}: {workers}×{threads} (processes × threads), the best of {of}"
        row.note += f"; {made['about']}"


def _title(clients: int) -> str:
    who = "1 client" if clients == 1 else f"{clients} clients"
    return f"server, {who}, JPEG {SIDE}×{SIDE}, two cores, against mlflow models serve"


def _compare(row: Row, count: int, ours: list[Any], peer: list[Any]) -> None:
    """Reached only where ours is as often as asked for and its p99 is no longer than the peer's."""
    rates = [[run["rate"][str(count)] for run in runs] for runs in (ours, peer)]
    waits = [statistics.median(run["p99_ms"][str(count)] for run in runs) for runs in (ours, peer)]
    row.ours, row.baseline = (statistics.median(rate) for rate in rates)
    row.ratio = row.ours / row.baseline
    goal = GOAL[count]
    row.reached = None if goal is None else row.ratio >= goal and waits[0] <= waits[1]
    row.runs = {
        name: [round(r, 1) for r in rate]
        for name, rate in zip(("ours", "baseline"), rates, strict=True)
    }
    row.note = f"p99: ours {waits[0]:.0f} ms, mlflow {waits[1]:.0f} ms"


def make(spec: dict[str, Any]) -> dict[str, Any]:
    """The bundle, the peer's pyfunc of it, and a workspace."""
    import numpy as np

    from ringmo import config
    from ringmo.config import Config
    from ringmo.models.backbone import encoder
    from ringmo.models.classifier import Classifier
    from ringmo.registry import bundle, tracker
    from ringmo.workspace import init

    folder = Path(spec["folder"])
    workspace = init(folder / "workspace")
    config.edit(workspace.params_file, config.recipe(ROOT / "recipes" / f"{RECIPE}.yaml"))
    values = Config.load(workspace.params_file)
    classes = [f"class{i:02}" for i in range(30)]
    model = Classifier(encoder(values.model, {"rgb": 3}, finetuning=True), len(classes))
    # Untrained heads answer all images alike; then both agreeing would say nothing.
    model.head.weight.data.normal_(std=0.5)
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    meta = {
        "kind": "scene",
        "architecture": values.model.model_dump(),
        "image_size": values.model.image_size,
        "sensors": {"rgb": values.sensors["rgb"].model_dump()},
        "sensor": "rgb",
        "classes": classes,
        "generated": True,
        "lineage": {},
        "figures": {},
    }
    bundle.write(folder / "bundle", model, meta, image)
    tracker.save_pyfunc(folder / "bundle", folder / "pyfunc")
    column = json.dumps([{"type": "binary", "name": "image", "required": True}])
    with (folder / "pyfunc" / "MLmodel").open("a") as file:
        file.write(f"signature:\n  inputs: '{column}'\n  outputs: null\n  params: null\n")
    (folder / "images").mkdir()
    for path in sorted(Path(spec["images"]).rglob("*.jpg")):
        shutil.copy(path, folder / "images" / path.name)
    size = values.model.image_size
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"about": f"{RECIPE}.yaml's Swin at {size} pixels, {weights / 1e6:.1f} M weights"}


def serve(spec: dict[str, Any]) -> dict[str, Any]:
    """One contender's rates and waits, a client count after the other.

    Raises:
        SystemExit: it did not start, or an answer was no answer.
    """
    folder, contender = Path(spec["folder"]), spec["contender"]
    images = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"])}
    # Where MLflow looks for uvicorn.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = folder / f"{contender}.log"
    command = [sys.executable, "-m"]
    if contender == "ours":
        path, health, kind = "/predict/scene", "/ready", "image/jpeg"
        command += ["ringmo", "serve", "--model", str(folder / "bundle"), "--port", str(port)]
        command += ["--workspace", str(folder / "workspace")]
        bodies = images
    else:
        path, health, kind = "/invocations", "/ping", "application/json"
        command += ["mlflow", "models", "serve", "-m", str(folder / "pyfunc"), "--port", str(port)]
        command += ["--env-manager", "local", "--workers", str(spec["workers"])]
        bodies = [
            json.dumps({"dataframe_records": [{"image": base64.b64encode(i).decode()}]}).encode()
            for i in images
        ]
    requests = [
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body in bodies
    ]
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}{health}", server, log)
        said = [asyncio.run(_one(port, request)) for request in requests[:16]]
        rate, p50, p99 = {}, {}, {}
        for clients in spec["clients"]:
            asyncio.run(_load(port, requests, clients, WARM_S))
            waits, seconds = asyncio.run(_load(port, requests, clients, spec["seconds"]))
            rate[str(clients)] = len(waits) / seconds
            p50[str(clients)] = 1e3 * statistics.median(waits)
            p99[str(clients)] = 1e3 * sorted(waits)[int(0.99 * (len(waits) - 1))]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    _same(folder, said, contender)
    return {"rate": rate, "p50_ms": p50, "p99_ms": p99}


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    lines = log.read_text().strip().splitlines() or ["no word"]
    raise SystemExit(f"no server: {lines[-1][:200]}")


async def _one(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    body = await _answer(reader)
    writer.close()
    return body


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise SystemExit(f"{head.splitlines()[0].decode()}: {body[:200].decode(errors='replace')}")
    return body


async def _load(
    port: int, requests: list[bytes], clients: int, seconds: float
) -> tuple[list[float], float]:
    """Seconds of each request, and how long it all took."""
    waits: list[float] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        at = number * 7
        while True:
            asked = time.perf_counter()
            if asked - began >= seconds:
                writer.close()
                return
            writer.write(requests[at % len(requests)])
            await _answer(reader)
            waits.append(time.perf_counter() - asked)
            at += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return waits, time.perf_counter() - began


def _same(folder: Path, said: list[bytes], contender: str) -> None:
    """Both contenders' labels of the first images, kept by whoever comes first.

    Raises:
        SystemExit: they differ.
    """
    told = [json.loads(one) for one in said]
    labels = [t["label"] if "label" in t else t["predictions"][0]["label"] for t in told]
    kept = folder / "labels.json"
    if not kept.exists():
        kept.write_text(json.dumps(labels))
    if json.loads(kept.read_text()) != labels:
        raise SystemExit(f"{contender} names other classes")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    print(json.dumps({"make": make, "serve": serve}[asked["job"]](asked)), flush=True)
