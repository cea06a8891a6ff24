"""An image's labels, cut like its tiles: masks as PNG, boxes as JSON, heights as TIFF, whatever
they came as.

What is wrong with the labels is a BadInput whose text is the reason alone, as with images.
"""

import io
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ringmo.data import boxes, codings, geotiff, heights, scenes
from ringmo.data.resampling import Side, resampled
from ringmo.data.sources import SHAPE_PARTS, Attachment, Image, suffix_of
from ringmo.data.store import sha256
from ringmo.data.vectors import Vectors
from ringmo.errors import BadInput

ROUNDING = 1.0  # pixels: some data sets count from 1, some round
STRIP = 4_000_000  # pixels of a mask that are looked at together
MAX_APART = 1.0  # pixels: two grids of which corners lie farther apart are not of one ground


class Window(Protocol):
    """A tile's place: on the grid of pixels that the image has after resampling.

    scale: the image's own pixels that one of the tile stands for.
    """

    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def scale(self) -> float: ...


@dataclass
class Member:
    """A label of a tile, as the store keeps it, and its columns of the manifest."""

    part: str  # one of store.LABELS
    suffix: str  # mask.png, boxes.json or height.tif
    data: bytes
    facts: dict[str, Any]


class Labels:
    """An image's attachments, brought and opened once, and cut with it."""

    def __init__(
        self,
        image: Image,
        size: tuple[int, int],
        mask_codings: dict[str, Any],
        crs: Any = None,
        transform: Any = None,
    ) -> None:
        """
        Args:
            size: the image's height and width, in its own pixels.
            mask_codings: ingest.mask_codings.
            crs, transform: the image's, as rasterio has them; needed where it has vectors or
                heights.
        """
        self.image, self.size, self.codings = image, size, mask_codings
        self.crs, self.transform = crs, transform
        self._open = ExitStack()
        self._mask: Any = None
        self._heights: Any = None
        self._geo_keys: geotiff.Tags | None = None
        self._vectors: Vectors | None = None
        self._boxes: list[boxes.Box] | None = None
        self._coding = image.masks
        self._noise: float | None = None

    def __enter__(self) -> Self:
        """
        Raises:
            BadInput: labels that cannot be read or are not this image's; the reason.
            Unreachable: a bucket does not answer.
        """
        try:
            self._bring()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _bring(self) -> None:
        for one in self.image.attachments:
            # Windows of one scene are cut side by side: whoever brought its labels removes them.
            here = one.bucket is None or one.file.exists()
            try:
                one.fetch()
            except OSError as error:
                raise BadInput(f"its {one.part} cannot be read: {error.strerror}") from None
            if not here:
                self._open.callback(one.forget)
        for one in self.image.attachments:
            if one.part == "mask":
                self._open_mask(one)
            elif one.part == "height":
                self._open_heights(one)
            elif one.part == "boxes":
                if one.data is None:
                    self._boxes = boxes.read(one.file, self.size)
                else:
                    self._boxes = boxes.from_coco(one.data, self.size)
            elif suffix_of(one.path) not in SHAPE_PARTS:
                self._vectors = Vectors(
                    one.file,
                    self.image.vector_class,
                    self._coding,
                    self.codings,
                    self.size,
                    self.crs,
                    self.transform,
                )

    def _open_mask(self, one: Attachment) -> None:
        self._file = one.file
        with codings.reading(one.file):
            # Open as long as its image: a PNG can only be read on from where one is.
            self._mask = mask = self._open.enter_context(codings.opened(one.file))
        if (mask.height, mask.width) != self.size:
            raise BadInput(
                f"its mask has {mask.width}x{mask.height} pixels, the image "
                f"{self.size[1]}x{self.size[0]}"
            )
        if self._coding == "auto":
            counts = codings.Counts()
            counts.add(one.file)
            self._coding = codings.decide(counts, "auto", self.codings)

    def _open_heights(self, one: Attachment) -> None:
        self._heights = raster = self._open.enter_context(heights.opened(one.file))
        if (raster.height, raster.width) != self.size:
            raise BadInput(
                f"its heights have {raster.width}x{raster.height} pixels, the image "
                f"{self.size[1]}x{self.size[0]}"
            )
        own = (self.transform, self.crs)
        off = scenes.apart(self.size, own, scenes.georeference(one.file))
        if not off <= MAX_APART:
            raise BadInput(f"its heights lie elsewhere, {off:.0f} pixels away")

    def of(self, window: Window) -> list[Member]:
        """The labels of one tile.

        Raises:
            BadInput: a damaged mask or raster of heights, or a mask with values that its coding
                does not know.
        """
        members = []
        if self._mask is not None:
            members.append(self._mask_member(self._cut_mask(window)))
        elif self._vectors is not None:
            w = window
            burnt = self._vectors.window(w.row, w.col, w.height, w.width, w.scale)
            members.append(self._mask_member(burnt))
        if self._boxes is not None:
            members.append(self._boxes_member(window))
        if self._heights is not None:
            cut = self._cut_heights(window)
            if not np.isnan(cut).all():
                members.append(self._height_member(window, cut))
        return members

    def _cut_heights(self, window: Window) -> heights.Heights:
        """The tile's heights: as they are, or resampled as its pixels are."""
        rows, cols = (
            Side(start, count, window.scale, length)
            for start, count, length in (
                (window.row, window.height, self.size[0]),
                (window.col, window.width, self.size[1]),
            )
        )
        values = heights.read(self._heights, rows.source, cols.source)
        if window.scale == 1:
            return values
        gaps = np.isnan(values)[..., None]
        made, _ = resampled(values[..., None], gaps, rows, cols, None)
        return made[..., 0]

    def _height_member(self, window: Window, values: heights.Heights) -> Member:
        tags: geotiff.Tags = {}
        if self.crs is not None:
            if self._geo_keys is None:
                self._geo_keys = geotiff.geo_keys(self.crs)
            shift = window.col * window.scale, window.row * window.scale
            place = self.transform @ self.transform.translation(*shift)
            place = place @ self.transform.scale(window.scale)
            tags = geotiff.placed(place, self._geo_keys)
        data = heights.encoded(values, tags)
        facts = {
            "height_size": len(data),
            "height_hash": sha256(data),
            "height_width": values.shape[1],
            "height_height": values.shape[0],
            **heights.measured(values),
        }
        return Member("height", "height.tif", data, facts)

    def _cut_mask(self, window: Window) -> NDArray[np.uint8]:
        """Nearest neighbours of the tile's pixels."""
        rows = _nearest(window.row, window.height, window.scale, self.size[0])
        cols = _nearest(window.col, window.width, window.scale, self.size[1])
        top, left = int(rows[0]), int(cols[0])
        with codings.reading(self._file):
            values = codings.read(self._mask, ((top, int(rows[-1]) + 1), (left, int(cols[-1]) + 1)))
        if window.scale != 1:
            values = values[np.ix_(rows - top, cols - left)]
        numbers, strange = codings.encode(values, self._coding, self.codings)
        if strange > codings.MAX_NOISE * numbers.size and self._noise_share() > codings.MAX_NOISE:
            raise BadInput(
                f"{self._noise:.1%} of its mask has colours that "
                f"{codings.shown(self._coding)} does not know"
            )
        return numbers

    def _noise_share(self) -> float:
        """Share of the whole mask whose colours are no class's, looked at once, in strips."""
        if self._noise is None:
            height, width = self.size
            high = max(1, STRIP // width)
            strange = 0
            with codings.reading(self._file):
                for top in range(0, height, high):
                    strip = ((top, min(top + high, height)), (0, width))
                    values = codings.read(self._mask, strip)
                    strange += codings.encode(values, self._coding, self.codings)[1]
            self._noise = strange / (height * width)
        return self._noise

    def _mask_member(self, numbers: NDArray[np.uint8]) -> Member:
        from PIL import Image as Picture

        file = io.BytesIO()
        Picture.fromarray(numbers).save(file, "PNG")
        data = file.getvalue()
        counts = np.bincount(numbers.ravel(), minlength=256).tolist()
        known = [number for number, count in enumerate(counts[: codings.UNKNOWN]) if count]
        highest = known[-1] + 1 if known else 0
        facts = {
            "mask_size": len(data),
            "mask_hash": sha256(data),
            "mask_width": numbers.shape[1],
            "mask_height": numbers.shape[0],
            "mask_coding": codings.recorded(self._coding),
            "mask_counts": [*counts[:highest], counts[codings.UNKNOWN]],
        }
        return Member("mask", "mask.png", data, facts)

    def _boxes_member(self, window: Window) -> Member:
        w = window
        seen = boxes.cut(self._boxes or [], w.row, w.col, w.height, w.width, w.scale)
        data = boxes.written(seen)
        facts = {
            "boxes_size": len(data),
            "boxes_hash": sha256(data),
            "boxes_count": len(seen),
            "boxes_outside": sum(self._beyond(box["points"], window) for box in seen),
            "boxes_classes": [box["class"] for box in seen],
        }
        return Member("boxes", "boxes.json", data, facts)

    def _beyond(self, points: list[list[float]], window: Window) -> bool:
        """Whether corners, in a tile's pixels, lie beyond the image by more than rounding does."""
        for axis, start, side in ((0, window.col, self.size[1]), (1, window.row, self.size[0])):
            places = [(point[axis] + start) * window.scale for point in points]
            if min(places) < -ROUNDING or max(places) > side + ROUNDING:
                return True
        return False


def _nearest(start: int, count: int, scale: float, size: int) -> NDArray[np.int64]:
    """The image's pixels under the centres of a tile's, along one side."""
    under = np.floor((start + np.arange(count) + 0.5) * scale).astype(np.int64)
    within: NDArray[np.int64] = np.minimum(under, size - 1)
    return within
