"""The rules: each fails by name on the data it is for, in the verdict and in the Data Docs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_imagery import class_folders, encoded, sensed, write, write_bands

from ringmo.config import Config
from ringmo.data import facts, store
from ringmo.data.validation import judge as judge_table
from ringmo.data.validation import rules, summary_of, validate
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import run_stage


@pytest.fixture
def judge(run, workspace, manifest, tmp_path) -> Callable[..., Any]:
    """Ingest, change the manifest, validate; returns the verdict."""
    run(class_folders(tmp_path / "in", each=12))
    (workspace.store / store.CLASSES).write_text('{"roads": ["background", "road"]}')

    def change_and_validate(change: Callable[[Any], Any] | None = None) -> Any:
        if change is not None:
            tiles = manifest()
            changed = change(tiles)
            path = workspace.store / store.MANIFEST
            numbers = store.read_facts(path)
            numbers.pop("schema")
            store.write_table(path, tiles if changed is None else changed, store.COLUMNS, numbers)
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


def with_masks(tiles: Any, *, width: int = 48, counts: tuple[int, ...] = (1000, 920, 0)) -> None:
    """Says of each tile that it has a mask (whose bytes are the tile's); `counts` of the first."""
    tiles["mask_shard"], tiles["mask_offset"] = tiles["shard"], tiles["offset"]
    tiles["mask_size"], tiles["mask_coding"] = tiles["size"], "roads"
    tiles["mask_width"], tiles["mask_height"] = tiles["width"], tiles["height"]
    tiles["mask_counts"] = [list(counts if i == 0 else (1000, 920, 0)) for i in range(len(tiles))]
    tiles.loc[tiles.index[0], "mask_width"] = width


def mask_of_another_size(tiles: Any) -> None:
    with_masks(tiles, width=47)


def mask_number_without_a_class(tiles: Any) -> None:
    with_masks(tiles, counts=(1000, 900, 20, 0))


def mask_of_an_unknown_coding(tiles: Any) -> None:
    with_masks(tiles)
    tiles.loc[tiles.index[0], "mask_coding"] = "rivers"


def mask_beyond_its_shard(tiles: Any) -> None:
    with_masks(tiles)
    tiles.loc[tiles.index[0], "mask_offset"] = 10**9


def with_boxes(tiles: Any, outside: int = 0, classes: tuple[str, ...] = ("ship", "ship")) -> None:
    tiles["boxes_count"] = 2
    tiles["boxes_classes"] = [list(classes if i == 0 else ("ship", "ship")) for i in tiles.index]
    tiles.loc[tiles.index[0], "boxes_outside"] = outside


def box_outside(tiles: Any) -> None:
    with_boxes(tiles, outside=1)


def box_without_a_class(tiles: Any) -> None:
    with_boxes(tiles, classes=("ship", " "))


def second_date(tiles: Any, split: str) -> None:
    one, two = tiles.index[tiles["split"] == "train"][:2]
    tiles.loc[one, "second"] = tiles["key"][two]
    tiles.loc[two, "split"] = split
    tiles.loc[[one, two], "place"] = "pair"


def second_date_in_another_split(tiles: Any) -> None:
    second_date(tiles, "unused")


def second_date_of_another_size(tiles: Any) -> None:
    second_date(tiles, "train")
    tiles.loc[tiles.index[tiles["second"].notna()], "width"] = 47


def copied(tiles: Any) -> Any:
    """The bytes of a test tile once more, in train."""
    import pandas as pd

    copy = (
        tiles[tiles["split"] == "test"].iloc[[0]].assign(key="c" * 16, place="copy", split="train")
    )
    return pd.concat([tiles, copy], ignore_index=True)


def on_the_same_ground(tiles: Any) -> None:
    """Half of a train tile's footprint is a test tile's."""
    for split, left in (("train", 0.0), ("test", 240.0)):
        row = tiles.index[tiles["split"] == split][0]
        tiles.loc[row, "crs"] = "EPSG:32631"
        tiles.loc[row, ["minx", "miny", "maxx", "maxy"]] = [left, 5e6, left + 480, 5e6 + 480]


def setting(column: str, value: Any, rows: int = 1) -> Callable[[Any], None]:
    def change(tiles: Any) -> None:
        tiles.loc[tiles.index[:rows], column] = value

    return change


def no_train(tiles: Any) -> None:
    tiles.loc[(tiles["label"] == "class1") & (tiles["split"] == "train"), "split"] = "unused"


def no_test(tiles: Any) -> None:
    tiles.loc[(tiles["label"] == "class1") & (tiles["split"] == "test"), "split"] = "unused"


# Rules whose tiles cannot be shown: their bytes, or what would make colours of them, are missing.
UNSEEN = ("stored", "offsets", "in_shard", "known_sensor", "bands_measured")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (place_in_two_splits, "one_split_a_place"),
        (twice, "unique_key"),
        (twice, "unique_content"),
        (copied, "identical_across_splits"),
        (copied, "near_across_splits"),
        (on_the_same_ground, "ground_across_splits"),
        (second_date_in_another_split, "pair_in_one_split"),
        (second_date_of_another_size, "second_dates"),
        (setting("second", "nobody"), "second_dates"),
        (mask_of_another_size, "masks_fit"),
        (mask_number_without_a_class, "mask_values"),
        (mask_of_an_unknown_coding, "mask_values"),
        (mask_beyond_its_shard, "labels_in_shard"),
        (box_outside, "boxes_inside"),
        (box_without_a_class, "boxes_named"),
        (setting("bands", 4), "bands_measured"),
        (setting("phash", "zz"), "measured"),
        (setting("std", 0.5, 3), "blank"),
        (setting("nodata_share", 0.9), "nodata"),
        (setting("nodata_share", 1.7), "shares"),
        (setting("std", float("nan")), "measured"),
        (setting("offset", -1), "offsets"),
        (setting("offset", 10**9), "in_shard"),
        (setting("shard", "tiles-000077.tar"), "in_shard"),
        (setting("width", 0), "sizes"),
        (setting("size", 0), "stored"),
        (setting("sensor", "radar"), "known_sensor"),
        (setting("split", "holdout"), "known_split"),
        (setting("place", None), "placed"),
        (setting("label", " "), "named_labels"),
        (setting("label", "rare"), "samples"),
        (no_train, "trains"),
        (no_test, "tests"),
    ],
)
def test_each_rule_stops_what_it_is_for(change, rule, judge, workspace):
    from ringmo import config as params

    params.edit(workspace.params_file, {"validate.soft": []})
    with pytest.raises(AnswerIsNo) as error:
        judge(change)
    assert rule in broken(workspace)
    assert "\n" not in str(error.value)
    docs = workspace.work("validate") / "docs"
    assert (docs / "index.html").exists()
    pages = "".join(page.read_text() for page in docs.rglob("validations/**/*.html"))
    assert f"rules/{rule}.html" in pages
    assert "Failed" in pages
    assert f"rules/{rule}.html" in (docs / "index.html").read_text()
    assert "data:image/" in (docs / "rules" / f"{rule}.html").read_text() or rule in UNSEEN


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
        params.edit(
            workspace.params_file,
            {"validate.soft": [*soft, "balance"], "validate.min_per_class": 1},
        )
        config = Config.load(workspace.params_file)
        return run_stage(workspace, "validate", lambda out: validate(config, workspace, out))

    # 12 of 36 samples were class1; now 32 of 56, without the new one's.
    report = judge_now(["class_shares", "tests", "trains"])
    assert (report.figures["warnings"], report.figures["broken"]) == (3, 0)
    assert "class_shares" in broken(workspace)
    told = capsys.readouterr().err
    assert re.search(
        r"^class_shares +warning +no class's share .* 3 +work/\S+/class_shares", told, re.M
    )
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


