"""Which files belong together: an image, its mask, boxes, vectors or heights, and its second date.

Published data sets say it by their folders' and files' names. A path is read as a place, words of
the layout (`images_png`, `masks_png`, `Annotations`), and the file's stem; files of the same
place and stem belong together. Thus `Train/Urban/images_png/0.png` and
`Train/Urban/masks_png/0.png`, or `2_Ortho_RGB/top_2_10_RGB.tif` and `top_2_10_label.tif`.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ringmo.data import boxes, coco, codings, heights, vectors
from ringmo.data.sources import (
    SHAPE_PARTS,
    VECTOR_SUFFIXES,
    Attachment,
    Image,
    shown,
    suffix_of,
)
from ringmo.errors import BadInput

if TYPE_CHECKING:
    from ringmo.config import About

# Words of folders' names that say how a data set is laid out, not what its images show.
LABEL_WORDS = {
    *("mask", "masks", "label", "labels", "gt", "gts", "groundtruth", "labelhand"),
    *("annotation", "annotations", "labeltxt", "labelxml", "labelxmls", "segmentationclass"),
    *("vector", "vectors", "geojson"),
}
IMAGE_WORDS = {
    *("image", "images", "img", "imgs", "jpegimages", "ortho", "tiles"),
    *("hand", "top"),  # S1Hand and S2Hand of Sen1Floods11, top of Vaihingen
}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "trainval"}
# Words that stand beside those above and say nothing of the images.
FILLERS = SPLITS | {"png", "jpg", "jpeg", "tif", "tiff", "rgb", "rgbir", "irrg", "all", "s", "v"}
# Folders of heights: surface and terrain models, canopy heights.
HEIGHT_WORDS = {
    *("dem", "dsm", "dtm", "ndsm", "chm", "agl", "height", "heights", "depth", "elevation"),
}
HEIGHT_FILLERS = FILLERS | {"m", "map", "maps", "normalised", "normalized", "normalisation"}
# Folders of the two dates of a change pair.
DATES = {"a": "b", "t1": "t2", "time1": "time2", "im1": "im2", "img1": "img2"} | {
    "image1": "image2", "before": "after", "pre": "post",
}  # fmt: skip
DATE_FOLDERS = {*DATES, *DATES.values()}

# What the names of a mask, and of its image, may have more than the other's.
MASK_TAIL = re.compile(
    r"[_-](instance_color_rgb|label(s|hand)?_?noboundary|labelhand|labels?|masks?|gt|seg|"
    r"groundtruth|noboundary)$",
    re.IGNORECASE,
)
# Whether any of many names, a line each, may end as a mask's.
ANY_MASK_TAIL = re.compile(MASK_TAIL.pattern.removesuffix("$") + r"\.\w+$", re.IGNORECASE | re.M)
HEIGHT_TAIL = re.compile(rf"[_-]({'|'.join(sorted(HEIGHT_WORDS))})$", re.IGNORECASE)
IMAGE_TAIL = re.compile(r"[_-](rgbir|rgb|irrg|sat|image|img|s1hand|s2hand)$", re.IGNORECASE)
# Sen1Floods11's hand-made masks, whose 1 is water and whose -1 is unknown.
FLOODS = re.compile(r"_labelhand$", re.IGNORECASE)
# iSAID numbers the objects in a second kind of mask: labels, but of no class.
NO_CLASSES = re.compile(r"_instance_id_rgb$", re.IGNORECASE)

SAMPLE = 16  # masks that are looked at to decide how a source's masks are coded
MANY = 64  # files in a folder, of which each is one image's
LOOKED_AT = 3  # files that are looked at to tell whether a folder's are labels


@lru_cache(maxsize=65_536)
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", name.lower()))


def is_label_folder(name: str) -> bool:
    words = _words(name)
    return not words.isdisjoint(LABEL_WORDS) or {"ground", "truth"} <= words


def is_image_folder(name: str) -> bool:
    words = _words(name)
    plain = words - FILLERS
    return name.lower() in DATE_FOLDERS or (bool(plain) and plain <= IMAGE_WORDS)


def is_height_folder(name: str) -> bool:
    plain = _words(name) - HEIGHT_FILLERS
    return bool(plain) and plain <= HEIGHT_WORDS


def is_layout(name: str) -> bool:
    """Whether a folder's name says how a data set is laid out, not what its images show."""
    return (
        frozenset() != _words(name) <= SPLITS  # also train2017
        or is_image_folder(name)
        or is_label_folder(name)
        or is_height_folder(name)
    )


