"""A small chain, made by the real stages, on record with DVC and registered in MLflow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from imagery import write_class_folders
from stages import prepared, taught
from tiny import TINY

from ringmo import chain, config
from ringmo.config import Config
from ringmo.data import versions
from ringmo.registry import promotion
from ringmo.workspace import Workspace, init


def registered_chain(folder: Path, database: Path, **values: Any) -> Workspace:
    """`folder/workspace`, whose scene/1 and encoder/1 are champions.

    Trained on folder/town and folder/country, which have 16 and 8 images of each class. database:
    an empty one of MLflow.
    """
    import torch

    sources = [
        write_class_folders(folder / "town", 16, seed=1),
        write_class_folders(folder / "country", 8, seed=2),
    ]
    workspace = init(folder / "workspace")
    places = {"ingest.sources": [str(source) for source in sources]}
    config.edit(workspace.params_file, TINY | places | values)
    (workspace.state / "mlflow").mkdir(parents=True)
    shutil.copyfile(database, workspace.state / "mlflow" / "mlflow.db")
    settings = Config.load(workspace.params_file)
    versions.sync_revisions(workspace)
    torch.set_num_threads(1)
    prepared(settings, workspace)
    versions.add_store(workspace, settings)
    taught(settings, workspace, "scene")
    recorded(workspace)
    first_champions(settings, workspace)
    return workspace


def first_champions(settings: Config, workspace: Workspace) -> None:
    """Register, judge and promote the encoder and each task's model, as the chain does."""
    for model in chain.ends(settings, workspace):
        assert chain.register(settings, workspace, model, flow_run="f7").ok
        waits = chain.passed(workspace, model)
        assert waits is not None
        promotion.promote(workspace, model, 1, by="gate", reason="; ".join(waits[1]))


def recorded(workspace: Workspace) -> None:
    """The stages' outputs, made without DVC, in its lock and cache as if it had run them."""
    subprocess.run(
        [sys.executable, "-m", "dvc", "--cd", str(workspace.root), "commit", "--force", "--quiet"],
        env=os.environ | {"DVC_NO_ANALYTICS": "1"},
        check=True,
    )
