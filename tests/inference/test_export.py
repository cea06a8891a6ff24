"""Models for programs without ringmo: the same answers, or no file."""

import errno
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from served import write_task_model
from small_models import VIT, rgb, write_model

from ringmo.cli import main
from ringmo.errors import BadInput
from ringmo.inference import export
from ringmo.registry import bundle
from ringmo.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_onnx_of_a_scene_model_answers_alone(
    workspace: Workspace, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_task_model(tmp_path / "scene", "scene"), tmp_path / "out" / "scene.onnx"
    monkeypatch.chdir(workspace.root)
    assert main(["--json", "export", str(folder), "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["difference"] < 1e-5 and told["inputs"][0]["bands"] == ["red", "green", "blue"]
    assert [path.name for path in out.parent.iterdir()] == ["scene.onnx"]
    pixels = np.stack([rgb(seed, 32, 32) for seed in range(5)])
    session = onnxruntime.InferenceSession(str(out))
    given = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    (said,) = session.run(["scene"], {"rgb": given})
    wanted = bundle.load(folder).predict(list(pixels))
    np.testing.assert_allclose(said, wanted, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map["ringmo"]
    assert json.loads(about)["classes"] == told["classes"]


def test_torch_export_of_a_pair_answers_alone(workspace: Workspace, tmp_path: Path) -> None:
    folder, out = write_task_model(tmp_path / "change", "change"), tmp_path / "change.pt2"
    export.export(workspace, str(folder), "torch", out)
    run = torch.export.load(out).module()
    one, other = rgb(1, 32, 32), rgb(2, 32, 32)
    tensors = [torch.from_numpy(p.transpose(2, 0, 1)[None]).float() for p in (one, other)]
    said = run(*tensors)[0].argmax(0).numpy()
    (wanted,) = bundle.load(folder).predict([{"rgb": one, "second": other}])
    assert (said == wanted["mask"]).mean() > 0.999
    names = zipfile.ZipFile(out).namelist()
    assert any(name.endswith("ringmo.json") for name in names)


@pytest.mark.parametrize("form", export.FORMATS)
def test_a_vit_encoder_is_exported(workspace: Workspace, tmp_path: Path, form: str) -> None:
    folder, out = write_model(tmp_path / "encoder", VIT), tmp_path / f"encoder.{form}"
    done = export.export(workspace, str(folder), form, out)
    assert done["output"] == "features" and done["difference"] < 1e-5 and out.stat().st_size > 0


@pytest.mark.parametrize("kind", ["detection", "oriented"])
def test_detectors_are_refused_in_one_line(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    folder = write_task_model(tmp_path / kind, kind)
    with pytest.raises(BadInput, match=f"{kind} models are not exported"):
        export.export(workspace, str(folder), "onnx", tmp_path / "x.onnx")


def test_other_answers_are_no_export(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an exporter with a fault would write is not kept."""
    folder, out = write_task_model(tmp_path / "scene", "scene"), tmp_path / "scene.pt2"
    traced = torch.export.export

    def faulty(model: Any, *arguments: Any, **more: Any) -> Any:
        bias = model.model.head.bias
        bias.data += torch.arange(len(bias))
        program = traced(model, *arguments, **more)
        torch.export.save(program, tmp_path / "kept")
        loaded = torch.export.load(tmp_path / "kept")
        bias.data -= torch.arange(len(bias))
        return loaded

    monkeypatch.setattr(torch.export, "export", faulty)
    with pytest.raises(BadInput, match="answers are off by"):
        export.export(workspace, str(folder), "torch", out)
    assert not out.exists() and not list(tmp_path.glob(".*.tmp"))


def test_what_cannot_be_written_is_one_line(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task_model(tmp_path / "scene", "scene")
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "deeper" / "scene.pt2"

    def asked(out: Path, says: str) -> None:
        with pytest.raises(BadInput, match=says) as raised:
            export.export(workspace, str(folder), "torch", out)
        assert str(out) in str(raised.value) and "architecture" not in str(raised.value)

    asked(tmp_path, "a folder: name a file")
    asked(inside, "Not a directory")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    asked(tmp_path / "scene.pt2", "No space left on device")
    assert not list(tmp_path.glob(".*.tmp"))