def test_docs_are_whole_without_a_network(judge, workspace):
    with pytest.raises(AnswerIsNo):
        judge(mask_of_another_size)
    docs = workspace.work("validate") / "docs"
    pages = sorted(docs.rglob("*.html"))
    assert len(pages) > 8
    for page in pages:
        html = page.read_text()
        assert not re.search(r"https?:|//cdn|<script|<link", html), page
        for target in re.findall(r"href=['\"]([^'\"#]+)['\"]", html):
            assert (page.parent / target).is_file(), (page, target)
    assert not (docs / "static").exists()
    shown = (docs / "rules" / "masks_fit.html").read_text()
    assert "mask 47x40, tile 48x40" in shown
    assert "class0/0000.jpg" in shown


def test_a_page_shows_the_tile_its_partner_and_the_mask(judge, workspace):
    import base64
    import io

    import numpy as np
    from PIL import Image

    png = encoded(np.full((40, 48), 1, np.uint8))

    def change(tiles: Any) -> Any:
        writer = store.ShardWriter(workspace.store, 7, 1)
        shard, offset = writer.add("mask.png", png)
        writer.commit()
        with_masks(tiles, counts=(0, 0, 1920, 0))  # a number 2, of which there is no class
        tiles["mask_shard"], tiles["mask_offset"], tiles["mask_size"] = shard, offset, len(png)
        return copied(tiles)

    with pytest.raises(AnswerIsNo):
        judge(change)
    docs = workspace.work("validate") / "docs"

    def pictures(rule: str) -> list[Any]:
        found = re.findall(r"base64,([^']+)'", (docs / "rules" / f"{rule}.html").read_text())
        return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]

    tile, mask = pictures("mask_values")
    assert (tile.size, mask.size) == ((48, 40), (48, 40))
    assert len(mask.getcolors()) == 1
    assert mask.getpixel((0, 0)) != (0, 0, 0)  # black is the first class
    one, other, *same = pictures("identical_across_splits")
    assert one.tobytes() == other.tobytes()
    assert len(same) == 2


