"""Which files a source is: folders, lists, patterns."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_imagery import class_folders, write

from ringmo.data.sources import list_images
from ringmo.errors import BadInput


def paths(*args: object, **kwargs: object) -> list[str]:
    return [image.path for image in list_images("in", *args, **kwargs).images]  # type: ignore[arg-type]


def test_patterns_fit_paths_or_names(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", classes=2, each=2)
    write(source / "class0" / "0000_old.png", 1, "PNG")
    write(source / "old" / "0000.jpg", 2)
    assert len(paths(source, "auto")) == 6
    images = [f"class{c}/000{i}.jpg" for c in range(2) for i in range(2)]
    assert paths(source, "auto", ["*.jpg"], ["old/*"]) == images
    assert paths(source, "auto", ["*"], ["*_old.png", "old/*"]) == images
    assert paths(source, "auto", ["class*/000?.jpg"]) == images
    listing = list_images("in", source, "auto", ["*"], ["*_old.png"])
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


def test_a_folder_is_listed_in_the_order_of_its_paths_part_by_part(tmp_path: Path) -> None:
    names = [
        "b/2.png",
        "b/10.png",
        "b.png",
        "a/z/1.png",
        "a/b.png",
        "b-c/1.png",
        "B/1.png",
        "Z.png",
    ]
    for number, name in enumerate(names):
        write(tmp_path / name, number, "PNG")

    def below(folder: Path) -> list[str]:
        """Names in order, and in each folder's place what lies in it."""
        found = []
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            found += below(entry) if entry.is_dir() else [entry.relative_to(tmp_path).as_posix()]
        return found

    listing = list_images("in", tmp_path, "auto")
    assert [image.path for image in listing.images] == below(tmp_path)
    for image in listing.images:
        stat = image.file.stat()
        assert (image.size, image.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert image.folder == str(tmp_path)


def test_links_are_not_followed_and_loops_end(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", classes=2, each=2)
    (source / "class0" / "loop").symlink_to(source)
    (source / "again.jpg").symlink_to(source / "class0" / "0000.jpg")
    (source / "dead.jpg").symlink_to(source / "gone.jpg")
    os.mkfifo(source / "class1" / "pipe.jpg")
    listing = list_images("in", source, "auto")
    assert len(listing.images) == 4 and listing.other_files == 4
    assert any("3 links left out" in note for note in listing.notes)
    (tmp_path / "linked").symlink_to(source)
    assert len(list_images("in", tmp_path / "linked", "auto").images) == 4


def test_odd_names_are_listed_or_named(tmp_path: Path) -> None:
    names = [
        "图像/港口 1.jpg",
        "with space/a.b.JPG",
        "line\nbreak/x.jpg",
        "#hash/%41.jpg",
        "no/suffix",
    ]
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    listing = list_images("in", tmp_path, "auto")
    assert {image.path for image in listing.images} == set(names)
    assert all(image.file.read_bytes()[:2] == b"\xff\xd8" for image in listing.images)
    foreign = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.jpg")
    write(foreign, 9)
    listing = list_images("in", tmp_path, "auto")
    assert {image.path for image in listing.images} == set(names) and listing.other_files == 1
    (note,) = [note for note in listing.notes if "not UTF-8" in note]
    assert r"caf\udce9/\udcff.jpg" in note and "\n" not in note
    with pytest.raises(BadInput, match="no image"):
        list_images("in", foreign.parent, "auto")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_listing_costs_little_more_than_asking_for_sizes() -> None:
    """A million files take seconds, not the minute that a Path for each would take."""

    def least(what: Callable[[], object]) -> float:
        took = []
        for _ in range(5):
            started = time.process_time()
            what()
            took.append(time.process_time() - started)
        return min(took)

    def bare() -> None:
        for folder in os.scandir(source):
            for entry in os.scandir(folder):
                entry.stat()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        source = Path(name)
        for folder in range(20):
            (source / f"class{folder:02d}").mkdir()
            for number in range(1000):
                os.mknod(source / f"class{folder:02d}" / f"{number}.jpg")
        listing = list_images("in", source, "auto")
        assert len(listing.images) == 20_000 and listing.images[-1].label == "class19"
        assert least(lambda: list_images("in", source, "auto")) < 4 * least(bare)
