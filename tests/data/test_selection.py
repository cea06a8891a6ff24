"""Selections: test tiles never train, labels stay out of pre-training, and `keep` keeps."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_imagery import class_folders, encoded, sensed, write, write_bands

from ringmo import config as params
from ringmo.config import Config
from ringmo.data.selection import select
from ringmo.errors import BadInput
from ringmo.stage import run_stage


@pytest.fixture
def choose(workspace) -> Callable[..., Any]:
    def choose_now(**changes: Any) -> Any:
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        params.edit(workspace.params_file, changes)
        config = Config.load(workspace.params_file)
        return run_stage(workspace, "select", lambda out: select(config, workspace, out))

    return choose_now


def table(workspace: Any, name: str) -> Any:
    import pandas as pd

    return pd.read_parquet(workspace.work("select") / f"{name}.parquet")


def test_pretraining_sees_no_test_tile_and_no_label(run, choose, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in", each=20)
    write(source / "unlabelled" / "x.jpg", 5555)
    run(source)
    report = choose()
    tiles, pretrain, scene = manifest(), table(workspace, "pretrain"), table(workspace, "scene")
    assert list(pretrain.columns) == ["key", "content_hash", "split"]
    assert set(pretrain["key"]) == set(tiles["key"][tiles["split"].isin(["train", "val"])])
    assert set(scene["key"]) == set(tiles["key"][tiles["label"].notna()])
    assert pretrain["key"].is_monotonic_increasing
    assert report.figures["labelled"] == len(scene) == 60
    (row,) = report.tables["tasks"]
    assert row["test"] == (scene["split"] == "test").sum() > 0
    splits = scene["split"].value_counts().to_dict()
    assert row == {"task": "scene", "tiles": 60, **splits, "beside": []}


def test_corrected_label_leaves_the_pretraining_selection_as_it_is(
    run, choose, workspace, tmp_path
):
    source = class_folders(tmp_path / "in", each=10)
    run(source)
    choose()
    before = (workspace.work("select") / "pretrain.parquet").read_bytes()
    scene = (workspace.work("select") / "scene.parquet").read_bytes()
    (source / "class0" / "0002.jpg").rename(source / "class2" / "x.jpg")
    run(source)
    choose()
    assert (workspace.work("select") / "pretrain.parquet").read_bytes() == before
    assert (workspace.work("select") / "scene.parquet").read_bytes() != scene


def test_fewer_labels_are_among_more_and_spare_val_and_test(run, choose, workspace, tmp_path):
    run(class_folders(tmp_path / "in", each=30))
    choose()
    every = table(workspace, "scene")
    seen: set[str] = set()
    for limit in (2, 5, 9):
        choose(select__labels_per_class=limit)
        scene = table(workspace, "scene")
        train = scene[scene["split"] == "train"]
        assert set(train["label"].value_counts()) == {limit}
        assert seen < set(train["key"])
        seen = set(train["key"])
        others = every[every["split"] != "train"]
        assert set(scene["key"][scene["split"] != "train"]) == set(others["key"])


def test_blank_tiles_do_not_train(run, choose, workspace, manifest, tmp_path):
    source = class_folders(tmp_path / "in")
    for i in range(9):
        flat = encoded(np.full((32, 32, 3), 10 * i, np.uint8))
        (source / "class0" / f"flat{i}.png").write_bytes(flat)
    run(source)
    report = choose()
    tiles = manifest().set_index("key")
    assert report.figures["blank"] > 0
    assert (tiles["std"][table(workspace, "pretrain")["key"]] > 2).all()


def test_keep_leaves_new_imagery_out_until_full(run, choose, workspace, tmp_path):
    source = class_folders(tmp_path / "in")
    run(source)
    choose()
    before = table(workspace, "pretrain")
    class_folders(source, start=50, each=6)
    run(source)
    choose(pretrain__refresh="keep")
    assert table(workspace, "pretrain").equals(before)
    assert len(table(workspace, "scene")) == 54
    choose()  # again, from what was kept
    assert table(workspace, "pretrain").equals(before)
    (source / "class0" / "0000.jpg").unlink()
    (source / "class0" / "0001.jpg").unlink()
    run(source)
    choose()
    assert set(table(workspace, "pretrain")["key"]) <= set(before["key"])
    choose(pretrain__refresh="full")
    assert len(table(workspace, "pretrain")) > len(before)


def test_no_labels_give_an_empty_task_selection(run, choose, workspace, tmp_path):
    run(class_folders(tmp_path / "in"), ingest__labels="none")
    report = choose()
    assert report.figures["labelled"] == len(table(workspace, "scene")) == 0


def several_sensors(folder: Any, count: int = 12) -> Any:
    for i in range(count):
        for sensor in ("rgb", "s2l2a", "s1"):
            values = sensed(sensor, 50 * i + len(sensor))
            write_bands(folder / ("town", "wood")[i % 2] / f"{sensor}_{i}.tif", values, 1000 * i)
    return folder


def test_mix_says_whose_tiles_pretrain_and_tasks_keep_their_sensor(
    run, choose, workspace, manifest, tmp_path
):
    run(several_sensors(tmp_path / "in"))
    choose()
    tiles = manifest().set_index("key")
    assert set(tiles["sensor"][table(workspace, "pretrain")["key"]]) == {"rgb"}
    scene = table(workspace, "scene")
    report = choose(pretrain__mix={"rgb": 0.5, "s2l2a": 0.3, "s1": 0.2})
    seen = table(workspace, "pretrain")
    assert (seen["split"] != "test").all()
    assert seen["key"].is_monotonic_increasing
    expected = tiles[(tiles["split"] != "test")]["sensor"].value_counts().to_dict()
    assert tiles["sensor"][seen["key"]].value_counts().to_dict() == expected
    assert {r["sensor"]: r["tiles"] for r in report.tables["sensors"]} == expected
    assert len(expected) == 3
    assert table(workspace, "scene").equals(scene)
    choose(select__sensor="s1")
    assert set(tiles["sensor"][table(workspace, "scene")["key"]]) == {"s1"}


def test_sensor_in_the_mix_without_a_tile_is_bad_input(run, choose, workspace, tmp_path):
    run(several_sensors(tmp_path / "in"))
    with pytest.raises(BadInput, match="no tile of sensor `s2l1c` to train on") as error:
        choose(pretrain__mix={"rgb": 0.5, "s2l1c": 0.5})
    assert "\n" not in str(error.value)
    choose(pretrain__mix={"rgb": 1.0})
    # What is kept has none of a sensor that came into the mix later.
    with pytest.raises(BadInput, match=r"`s1`.*pretrain\.refresh"):
        choose(pretrain__mix={"rgb": 0.5, "s1": 0.5}, pretrain__refresh="keep")


def test_no_tile_of_the_sensor_is_bad_input(run, choose, workspace, manifest, tmp_path):
    from ringmo.data import store

    run(class_folders(tmp_path / "in"))
    tiles = manifest().assign(sensor="radar")
    store.write_table(workspace.store / store.MANIFEST, tiles, store.COLUMNS)
    with pytest.raises(BadInput, match=r"select\.sensor"):
        choose()


@pytest.mark.parametrize("split", ["test", "train"])
def test_labels_that_nothing_could_test_or_train_are_refused_before_any_training(
    run, choose, workspace, manifest, tmp_path, split
):
    from ringmo.data import store

    run(class_folders(tmp_path / "in"))
    tiles = manifest()
    column, value = ("split", "val") if split == "test" else ("label", None)
    tiles.loc[tiles["split"] == split, column] = value
    store.write_table(workspace.store / store.MANIFEST, tiles, store.COLUMNS)
    with pytest.raises(BadInput, match=rf"scene: \d+ labelled tiles: .*\b0 {split}") as error:
        choose()
    assert "\n" not in str(error.value) and "ingest more" in str(error.value)


def normalisation(workspace: Any) -> Any:
    return json.loads((workspace.work("select") / "normalisation.json").read_text())


RADAR = {"bands": ["VV", "VH"], "dtype": "float32", "scale": 0.5, "clip": [-15, 2]}
RADAR |= {"mean": None, "std": None}


def test_sensors_with_numbers_of_their_own_need_none(run, choose, workspace, tmp_path):
    run(several_sensors(tmp_path / "in"))
    choose(pretrain__mix={"rgb": 0.5, "s1": 0.5})
    assert normalisation(workspace) == {}


def test_null_becomes_mean_and_deviation_of_all_training_pixels(
    run, choose, workspace, manifest, tmp_path
):
    """Tiles of two sizes, some with gaps, none of val or test: as over all pixels at once."""
    from ringmo.data.decode import decode
    from ringmo.data.store import TileStore

    params.edit(workspace.params_file, {"sensors.s1": RADAR})
    for i in range(24):
        side = 48 if i % 3 else 80
        values = sensed("s1", 10 * i, side, side)
        values[: 10 * (i % 2)] = np.nan
        write_bands(tmp_path / "in" / f"{i}.tif", values, 5000 * i)
    run(tmp_path / "in")
    report = choose(select__sensor="s1", pretrain__mix={"s1": 1.0})
    assert report.figures["tiles"] > 10
    tiles, chosen = manifest().set_index("key"), table(workspace, "pretrain")
    pixels = []
    for key in chosen["key"][chosen["split"] == "train"]:
        row, source = tiles.loc[key], TileStore(workspace.store)
        values = decode(source.read(row["shard"], row["offset"], row["size"]))
        gap = round(row["nodata_share"] * row["height"])
        pixels.append((values[gap:] * 0.5).clip(-15, 2).reshape(-1, 2).astype(np.float64))
    every = np.concatenate(pixels)
    found = normalisation(workspace)["s1"]
    assert found["mean"] == pytest.approx(every.mean(0), rel=1e-5)
    assert found["std"] == pytest.approx(every.std(0), rel=1e-5)


def test_keep_keeps_the_normalisation_of_what_is_read_the_same_way(
    run, choose, workspace, tmp_path
):
    from ringmo import config

    def more(start: int) -> None:
        for i in range(start, start + 12):
            write_bands(tmp_path / "in" / f"{i}.tif", sensed("s1", 10 * i), 5000 * i)
        run(tmp_path / "in")

    config.edit(workspace.params_file, {"sensors.s1": RADAR})
    radar = {"select__sensor": "s1", "pretrain__mix": {"s1": 1.0}}
    more(0)
    choose(**radar)
    first = normalisation(workspace)
    more(100)
    choose(pretrain__refresh="keep")
    assert normalisation(workspace) == first
    choose(pretrain__refresh="full")
    second = normalisation(workspace)
    assert second["s1"]["mean"] != first["s1"]["mean"]
    # In other units it would be wrong: found anew, of the tiles that are kept.
    config.edit(workspace.params_file, {"sensors.s1.scale": 1.0, "sensors.s1.clip": [-30, 4]})
    run(tmp_path / "in")
    choose(pretrain__refresh="keep")
    third = normalisation(workspace)
    assert third["s1"]["mean"] == pytest.approx(np.array(second["s1"]["mean"]) * 2, rel=1e-4)


def test_a_band_that_is_the_same_everywhere_does_not_divide_by_zero(
    run, choose, workspace, tmp_path
):
    params.edit(workspace.params_file, {"sensors.s1": RADAR})
    for i in range(12):
        values = sensed("s1", 10 * i)
        values[..., 1] = -4
        write_bands(tmp_path / "in" / f"{i}.tif", values, 5000 * i)
    run(tmp_path / "in")
    choose(select__sensor="s1", pretrain__mix={"s1": 1.0})
    found = normalisation(workspace)["s1"]
    assert (found["mean"][1], found["std"][1]) == (-2, 1)


def test_a_tile_of_several_classes_stays_for_any_of_them():
    import pandas as pd

    from ringmo.data.selection import fewer_labels

    labels = ["ship", "ship;tank", "tank", "ship", "tank;tree", "ship"]
    tiles = pd.DataFrame({"key": list("abcdef"), "split": "train", "label": labels})
    few = fewer_labels(tiles, 1, 0)
    known = {name for label in few["label"] for name in label.split(";")}
    assert known == {"ship", "tank", "tree"} and "tank;tree" in set(few["label"])
    assert len(few) <= 3
    assert set(few["key"]) <= set(fewer_labels(tiles, 2, 0)["key"])