@dataclass
class Paired:
    """Images with what belongs to them; `used`: paths of the side files among it."""

    images: list[Image]
    used: set[str] = field(default_factory=set)
    others: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """A folder as a place. near: without its words of layout; far: what is before the first."""

    folder: str
    near: str
    far: str
    up: str  # without its last part: folders of the same images, by sensor
    labels: bool
    of_labels: str | None  # what is before the word that says labels
    images: bool


def _place(folder: str) -> _Place:
    parts = folder.split("/") if folder else []
    told = (is_label_folder, is_image_folder, is_height_folder)
    plain = [part for part in parts if not any(is_(part) for is_ in told)]
    first = next((i for i, part in enumerate(parts) if part not in plain), len(parts))
    label = next((i for i, part in enumerate(parts) if is_label_folder(part)), None)
    return _Place(
        folder,
        "/".join(plain),
        "/".join(parts[:first]),
        "/".join(parts[:-1]),
        label is not None,
        None if label is None else "/".join(parts[:label]),
        any(map(is_image_folder, parts)) and label is None,
    )


def pair(
    files: list[Image],
    beside: list[Image],
    about: "About",
    labels: str,
    mask_codings: dict[str, Any],
    source: str,
) -> Paired:
    """Images among `files`, each with the masks and, of `beside`, the side files that are its own.

    Raises:
        BadInput: nothing of the layout that `about` names, or masks that no coding fits.
    """
    folders: dict[str, list[Image]] = defaultdict(list)
    for file in files:
        folders[file.path.rpartition("/")[0]].append(file)
    places = {folder: _place(folder) for folder in folders}
    masks, maybe = _masks(folders, places, about)
    aside = {mask.path for mask in masks}
    may_be = {mask.path for mask in maybe}
    found = Paired([file for file in files if file.path not in aside])
    seconds, alone = _second_dates(folders, aside, about)
    wanted = [mask for mask in masks + maybe if not NO_CLASSES.search(_stem(mask.path))]
    if labels != "auto" or about.layout not in ("auto", "masks", "change"):
        wanted = []
    sides: list[tuple[str, Image]] = []
    if labels == "auto" and about.layout != "classes":
        sides = _sides(beside, about)
    own: dict[str, list[tuple[str, Image]]] = defaultdict(list)
    rasters = _heights([i for i in found.images if i.path not in may_be], about)
    sides += [("height", file) for file in rasters]
    if wanted or sides:
        out = may_be | alone | {file.path for file in rasters}
        images = [image for image in found.images if image.path not in out]
        for image, part, label in _owned(images, wanted, sides, places, about, found, source):
            own[image.path].append((part, label))
    if rasters:
        _without_heights(found, own, rasters, labels, source)
    if about.layout == "vectors" and labels == "auto":
        _shared_vectors([i for i in found.images if i.path not in own], sides, own)
    if maybe:  # a mask by its name alone is one where an image is its partner
        taken = {label.path for labels_ in own.values() for _, label in labels_}
        aside |= may_be & taken
        found.images = [image for image in found.images if image.path not in aside]
    _attach(found, own, aside, beside, about, mask_codings, source)
    if labels == "auto" and about.layout in ("auto", "coco"):
        _attach_coco(found, beside, about, source)
    spare = [file for part, file in sides if part == "boxes" and file.path not in found.used]
    if spare:
        found.notes.append(
            f"{source}: {len(spare)} files of boxes left out: of no image here, or an image has "
            f"others (first: {shown(spare[0].path)})"
        )
    if seconds:
        for image in found.images:
            image.second = seconds.get(image.path)
            if image.second is not None:
                image.layout = "change"
        found.notes.append(f"{source}: {len(seconds)} images have a second date")
    if labels == "auto" and about.layout not in ("auto", "classes"):
        has = seconds if about.layout == "change" else [i for i in found.images if i.attachments]
        if not has:
            raise BadInput(f"{source}: {NOTHING[about.layout]}")
    return found


