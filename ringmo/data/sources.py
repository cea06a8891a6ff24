"""Folders, lists and buckets of imagery: which files are images, and which class they are of.

A list is a text file with a path a line, absolute or below the list's folder, and after a tab
perhaps a class, or several apart by `;`; without one the folder says it, as in a folder of
imagery. A `;` in a path is a part of it, and in a folder that is a class a comma. Instead of a
list, or below a folder, may be a table of labels (`tables`). What else belongs to
an image, masks, boxes, vectors and a second date, is found by `pairing`.

A folder named `unlabelled` anywhere in a source holds images that no class is claimed for, beside
labelled ones: its images never get a label.

A source may hold millions of files: what is done for each is text and one stat, never a Path.
"""

import gc
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo.data import decode, tables
from ringmo.data.buckets import Bucket
from ringmo.errors import BadInput

if TYPE_CHECKING:
    from ringmo.config import About

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".gtiff"}
# Formats people have imagery in that ringmo does not read: set aside with a reason, not ignored.
FOREIGN_SUFFIXES = {".jp2", ".bmp", ".gif", ".webp", ".img", ".ecw", ".sid", ".heic"}
# What may say more about an image of the same name.
VECTOR_SUFFIXES = {".gpkg", ".geojson", ".shp"}
SHAPE_PARTS = {".shx", ".dbf", ".prj", ".cpg"}  # files that a .shp needs beside it
SIDE_SUFFIXES = {".xml", ".txt", ".json"} | tables.SUFFIXES | VECTOR_SUFFIXES | SHAPE_PARTS
OTHER_SUFFIXES = SIDE_SUFFIXES | {
    *(".csv", ".yaml", ".yml", ".md", ".pdf", ".html"),
    *(".tfw", ".jgw", ".pgw", ".wld", ".ovr", ".aux"),
    *(".zip", ".tar", ".gz", ".npy", ".parquet", ".py", ".log", ".db"),
}
READABLE = IMAGE_SUFFIXES | FOREIGN_SUFFIXES

# Name, kind, size and time of what lies in a folder.
Entry = tuple[str, str, int, int]
FILE, FOLDER, LINK, OTHER = "file", "folder", "link", "other"

UNLABELLED = {"unlabelled", "unlabeled"}


@dataclass(slots=True)
class Attachment:
    """A file or an object that belongs to an image.

    part: `mask`, `boxes`, `vectors` or `height`. path: below the source, posix. base: the folder
    in which `path` begins, or to which a bucket's objects come. shared: with other images, so that
    `forget` leaves it until the whole folder of fetched objects goes. data: what it says of this
    image, where one file has the labels of many; size and time are then of this alone.
    """

    part: str
    path: str
    base: str
    size: int
    mtime_ns: int
    bucket: Bucket | None = None
    shared: bool = False
    data: bytes | None = None

    @property
    def file(self) -> Path:
        """Where it lies, or where `fetch` brings it."""
        if self.bucket is None:
            return Path(f"{self.base}/{self.path}")
        # The files of one .shp lie together under one name; GDAL also looks at the suffix.
        stem, _, suffix = self.path.rpartition(".")
        return Path(self.base, f"{_digest(self.bucket, stem)}.{_plain_suffix(suffix)}")

    def fetch(self) -> None:
        """As `Image.fetch`."""
        _fetch(self)

    def forget(self) -> None:
        """As `Image.forget`."""
        if not self.shared:
            _forget(self)


