"""What the values of a mask mean: from grey values and colours to classes' numbers.

A stored mask has one byte a pixel: the class's number, from 0, and 255 where nobody knows. How a
source's masks are coded is decided once for all of them: a mask of nothing but zeros is binary
where its neighbours are.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data import decode
from ringmo.errors import BadInput

UNKNOWN = 255
BRIGHT = 127  # above it a pixel of a black and white mask is the object; its edges may be grey
MAX_NOISE = 0.001  # share of a mask's pixels whose colours may be no class's
MAX_INDEX = 63  # values up to it are numbers of classes, if there is nothing above but 255
EXTREME_SHARE = 0.9  # of a black and white mask's pixels that are nearly black or nearly white
LOOKED_AT = 2048  # pixels a side of a mask that decide how it is coded
VECTORS = "vectors:"  # begins a coding that lists its classes itself, as a JSON list
# No side files read or written; a damaged mask is an error.
GDAL = {
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
    # GDAL 3.10 reads a truncated PNG of 8 bits at once as noise, without an error.
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
    "GDAL_CACHEMAX": 64_000_000,  # bytes: rasterio makes no megabytes of small numbers
    "CPL_LOG": "/dev/null",
}

Numbers = NDArray[np.uint8]


@dataclass(frozen=True)
class Coding:
    """classes: in order of their numbers. values, colours (R << 16 | G << 8 | B): of a mask, with
    the number that each becomes; one of the two is empty."""

    classes: tuple[str, ...]
    values: dict[int, int] = field(default_factory=dict)
    colours: dict[int, int] = field(default_factory=dict)


def _coloured(classes: dict[str, int], unknown: int | None = None) -> Coding:
    colours = {colour: number for number, colour in enumerate(classes.values())}
    if unknown is not None:
        colours[unknown] = UNKNOWN
    return Coding(tuple(classes), colours=colours)


# ISPRS 2D semantic labelling; black are the borders that the eroded ground truth leaves out.
ISPRS = _coloured(
    {
        "clutter": 0xFF0000,
        "impervious surface": 0xFFFFFF,
        "building": 0x0000FF,
        "low vegetation": 0x00FFFF,
        "tree": 0x00FF00,
        "car": 0xFFFF00,
    },
    unknown=0x000000,
)
BINARY = ("background", "object")
BUILT_IN = {
    # 0 and 1, as `binary` masks also are; `decide` tells the two apart.
    "zero_one": Coding(BINARY, values={0: 0, 1: 1, UNKNOWN: UNKNOWN}),
    "loveda": Coding(  # Wang et al. 2021
        ("background", "building", "road", "water", "barren", "forest", "agriculture"),
        values={0: UNKNOWN} | {value: value - 1 for value in range(1, 8)},
    ),
    # Bonafilia et al. 2020; what is unknown is -1.
    "sen1floods11": Coding(("land", "water"), values={0: 0, 1: 1, UNKNOWN: UNKNOWN}),
    "potsdam": ISPRS,
    "vaihingen": ISPRS,
    "isaid": _coloured(  # Zamir et al. 2019
        {
            "background": 0x000000,
            "ship": 0x00003F,
            "storage tank": 0x003F3F,
            "baseball diamond": 0x003F00,
            "tennis court": 0x003F7F,
            "basketball court": 0x003FBF,
            "ground track field": 0x003FFF,
            "bridge": 0x007F3F,
            "large vehicle": 0x007F7F,
            "small vehicle": 0x00007F,
            "helicopter": 0x0000BF,
            "swimming pool": 0x0000FF,
            "roundabout": 0x00BF7F,
            "soccer ball field": 0x007FBF,
            "plane": 0x007FFF,
            "harbor": 0x00649B,
        }
    ),
}


def own(name: str, classes: dict[str, Any]) -> Coding:
    """A coding of ingest.mask_codings.

    A class has a value, a colour [r, g, b], or a list of either. It is a coding of colours where
    every list has three numbers and there is no plain number.

    Raises:
        ValueError: what is wrong with it.
    """
    flat = [given for given in classes.values() if not _is_list_of_lists(given)]
    lists = [given for given in flat if isinstance(given, list)]
    by_colour = len(lists) == len(flat) and all(len(given) == 3 for given in lists)
    means: dict[int, str] = {}
    for class_name, given in classes.items():
        if by_colour:
            if not isinstance(given, list) or not given:
                raise ValueError(f"{name}.{class_name}: no colour")
            each = given if isinstance(given[0], list) else [given]
            if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in each):
                raise ValueError(f"{name}.{class_name}: a colour is [red, green, blue], 0 to 255")
            values = [c[0] << 16 | c[1] << 8 | c[2] for c in each]
        else:
            values = given if isinstance(given, list) else [given]
            if not values or any(isinstance(value, list) for value in values):
                raise ValueError(
                    f"{name}: values and colours: a mask has one or the other (a plain number "
                    f"is a value: for black write [0, 0, 0])"
                )
        for value in values:
            if means.setdefault(value, class_name) != class_name:
                what = f"#{value:06x}" if by_colour else value
                raise ValueError(
                    f"{name}: {what} stands for `{means[value]}` and for `{class_name}` (beside "
                    f"a plain number, a list is one of values: for black write [0, 0, 0])"
                )
    names = tuple(class_name for class_name in classes if class_name != "ignore")
    if not 1 <= len(names) <= UNKNOWN:
        raise ValueError(f"{name}: {len(names)} classes: 1 to {UNKNOWN} can be told apart")
    numbers = {class_name: number for number, class_name in enumerate(names)}
    known = {value: numbers.get(class_name, UNKNOWN) for value, class_name in means.items()}
    return Coding(names, colours=known) if by_colour else Coding(names, values=known)


def _is_list_of_lists(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and isinstance(given[0], list)


def class_names(coding: str, codings: dict[str, Any]) -> dict[str, str]:
    """Number → name of the classes of a coding, as `mask_coding` in the manifest names it.

    Args:
        codings: ingest.mask_codings.

    Returns:
        Empty for `index`, whose numbers have no names.

    Raises:
        BadInput: no such coding.
    """
    if coding == "index":
        return {}
    names: tuple[str, ...]
    if coding == "binary":
        names = BINARY
    elif coding.startswith(VECTORS):
        names = ("background", *json.loads(coding.removeprefix(VECTORS)))
    else:
        names = _find(coding, codings).classes
    return {str(number): name for number, name in enumerate(names)}


def recorded(coding: str) -> str:
    """A coding's name in the manifest: one for both kinds of black and white."""
    return "binary" if coding in ("zero_one", "auto") else coding


