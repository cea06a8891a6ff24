"""The rules: each fails by name on the data it is for, in the verdict and in the Data Docs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_imagery import class_folders, sensed, write, write_bands

from ringmo.config import Config
from ringmo.data import store
from ringmo.data.validation import rules, validate
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import run_stage


@pytest.fixture
def judge(run, workspace, manifest, tmp_path) -> Callable[..., Any]:
    """Ingest, change the manifest, validate; returns the verdict."""
    run(class_folders(tmp_path / "in", each=12))

    def change_and_validate(change: Callable[[Any], Any] | None = None) -> Any:
        if change is not None:
            tiles = manifest()
            changed = change(tiles)
            path = workspace.store / store.MANIFEST
            facts = store.read_facts(path)
            facts.pop("schema")
            store.write_table(path, tiles if changed is None else changed, store.COLUMNS, facts)
        config = Config.load(workspace.params_file)
        return run_stage(workspace, "validate", lambda out: validate(config, workspace, out))

    return change_and_validate


def broken(workspace: Any) -> list[str]:
    verdict = json.loads((workspace.work("validate") / "verdict.json").read_text())
    return [rule["rule"] for rule in verdict["rules"] if not rule["ok"]]


def test_good_data_pass_every_rule_with_the_same_verdict_again(judge, workspace):
    report = judge()
    path = workspace.work("validate") / "verdict.json"
    first = path.read_bytes()
    judge()
    assert path.read_bytes() == first
    assert report.figures["broken"] == 0
    assert len(report.tables["rules"]) == len(rules(Config.load(workspace.params_file)))


def place_in_two_splits(tiles: Any) -> None:
    train = tiles.index[tiles["split"] == "train"]
    tiles.loc[train[:2], "place"] = "shared"
    tiles.loc[train[0], "split"] = "test"


def twice(tiles: Any) -> Any:
    import pandas as pd

    return pd.concat([tiles, tiles.iloc[[0]]], ignore_index=True)


def setting(column: str, value: Any, rows: int = 1) -> Callable[[Any], None]:
    def change(tiles: Any) -> None:
        tiles.loc[tiles.index[:rows], column] = value

    return change


def no_test(tiles: Any) -> None:
    tiles.loc[(tiles["label"] == "class1") & (tiles["split"] == "test"), "split"] = "unused"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (place_in_two_splits, "one_split_a_place"),
        (twice, "unique_key"),
        (twice, "unique_content"),
        (setting("std", 0.5, 3), "blank"),
        (setting("nodata_share", 0.9), "nodata"),
        (setting("nodata_share", 1.7), "shares"),
        (setting("std", float("nan")), "measured"),
        (setting("offset", -1), "offsets"),
        (setting("offset", 10**9), "in_shard"),
        (setting("shard", "tiles-000077.tar"), "in_shard"),
        (setting("width", 0), "sizes"),
        (setting("sensor", "radar"), "known_sensor"),
        (setting("split", "holdout"), "known_split"),
        (setting("place", None), "placed"),
        (setting("label", " "), "named_labels"),
        (setting("label", "rare"), "samples"),
        (no_test, "tests"),
    ],
)
def test_each_rule_stops_what_it_is_for(change, rule, judge, workspace):
    with pytest.raises(AnswerIsNo) as error:
        judge(change)
    assert rule in broken(workspace)
    assert "\n" not in str(error.value)
    docs = workspace.work("validate") / "docs"
    assert (docs / "index.html").exists()
    pages = "".join(page.read_text() for page in docs.rglob("validations/**/*.html"))
    assert rule in pages
    assert "Failed" in pages


def test_refusal_names_rule_count_and_rows(judge, workspace, manifest):
    key = manifest()["key"][0]
    with pytest.raises(AnswerIsNo, match=rf"\(nodata\): broken by 1 \({key} class0/0000.jpg\)"):
        judge(setting("nodata_share", 0.9))


def test_vanished_class_is_a_refusal_until_it_is_retired(run, workspace, tmp_path):
    import shutil

    from ringmo import config as params

    source = class_folders(tmp_path / "in", each=12)
    run(source)
    shutil.rmtree(source / "class2")
    run(source)
    config = Config.load(workspace.params_file)
    with pytest.raises(AnswerIsNo, match="class2"):
        run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    assert broken(workspace) == ["no_class_vanished"]
    # Further imagery does not hide the loss.
    write(source / "class1" / "more.jpg", 77)
    run(source)
    with pytest.raises(AnswerIsNo, match="class2"):
        run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    params.edit(workspace.params_file, {"validate.retired_classes": ["class2"]})
    config = Config.load(workspace.params_file)
    assert run_stage(workspace, "validate", lambda out: validate(config, workspace, out)).ok
    # Another source has no previous version.
    run(class_folders(tmp_path / "other", classes=1, each=12))
    params.edit(workspace.params_file, {"validate.retired_classes": []})
    config = Config.load(workspace.params_file)
    assert run_stage(workspace, "validate", lambda out: validate(config, workspace, out)).ok


def test_a_soft_rule_warns_and_a_hard_one_stops(run, workspace, tmp_path, capsys):
    from ringmo import config as params

    source = class_folders(tmp_path / "in", each=12)
    run(source)
    for i in range(20):
        write(source / "class1" / f"more{i}.jpg", 700 + i)
    write(source / "new" / "first.jpg", 900)  # a class that is new moves no other one's share
    run(source)

    def judge_now(soft: list[str]) -> Any:
        params.edit(workspace.params_file, {"validate.soft": soft, "validate.min_per_class": 1})
        config = Config.load(workspace.params_file)
        return run_stage(workspace, "validate", lambda out: validate(config, workspace, out))

    # 12 of 36 samples were class1; now 32 of 56, without the new one's.
    report = judge_now(["class_shares", "tests", "trains"])
    assert (report.figures["warnings"], report.figures["broken"]) == (2, 0)
    assert "class_shares" in broken(workspace)
    assert "warning: no class's share has moved" in capsys.readouterr().err
    with pytest.raises(AnswerIsNo, match=r"\(class_shares\): broken by 3 "):
        judge_now(["tests", "trains"])
    with pytest.raises(BadInput, match="no rule is called clas_shares; there are known_sensor"):
        judge_now(["clas_shares"])


def test_a_place_seen_by_three_sensors_is_one_sample_of_its_class(run, workspace, tmp_path):
    from ringmo import config as params

    for i in range(20):
        for sensor in ("rgb", "s2l2a", "s1"):
            path = tmp_path / "in" / ("town", "wood")[i % 2] / f"{sensor}_{i}.tif"
            write_bands(path, sensed(sensor, 50 * i + len(sensor)), 1000 * i)
    run(tmp_path / "in")

    def judge_now(least: int) -> Any:
        params.edit(workspace.params_file, {"validate.min_per_class": least})
        config = Config.load(workspace.params_file)
        return run_stage(workspace, "validate", lambda out: validate(config, workspace, out))

    assert judge_now(10).figures["tiles"] == 60
    with pytest.raises(AnswerIsNo, match="samples"):
        judge_now(11)
    assert broken(workspace) == ["samples"]


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_blank_tiles_are_found_in_every_dtype(dtype, run, workspace, tmp_path):
    import numpy as np

    sensor, level = ("s2l2a", 1500) if dtype == "int16" else ("s1", -22)
    for i in range(20):
        values = sensed(sensor, i)
        if i < 3:  # open water: the bands' levels differ, within a band little does
            grain = np.random.default_rng(i).normal(0, 0.003, values.shape)
            values = (level * (1 + 0.1 * np.arange(values.shape[2])) * (1 + grain)).astype(dtype)
        write_bands(tmp_path / "in" / f"{i}.tif", values, 1000 * i)
    run(tmp_path / "in")
    config = Config.load(workspace.params_file)
    with pytest.raises(AnswerIsNo, match=r"\(blank\): broken by 3"):
        run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    assert broken(workspace) == ["blank"]


@pytest.mark.parametrize("damage", ["missing", "cut", "other schema", "other columns"])
def test_unreadable_manifest_is_bad_input(damage, run, workspace, manifest, tmp_path):
    run(class_folders(tmp_path / "in", each=3))
    path: Path = workspace.store / store.MANIFEST
    tiles = manifest()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "other schema":
        store.write_table(path, tiles, store.COLUMNS, {"schema": store.SCHEMA + 1})
    else:
        store.write_table(path, tiles, {"key": "string"})
    config = Config.load(workspace.params_file)
    with pytest.raises(BadInput) as error:
        run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    assert str(path) in str(error.value)
