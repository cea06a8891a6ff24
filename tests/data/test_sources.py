"""Which files a source is: folders, lists, patterns."""

import os
from pathlib import Path

import pytest
from small_imagery import class_folders, write

from ringmo.data.sources import list_images
from ringmo.errors import BadInput


def paths(*args: object, **kwargs: object) -> list[str]:
    return [image.path for image in list_images("in", *args, **kwargs).images]  # type: ignore[arg-type]


def test_patterns_fit_paths_or_names(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", classes=2, each=2)
    write(source / "class0" / "0000_mask.png", 1, "PNG")
    write(source / "old" / "0000.jpg", 2)
    assert len(paths(source, "auto")) == 6
    images = [f"class{c}/000{i}.jpg" for c in range(2) for i in range(2)]
    assert paths(source, "auto", ["*.jpg"], ["old/*"]) == images
    assert paths(source, "auto", ["*"], ["*_mask.png", "old/*"]) == images
    assert paths(source, "auto", ["class*/000?.jpg"]) == images
    listing = list_images("in", source, "auto", ["*"], ["*_mask.png"])
    assert listing.other_files == 1 and "1 files left out" in listing.notes[0]
    with pytest.raises(BadInput, match=r"no image .* that is wanted \(6 are left out\)"):
        list_images("in", source, "auto", ["*.tif"])


def test_a_list_gives_paths_and_classes(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", classes=2, each=2)
    far = write(tmp_path / "elsewhere" / "far.jpg", 7)
    listed = source / "list.txt"
    listed.write_text(
        "# path and class\n"
        "class1/0001.jpg\tharbour\n\n"
        f"{far}\ttown\n"
        "class0/0000.jpg\n"
        "./class1/../class1/0001.jpg\tharbour\n"
        "class0/gone.jpg\ttown\n"
    )
    images = {image.path: image for image in list_images("in", listed, "auto").images}
    assert {path: image.label for path, image in images.items()} == {
        "class0/0000.jpg": None,
        "class0/gone.jpg": "town",
        "class1/0001.jpg": "harbour",
        far.relative_to(os.sep).as_posix(): "town",
    }
    assert images[far.relative_to(os.sep).as_posix()].file == far
    assert paths(listed, "none", ["class*"]) == [p for p in images if p.startswith("class")]
    listed.write_text("class0/0000.jpg\nclass1/0001.jpg\n")
    by_folder = list_images("in", listed, "auto").images
    assert [image.label for image in by_folder] == ["class0", "class1"]


def test_what_is_no_list_is_refused_in_one_line(tmp_path: Path) -> None:
    photo = write(tmp_path / "photo.jpg", 1)
    with pytest.raises(BadInput, match="no list of images"):
        list_images("in", photo, "auto")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    with pytest.raises(BadInput, match="no image"):
        list_images("in", empty, "auto")
