"""Boxes around objects: read from VOC's and FAIR1M's XML, DOTA's text and COCO's JSON, cut to a
tile, written.

A coordinate is in pixels from the image's top left corner, as the file gives it: published sets
disagree on whether the first pixel is 0 or 1, and one pixel is within their care.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringmo.errors import BadInput

SCHEMA = 1
MAX_BYTES = 64_000_000  # of one image's boxes
# An object of which more lies outside the image is another image's: cut images keep a part of
# what their edges cross.
MAX_OUTSIDE = 0.5

Point = tuple[float, float]


@dataclass
class Box:
    """name: of the class. points: four corners in order, as given, in the image's pixels."""

    name: str
    points: list[Point]
    difficult: bool = False


def read(file: Path, size: tuple[int, int]) -> list[Box]:
    """The boxes of an image of `size` (height, width).

    Raises:
        BadInput: unreadable, of another image, without a class, without area or outside.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise BadInput(f"its boxes are a file of more than {MAX_BYTES // 10**6} MB")
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"its boxes cannot be read: {error.strerror}") from None
    found = _xml(data, size) if data.lstrip(BLANK).startswith(XML_STARTS) else _dota(data)
    return _checked(found, size)


def from_coco(data: bytes, size: tuple[int, int]) -> list[Box]:
    """The boxes of an image of `size`, of what `coco.read` kept of it.

    Raises:
        BadInput: as `read`.
    """
    what = json.loads(data)
    declared = tuple(what["size"])
    if all(declared) and declared != size:
        raise BadInput(
            f"its boxes are of an image of {declared[1]}x{declared[0]} pixels, it has "
            f"{size[1]}x{size[0]}"
        )
    found = []
    for number, (name, x, y, width, height, crowd) in enumerate(what["boxes"], 1):
        if width <= 0 or height <= 0:
            raise BadInput(f"its boxes: object {number} ({name[:40]}) has no area")
        right, below = x + width, y + height
        found.append(Box(name, [(x, y), (right, y), (right, below), (x, below)], crowd))
    return _checked(found, size)


def _checked(found: list[Box], size: tuple[int, int]) -> list[Box]:
    for number, box in enumerate(found, 1):
        where = f"object {number} ({' '.join(box.name.split())[:40]})"
        if not box.name.strip():
            raise BadInput(f"its boxes: object {number} has no class")
        if not all(math.isfinite(v) for point in box.points for v in point):
            raise BadInput(f"its boxes: {where} has no finite corners")
        area = abs(_area(box.points))
        if area <= 0:
            raise BadInput(f"its boxes: {where} has no area")
        inside = abs(_area(_clip(box.points, size[1], size[0]))) / area
        if inside < 1 - MAX_OUTSIDE:
            how = "wholly" if inside == 0 else f"by {1 - inside:.0%}"
            raise BadInput(f"its boxes: {where} lies {how} outside the image")
    return found


BLANK = b" \t\r\n\xef\xbb\xbf"
XML_STARTS = (b"<", b"\xff\xfe", b"\xfe\xff")


def looks_like(file: Path) -> bool:
    """Whether a file's beginning is that of boxes."""
    try:
        with file.open("rb") as opened:
            head = opened.read(2048)
    except OSError:
        return False
    if head.lstrip(BLANK).startswith(XML_STARTS):
        tag = re.search(rb"<([A-Za-z][\w.:-]*)", head.replace(b"\0", b""))
        return tag is not None and tag[1] == b"annotation"
    for line in head.splitlines()[:4]:
        if line.startswith((b"imagesource:", b"gsd:")):
            return True
        try:
            return _line(line.decode("utf-8-sig")) is not None
        except (ValueError, BadInput):
            return False
    return False


def _xml(data: bytes, size: tuple[int, int]) -> list[Box]:
    """Pascal VOC (horizontal, or oriented as DIOR-R's) and FAIR1M."""
    from xml.etree import ElementTree

    text = _text(data)
    # Nothing of ours needs a document type; entities are how a small file fills a memory.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BadInput("its boxes are XML with a document type, which is not read")
    try:
        root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except (ElementTree.ParseError, ValueError) as error:
        raise BadInput(f"its boxes are no XML: {str(error)[:80]}") from None
    if root.tag != "annotation":
        raise BadInput(f"its boxes are XML of <{root.tag[:40]}>, not of <annotation>")
    declared = [_number(root, f"size/{side}", 0) for side in ("height", "width")]
    if all(declared) and tuple(declared) != size:
        raise BadInput(
            f"its boxes are of an image of {declared[1]:g}x{declared[0]:g} pixels, it has "
            f"{size[1]}x{size[0]}"
        )
    return [_object(one) for one in root.iter("object")]


def _text(data: bytes) -> str:
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)[\"']", data.lstrip(BLANK)[:200])
    encoding = declared[1].decode() if declared else "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    if encoding.lower() in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        raise BadInput(f"its boxes are no text in {encoding}") from None


