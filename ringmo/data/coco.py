"""COCO's instances: the boxes of many images in one JSON file, which may be larger than memory.

The file is read piece by piece, an element of `images`, `annotations` or `categories` at a time.
Kept is what a box needs: polygons and run lengths are read over. `iscrowd` is `difficult`.

By hand, since ijson (3.6.0) fills the memory where a file is nested deeply.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ringmo.errors import BadInput

CHUNK = 1 << 20  # characters
MAX_PIECE = 64_000_000  # characters of one element
KEYS = (b'"images"', b'"annotations"', b'"categories"', b'"bbox"')
SPACE = re.compile(r"[ \t\r\n]*")


def looks_like(file: Path) -> bool:
    """Whether a file is JSON that names all that COCO's instances have."""
    missing, tail = set(KEYS), b""
    try:
        with file.open("rb") as opened:
            if opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
                return False
            opened.seek(0)
            while missing and (chunk := opened.read(CHUNK)):
                seen = tail + chunk
                missing = {key for key in missing if key not in seen}
                tail = chunk[-16:]
    except OSError:
        return False
    return not missing


def read(file: Path) -> dict[str, bytes]:
    """File name of each image → its boxes, as `boxes.from_coco` reads them.

    Raises:
        BadInput: no JSON, or an id that is twice there or nowhere; the reason.
    """
    images: dict[Any, tuple[str, Any, Any]] = {}
    classes: dict[Any, str] = {}
    objects: dict[Any, list[tuple[Any, ...]]] = {}
    named: set[str] = set()
    seen: set[Any] = set()
    try:
        with file.open(encoding="utf-8-sig") as opened:
            for key, one in _elements(opened):
                if key == "images":
                    _once(one, images, "images")
                    name = _name(one.get("file_name"), f"image {one['id']} has no file_name")
                    if name in named:
                        raise BadInput(f"two images are {name[:80]}")
                    named.add(name)
                    images[one["id"]] = name, one.get("height"), one.get("width")
                elif key == "categories":
                    _once(one, classes, "categories")
                    nameless = f"category {one['id']} has no name"
                    classes[one["id"]] = _name(one.get("name"), nameless)
                elif key == "annotations":
                    _once(one, seen, "annotations")
                    seen.add(one["id"])
                    of = objects.setdefault(_key(one.get("image_id")), [])
                    of.append((one["id"], _key(one.get("category_id")), *_box(one)))
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput("no text in UTF-8") from None
    for image, some in objects.items():
        if image not in images:
            raise BadInput(f"annotation {some[0][0]} is of image {image}, which it does not have")
        for annotation, category, *_ in some:
            if category not in classes:
                raise BadInput(
                    f"annotation {annotation} is of category {category}, which it does not have"
                )
    found = {}
    for image, (name, height, width) in images.items():
        own = [[classes[one[1]], *one[2:]] for one in objects.get(image, [])]
        what = {"size": [height or 0, width or 0], "boxes": own}
        found[name] = json.dumps(what, ensure_ascii=False, separators=(",", ":")).encode()
    return found


def _key(value: Any) -> Any:
    """An id; lists and the like, which are none, as text."""
    return value if isinstance(value, (int, str)) else repr(value)[:40]


def _once(one: Any, known: Any, what: str) -> None:
    if not isinstance(one, dict) or not isinstance(one.get("id"), (int, str)):
        raise BadInput(f"an element of {what} has no id: {json.dumps(one)[:60]}")
    if one["id"] in known:
        raise BadInput(f"two {what} have the id {one['id']}")


def _name(value: Any, missing: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadInput(missing)
    return value.strip()


def _box(one: dict[str, Any]) -> tuple[float, float, float, float, bool]:
    given = one.get("bbox")
    if not isinstance(given, list) or len(given) != 4:
        raise BadInput(f"annotation {one['id']} has no bbox [x, y, width, height]")
    if not all(type(value) in (int, float) for value in given):
        raise BadInput(f"annotation {one['id']} has a bbox that is no four numbers")
    x, y, width, height = given
    return x, y, width, height, bool(one.get("iscrowd"))


def _elements(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Key and element of every array of a JSON object, one at a time."""
    text = _Text(file)
    text.expect("{")
    if text.next() == "}":
        return
    while True:
        key = text.value()
        text.expect(":")
        if text.next() == "[":
            text.expect("[")
            while text.next() != "]":
                yield key, text.value()
                if text.next() != ",":
                    break
                text.expect(",")
            text.expect("]")
        else:
            text.value()
        if text.next() != ",":
            break
        text.expect(",")
    text.expect("}")


class _Text:
    """JSON in a file, of which a part is held."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._held, self._at, self._before = "", 0, 0
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        self._before += self._at
        rest = self._held[self._at :]
        if len(rest) > MAX_PIECE:
            return False
        # Twice as much each time: a large element is not begun again for every chunk.
        chunk = self._file.read(max(CHUNK, len(rest)))
        self._held, self._at = rest + chunk, 0
        return bool(chunk)

    def next(self) -> str:
        """The next character that is no space."""
        while True:
            space = SPACE.match(self._held, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more():
                raise BadInput("no whole JSON: it ends too early")

    def expect(self, character: str) -> None:
        if self.next() != character:
            raise BadInput(f"no JSON: `{character}` expected at character {self._place}")
        self._at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except RecursionError:
                raise BadInput("no JSON that can be read: nested too deeply") from None
            except ValueError:
                if not self._more():
                    raise BadInput(f"no JSON after character {self._place}") from None
                continue
            # A number at the end may go on.
            if end == len(self._held) and self._more():
                continue
            self._at = end
            return value

    @property
    def _place(self) -> int:
        return self._before + self._at