def _find(coding: str, codings: dict[str, Any]) -> Coding:
    if coding in BUILT_IN:
        return BUILT_IN[coding]
    if coding not in codings:
        raise BadInput(f"no coding of masks is called {coding}: see ingest.mask_codings")
    return _own(coding, json.dumps(codings[coding]))


@lru_cache(maxsize=64)
def _own(name: str, classes: str) -> Coding:
    try:
        return own(name, json.loads(classes))
    except ValueError as error:
        raise BadInput(f"ingest.mask_codings: {error}") from None


def opened(path: Path) -> Any:
    """A mask as an open rasterio dataset, to be read and closed within `reading`.

    Raises:
        BadInput: it is no image.
    """
    import rasterio

    drivers = {"tif": "GTiff", "png": "PNG", "jpg": "JPEG"}
    with path.open("rb") as file:
        form = decode.kind(file.read(16))
    if form is None:
        raise BadInput("its mask is not an image (JPEG, PNG and TIFF are read)")
    return rasterio.open(path, driver=drivers[form])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """GDAL as masks are read with it, and its errors as one line.

    Raises:
        BadInput: the mask cannot be read, or is damaged.
    """
    import rasterio
    from rasterio.errors import RasterioError

    decode.expect_no_coordinates()
    try:
        with rasterio.Env(**GDAL):
            yield
    except (RasterioError, MemoryError) as error:
        raise BadInput(f"damaged mask: {said(error, path)}") from None
    except OSError as error:
        raise BadInput(f"its mask cannot be read: {said(error, path)}") from None


