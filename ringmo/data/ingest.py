"""Imagery into the tile store: what is new is read, measured, placed and appended.

The order of writing makes a kill harmless: shards under temporary names, then their real names,
then retired rows, quarantine and history, and the manifest last. A store whose manifest is the
old one is the old store; what an interrupted ingest left beside it is removed by the next.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import console
from ringmo.config import Config, Sensor, digest
from ringmo.data import places, scenes, store
from ringmo.data.buckets import Bucket
from ringmo.data.measures import Measures, measure
from ringmo.data.sources import Image, list_images
from ringmo.errors import BadInput
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]

GENERATED = "generated"
UNREADABLE = "unreadable"  # in place of a hash: permissions can change without a trace
AHEAD = 64  # images read ahead of the one whose turn it is
AHEAD_BYTES = 2e9  # of objects from a bucket among them, which lie on this machine's disk meanwhile
# What reading a tile again may find different: the sensor's name, and measures on its scale.
JUDGED = ("sensor", *(measured.name for measured in fields(Measures)))
WORKERS = 4  # decoding, hashing and most of the measuring run outside the interpreter's lock

QUARANTINE_COLUMNS = {"source": "string", "source_root": "string", "reason": "string"}
SCAN_COLUMNS = {
    "folder": "string",
    "path": "string",
    "size": "int64",
    "mtime_ns": "int64",
    "settings": "string",
    "hash": "string",
    "reason": "string",
    "keys": "string",
    "skipped": "int64",
}


@dataclass
class Outcome:
    """What reading one image came to; kept in the scan cache."""

    hash: str
    reason: str | None = None
    keys: list[str] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Read:
    """An image just read: tiles that fit whole come with it, a large scene is cut later."""

    outcome: Outcome
    sensor: str = ""
    tile: scenes.Tile | None = None
    row: Row | None = None
    large: bool = False


@dataclass
class Old:
    """The store as it is: rows by key, rows of tiles that left, and how far numbering went."""

    rows: dict[str, Row]
    retired: dict[str, Row]
    frame: "pandas.DataFrame | None" = None
    shards: int = 0
    ordinal: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def ingest(config: Config, workspace: Workspace) -> Report:
    """Bring the tile store to what the sources hold now.

    Report figures: images_found, tiles, new_tiles, new_shards, set_aside, set_aside_reasons,
    duplicates, other_files, classes, labelled, windows_skipped, places, biggest_place,
    near_duplicates, unused, images_per_s, unchanged, generated.

    Raises:
        BadInput: a source is missing or has no usable image, more than ingest.max_bad_share of
            the images cannot be used, or the store is damaged; the store is as it was.
    """
    from PIL.Image import DecompressionBombWarning

    started = time.monotonic()
    try:
        with _alone(workspace), warnings.catch_warnings():
            # Large is what scenes are; `scenes` refuses bombs by a rule of its own.
            warnings.simplefilter("ignore", DecompressionBombWarning)
            report = _ingest(config, workspace)
    except OSError as error:
        where = error.filename or workspace.store
        raise BadInput(f"ingest: {where}: {error.strerror or error}") from error
    report.seconds = round(time.monotonic() - started, 2)
    report.figures["images_per_s"] = round(report.figures["images_found"] / report.seconds, 1)
    f = report.figures
    state = "nothing new" if f["unchanged"] else f"{f['new_tiles']} new"
    console.note(
        f"ingest: {f['tiles']} tiles ({state}) of {f['images_found']} images, "
        f"{f['classes']} classes, {f['set_aside']} set aside, {report.seconds:.1f} s"
    )
    return report


@contextlib.contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """One ingest at a time in a workspace; the next waits."""
    workspace.state.mkdir(parents=True, exist_ok=True)
    with (workspace.state / "ingest.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note("ingest: another one is at work here, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ingest(config: Config, workspace: Workspace) -> Report:
    report = Report("ingest")
    images, other_files = _images(config, workspace, report)
    root = workspace.store
    root.mkdir(parents=True, exist_ok=True)
    old = _old_store(root)
    scan = Scan(workspace.state / "scan.parquet", _settings(config))
    writer = store.ShardWriter(root, old.shards, config.ingest.shard_mb)
    try:
        gathered = _gather(config, images, old, scan, writer)
        _refuse_if_bad(config, images, gathered)
        rows = gathered.rows
        for text in _unlabel_sensor_folders(rows):
            report.notes.append(text)
            console.note(f"ingest: {text}")
        new = [row for row in rows if "place" not in row]
        links = _place(config, root, old, gathered, new, writer)
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    finally:
        scan.write()
    unchanged = _write(config, root, old, gathered, new, writer)
    _figures(report, rows, new, gathered, links)
    report.figures |= {
        "images_found": len(images),
        "other_files": other_files,
        "new_shards": len(writer.sizes),
        "unchanged": unchanged,
    }
    return report


def _images(config: Config, workspace: Workspace, report: Report) -> tuple[list[Image], int]:
    """Images of all sources, in order, and the number of files that are none."""
    images: list[Image] = []
    other_files = 0
    fetched = workspace.state / "fetched"
    shutil.rmtree(fetched, ignore_errors=True)  # what a killed ingest had brought
    for source in dict.fromkeys(config.ingest.sources):
        if source == GENERATED:
            from ringmo.data import generated

            folder: Path | Bucket = generated.make(workspace.state / "generated")
        elif source.startswith("s3://"):
            folder = Bucket(source, config.ingest.endpoint)
        elif "://" in source:
            raise BadInput(f"{source}: ingest reads folders, lists and s3://BUCKET/PREFIX")
        else:
            folder = workspace.root / Path(source).expanduser()
        include, exclude = config.ingest.include, config.ingest.exclude
        if source == GENERATED:
            include, exclude = ["*"], []
        listing = list_images(source, folder, config.ingest.labels, include, exclude, fetched)
        images += listing.images
        other_files += listing.other_files
        report.notes += listing.notes
    for text in report.notes:
        console.note(f"ingest: {text}")
    return images, other_files


def _settings(config: Config) -> str:
    """Digest of what decides what an image becomes: parameters, and which columns there are."""
    sensors = {
        # Pixels of 8 bits are measured as they are, all others on their sensor's scale.
        name: [s.bands, s.dtype] + ([] if s.dtype == "uint8" else [s.mean, s.std])
        for name, s in config.sensors.items()
    }
    ingest = config.ingest
    return digest(store.SCHEMA, ingest.tile_size, ingest.max_nodata_share, sensors)[:16]


def _old_store(root: Path) -> Old:
    """The store as its manifest says, after removing what an interrupted ingest left."""
    manifest = root / store.MANIFEST
    for temporary in root.glob(".*.tmp"):
        temporary.unlink()
    old = Old({}, {})
    if manifest.exists():
        remedy = "bring it back with `dvc checkout`, or remove the folder and ingest again"
        old.frame = store.read_table(manifest, store.COLUMNS, remedy)
        facts = store.read_facts(manifest)
        old.shards, old.ordinal = facts["shards"], facts["ingest"]
        old.rows = {row["key"]: row for row in records(old.frame)}
        if (root / store.RETIRED).exists():
            frame = store.read_table(root / store.RETIRED, store.COLUMNS, remedy)
            old.retired = {row["key"]: row for row in records(frame)}
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            entries = json.loads((root / store.HISTORY).read_text())["ingests"]
            old.history = [entry for entry in entries if entry["ordinal"] <= old.ordinal]
    for path in root.glob("tiles-*.tar"):
        number = store.shard_number(path)
        if number is not None and number >= old.shards:
            path.unlink()
    return old


def records(frame: "pandas.DataFrame") -> list[Row]:
    """Rows as dicts of plain values, None for missing text."""
    plain = frame.astype(object)
    text = [name for name, form in store.COLUMNS.items() if form == "string"]
    plain[text] = plain[text].where(frame[text].notna(), None)
    return _plain(plain)


def _plain(frame: "pandas.DataFrame") -> list[Row]:
    # The names of our columns are text, which pandas' types do not say.
    rows: list[Row] = frame.to_dict("records")  # type: ignore[assignment]
    return rows


class Scan:
    """What earlier ingests found in each file, so that an unchanged one is not read again."""

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        self._before: dict[tuple[str, str, int, int], Outcome] = {}
        self._by_hash: dict[str, Outcome] = {}
        self._now: dict[tuple[str, str, int, int], Outcome] = {}
        # Losing it costs reading again, nothing else.
        with contextlib.suppress(BadInput):
            frame = store.read_table(path, SCAN_COLUMNS, "")
            frame["reason"] = frame["reason"].astype(object).where(frame["reason"].notna(), None)
            for row in _plain(frame[frame["settings"] == settings]):
                keys, skipped = row["keys"].split(), row["skipped"]
                outcome = Outcome(row["hash"], row["reason"], keys, skipped)
                name = (row["folder"], row["path"], row["size"], row["mtime_ns"])
                self._before[name] = self._by_hash[row["hash"]] = outcome

    def known(self, image: Image) -> Outcome | None:
        return self._before.get(self._name(image))

    def by_hash(self, content: str) -> Outcome | None:
        return self._by_hash.get(content)

    def record(self, image: Image, outcome: Outcome) -> None:
        self._now[self._name(image)] = outcome

    @staticmethod
    def _name(image: Image) -> tuple[str, str, int, int]:
        return image.folder, image.path, image.size, image.mtime_ns

    def write(self) -> None:
        """Remember this scan, and of earlier ones what was found in other folders."""
        folders = {name[0] for name in self._now}
        every = {n: o for n, o in self._before.items() if n[0] not in folders} | self._now
        if every == self._before:
            return
        rows = [
            {"folder": name[0], "path": name[1], "size": name[2], "mtime_ns": name[3]}
            | {"settings": self.settings, "hash": o.hash, "reason": o.reason}
            | {"keys": " ".join(o.keys), "skipped": o.skipped}
            for name, o in every.items()
        ]
        store.write_table(self.path, rows, SCAN_COLUMNS)


@dataclass
class Gathered:
    """Rows of the coming manifest (new ones without place and split), and what fitted nowhere."""

    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[Image, str]] = field(default_factory=list)
    duplicates: list[tuple[Image, str]] = field(default_factory=list)
    skipped: int = 0


def _gather(
    config: Config, images: list[Image], old: Old, scan: Scan, writer: store.ShardWriter
) -> Gathered:
    """Rows for every image, in order; bytes of new tiles go to the writer."""
    gathered = Gathered()
    known = old.retired | old.rows
    first: dict[str, Image] = {}  # content of a file, or of a tile → the image that had it first
    ordinal = old.ordinal + 1

    def usable(outcome: Outcome | None) -> bool:
        return outcome is not None and all(key in known for key in outcome.keys)

    def look(image: Image) -> Read:
        outcome = scan.known(image)
        if outcome is not None and usable(outcome):
            return Read(outcome)
        return _read(config, image, lambda content: _if(scan.by_hash(content), usable))

    def keep(image: Image, row: Row, data: bytes | None) -> bool:
        twin = first.setdefault(row["content_hash"], image)
        if twin is not image:
            return False
        row |= {"source": image.path, "source_root": image.root, "label": image.label}
        row["generated"] = image.root == GENERATED
        if data is not None:
            member = f"{row['key']}.{row.pop('form')}"
            shard, offset = writer.add(member, data)
            row |= {"shard": shard, "member": member, "offset": offset, "ingest": ordinal}
        gathered.rows.append(row)
        return True

    def settle(image: Image, read: Read) -> None:
        outcome = read.outcome
        twin = image if outcome.reason else first.setdefault(outcome.hash, image)
        if twin is not image:
            gathered.duplicates.append((image, _same(twin, image)))
            return
        if outcome.reason is None and read.large:
            _cut(config, image, read, known, keep, writer, gathered)
        elif outcome.reason is None:
            found = [(_again(known[key], read.row), None) for key in outcome.keys if key in known]
            fresh = [(read.row, read.tile.data)] if read.row and read.tile and not found else []
            for row, data in [*found, *fresh]:
                # The same pixels can come in two different files: a GeoTIFF with other tags.
                if not keep(image, row, data) and len(outcome.keys) == 1:
                    twin = first[row["content_hash"]]
                    gathered.duplicates.append((image, _same(twin, image)))
            gathered.skipped += outcome.skipped
        if outcome.reason is not None:
            gathered.bad.append((image, outcome.reason))
        if not outcome.hash.startswith(UNREADABLE):
            scan.record(image, outcome)

    with (
        console.progress("ingest", len(images)) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        waiting: deque[tuple[Image, Future[Read]]] = deque()
        try:
            for image in images:
                waiting.append((image, pool.submit(look, image)))
                while len(waiting) >= AHEAD or _brought(waiting) > AHEAD_BYTES:
                    due, future = waiting.popleft()
                    settle(due, future.result())
                    due.forget()
                    bar.advance()
            for due, future in waiting:
                settle(due, future.result())
                due.forget()
                bar.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return gathered


def _brought(waiting: Iterable[tuple[Image, Any]]) -> int:
    """Bytes of objects that may lie here, waiting for their turn."""
    return sum(image.size for image, _ in waiting if image.bucket is not None)


def _again(known: Row, row: Row | None) -> Row:
    """A known tile's row, with what reading it again has found."""
    return known | ({name: row[name] for name in JUDGED} if row else {})


