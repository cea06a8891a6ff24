"""Folders and lists of imagery: which files are images, and which class they are of.

A list is a text file with a path a line, absolute or below the list's folder, and after a tab
perhaps a class; without one the folder says it, as in a folder of imagery.

A folder named `unlabelled` anywhere in a source holds images that no class is claimed for, beside
labelled ones: its images never get a label.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path, PurePosixPath

from ringmo.data import decode
from ringmo.errors import BadInput

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".gtiff"}
# Formats people have imagery in that ringmo does not read: set aside with a reason, not ignored.
FOREIGN_SUFFIXES = {".jp2", ".bmp", ".gif", ".webp", ".img", ".ecw", ".sid", ".heic"}
OTHER_SUFFIXES = {
    *(".txt", ".csv", ".xml", ".json", ".geojson", ".yaml", ".yml", ".md", ".pdf", ".html"),
    *(".tfw", ".jgw", ".pgw", ".wld", ".prj", ".ovr", ".aux", ".shp", ".shx", ".dbf", ".cpg"),
    *(".zip", ".tar", ".gz", ".npy", ".parquet", ".py", ".log", ".db"),
}

UNLABELLED = {"unlabelled", "unlabeled"}
# Folder names that say how a data set is laid out, not what its images show.
MASK_FOLDERS = {"mask", "masks", "label", "labels", "gt", "groundtruth", "ground_truth"} | {
    *("annotation", "annotations", "labeltxt", "segmentation_masks"),
}
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "a", "b", "t1", "t2", "im1", "im2", "tiles"}
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
LAYOUT_FOLDERS = MASK_FOLDERS | IMAGE_FOLDERS | SPLIT_FOLDERS


@dataclass(frozen=True)
class Image:
    """A file that is, or claims to be, an image. `root` is the source as params.yaml gives it."""

    root: str
    path: str
    file: Path
    size: int
    mtime_ns: int
    label: str | None = None


@dataclass
class Listing:
    images: list[Image] = field(default_factory=list)
    other_files: int = 0
    notes: list[str] = field(default_factory=list)


# A file of a source: its path below it, itself, and the class that a list gives it.
Found = tuple[str, Path, str | None]


def list_images(
    root: str,
    source: Path,
    labels: str,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Listing:
    """Images of a source in order of their paths; links are not followed.

    Args:
        root: the source's name in params.yaml.
        source: a folder, or a list of files.
        labels: `auto` (a list's, or the parent folder's name, if images lie in two or more) or
            `none`.
        include, exclude: patterns with *, ? and [] for paths below the source, or for the names
            of files; a file is taken if one of the first and none of the second fits.

    Raises:
        BadInput: no such folder or list, a list that is no text, or no image in it.
    """
    if not source.exists():
        raise BadInput(f"{source}: no such folder: mend ingest.sources in params.yaml, or --data")
    listing = Listing()
    wanted = _chosen(include, exclude)
    found: list[Found] = []
    links = left_out = 0
    by_list = source.is_file()
    for path, file, label in _listed(source) if by_list else _below(source):
        if not wanted(path):
            left_out += 1
        elif by_list:
            found.append((path, file, label))
        elif file.is_symlink():
            links += 1
        elif _may_be_image(file):
            found.append((path, file, label))
        else:
            listing.other_files += 1
    if links:
        listing.other_files += links
        listing.notes.append(f"{source}: {links} links left out: links are not followed")
    if left_out:
        listing.other_files += left_out
        listing.notes.append(
            f"{source}: {left_out} files left out: see ingest.include and ingest.exclude"
        )
    masks = set() if by_list else {path for path, *_ in found if _is_mask(source, path)}
    if masks:
        listing.other_files += len(masks)
        listing.notes.append(f"{source}: {len(masks)} masks left out: they are labels, not imagery")
    found = [one for one in found if one[0] not in masks]
    if not found:
        but = f" that is wanted ({left_out} are left out)" if left_out else ""
        raise BadInput(f"{source}: no image (JPEG, PNG or TIFF) in it{but}")
    classes: dict[str, str] = {}
    if labels == "auto":
        classes = {path: label for path, _, label in found if label is not None}
        if not classes:
            classes, why_none = _classes([path for path, *_ in found])
            if why_none:
                listing.notes.append(f"{source}: no labels: {why_none}")
    listing.images = [_image(root, path, file, classes.get(path)) for path, file, _ in found]
    return listing


def _image(root: str, path: str, file: Path, label: str | None) -> Image:
    try:
        stat = file.stat()
    except OSError:  # a list may name what is not there: reading it says so
        return Image(root, path, file, -1, 0, label)
    return Image(root, path, file, stat.st_size, stat.st_mtime_ns, label)


def _chosen(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    wanted, unwanted = (
        re.compile("|".join(map(translate, patterns)) or r"(?!)") for patterns in (include, exclude)
    )

    def chosen(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(map(wanted.match, (path, name))) and not any(map(unwanted.match, (path, name)))

    return chosen


def _below(folder: Path) -> Iterator[Found]:
    for file in _files(folder):
        yield file.relative_to(folder).as_posix(), file, None


def _listed(file: Path) -> list[Found]:
    """The files that a list names, each once, by path."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(
            f"{file} is no list of images: ingest.sources names folders, and text files with a "
            f"path a line"
        ) from None
    found: dict[str, Found] = {}
    for line in lines:
        name, _, label = line.partition("\t")
        if not name.strip() or name.startswith("#"):
            continue
        image = Path(os.path.normpath(file.parent / Path(name.strip()).expanduser()))
        inside = image.is_relative_to(file.parent)
        path = image.relative_to(file.parent if inside else image.anchor).as_posix()
        found.setdefault(path, (path, image, label.strip() or None))
    return sorted(found.values())


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, sorted by path; links to folders are not walked into."""
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except PermissionError:
        raise BadInput(f"{folder}: may not be read") from None
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            yield from _files(entry)
        else:
            yield entry


def _may_be_image(file: Path) -> bool:
    suffix = file.suffix.lower()
    if file.name.startswith(".") or suffix in OTHER_SUFFIXES or not file.is_file():
        return False
    if suffix in IMAGE_SUFFIXES | FOREIGN_SUFFIXES:
        return True
    try:
        with file.open("rb") as opened:
            return decode.kind(opened.read(16)) is not None
    except OSError:
        return False


def _is_mask(folder: Path, path: str) -> bool:
    """Whether a file lies in a folder of masks that has a folder of images beside it."""
    parent = PurePosixPath(path).parent
    if parent.name.lower() not in MASK_FOLDERS:
        return False
    beside = {entry.name.lower() for entry in (folder / parent.parent).iterdir() if entry.is_dir()}
    return bool(beside & IMAGE_FOLDERS)


def _classes(paths: list[str]) -> tuple[dict[str, str], str | None]:
    """Path → class, and where there are no classes a reason worth telling."""
    claimed = [p for p in paths if not UNLABELLED & {x.lower() for x in PurePosixPath(p).parts}]
    parents = {PurePosixPath(path).parent for path in claimed}
    if PurePosixPath(".") in parents:
        return {}, "images lie directly in it" if len(parents) > 1 else None
    names = {parent.name for parent in parents}
    layout = {name for name in names if name.lower() in LAYOUT_FOLDERS}
    # A class may be called B; a folder called masks is never one.
    if layout and (layout == names or any(len(name) > 2 for name in layout)):
        return {}, f"its folders are a layout ({', '.join(sorted(layout))}), not classes"
    if len(names) < 2:
        return {}, None
    return {path: PurePosixPath(path).parent.name for path in claimed}, None
