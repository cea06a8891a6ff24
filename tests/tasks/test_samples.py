"""Labels go with their images: cropped, turned, mirrored, padded alike, in the task's classes."""

from pathlib import Path
from typing import Any

import made_tasks
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from ringmo import config, tasks
from ringmo.config import Config
from ringmo.data.ingest import ingest
from ringmo.data.loading import SelectedTiles
from ringmo.data.selection import select
from ringmo.errors import BadInput
from ringmo.stage import run_stage
from ringmo.tasks.base import UNKNOWN
from ringmo.tasks.samples import Samples, clockwise
from ringmo.training.augmentation import crops, cut

SIDE = made_tasks.SIDE


def samples_of(workspace: Any, folder: Path, task: str, **options: Any) -> Samples:
    values = made_tasks.selected(workspace, folder, task)
    return opened(workspace, values, task, **options)


def opened(
    workspace: Any, values: Config, task: str, split: str | None = None, **o: Any
) -> Samples:
    kind = tasks.find(task)
    path = workspace.work("select") / f"{task}.parquet"
    train = SelectedTiles(workspace, path, "train", "rgb", task=kind)
    tiles = SelectedTiles(workspace, path, split, "rgb", task=kind)
    classes = kind.classes(train, values.finetune[task])
    return Samples(kind, tiles, classes, {"rgb": values.sensors["rgb"]}, "cpu", **o)


def cropped(samples: Samples, size: int, seed: int = 0) -> Any:
    """All tiles, each in a crop of its own."""
    rows = np.arange(len(samples.tiles))
    (batch,) = samples.tiles.batches(rows, len(rows), SIDE)
    where = crops(len(rows), (0.4, 1.0), np.random.default_rng(seed))
    return samples.cropped(cut(batch.images, where, size), batch.parts, rows, where, size)


def bright(images: torch.Tensor) -> Any:
    """Where the bars are: (B, S, S), by their red."""
    return (images[:, 0] > 0.8).numpy()


def agreement(a: Any, b: Any) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


@pytest.mark.parametrize("task", ["segmentation", "height", "change"])
def test_what_is_known_of_pixels_follows_every_crop(
    workspace: Any, tmp_path: Path, task: str
) -> None:
    samples = samples_of(workspace, tmp_path / "in", task)
    for sample in (cropped(samples, 96), cropped(samples, 48, 1)):
        there = bright(sample.images["second" if task == "change" else "rgb"])
        truth = sample.height if task == "height" else sample.mask
        assert truth is not None and truth.shape == there.shape
        covered = (truth > 5).numpy() if task == "height" else ((truth > 0) & (truth < 9)).numpy()
        assert agreement(there, covered) > 0.8
        if task == "change":
            assert bright(sample.images["rgb"]).mean() < 0.01


@pytest.mark.parametrize("task", ["oriented", "detection"])
def test_corners_follow_every_crop_and_go_clockwise(
    workspace: Any, tmp_path: Path, task: str
) -> None:
    samples = samples_of(workspace, tmp_path / "in", task)
    sample = cropped(samples, 96)
    assert sample.objects is not None
    there = bright(sample.images["rgb"])
    for image, objects in zip(there, sample.objects, strict=True):
        drawn = Image.new("L", (96, 96))
        for corners in objects.corners.tolist():
            ImageDraw.Draw(drawn).polygon([tuple(p) for p in corners], fill=1)
        covered = np.asarray(drawn) > 0
        # All that shines is in an object, but for those of which a crop shows too little.
        outside = (image & ~covered).sum()
        assert outside <= max(0.15 * image.sum(), 80)
        if task == "oriented" and covered.sum() > 200:
            assert (image & covered).sum() > 0.7 * covered.sum()
        assert torch.equal(clockwise(objects.corners), objects.corners)


def test_whole_tiles_and_their_objects_are_scaled_alike(workspace: Any, tmp_path: Path) -> None:
    samples = samples_of(workspace, tmp_path / "in", "oriented")
    (small,), (large,) = (list(samples.batches(size)) for size in (SIDE, 2 * SIDE))
    for one, other in zip(small.objects, large.objects, strict=True):
        torch.testing.assert_close(other.corners, 2 * one.corners)
    # What a caller does to a sample's objects does not reach the next one.
    small.objects[0].corners += 100
    (again,) = samples.batches(SIDE)
    torch.testing.assert_close(again.objects[0].corners * 2, large.objects[0].corners)


