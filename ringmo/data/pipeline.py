"""Tasks of the readers, ahead of use and in order: what comes out does not depend on who was
quicker, and what waits is bounded.

A batch of images is one task. An image that has to be cut becomes further tasks, one a group of
windows, which take its place in the order.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringmo.data import reading, scenes
from ringmo.data.cluster import Pool, Promise
from ringmo.data.sources import Image

BATCH, BATCH_BYTES = 64, 16e6  # images of one task, at most
# Of objects from a bucket, which lie on this machine's disk until their turn has come.
FETCHED_BYTES = 4e9


@dataclass
class Done:
    """What one task found; `cut` says that these are windows of `images[0]`, of which this is
    the last group or not."""

    images: Sequence[int]
    read: reading.Read
    cut: bool = False
    last: bool = True


@dataclass
class _Cut:
    """A group of windows of a large image."""

    number: int
    image: Image
    content: str  # hash of the file
    look: scenes.Look
    group: tuple[int, int]
    last: bool
    promise: Promise | None = None


@dataclass
class _Slot:
    """A batch and what became of it."""

    numbers: list[int]
    images: list[Image]
    promise: Promise
    read: reading.Read | None = None
    cuts: deque[_Cut] = field(default_factory=deque)


def in_order(
    pool: Pool, settings: reading.Settings, images: Iterable[tuple[int, Image]], known: Any
) -> Iterator[Done]:
    """Everything that reading `images` finds, in their order: the windows of an image that has
    to be cut follow the batch that it is in.

    Args:
        images: number and image.
        known: as `reading.read_images` takes it.
    """
    common, hashes = pool.share(settings), None if known is None else pool.share(known)
    batches = _batches(images)
    slots: deque[_Slot] = deque()

    def under_way() -> int:
        return sum((s.read is None) + sum(c.promise is not None for c in s.cuts) for s in slots)

    def begin(cut: _Cut) -> Promise:
        windows = cut.look.windows[slice(*cut.group)]
        what = (common, cut.image, cut.content, cut.look.sensor, cut.look.size, windows)
        return pool.submit(reading.read_windows, *what, urgent=True)

    def finish(slot: _Slot) -> reading.Read:
        """What a batch came to; the images of it that must be cut are lined up, once."""
        if slot.read is None:
            slot.read = slot.promise.result()
            slot.cuts.extend(_cuts(slot, slot.read))
        return slot.read

    def advance() -> None:
        """Start what may be started, the first in order first."""
        room = pool.ahead - under_way()
        for slot in slots:
            if slot.promise.done():
                finish(slot)
            for cut in slot.cuts:
                if cut.promise is None and room > 0:
                    cut.promise = begin(cut)
                    room -= 1
        while room > 0 and _waiting_bytes(slots) < FETCHED_BYTES:
            batch = next(batches, None)
            if batch is None:
                return
            numbers, chosen = batch
            promise = pool.submit(reading.read_images, common, chosen, hashes)
            slots.append(_Slot(numbers, chosen, promise))
            room -= 1

    def ready(promise: Promise) -> Promise:
        while not promise.done():
            advance()
            pool.wait([promise, *(s.promise for s in slots if s.read is None)])
        return promise

    advance()
    while slots:
        slot = slots[0]
        ready(slot.promise)
        yield Done(slot.numbers, finish(slot))
        while slot.cuts:
            cut = slot.cuts[0]
            cut.promise = cut.promise or begin(cut)
            read = ready(cut.promise).result()
            yield Done([cut.number], read, cut=True, last=cut.last)
            slot.cuts.popleft()
            if cut.last:
                reading.forget(cut.image)
            advance()
        slots.popleft()
        advance()


def _cuts(slot: _Slot, read: reading.Read) -> Iterator[_Cut]:
    for number, image, found in zip(slot.numbers, slot.images, read.found, strict=True):
        if found.look is not None:
            groups = found.look.groups
            for i, group in enumerate(groups):
                last = i == len(groups) - 1
                yield _Cut(number, image, found.hash, found.look, group, last)


def _batches(
    images: Iterable[tuple[int, Image]],
) -> Iterator[tuple[list[int], list[Image]]]:
    numbers: list[int] = []
    chosen: list[Image] = []
    size = 0
    for number, image in images:
        if chosen and (len(chosen) == BATCH or size + image.size > BATCH_BYTES):
            yield numbers, chosen
            numbers, chosen, size = [], [], 0
        numbers.append(number)
        chosen.append(image)
        size += max(image.size, 0)
    if chosen:
        yield numbers, chosen


def _waiting_bytes(slots: Iterable[_Slot]) -> int:
    return sum(i.size for slot in slots for i in slot.images if i.bucket is not None)
