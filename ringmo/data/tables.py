"""Tables of labels: which classes are seen in an image, one or several.

A table is a CSV file with a header. A column names the image (`path`, `filename`, `image`, …), and
the classes are in one column (`label`, `class`, `tags`, …), several of them apart by `;`, or in a
column a class, 1 where it is seen and 0 where not. An image may have several rows: it has the
classes of all. An image of no class is as one without a label.

A label of several classes is their names, sorted and joined by `;`.
"""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ringmo.errors import BadInput

SEPARATOR = ";"
PATHS = (
    *("path", "file", "filename", "file_name", "image", "image_path", "image_name", "img"),
    *("patch", "patch_name", "name", "image\\label"),
)
# Names before numbers: EuroSAT's tables have both.
LABELS = (
    *("classname", "class_name", "label_name", "labels", "label", "classes", "class"),
    *("categories", "category", "tags", "tag"),
)
NOT_CLASSES = {"", "split", "set", "fold", "subset", "index", "id"}
BOXES = {"xmin", "ymin", "x1", "y1", "bbox", "x", "y"}  # a table of objects, not of images
SEEN = {"0": False, "1": True, "0.0": False, "1.0": True, "": False}
SUFFIXES = {".csv", ".tsv"}


def joined(classes: Iterable[str]) -> str | None:
    """The label of an image in which these classes are seen; None for none."""
    return SEPARATOR.join(sorted({name.strip() for name in classes} - {""})) or None


def classes_of(label: str) -> list[str]:
    """The classes of a label."""
    return label.split(SEPARATOR)


def by_class(counts: Mapping[str, int]) -> dict[str, int]:
    """Label → number, as class → number, sorted: a label counts for each of its classes."""
    sums: dict[str, int] = {}
    for label, count in counts.items():
        for name in classes_of(label):
            sums[name] = sums.get(name, 0) + count
    return dict(sorted(sums.items()))


def looks_like(file: Path) -> bool:
    """Whether a file's header, and its first row, are those of a table of labels."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            lines = [opened.readline(65_536) for _ in range(2)]
        rows: list[list[str]] = [*csv.reader(lines, delimiter=_delimiter(lines[0])), [], []]
        header, first = rows[:2]
        path, label, classes = _columns(header)
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    if label is None:
        # Other numbers of an image are no classes.
        numbers = len(first) == len(header) and all(first[i].strip() in SEEN for i in classes)
        return path is not None and len(classes) > 1 and numbers
    return path is not None


def read(file: Path) -> dict[str, str | None]:
    """Image, as the table names it → its label.

    Raises:
        BadInput: no table of labels; one line.
    """
    found: dict[str, set[str]] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            line = opened.readline()
            opened.seek(0)
            rows = csv.reader(opened, delimiter=_delimiter(line))
            header = next(rows, [])
            path, label, classes = _columns(header)
            if path is None:
                raise BadInput(
                    f"{file}: no column names the image: one of path, filename, image, … "
                    f"(it has: {', '.join(header[:6]) or 'none'})"
                )
            if label is None and not classes:
                raise BadInput(f"{file}: no column of labels: label, or one of 0 and 1 a class")
            for row in rows:
                if not any(cell.strip() for cell in row):
                    continue
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(header):
                    raise BadInput(f"{where}: {len(row)} cells, the header has {len(header)}")
                name = row[path].strip()
                if not name:
                    raise BadInput(f"{where}: names no image")
                if label is not None:
                    seen = set(row[label].split(SEPARATOR))
                else:
                    seen = {header[i].strip() for i in classes if _seen(row[i], where, header[i])}
                found.setdefault(name, set()).update(seen)
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{file}: no text in UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{file}: no CSV: {error}") from None
    return {name: joined(classes) for name, classes in found.items()}


def _seen(cell: str, where: str, column: str) -> bool:
    try:
        return SEEN[cell.strip()]
    except KeyError:
        raise BadInput(
            f"{where}: {column[:40]}: 0 or 1 expected, found {cell.strip()[:40]}"
        ) from None


def _delimiter(line: str) -> str:
    return next((mark for mark in ("\t", ",") if mark in line), SEPARATOR)


def _columns(header: list[str]) -> tuple[int | None, int | None, list[int]]:
    """Which column names the image, which its label, and else which are classes."""
    names = [name.strip().lower() for name in header]
    if BOXES & set(names):
        return None, None, []
    path = next((names.index(name) for name in PATHS if name in names), None)
    label = next((names.index(name) for name in LABELS if name in names), None)
    rest = [i for i, name in enumerate(names) if i != path and name not in NOT_CLASSES]
    return path, label, rest if label is None else []


def matched(
    table: Mapping[str, str | None], folder: str, paths: Iterable[str]
) -> tuple[dict[str, str | None], int]:
    """Path of an image → label, of a table in `folder`, and how many of its rows are of none.

    An image's name is a path below the table's folder, or a file's name, if there is but one of
    it there; the suffix may be missing.
    """
    below = f"{folder}/" if folder else ""
    by_name: dict[str, list[str]] = {}
    for path in paths:
        if path.startswith(below):
            inner = path.removeprefix(below)
            stem = inner.rpartition(".")[0]
            names = {inner, stem, inner.rpartition("/")[2], stem.rpartition("/")[2]}
            for name in names - {""}:
                by_name.setdefault(name, []).append(path)
    found: dict[str, str | None] = {}
    absent = 0
    for name, label in table.items():
        there = by_name.get(os.path.normpath(name), [])
        if len(there) > 1:  # the whole path is meant, if it is one
            there = [path for path in there if path == below + os.path.normpath(name)]
        if len(there) == 1:
            found[there[0]] = label
        else:
            absent += 1
    return found, absent