def _if(outcome: Outcome | None, usable: Callable[[Outcome | None], bool]) -> Outcome | None:
    return outcome if usable(outcome) else None


def _same(twin: Image, image: Image) -> str:
    if twin.label != image.label:
        return f"same image as {twin.path} under another class"
    return f"same pixels as {twin.path}"


def _read(config: Config, image: Image, seen: Callable[[str], Outcome | None]) -> Read:
    """Read one image, in a worker thread; an object stays here only where it must be cut."""
    large = False
    try:
        image.fetch()
        read = _read_here(config, image, seen)
        large = read.large
        return read
    except OSError as error:
        return Read(Outcome(f"{UNREADABLE} {image.file}", f"cannot be read: {error.strerror}"))
    finally:
        if not large:
            image.forget()


def _read_here(config: Config, image: Image, seen: Callable[[str], Outcome | None]) -> Read:
    content = scenes.file_hash(image.file)
    moved = seen(content)
    if moved is not None:
        return Read(moved)
    try:
        name, tile = scenes.read_whole(image.file, config.ingest.tile_size, config.sensors)
    except BadInput as error:
        return Read(Outcome(content, str(error)))
    if tile is None:
        return Read(Outcome(content), name, large=True)
    if tile.valid is not None and not tile.valid.any():
        return Read(Outcome(content, "no data in it"))
    row = _row(content, name, config.sensors[name], tile)
    return Read(Outcome(content, None, [row["key"]]), name, tile, row)