def test_near_hashes_count_only_where_the_tiles_look_alike(judge, workspace):
    import io

    from PIL import Image

    def same_hash(tiles: Any) -> None:
        for split in ("train", "val", "test"):
            row = tiles.index[tiles["split"] == split][0]
            tiles.loc[row, "phash"] = "0123456789abcdef"

    assert judge(same_hash).ok

    def compressed(tiles: Any) -> Any:
        import pandas as pd

        old = tiles[tiles["split"] == "test"].iloc[0]
        data = store.TileStore(workspace.store).read(old["shard"], old["offset"], old["size"])
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).save(stream, "JPEG", quality=30)
        writer = store.ShardWriter(workspace.store, 8, 1)
        shard, offset = writer.add("near.jpg", stream.getvalue())
        writer.commit()
        near = old.to_dict() | {"key": "d" * 16, "place": "near", "split": "train"}
        near |= {"shard": shard, "offset": offset, "size": len(stream.getvalue())}
        near |= {"content_hash": "0" * 64, "phash": f"{int(old['phash'], 16) ^ 0b101:016x}"}
        return pd.concat([tiles, pd.DataFrame([near])], ignore_index=True)

    with pytest.raises(AnswerIsNo, match=r"\(near_across_splits\): broken by 2 .*dddddddddddddddd"):
        judge(compressed)
    assert broken(workspace) == ["near_across_splits"]


def made_up(count: int, **columns: Any) -> Any:
    """A manifest of `count` tiles, all different and without a fault, and the columns given."""
    import pandas as pd

    numbers = range(count)
    rows = {
        "key": [f"{i:016x}" for i in numbers],
        "shard": "tiles-000000.tar",
        "offset": [1000 * i for i in numbers],
        "size": 900,
        "source": [f"{i}.jpg" for i in numbers],
        "place": [f"p{i}" for i in numbers],
        "split": "train",
        "sensor": "rgb",
        "width": 64,
        "height": 64,
        "bands": 3,
        "std": 30.0,
        "phash": [f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}" for i in numbers],
        "content_hash": [f"{i:064x}" for i in numbers],
        "band_means": [[100.0 + i % 7, 110.0, 120.0] for i in numbers],
        "band_stds": [[10.0, 20.0, 30.0]] * count,
    }
    zeros = ("row", "col", "nodata_share", "saturated_share", "mean", "entropy", "sharpness")
    rows |= dict.fromkeys((*zeros, *(n for n in store.COLUMNS if n.endswith("_offset"))), 0)
    rows |= dict.fromkeys(n for n in store.COLUMNS if n not in rows)
    for name, form in store.COLUMNS.items():
        if rows[name] is None and form in ("int32", "int64"):
            rows[name] = 0
    return pd.DataFrame(rows | columns)[list(store.COLUMNS)]


def test_a_manifest_alone_is_judged_without_its_shards(workspace, tmp_path):
    config = Config.load(workspace.params_file)
    tiles = made_up(40, split=["train", "test"] * 20)
    sizes = {"tiles-000000.tar": 40_000}
    assert judge_table(config, tiles, tmp_path / "a", shard_sizes=sizes)["ok"]
    tiles.loc[1, "phash"] = tiles["phash"][0]
    verdict = judge_table(config, tiles, tmp_path / "b", shard_sizes={"tiles-000000.tar": 39_000})
    found = {rule["rule"]: rule["failed_rows"] for rule in verdict["rules"] if not rule["ok"]}
    assert found == {"near_across_splits": 2, "in_shard": 1}