def test_a_tile_that_is_no_square_is_padded_with_what_nobody_knows(
    workspace: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    made_tasks.write(folder, "segmentation")
    for kind in ("images", "masks"):
        for path in (folder / kind).iterdir():
            with Image.open(path) as image:
                image.crop((0, 0, SIDE, 40)).save(path)
    values = configured(workspace, folder, "segmentation")
    sample = next(opened(workspace, values, "segmentation").batches(SIDE))
    assert sample.mask is not None
    assert (sample.mask[:, 40:] == UNKNOWN).all() and (sample.mask[:, :40] != UNKNOWN).all()
    image = sample.images["rgb"]
    assert torch.equal(image[:, :, 40:], image[:, :, 39:40].expand(-1, -1, SIDE - 40, -1))


def configured(workspace: Any, folder: Path, task: str) -> Config:
    config.edit(workspace.params_file, {"tasks": [task], "ingest.sources": [str(folder)]})
    values = Config.load(workspace.params_file)
    ingest(values, workspace)
    run_stage(workspace, "select", lambda out: select(values, workspace, out))
    return values


def test_a_class_that_only_test_tiles_have_is_numbered_after_the_models(
    workspace: Any, tmp_path: Path
) -> None:
    values = made_tasks.selected(workspace, tmp_path / "in", "oriented")
    path = workspace.work("select") / "oriented.parquet"
    table = pd.read_parquet(path)
    ships = table["boxes_classes"].map(lambda names: "tank" not in set(names))
    table = table[ships | (table["split"] == "test")]
    assert (~ships & (table["split"] == "test")).any()
    table.to_parquet(path)
    samples = opened(workspace, values, "oriented", "test")
    assert samples.classes == ["ship", "tank"]
    train = opened(workspace, values, "oriented", "train")
    assert train.classes == ["ship"]
    numbers = {int(n) for s in samples.batches(SIDE) for one in s.objects or [] for n in one.labels}
    assert numbers == {0, 1}


def test_heights_are_above_the_lowest_of_their_tile_where_asked(
    workspace: Any, tmp_path: Path
) -> None:
    samples = samples_of(workspace, tmp_path / "in", "height", heights="above_lowest")
    for sample in (next(samples.batches(SIDE)), cropped(samples, 32)):
        assert sample.height is not None
        # Also of a crop that does not show the lowest point.
        assert set(sample.height.unique().tolist()) == {0.0, 10.0}


def test_several_labels_a_tile_are_several_classes(workspace: Any, tmp_path: Path) -> None:
    values = made_tasks.selected(workspace, tmp_path / "in", "scene")
    path = workspace.work("select") / "scene.parquet"
    table = pd.read_parquet(path)
    table["label"] = ["ship;tank" if i % 3 else "ship" for i in range(len(table))]
    table.to_parquet(path)
    kind = tasks.find("scene")
    tiles = SelectedTiles(workspace, path, None, "rgb", task=kind)
    several = values.finetune["scene"].model_copy(update={"multi_label": True})
    classes = kind.classes(tiles, several)
    assert classes == ["ship", "tank"]
    sensors = {"rgb": values.sensors["rgb"]}
    sample = next(Samples(kind, tiles, classes, sensors, "cpu", multi_label=True).batches(32))
    assert sample.labels is not None
    assert sample.labels[:3].tolist() == [[1, 0], [1, 1], [1, 1]]


def test_a_label_that_changed_since_it_was_selected_is_refused(
    workspace: Any, tmp_path: Path
) -> None:
    values = made_tasks.selected(workspace, tmp_path / "in", "segmentation")
    path = workspace.work("select") / "segmentation.parquet"
    table = pd.read_parquet(path)
    table.loc[0, "mask_hash"] = "0" * 64
    table.to_parquet(path)
    with pytest.raises(BadInput, match=f"mask of tile {table['key'][0]} is not in the store as it"):
        opened(workspace, values, "segmentation")
