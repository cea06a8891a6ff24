"""Splits as a data set was published: by folders' names, or by lists of its files.

A folder whose name is a split (`Train`, `val2017`, `Images_trainval`) tells it of what lies below,
the outermost first. A list goes before folders: `train.txt`, `NAME-val.txt` or `test.csv`, an
image a line, at the source's root or in a folder called ImageSets, Main, splits or lists; it is of
images below the source. COCO's `instances_train.json` tells it of the images that it names and
that nothing else tells of.

What the parts become depends on which there are:

- test without labels where another part has some (LoveDA, DOTA), or no test at all: val is the
  test, and published test tiles without labels stay test tiles, of no figure;
- no val (any more): val is drawn from train, by place, as large as `split.val` of it;
- nothing but train: its splits are drawn as ever. So are those of images of no published part.

A published split is kept, whatever a tile resembles. Where tiles of two splits are alike, or share
ground, the data set leaks: `ringmo validate` counts and shows them, and does not stop. A scene
that is known keeps the split that it has.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from ringmo.data import places
from ringmo.data.pairing import IMAGE_TAIL, MASK_TAIL, SPLITS, is_image_folder
from ringmo.data.sources import READABLE, Image, shown, suffix_of
from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pandas
    import pyarrow

# The strongest first: what must stay unseen.
WORDS = {"test": "test", "testing": "test", "val": "val", "valid": "val", "validation": "val"} | {
    "train": "train", "training": "train", "trainval": "trainval",
}  # fmt: skip
PARTS = ("test", "val", "train", "trainval")
LIST_SUFFIXES = {".txt", ".csv"}
LIST_FOLDERS = {"imagesets", "main", "splits", "split", "lists", "list"}
# Rules that only warn of what a data set was published with.
LEAKS = ("near_across_splits", "ground_across_splits")
# Part → the splits its tiles may get, and the shares of test and val in what is drawn.
FATES = {
    "test": (("test",), {"test": 1.0, "val": 0.0}),
    "val": (("val",), {"test": 0.0, "val": 1.0}),
    "train": (("train",), {"test": 0.0, "val": 0.0}),
}


def split_of(name: str) -> str | None:
    """The split that a folder's name is; a name with other words in it is none."""
    words = re.findall(r"[a-z]+", name.lower())
    told = [word for word in words if word in SPLITS]
    plain = words == told or is_image_folder(name)
    return WORDS[told[0]] if len(told) == 1 and plain else None


def mark(images: list[Image], beside: Iterable[Image], name: str) -> tuple[list[str], set[str]]:
    """Give images of one source the part under which they were published.

    Returns:
        What to tell, and the paths of the lists that were read.

    Raises:
        BadInput: a list that is no text. Unreachable: a bucket does not answer.
    """
    notes: list[str] = []
    listed, read, twice = _by_lists(images, beside, name)
    folders: dict[str, str | None] = {}
    for image in images:
        folder = image.path.rpartition("/")[0]
        if folder not in folders:
            told = (split_of(part) for part in folder.split("/"))
            folders[folder] = next((split for split in told if split), None)
        by_coco = (_of_stem(a.path) for a in image.attachments if a.data is not None)
        image.published = listed.get(image.path) or folders[folder] or next(by_coco, None)
    if twice:
        notes.append(
            f"{name}: {len(twice)} images are in lists of several splits: they are of the one that "
            f"must stay unseen (first: {shown(min(twice))})"
        )
    by_path = {image.path: image for image in images}
    for image in images:
        if image.second in by_path:  # one place has one split
            by_path[image.second].published = image.published
    notes.append(f"{name}: {_settle(images)}")
    return notes, read


def _settle(images: list[Image]) -> str:
    """Turn parts into those that a training needs; what was done, as one line."""
    parts: dict[str, list[Image]] = {part: [] for part in PARTS}
    for image in images:
        if image.published is not None:
            parts[image.published].append(image)
    counts = {part: len(members) for part, members in parts.items() if members}
    if not counts:
        return "no published splits in it: they are drawn, by place"
    said = [f"published as {', '.join(f'{part} ({n})' for part, n in counts.items())}"]
    labelled = {p for p, some in parts.items() if any(i.label or i.attachments for i in some)}
    if parts["train"]:  # then what is in trainval alone is train too
        parts["train"] += parts.pop("trainval")
    else:
        parts["train"] = parts.pop("trainval")
    if parts["val"] and "test" not in labelled and (labelled or not parts["test"]):
        said.append("val is the test" + (": the test has no labels" if parts["test"] else ""))
        parts["test"] += parts["val"]
        parts["val"] = []
    drawn = None if not parts["test"] and not parts["val"] else "trainval"
    if drawn is None:
        said.append("it has no test: splits are drawn, by place")
    elif parts["train"] and not parts["val"]:
        said.append("val is drawn from train")
    for part, members in parts.items():
        for image in members:
            image.published = drawn if part == "train" and not parts["val"] else part
    if rest := len(images) - sum(counts.values()):
        said.append(f"{rest} images are of no part: theirs are drawn")
    return "; ".join(said)


