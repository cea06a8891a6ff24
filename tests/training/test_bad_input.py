"""What cannot be trained is said in one line, before or instead of hours of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import made_store
import pytest

from ringmo import config
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder
from ringmo.registry import bundle
from ringmo.training import trial
from ringmo.training.finetune import finetune
from ringmo.training.pretrain import pretrain


def filled(workspace: Any, side: int = 48, **values: Any) -> Config:
    made_store.make_selections(workspace, made_store.make_store(workspace, side=side))
    config.edit(workspace.params_file, {k.replace("__", "."): v for k, v in values.items()})
    return Config.load(workspace.params_file)


def refused(run: Any, said: str) -> None:
    with pytest.raises(BadInput) as error:
        run()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_fewer_tiles_than_a_batch(workspace: Any, tmp_path: Path) -> None:
    values = filled(workspace, pretrain__batch_size=64, finetune__scene__batch_size=37)
    said = "pretrain.batch_size: a batch has 64 images, and there are 36 tiles of sensor rgb"
    refused(lambda: pretrain(values, workspace, tmp_path), said)
    said = "finetune.scene.batch_size: a batch has 37 images, and there are 36 tiles of sensor rgb"
    refused(lambda: finetune(values, workspace, tmp_path, "scene", from_scratch=True), said)


def test_tiles_under_half_of_the_image(workspace: Any, tmp_path: Path) -> None:
    values = filled(workspace, side=15)
    said = "36 of 36 tiles of sensor rgb are smaller than half of the model's image"
    refused(lambda: pretrain(values, workspace, tmp_path), said)


def test_bfloat16_on_a_device_without_it(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    values = filled(workspace, hardware__precision="bf16")
    refused(lambda: pretrain(values, workspace, tmp_path), "hardware.precision: bf16")
    values = filled(workspace, hardware__precision="auto", hardware__accelerator="cuda")
    refused(lambda: pretrain(values, workspace, tmp_path), "PyTorch finds no GPU here")


def test_sizes_that_do_not_fit_the_encoder(workspace: Any, tmp_path: Path) -> None:
    values = filled(workspace)
    kept = Config.load(workspace.params_file)
    architecture = {**kept.model.model_dump(), "patch_size": 16, "image_size": 64}
    model = config.Model.model_validate(architecture)
    meta = {"kind": "encoder", "architecture": model.model_dump(), "image_size": 64}
    meta |= {"sensors": {"rgb": kept.sensors["rgb"].model_dump()}, "classes": None}
    meta |= {"generated": True, "lineage": {}, "figures": {}}
    bundle.write(tmp_path / "encoder", encoder(model, {"rgb": 3}), meta)
    # Fits params.yaml's model of stride 16, not this encoder's of stride 32.
    config.edit(workspace.params_file, {"finetune.scene.image_size": 48})
    values = Config.load(workspace.params_file)
    refused(
        lambda: finetune(
            values, workspace, tmp_path / "out", "scene", encoder=tmp_path / "encoder"
        ),
        "image_size must be a multiple of 32",
    )


@pytest.mark.parametrize(("limit", "found"), [(100, 96), (40, 24), (1, 1), (0, 0)])
def test_the_largest_batch_is_found_by_halving(limit: int, found: int) -> None:
    tried = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert trial.largest_that_fits(fits, 96) == found
    assert tried == [count for count in (96, 48, 24, 12, 6, 3, 1) if count >= max(found, 1)]


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
import lightning_fabric, ringmo.training.pretrain, pandas, pyarrow.parquet
from ringmo.cli import main
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 1_000_000_000,) * 2)
sys.exit(main(["pretrain", "--workspace", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_batch_larger_than_the_memory_names_the_largest_that_fits(workspace: Any) -> None:
    """In a process that may take 1 GB more, which 32 images of 384 pixels exceed."""
    filled(workspace, side=200, model__image_size=384, pretrain__batch_size=32)
    config.edit(workspace.params_file, {"model.embed_dim": 64})
    command = [sys.executable, "-c", LIMITED, str(workspace.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ringmo: ")]
    assert "pretrain.batch_size: 32 images at once do not fit the memory" in line
    assert any(f"the largest that fits is {n}: set" in line for n in (16, 8, 4, 2, 1)), line
    assert "or pretrain.accumulate to" in line