def test_what_meets_across_splits_is_what_comparing_all_pairs_finds(workspace):
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(5)
    count = 300
    splits = np.array(["train", "val", "test", "unused"])[random.integers(0, 4, count)]
    sensors = np.array(["rgb", "s1"])[random.integers(0, 2, count)]
    # Few hashes, some of them a bit or two apart.
    hashes = np.array([0, 1, 3, 2**40, 2**40 + 2**50, 2**63, 0xFFFF0000], np.uint64)[
        random.integers(0, 7, count)
    ] ^ (np.uint64(1) << random.integers(0, 64, count).astype(np.uint64))
    left, top = random.integers(0, 90, (2, count)) * 32.0
    tiles = made_up(
        count,
        split=splits,
        sensor=sensors,
        phash=[f"{int(value):016x}" for value in hashes],
        place=[f"p{i}" for i in random.integers(0, 200, count)],
        crs="EPSG:32631",
        minx=4e5 + left,
        miny=5e6 + top,
        maxx=4e5 + left + 64,
        maxy=5e6 + top + 64,
    )
    config = Config.load(workspace.params_file)
    table = facts.as_table(tiles)
    columns, partners = facts.of_tiles(config, table, {}, {}, None)
    taught = splits != "unused"
    across = taught[:, None] & taught & (splits[:, None] != splits)
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= 3
    ground = (np.abs(left[:, None] - left) < 64) & (np.abs(top[:, None] - top) < 64)
    places = tiles["place"].to_numpy()
    expected = {
        "near_elsewhere": across & near & (sensors[:, None] == sensors),
        "overlap_elsewhere": across & ground,
        "place_elsewhere": across & (places[:, None] == places),
    }
    for column, pairs in expected.items():
        assert 0 < pairs.any(axis=1).sum() < count, column
        found = np.array([text is not None for text in columns[column]])
        np.testing.assert_array_equal(found, pairs.any(axis=1), column)
        rows = np.flatnonzero(found)
        assert pairs[rows, partners[column][rows]].all(), column
    assert isinstance(table, pa.Table)


def test_the_summary_is_what_counting_tile_by_tile_gives():
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(3)
    count = 60
    sensors = ["rgb" if i % 3 else "s1" for i in range(count)]
    means = [list(random.normal(100, 20, 3 if s == "rgb" else 2)) for s in sensors]
    stds = [list(random.uniform(5, 9, len(m))) for m in means]
    means[4] = stds[4] = [float("nan")] * len(means[4])  # nothing but nodata
    means[5] = stds[5] = None  # of an older store
    counts = [[*map(int, random.integers(0, 50, 3)), 9] if i % 2 else None for i in range(count)]
    boxes = [["ship"] * (i % 3) + ["plane"] if i % 4 == 0 else None for i in range(count)]
    coding = ["land" if i % 2 else None for i in range(count)]
    tiles = made_up(
        count, sensor=sensors, band_means=means, band_stds=stds, mask_counts=counts,
        mask_coding=coding, boxes_classes=boxes,
    )  # fmt: skip
    summary = summary_of(tiles, {"land": ["field", "road", "field"]})
    for sensor in ("rgb", "s1"):
        seen = [i for i in range(count) if sensors[i] == sensor and i not in (4, 5)]
        band = summary["bands"][sensor]
        assert band["n"] == len(seen)
        assert band["means"] == pytest.approx(np.mean([means[i] for i in seen], axis=0))
        squares = np.square([stds[i] for i in seen])
        assert band["stds"] == pytest.approx(np.sqrt(squares.mean(axis=0)))
    given = [c for c in counts if c]
    assert summary["mask_classes"] == {
        "field": sum(c[0] + c[2] for c in given),  # two numbers may stand for one class
        "road": sum(c[1] for c in given),
    }
    assert summary["box_classes"] == {
        "plane": sum(b.count("plane") for b in boxes if b),
        "ship": sum(b.count("ship") for b in boxes if b),
    }
    schema = store.arrow_schema()
    parts = [
        pa.Table.from_pandas(part, schema=schema, preserve_index=False)
        for part in (tiles[:23], tiles[23:])
    ]
    assert summary_of(pa.concat_tables(parts), {"land": ["field", "road", "field"]}) == summary
    assert summary_of(tiles)["mask_classes"].keys() == {"land 0", "land 1", "land 2"}
    assert json.loads(json.dumps(summary)) == summary