def said(error: BaseException, path: Path) -> str:
    """The first line of what an error says, without the file's name."""
    cause = error.__cause__ or error
    text = getattr(cause, "strerror", None) or str(cause).split("\n")[0]
    return text.replace(str(path), "").replace(path.name, "").strip(" :,'")[:120] or "damaged"


def unless_damaged() -> Any:
    """Pass over a file that cannot be read, where others can decide."""
    return suppress(BadInput, OSError)


def read(mask: Any, window: Any = None) -> NDArray[Any]:
    """A mask's values (H, W), whole numbers, or its colours packed in one number (uint32).

    A pixel without data (NaN, or the nodata value, but for 0) is -1.
    """
    bands = decode.colour_bands(mask) or [1]
    if mask.dtypes[0].startswith("complex"):
        raise BadInput("its mask has complex values")
    raw: NDArray[Any] = mask.read(bands[:3], window=window)
    if len(raw) == 3 and raw.dtype == np.uint8:
        if not ((raw[0] == raw[1]) & (raw[1] == raw[2])).all():
            red, green, blue = raw.astype(np.uint32)
            packed: NDArray[np.uint32] = red << 16 | green << 8 | blue
            return packed
    elif len(raw) > 1:
        raise BadInput(f"its mask has {len(bands)} bands of {raw.dtype}: one, or three of uint8")
    values: NDArray[Any] = raw[0]
    if values.dtype == np.uint32:
        values = values.astype(np.int64)
    if values.dtype.kind == "f":
        whole = np.nan_to_num(values, nan=-1, posinf=-1, neginf=-1)
        if (np.abs(whole) > 2**31).any() or (whole != np.round(whole)).any():
            raise BadInput("its mask has fractions: whole numbers are classes")
        values = whole.astype(np.int64)
    if mask.nodata is not None and mask.nodata != 0 and not np.isnan(mask.nodata):
        values = np.where(values == mask.nodata, -1, values.astype(np.int64))
    return values


def is_coloured(values: NDArray[Any]) -> bool:
    """Whether these are colours that `read` has packed."""
    return values.dtype == np.uint32


