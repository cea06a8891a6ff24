"""What the sources hold, as rows of the coming manifest: what is known from columns, what is new
from the readers, every image's rows in its place in the order of the sources.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.data import reading, scan, store
from ringmo.data.measures import Measures
from ringmo.data.pipeline import Done
from ringmo.data.sources import Image

if TYPE_CHECKING:
    import pyarrow

# What reading a tile again may find different: the sensor's name, measures on its scale, where
# it lies, as far as newer code reads that from the file, and its labels.
JUDGED = {
    *("sensor", "crs", "minx", "miny", "maxx", "maxy", "gsd_m", "acquired"),
    *(measured.name for measured in fields(Measures)),
    *store.NO_LABELS,
}
OF_IMAGE = ("source", "source_root", "label", "generated", "second")
KINDS = {"mask": "mask", "boxes": "boxes", "vectors": "vectors", "height": "heights"}
# Of a row still on its way: the number of its image, and of its key among the known tiles.
UNDERWAY = {"image": "int64", "known": "int64"}


@dataclass
class Gathered:
    """Rows of the coming manifest (place and split null where they are new), in the order of
    the images, and what fitted nowhere.

    images: of each row, the number of its image. scanned: the scan cache's rows. read: how many
    images were read. aside: tiles that are set aside, with their `reason`.
    """

    rows: "pyarrow.Table"
    images: NDArray[np.int64]
    scanned: "pyarrow.Table"
    bad: list[tuple[Image, str]]
    duplicates: list[tuple[Image, str]]
    skipped: int = 0
    read: int = 0
    aside: "pyarrow.Table | None" = None


class KnownTiles:
    """The tiles that a store has had, by key: those of the manifest, and those that left it."""

    def __init__(self, table: "pyarrow.Table") -> None:
        import pyarrow.compute as pc

        self.table = table.combine_chunks()
        self.keys = _column(self.table, "key")
        # A tile whose bytes `ringmo data compact` removed has a place, but must be read again.
        self.stored = np.asarray(
            pc.is_valid(_column(self.table, "shard")).to_numpy(zero_copy_only=False), np.bool_
        )

    def find(self, keys: Any) -> NDArray[np.int64]:
        """Positions of a column of keys; -1 where a tile is unknown or has no bytes."""
        import pyarrow.compute as pc

        found = pc.fill_null(pc.index_in(keys, value_set=self.keys), -1)
        at: NDArray[np.int64] = found.to_numpy(zero_copy_only=False).astype(np.int64)
        if len(self.stored):
            at[(at >= 0) & ~self.stored[at]] = -1
        return at

    @cached_property
    def _by_key(self) -> scan.Lookup:
        return scan.Lookup(self.keys)

    def position(self, key: str) -> int:
        """Of one key, also of a tile without bytes; -1 where it is unknown."""
        return self._by_key.find(key)


class Gatherer:
    """Takes what readers find, in order, writes the bytes of new tiles, and makes the rows.

    attached: a number an image that changes with what belongs to it.
    """

    def __init__(
        self,
        images: list[Image],
        attached: NDArray[np.int64],
        known: KnownTiles,
        cache: scan.Scan,
        writer: store.ShardWriter,
        ordinal: int,
    ) -> None:
        self.images, self.attached, self.known = images, attached, known
        self.cache, self.writer, self.ordinal = cache, writer, ordinal
        self.match = cache.match(images, attached)
        self.usable, self._row_image, self._row_known = self._seen(self.match)
        self.settled = self.windows = 0
        self._outcomes: dict[int, reading.Found] = {}
        self._keys: dict[int, list[str]] = {}
        self._twins: dict[int, int] = {}  # image → the one that had its pixels first
        self._moved: list[tuple[int, int]] = []  # image, row of the scan cache that has its bytes
        self._tables: list[pyarrow.Table] = []
        self._new_files: dict[str, int] = {}  # hash → the first of the read images that has it
        self._new_tiles: dict[str, tuple[int, str]] = {}  # of a tile's bytes → image and key
        self._expected: dict[int, int] = {}  # windows of a large image that are still to come
        self._dropped: set[int] = set()  # large images whose windows are not wanted
        # Of the scene that is being cut: where to go back to if a part of it is damaged.
        self._scene: tuple[tuple[int, int], int, list[str]] | None = None

    def _seen(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Which rows of the scan cache can be used, and the tiles of those, as the position in
        `rows` and in the known tiles."""
        matched = np.flatnonzero(rows >= 0)
        usable = rows >= 0
        lists = _taken(_column(self.cache.table, "keys"), rows[matched])
        owner = np.repeat(matched, lists.value_lengths().to_numpy(zero_copy_only=False))
        at = self.known.find(lists.flatten())
        usable[owner[at < 0]] = False
        kept = usable[owner]
        return usable, owner[kept], at[kept]

    @property
    def todo(self) -> NDArray[np.int64]:
        """Numbers of the images that must be read."""
        return np.flatnonzero(~self.usable)

    def hashes(self) -> NDArray[np.uint64] | None:
        """What tells a reader that an image has only moved: first bits of the hashes of files
        whose tiles are here, sorted; None where there are none."""
        usable, _, _ = self._seen(np.arange(len(self.cache.table)))
        usable &= self.cache.bare
        if not usable.any():
            return None
        return np.sort(scan.first_bits(_column(self.cache.table, "hash"))[usable])

    @cached_property
    def _known_files(self) -> tuple[NDArray[np.int64], scan.Lookup]:
        """Images that need no reading, in order, and their hashes."""
        usable = np.flatnonzero(self.usable)
        table = self.cache.table.select(["hash", "reason"]).take(_index(self.match[usable]))
        good = _column(table, "reason").is_null()
        hashes = _column(table, "hash").filter(good)
        return usable[good.to_numpy(zero_copy_only=False)], scan.Lookup(hashes)

    def _first_file(self, content: str, number: int) -> int:
        """The first image that has these bytes, `number` at the latest."""
        images, lookup = self._known_files
        at = lookup.find(content)
        known = number if at < 0 else int(images[at])
        return min(known, self._new_files.get(content, number), number)

    @cached_property
    def _known_contents(self) -> scan.Lookup:
        hashes = _column(self.known.table, "content_hash")
        return scan.Lookup(_taken(hashes, self._row_known))

    def _first_tile(self, content: str, number: int) -> tuple[int, str] | None:
        """The first image up to `number` that has a tile of these bytes, and the tile's key."""
        found = []
        if content in self._new_tiles:
            found.append(self._new_tiles[content])
        at = self._known_contents.find(content)
        if at >= 0:
            key = self.known.keys[int(self._row_known[at])].as_py()
            found.append((int(self._row_image[at]), key))
        return min((one for one in found if one[0] <= number), default=None)

    def take(self, done: Done) -> None:
        """What one task found; its spool file is used up."""
        names = ["number", "key", "content_hash", *(f"{part}_hash" for part in store.LABELS)]
        names += [name for name in reading.SPOOLED if name != "number"]
        light = done.read.rows.select(names).to_pylist()
        spool = -1 if done.read.spool is None else os.open(done.read.spool, os.O_RDONLY)
        try:
            if done.cut:
                self._take_windows(done, light, spool)
            else:
                self._take_images(done, light, spool)
        finally:
            if done.read.spool is not None:
                os.close(spool)
                done.read.spool.unlink(missing_ok=True)

    def _take_images(self, done: Done, light: list[dict[str, Any]], spool: int) -> None:
        rows = {row["number"]: (i, row) for i, row in enumerate(light)}
        kept: list[tuple[int, dict[str, Any]]] = []
        for position, (number, found) in enumerate(zip(done.images, done.read.found, strict=True)):
            self._outcomes[number] = found
            self._keys[number] = []
            self.settled += found.look is None
            if found.reason is not None:
                continue
            if found.known:
                self._take_moved(number, found)
                continue
            twin = self._first_file(found.hash, number)
            if twin < number:
                self._twins[number] = twin
                self._keys[number] = self._keys_of(twin)
                self._dropped.add(number)
                continue
            self._new_files[found.hash] = number
            if position in rows:
                i, row = rows[position]
                # The same pixels can come in two files: a GeoTIFF with other tags.
                same = self._first_tile(row["content_hash"], number)
                if same is not None:
                    self._twins[number], key = same
                    self._keys[number] = [key]
                else:
                    self._keys[number] = [row["key"]]
                    kept.append((i, self._keep(number, row, spool)))
        self._add(done.read.rows, kept)

    def _take_moved(self, number: int, found: reading.Found) -> None:
        row = self.cache.by_hash(found.hash)
        if row is None:
            raise OSError(f"{self.images[number].file}: two files whose hashes begin alike")
        known = self.cache.table.slice(row, 1).to_pylist()[0]
        found.reason, found.skipped = known["reason"], known["skipped"]
        self._keys[number] = known["keys"]
        if found.reason is not None:
            return
        twin = self._first_file(found.hash, number)
        if twin < number:
            self._twins[number] = twin
            return
        self._new_files[found.hash] = number
        self._moved.append((number, row))

    def _take_windows(self, done: Done, light: list[dict[str, Any]], spool: int) -> None:
        number, read = done.images[0], done.read.found[0]
        found = self._outcomes[number]
        if found.look is not None:
            self._expected[number] = len(found.look.windows)
            found.look = None  # a scene may have a million windows
        if number in self._dropped:
            self.settled += done.last
            return
        if self._scene is None:
            self._scene = (self.writer.mark(), len(self._tables), [])
        if read.reason is not None:
            mark, tables, contents = self._scene
            self.writer.rollback(mark)
            del self._tables[tables:]
            for content in contents:
                del self._new_tiles[content]
            found.reason, found.skipped, self._keys[number] = read.reason, 0, []
            self._dropped.add(number)
            self._scene = None
            self.settled += done.last
            return
        self.windows += len(light) + read.skipped
        self._expected[number] -= len(light) + read.skipped
        found.skipped += read.skipped
        kept = []
        for i, row in enumerate(light):
            if self._first_tile(row["content_hash"], number) is not None:
                found.skipped += 1
                continue
            kept.append((i, self._keep(number, row, spool)))
            self._keys[number].append(row["key"])
        self._add(done.read.rows, kept)
        if done.last:
            if self._expected[number]:
                raise RuntimeError(f"{self.images[number].path}: windows are missing or came twice")
            self._scene = None
            self.settled += 1
            if not self._keys[number]:
                found.reason, found.skipped = "no window of it has enough data", 0

    def _keep(self, number: int, row: dict[str, Any], spool: int) -> dict[str, Any]:
        """Write what the store lacks of a tile; where all of it lies."""
        content = row["content_hash"]
        self._new_tiles[content] = (number, row["key"])
        if self._scene is not None:
            self._scene[2].append(content)
        at = self.known.position(row["key"])
        where: dict[str, Any] = {"image": number, "known": at, "shard": None, "offset": 0}
        if at < 0 or not self.known.stored[at]:
            place = self.writer.copy(spool, row["image_start"], row["image_end"])
            where["shard"], where["offset"] = place
        for part in store.LABELS:
            shard, offset = None, 0
            if row[f"{part}_hash"] is not None:
                if at >= 0 and self._known(at, f"{part}_hash") == row[f"{part}_hash"]:
                    shard, offset = (self._known(at, f"{part}_{n}") for n in ("shard", "offset"))
                if shard is None:
                    start, end = row[f"{part}_start"], row[f"{part}_end"]
                    shard, offset = self.writer.copy(spool, start, end)
            where |= {f"{part}_shard": shard, f"{part}_offset": offset}
        return where

    def _known(self, at: int, column: str) -> Any:
        return self.known.table[column][at].as_py()

    def _keys_of(self, number: int) -> list[str]:
        if number in self._keys:
            return self._keys[number]
        keys: list[str] = self.cache.table["keys"][int(self.match[number])].as_py()
        return keys

    def _add(self, rows: "pyarrow.Table", kept: list[tuple[int, dict[str, Any]]]) -> None:
        """Rows that are kept, by position, with where they lie."""
        import pyarrow as pa

        if not kept:
            return
        table = rows.take([i for i, _ in kept]).drop_columns(list(reading.SPOOLED))
        wanted = store.arrow_schema(store.COLUMNS | UNDERWAY)
        for name in kept[0][1]:
            column = pa.array([where[name] for _, where in kept], wanted.field(name).type)
            table = store.with_column(table, name, column)
        ordinals = pa.repeat(pa.scalar(self.ordinal, pa.int32()), len(table))
        self._tables.append(store.with_column(table, "ingest", ordinals).select(wanted.names))

    def gathered(self) -> Gathered:
        """All that was taken and all that was known, in the order of the images."""
        import pyarrow as pa

        seen = _taken(self.known.table, self._row_known)
        moved_rows = np.array([row for _, row in self._moved], np.int64)
        numbers = np.array([number for number, _ in self._moved], np.int64)
        _, owner, at = self._seen(moved_rows)
        moved = self.known.table.take(_index(at))
        for name, value in store.NO_LABELS.items():
            kind = moved.schema.field(name).type
            moved = store.with_column(moved, name, pa.repeat(pa.scalar(value, kind), len(moved)))
        new, new_images = self._new()
        rows = pa.concat_tables([t.cast(new.schema) for t in (seen, moved)] + [new])
        images = np.concatenate([self._row_image, numbers[owner], new_images])
        order = np.argsort(images, kind="stable")
        rows, images = _taken(rows, order).combine_chunks(), images[order]
        rows, images, skipped = self._without_duplicates(rows, images)
        rows = self._of_images(rows, images)
        return Gathered(
            rows=rows,
            images=images,
            scanned=self._scanned(),
            bad=self._bad(),
            duplicates=[
                (self.images[number], _same(self.images[twin], self.images[number]))
                for number, twin in sorted(self._twins.items())
            ],
            skipped=skipped + self._skipped(),
            read=len(self._outcomes),
        )

    def _new(self) -> tuple["pyarrow.Table", NDArray[np.int64]]:
        """Rows of what was read: a known tile keeps its bytes, place and split."""
        import pyarrow as pa
        import pyarrow.compute as pc

        schema = store.arrow_schema(store.COLUMNS | UNDERWAY)
        read = pa.concat_tables([schema.empty_table(), *self._tables]).combine_chunks()
        at = read["known"].to_numpy()
        images = read["image"].to_numpy()
        read = read.drop_columns(list(UNDERWAY))
        if not (at >= 0).any():
            return read, images
        old = self.known.table.take(pa.array(at, pa.int64(), mask=at < 0))
        stored = pa.array((at >= 0) & self.known.stored[at])
        for name in store.COLUMNS:
            if name in ("place", "split"):
                read = store.with_column(read, name, _column(old, name))
            elif name not in JUDGED and name not in OF_IMAGE:
                column = pc.if_else(stored, _column(old, name), _column(read, name))
                read = store.with_column(read, name, column)
        return read, images

    def _without_duplicates(
        self, rows: "pyarrow.Table", images: NDArray[np.int64]
    ) -> tuple["pyarrow.Table", NDArray[np.int64], int]:
        """Rows without those of images and tiles whose bytes came before, and how many windows
        that leaves out."""
        self._find_known_twins()
        if self._twins:
            twins = np.fromiter(self._twins, np.int64, len(self._twins))
            keep = ~np.isin(images, twins)
            rows, images = rows.filter(keep).combine_chunks(), images[keep]
        codes = _column(rows, "content_hash").dictionary_encode().indices.to_numpy()
        values, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        if len(values) == len(codes):
            return rows, images, 0
        keep = np.zeros(len(codes), np.bool_)
        keep[first] = True
        counts = np.bincount(images, minlength=len(self.images))
        left_out = 0
        for i in np.flatnonzero(~keep):
            number = int(images[i])
            if counts[number] == 1:
                self._twins[number] = int(images[first[inverse[i]]])
            else:
                left_out += 1
        return rows.filter(keep).combine_chunks(), images[keep], left_out

    def _find_known_twins(self) -> None:
        """Unchanged files whose bytes another image has that comes before them now."""
        import pyarrow as pa
        import pyarrow.compute as pc

        usable = np.flatnonzero(self.usable)
        table = _taken(self.cache.table.select(["hash", "reason"]), self.match[usable])
        good = _column(table, "reason").is_null()
        usable = usable[good.to_numpy(zero_copy_only=False)]
        hashes = _column(table, "hash").filter(good)
        codes = hashes.dictionary_encode().indices.to_numpy()
        values, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        if len(values) < len(codes):
            later = np.ones(len(codes), np.bool_)
            later[first] = False
            for i in np.flatnonzero(later):
                self._twins[int(usable[i])] = int(usable[first[inverse[i]]])
        if self._outcomes:
            read = pa.array([found.hash for found in self._outcomes.values()], pa.string())
            for i in np.flatnonzero(pc.is_in(hashes, read).to_numpy(zero_copy_only=False)):
                number = int(usable[i])
                owner = self._new_files.get(hashes[int(i)].as_py(), number)
                if owner < number:
                    self._twins[number] = owner

    def _of_images(self, rows: "pyarrow.Table", images: NDArray[np.int64]) -> "pyarrow.Table":
        import pyarrow as pa

        at = _index(images)
        columns = {
            "source": [image.path for image in self.images],
            "source_root": [image.root for image in self.images],
            "label": [image.label for image in self.images],
        }
        for name, values in columns.items():
            rows = store.with_column(rows, name, pa.array(values, pa.string()).take(at))
        made = np.array([image.generated for image in self.images], np.bool_)
        rows = store.with_column(rows, "generated", pa.array(made[images]))
        return store.with_column(rows, "second", self._seconds(rows, images))

    def _seconds(self, rows: "pyarrow.Table", images: NDArray[np.int64]) -> Any:
        """Key of each tile's second date: the tile of the other image at the same window."""
        import pyarrow as pa

        paired = [i for i, image in enumerate(self.images) if image.second is not None]
        if not paired:
            return pa.nulls(len(rows), pa.string())
        numbers = {(image.root, image.path): i for i, image in enumerate(self.images)}
        others = {}
        for i in paired:
            other = numbers.get((self.images[i].root, str(self.images[i].second)))
            if other is not None:
                others[i] = self._twins.get(other, other)
        wanted = np.isin(images, [*others, *others.values()])
        names = ("row", "col", "key")
        some = rows.filter(pa.array(wanted)).select(names).to_pydict()
        at = images[wanted].tolist()
        keys = dict(zip(zip(at, some["row"], some["col"], strict=True), some["key"], strict=True))
        column: list[str | None] = [None] * len(rows)
        for place, number, row, col in zip(
            np.flatnonzero(wanted).tolist(), at, some["row"], some["col"], strict=True
        ):
            if number in others:
                column[place] = keys.get((others[number], row, col))
        return pa.array(column, pa.string())

    def _bad(self) -> list[tuple[Image, str]]:
        """Images that cannot be used, in order."""
        reasons = {n: f.reason for n, f in self._outcomes.items() if f.reason is not None}
        usable = np.flatnonzero(self.usable)
        column = _column(self.cache.table, "reason").take(_index(self.match[usable]))
        for i in np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)):
            reasons[int(usable[i])] = column[int(i)].as_py()
        return [(self.images[number], reasons[number]) for number in sorted(reasons)]

    def _skipped(self) -> int:
        known = _column(self.cache.table, "skipped").take(_index(self.match[self.usable]))
        return int(sum(f.skipped for f in self._outcomes.values()) + known.to_numpy().sum())

    def _scanned(self) -> "pyarrow.Table":
        import pyarrow as pa

        # Labels of a copy are in no row: should it come first one day, it must be read for them.
        unsettled = [number for number in self._twins if self.images[number].attachments]
        rows = [
            {
                "folder": self.images[number].folder,
                "path": self.images[number].path,
                "size": self.images[number].size,
                "mtime_ns": self.images[number].mtime_ns,
                "attached": int(self.attached[number]),
                "settings": self.cache.settings,
                "hash": found.hash,
                "reason": found.reason,
                "keys": self._keys[number],
                "skipped": found.skipped,
            }
            for number, found in self._outcomes.items()
            if not found.hash.startswith(reading.UNREADABLE) and number not in unsettled
        ]
        usable = np.flatnonzero(self.usable)
        usable = usable[~np.isin(usable, unsettled)]
        known = _taken(self.cache.table, self.match[usable])
        schema = store.arrow_schema(scan.COLUMNS)
        new = pa.Table.from_pylist(rows, schema=schema)
        return pa.concat_tables([known.cast(schema), new])


def _same(twin: Image, image: Image) -> str:
    """Why an image is left out, of which the first in the order of the sources stays."""
    if twin.label != image.label:
        return f"same image as {twin.path} under another class"
    kinds = {one.part for one in image.attachments}
    if more := kinds - {one.part for one in twin.attachments}:
        said = " and ".join(sorted(KINDS[part] for part in more))
        return f"same image as {twin.path}, which lacks its {said}: bring them to that one"
    if kinds:
        return f"same image as {twin.path}, whose labels stay"
    return f"same pixels as {twin.path}"


def _column(table: "pyarrow.Table", name: str) -> Any:
    """A column in one piece."""
    import pyarrow as pa

    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of an empty table
        return pa.array([], column.type)
    return column


def _taken(rows: Any, at: NDArray[np.int64]) -> Any:
    """Rows of a table or column; as they lie where they are all of a stretch, which is usual."""
    if len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
        return rows.slice(int(at[0]), len(at))
    return rows.take(_index(at))


def _index(values: Sequence[int] | NDArray[np.int64]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.int64())
