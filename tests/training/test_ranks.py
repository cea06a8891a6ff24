"""Several processes train as one would: real ones, started by torchrun over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import made_store
import made_tasks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY

from ringmo import config
from ringmo.cli import main
from ringmo.registry import bundle
from ringmo.training import checkpoint
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow


def filled(root: Path, **values: Any) -> Workspace:
    made = init(root)
    changes = {key.replace("__", "."): value for key, value in values.items()}
    config.edit(made.params_file, {**TINY, **changes})
    made_store.make_selections(made, made_store.make_store(made))
    return made


def run(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ringmo", *arguments]
    whole = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=whole)


def losses(workspace: Workspace, name: str) -> list[float]:
    (path,) = (workspace.state / "runs").glob("*/figures.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_two_ranks_give_the_curve_and_the_statistics_of_one(tmp_path: Path) -> None:
    """Also with drop path and micro-batches: both are drawn and cut for the global batch."""
    values = {
        "pretrain__epochs": 7,
        "pretrain__accumulate": 2,
        "pretrain__drop_path": 0.3,
        "pretrain__base_lr": 0.01,
    }
    one = filled(tmp_path / "one", **values)
    two = filled(tmp_path / "two", **values, hardware__devices=2, hardware__accelerator="cpu")
    done = run("pretrain", "--json", "--workspace", str(two.root))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["steps"] == 21
    assert main(["pretrain", "--workspace", str(one.root)]) == 0

    for name in ("train/loss", "val/loss", "knn/accuracy"):
        single, double = losses(one, name), losses(two, name)
        assert len(single) == {"train/loss": 21, "val/loss": 7, "knn/accuracy": 2}[name]
        np.testing.assert_allclose(double, single, rtol=1e-4)
    assert losses(one, "train/loss")[-1] < 0.95 * losses(one, "train/loss")[0], "it never learnt"
    single, double = (
        load_file(w.work("pretrain") / "encoder" / "model.safetensors") for w in (one, two)
    )
    assert single.keys() == double.keys()
    variances = [name for name in single if name.endswith("running_var")]
    assert len(variances) == 3
    for name in [*variances, "example.answer"]:
        torch.testing.assert_close(double[name], single[name], rtol=1e-3, atol=1e-4)
    # BatchNorm takes away the bias before it, so that its gradient is mere rounding, of which Adam
    # makes whole steps: the means agree but for these.
    for name in variances:
        mean = name.replace("running_var", "running_mean")
        torch.testing.assert_close(double[mean], single[mean], rtol=0, atol=5e-3)
        counted = name.replace("running_var", "num_batches_tracked")
        assert double[counted] == single[counted] == 42


@pytest.mark.long
def test_two_ranks_mix_and_erase_what_one_would(tmp_path: Path) -> None:
    values = {
        "finetune__scene__epochs": 4,
        "finetune__scene__mixup": 0.8,
        "finetune__scene__cutmix": 1.0,
        "finetune__scene__random_erasing": 0.5,
        "finetune__scene__rand_augment": 9.0,
        "finetune__scene__test_resize": 40,
    }
    one = filled(tmp_path / "one", **values)
    two = filled(tmp_path / "two", **values, hardware__devices=2, hardware__accelerator="cpu")
    command = ["finetune", "scene", "--from-scratch", "--workspace"]
    done = run(*command, str(two.root))
    assert done.returncode == 0, done.stderr
    assert main([*command, str(one.root)]) == 0
    for name in ("train/loss", "val/accuracy"):
        single, double = losses(one, name), losses(two, name)
        assert len(single) >= 4
        np.testing.assert_allclose(double, single, rtol=1e-3)
    trained = bundle.load(one.work("scratch@scene") / "model")
    assert (trained.meta["image_size"], trained.meta["resize"]) == (32, 40)
    trained.check_example()
    assert trained.example["example.image"].shape[-1] == 40


@pytest.mark.long
def test_two_ranks_find_the_changes_that_one_would(tmp_path: Path) -> None:
    """Both dates, mask and balanced weights; BatchNorm of the decoder over both ranks."""
    made = {}
    for name, devices in (("one", {}), ("two", {"hardware.devices": 2})):
        workspace = init(tmp_path / name)
        config.edit(workspace.params_file, {**TINY, "hardware.accelerator": "cpu", **devices})
        settings = {"epochs": 3, "drop_path": 0.3, "class_weights": "balanced"}
        made_tasks.selected(workspace, tmp_path / "in", "change", **settings)
        done = run("finetune", "change", "--from-scratch", "--workspace", str(workspace.root))
        assert done.returncode == 0, done.stderr
        made[name] = workspace
    for figure in ("train/loss", "val/f1", "val/accuracy"):
        single, double = (losses(made[name], figure) for name in ("one", "two"))
        assert len(single) >= 3
        np.testing.assert_allclose(double, single, rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_two_ranks_learn_boxes_much_as_one_would(tmp_path: Path) -> None:
    """Each rank draws the anchors it learns from, so the curves are near and not the same."""
    curves = {}
    for name, devices in (("one", {}), ("two", {"hardware.devices": 2})):
        workspace = init(tmp_path / name)
        config.edit(workspace.params_file, {**TINY, "hardware.accelerator": "cpu", **devices})
        made_tasks.selected(workspace, tmp_path / "in", "detection", epochs=4)
        done = run("finetune", "detection", "--from-scratch", "--workspace", str(workspace.root))
        assert done.returncode == 0, done.stderr
        curves[name] = losses(workspace, "train/loss")
        assert len(losses(workspace, "val/map50")) == 4
        bundle.load(workspace.work("scratch@detection") / "model").check_example()
    one, two = curves["one"], curves["two"]
    assert len(one) == len(two) >= 12
    np.testing.assert_allclose(two[0], one[0], rtol=0.1)
    np.testing.assert_allclose(np.mean(two[-4:]), np.mean(one[-4:]), rtol=0.3)
    assert all(np.mean(curve[-4:]) < 0.8 * curve[0] for curve in (one, two))


def test_sigterm_saves_one_step_on_all_ranks_within_ten_seconds(tmp_path: Path) -> None:
    workspace = filled(
        tmp_path / "w",
        pretrain__epochs=100_000,
        pretrain__checkpoint_every_s=1000,
        hardware__devices=2,
        hardware__accelerator="cpu",
    )
    command = [sys.executable, "-m", "ringmo", "pretrain", "--workspace", str(workspace.root)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    runs, limit = workspace.state / "runs", time.monotonic() + 200
    while not any(len(p.read_text()) > 2000 for p in runs.glob("*/figures.jsonl")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[1]
        time.sleep(0.1)
    asked = time.time()
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "stopped at step" in said and "Traceback" not in said
    (folder,) = runs.glob("*/checkpoints")
    assert checkpoint.found(folder)[0].stat().st_mtime - asked < 10
    saved = checkpoint.read(folder)
    assert saved is not None and saved.step >= len(losses(workspace, "train/loss")) > 3
    assert f"stopped at step {saved.step} of" in said
    assert not workspace.work("pretrain").exists()


def test_unequal_ranks_end_with_one_line_each(tmp_path: Path) -> None:
    one = filled(tmp_path / "one", pretrain__batch_size=11)
    two = filled(tmp_path / "two", pretrain__batch_size=11, pretrain__base_lr=0.5)
    script = Path(__file__).with_name("unequal.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(one.root), str(two.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for workspace in (one, two):
        assert json.loads((workspace.root / "codes.json").read_text()) == [2, 2]
    said = done.stderr
    assert said.count("ringmo: rank 1 has another selection, encoder, parameters or") == 2
    assert said.count("ringmo: pretrain.batch_size: 11 images cannot be shared by 2 proc") == 2
    assert "Traceback" not in said


def test_too_few_devices_are_said_before_anything_starts(tmp_path: Path) -> None:
    workspace = filled(tmp_path / "w", hardware__accelerator="cuda", hardware__devices=1)
    done = run("pretrain", "--workspace", str(workspace.root), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hardware.accelerator: cuda was asked for, and PyTorch finds no GPU here" in done.stderr