def _cut(
    config: Config,
    image: Image,
    read: Read,
    known: dict[str, Row],
    keep: Callable[[Image, Row, bytes | None], bool],
    writer: store.ShardWriter,
    gathered: Gathered,
) -> None:
    """Windows of a large scene: all of them, or none where a part of it is damaged."""
    mark, rows = writer.mark(), len(gathered.rows)
    outcome = read.outcome
    try:
        sensor = config.sensors[read.sensor]
        tiles = scenes.cut(image.file, config.ingest.tile_size, config.ingest.max_nodata_share)
        for tile in tiles:
            row = None if tile is None else _row(outcome.hash, read.sensor, sensor, tile)
            if row is None or tile is None:
                outcome.skipped += 1
            elif row["key"] in known:
                outcome.keys.append(row["key"])
                outcome.skipped += not keep(image, _again(known[row["key"]], row), None)
            elif keep(image, row, tile.data):
                outcome.keys.append(row["key"])
            else:
                outcome.skipped += 1
        if not outcome.keys:
            outcome.reason = "no window of it has enough data"
    except BadInput as error:
        writer.rollback(mark)
        del gathered.rows[rows:]
        outcome.reason, outcome.keys, outcome.skipped = str(error), [], 0
    gathered.skipped += outcome.skipped