@dataclass
class Counts:
    """How often each value, or packed colour, is in a few masks."""

    values: dict[int, int] = field(default_factory=dict)
    colours: dict[int, int] = field(default_factory=dict)
    lossy: bool = False

    def add(self, file: Path) -> None:
        """Count a mask's pixels, those in its middle where it is large.

        Raises:
            BadInput: it cannot be read.
        """
        with reading(file), opened(file) as mask:
            top, left = (max(n - LOOKED_AT, 0) // 2 for n in (mask.height, mask.width))
            rows = (top, min(top + LOOKED_AT, mask.height))
            values = read(mask, (rows, (left, min(left + LOOKED_AT, mask.width))))
            self.lossy |= mask.driver == "JPEG"
        into = self.colours if is_coloured(values) else self.values
        for value, count in zip(*np.unique(values, return_counts=True), strict=True):
            into[int(value)] = into.get(int(value), 0) + int(count)


def decide(counts: Counts, wanted: str, codings: dict[str, Any]) -> str:
    """The coding that fits what a few masks hold; `auto` where all of it is 0 and tells nothing.

    - Colours: the coding, a user's or built in, that knows all but a thousandth of them.
    - 0 and 1, perhaps with 255 for what nobody knows: `zero_one`.
    - Numbers up to 63, perhaps with 255: `index`, as they are.
    - Mostly black and white, some above 127: `binary`.
    - Else, if there are few values: `index`.

    Raises:
        BadInput: none fits; the reason.
    """
    if wanted != "binary" and counts.colours:
        # Grey masks among coloured ones are those that happen to have one colour.
        colours = counts.colours | {v * 0x010101: n for v, n in counts.values.items() if v >= 0}
        names = [*codings, *BUILT_IN]
        for name in names:
            known = _find(name, codings).colours
            unknown = sum(count for colour, count in colours.items() if colour not in known)
            if known and unknown <= MAX_NOISE * sum(colours.values()):
                return name
        raise BadInput(
            "their colours are no known coding's: describe them in ingest.mask_codings, and name "
            "the coding in ingest.about"
        )
    values = {value: count for value, count in counts.values.items() if value >= 0}
    inner = set(values) - {UNKNOWN}
    if set(values) <= {0}:
        return "binary" if counts.colours else "auto"
    if counts.lossy or (inner <= {0} and UNKNOWN in values):
        return "binary"
    if inner <= {0, 1}:
        return "zero_one"
    if wanted == "binary":
        return "binary"
    if max(inner) <= MAX_INDEX:
        return "index"
    extreme = sum(count for value, count in values.items() if value < 64 or value > 191)
    if max(values) <= 255 and extreme >= EXTREME_SHARE * sum(values.values()):
        return "binary"
    if len(values) <= MAX_INDEX and max(inner) < UNKNOWN:
        return "index"
    raise BadInput(
        f"their {len(values)} values are no classes' numbers: describe them in "
        f"ingest.mask_codings, and name the coding in ingest.about"
    )


def encode(values: NDArray[Any], coding: str, codings: dict[str, Any]) -> tuple[Numbers, int]:
    """Class numbers of what `read` gave, and how many pixels' colours are no class's.

    Raises:
        BadInput: values that the coding does not know, or colours where it knows values.
    """
    if is_coloured(values) or _has_colours(coding, codings):
        return _from_colours(values, _find_colours(coding, codings))
    if coding in ("binary", "auto"):
        # A mask that told nothing where it was looked at: 1 is its object if nothing is brighter.
        above = 0 if coding == "auto" and values.max() <= 1 else BRIGHT
        bright = (values > above).astype(np.uint8)
        bright[values < 0] = UNKNOWN
        return bright, 0
    if coding == "index":
        numbers = np.where(values < 0, UNKNOWN, values)
        _refuse(numbers, (numbers > UNKNOWN), coding)
        return numbers.astype(np.uint8), 0
    known = _find(coding, codings).values
    numbers = np.full(values.shape, UNKNOWN, np.uint8)
    unknown = values >= 0
    for value, number in known.items():
        here = values == value
        numbers[here] = number
        unknown &= ~here
    _refuse(values, unknown, coding)
    return numbers, 0


def _refuse(values: NDArray[Any], unknown: NDArray[np.bool_], coding: str) -> None:
    if unknown.any():
        strange = np.unique(values[unknown])
        listed = ", ".join(str(value) for value in strange[:3])
        more = ", …" if len(strange) > 3 else ""
        raise BadInput(
            f"its mask has the value{'s' if len(strange) > 1 else ''} {listed}{more}, "
            f"which {shown(coding)} does not know"
        )


def _has_colours(coding: str, codings: dict[str, Any]) -> bool:
    return coding not in ("binary", "auto", "index") and bool(_find(coding, codings).colours)


def _find_colours(coding: str, codings: dict[str, Any]) -> dict[int, int]:
    if not _has_colours(coding, codings):
        raise BadInput(f"its mask has colours, {shown(coding)} is for grey values")
    return _find(coding, codings).colours


def _from_colours(values: NDArray[Any], known: dict[int, int]) -> tuple[Numbers, int]:
    # A window of one grey, as black: `read` gives its value.
    packed = values if is_coloured(values) else values.astype(np.int64) * 0x010101
    numbers = np.full(packed.shape, UNKNOWN, np.uint8)
    unknown = np.ones(packed.shape, np.bool_)
    for colour, number in known.items():
        here = packed == colour
        numbers[here] = number
        unknown &= ~here
    return numbers, int(unknown.sum())


def shown(coding: str) -> str:
    """A coding's name for a reader."""
    if coding.startswith(VECTORS):
        return ", ".join(json.loads(coding.removeprefix(VECTORS)))
    return {"zero_one": "binary", "auto": "binary"}.get(coding, coding)
