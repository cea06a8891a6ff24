"""COCO's instances: found by what they hold, read piece by piece, wrong ones named in a line."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_imagery import write

from ringmo.config import About
from ringmo.data import coco, store
from ringmo.data.layouts import Labels
from ringmo.data.scenes import Window
from ringmo.data.sources import Image, Listing, list_images
from ringmo.errors import BadInput

CATEGORIES = [{"id": 3, "name": "ship"}, {"id": 7, "name": "storage tank"}]


def listed(folder: Path, **about: Any) -> Listing:
    return list_images("in", folder, "auto", about=About(**about))


def boxes(image: Image, size: tuple[int, int] = (40, 48)) -> list[Any]:
    with Labels(image, size, {}) as labels:
        (member,) = labels.of(Window(0, 0, *size))
    found: list[Any] = json.loads(member.data)["boxes"]
    return found


def instances(images: dict[int, str], objects: list[tuple[Any, ...]], **more: Any) -> str:
    """objects: id of the image, of the category, and a box."""
    annotations = [
        {"id": 100 + i, "image_id": image, "category_id": category, "bbox": list(box),
         "area": 1.5, "iscrowd": 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        for i, (image, category, box) in enumerate(objects)
    ]  # fmt: skip
    listed_ = [
        {"id": i, "file_name": n, "width": 48, "height": 40, "license": 1}
        for i, n in images.items()
    ]
    whole = {"info": {"year": 2024}, "licenses": [{"id": 1}], "images": listed_}
    return json.dumps(whole | {"annotations": annotations, "categories": CATEGORIES} | more)


def made(folder: Path, where: str = "annotations/instances.json", count: int = 3) -> Path:
    for i in range(count):
        write(folder / "images" / f"{i}.png", i, "PNG")
    (folder / where).parent.mkdir(parents=True, exist_ok=True)
    objects = [(0, 3, (4, 6, 16, 10)), (0, 7, (20.5, 1, 3, 4)), (2, 3, (0, 0, 48, 40))]
    names = {i: f"{i}.png" for i in range(count)}
    (folder / where).write_text(instances(names, objects))
    return folder


@pytest.mark.parametrize(
    "where", ["annotations/instances.json", "instances.json", "images/boxes.json"]
)
def test_instances_are_found_by_what_they_hold(tmp_path, where):
    (made(tmp_path, where) / "readme.json").write_text('{"images": "of what"}')
    listing = listed(tmp_path)
    assert [image.path for image in listing.images] == [f"images/{i}.png" for i in range(3)]
    assert {image.layout for image in listing.images} == {"coco"} and listing.other_files == 1
    first, second, third = (boxes(image) for image in listing.images)
    ship, tank = first
    assert ship["class"] == "ship" and ship["points"] == [[4, 6], [20, 6], [20, 16], [4, 16]]
    assert ship["box"] == [4, 6, 20, 16] and not ship["difficult"]
    assert (tank["class"], tank["box"]) == ("storage tank", [20.5, 1, 23.5, 5])
    assert second == [] and len(third) == 1  # looked at, and nothing there
    assert any("3 of 3 images have boxes" in note for note in listing.notes)


def test_a_generated_set_comes_back_box_by_box(run, workspace, manifest, tmp_path):
    random = np.random.default_rng(5)
    expected: dict[str, list[Any]] = {}
    names, objects, crowds = {}, [], []
    for i in range(30):
        name = f"{i:02d}.png"
        write(tmp_path / "in" / "train2017" / name, i, "PNG")
        names[1000 - i] = name
        expected[name] = []
        for _ in range(random.integers(0, 5)):
            x, y = (round(float(v), 2) for v in random.uniform(0, (30, 25)))
            w, h = (round(float(v), 2) for v in random.uniform(1, 14, 2))
            category = CATEGORIES[int(random.integers(2))]
            crowds.append(bool(random.integers(2)))
            objects.append((1000 - i, category["id"], (x, y, w, h)))
            expected[name].append((category["name"], [x, y, x + w, y + h], crowds[-1]))
    whole = json.loads(instances(names, objects))
    for one, crowd in zip(whole["annotations"], crowds, strict=True):
        one["iscrowd"] = int(crowd)
    folder = tmp_path / "in" / "annotations"
    folder.mkdir()
    (folder / "instances_train2017.json").write_text(json.dumps(whole))
    report = run(tmp_path / "in")
    assert report.figures["boxes"] == len(objects)
    tiles = store.TileStore(workspace.store)
    for _, row in manifest().iterrows():
        place = row["boxes_shard"], int(row["boxes_offset"]), int(row["boxes_size"])
        found = json.loads(tiles.read(*place))["boxes"]
        wanted = expected[row["source"].rpartition("/")[2]]
        assert [(b["class"], b["difficult"]) for b in found] == [(c, d) for c, _, d in wanted]
        for box, (_, sides, _) in zip(found, wanted, strict=True):
            assert box["box"] == pytest.approx(sides, abs=1e-3)
        assert list(row["boxes_classes"]) == [c for c, _, _ in wanted]
        assert row["label"] != row["label"]  # train2017 is no class
    # One corrected box: one image is read again, its pixels are not written again.
    before = manifest().set_index("source")
    image = whole["annotations"][0]["image_id"]
    whole["annotations"][0]["bbox"] = [1, 1, 2, 2]
    (folder / "instances_train2017.json").write_text(json.dumps(whole, indent=1))
    report = run(tmp_path / "in")
    assert report.figures["images_read"] == 1 and report.figures["new_tiles"] == 0
    after = manifest().set_index("source")
    changed = list(after.index[after["boxes_hash"] != before["boxes_hash"]])
    assert changed == [f"train2017/{names[image]}"]


def test_files_of_several_parts_each_have_their_own_images(tmp_path):
    for part in ("train2017", "val2017"):
        write(tmp_path / part / "0.png", ord(part[0]), "PNG")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        box = (1, 2, 3, 4) if part == "train2017" else (5, 6, 7, 8)
        file = tmp_path / "annotations" / f"instances_{part}.json"
        file.write_text(instances({1: "0.png"}, [(1, 3, box)]))
    train, val = listed(tmp_path).images
    assert boxes(train)[0]["box"] == [1, 2, 4, 6] and boxes(val)[0]["box"] == [5, 6, 12, 14]
    # A name that could be either's is neither's.
    for file in (tmp_path / "annotations").iterdir():
        file.unlink()
    (tmp_path / "annotations" / "all.json").write_text(
        instances({1: "0.png"}, [(1, 3, (5, 6, 7, 8))])
    )
    listing = listed(tmp_path)
    assert not any(image.attachments for image in listing.images)
    assert any("several are of that name (first: 0.png)" in note for note in listing.notes)
    text = instances({1: "val2017/0.png", 2: "gone.png"}, [(1, 3, (5, 6, 7, 8))])
    (tmp_path / "annotations" / "all.json").write_text(text)
    listing = listed(tmp_path)
    assert [bool(image.attachments) for image in listing.images] == [False, True]
    assert any("1 more that it names are not here" in note for note in listing.notes)


IMAGES = [{"id": 1, "file_name": "0.png"}]


def wrong(**more: Any) -> str:
    whole = {"images": IMAGES, "annotations": [annotation()], "categories": CATEGORIES}
    return json.dumps(whole | more)


def annotation(**more: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], **more}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (wrong(annotations=[annotation(image_id=9)]), "annotation 5 is of image 9, which it does"),
        (wrong(annotations=[annotation(category_id=9)]), "annotation 5 is of category 9, which"),
        (wrong(annotations=[annotation(), annotation()]), "two annotations have the id 5"),
        (wrong(images=IMAGES * 2), "two images have the id 1"),
        (wrong(images=[*IMAGES, {"id": 2, "file_name": "0.png"}]), "two images are 0.png"),
        (wrong(categories=CATEGORIES * 2), "two categories have the id 3"),
        (wrong(images=[{"id": 1}]), "image 1 has no file_name"),
        (wrong(images=[{"file_name": "a"}]), 'an element of images has no id: {"file_name": "a"}'),
        (wrong(annotations=[annotation(bbox=[1, 2])]), "annotation 5 has no bbox"),
        (wrong(annotations=[annotation(bbox=[1, 2, 3, "x"])]), "no four numbers"),
        (wrong(annotations=[annotation(image_id=[1])]), r"is of image [1], which"),
        (wrong()[:-40], "no JSON|ends too early"),
        (wrong().replace('"images": [', '"images": [,'), "no JSON"),
        (wrong().replace('"annotations": [', '"annotations": [' + "[" * 100_000), "no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, said):
    write(tmp_path / "images" / "0.png", 1, "PNG")
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(BadInput) as error:
        listed(tmp_path, layout="coco")
    line = str(error.value)
    assert any(one in line for one in said.split("|")), line
    assert "\n" not in line and ": instances.json: " in line and "mend it" in line
    assert len(line) < 300


def test_a_file_of_no_boxes_is_missed_where_it_was_promised(tmp_path):
    write(tmp_path / "images" / "0.png", 1, "PNG")
    (tmp_path / "other.json").write_text("[1, 2]")
    assert len(listed(tmp_path).images) == 1
    with pytest.raises(BadInput, match="layout: coco, but no JSON file"):
        listed(tmp_path, layout="coco")


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((10, 10, -3, 4), r"object 1 \(ship\) has no area"),
        ((10, 10, 3, 0), r"object 1 \(ship\) has no area"),
        ((50, 10, 8, 8), "lies wholly outside the image"),
    ],
)
def test_a_box_that_cannot_be_sets_its_image_aside(tmp_path, box, said):
    write(tmp_path / "images" / "0.png", 1, "PNG")
    (tmp_path / "a.json").write_text(instances({1: "0.png"}, [(1, 3, box)]))
    (image,) = listed(tmp_path).images
    with pytest.raises(BadInput, match=said):
        boxes(image)
    with pytest.raises(BadInput, match="of an image of 48x40 pixels, it has 32x32"):
        boxes(image, (32, 32))


@pytest.mark.long
def test_a_large_file_is_never_held(tmp_path):
    """70 MB of polygons, of which boxes are kept."""
    file = tmp_path / "large.json"
    polygon = [round(x / 7, 3) for x in range(9000)]
    count = 1000
    with file.open("w") as out:
        out.write('{"categories": ' + json.dumps(CATEGORIES) + ', "annotations": [')
        for i in range(count):
            one = annotation(id=i, image_id=i % 10, segmentation=[polygon])
            out.write((", " if i else "") + json.dumps(one))
        out.write('], "images": [')
        names = [json.dumps({"id": i, "file_name": f"{i}.png"}) for i in range(10)]
        out.write(", ".join(names) + "]}")
    assert file.stat().st_size > 50e6
    assert coco.looks_like(file)
    tracemalloc.start()
    found = coco.read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(json.loads(one)["boxes"]) for one in found.values()) == count
    assert peak < 20e6
