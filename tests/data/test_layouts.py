"""What belongs to an image is found as data sets are published, and cut with it."""

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from real import REAL
from small_imagery import geotiff, pixels, write, write_bands

from ringmo.config import About, Config, Ingest
from ringmo.data import codings
from ringmo.data.layouts import Labels, Member
from ringmo.data.sources import Image, Listing, list_images
from ringmo.errors import BadInput

VOC = """<annotation><object><name>ship</name><difficult>1</difficult>
<bndbox><xmin>4</xmin><ymin>6</ymin><xmax>20</xmax><ymax>16</ymax></bndbox></object></annotation>"""
FAIR1M = """<?xml version="1.0" encoding="utf-8"?><annotation><objects><object>
<coordinate>pixel</coordinate><type>rectangle</type>
<possibleresult><name>Dry Cargo Ship</name></possibleresult>
<points><point>4,6</point><point>20,6</point><point>20,16</point><point>4,16</point>
<point>4,6</point></points></object></objects></annotation>"""
DOTA = "imagesource:GoogleEarth\ngsd:0.15\n4 6 20 6 20 16 4 16 ship 0\n"


def listed(source: Path, labels: str = "auto", codings: Any = None, **about: Any) -> Listing:
    return list_images("in", source, labels, about=About(**about), codings=codings)


def only(source: Path, **about: Any) -> Image:
    (image,) = [image for image in listed(source, **about).images if image.attachments]
    return image


def window(
    row: int = 0, col: int = 0, height: int = 40, width: int = 48, scale: float = 1.0
) -> Any:
    return SimpleNamespace(row=row, col=col, height=height, width=width, scale=scale)


def cut(
    image: Image, *windows: Any, size: tuple[int, int] = (40, 48), codings: Any = None, **where: Any
) -> list[Member]:
    with Labels(image, size, codings or {}, **where) as labels:
        return [member for one in windows or [window()] for member in labels.of(one)]


def numbers(member: Member) -> Any:
    return np.asarray(Picture.open(io.BytesIO(member.data)))


def boxes(member: Member) -> Any:
    return json.loads(member.data)["boxes"]