@dataclass(slots=True)
class Image:
    """A file or an object that is, or claims to be, an image.

    root: the source as params.yaml gives it. path: below it, posix. base: as an attachment's.
    mtime_ns: for an object a number that changes with its bytes. second: the path of the image
    of the same ground at a later date, in the same source. masks: how its mask is coded, as
    `codings` reads it. published: the part of its data set, as `published` has it.
    """

    root: str
    path: str
    base: str
    size: int
    mtime_ns: int
    label: str | None = None
    bucket: Bucket | None = None
    attachments: tuple[Attachment, ...] = ()
    second: str | None = None
    layout: str = "classes"
    masks: str = "auto"
    sensor: str | None = None
    vector_class: str | None = None
    published: str | None = None
    generated: bool = False

    @property
    def file(self) -> Path:
        """Where it lies, or where `fetch` brings it."""
        if self.bucket is None:
            return Path(f"{self.base}/{self.path}")
        return Path(self.base, _digest(self.bucket, self.path))

    @property
    def folder(self) -> str:
        """Where `path` begins."""
        return self.bucket.url if self.bucket else self.base

    @property
    def attached(self) -> int:
        """0 without attachments; else 60 bits that change with any of them, or with its coding."""
        if not self.attachments:
            return 0
        what = [(one.part, one.path, one.size, one.mtime_ns) for one in self.attachments]
        text = repr((what, self.masks, self.vector_class))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 4 or 1

    def fetch(self) -> None:
        """Bring an object to `file`.

        Raises:
            OSError: it is gone.
            BadInput, Unreachable: as `Bucket.fetch`.
        """
        _fetch(self)

    def forget(self) -> None:
        """Remove what `fetch` brought."""
        _forget(self)


def _fetch(one: Image | Attachment) -> None:
    if isinstance(one, Attachment) and one.data is not None:
        return
    if one.bucket is not None and not one.file.exists():
        one.bucket.fetch(one.path, one.file)


def _forget(one: Image | Attachment) -> None:
    if one.bucket is not None:
        one.file.unlink(missing_ok=True)


def _digest(bucket: Bucket, path: str) -> str:
    """A file's name for an object: keys may hold what no file's name can."""
    return hashlib.sha256(f"{bucket.url}/{path}".encode()).hexdigest()


def _plain_suffix(suffix: str) -> str:
    return suffix.lower() if suffix.isalnum() and len(suffix) < 16 else "bin"


@dataclass
class Listing:
    images: list[Image] = field(default_factory=list)
    other_files: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class _Files:
    """What a source holds, sorted by what it can be."""

    images: list[Image] = field(default_factory=list)
    beside: list[Image] = field(default_factory=list)  # may say more about an image
    beside_unwanted: list[Image] = field(default_factory=list)  # by ingest.include
    others: int = 0
    links: int = 0
    left_out: int = 0
    unnamable: list[str] = field(default_factory=list)


def list_images(
    root: str,
    source: Path | Bucket,
    labels: str,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    fetched: Path = Path(),
    about: "About | None" = None,
    codings: dict[str, Any] | None = None,
    splits: bool = False,
) -> Listing:
    """Images of a source in order of their paths; links are not followed.

    Args:
        root: the source's name in params.yaml.
        source: a folder, a list of files, or a bucket's prefix.
        fetched: the folder to which a bucket's objects come.
        labels: `auto` (a list's, or the parent folder's name, if images lie in two or more; and
            masks, boxes and vectors) or `none`.
        include, exclude: patterns with *, ? and [] for paths below the source, or for the names
            of files; a file is taken if one of the first and none of the second fits. Labels of
            an image that is taken need not fit the first.
        about: what params.yaml says of this source.
        codings: ingest.mask_codings.
        splits: whether the images' published splits are wanted.

    Raises:
        BadInput: no such folder, list or bucket, a list that is no text, no image in it, or
            nothing of the layout that `about` names.
        Unreachable: a bucket does not answer.
    """
    from ringmo.config import About

    if isinstance(source, Path) and not source.exists():
        raise BadInput(f"{source}: no such folder: mend ingest.sources in params.yaml, or --data")
    # Of a million small objects that all stay, the collector has nothing to collect.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _list(
            *(root, source, labels, include, exclude, str(fetched)),
            about=about or About(),
            codings=codings or {},
            splits=splits,
        )
    finally:
        if collects:
            gc.enable()