def _of_stem(path: str) -> str | None:
    """The split in a list's name: one word of it."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    told = [WORDS[w] for w in re.findall(r"[a-z]+", stem.lower()) if w in WORDS]
    return told[0] if len(told) == 1 else None


def _by_lists(
    images: list[Image], beside: Iterable[Image], name: str
) -> tuple[dict[str, str], set[str], set[str]]:
    """Path of an image → its part by lists; the lists; the images that several parts have."""
    lists = [(part, file) for file in beside if (part := _part_of_list(file.path)) is not None]
    found: dict[str, str] = {}
    read: set[str] = set()
    twice: set[str] = set()
    if not lists:
        return found, read, twice
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_stem[_base(image.path)].append(image.path)
    for part, file in sorted(lists, key=lambda one: (PARTS.index(one[0]), one[1].path)):
        hits = {path for line in _lines(file, name) for path in _meant(line, by_stem)}
        if hits:
            read.add(file.path)
        for path in hits:
            if found.setdefault(path, part) != part and part != "trainval":
                twice.add(path)
    return found, read, twice


def _part_of_list(path: str) -> str | None:
    folder = path.rpartition("/")[0].rpartition("/")[2].lower()
    if suffix_of(path) not in LIST_SUFFIXES or ("/" in path and folder not in LIST_FOLDERS):
        return None
    stem = path.rpartition("/")[2].rpartition(".")[0].lower()
    # VOC's folder also has lists of each class: aeroplane_train.txt.
    return WORDS.get(stem) if folder in ("main", "imagesets") else _of_stem(path)


def _lines(file: Image, name: str) -> list[str]:
    try:
        file.fetch()
        return file.file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(
            f"{name}: {shown(file.path)}: no text, though its name is a list's: mend it, or leave "
            f"it out (ingest.exclude)"
        ) from None
    except OSError as error:
        raise BadInput(f"{name}: {shown(file.path)}: {error.strerror or error}") from None
    finally:
        file.forget()


def _base(path: str) -> str:
    """A file's name without its suffix, and without what tells apart those of one place."""
    name = path.replace("\\", "/").rpartition("/")[2]
    suffix = suffix_of(name)
    stem = name[: -len(suffix)] if suffix in READABLE else name
    return MASK_TAIL.sub("", IMAGE_TAIL.sub("", stem))


def _meant(line: str, by_stem: dict[str, list[str]]) -> list[str]:
    """Images that a line names, with or without suffix, by a path's end where it has folders."""
    line = line.strip()
    for word in dict.fromkeys((line, *re.split(r"[\s,;]+", line))):
        paths = by_stem.get(_base(word), []) if word else []
        folder = word.replace("\\", "/").removeprefix("./").rpartition("/")[0]
        fitting = [p for p in paths if f"/{p}".rpartition("/")[0].endswith(f"/{folder}")]
        if paths := fitting if folder and fitting else paths:
            return paths
    return []


def decided_otherwise(rows: "pyarrow.Table") -> int:
    """How many known tiles have another split than the one their part gives now."""
    import pyarrow.compute as pc

    split, part = rows["split"], rows["published"]
    learns = pc.and_(pc.equal(part, "trainval"), pc.is_in(split, _words("train", "val")))
    fine = pc.or_(learns, pc.equal(split, "unused"))
    differs = pc.and_(pc.not_equal(split, part), pc.invert(fine))
    return int(pc.sum(pc.and_(differs, pc.is_valid(rows["place"]))).as_py() or 0)


def _words(*words: str) -> "pyarrow.Array":
    import pyarrow as pa

    return pa.array(words, pa.string())


def assign(
    known: "pandas.DataFrame",
    new: "pandas.DataFrame",
    *,
    shares: dict[str, float],
    near_bits: int,
    blank_std: float,
    seed: int,
    fetch: Callable[[str, int, int], bytes],
) -> tuple["pandas.DataFrame", dict[str, int]]:
    """As `places.assign`, of newcomers that have a further column `published`: their part."""
    import pandas as pd

    scene = ["source_root", "source"]
    elder = pd.MultiIndex.from_frame(new[scene]).isin(pd.MultiIndex.from_frame(known[scene]))
    part = new["published"].where(~elder).fillna("").to_numpy(object)
    drawn_from_train = {"test": 0.0, "val": shares["val"]}
    fates = {**FATES, "trainval": (("val", "train"), drawn_from_train), "": (None, shares)}
    pool, done = known, []
    counts = {"overlapping": 0, "near_duplicates": 0, "unused": 0}
    for name, (splits, wanted) in fates.items():
        some = new.iloc[np.flatnonzero(part == name)]
        if some.empty:
            continue
        others = pool if splits is None else pool[pool["split"].isin(splits)]
        placed, found = places.assign(
            others, some, shares=wanted, near_bits=near_bits, blank_std=blank_std, seed=seed,
            fetch=fetch,
        )  # fmt: skip
        counts = {key: counts[key] + found[key] for key in counts}
        done.append(placed)
        pool = pd.concat([pool, placed]) if len(pool) else placed
    return pd.concat(done).loc[new.index], counts