def _row(content: str, name: str, sensor: Sensor, tile: scenes.Tile) -> Row:
    """A tile's row of the manifest, as far as its pixels and its scene know."""
    height, width, bands = tile.pixels.shape
    minx, miny, maxx, maxy = tile.bounds
    window = f"{content}:{tile.row}:{tile.col}:{height}:{width}"
    return {
        "key": hashlib.sha256(window.encode()).hexdigest()[:16],
        "form": tile.form,
        "size": len(tile.data),
        "row": tile.row,
        "col": tile.col,
        "width": width,
        "height": height,
        "sensor": name,
        "bands": bands,
        "dtype": str(tile.pixels.dtype),
        "crs": tile.crs,
        "minx": minx,
        "miny": miny,
        "maxx": maxx,
        "maxy": maxy,
        "gsd_m": tile.gsd_m,
        "acquired": tile.acquired,
        **asdict(measure(tile.pixels, tile.valid, sensor)),
        "content_hash": store.sha256(tile.data),
        **store.ADDED[3],
    }


def _refuse_if_bad(config: Config, images: list[Image], gathered: Gathered) -> None:
    """Stop where a source gave nothing, or too many images cannot be used."""
    useful = {row["source_root"] for row in gathered.rows}
    useful |= {image.root for image, _ in gathered.duplicates}
    for root in dict.fromkeys(image.root for image in images):
        if root not in useful:
            image, reason = next(pair for pair in gathered.bad if pair[0].root == root)
            raise BadInput(
                f"{root}: none of its {sum(i.root == root for i in images)} images can be used "
                f"({image.path}: {reason})"
            )
    if len(gathered.bad) > config.ingest.max_bad_share * len(images):
        reason, count = Counter(_kind(reason) for _, reason in gathered.bad).most_common(1)[0]
        example = next(image.path for image, why in gathered.bad if _kind(why) == reason)
        raise BadInput(
            f"{len(gathered.bad)} of {len(images)} images cannot be used ({count} of them: "
            f"{reason}; {example}): mend them, or raise ingest.max_bad_share "
            f"({config.ingest.max_bad_share})"
        )


