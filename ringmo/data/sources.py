"""Folders of imagery: which files are images, and which class their folder says they are.

A folder named `unlabelled` anywhere in a source holds images that no class is claimed for, beside
labelled ones: its images never get a label.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
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


def list_images(root: str, folder: Path, labels: str) -> Listing:
    """Images below `folder` in order of their paths; links are not followed.

    Args:
        root: the source's name in params.yaml.
        labels: `auto` (the parent folder's name, if images lie in two or more) or `none`.

    Raises:
        BadInput: no such folder, or no image in it.
    """
    if not folder.exists():
        raise BadInput(f"{folder}: no such folder: mend ingest.sources in params.yaml, or --data")
    if not folder.is_dir():
        raise BadInput(f"{folder} is a file: ingest.sources names folders with images")
    listing = Listing()
    links = 0
    found: list[tuple[str, Path, os.stat_result]] = []
    for file in _files(folder):
        if file.is_symlink():
            links += 1
        elif _may_be_image(file):
            found.append((file.relative_to(folder).as_posix(), file, file.stat()))
        else:
            listing.other_files += 1
    if links:
        listing.other_files += links
        listing.notes.append(f"{folder}: {links} links left out: links are not followed")

    masks = {path for path, *_ in found if _is_mask(folder, path)}
    if masks:
        listing.other_files += len(masks)
        listing.notes.append(f"{folder}: {len(masks)} masks left out: they are labels, not imagery")
    paths = [path for path, *_ in found if path not in masks]
    if not paths:
        raise BadInput(f"{folder}: no image (JPEG, PNG or TIFF) in it")
    classes, why_none = _classes(paths) if labels == "auto" else ({}, None)
    if why_none:
        listing.notes.append(f"{folder}: no labels: {why_none}")
    for path, file, stat in found:
        if path not in masks:
            listing.images.append(
                Image(root, path, file, stat.st_size, stat.st_mtime_ns, classes.get(path))
            )
    return listing


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