def save(path: Path, array: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(array).save(path, "PNG", **options)
    return path


def grey(value: int | list[int] = 0, height: int = 40, width: int = 48) -> Any:
    """Columns of values, as a mask."""
    return np.resize(np.array(value, np.uint8), (height, width))


def pair(folder: Path, mask: Any, name: str = "0", **options: Any) -> Path:
    write(folder / "images" / f"{name}.png", len(name) + ord(name[0]), "PNG")
    save(folder / "masks" / f"{name}.png", mask, **options)
    return folder


def voc(folder: Path, text: str, name: str = "0") -> Path:
    write(folder / "JPEGImages" / f"{name}.jpg", 1)
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(text)
    return folder


PUBLISHED: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "LoveDA": (
        ["Train/Urban/images_png/0.png", "Train/Rural/images_png/0.png"],
        {
            "Train/Urban/images_png/0.png": ["Train/Urban/masks_png/0.png"],
            "Train/Rural/images_png/0.png": ["Train/Rural/masks_png/0.png"],
        },
    ),
    "Potsdam": (
        ["2_Ortho_RGB/top_potsdam_2_10_RGB.png", "3_Ortho_IRRG/top_potsdam_2_10_IRRG.png"],
        {
            "2_Ortho_RGB/top_potsdam_2_10_RGB.png": ["5_Labels_all/top_potsdam_2_10_label.png"],
            "3_Ortho_IRRG/top_potsdam_2_10_IRRG.png": ["5_Labels_all/top_potsdam_2_10_label.png"],
        },
    ),
    "Potsdam in one folder": (
        ["top_potsdam_2_10_RGB.png", "top_potsdam_2_11_RGB.png"],
        {"top_potsdam_2_10_RGB.png": ["top_potsdam_2_10_label.png"]},
    ),
    "Vaihingen": (
        ["top/top_mosaic_09cm_area1.png"],
        {"top/top_mosaic_09cm_area1.png": ["gts_for_participants/top_mosaic_09cm_area1.png"]},
    ),
    "iSAID": (
        ["train/images/P0000.png", "val/images/P0003.png"],
        {
            "train/images/P0000.png": [
                "train/Semantic_masks/images/P0000_instance_color_RGB.png",
            ]
        },
    ),
    "DeepGlobe": (
        ["train/1_sat.png", "train/2_sat.png"],
        {"train/1_sat.png": ["train/1_mask.png"], "train/2_sat.png": ["train/2_mask.png"]},
    ),
    "DIOR": (
        ["JPEGImages-trainval/00001.jpg", "JPEGImages-test/11726.jpg"],
        {
            "JPEGImages-trainval/00001.jpg": ["Annotations/Horizontal Bounding Boxes/00001.xml"],
            "JPEGImages-test/11726.jpg": ["Annotations/Horizontal Bounding Boxes/11726.xml"],
        },
    ),
    "RSOD": (
        ["aircraft/JPEGImages/aircraft_1.jpg", "oiltank/JPEGImages/oiltank_1.jpg"],
        {
            "aircraft/JPEGImages/aircraft_1.jpg": ["aircraft/Annotation/xml/aircraft_1.xml"],
            "oiltank/JPEGImages/oiltank_1.jpg": ["oiltank/Annotation/xml/oiltank_1.xml"],
        },
    ),
    "DOTA": (
        ["train/images/P0000.png", "val/images/P0003.png"],
        {
            "train/images/P0000.png": ["train/labelTxt-v1.0/labelTxt/P0000.txt"],
            "val/images/P0003.png": ["val/labelTxt-v1.0/labelTxt/P0003.txt"],
        },
    ),
    "FAIR1M": (
        ["train/part1/images/0.png", "train/part2/images/0.png"],
        {
            "train/part1/images/0.png": ["train/part1/labelXml/0.xml"],
            "train/part2/images/0.png": ["train/part2/labelXmls/0.xml"],
        },
    ),
    "Sen1Floods11": (
        ["S1Hand/Spain_1_S1Hand.png", "S2Hand/Spain_1_S2Hand.png"],
        {
            "S1Hand/Spain_1_S1Hand.png": ["LabelHand/Spain_1_LabelHand.png"],
            "S2Hand/Spain_1_S2Hand.png": ["LabelHand/Spain_1_LabelHand.png"],
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_found_by_themselves(tmp_path, name):
    images, belongs = PUBLISHED[name]
    for number, image in enumerate(images):
        write(tmp_path / image, number, "PNG")
    for labels in belongs.values():
        for path in labels:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".png":
                save(file, grey([0, 255]))
            else:
                text = {"FAIR1M": FAIR1M, "DOTA": DOTA}.get(name, VOC)
                file.write_text(text)
    if name == "RSOD":  # published beside the XML: other text, which is no label of ours
        (tmp_path / "aircraft/Annotation/labels").mkdir()
        (tmp_path / "aircraft/Annotation/labels/aircraft_1.txt").write_text("a\tship\t1\t2\t3\t4")
    if name == "iSAID":
        save(tmp_path / "train/Instance_masks/images/P0000_instance_id_RGB.png", grey([0, 9]))
    (tmp_path / "readme.txt").write_text("nothing")
    listing = listed(tmp_path)
    found = {i.path: [a.path for a in i.attachments] for i in listing.images if i.attachments}
    assert found == belongs
    assert sorted(image.path for image in listing.images) == sorted(images)
    assert all(image.label is None for image in listing.images)
    # What is attached is read.
    for image in listing.images:
        if image.attachments:
            assert len(cut(image)) == 1


def test_change_pairs_are_the_earlier_with_the_mask_and_the_later(tmp_path):
    for split in ("train", "val"):
        for i in range(3):
            write(tmp_path / split / "A" / f"{i}.png", i, "PNG")
            save(tmp_path / split / "label" / f"{i}.png", grey([0, 255]))
            if i:
                write(tmp_path / split / "B" / f"{i}.png", 9 + i, "PNG")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text("1.png\n")
    listing = listed(tmp_path)
    seconds = {image.path: image.second for image in listing.images if image.second}
    assert seconds == {f"{s}/A/{i}.png": f"{s}/B/{i}.png" for s in ("train", "val") for i in (1, 2)}
    # A mask of what has changed is no label of an image whose other date is missing.
    masks = {image.path: [a.path for a in image.attachments] for image in listing.images}
    assert {path for path, labels in masks.items() if labels} == set(seconds)
    assert masks["train/A/1.png"] == ["train/label/1.png"]
    assert listing.other_files == 3 and any("2 masks left out" in note for note in listing.notes)


def test_classes_called_a_and_b_are_no_dates(tmp_path):
    for name in ("A", "B", "C"):
        for i in range(2):
            write(tmp_path / name / f"{i}.png", i + 10 * ord(name), "PNG")
    listing = listed(tmp_path)
    assert not any(image.second for image in listing.images)
    assert {image.label for image in listing.images} == {"A", "B", "C"}


def test_what_has_no_partner_stays_as_it_was(tmp_path):
    pair(tmp_path, grey([0, 255]), "0")
    write(tmp_path / "images" / "1.png", 5, "PNG")
    save(tmp_path / "masks" / "2.png", grey(255))
    write(tmp_path / "elsewhere" / "lone_mask.png", 8, "PNG")
    listing = listed(tmp_path)
    attached = {image.path: len(image.attachments) for image in listing.images}
    assert attached == {"images/0.png": 1, "images/1.png": 0, "elsewhere/lone_mask.png": 0}
    assert listing.other_files == 1
    assert any("1 masks left out" in note and "masks/2.png" in note for note in listing.notes)


def test_a_label_that_several_images_could_own_is_nobodys(tmp_path):
    for folder in ("images/east", "images/west"):
        write(tmp_path / folder / "0.png", len(folder), "PNG")
    save(tmp_path / "masks" / "0.png", grey([0, 255]))
    write(tmp_path / "images" / "west" / "1.png", 3, "PNG")
    save(tmp_path / "masks" / "1.png", grey([0, 255]))
    listing = listed(tmp_path)
    assert [i.path for i in listing.images if i.attachments] == ["images/west/1.png"]
    assert any("images of the same name in several" in note for note in listing.notes)


def test_labels_none_and_layout_classes_attach_nothing(tmp_path):
    pair(voc(tmp_path, VOC), grey([0, 255]))
    for listing in (listed(tmp_path, "none"), listed(tmp_path, layout="classes")):
        assert not any(image.attachments for image in listing.images)
        assert len(listing.images) == 2, "a mask is no imagery all the same"


def test_a_named_layout_must_be_there(tmp_path):
    write(tmp_path / "a" / "0.png", 1, "PNG")
    for layout in ("masks", "change", "voc", "dota", "fair1m", "vectors"):
        with pytest.raises(BadInput, match=f"layout: {layout}, but no"):
            listed(tmp_path, layout=layout)


def test_masks_in_a_folder_of_any_name_are_named_by_their_files(tmp_path):
    for sensor in ("S2L2A", "S1RTC"):
        write(tmp_path / sensor / "x.png", len(sensor) + ord(sensor[1]), "PNG")
    save(tmp_path / "LULC" / "x.png", grey([1, 4, 7]))
    assert len(listed(tmp_path).images) == 3
    listing = listed(tmp_path, layout="masks", mask_files=["LULC/*"])
    assert {i.path: i.attachments[0].path for i in listing.images} == {
        "S1RTC/x.png": "LULC/x.png",
        "S2L2A/x.png": "LULC/x.png",
    }
    assert listing.images[0].attachments[0].shared and listing.images[0].masks == "index"


def test_include_chooses_images_and_their_labels_follow(tmp_path):
    voc(tmp_path, VOC)
    pair(tmp_path, grey([0, 255]), "png")
    listing = list_images("in", tmp_path, "auto", ["*.jpg"])
    assert [len(image.attachments) for image in listing.images] == [1]
    listing = list_images("in", tmp_path, "auto", ["*"], ["*.xml"])
    assert [a.part for i in listing.images for a in i.attachments] == ["mask"]


def test_attached_changes_with_any_label_and_its_coding(tmp_path):
    image = only(pair(tmp_path, grey([0, 255])))
    before = image.attached
    assert 0 < before < 2**60 and only(tmp_path).attached == before
    save(tmp_path / "masks" / "0.png", grey([255, 0]))
    os.utime(tmp_path / "masks" / "0.png", ns=(1, 1))
    after = only(tmp_path).attached
    assert after != before
    assert only(tmp_path, masks="index").attached not in (before, after)
    assert Image("in", "a.png", str(tmp_path), 1, 1).attached == 0


# Masks


def test_how_masks_are_coded_is_decided_for_the_source(tmp_path):
    """Alone, a mask of zeros says nothing, and one of 0 and 1 something else."""
    cases: dict[str, tuple[list[Any], str, list[int]]] = {
        "black and white": ([grey([0, 255]), grey(0)], "binary", [0, 0]),
        "zero and one": ([grey([0, 1]), grey(0)], "zero_one", [0, 0]),
        "with ignored": ([grey([0, 1, 255]), grey(1)], "zero_one", [0, 1]),
        "numbers": ([grey([0, 1]), grey([2, 5])], "index", [0, 2]),
        "grey edges": ([grey([*[0] * 60, *[250] * 40, *range(256)][:140]), grey(3)], "binary", [0]),
        "nothing": ([grey(0), grey(0)], "auto", [0, 0]),
    }
    for name, (masks, coding, first) in cases.items():
        for i, mask in enumerate(masks):
            pair(tmp_path / name, mask, str(i))
        images = listed(tmp_path / name).images
        assert {image.masks for image in images} == {coding}, name
        corner = [int(numbers(cut(image)[0])[0, 0]) for image in images]
        assert corner[: len(first)] == first, name
        facts = cut(images[0])[0].facts
        assert facts["mask_coding"] == codings.recorded(coding)


def test_a_mask_member_is_numbers_and_their_counts(tmp_path):
    image = only(pair(tmp_path, grey([0, 2, 3, 255])))
    (member,) = cut(image)
    assert (numbers(member) == grey([0, 2, 3, 255])).all()
    quarter = 40 * 48 // 4
    assert member.facts | {"mask_hash": "", "mask_size": 0} == {
        "mask_size": 0,
        "mask_hash": "",
        "mask_width": 48,
        "mask_height": 40,
        "mask_coding": "index",
        "mask_counts": [quarter, 0, quarter, quarter, quarter],
    }
    assert member.facts["mask_size"] == len(member.data) and member.suffix == "mask.png"
    assert cut(image)[0].data == member.data


def test_palettes_give_their_numbers_and_colours_their_classes(tmp_path):
    indexed = Picture.fromarray(grey([0, 1, 4]))
    indexed.putpalette([255, 255, 255, 9, 9, 9, 255, 0, 0, 3, 3, 3, 7, 7, 7])
    (tmp_path / "p" / "masks").mkdir(parents=True)
    write(tmp_path / "p" / "images" / "0.png", 1, "PNG")
    indexed.save(tmp_path / "p" / "masks" / "0.png")
    assert (numbers(cut(only(tmp_path / "p"))[0]) == grey([0, 1, 4])).all()

    isprs = np.array([[255, 0, 0], [255, 255, 255], [0, 0, 255], [0, 0, 0]], np.uint8)
    image = only(pair(tmp_path / "c", np.resize(isprs, (40, 48, 3))))
    assert image.masks == "potsdam"
    assert (numbers(cut(image)[0]) == np.resize([0, 1, 2, 255], (40, 48))).all()
    assert codings.class_names("potsdam", {})["2"] == "building"
    # A window of nothing but white is a class, not a grey value.
    white = only(pair(tmp_path / "w", np.full((40, 48, 3), 255, np.uint8)), masks="vaihingen")
    assert set(cut(white)[0].facts["mask_counts"]) == {0, 1920}


def test_codings_of_params_yaml(tmp_path):
    mine = {"field": 3, "road": [5, 6], "ignore": 0}
    image = only(pair(tmp_path / "v", grey([0, 3, 5, 6])), masks="mine", codings={"mine": mine})
    (member,) = cut(image, codings={"mine": mine})
    assert (numbers(member) == grey([255, 0, 1, 1])).all()
    assert codings.class_names("mine", {"mine": mine}) == {"0": "field", "1": "road"}
    colours = {"field": [0, 255, 0], "road": [[255, 0, 0], [200, 0, 0]], "ignore": [0, 0, 0]}
    array = np.resize(np.array([[0, 255, 0], [200, 0, 0], [0, 0, 0]], np.uint8), (40, 48, 3))
    source = pair(tmp_path / "c", array)
    assert only(source, codings={"own": colours}).masks == "own", "auto knows a user's codings"
    (member,) = cut(only(source, codings={"own": colours}), codings={"own": colours})
    assert (numbers(member) == np.resize([0, 1, 255], (40, 48))).all()


@pytest.mark.parametrize(
    ("coding", "said"),
    [
        ({"a": 1, "b": 1}, "1 stands for `a` and for `b`"),
        ({"road": [255, 0, 0], "ignore": 0}, "for black write"),
        ({"a": [[1, 2, 3]], "b": 4}, "values and colours"),
        ({"a": [300, 0, 0]}, "0 to 255"),
        ({"ignore": 3}, "0 classes"),
        ({"a": []}, "no colour|one or the other"),
    ],
)
def test_a_coding_that_contradicts_itself_is_refused_in_params_yaml(workspace, coding, said):
    values = Config.load(workspace.params_file).model_dump(by_alias=True)
    values["ingest"]["mask_codings"] = {"mine": coding}
    with pytest.raises(BadInput, match=said):
        Config.check(values, "params.yaml")
    with pytest.raises(ValueError, match="is no coding"):
        Ingest(sources=["in"], about={"in": About(masks="lovda")})


def test_colours_of_no_class_are_noise_or_another_coding(tmp_path):
    array = np.full((40, 48, 3), 255, np.uint8)
    array[0, 0], array[1, 1] = (0, 0, 255), (254, 254, 255)  # one of 1,920 is strange
    image = only(pair(tmp_path / "few", array), masks="potsdam")
    assert cut(image)[0].facts["mask_counts"][-1] == 1
    array[:4, :] = (1, 2, 3)
    with pytest.raises(BadInput, match=r"10\.\d% of its mask has colours that potsdam does not"):
        cut(only(pair(tmp_path / "many", array), masks="potsdam"))
    # Strange in one tile, noise in the whole.
    large = np.full((400, 480, 3), 255, np.uint8)
    large[:5, :5] = (1, 2, 3)
    source = pair(tmp_path / "large", large)
    image = only(source, masks="potsdam")
    member = cut(image, window(height=20, width=20), size=(400, 480))[0]
    assert member.facts["mask_counts"][-1] == 25
    # Pictures beside images are no masks: said, and the images stay.
    pair(tmp_path / "pictures", pixels(5))
    listing = listed(tmp_path / "pictures")
    assert len(listing.images) == 1 and not listing.images[0].attachments
    assert any("no known coding" in note for note in listing.notes) and listing.other_files == 1
    with pytest.raises(BadInput, match="no known coding"):
        listed(tmp_path / "pictures", layout="masks")


@pytest.mark.parametrize("form", ["png", "tif"])
def test_windows_of_a_mask_are_parts_of_it(tmp_path, form):
    whole = np.random.default_rng(1).integers(0, 7, (300, 260), dtype=np.uint8)
    write(tmp_path / "images" / "0.png", 1, "PNG", width=260, height=300)
    if form == "png":
        save(tmp_path / "masks" / "0.png", whole)
    else:
        write_bands(tmp_path / "masks" / "0.tif", whole[..., None])
    image = only(tmp_path)
    windows = [window(r, c, 100, 65) for r in range(0, 300, 100) for c in range(0, 260, 65)]
    tiles = [numbers(member) for member in cut(image, *windows, size=(300, 260))]
    rows = [np.hstack(tiles[i : i + 4]) for i in range(0, 12, 4)]
    assert (np.vstack(rows) == whole).all()
    # Nearest: the pixel under each centre. 3 to 1 has one, 1 to 2 has each twice.
    (third,) = cut(image, window(10, 20, 50, 40, 3.0), size=(300, 260))
    assert (numbers(third) == whole[31:181:3, 61:181:3]).all()
    (twice,) = cut(image, window(0, 0, 64, 64, 0.5), size=(300, 260))
    assert (numbers(twice) == whole[:32, :32].repeat(2, 0).repeat(2, 1)).all()


def test_values_without_data_are_unknown(tmp_path):
    values = np.resize(np.array([-1, 0, 1], np.int16), (48, 48, 1))
    write_bands(tmp_path / "x_S2Hand.tif", np.resize(np.int16(3), (48, 48, 12)))
    write_bands(tmp_path / "x_LabelHand.tif", values)
    image = only(tmp_path)
    assert (numbers(cut(image, window(height=48), size=(48, 48))[0])[0, :3] == [255, 0, 1]).all()
    write_bands(tmp_path / "x_LabelHand.tif", values + 3, nodata=2)
    (member,) = cut(only(tmp_path), window(height=48), size=(48, 48))
    assert (numbers(member)[0, :3] == [255, 3, 4]).all()


def test_masks_that_cannot_be_are_named(tmp_path):
    def refused(name: str, said: str, **about: Any) -> None:
        image = only(tmp_path / name, **about)
        with pytest.raises(BadInput, match=said) as error:
            cut(image)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)

    pair(tmp_path / "size", grey([0, 255], 20, 48))
    refused("size", "its mask has 48x20 pixels, the image 48x40")
    pair(tmp_path / "values", grey([1, 9, 12]))
    refused("values", "has the values 9, 12, which loveda does not know", masks="loveda")
    pair(tmp_path / "binary", np.resize(np.array([[1, 2, 3]], np.uint8), (40, 48, 3)))
    refused("binary", "colours, binary is for grey values", masks="binary")
    pair(tmp_path / "cut", np.random.default_rng(1).integers(0, 9, (40, 48), dtype=np.uint8))
    file = tmp_path / "cut" / "masks" / "0.png"
    file.write_bytes(file.read_bytes()[:400])
    refused("cut", "damaged mask")
    pair(tmp_path / "zip", grey(0))
    with zipfile.ZipFile(tmp_path / "zip" / "masks" / "0.png", "w") as archive:
        archive.writestr("0.png", b"no mask")
    refused("zip", "its mask is not an image")
    pair(tmp_path / "empty", grey(0))
    (tmp_path / "empty" / "masks" / "0.png").write_bytes(b"")
    refused("empty", "its mask is not an image")
    pair(tmp_path / "gone", grey([0, 255]))
    image = only(tmp_path / "gone")
    image.attachments[0].file.unlink()
    with pytest.raises(BadInput, match=r"its mask cannot be read: No such file"):
        cut(image)
    write_bands(tmp_path / "fractions" / "x.tif", np.zeros((48, 48, 3), np.uint8))
    write_bands(tmp_path / "fractions" / "x_mask.tif", np.full((48, 48, 1), 0.5, np.float32))
    with pytest.raises(BadInput, match="fractions"):
        cut(only(tmp_path / "fractions"), size=(48, 48))


# Boxes


@pytest.mark.parametrize("text", [VOC, FAIR1M, DOTA], ids=["voc", "fair1m", "dota"])
def test_boxes_of_every_format_are_the_same(tmp_path, text):
    image = only(voc(tmp_path, text), layout="voc")
    (member,) = cut(image)
    (box,) = boxes(member)
    assert box | {"class": "", "difficult": False} == {
        "class": "",
        "points": [[4, 6], [20, 6], [20, 16], [4, 16]],
        "box": [4, 6, 20, 16],
        "difficult": False,
        "share": 1,
        "cut": False,
    }
    assert box["class"] == ("Dry Cargo Ship" if text == FAIR1M else "ship")
    assert box["difficult"] == (text == VOC)
    assert member.facts["boxes_count"] == 1 and member.facts["boxes_classes"] == [box["class"]]
    assert member.facts["boxes_size"] == len(member.data)


def test_boxes_are_cut_with_their_tiles(tmp_path):
    text = "10 10 30 10 30 20 10 20 ship 0\n20 0 40 20 20 40 0 20 plane 1\n"
    write(tmp_path / "images" / "0.png", 1, "PNG")
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt" / "0.txt").write_text(text)
    image = only(tmp_path)
    left, right, below = cut(
        image, window(0, 0, 40, 20), window(0, 20, 40, 20), window(15, 24, 10, 8, 1.0)
    )
    ship, plane = boxes(left)
    assert (ship["box"], ship["share"], ship["cut"]) == ([10, 10, 20, 20], 0.5, True)
    # An oriented box keeps its corners, also those outside.
    assert plane["points"] == [[20, 0], [40, 20], [20, 40], [0, 20]]
    assert plane["box"] == [0, 0, 20, 40] and plane["share"] == 0.5 and plane["difficult"]
    assert left.facts["boxes_outside"] == 0  # beyond the tile is not beyond the image
    assert boxes(right)[0]["points"][0] == [-10, 10] and boxes(right)[0]["box"] == [0, 10, 10, 20]
    assert boxes(below)[0]["box"] == [0, 0, 6, 5]
    (half,) = cut(image, window(0, 0, 20, 24, 2.0))
    assert boxes(half)[0]["box"] == [5, 5, 15, 10]
    # Touching an edge is not being seen; a tile without objects says that it was looked at.
    (none,) = cut(image, window(0, 40, 10, 8))
    assert boxes(none) == [] and none.facts["boxes_count"] == 0 and none.facts["boxes_size"] > 0


def test_boxes_that_cannot_be_are_named(tmp_path):
    def box(sides: str, name: str = "ship") -> str:
        values = zip(("xmin", "ymin", "xmax", "ymax"), sides.split(), strict=True)
        inner = "".join(f"<{side}>{value}</{side}>" for side, value in values)
        inner = f"<name>{name}</name><bndbox>{inner}</bndbox>"
        return f"<annotation><object>{inner}</object></annotation>"

    size = "<size><width>480</width><height>400</height></size>"
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    cases = {
        box("60 5 90 9"): r"object 1 \(ship\) lies wholly outside the image",
        box("40 5 70 9"): r"lies by 73% outside the image",
        box("5 5 5 9"): "has no area",
        box("9 5 5 9"): "has no area",
        box("5 5 9 9", " "): "object 1 has no class",
        box("5 5 nan 9"): "no finite corners",
        box("5 5 x 9"): "<xmax> is no number: x",
        box("5 5 9 9").replace("<object>", size + "<object>"): "of 480x400 pixels, it has 48x40",
        bomb + box("5 5 9 9", "&b;"): "document type",
        f'<?xml version="1.0" encoding="utf-16"?>{bomb}{box("5 5 9 9")}': "no XML|no text",
        "<annotation><object>": "no XML",
        "<kml></kml>": "XML of <kml>",
        "1 2 3 4 5 6 7 ship 0": "line 1: expected `x1 y1",
        "1 2 3 4 5 6 7 8": "object 1 has no class",
        "": "",
    }
    for text, said in cases.items():
        image = only(voc(tmp_path, text), layout="voc")
        if not said:
            assert boxes(cut(image)[0]) == []
            continue
        with pytest.raises(BadInput, match=said) as error:
            cut(image)
        assert "\n" not in str(error.value)
    (tmp_path / "Annotations" / "0.xml").write_bytes((bomb + box("5 5 9 9")).encode("utf-16"))
    with pytest.raises(BadInput, match="document type"):
        cut(only(tmp_path, layout="voc"))


def test_a_box_a_little_over_the_edge_is_clipped_and_counted(tmp_path):
    image = only(voc(tmp_path, VOC.replace("<xmax>20", "<xmax>50").replace(">4<", ">40<")))
    (member,) = cut(image)
    assert boxes(member)[0]["box"] == [40, 6, 48, 16] and member.facts["boxes_outside"] == 1


@pytest.mark.parametrize("turn", [1, -1], ids=["clockwise", "counter-clockwise"])
@pytest.mark.parametrize("first", range(4))
def test_corners_in_any_order_around_are_one_box(tmp_path, turn, first):
    corners = [(10, 2), (20, 12), (10, 22), (0, 12)]
    around = [corners[(first + turn * i) % 4] for i in range(4)]
    write(tmp_path / "images" / "0.png", 1, "PNG")
    (tmp_path / "labelTxt").mkdir()
    text = " ".join(f"{x} {y}" for x, y in around)
    (tmp_path / "labelTxt" / "0.txt").write_text(f"{text} plane 0\n")
    left, whole = cut(only(tmp_path), window(0, 0, 40, 10), window())
    (box,) = boxes(whole)
    # Corners stay in the order that the file gives: the first may be an object's head.
    assert [tuple(point) for point in box["points"]] == around
    assert box["box"] == [0, 2, 20, 22] and box["share"] == 1
    assert boxes(left)[0]["share"] == 0.5


def test_chinese_class_names_in_their_own_encoding(tmp_path):
    text = '<?xml version="1.0" encoding="gb2312"?>' + VOC.replace("ship", "货船")
    voc(tmp_path, "")
    (tmp_path / "Annotations" / "0.xml").write_bytes(text.encode("gb2312"))
    (member,) = cut(only(tmp_path))
    assert member.facts["boxes_classes"] == ["货船"]


# Vectors


def draw(path: Path, crs: str, shapes: list[Any], values: list[Any], name: str = "class") -> None:
    """Shapes in the scene's EPSG:32631 to a file of vectors in another CRS."""
    import pyogrio.raw
    import shapely
    from rasterio.warp import transform

    def there(points: Any) -> Any:
        return np.column_stack(transform("EPSG:32631", crs, points[:, 0], points[:, 1]))

    moved = [shapely.transform(shape, there) for shape in shapes]
    drivers = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile"}
    text = any(isinstance(value, str) for value in values)
    pyogrio.raw.write(
        str(path),
        geometry=np.array(shapely.to_wkb(moved), dtype=object),
        field_data=[np.array(values, dtype=object if text else np.int32)],
        fields=[name],
        crs=crs,
        driver=drivers[path.suffix],
        geometry_type="Polygon",
    )


def scene(path: Path) -> dict[str, Any]:
    """A scene of 100x100 metres of which the top left pixel is at 500000, 5000000."""
    import rasterio

    with rasterio.open(geotiff(path, 1, 500_000, 5_000_000, side=100)) as opened:
        return {"size": (100, 100), "crs": opened.crs, "transform": opened.transform}


def squares() -> list[Any]:
    import shapely

    def square(row: int, col: int, side: int) -> Any:
        left, top = 500_000 + col, 5_000_000 - row
        return shapely.box(left, top - side, left + side, top)

    return [square(10, 10, 20), square(50, 60, 30), square(20, 20, 20), square(5000, 0, 10)]


@pytest.mark.parametrize(
    ("suffix", "crs"),
    [(".gpkg", "EPSG:32631"), (".geojson", "EPSG:4326"), (".shp", "EPSG:3857")],
)
def test_vectors_are_burnt_where_they_lie(tmp_path, suffix, crs):
    where = scene(tmp_path / "scene.tif")
    draw(tmp_path / f"scene{suffix}", crs, squares(), ["wood", "lake", "field", "far"])
    before = sorted(tmp_path.iterdir())
    image = only(tmp_path)
    assert len(image.attachments) == (5 if suffix == ".shp" else 1)
    (member,) = cut(image, window(height=100, width=100), **where)
    wanted = np.zeros((100, 100), np.uint8)
    wanted[10:30, 10:30] = 4
    wanted[50:80, 60:90] = 3
    wanted[20:40, 20:40] = 2  # the later one lies above
    assert (numbers(member) == wanted).all()
    assert codings.class_names(member.facts["mask_coding"], {}) == {
        "0": "background", "1": "far", "2": "field", "3": "lake", "4": "wood",
    }  # fmt: skip
    (part,) = cut(image, window(25, 15, 50, 60), **where)
    assert (numbers(part) == wanted[25:75, 15:75]).all()
    (far,) = cut(image, window(0, 0, 5, 5), **where)
    assert (numbers(far) == 0).all()
    (half,) = cut(image, window(0, 0, 50, 50, 2.0), **where)
    assert (numbers(half) == wanted[1::2, 1::2]).all()
    assert sorted(tmp_path.iterdir()) == before, "something was written beside the scene"


def test_classes_of_vectors(tmp_path):
    where = scene(tmp_path / "scene.tif")
    tile = window(height=100, width=100)
    file = tmp_path / "scene.gpkg"
    draw(file, "EPSG:32631", squares(), [3, 9, 3, 4], name="code")
    (plain,) = cut(only(tmp_path), tile, **where)
    assert plain.facts["mask_coding"] == "binary" and len(plain.facts["mask_counts"]) == 3
    (coded,) = cut(only(tmp_path, vector_class="code"), tile, **where)
    assert coded.facts["mask_coding"] == "index" and numbers(coded)[60, 70] == 9
    with pytest.raises(BadInput, match=r"no attribute kind \(they have: code\)"):
        cut(only(tmp_path, vector_class="kind"), tile, **where)
    file.unlink()
    draw(file, "EPSG:32631", squares(), ["wood", "lake", "wood", "wood"], name="Label")
    mine = {"mine": {"none": 0, "lake": 1, "wood": 2}}
    (named,) = cut(only(tmp_path, masks="mine", codings=mine), tile, codings=mine, **where)
    assert numbers(named)[60, 70] == 1 and numbers(named)[15, 15] == 2
    few = {"mine": {"none": 0, "lake": 1}}
    with pytest.raises(BadInput, match="the class wood, which is not known"):
        cut(only(tmp_path, masks="mine", codings=few), tile, codings=few, **where)
    with pytest.raises(BadInput, match="no coordinates"):
        cut(only(tmp_path), tile, size=(100, 100))
    image = only(tmp_path)
    file.write_text('<OGRVRTDataSource><OGRVRTLayer name="x"/></OGRVRTDataSource>')
    with pytest.raises(BadInput, match="no GeoPackage, GeoJSON or Shapefile"):
        cut(image, tile, **where)
    file.write_text('{"type": "FeatureCollection", "features": [{]}')
    with pytest.raises(BadInput, match="vectors"):
        cut(image, tile, **where)


def test_one_file_of_vectors_serves_all_scenes_only_where_said(tmp_path):
    where = scene(tmp_path / "a.tif")
    scene(tmp_path / "b.tif")
    draw(tmp_path / "all.geojson", "EPSG:4326", squares(), ["a", "b", "c", "d"])
    assert not any(image.attachments for image in listed(tmp_path).images)
    images = listed(tmp_path, layout="vectors").images
    assert [image.attachments[0].path for image in images] == ["all.geojson"] * 2
    assert all(image.attachments[0].shared for image in images)
    assert cut(images[1], window(height=100, width=100), **where)[0].facts["mask_counts"][1] > 0


# The real ones


@pytest.mark.skipif(not REAL.is_dir(), reason="no real imagery beside the checkout")
@pytest.mark.parametrize(
    ("source", "about", "images", "labelled", "coding"),
    [
        ("segmentation/roads", {}, 60, 60, "binary"),
        ("segmentation/loveda", {"masks": "loveda"}, 2, 2, "loveda"),
        ("change/levir-cd", {}, 16, 8, "binary"),
        ("change/dsifn-cd", {}, 14, 7, "binary"),
        ("detection/rsod", {}, 64, 64, None),
        ("geotiff/sen1floods11", {}, 2, 2, "sen1floods11"),
        ("geotiff/terramesh", {"layout": "masks", "mask_files": ["LULC/*"]}, 12, 12, "index"),
    ],
)
def test_real_data_sets(source, about, images, labelled, coding):
    import rasterio

    listing = listed(REAL / source, **about)
    assert len(listing.images) == images and listing.other_files == 0
    with_labels = [image for image in listing.images if image.attachments]
    assert len(with_labels) == labelled
    found: Counter[str] = Counter()
    for image in with_labels:
        with rasterio.open(image.file) as opened:
            size = (opened.height, opened.width)
        member, *heights = cut(image, window(0, 0, *size), size=size)
        assert len(heights) == ("terramesh" in source)
        found.update(member.facts.get("boxes_classes", []))
        assert member.facts.get("mask_coding") == coding
        if coding is not None:
            assert sum(member.facts["mask_counts"]) == size[0] * size[1]
    if coding is None:
        assert found == {"aircraft": 272, "oiltank": 159, "overpass": 16, "playground": 16}


@pytest.mark.skipif(not REAL.is_dir(), reason="no real imagery beside the checkout")
def test_labels_of_another_image_are_found_out():
    """The boxes of one of the two DOTA images are not its own."""
    reasons = []
    for image in listed(REAL / "detection" / "dota").images:
        size = Picture.open(image.file).size[::-1]
        try:
            assert cut(image, window(0, 0, *size), size=size)[0].facts["boxes_count"] == 64
        except BadInput as error:
            reasons.append(str(error))
    assert reasons == ["its boxes: object 1 (plane) lies wholly outside the image"]


UNREADABLE = """
import os, sys
from pathlib import Path
from ringmo.data.layouts import Labels
from ringmo.data.sources import list_images
from ringmo.errors import BadInput

def look(source):
    try:
        for image in list_images("in", source, "auto").images:
            with Labels(image, (40, 48), {}):
                print("read")
    except BadInput as error:
        print(error)

look(Path(sys.argv[1]))  # also loads what nobody may load
os.setgid(65534); os.setuid(65534)
look(Path(sys.argv[1]))
look(Path(sys.argv[2]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_what_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        source = pair(Path(folder) / "in", grey([0, 255]))
        (source / "masks" / "0.png").chmod(0)
        closed = pair(Path(folder) / "closed", grey([0, 255]))
        (closed / "masks").chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE, str(source), str(closed)],
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines() == [
            "read",
            "its mask cannot be read: Permission denied",
            f"{closed}/masks: may not be read",
        ], done.stderr