NOTHING = {
    "masks": "layout: masks, but no image has one: the mask of images/NAME.png is masks/NAME.png, "
    "or name the files that are masks in ingest.about: mask_files",
    "change": "layout: change, but no image has a second date: A/NAME.png and B/NAME.png are a "
    "pair, and label/NAME.png is its mask",
    "voc": "layout: voc, but no image has an XML file of its name",
    "fair1m": "layout: fair1m, but no image has an XML file of its name",
    "dota": "layout: dota, but no image has a text file of its name",
    "coco": "layout: coco, but no JSON file has images, annotations and categories of images here",
    "height": "layout: height, but no image has heights: those of images/NAME.tif are "
    "dem/NAME.tif, or name the files that are heights in ingest.about: height_files",
    "vectors": "layout: vectors, but no scene has a .gpkg, .geojson or .shp of its name, nor is "
    "there a single one in its folder",
}


def _stem(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _masks(
    folders: dict[str, list[Image]], places: dict[str, _Place], about: "About"
) -> tuple[list[Image], list[Image]]:
    """Pictures that are masks, and those that are if an image proves to be their partner."""
    if about.mask_files:
        match = re.compile("|".join(map(translate, about.mask_files))).match
        every = (file for members in folders.values() for file in members)
        return [f for f in every if match(f.path) or match(f.path.rpartition("/")[2])], []
    masks: list[Image] = []
    maybe: list[Image] = []
    imagery = {place.far for place in places.values() if place.images}
    for folder, members in folders.items():
        place = places[folder]
        beside_images = place.of_labels in imagery
        if place.labels and (beside_images or about.layout in ("masks", "change")):
            masks += members
        elif about.layout != "classes" and ANY_MASK_TAIL.search("\n".join(f.path for f in members)):
            maybe += [f for f in members if MASK_TAIL.search(_stem(f.path))]
    return masks, maybe


def _heights(files: list[Image], about: "About") -> list[Image]:
    """Rasters of heights, by the names of their folders or files and by a look at some."""
    if about.layout == "classes":
        return []
    if about.height_files:
        match = re.compile("|".join(map(translate, about.height_files))).match
        return [f for f in files if match(f.path) or match(f.path.rpartition("/")[2])]
    groups: dict[str, list[Image]] = defaultdict(list)
    for file in files:
        folder = file.path.rpartition("/")[0]
        if any(map(is_height_folder, folder.split("/"))) or HEIGHT_TAIL.search(_stem(file.path)):
            groups[folder].append(file)
    found: list[Image] = []
    for members in groups.values():
        local = [file for file in members if file.bucket is None][:LOOKED_AT]
        if not local or any(heights.looks_like(file.file) for file in local):
            found += members
    return found


def _without_heights(
    found: Paired,
    own: dict[str, list[tuple[str, Image]]],
    rasters: list[Image],
    labels: str,
    source: str,
) -> None:
    """Take rasters of heights out of the images, where one of their folder is an image's."""
    used = {label.path for kept in own.values() for part, label in kept if part == "height"}
    folders = {path.rpartition("/")[0] for path in used}
    aside = {file.path for file in rasters if file.path.rpartition("/")[0] in folders}
    found.images = [image for image in found.images if image.path not in aside]
    if labels != "auto":
        for path in [path for path in own if any(part == "height" for part, _ in own[path])]:
            own[path] = [(part, label) for part, label in own[path] if part != "height"]
            if not own[path]:
                del own[path]
        used = set()
    if spare := sorted(aside - used):
        found.others += len(spare)
        found.notes.append(
            f"{source}: {len(spare)} rasters of heights left out: they are labels, not imagery "
            f"(first: {shown(spare[0])})"
        )


def _second_dates(
    folders: dict[str, list[Image]], masks: set[str], about: "About"
) -> tuple[dict[str, str], set[str]]:
    """Path of an image → path of the later one of the same ground; and the images of such folders
    to which no mask of what has changed can belong."""
    found: dict[str, str] = {}
    alone: set[str] = set()
    if about.layout not in ("auto", "change"):
        return found, alone
    children: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        parts = folder.split("/") if folder else []
        for i, part in enumerate(parts):
            children["/".join(parts[:i])].add(part)
    for folder, members in folders.items():
        parts = folder.split("/")
        for i in reversed(range(len(parts))):
            later, parent = _later(parts[i]), "/".join(parts[:i])
            if later not in children[parent]:
                continue
            # Classes may be called A and B too; then there are others, and no labels beside.
            others = children[parent] - {parts[i], later}
            if about.layout == "auto" and others and not any(map(is_label_folder, others)):
                continue
            second = folders.get("/".join([*parts[:i], later, *parts[i + 1 :]]), [])
            by_stem = {_stem(file.path): file.path for file in second}
            alone.update(by_stem.values())
            for file in members:
                partner = by_stem.get(_stem(file.path))
                if partner is None:
                    alone.add(file.path)
                elif file.path not in masks:
                    found[file.path] = partner
            break
    return found, alone


def _later(name: str) -> str:
    """The folder of second dates, for that of first dates; empty for any other."""
    later = DATES.get(name.lower(), "")
    return later.upper() if name.isupper() else later.title() if name.istitle() else later


def _sides(beside: list[Image], about: "About") -> list[tuple[str, Image]]:
    """Side files that may be labels, with their part."""
    kinds = {"voc": {".xml"}, "fair1m": {".xml"}, "dota": {".txt"}, "vectors": VECTOR_SUFFIXES}
    suffixes = kinds.get(about.layout, set())
    if about.layout == "auto":
        suffixes = {".xml", ".txt"} | VECTOR_SUFFIXES
    found: list[tuple[str, Image]] = []
    groups: dict[tuple[str, str], list[Image]] = defaultdict(list)
    for file in beside:
        suffix = suffix_of(file.path)
        if suffix in suffixes:
            groups[file.path.rpartition("/")[0], suffix].append(file)
    for (folder, suffix), members in groups.items():
        if suffix in VECTOR_SUFFIXES:
            found += [("vectors", file) for file in members]
        elif about.layout != "auto" or _are_boxes(folder, suffix, members):
            found += [("boxes", file) for file in members]
    return found


def _are_boxes(folder: str, suffix: str, members: list[Image]) -> bool:
    """Whether a folder's text or XML files hold boxes: by its name in a bucket, else by a look."""
    if members[0].bucket is not None:
        words = _words(folder.rpartition("/")[2])
        if suffix == ".txt":
            return "labeltxt" in words
        return any(is_label_folder(part) for part in folder.split("/"))
    filled = [file for file in members if file.size > 0][:LOOKED_AT]
    return any(boxes.looks_like(file.file) for file in filled)


def _owned(
    images: list[Image],
    masks: list[Image],
    sides: list[tuple[str, Image]],
    places: dict[str, _Place],
    about: "About",
    found: Paired,
    source: str,
) -> Iterator[tuple[Image, str, Image]]:
    """Image, part and label for all that belong together, one of a part."""
    near, up = ("near", "far"), ("near", "far", "up")
    anywhere = bool(about.mask_files) or about.layout in ("masks", "vectors")
    tails = {"mask": MASK_TAIL, "height": HEIGHT_TAIL}

    def levels(part: str) -> tuple[str, ...]:
        # Beside heights every folder of images is one of another sensor: S2L2A, S1RTC, DEM.
        return up if anywhere or part == "height" else near

    index: dict[tuple[str, str, str, str], Image] = {}
    there: set[str] = set()
    for part, label in [*(("mask", mask) for mask in masks), *sides]:
        folder, stem = label.path.rpartition("/")[0], _stem(label.path)
        place = places.setdefault(folder, _place(folder))
        for level in levels(part):
            where = getattr(place, level)
            there.add(where)
            for base in {stem, tails.get(part, MASK_TAIL).sub("", stem)}:
                index.setdefault((part, level, where, base), label)
    far: dict[tuple[str, str], list[Image]] = defaultdict(list)  # label → images by level far
    hits: list[tuple[Image, str, Image, str]] = []
    parts = sorted({part for part, *_ in index})
    for image in images:
        place = places[image.path.rpartition("/")[0]]
        if not there.intersection((place.near, place.far, place.up)):
            continue
        stem = _stem(image.path)
        bases = dict.fromkeys((stem, IMAGE_TAIL.sub("", stem)))
        for part in parts:
            for level in levels(part):
                where = getattr(place, level)
                hits_here = (index.get((part, level, where, base)) for base in bases)
                hit = next(filter(None, hits_here), None)
                if hit is not None and hit.path != image.path:
                    hits.append((image, part, hit, level))
                    if level == "far":
                        far[part, hit.path].append(image)
                    break
    unclear = {
        key for key, claims in far.items()
        if len({places[i.path.rpartition("/")[0]].near for i in claims}) > 1
    }  # fmt: skip
    if unclear:
        first = min(path for _, path in unclear)
        found.notes.append(
            f"{source}: {len(unclear)} labels left out: images of the same name in several "
            f"folders could be theirs (first: {shown(first)})"
        )
    for image, part, its, level in hits:
        if level != "far" or (part, its.path) not in unclear:
            yield image, part, its


def _shared_vectors(
    images: Iterable[Image],
    sides: list[tuple[str, Image]],
    own: dict[str, list[tuple[str, Image]]],
) -> None:
    """For scenes without vectors of their own, the only file of vectors in their folder."""
    folders: dict[str, list[Image]] = defaultdict(list)
    for _, file in sides:
        folders[file.path.rpartition("/")[0]].append(file)
    for image in images:
        folder = image.path.rpartition("/")[0]
        while folder and folder not in folders:
            folder = folder.rpartition("/")[0]
        if len(folders.get(folder, [])) == 1:
            own[image.path].append(("vectors", folders[folder][0]))


def _attach(
    found: Paired,
    own: dict[str, list[tuple[str, Image]]],
    aside: set[str],
    beside: list[Image],
    about: "About",
    mask_codings: dict[str, Any],
    source: str,
) -> None:
    """Make attachments of what is the images' own, and say what was found and what left out."""
    owners: dict[str, int] = defaultdict(int)
    for labels in own.values():
        for _, label in labels:
            owners[label.path] += 1
    by_path = {file.path: file for file in beside} if beside else {}
    kinds: dict[str, int] = defaultdict(int)
    used_masks: dict[str, Attachment] = {}
    used_vectors: dict[str, list[Attachment]] = {}
    with_labels = [image for image in found.images if image.path in own]
    for image in with_labels:
        attachments = []
        for part, label in own[image.path]:
            files = [label]
            if suffix_of(label.path) == ".shp":
                stem = label.path[:-4]
                beside_it = (f"{stem}{s}" for p in sorted(SHAPE_PARTS) for s in (p, p.upper()))
                files += [by_path[path] for path in beside_it if path in by_path]
            shared = owners[label.path] > 1
            made = [
                Attachment(part, f.path, f.base, f.size, f.mtime_ns, f.bucket, shared)
                for f in files
            ]
            attachments += made
            if part == "mask":
                used_masks.setdefault(label.path, made[0])
            elif part != "height":
                found.used.update(f.path for f in files)
            if part == "vectors":
                used_vectors.setdefault(label.path, made)
            kinds[part] += 1
            image.layout = _layout(part, label, about)
        image.attachments = tuple(attachments)
        image.vector_class = about.vector_class
    unused = sorted(aside - set(used_masks))
    if unused:
        found.others += len(unused)
        found.notes.append(
            f"{source}: {len(unused)} masks left out: they are labels, not imagery "
            f"(first: {shown(unused[0])})"
        )
    if used_masks:
        coding, why_none = _coding(list(used_masks.values()), about, mask_codings)
        if coding is None:
            if about.layout != "auto" or about.masks != "auto":
                raise BadInput(f"{source}: its masks cannot be read: {why_none}")
            found.notes.append(f"{source}: {len(used_masks)} masks left out: {why_none}")
            found.others += len(used_masks)
            kinds.pop("mask")
        for image in with_labels:
            image.masks = coding or "auto"
            if coding is None:
                kept = tuple(one for one in image.attachments if one.part != "mask")
                image.attachments = kept
                image.layout = image.layout if kept else "classes"
    if used_vectors:
        coding = vectors.coding(list(used_vectors.values()), about, mask_codings)
        for image in with_labels:
            if any(one.part == "vectors" for one in image.attachments):
                image.masks = coding
    for part, count in sorted(kinds.items()):
        said = f" ({codings.shown(with_labels[0].masks)})" if part == "mask" else ""
        found.notes.append(
            f"{source}: {count} of {len(found.images)} images have {NAMES[part]}{said}"
        )


def _attach_coco(found: Paired, beside: list[Image], about: "About", source: str) -> None:
    """Give images the boxes that COCO's instances have of them.

    A file is of the images below its folder, or below the folder around `annotations`. Where
    several have the name that it gives, it is the one in a folder that the file's own name has in
    it: train2017 of instances_train2017.json.
    """
    files = _coco_files(beside, about)
    if not files:
        return
    by_name: dict[str, list[Image]] = defaultdict(list)
    for image in found.images:
        by_name[image.path.rpartition("/")[2]].append(image)
    owned = spare = absent = 0
    unclear: list[str] = []
    for file in files:
        folder = file.path.rpartition("/")[0]
        while folder and is_label_folder(folder.rpartition("/")[2]):
            folder = folder.rpartition("/")[0]
        for name, data in _instances(file, source).items():
            fitting = _named(by_name, name, folder, _stem(file.path))
            if len(fitting) > 1:
                unclear.append(name)
            if len(fitting) != 1:
                absent += not fitting
                continue
            (image,) = fitting
            found.used.add(file.path)
            if any(one.part == "boxes" for one in image.attachments):
                spare += 1
                continue
            mark = int.from_bytes(hashlib.sha256(data).digest()[:7])
            what = (file.path, file.base, len(data), mark, file.bucket)
            image.attachments += (Attachment("boxes", *what, shared=True, data=data),)
            image.layout = "coco"
            owned += 1
    where = f"{source}: {shown(files[0].path)}{' and others' if len(files) > 1 else ''}"
    if owned:
        more = f"; {absent} more that it names are not here" if absent else ""
        found.notes.append(f"{where}: {owned} of {len(found.images)} images have boxes{more}")
    if spare:
        found.notes.append(f"{where}: {spare} images have other boxes already: these left out")
    if unclear:
        found.notes.append(
            f"{where}: {len(unclear)} images left without boxes: several are of that name "
            f"(first: {shown(unclear[0])})"
        )


def _coco_files(beside: list[Image], about: "About") -> list[Image]:
    folders: dict[str, list[Image]] = defaultdict(list)
    for file in beside:
        if suffix_of(file.path) == ".json":
            folders[file.path.rpartition("/")[0]].append(file)
    found = []
    for members in folders.values():
        # Beside each image a file of its own: not one of many images.
        if len(members) > MANY and about.layout != "coco":
            continue
        for file in members:
            if file.bucket is not None:
                told = about.layout == "coco" or _stem(file.path).startswith("instances")
            else:
                told = coco.looks_like(file.file)
            if told:
                found.append(file)
    return sorted(found, key=lambda file: file.path)


def _instances(file: Image, source: str) -> dict[str, bytes]:
    try:
        file.fetch()
        return coco.read(file.file)
    except (BadInput, OSError) as error:
        raise BadInput(
            f"{source}: {shown(file.path)}: {error}: mend it, or leave it out (ingest.exclude)"
        ) from None
    finally:
        file.forget()


def _named(by_name: dict[str, list[Image]], name: str, folder: str, stem: str) -> list[Image]:
    """The images below a folder that a file of COCO's may mean by a name."""
    path = name.replace("\\", "/").removeprefix("./")
    below = f"{folder}/" if folder else ""
    there = [i for i in by_name.get(path.rpartition("/")[2], []) if i.path.startswith(below)]
    fitting = [i for i in there if i.path == path or i.path.endswith(f"/{path}")] or there
    if len(fitting) > 1:
        own = [i for i in fitting if any(part in stem for part in i.path.split("/")[:-1])]
        fitting = own or fitting
    return fitting


NAMES = {"mask": "a mask", "boxes": "boxes", "vectors": "vectors", "height": "heights"}


def _layout(part: str, label: Image, about: "About") -> str:
    if about.layout != "auto":
        return about.layout
    if part == "boxes":
        if suffix_of(label.path) == ".txt":
            return "dota"
        return "fair1m" if "labelxml" in label.path.lower() else "voc"
    return {"mask": "masks"}.get(part, part)


def _coding(
    masks: list[Attachment], about: "About", mask_codings: dict[str, Any]
) -> tuple[str | None, str]:
    """The source's coding of masks; None and why, where none fits what a few masks hold."""
    if about.masks not in ("auto", "binary"):
        return about.masks, ""
    masks = sorted(masks, key=lambda mask: mask.path)
    chosen = [masks[i * len(masks) // SAMPLE] for i in range(SAMPLE)]
    sample = list({mask.path: mask for mask in chosen}.values())
    counts = codings.Counts()
    for mask in sample:
        # A damaged mask is told of where its image is read.
        with codings.unless_damaged():
            mask.fetch()
            try:
                counts.add(mask.file)
            finally:
                if mask.bucket is not None:
                    mask.file.unlink(missing_ok=True)
    try:
        coding = codings.decide(counts, about.masks, mask_codings)
        if coding in ("zero_one", "auto") and all(FLOODS.search(_stem(m.path)) for m in masks):
            coding = "sen1floods11"
        return coding, ""
    except BadInput as error:
        return None, str(error)