def _list(
    root: str,
    source: Path | Bucket,
    labels: str,
    include: Sequence[str],
    exclude: Sequence[str],
    fetched: str,
    about: "About",
    codings: dict[str, Any],
    splits: bool,
) -> Listing:
    from ringmo.data import pairing, published

    name = source.url if isinstance(source, Bucket) else str(source)
    chosen = _chosen(include, exclude)
    by_list = False
    if isinstance(source, Bucket):
        files = _in_bucket(root, source, fetched, chosen)
    elif source.is_file():
        by_list = True
        files = _listed(root, source, chosen)
    else:
        files = _below(root, str(source), chosen)
    listing = Listing(files.images, files.others + len(files.beside))
    if files.unnamable:
        first = files.unnamable[0].encode("utf-8", "backslashreplace").decode()
        listing.notes.append(
            f"{name}: {len(files.unnamable)} files left out: their names are not UTF-8 "
            f"(first: {shown(first)}): rename them"
        )
    if files.links:
        listing.notes.append(f"{name}: {files.links} links left out: links are not followed")
    left_out = files.left_out
    if not by_list:
        paired = pairing.pair(
            files.images, files.beside + files.beside_unwanted, about, labels, codings, name
        )
        listing.images = paired.images
        listing.other_files += paired.others
        used = {one.path for one in files.beside} & paired.used
        listing.other_files -= len(used)
        left_out -= len(paired.used) - len(used)
        listing.notes += paired.notes
    if left_out:
        listing.notes.append(
            f"{name}: {left_out} files left out: see ingest.include and ingest.exclude"
        )
    listing.other_files += left_out + files.links + len(files.unnamable)
    if not listing.images:
        but = f" that is wanted ({left_out} are left out)" if left_out else ""
        raise BadInput(f"{name}: no image (JPEG, PNG or TIFF) in it{but}")
    if about.sensor is not None:
        for image in listing.images:
            image.sensor = about.sensor
    tabled = by_list and any(image.label for image in listing.images)
    if labels == "auto" and not by_list and about.layout in ("auto", "classes"):
        tabled = _tabled(listing, files.beside + files.beside_unwanted, name)
    if labels == "auto" and not tabled:
        why_none = _label(listing.images, about.layout)
        if why_none and not any(image.attachments or image.second for image in listing.images):
            listing.notes.append(f"{name}: no labels: {why_none}")
    elif labels != "auto":
        for image in listing.images:
            image.label = None
    if splits:
        notes, lists = published.mark(listing.images, files.beside + files.beside_unwanted, name)
        listing.notes += notes
        listing.other_files -= len(lists)
    return listing


def _tabled(listing: Listing, beside: list[Image], name: str) -> bool:
    """Give images the labels of the tables beside them; whether there is any."""
    by_path = {image.path: image for image in listing.images}
    done: set[str] = set()
    for file in sorted(beside, key=lambda file: file.path):
        if suffix_of(file.path) not in tables.SUFFIXES:
            continue
        stem = file.path.rpartition("/")[2].lower()
        if file.bucket is not None and "label" not in stem:
            continue
        try:
            file.fetch()
            if not tables.looks_like(file.file):
                continue
            table = tables.read(file.file)
        except BadInput as error:
            # What an object is fetched to has no name worth telling.
            said = str(error).replace(str(file.file), f"{name}: {shown(file.path)}")
            raise BadInput(f"{said}: mend it, or leave it out (ingest.exclude)") from None
        finally:
            file.forget()
        found, absent = tables.matched(table, file.path.rpartition("/")[0], by_path)
        for path, label in found.items():
            if path not in done:
                by_path[path].label = label
        done |= set(found)
        if found:
            listing.other_files -= 1
            more = f"; {absent} rows are of no image here, or of several" if absent else ""
            listing.notes.append(
                f"{name}: {len(found)} of {len(by_path)} images have a label by "
                f"{shown(file.path)}{more}"
            )
    return bool(done)


def shown(path: str) -> str:
    """A path as part of one line."""
    return path if path.isprintable() else repr(path)[1:-1]


def suffix_of(path: str) -> str:
    """Lower case, with the dot; empty for none, and for a name that begins with its only dot."""
    stem, _, suffix = path.rpartition(".")
    if not stem or not suffix or stem[-1] == "/" or "/" in suffix:
        return ""
    return "." + suffix.lower()


