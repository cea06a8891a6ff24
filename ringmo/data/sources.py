"""Folders, lists and buckets of imagery: which files are images, and which class they are of.

A list is a text file with a path a line, absolute or below the list's folder, and after a tab
perhaps a class; without one the folder says it, as in a folder of imagery.

A folder named `unlabelled` anywhere in a source holds images that no class is claimed for, beside
labelled ones: its images never get a label.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from pathlib import Path, PurePosixPath

from ringmo.data import decode
from ringmo.data.buckets import Bucket
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
    """A file or an object that is, or claims to be, an image.

    root: the source as params.yaml gives it. path: below it. file: where it lies, or where
    `fetch` brings it. mtime_ns: for an object a number that changes with its bytes.
    """

    root: str
    path: str
    file: Path
    size: int
    mtime_ns: int
    label: str | None = None
    bucket: Bucket | None = None

    @property
    def folder(self) -> str:
        """Where `path` begins."""
        return self.bucket.url if self.bucket else str(self.file)[: -len(self.path) - 1]

    def fetch(self) -> None:
        """Bring an object to `file`.

        Raises:
            OSError: it is gone.
            BadInput, Unreachable: as `Bucket.fetch`.
        """
        if self.bucket is not None and not self.file.exists():
            self.bucket.fetch(self.path, self.file)

    def forget(self) -> None:
        """Remove what `fetch` brought."""
        if self.bucket is not None:
            self.file.unlink(missing_ok=True)


@dataclass
class Listing:
    images: list[Image] = field(default_factory=list)
    other_files: int = 0
    notes: list[str] = field(default_factory=list)


def list_images(
    root: str,
    source: Path | Bucket,
    labels: str,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    fetched: Path = Path(),
) -> Listing:
    """Images of a source in order of their paths; links are not followed.

    Args:
        root: the source's name in params.yaml.
        source: a folder, a list of files, or a bucket's prefix.
        fetched: the folder to which a bucket's objects come.
        labels: `auto` (a list's, or the parent folder's name, if images lie in two or more) or
            `none`.
        include, exclude: patterns with *, ? and [] for paths below the source, or for the names
            of files; a file is taken if one of the first and none of the second fits.

    Raises:
        BadInput: no such folder, list or bucket, a list that is no text, or no image in it.
        Unreachable: a bucket does not answer.
    """
    if isinstance(source, Path) and not source.exists():
        raise BadInput(f"{source}: no such folder: mend ingest.sources in params.yaml, or --data")
    listing = Listing()
    name = source.url if isinstance(source, Bucket) else str(source)
    if isinstance(source, Bucket):
        every = _in_bucket(root, source, fetched)
    else:
        every = _listed(root, source) if source.is_file() else _below(root, source)
    wanted = _chosen(include, exclude)
    found: list[Image] = []
    folders: set[PurePosixPath] = set()
    links = left_out = 0
    for image in every:
        folders.update(PurePosixPath(image.path).parents)
        if not wanted(image.path):
            left_out += 1
        elif isinstance(source, Path) and source.is_dir() and image.file.is_symlink():
            links += 1
        elif _may_be_image(image, looked_at=isinstance(source, Path) and source.is_dir()):
            found.append(image)
        else:
            listing.other_files += 1
    if links:
        listing.other_files += links
        listing.notes.append(f"{name}: {links} links left out: links are not followed")
    if left_out:
        listing.other_files += left_out
        listing.notes.append(
            f"{name}: {left_out} files left out: see ingest.include and ingest.exclude"
        )
    by_list = isinstance(source, Path) and source.is_file()
    masks = [] if by_list else [image for image in found if _is_mask(image.path, folders)]
    if masks:
        listing.other_files += len(masks)
        listing.notes.append(f"{name}: {len(masks)} masks left out: they are labels, not imagery")
        aside = {image.path for image in masks}
        found = [image for image in found if image.path not in aside]
    if not found:
        but = f" that is wanted ({left_out} are left out)" if left_out else ""
        raise BadInput(f"{name}: no image (JPEG, PNG or TIFF) in it{but}")
    classes: dict[str, str] = {}
    if labels == "auto":
        classes = {image.path: image.label for image in found if image.label is not None}
        if not classes:
            classes, why_none = _classes([image.path for image in found])
            if why_none:
                listing.notes.append(f"{name}: no labels: {why_none}")
    listing.images = [replace(image, label=classes.get(image.path)) for image in found]
    return listing


def _chosen(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    wanted, unwanted = (
        re.compile("|".join(map(translate, patterns)) or r"(?!)") for patterns in (include, exclude)
    )

    def chosen(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(map(wanted.match, (path, name))) and not any(map(unwanted.match, (path, name)))

    return chosen


def _below(root: str, folder: Path) -> Iterator[Image]:
    for file in _files(folder):
        yield _image(root, file.relative_to(folder).as_posix(), file)


def _listed(root: str, file: Path) -> Iterator[Image]:
    """The files that a list names, each once, by path."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(
            f"{file} is no list of images: ingest.sources names folders, and text files with a "
            f"path a line"
        ) from None
    found: dict[str, Image] = {}
    for line in lines:
        name, _, label = line.partition("\t")
        if not name.strip() or name.startswith("#"):
            continue
        image = Path(os.path.normpath(file.parent / Path(name.strip()).expanduser()))
        inside = image.is_relative_to(file.parent)
        path = image.relative_to(file.parent if inside else image.anchor).as_posix()
        found.setdefault(path, _image(root, path, image, label.strip() or None))
    return iter([found[path] for path in sorted(found)])


def _in_bucket(root: str, bucket: Bucket, fetched: Path) -> Iterator[Image]:
    for one in bucket.objects():
        # The path's digest: keys may hold what no file's name can.
        file = fetched / hashlib.sha256(f"{bucket.url}/{one.path}".encode()).hexdigest()
        yield Image(root, one.path, file, one.size, one.mark, bucket=bucket)


def _image(root: str, path: str, file: Path, label: str | None = None) -> Image:
    try:
        stat = file.stat()
    except OSError:  # a list may name what is not there: reading it says so
        return Image(root, path, file, -1, 0, label)
    return Image(root, path, file, stat.st_size, stat.st_mtime_ns, label)


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


def _may_be_image(image: Image, looked_at: bool) -> bool:
    """Whether a file is worth reading, by its name, or (`looked_at`) else by its first bytes."""
    name = PurePosixPath(image.path)
    suffix = name.suffix.lower()
    if name.name.startswith(".") or suffix in OTHER_SUFFIXES:
        return False
    if not looked_at:
        # What a list names is meant; of a bucket's objects only the names are known.
        return image.bucket is None or suffix in IMAGE_SUFFIXES | FOREIGN_SUFFIXES
    if not image.file.is_file():
        return False
    if suffix in IMAGE_SUFFIXES | FOREIGN_SUFFIXES:
        return True
    try:
        with image.file.open("rb") as opened:
            return decode.kind(opened.read(16)) is not None
    except OSError:
        return False


def _is_mask(path: str, folders: Collection[PurePosixPath]) -> bool:
    """Whether a file lies in a folder of masks that has a folder of images beside it."""
    parent = PurePosixPath(path).parent
    if parent.name.lower() not in MASK_FOLDERS:
        return False
    return any(f.parent == parent.parent and f.name.lower() in IMAGE_FOLDERS for f in folders)


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
