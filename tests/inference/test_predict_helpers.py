"""Processes that help with scenes: what they take, and what they leave to whom they help."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pixelwise import pixels, write_scene
from servers import S3
from small_models import SWIN, write_model

from ringmo import config
from ringmo.inference import predict as predicting
from ringmo.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "bundle", SWIN, classes=["airport", "forest"]))


def helpers(workspace: Workspace, model: str, out: Path, names: list[str], count: int) -> Any:
    line: Any = SimpleNamespace(
        workspace=workspace,
        ref=model,
        about=SimpleNamespace(model=model),
        out=out,
        beside={},
        probabilities=False,
    )
    return predicting._helpers(line, names, count)


@pytest.mark.long
def test_helpers_answer_scenes_alone(
    workspace: Workspace, model: str, tmp_path: Path, s3: S3
) -> None:
    folder = s3.folder / "bucket" / "new"
    write_scene(folder / "a.tif", pixels(300, 1100))
    write_scene(folder / "b.tif", pixels(40, 50))
    config.edit(workspace.params_file, {"ingest.endpoint": f"http://127.0.0.1:{s3.port}"})
    out = tmp_path / "out"
    names = [f"s3://bucket/new/{name}.tif" for name in "ab"]
    command = helpers(workspace, model, out, names, 1).command
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (out / "a.stac.json").is_file()
    assert not (out / "predictions.json").exists()
    told = predicting.predict(workspace, names, model, out=tmp_path / "more", scenes_alone=True)
    assert told[0]["image"] == names[0] and told[1] == {}
    answered = predicting.predict(workspace, names, model, out=out, workers=2)
    assert "label" in answered[1]
    assert len(json.loads((out / "predictions.json").read_text())) == 2


def test_threads_are_shared_with_the_helpers(
    workspace: Workspace, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def started(command: list[str], env: dict[str, str], **_: object) -> Any:
        seen.append(int(env["OMP_NUM_THREADS"]))
        return SimpleNamespace(terminate=lambda: None, wait=lambda _: None)

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(subprocess, "Popen", started)
    line = workspace, model, tmp_path, ["x.tif"], 3
    torch.set_num_threads(6)
    with helpers(*line):
        assert torch.get_num_threads() == 2
    assert seen == [2, 2, 2] and torch.get_num_threads() == 6
    torch.set_num_threads(1)
    with helpers(*line):
        assert torch.get_num_threads() == 1  # fewer were asked for