def _object(one: Any) -> Box:
    name = (one.findtext("name") or one.findtext("possibleresult/name") or "").strip()
    difficult = (one.findtext("difficult") or "0").strip() not in ("0", "")
    kind = one.findtext("coordinate")
    if kind is not None and kind.strip() not in ("pixel", ""):
        raise BadInput(f"its boxes are in {kind.strip()[:40]} coordinates, not in pixels")
    given = [point.text or "" for point in one.iterfind("points/point")]
    if given:
        corners = [_pair(text) for text in given]
        if len(corners) == 5 and corners[0] == corners[4]:
            corners.pop()
        if len(corners) != 4:
            raise BadInput(f"its boxes: an object of {len(corners)} corners, not of 4")
        return Box(name, corners, difficult)
    oriented = one.find("robndbox")
    if oriented is not None and oriented.find("x_left_top") is not None:
        places = ("left_top", "right_top", "right_bottom", "left_bottom")
        return Box(
            name, [(_number(oriented, f"x_{p}"), _number(oriented, f"y_{p}")) for p in places],
            difficult,
        )  # fmt: skip
    box = one.find("bndbox")
    if box is None:
        raise BadInput("its boxes: an object without <bndbox> or <points>")
    left, top, right, bottom = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    if right <= left or bottom <= top:
        raise BadInput(f"its boxes: an object ({name[:40]}) has no area")
    return Box(name, [(left, top), (right, top), (right, bottom), (left, bottom)], difficult)


def _number(parent: Any, path: str, default: float | None = None) -> float:
    text = parent.findtext(path)
    if text is None and default is not None:
        return default
    try:
        return float(text)
    except (TypeError, ValueError):
        raise BadInput(f"its boxes: <{path}> is no number: {str(text)[:40]}") from None


def _pair(text: str) -> Point:
    try:
        x, y = text.split(",")[:2]
        return float(x), float(y)
    except ValueError:
        raise BadInput(f"its boxes: no corner: {text.strip()[:40]}") from None


def _dota(data: bytes) -> list[Box]:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput("its boxes are no text in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.startswith(("imagesource:", "gsd:")):
            continue
        try:
            box = _line(line)
        except ValueError:
            raise BadInput(
                f"its boxes, line {number}: expected `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`"
            ) from None
        if box is not None:
            found.append(box)
    return found


def _line(line: str) -> Box | None:
    """A line of DOTA's text; None for an empty one.

    Raises:
        ValueError: it is none.
    """
    words = line.split()
    if not words:
        return None
    values = [float(word) for word in words[:8]]
    if len(values) < 8 or len(words) > 10:
        raise ValueError(line)
    corners = list(zip(values[::2], values[1::2], strict=True))
    name = words[8] if len(words) > 8 else ""
    return Box(name, corners, len(words) == 10 and words[9] != "0")


def _area(points: Sequence[Point]) -> float:
    """Of a polygon, in square pixels; its sign says which way round it goes."""
    around = zip(points, [*points[1:], *points[:1]], strict=True)
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in around) / 2


def _clip(points: Sequence[Point], width: float, height: float) -> list[Point]:
    """The part of a polygon in a window from 0, 0 (Sutherland and Hodgman 1974)."""
    kept = list(points)
    for axis, limit, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        before, kept = kept, []
        for here, after in zip(before, [*before[1:], *before[:1]], strict=True):
            inside, then = (sign * (p[axis] - limit) >= 0 for p in (here, after))
            if inside:
                kept.append(here)
            if inside != then:
                part = (limit - here[axis]) / (after[axis] - here[axis])
                kept.append(
                    (here[0] + part * (after[0] - here[0]), here[1] + part * (after[1] - here[1]))
                )
    return kept


def cut(
    boxes: Iterable[Box], row: int, col: int, height: int, width: int, scale: float
) -> list[dict[str, Any]]:
    """The boxes of which a part can be seen in a tile, in its pixels.

    Args:
        row, col, height, width: of the tile, in its own pixels.
        scale: the image's pixels that a tile's pixel stands for.
    """
    seen = []
    for box in boxes:
        points = [(x / scale - col, y / scale - row) for x, y in box.points]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= width or min(ys) >= height:
            continue
        beyond = min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height
        visible = _clip(points, width, height) if beyond else points
        share = min(abs(_area(visible)) / abs(_area(points)), 1.0) if beyond else 1.0
        if share <= 0:
            continue
        xs, ys = [x for x, _ in visible], [y for _, y in visible]
        seen.append(
            {
                "class": box.name,
                "points": [[_short(x), _short(y)] for x, y in points],
                "box": [_short(v) for v in (min(xs), min(ys), max(xs), max(ys))],
                "difficult": box.difficult,
                "share": round(share, 4),
                "cut": beyond,
            }
        )
    return seen


def _short(value: float) -> float:
    return round(value, 3) + 0.0  # never -0.0


def written(boxes: list[dict[str, Any]]) -> bytes:
    """A tile's boxes as JSON: the same boxes are the same bytes."""
    text = json.dumps(
        {"schema": SCHEMA, "boxes": boxes},
        ensure_ascii=False,
        separators=(",", ":"),
        sort_keys=True,
    )
    return text.encode()