def _unlabel_sensor_folders(rows: list[Row]) -> list[str]:
    """Take away labels that name a sensor and no class, as in S1/, S2/; returns what to tell.

    A folder is a sensor's where the source has several sensors, and all tiles of one of them and
    no other's lie in it.
    """
    notes = []
    for root in sorted({row["source_root"] for row in rows}):
        labels: dict[str, set[str | None]] = {}
        sensors: dict[str | None, set[str]] = {}
        for row in rows:
            if row["source_root"] == root:
                labels.setdefault(row["sensor"], set()).add(row["label"])
                sensors.setdefault(row["label"], set()).add(row["sensor"])
        own = {
            label
            for folders in labels.values()
            for label in folders
            if label is not None and len(folders) == len(sensors[label]) == 1
        }
        if len(labels) < 2 or not own:
            continue
        for row in rows:
            if row["source_root"] == root and row["label"] in own:
                row["label"] = None
        names = ", ".join(sorted(str(label) for label in own))
        notes.append(f"{root}: no labels from {names}: such a folder is a sensor's, not a class")
    return notes


def _kind(reason: str) -> str:
    """A reason without what differs from image to image."""
    return reason.split(" as ")[0] if reason.startswith("same ") else reason


def _place(
    config: Config,
    root: Path,
    old: Old,
    gathered: Gathered,
    new: list[Row],
    writer: store.ShardWriter,
) -> dict[str, int]:
    import pandas as pd

    if not new:
        return {"overlapping": 0, "near_duplicates": 0, "unused": 0}
    current = {row["key"]: row for row in gathered.rows if "place" in row}
    known = list((old.retired | old.rows | current).values())
    tiles = store.TileStore(root)

    def fetch(shard: str, offset: int, size: int) -> bytes:
        return writer.read(shard, offset, size) or tiles.read(shard, offset, size)

    placed, counts = places.assign(
        pd.DataFrame(known),
        pd.DataFrame(new),
        shares={"test": config.split.test, "val": config.split.val},
        near_bits=config.split.near_duplicate_bits,
        blank_std=config.validate_.min_std,
        seed=config.split.seed,
        fetch=fetch,
    )
    for row, place, split in zip(new, placed["place"], placed["split"], strict=True):
        row |= {"place": place, "split": split}
    return counts


