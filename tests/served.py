"""Real servers for tests: `ringmo serve` as a process of its own, and small models for it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from small_models import SENSORS, SWIN, rgb, sar

from ringmo.workspace import Workspace

CLASSES = {"scene": ["airport", "forest", "river"], "height": []}
MASKS = ["field", "road", "water"]


class Served:
    """`ringmo serve` on a free port; `stop` is SIGTERM, and gives the exit code."""

    def __init__(
        self,
        workspace: Workspace,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.headers = dict(headers or {})
        env = {k: v for k, v in os.environ.items() if k != "RINGMO_SERVE_TOKEN"}
        env |= {"OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", "ringmo", "serve", "--port", "0", "--json"]
        self.process = subprocess.Popen(
            [*command, "--workspace", str(workspace.root), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"no server: {self.log}"
        self.told = json.loads(line)
        assert "url" in self.told, self.told
        self.url = self.told["url"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Bytes as they are, anything else as JSON."""
        named = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        if not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"content-type": "application/json", **named}
        return httpx.post(self.url + path, content=body, headers=named, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers | headers, timeout=60)

    def metric(self, name: str) -> float:
        """A sample by its name with labels, as `x_total{model="scene"}`; 0 where there is none."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


def png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tiff(pixels: Any, **how: Any) -> bytes:
    """Pixels (H, W, bands) as a GeoTIFF in UTM zone 33, 10 m a pixel."""
    profile = {
        "driver": "GTiff",
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "count": pixels.shape[2],
        "dtype": pixels.dtype,
        "crs": "EPSG:32633",
        "transform": from_origin(500_000, 5_000_000, 10, 10),
        "photometric": "MINISBLACK" if pixels.dtype == np.uint8 else None,
    }
    with MemoryFile() as memory:
        with memory.open(**{k: v for k, v in (profile | how).items() if v is not None}) as file:
            file.write(pixels.transpose(2, 0, 1))
        memory.seek(0)
        return bytes(memory.read())


def write_task_model(
    folder: Path,
    kind: str,
    *,
    encoder_seed: int = 1,
    seed: int = 2,
    sensors: Sequence[str] = ("rgb",),
) -> Path:
    """A real, untrained model for a task. Of one encoder_seed all have the same encoder."""
    import torch
    from torch import nn

    from ringmo import tasks
    from ringmo.config import Finetune, Model
    from ringmo.models.backbone import encoder
    from ringmo.registry import bundle

    torch.manual_seed(encoder_seed)
    architecture = Model.model_validate(SWIN)
    trunk = encoder(architecture, {n: len(SENSORS[n].bands) for n in sensors}, finetuning=True)
    for parameter in trunk.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    torch.manual_seed(seed)
    classes = CLASSES.get(kind, MASKS)
    model = tasks.find(kind).model(trunk, len(classes), Finetune.model_validate(bundle.PLAIN))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("encoder."):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    meta = {
        "kind": kind,
        "architecture": architecture.model_dump(),
        "image_size": architecture.image_size,
        "tile_pixels": architecture.image_size,
        "sensors": {name: SENSORS[name].described() for name in sensors},
        "sensor": sensors[0],
        "classes": classes,
        "generated": False,
        "lineage": {"selection": "5e1ec7", "encoder": None, "params": "9a", "revision": 1},
        "figures": {"val_accuracy": 0.5},
    }
    drawn = {"rgb": rgb(seed), "second": rgb(seed + 1), "sar": sar(seed)}
    example = {name: drawn[name] for name in (*sensors, *["second"] * (kind == "change"))}
    bundle.write(folder, model, meta, example)
    return folder