# Of path and name: whether a file is wanted, and whether it is excluded. None: all are wanted.
Chosen = Callable[[str, str], tuple[bool, bool]] | None


def _chosen(include: Sequence[str], exclude: Sequence[str]) -> Chosen:
    if "*" in include and not exclude:
        return None
    wanted, unwanted = (
        re.compile("|".join(map(translate, patterns)) or r"(?!)") for patterns in (include, exclude)
    )

    def chosen(path: str, name: str) -> tuple[bool, bool]:
        excluded = any(map(unwanted.match, (path, name)))
        return not excluded and any(map(wanted.match, (path, name))), excluded

    return chosen


def _below(root: str, folder: str, chosen: Chosen) -> _Files:
    files = _Files()
    add = files.images.append
    base = "" if folder == "/" else folder
    for below, (name, kind, size, mtime_ns) in _entries_below(folder):
        path = below + name
        if not path.isascii() and not _is_text(path):
            files.unnamable.append(path)
            continue
        suffix = suffix_of(name)
        if chosen is not None:
            wanted, excluded = chosen(path, name)
            if not wanted:
                files.left_out += 1
                if suffix in SIDE_SUFFIXES and kind is FILE and not excluded:
                    files.beside_unwanted.append(Image(root, path, base, size, mtime_ns))
                continue
        if kind is LINK:
            files.links += 1
        elif kind is not FILE or name[0] == ".":
            files.others += 1
        elif suffix in READABLE:
            add(Image(root, path, base, size, mtime_ns))
        elif suffix in SIDE_SUFFIXES:
            files.beside.append(Image(root, path, base, size, mtime_ns))
        elif suffix not in OTHER_SUFFIXES and _looks_like_one(f"{base}/{path}"):
            add(Image(root, path, base, size, mtime_ns))
        else:
            files.others += 1
    return files


