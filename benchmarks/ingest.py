"""Imagery on its way into a versioned store, measured in a process of its own.

    python -m benchmarks.ingest '{"measure": "ingest", "source": …, "workspace": …, "workers": 2}'

ingest: from a folder to a whole store. costs: what each measure of a tile takes. windows: the
tiles of a store's large scene, read by a plain rasterio loop. versions: a store, or the same
images as single files, under DVC and on an S3 server.
"""

import contextlib
import functools
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.child import peak_mb
from ringmo import config
from ringmo.config import Config
from ringmo.workspace import Workspace, init

# Functions of ringmo.data.measures → what is said of them; others go by their own names.
PARTS = {
    "measure": "saturation, entropy and band statistics",
    "_histograms": "histograms",
    "_laplacian_variance": "sharpness",
    "perceptual_hash": "perceptual hash",
    "thumbnail": "perceptual hash",
    "cloud_share": "cloud",
    "_block_means": "cloud",
}


def ingest(spec: dict[str, Any]) -> dict[str, Any]:
    """A folder into a new workspace, by so many processes; from the call to the whole store."""
    workspace = init(Path(spec["workspace"]))
    sources = {"ingest.sources": [spec["source"]], "ingest.workers": spec["workers"]}
    config.edit(workspace.params_file, sources)
    return timed(workspace)


def timed(workspace: Workspace) -> dict[str, Any]:
    """One ingest of a workspace's sources, as its params.yaml has them."""
    from ringmo.data.ingest import ingest

    settings = Config.load(workspace.params_file)
    started = time.perf_counter()
    figures = ingest(settings, workspace).figures
    seconds = time.perf_counter() - started
    if figures["set_aside"]:
        raise SystemExit(f"ingest set {figures['set_aside']} images aside: {figures}")
    return {
        "seconds": seconds,
        "images_per_s": figures["images_found"] / seconds,
        "tiles_per_s": figures["new_tiles"] / seconds,
        "figures": figures,
        "memory_mb": peak_mb(),
    }


class Clock:
    """Seconds of each function, less what the other functions it calls take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - started
                self.seconds[name] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return call


def costs(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds an image of reading, hashing, decoding and each measure, on one core."""
    from ringmo.data import decode, measures, store

    clock = Clock()
    for name, function in inspect.getmembers(measures, inspect.isfunction):
        if function.__module__ == measures.__name__:
            setattr(measures, name, clock.timing(PARTS.get(name, name.strip("_")), function))
    read = clock.timing("reading", Path.read_bytes)
    digest = clock.timing("content hash", store.sha256)
    pixels_of = clock.timing("decoding", decode.decode)
    sensor = Config.load(Workspace(Path(spec["workspace"])).params_file).sensors["rgb"]
    paths = sorted(Path(spec["source"]).rglob("*.jpg"))[: spec["images"]]
    for warm in (True, False):
        if not warm:
            clock.seconds.clear()
        for path in paths[: 20 if warm else None]:
            data = read(path)
            digest(data)
            measures.measure(pixels_of(data), None, sensor)
    return {"ms": {name: 1e3 * s / len(paths) for name, s in clock.seconds.items()}}


def windows(spec: dict[str, Any]) -> dict[str, Any]:
    """Windows a second of one open file, in the order of the store's manifest."""
    import rasterio
    from rasterio.windows import Window

    from ringmo.data.store import TileStore

    frame = TileStore(Workspace(Path(spec["workspace"])).store).manifest()
    places = list(frame[["col", "row", "width", "height"]].itertuples(index=False, name=None))
    started = time.perf_counter()
    with rasterio.open(spec["scene"]) as scene:
        for place in places:
            scene.read(window=Window(*place))
    return {"tiles_per_s": len(places) / (time.perf_counter() - started)}


def versions(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `dvc add` and `dvc push`, with a cache and a bucket that are empty."""
    from ringmo.data import versions as door

    workspace = init(Path(spec["workspace"]))
    target = workspace.store if spec["as"] == "store" else workspace.root / "images"
    shutil.copytree(spec["from"], target)
    with s3(workspace.root / "s3") as endpoint:
        os.environ["DVC_SITE_CACHE_DIR"] = str(workspace.root / "site")
        remote = {"versioning.remote": "s3://bucket/tiles", "versioning.endpoint": endpoint}
        config.edit(workspace.params_file, remote)
        settings = Config.load(workspace.params_file)
        started = time.perf_counter()
        if spec["as"] == "store":
            door.add_store(workspace, settings)
        else:
            add = [sys.executable, "-m", "dvc", "--cd", str(workspace.root), "add", "images"]
            subprocess.run(add, check=True, capture_output=True)
        added = time.perf_counter()
        door.push(workspace, settings)
        seconds = time.perf_counter() - started
    files = [path for path in (workspace.root / "s3" / "bucket").rglob("*") if path.is_file()]
    wanted = sum(path.is_file() for path in target.rglob("*"))
    if len(files) < wanted:
        raise SystemExit(f"{len(files)} of {wanted} files came to the bucket")
    return {"seconds": seconds, "add_s": added - started, "objects": len(files)}


@contextlib.contextmanager
def s3(folder: Path, *more: str) -> Iterator[str]:
    """A real S3 server over a folder with one bucket, which refuses wrong secrets; its address."""
    (folder / "bucket").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    os.environ.update(keys, AWS_DEFAULT_REGION="us-east-1")
    command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(folder)]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", "key,secret", "--config", os.devnull]
    command += more
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    from benchmarks.child import begin

    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    measured = {"ingest": ingest, "costs": costs, "windows": windows, "versions": versions}
    print(json.dumps(measured[asked["measure"]](asked)), flush=True)
