"""A machine with what `pip install ringmo[train]` brings, and nothing of the platform, trains."""

import subprocess
import sys
from typing import Any

import made_store
import pytest

REFUSED = ("mlflow", "prefect", "dvc", "great_expectations", "sklearn", "matplotlib", "boto3")

SCRIPT = """
import importlib.machinery, sys

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {refused} else super().find_spec(name, path, target)

sys.meta_path = [Bare if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
for name in {refused}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " can be imported: the test tests nothing")
from ringmo.cli import main
for command in (["pretrain"], ["finetune", "scene"], ["finetune", "scene", "--from-scratch"]):
    code = main([*command, "--workspace", sys.argv[1]])
    if code:
        sys.exit(code)
"""


@pytest.mark.slow
def test_a_bare_machine_trains(workspace: Any) -> None:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    script = SCRIPT.format(refused=REFUSED)
    command = [sys.executable, "-c", script, str(workspace.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain/encoder", "finetune-scene/model", "scratch-scene/model"):
        assert (workspace.root / "work" / stage / "model.json").exists()
