"""Published splits: read from folders and lists, kept for ever, and what they lack is drawn."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from real import REAL
from small_imagery import pixels, write
from test_blocks import judged, textured
from test_coco import instances

from ringmo.data.published import split_of
from ringmo.data.sources import list_images

PUBLISHED: dict[str, Any] = {"split__by": "published", "ingest__tile_size": 64}


def mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(np.eye(40, 48, dtype=np.uint8)).save(path)


def parts(folder: Path) -> dict[str, int]:
    """Part → images, as they are listed."""
    listing = list_images("in", folder, "auto", splits=True)
    return dict(Counter(str(image.published) for image in listing.images))


def splits(manifest: Any, level: int = 0) -> dict[str, set[str]]:
    """A part of the paths, by its place in them, → the splits of its tiles."""
    rows = manifest()
    found = rows.groupby(rows["source"].str.split("/").str[level])["split"].agg(set)
    return {str(name): set(of) for name, of in found.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Train", "train"),
        ("TESTING", "test"),
        ("valid", "val"),
        ("train2017", "train"),
        ("images_val", "val"),
        ("JPEGImages-trainval", "trainval"),
        ("train_station", None),
        ("test_val", None),
        ("contest", None),
        ("masks", None),
    ],
)
def test_a_folder_is_a_split_by_its_words_alone(name, split):
    assert split_of(name) == split


def test_folders_of_splits_give_their_tiles_splits(run, workspace, manifest, tmp_path):
    for number, part in enumerate(("train", "Val", "test")):
        for i in range(8):
            write(tmp_path / "in" / part / f"class{i % 2}" / f"{i}.png", 100 * number + i, "PNG")
    report = run(tmp_path / "in", **PUBLISHED)
    assert splits(manifest) == {"train": {"train"}, "Val": {"val"}, "test": {"test"}}
    assert report.figures["classes"] == 2
    assert any("published as test (8), val (8), train (8)" in note for note in report.notes)
    # What comes later goes where it is published too, and what is known stays where it is.
    before = manifest().set_index("key")["split"]
    write(tmp_path / "in" / "train" / "class0" / "new.png", 900, "PNG")
    (tmp_path / "in" / "test" / "class0" / "0.png").rename(
        tmp_path / "in" / "train" / "class0" / "moved.png"
    )
    report = run(tmp_path / "in", **PUBLISHED)
    after = manifest().set_index("key")["split"]
    assert (after[before.index] == before).all() and len(after) == len(before) + 1
    assert any("1 tiles keep the split that was decided before" in note for note in report.notes)


def test_what_leaks_keeps_its_published_split_and_is_a_warning(run, workspace, manifest, tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        for i in range(12):
            write(tmp_path / "in" / part / f"class{i % 2}" / f"{i}.png", 100 * number + i, "PNG")
    same = pixels(0)  # of the train part, but for a step of grey
    Picture.fromarray(same + 1).save(tmp_path / "in" / "test" / "class0" / "again.png")
    run(tmp_path / "in", **PUBLISHED)
    rows = manifest().set_index("source")
    assert rows.loc["test/class0/again.png", "split"] == "test"
    assert rows.loc["train/class0/0.png", "split"] == "train"
    from ringmo.config import Config
    from ringmo.data.validation import validate
    from ringmo.stage import run_stage

    config = Config.load(workspace.params_file)
    report = run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    told = [row for row in report.tables["rules"] if not row["ok"]]
    assert [(row["soft"], row["failed_rows"]) for row in told if "look alike" in row["rule"]] == [
        (True, 2)
    ]


def test_without_val_it_is_drawn_from_train(run, manifest, tmp_path):
    for number, part in enumerate(("train", "test")):
        for i in range(20):
            write(tmp_path / "in" / part / f"class{i % 2}" / f"{i}.png", 100 * number + i, "PNG")
    run(tmp_path / "in", **PUBLISHED)
    rows = manifest()
    counts = rows.groupby([rows["source"].str[:4], "split"]).size().to_dict()
    assert counts == {("test", "test"): 20, ("trai", "train"): 18, ("trai", "val"): 2}


def test_of_a_test_without_labels_val_takes_the_place(run, manifest, tmp_path):
    for number, part in enumerate(("Train", "Val", "Test")):
        for i in range(10):
            folder = tmp_path / "in" / part / "Urban"
            write(folder / "images_png" / f"{i}.png", 99 * number + i, "PNG")
            if part != "Test":
                mask(folder / "masks_png" / f"{i}.png")
    report = run(tmp_path / "in", ingest__mask_codings={"two": {"a": 0, "b": 1}}, **PUBLISHED)
    assert splits(manifest) == {"Train": {"train", "val"}, "Val": {"test"}, "Test": {"test"}}
    assert any("val is the test: the test has no labels" in note for note in report.notes)
    rows = manifest()
    assert set(rows["split"][rows["mask_shard"].isna()]) == {"test"}


def test_train_alone_and_images_of_no_part_are_drawn(run, manifest, tmp_path):
    for i in range(20):
        write(tmp_path / "alone" / "train" / f"class{i % 2}" / f"{i}.png", i, "PNG")
        write(tmp_path / "none" / f"class{i % 2}" / f"{i}.png", 100 + i, "PNG")
    report = run(tmp_path / "alone", tmp_path / "none", **PUBLISHED)
    rows = manifest()
    for _, some in rows.groupby("source_root"):
        assert set(some["split"]) == {"train", "val", "test"}
    assert any("has no test: splits are drawn" in note for note in report.notes)
    assert any("no published splits in it" in note for note in report.notes)


def test_lists_of_voc_tell_train_from_val(tmp_path):
    for i in range(9):
        write(tmp_path / "JPEGImages" / f"{i:05d}.jpg", i)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    said = {"train": range(4), "val": range(4, 6), "trainval": range(6), "test": range(6, 8)}
    for name, numbers in said.items():
        (lists / f"{name}.txt").write_text("".join(f"{i:05d}\n" for i in numbers))
    (lists / "ship_test.txt").write_text("00000  1\n00001 -1\n")  # a class's: no split
    assert parts(tmp_path) == {"train": 4, "val": 2, "test": 2, "None": 1}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("train.txt", "harbour/{i:02d}.jpg"),
        ("aid-train.txt", "./harbour/{i:02d}"),
        ("splits/train.csv", "harbour/{i:02d}.jpg,3"),
        ("TRAIN.TXT", "data/harbour/{i:02d}.jpg 3"),
    ],
)
def test_lists_name_images_with_or_without_folder_and_suffix(tmp_path, name, line):
    for i in range(4):
        write(tmp_path / "data" / "harbour" / f"{i:02d}.jpg", i)
        write(tmp_path / "data" / "town" / f"{i:02d}.jpg", 10 + i)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(line.format(i=i) + "\n" for i in range(3)))
    (file.parent / "test.txt").write_text("town/03.jpg\n")
    listing = list_images("in", tmp_path, "auto", splits=True)
    found = {image.path: image.published for image in listing.images if image.published}
    named = {f"data/harbour/{i:02d}.jpg": "trainval" for i in range(3)}
    assert found == named | {"data/town/03.jpg": "test"}
    assert listing.other_files == 0


def test_one_line_names_what_all_sensors_saw(tmp_path):
    for i in range(4):
        for sensor in ("S1Hand", "S2Hand"):
            write(tmp_path / sensor / f"Ghana_{i}_{sensor}.png", i + 10 * (sensor == "S1Hand"))
    for name, numbers in {"train": (0, 1), "valid": (2,), "test": (3,)}.items():
        lines = "".join(f"Ghana_{i}_S1Hand.tif,Ghana_{i}_LabelHand.tif\n" for i in numbers)
        (tmp_path / f"flood_{name}_data.csv").write_text(lines)
    assert parts(tmp_path) == {"train": 4, "val": 2, "test": 2}


def test_an_image_in_lists_of_two_splits_is_not_seen(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", i, "PNG")
    (tmp_path / "train.txt").write_text("0\n1\n2\n")
    (tmp_path / "test.txt").write_text("2.png\n3.png\n")
    listing = list_images("in", tmp_path, "auto", splits=True)
    assert [image.published for image in listing.images] == ["trainval", "trainval", "test", "test"]
    assert any("1 images are in lists of several splits" in note for note in listing.notes)


def test_files_of_coco_tell_of_the_images_they_name(tmp_path):
    for i in range(4):
        write(tmp_path / "images" / f"{i}.png", i, "PNG")
    (tmp_path / "annotations").mkdir()
    for part, numbers in {"train": (0, 1), "val": (2, 3)}.items():
        text = instances({i: f"{i}.png" for i in numbers}, [(i, 3, (1, 2, 3, 4)) for i in numbers])
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(text)
    assert parts(tmp_path) == {"trainval": 2, "test": 2}  # val is the test: there is none


def test_two_dates_are_of_one_part_and_place(run, workspace, manifest, tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        for i in range(6):
            for date in ("A", "B"):
                number_of = 100 * number + 10 * i + (date == "B")
                write(tmp_path / "in" / part / date / f"{i}.png", number_of, "PNG")
            mask(tmp_path / "in" / part / "label" / f"{i}.png")
    report = run(tmp_path / "in", **PUBLISHED)
    assert report.figures["pairs"] == 18
    assert splits(manifest) == {name: {name} for name in ("train", "val", "test")}
    assert "pair_in_one_split" not in judged(workspace)


def test_known_scenes_keep_their_split_whatever_is_published(run, manifest, tmp_path):
    for i in range(8):
        for part, number in (("train", i), ("test", 100 + i)):
            path = tmp_path / "in" / part / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Picture.fromarray(textured(number, 160, 160)).save(path)
    run(tmp_path / "in", split__by="place", ingest__tile_size=64)
    before = manifest().groupby("source")["split"].agg(set)
    # Other windows of the same scenes are new tiles of known ground.
    run(tmp_path / "in", split__by="published", ingest__tile_size=64, ingest__stride=48)
    after = manifest()
    assert (after["ingest"] == 2).any()
    assert (after.groupby("source")["split"].agg(set) == before).all()


def test_ingests_in_any_number_are_the_same(run, workspace, manifest, tmp_path):
    def make(part: str, numbers: range) -> None:
        for i in numbers:
            write(tmp_path / "in" / part / f"class{i % 2}" / f"{i}.png", i, "PNG")

    make("train", range(12))
    make("test", range(20, 24))
    run(tmp_path / "in", **PUBLISHED)
    first = manifest().set_index("key")["split"]
    make("train", range(12, 18))
    make("val", range(40, 44))
    run(tmp_path / "in", **PUBLISHED)
    then = manifest().set_index("key")["split"]
    assert (then[first.index] == first).all()
    rows = manifest()
    late = rows[rows["ingest"] == 2]
    assert set(late["split"][late["source"].str.startswith("val")]) == {"val"}
    assert set(late["split"][late["source"].str.startswith("train")]) == {"train"}


@pytest.fixture
def rsod() -> Path:
    folder = REAL / "detection" / "rsod"
    if not folder.is_dir():
        pytest.skip("no real imagery beside the checkout")
    return folder


def test_real_images_as_voc_publishes_them(
    rsod: Path, run: Callable[..., Any], manifest: Any, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    stems = sorted(path.stem for path in (rsod / "annotations").iterdir())[::3]
    for here, there, suffix in (
        ("images", "JPEGImages", ".jpg"), ("annotations", "Annotations", ".xml"),
    ):  # fmt: skip
        (source / there).mkdir(parents=True)
        for stem in stems:
            shutil.copy(rsod / here / f"{stem}{suffix}", source / there)
    lists = {"trainval": stems[::2], "test": stems[1::2]}
    (source / "ImageSets" / "Main").mkdir(parents=True)
    for name, some in lists.items():
        (source / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(some))
    report = run(source, split__by="published", ingest__tile_size=1024)
    rows = manifest()
    stem = rows["source"].str.rpartition("/")[2].str.rpartition(".")[0]
    assert set(stem[rows["split"] == "test"]) == set(lists["test"])
    assert set(rows["split"][stem.isin(lists["trainval"])]) == {"train", "val"}
    assert report.figures["boxes"] > 50 and report.figures["unused"] == 0
