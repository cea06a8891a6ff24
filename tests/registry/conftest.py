"""Small real models, and MLflow's database made once: its first use takes seconds."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringmo.config import Config
from ringmo.stage import Report
from ringmo.workspace import Workspace

CLASSES = ["airport", "forest", "river"]


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in SQLite, without a run."""
    from ringmo.registry.tracker import Tracker

    root = tmp_path_factory.mktemp("mlflow")
    uri = os.environ.pop("MLFLOW_TRACKING_URI", None)
    Tracker(Workspace(root))
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    return root / ".ringmo" / "mlflow" / "mlflow.db"


@pytest.fixture
def tracked(workspace: Workspace, fresh_database: Path, monkeypatch: Any) -> Workspace:
    """A workspace whose MLflow is a SQLite file of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = workspace.state / "mlflow"
    folder.mkdir(parents=True)
    shutil.copyfile(fresh_database, folder / "mlflow.db")
    return workspace


@pytest.fixture
def config(workspace: Workspace) -> Config:
    return Config.load(workspace.params_file)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, fresh_database: Path) -> Iterator[Workspace]:
    """A chain that ran, with its own sources, DVC's record and its registered models."""
    import torch
    from registered import registered_chain

    threads = torch.get_num_threads()
    uri = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield registered_chain(tmp_path_factory.mktemp("made"), fresh_database)
    finally:
        torch.set_num_threads(threads)
        if uri:
            os.environ["MLFLOW_TRACKING_URI"] = uri


MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(workspace: Workspace, config: Config) -> MakeModel:
    """`make_model(seed)` writes a real, untrained model where fine-tuning or pre-training would."""

    def make(
        seed: int = 0,
        *,
        kind: str = "scene",
        generated: bool = False,
        encoder_hash: str | None = None,
        folder: Path | None = None,
        accuracy: float = 0.5,
    ) -> Path:
        import torch

        torch.set_num_threads(1)  # a model this small only waits for a second thread

        from ringmo.models.backbone import encoder
        from ringmo.models.classifier import Classifier
        from ringmo.registry import bundle

        torch.manual_seed(seed)
        trunk = encoder(config.model, {"rgb": 3}, finetuning=kind == "scene")
        scene = kind == "scene"
        model = Classifier(trunk, len(CLASSES)) if scene else trunk
        stage = "finetune@scene" if scene else "pretrain"
        into = folder or workspace.work(stage) / ("model" if scene else "encoder")
        meta = {
            "kind": kind,
            "architecture": config.model.model_dump(),
            "image_size": config.model.image_size,
            "sensors": {"rgb": config.sensors["rgb"].model_dump()},
            "sensor": "rgb" if scene else None,
            "classes": CLASSES if scene else None,
            "generated": generated,
            "lineage": {
                "selection": "5e1ec7",
                "encoder": encoder_hash,
                "params": "9a",
                "revision": 1,
            },
            "figures": {"val_accuracy": accuracy},
        }
        example = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        bundle.write(into, model, meta, example)
        if scene and folder is None:
            judged = bundle.load(into).hash
            figures = {"test_accuracy": accuracy, "bundle_hash": judged}
            report = Report("evaluate@scene", figures=figures)
            report.write(workspace.work("evaluate@scene") / "report.json")
        return into

    return make


class Server:
    """A real MLflow server on a free port, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, keeps_artifacts: bool = False) -> None:
        env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = (
            "false"  # seven processes that nothing here uses
        )
        artifacts = (
            ("--serve-artifacts", "--artifacts-destination", str(self.folder / "kept"))
            if keeps_artifacts
            else ("--no-serve-artifacts", "--default-artifact-root", str(self.folder / "artifacts"))
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", str(self.port), "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                *artifacts,
            ],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError(f"MLflow did not start at {self.url}")

    def stop(self) -> None:
        import psutil

        if self.process is not None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in children:
                child.kill()
            self.process.wait()
            psutil.wait_procs(children, timeout=10)
            self.process = None


@pytest.fixture
def server(tmp_path: Path, fresh_database: Path, request: Any) -> Iterator[Server]:
    """Running; with `indirect` parameter True, one that keeps artifacts itself."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(fresh_database, folder / "mlflow.db")
    made = Server(folder)
    try:
        made.start(keeps_artifacts=getattr(request, "param", False))
        yield made
    finally:
        made.stop()
