"""Real, untrained models, and versions of them."""

from pathlib import Path

import numpy as np

from ringmo.config import Config
from ringmo.stage import Report
from ringmo.workspace import Workspace

CLASSES = ["airport", "forest", "river"]


def write_model(
    workspace: Workspace,
    seed: int = 0,
    *,
    kind: str = "scene",
    generated: bool = False,
    encoder_hash: str | None = None,
    folder: Path | None = None,
    accuracy: float = 0.5,
) -> Path:
    """A real, untrained model where fine-tuning or pre-training would write it, or in `folder`."""
    import torch

    torch.set_num_threads(1)  # a model this small only waits for a second thread

    from ringmo.models.backbone import encoder
    from ringmo.models.classifier import Classifier
    from ringmo.registry import bundle

    config = Config.load(workspace.params_file)
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


def register_three(workspace: Workspace) -> None:
    """Versions 1, 2 and 3 of `scene`, as the gate leaves them that have nothing to be compared."""
    from ringmo.registry.register import register

    for seed in (1, 2, 3):
        write_model(workspace, seed)
        config = Config.load(workspace.params_file)
        register(config, workspace, "scene", {"verdict": "passed"})