def test_what_has_moved_since_the_version_before_is_told(workspace, tmp_path):
    config = Config.load(workspace.params_file)
    sizes = {"tiles-000000.tar": 10**6}
    tiles = made_up(
        40,
        split=["train", "test"] * 20,
        mask_coding="land",
        mask_size=90,
        mask_shard="tiles-000000.tar",
        mask_width=64,
        mask_height=64,
        mask_counts=[[3000, 1096, 0]] * 40,
    )
    known = {"land": ["field", "road", "river"]}
    entry = {"classes": {}, **summary_of(tiles, known)}

    def judged(name: str, before: dict[str, Any]) -> dict[str, int]:
        verdict = judge_table(
            config, tiles, tmp_path / name, shard_sizes=sizes, earlier=[before], codings=known
        )
        return {rule["rule"]: rule["failed_rows"] for rule in verdict["rules"] if not rule["ok"]}

    assert judged("same", entry) == {}
    assert judged("old history", {"classes": {}}) == {}
    far = json.loads(json.dumps(entry))
    far["bands"]["rgb"]["means"][1] -= 0.6 * 20  # of the deviation 20
    far["bands"]["rgb"]["means"][2] -= 0.4 * 30
    far["mask_classes"] = {"field": 50, "road": 50, "river": 10}
    assert judged("far", far) == {"band_means": 1, "class_shares": 2, "no_class_vanished": 1}
    page = (tmp_path / "far" / "docs" / "rules" / "band_means.html").read_text()
    assert "rgb green" in page
    assert "98 before, 110 now" in page


def test_what_only_warns_is_told_without_stopping_the_chain(workspace, tmp_path):
    config = Config.load(workspace.params_file)
    few = [["plane"] if i < 3 else None for i in range(100)]
    tiles = made_up(
        100,
        label=["town"] * 91 + ["wood"] * 9,
        split=["train", "test"] * 50,
        saturated_share=[0.6] + [0.4] * 99,
        cloud_share=[0.9] + [0.7] * 99,
        boxes_classes=few,
        boxes_count=[int(bool(box)) for box in few],
        mask_counts=[[900, 100 if i < 5 else 0, 0] for i in range(100)],
        mask_coding="land",
        mask_width=64,
        mask_height=64,
    )
    verdict = judge_table(
        config,
        tiles,
        tmp_path / "v",
        shard_sizes={"tiles-000000.tar": 10**6},
        codings={"land": ["field", "road"]},
    )
    told = {rule["rule"]: rule["first"] for rule in verdict["rules"] if not rule["ok"]}
    bright = f"{0:016x} 0.jpg"
    assert told == {
        "saturated": [bright],
        "cloud": [bright],
        "balance": ["wood"],
        "mask_tiles": ["road (masks)"],
        "box_tiles": ["plane (boxes)"],
    }
    assert verdict["ok"]
    assert verdict["figures"]["warnings"] == 5


def test_a_store_of_the_first_schema_is_judged(run, workspace, manifest, tmp_path):
    import pyarrow.parquet as pq

    run(class_folders(tmp_path / "in", each=12))
    path = workspace.store / store.MANIFEST
    later = [name for columns in store.ADDED.values() for name in columns]
    table = pq.read_table(path).drop_columns(later)
    pq.write_table(table.replace_schema_metadata({store.SCHEMA_KEY: b"1"}), path)
    config = Config.load(workspace.params_file)
    report = run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    assert (report.figures["tiles"], report.figures["broken"]) == (36, 0)


def test_the_verdict_in_markdown_puts_what_failed_first_and_links_its_pictures():
    from ringmo.data import data_docs

    def rule(name: str, ok: bool, soft: bool) -> dict[str, Any]:
        page = None if ok else f"rules/{name}.html"
        rows = {"failed_rows": 0 if ok else 2, "first": [] if ok else ["a|b", "c"]}
        return {
            "rule": name,
            "suite": "s",
            "says": name,
            "ok": ok,
            "soft": soft,
            "page": page,
        } | rows

    rules = [rule("fine", True, False), rule("odd", False, True), rule("bad", False, False)]
    text = data_docs.markdown({"rules": rules, "tiles": 1234}, lambda page: f"[x](http://m/{page})")
    head, _, *table = text.splitlines()
    assert head.startswith("**FAILED**: 1 of 3 rules broken, 1 warning, 1,234 tiles.")
    assert [line.split(" | ")[2] for line in table[2:]] == ["bad", "odd", "fine"]
    assert "| 2 | [x](http://m/rules/bad.html) |" in table[2]
    assert "a\\|b, c" in table[2]