def _is_text(path: str) -> bool:
    """Whether a path can be written to a table: names of files need not be UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entries_below(folder: str) -> Iterator[tuple[str, Entry]]:
    """Every file below, sorted by name in each folder, depth first, with what its path begins
    with; links to folders are not walked into."""
    stack = [("", iter(_entries(folder)))]
    while stack:
        below, entries = stack[-1]
        for entry in entries:
            if entry[1] is FOLDER:
                inner = f"{below}{entry[0]}/"
                stack.append((inner, iter(_entries(f"{folder}/{inner[:-1]}"))))
                break
            yield below, entry
        else:
            stack.pop()


def _entries(folder: str) -> list[Entry]:
    found: list[Entry] = []
    try:
        # By the open folder: looking each name's whole path up again takes a quarter longer.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(opened) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        try:
                            stat = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:  # gone since: reading it says so
                            found.append((entry.name, FILE, -1, 0))
                        else:
                            found.append((entry.name, FILE, stat.st_size, stat.st_mtime_ns))
                    elif entry.is_dir(follow_symlinks=False):
                        found.append((entry.name, FOLDER, 0, 0))
                    else:
                        found.append((entry.name, LINK if entry.is_symlink() else OTHER, 0, 0))
        finally:
            os.close(opened)
    except PermissionError:
        raise BadInput(f"{shown(folder)}: may not be read") from None
    found.sort(key=itemgetter(0))
    return found


def _looks_like_one(file: str) -> bool:
    """Whether a file whose name does not say so is an image, by its first bytes."""
    try:
        with Path(file).open("rb") as opened:
            return decode.kind(opened.read(16)) is not None
    except OSError:
        return False


def _listed(root: str, file: Path, chosen: Chosen) -> _Files:
    """The files that a list, or a table of labels, names, each once, by path."""
    try:
        named = list(_named(file))
    except UnicodeDecodeError:
        raise BadInput(
            f"{file} is no list of images: ingest.sources names folders, and text files with a "
            f"path a line"
        ) from None
    found: dict[str, Image] = {}
    for name, label in named:
        image = Path(os.path.normpath(file.parent / Path(name).expanduser()))
        inside = image.is_relative_to(file.parent)
        path = image.relative_to(file.parent if inside else image.anchor).as_posix()
        base = str(image)[: -len(path) - 1]
        size, mtime_ns = -1, 0
        try:
            stat = image.stat()
            size, mtime_ns = stat.st_size, stat.st_mtime_ns
        except OSError:  # a list may name what is not there: reading it says so
            pass
        found.setdefault(path, Image(root, path, base, size, mtime_ns, label))
    files = _Files()
    for path in sorted(found):
        name = path.rpartition("/")[2]
        if chosen is not None and not chosen(path, name)[0]:
            files.left_out += 1
        # What a list names is meant, whatever its name ends in.
        elif name.startswith(".") or suffix_of(name) in OTHER_SUFFIXES:
            files.others += 1
        else:
            files.images.append(found[path])
    return files


def _named(file: Path) -> Iterator[tuple[str, str | None]]:
    """Path and label of each line of a list, or row of a table."""
    if file.suffix.lower() in tables.SUFFIXES:
        for name, label in tables.read(file).items():
            whole = file.parent / name
            if not suffix_of(name) and not whole.exists():
                near = (f"{name}{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
                name = next((one for one in near if (file.parent / one).exists()), name)
            yield name, label
        return
    for line in file.read_text("utf-8-sig").splitlines():
        name, _, label = line.partition("\t")
        if name.strip() and not name.startswith("#"):
            yield name.strip(), tables.joined(label.split(tables.SEPARATOR))


def _in_bucket(root: str, bucket: Bucket, fetched: str, chosen: Chosen) -> _Files:
    """A prefix's objects, of which only the names are known."""
    files = _Files()
    for one in bucket.objects():
        name = one.path.rpartition("/")[2]
        suffix = suffix_of(name)
        wanted, excluded = (True, False) if chosen is None else chosen(one.path, name)
        image = Image(root, one.path, fetched, one.size, one.mark, bucket=bucket)
        if not wanted:
            files.left_out += 1
            if suffix in SIDE_SUFFIXES and not excluded:
                files.beside_unwanted.append(image)
        elif name.startswith("."):
            files.others += 1
        elif suffix in READABLE:
            files.images.append(image)
        elif suffix in SIDE_SUFFIXES:
            files.beside.append(image)
        else:
            files.others += 1
    return files


def _label(images: list[Image], layout: str) -> str | None:
    """Give images the name of their folder as class; where there are none a reason worth telling.

    Named layouts other than `classes` have no classes in their folders.
    """
    from ringmo.data import pairing

    if layout not in ("auto", "classes"):
        return None
    claimed: dict[str, list[Image]] = {}
    for image in images:
        claimed.setdefault(image.path.rpartition("/")[0], []).append(image)
    for folder in [f for f in claimed if UNLABELLED & set(f.lower().split("/"))]:
        del claimed[folder]
    if "" in claimed:
        return "images lie directly in it" if len(claimed) > 1 else None
    names = {folder.rpartition("/")[2] for folder in claimed}
    if layout == "auto":
        of_layout = {name for name in names if pairing.is_layout(name)}
        # A class may be called B; a folder called masks is never one.
        if of_layout and (of_layout == names or any(len(name) > 2 for name in of_layout)):
            return f"its folders are a layout ({', '.join(sorted(of_layout))}), not classes"
        if len(names) < 2:
            return None
        if _see_the_same(images):
            return "its folders see the same places: they are sensors, not classes"
    for folder, members in claimed.items():
        label = folder.rpartition("/")[2].replace(tables.SEPARATOR, ",")
        for image in members:
            image.label = label
    return None


def _see_the_same(images: list[Image]) -> bool:
    """Whether images of several folders share one label."""
    owner: dict[str, str] = {}
    for image in images:
        folder = image.path.rpartition("/")[0]
        for one in image.attachments:
            if one.shared and owner.setdefault(one.path, folder) != folder:
                return True
    return False
