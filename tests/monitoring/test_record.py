"""What production keeps of its tiles: right, by any number of processes, and never in its way."""

import errno
import logging
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from answering import answered, batch, read, write_model
from PIL import Image

from ringmo import tasks
from ringmo.config import Monitoring
from ringmo.monitoring import facts, record
from ringmo.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = Monitoring(share=1.0)


def kept(workspace: Workspace) -> pd.DataFrame:
    files = sorted((workspace.state / "production").rglob("[!.]*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


@pytest.mark.parametrize(("side", "vit"), [(32, True), (56, False)])
@pytest.mark.parametrize("task", tasks.names())
def test_embeddings_are_those_of_the_pass_that_answered(
    workspace: Workspace, tmp_path: Path, task: str, side: int, vit: bool
) -> None:
    model = write_model(tmp_path / "model", task, vit=vit)
    recorder = record.Recorder(workspace, model, f"{task}/1", ALL)
    answered(model, batch(task, 2, side, seed=1))  # somebody else's, which nobody keeps
    pixels = batch(task, 3, side)
    recorder.add(pixels, answered(model, pixels), ["a", "b", "c#0,0,9,9"])
    recorder.close()
    rows = kept(workspace)
    assert rows["name"].tolist() == ["a", "b", "c#0,0,9,9"]
    assert rows["scene"].tolist() == ["a", "b", "c"]
    wanted = []
    for name in read(task):
        images = pixels[name]
        if task == "scene":  # the middle
            edge = (side - 32) // 2
            cuts = [images[..., edge : edge + 32, edge : edge + 32]]
        elif side == 32:
            cuts = [images]
        else:
            cuts = [images[..., r : r + 32, c : c + 32] for r in (0, 24) for c in (0, 24)]
        for cut in cuts:
            normal = model.normalised({"rgb": cut})["rgb"]
            with torch.inference_mode():
                wanted.append(model.encoder(normal, "rgb").mean((1, 2)))
    # Batches of another size are summed in another order.
    found = np.stack(rows["embedding"].tolist())
    assert np.abs(found - torch.stack(wanted).mean(0).numpy()).max() < 1e-5
    if task != "height":
        assert {"class:" + name for name in model.classes} <= set(rows)
    assert rows.filter(like="p98:").shape[1] == 3 * len(read(task))


def test_statistics_are_in_the_units_of_the_mean_and_leave_nodata_out(
    workspace: Workspace, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", "scene", sensors=("rgb", "sar"))
    pixels = batch("scene", 2, 32, ("rgb", "sar"))
    pixels["rgb"][0, :, :8] = 0
    pixels["rgb"][1] = 0
    with record_of(workspace, model) as recorder:
        recorder.add(pixels, answered(model, pixels), ["a", "b"])
    first, second = kept(workspace).to_dict("records")
    assert (first["nodata:rgb"], second["nodata:rgb"]) == (0.25, 1)
    seen = pixels["rgb"][0, :, 8:].float()
    assert first["mean:rgb:green"] == pytest.approx(float(seen[1].mean()), rel=1e-5)
    assert first["deviation:rgb:blue"] == pytest.approx(float(seen[2].std()), rel=1e-3)
    assert (second["mean:rgb:red"], second["deviation:rgb:red"]) == (0, 0)
    decibels = 10 * np.log10(2 * pixels["sar"][0, 1].numpy()).clip(-40, 10)
    assert first["p50:sar:VH"] == pytest.approx(np.median(decibels), abs=1e-3)
    assert second["mean:sar:VH"] == pytest.approx(
        float((10 * (2 * pixels["sar"][1, 1]).log10()).mean()), rel=1e-4
    )


class record_of:
    def __init__(self, workspace: Workspace, model: Any, **settings: Any) -> None:
        values = {"share": 1.0, **settings}
        self.recorder = record.Recorder(workspace, model, "x/1", Monitoring(**values))

    def __enter__(self) -> record.Recorder:
        return self.recorder

    def __exit__(self, *_: object) -> None:
        self.recorder.close()


def test_a_restart_keeps_the_same_share(workspace: Workspace, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "scene")
    pixels, names = batch("scene", 64, 32), [f"scene.tif#{i},0,32,32" for i in range(64 * 10)]
    answer = answered(model, pixels)
    taken = []
    for _ in range(2):
        with record_of(workspace, model, share=0.2) as recorder:
            for start in range(0, len(names), 64):
                recorder.add(pixels, answer, names[start : start + 64])
        taken.append(kept(workspace)["name"].tolist())
    assert 90 < len(taken[0]) < 170
    assert sorted(taken[1]) == sorted(taken[0] * 2)


def test_pictures_only_where_they_are_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "change")
    pixels = batch("change", 2, 32)
    for asked in (False, True):
        with record_of(workspace, model, pixels=asked) as recorder:
            recorder.add(pixels, answered(model, pixels), ["a", "b"])
        found = sorted((workspace.state / "production").rglob("*.png"))
        assert len(found) == (2 if asked else 0)
    with Image.open(found[0]) as picture:
        assert picture.size == (64, 32)
    assert {path.stem for path in found} == set(kept(workspace)["digest"])


def test_old_days_go(workspace: Workspace, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "scene")
    where = record.folder(workspace, "scene")
    today = datetime.now(UTC).date()
    for back in (3, 9, 10, 40):
        (where / (today - timedelta(days=back)).isoformat()).mkdir(parents=True)
    (where / "mine").mkdir()
    pixels = batch("scene", 1, 32)
    with record_of(workspace, model, keep_days=10) as recorder:
        recorder.add(pixels, answered(model, pixels), ["a"])
    ages = [(today - day).days for day, _ in record.days(where)]
    assert ages == [9, 3, 0] and (where / "mine").is_dir()


def test_no_error_reaches_whoever_answers(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path / "model", "scene")
    pixels = batch("scene", 2, 32)
    (workspace.state / "production").mkdir(parents=True)
    (workspace.state / "production" / "scene").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING), record_of(workspace, model) as recorder:
        for _ in range(3):
            recorder.add(pixels, "no answer", ["a", "b"])
            recorder.add({}, None, [])
            recorder.add(pixels, answered(model, pixels), ["a", "b"])
            recorder.flush()
    assert 2 <= len(caplog.records) <= 3  # each once
    assert all("\n" not in one.getMessage() for one in caplog.records)


def test_a_closed_recorder_leaves_the_model_alone(workspace: Workspace, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "scene")
    with record_of(workspace, model, share=0.0):
        assert not model.encoder.trunk.norm._forward_hooks
    with record_of(workspace, model):
        assert len(model.encoder.trunk.norm._forward_hooks) == 1
    assert not model.encoder.trunk.norm._forward_hooks


def test_threads_do_not_mix_their_embeddings(workspace: Workspace, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "scene")
    batches = [batch("scene", 4, 32, seed=seed) for seed in range(8)]
    with record_of(workspace, model) as recorder:

        def ask(number: int) -> None:
            for _ in range(5):
                answer = answered(model, batches[number])
                recorder.add(batches[number], answer, [f"{number}/{i}" for i in range(4)])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = kept(workspace)
    assert len(rows) == 8 * 5 * 4
    for number, pixels in enumerate(batches):
        with torch.inference_mode():
            wanted = model.encoder(model.normalised(pixels)["rgb"], "rgb").mean((1, 2)).numpy()
        for i in range(4):
            found = np.stack(rows.loc[rows["name"] == f"{number}/{i}", "embedding"].tolist())
            assert np.abs(found - wanted[i]).max() < 1e-5


WORKER = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import torch
torch.set_num_threads(1)
from answering import answered, batch
from ringmo.config import Monitoring
from ringmo.monitoring import record
from ringmo.registry import bundle
from ringmo.workspace import Workspace
record.ROWS = 16
model = bundle.load(Path(sys.argv[1]).parent / "model")
recorder = record.Recorder(Workspace(Path(sys.argv[1])), model, "scene/1",
                                Monitoring(share=1.0))
pixels = batch("scene", 16, 32)
for i in range(int(sys.argv[2])):
    recorder.add(pixels, answered(model, pixels), [f"{i}/{k}" for k in range(16)])
    print(i, flush=True)
recorder.close()
"""


@pytest.mark.slow
def test_processes_write_side_by_side_and_one_is_killed(
    workspace: Workspace, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", "scene")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

    def start(rounds: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WORKER, str(workspace.root), str(rounds), *paths]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed, *others = [start(100_000), start(30), start(30)]
    assert killed.stdout is not None
    while int(killed.stdout.readline()) < 20:
        pass
    killed.send_signal(signal.SIGKILL)
    told = 20 + len(killed.stdout.readlines())
    killed.wait()
    for other in others:
        other.communicate(timeout=60)
        assert other.returncode == 0
    rows = kept(workspace)
    # Every file can be read, and nothing is lost but what the killed one had not written.
    assert len(rows) >= 2 * 30 * 16 + 20 * 16
    assert len(rows) <= (2 * 30 + told + 2) * 16
    assert (rows.groupby("name").size() >= 2).sum() >= 30 * 16


def test_rows_are_written_after_a_while_however_few(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "WAIT_S", 0.2)
    model = write_model(tmp_path / "model", "scene")
    pixels = batch("scene", 1, 32)
    with record_of(workspace, model) as recorder:
        recorder.add(pixels, answered(model, pixels), ["a"])
        limit = time.monotonic() + 20
        while not list((workspace.state / "production").rglob("[!.]*.parquet")):
            assert time.monotonic() < limit
            time.sleep(0.05)
        (row,) = kept(workspace).to_dict("records")
        assert row["bundle"] == model.hash


def test_a_large_tile_is_looked_at_all_over(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "LOOKED_AT", 100)
    model = write_model(tmp_path / "model", "scene")
    pixels = batch("scene", 1, 32)
    pixels["rgb"][0] = torch.arange(1, 33, dtype=torch.uint8)[:, None] * 7  # darker at the top
    with record_of(workspace, model) as recorder:
        recorder.add(pixels, answered(model, pixels), ["a"])
    (row,) = kept(workspace).to_dict("records")
    assert row["mean:rgb:red"] == pytest.approx(16.5 * 7, rel=0.05)
    pixels["rgb"][0] = torch.arange(1, 33, dtype=torch.uint8) * 7  # and at the left
    with record_of(workspace, model) as recorder:
        recorder.add(pixels, answered(model, pixels), ["b"])
    last = kept(workspace).set_index("name").loc["b"]
    assert last["mean:rgb:red"] == pytest.approx(16.5 * 7, rel=0.05)


def test_a_pass_of_other_images_is_no_embedding(workspace: Workspace, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "scene")
    three = batch("scene", 3, 32)
    with record_of(workspace, model) as recorder:
        answer = answered(model, three)
        recorder.add({"rgb": three["rgb"][:2]}, answer[:2], ["a", "b"])
    assert "embedding" not in kept(workspace) or kept(workspace)["embedding"].isna().all()


def test_a_tile_s_scene_is_its_file_whatever_that_is_called() -> None:
    assert record.parted("/d/tile#1.tif") == ("/d/tile#1.tif", "")
    assert record.parted("/d/tile#1.tif#0,8,64,32") == ("/d/tile#1.tif", "0,8,64,32")
    assert record.parted("5f2c") == ("5f2c", "")


def test_a_disk_that_takes_nothing_is_told_once(
    workspace: Workspace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, rows: Any) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(record, "write_table", full)
    model = write_model(tmp_path / "model", "scene")
    pixels = batch("scene", 1, 32)
    with caplog.at_level(logging.WARNING), record_of(workspace, model) as recorder:
        for name in "abc":
            recorder.add(pixels, answered(model, pixels), [name])
            recorder.flush()
    assert len(caplog.records) == 1
    assert [p for p in (workspace.state / "production").rglob("*") if p.is_file()] == []