def _write(
    config: Config,
    root: Path,
    old: Old,
    gathered: Gathered,
    new: list[Row],
    writer: store.ShardWriter,
) -> bool:
    """Tables of the store, the manifest last; whether there was nothing to write."""
    import pandas as pd
    import pyarrow as pa

    aside = [
        {"source": image.path, "source_root": image.root, "reason": reason}
        for image, reason in sorted(
            gathered.bad + gathered.duplicates, key=lambda pair: (pair[0].root, pair[0].path)
        )
    ]
    quarantine = root / store.QUARANTINE
    before: list[Row] | None = None
    with contextlib.suppress(BadInput):
        before = _plain(store.read_table(quarantine, QUARANTINE_COLUMNS, ""))
    same_aside = before == aside
    if not same_aside:
        store.write_table(quarantine, aside, QUARANTINE_COLUMNS)

    table = pa.Table.from_pylist(gathered.rows, schema=store.arrow_schema())
    frame: pd.DataFrame = table.to_pandas()
    if old.frame is not None and frame.equals(old.frame):
        return same_aside
    current = {row["key"] for row in gathered.rows}
    leaving = {key: row for key, row in old.rows.items() if key not in current}
    if leaving:
        retired = sorted((old.retired | leaving).values(), key=lambda row: str(row["key"]))
        store.write_table(root / store.RETIRED, retired, store.COLUMNS)
    labels = Counter(row["label"] for row in gathered.rows if row["label"] is not None)
    entry = {
        "ordinal": old.ordinal + 1,
        "sources": config.ingest.sources,
        "tiles": len(gathered.rows),
        "classes": dict(sorted(labels.items())),
        "generated": any(row["generated"] for row in gathered.rows),
    }
    history = {"schema": store.SCHEMA, "ingests": [*old.history, entry]}
    write_json(root / store.HISTORY, history)
    facts = {"shards": writer.shards, "ingest": old.ordinal + 1}
    store.write_table(root / store.MANIFEST, gathered.rows, store.COLUMNS, facts)
    return False


def _figures(
    report: Report, rows: list[Row], new: list[Row], gathered: Gathered, links: dict[str, int]
) -> None:
    aside = gathered.bad + gathered.duplicates
    reasons = Counter(_kind(reason) for _, reason in aside)
    labels = Counter(row["label"] for row in rows if row["label"] is not None)
    sizes = Counter(row["place"] for row in rows)
    report.figures = {
        "images_found": 0,
        "tiles": len(rows),
        "new_tiles": len(new),
        "new_shards": 0,
        "set_aside": len(aside),
        "set_aside_reasons": dict(reasons.most_common()),
        "duplicates": len(gathered.duplicates),
        "other_files": 0,
        "classes": len(labels),
        "labelled": sum(labels.values()),
        "windows_skipped": gathered.skipped,
        "places": len(sizes),
        "biggest_place": max(sizes.values(), default=0),
        "near_duplicates": links["near_duplicates"],
        "overlapping": links["overlapping"],
        "unused": sum(row["split"] == "unused" for row in rows),
        "generated": any(row["generated"] for row in rows),
    }
    report.tables["classes"] = [{"class": n, "tiles": c} for n, c in sorted(labels.items())]
    report.tables["set_aside"] = [{"reason": r, "count": c} for r, c in reasons.most_common()]
