"""Imagery into the tile store: what is new is read, measured, placed and appended.

The order of writing makes a kill harmless: shards under temporary names, then their real names,
then retired rows, quarantine and history, and the manifest last. A store whose manifest is the
old one is the old store; what an interrupted ingest left beside it is removed by the next.

What is known is handled as columns, never row by row: a million known tiles cost seconds.
"""

import contextlib
import fcntl
import gc
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console
from ringmo.config import About, Config, digest
from ringmo.data import (
    blocks,
    class_facts,
    cluster,
    codings,
    decisions,
    places,
    published,
    scan,
    store,
    tables,
)
from ringmo.data.buckets import Bucket
from ringmo.data.gather import Gathered, Gatherer, KnownTiles
from ringmo.data.pipeline import in_order
from ringmo.data.reading import Settings
from ringmo.data.sources import Image, list_images
from ringmo.errors import BadInput
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas
    import pyarrow

GENERATED = "generated"
KINDS = ("masks", "boxes", "heights", "pairs")  # figures that are told where there are any
FEW, FEW_BYTES = 128, 100e6  # what this process reads alone: others take seconds to start


@dataclass
class Old:
    """The store as it is. `known`: tiles of the manifest, then those that left it."""

    table: "pyarrow.Table"
    retired: "pyarrow.Table"
    known: "pyarrow.Table"
    shards: int = 0
    ordinal: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def ingest(config: Config, workspace: Workspace) -> Report:
    """Bring the tile store to what the sources hold now.

    Report figures: images_found, images_read, tiles, new_tiles, new_shards, set_aside,
    set_aside_reasons, duplicates, other_files, classes, labelled, masks, boxes, heights, pairs,
    windows_skipped, places, biggest_place, near_duplicates, unused, images_per_s, unchanged,
    generated. Table `seconds`: what each part took.

    Raises:
        BadInput: a source is missing or has no usable image, more than ingest.max_bad_share of
            the images cannot be used, or the store is damaged; the store is as it was.
        Unreachable: a bucket or a Dask cluster does not answer.
    """
    from PIL.Image import DecompressionBombWarning

    started = time.monotonic()
    try:
        with alone(workspace), warnings.catch_warnings(), _much_kept() as made:
            # Large is what scenes are; `scenes` refuses bombs by a rule of its own.
            warnings.simplefilter("ignore", DecompressionBombWarning)
            report = _ingest(config, workspace, made)
    except OSError as error:
        where = error.filename or workspace.store
        raise BadInput(f"ingest: {where}: {error.strerror or error}") from error
    report.seconds = round(time.monotonic() - started, 2)
    f = report.figures
    f["images_per_s"] = round(f["images_found"] / report.seconds, 1)
    state = "nothing new" if f["unchanged"] else f"{f['new_tiles']} new"
    labels = [f"{f['classes']} classes", *(f"{f[k]} {k}" for k in KINDS if f[k])]
    console.note(
        f"ingest: {f['tiles']} tiles ({state}) of {f['images_found']} images, "
        f"{', '.join(labels)}, {f['set_aside']} set aside, {report.seconds:.1f} s"
    )
    return report


@contextlib.contextmanager
def alone(workspace: Workspace, wait: bool = True) -> Iterator[None]:
    """One writer of the store at a time in a workspace; the next says who is at work and waits.

    Raises:
        BlockingIOError: somebody is at work, and it shall not wait.
    """
    workspace.state.mkdir(parents=True, exist_ok=True)
    with (workspace.state / "ingest.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            lock.seek(0)
            who = lock.read().strip() or "another process"
            console.note(f"ingest: {who} is at work on this store, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, since {datetime.now():%H:%M:%S},\n")
        lock.flush()
        yield
        lock.truncate(0)


class _Clock:
    """Seconds of each part of an ingest, for the report."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def __call__(self, part: str) -> None:
        now = time.monotonic()
        self.parts.append({"part": part, "seconds": round(now - self._last, 2)})
        self._last = now


def _ingest(config: Config, workspace: Workspace, made: Callable[[], None]) -> Report:
    report = Report("ingest")
    clock = _Clock()
    images, other_files = _images(config, workspace, report)
    made()
    clock("list")
    root = workspace.store
    root.mkdir(parents=True, exist_ok=True)
    old = old_store(root)
    cache = scan.Scan(workspace.state / "scan.parquet", _settings(config))
    clock("open")
    writer = store.ShardWriter(root, old.shards, config.ingest.shard_mb)
    try:
        gathered = _gather(config, workspace, images, old, cache, writer)
        clock("read")
        _refuse_if_bad(config, images, gathered)
        _set_tiles_aside(config, root, gathered)
        for text in _unlabel_sensor_folders(gathered):
            report.notes.append(text)
            console.note(f"ingest: {text}")
        fresh = int(gathered.rows["place"].null_count)
        links = _place(config, root, old, gathered, images, writer, report)
        clock("place")
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    finally:
        for name in ("spool", "fetched"):
            shutil.rmtree(workspace.state / name, ignore_errors=True)
    cache.write(gathered.scanned, unchanged=not gathered.read)
    clock("remember")
    unchanged = _write(config, root, old, gathered, writer)
    clock("write")
    _figures(report, gathered, fresh, links)
    report.tables["seconds"] = clock.parts
    report.figures |= {
        "images_found": len(images),
        "images_read": gathered.read,
        "other_files": other_files,
        "new_shards": len(writer.sizes),
        "unchanged": unchanged,
    }
    return report


@contextlib.contextmanager
def _much_kept() -> Iterator[Callable[[], None]]:
    """No search for garbage while a million objects are made, nor among them once they are there:
    what the block is given is to be called then."""
    was = gc.isenabled()
    gc.disable()

    def made() -> None:
        gc.freeze()
        if was:
            gc.enable()

    try:
        yield made
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


def _images(config: Config, workspace: Workspace, report: Report) -> tuple[list[Image], int]:
    """Images of all sources, in order, and the number of files that are none."""
    images: list[Image] = []
    other_files = 0
    fetched = workspace.state / "fetched"
    shutil.rmtree(fetched, ignore_errors=True)  # what a killed ingest had brought
    sources = dict.fromkeys(config.ingest.sources)
    if strangers := set(config.ingest.about) - set(sources):
        raise BadInput(f"ingest.about: {', '.join(sorted(strangers))}: not among ingest.sources")
    for source in sources:
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
        about = config.ingest.about.get(source, About())
        if about.sensor is not None and about.sensor not in config.sensors:
            raise BadInput(
                f"ingest.about: {source}: `{about.sensor}` is not among sensors "
                f"({', '.join(config.sensors)})"
            )
        ingest = config.ingest
        listing = list_images(
            *(source, folder, ingest.labels, include, exclude, fetched),
            about=about,
            codings=ingest.mask_codings,
            splits=config.split.by == "published",
        )
        if about.generated or source == GENERATED:
            for image in listing.images:
                image.generated = True
        images += listing.images
        other_files += listing.other_files
        report.notes += listing.notes
    for text in report.notes:
        console.note(f"ingest: {text}")
    return images, other_files


def _settings(config: Config) -> str:
    """Digest of what decides what an image becomes: parameters, and which columns there are."""
    sensors = {name: sensor.reading for name, sensor in config.sensors.items()}
    ingest = config.ingest
    cut = [ingest.tile_size, ingest.stride, ingest.gsd_m, ingest.max_nodata_share]
    return digest(store.SCHEMA, cut, sensors)[:16]


def _attached(config: Config, images: Sequence[Image]) -> NDArray[np.int64]:
    """Numbers that change with an image's labels, with what their values mean, with its second
    date, and with what ingest.about says of the image."""
    known = config.ingest.mask_codings
    numbers = np.zeros(len(images), np.int64)
    dated = {image.root for image in images if image.second is not None}
    others = {(i.root, i.path): [i.size, i.mtime_ns] for i in images if i.root in dated}
    for i, image in enumerate(images):
        if image.attachments or image.sensor is not None or image.second is not None:
            second = [] if image.second is None else others.get((image.root, image.second), [])
            # The classes' order gives their numbers; a digest of a dict would not tell.
            told = digest(image.sensor, list(known.get(image.masks, {}).items()), *second)
            numbers[i] = image.attached ^ int(told[:15], 16)
    return numbers


def old_store(root: Path) -> Old:
    """The store as its manifest says, after removing what an interrupted ingest left."""
    import pyarrow as pa
    import pyarrow.compute as pc

    manifest = root / store.MANIFEST
    for temporary in root.glob(".*.tmp"):
        temporary.unlink()
    nothing = store.arrow_schema().empty_table()
    old = Old(nothing, nothing, nothing)
    if manifest.exists():
        remedy = "bring it back with `dvc checkout`, or remove the folder and ingest again"
        old.table = store.read_arrow(manifest, store.COLUMNS, remedy)
        numbers = store.read_facts(manifest)
        old.shards, old.ordinal = numbers["shards"], numbers["ingest"]
        if (root / store.RETIRED).exists():
            old.retired = store.read_arrow(root / store.RETIRED, store.COLUMNS, remedy)
        old.known = old.table
        if len(old.retired):
            here = pc.is_in(old.retired["key"], value_set=old.table["key"])
            gone = old.retired.filter(pc.invert(here))
            old.known = pa.concat_tables([old.table, gone]).combine_chunks()
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            entries = json.loads((root / store.HISTORY).read_text())["ingests"]
            old.history = [entry for entry in entries if entry["ordinal"] <= old.ordinal]
    for path in root.glob("tiles-*.tar"):
        number = store.shard_number(path)
        if number is not None and number >= old.shards:
            path.unlink()
    return old


def _gather(
    config: Config,
    workspace: Workspace,
    images: list[Image],
    old: Old,
    cache: scan.Scan,
    writer: store.ShardWriter,
) -> Gathered:
    """Rows for every image, in order; bytes of new tiles go to the writer."""
    attached = _attached(config, images)
    gatherer = Gatherer(images, attached, KnownTiles(old.known), cache, writer, old.ordinal + 1)
    todo = gatherer.todo
    if len(todo):
        few = len(todo) <= FEW and sum(images[i].size for i in todo) <= FEW_BYTES
        spool = workspace.state / "spool"
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)
        settings = Settings(config.ingest, config.sensors, spool.resolve())
        ingest, scratch = config.ingest, workspace.state / "dask"
        with (
            cluster.pool(ingest.workers, ingest.dask, few, scratch) as pool,
            console.progress("ingest", len(todo)) as bar,
        ):
            numbered = ((int(i), images[i]) for i in todo)
            for done in in_order(pool, settings, numbered, gatherer.hashes()):
                gatherer.take(done)
                windows = f"{gatherer.windows} windows" if gatherer.windows else ""
                bar.to(gatherer.settled, windows)
    return gatherer.gathered()


def _refuse_if_bad(config: Config, images: list[Image], gathered: Gathered) -> None:
    """Stop where a source gave nothing, or too many images cannot be used."""
    useful = set(gathered.rows["source_root"].unique().to_pylist())
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


def _set_tiles_aside(config: Config, root: Path, gathered: Gathered) -> None:
    """Take out the tiles that lack too much data, and those that a person set aside."""
    import pyarrow as pa

    decided = decisions.read(root)
    limit = config.ingest.max_nodata_share
    shares = gathered.rows["nodata_share"].to_numpy()
    keys = gathered.rows["key"]
    reasons: dict[int, str] = {}
    for i in np.flatnonzero(shares > limit):
        if keys[int(i)].as_py() not in decided.kept:
            reasons[int(i)] = f"{shares[i]:.0%} of it lacks data, more than ingest.max_nodata_share"
    if decided.aside:
        at = pa.array(list(decided.aside), pa.string())
        for i in np.flatnonzero(pa.compute.is_in(keys, value_set=at).to_numpy()):
            note = decided.aside[keys[int(i)].as_py()]
            reasons[int(i)] = f"set aside by {note['by']}: {note['reason']}"
    chosen = np.array(sorted(reasons), np.int64)
    aside = gathered.rows.take(pa.array(chosen))
    why = pa.array([reasons[int(i)] for i in chosen], pa.string())
    gathered.aside = aside.append_column("reason", why)
    keep = np.ones(len(gathered.rows), np.bool_)
    keep[chosen] = False
    if len(chosen):
        gathered.rows = gathered.rows.filter(pa.array(keep)).combine_chunks()
        gathered.images = gathered.images[keep]


def _unlabel_sensor_folders(gathered: Gathered) -> list[str]:
    """Take away labels that name a sensor and no class, as in S1/, S2/; returns what to tell.

    A folder is a sensor's where the source has several sensors, and all tiles of one of them and
    no other's lie in it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = gathered.rows.select(["source_root", "sensor", "label"])
    seen = kinds.group_by(kinds.column_names, use_threads=False).aggregate([]).to_pylist()
    notes = []
    for root in sorted({row["source_root"] for row in seen}):
        labels: dict[str, set[str | None]] = {}
        sensors: dict[str | None, set[str]] = {}
        for row in seen:
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
        here = pc.equal(gathered.rows["source_root"], root)
        named = pc.is_in(gathered.rows["label"], value_set=pa.array(sorted(own), pa.string()))
        nothing = pa.scalar(None, pa.string())
        column = pc.if_else(pc.and_(here, named), nothing, gathered.rows["label"])
        gathered.rows = store.with_column(gathered.rows, "label", column)
        notes.append(
            f"{root}: no labels from {', '.join(sorted(own))}: "
            f"such a folder is a sensor's, not a class"
        )
    return notes


def _kind(reason: str) -> str:
    """A reason without what differs from image to image."""
    if reason.startswith("same "):
        return reason.split(" as ")[0]
    return "too little data" if "lacks data" in reason else reason


# What decides about places and splits.
PLACED = [
    *("key", "source_root", "source", "sensor", "crs", "minx", "miny", "maxx", "maxy"),
    *("std", "phash", "label", "second", "shard", "offset", "size", "place", "split"),
    *("row", "col", "width", "height"),
]


def _place(
    config: Config,
    root: Path,
    old: Old,
    gathered: Gathered,
    images: list[Image],
    writer: store.ShardWriter,
    report: Report,
) -> dict[str, int]:
    """Give new rows their place and split."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def tell(text: str) -> None:
        report.notes.append(text)
        console.note(f"ingest: {text}")

    rows = gathered.rows.select(PLACED)
    fresh = pc.is_null(rows["place"]).combine_chunks()
    as_published = config.split.by == "published"
    if as_published:
        parts = pa.array([image.published for image in images], pa.string())
        rows = rows.append_column("published", parts.take(pa.array(gathered.images)))
        if others := published.decided_otherwise(rows):
            tell(
                f"split.by: published: {others} tiles keep the split that was decided before, "
                f"which is another"
            )
    if not pc.any(fresh).as_py():
        return {"overlapping": 0, "near_duplicates": 0}
    placed = rows.filter(pc.invert(fresh))
    others = old.known.select(PLACED)
    placed = placed.select(PLACED)
    elsewhere = pc.and_(
        pc.invert(pc.is_in(others["key"], value_set=placed["key"])), pc.is_valid(others["place"])
    )
    known = pa.concat_tables([placed, others.filter(elsewhere)]).to_pandas()
    # Without bytes nothing can be held against a newcomer's; footprints still can.
    known.loc[known["shard"].isna(), "std"] = -1.0
    tiles = store.TileStore(root)

    def fetch(shard: str, offset: int, size: int) -> bytes:
        return writer.read(shard, offset, size) or tiles.read(shard, offset, size)

    ways: dict[str, Callable[..., tuple[pandas.DataFrame, dict[str, int]]]] = {
        "place": places.assign,
        "block": partial(blocks.assign, tell=tell),
        "published": published.assign,
    }
    new, counts = ways[config.split.by](
        known,
        rows.filter(fresh).to_pandas(),
        shares={"test": config.split.test, "val": config.split.val},
        near_bits=config.split.near_duplicate_bits,
        blank_std=config.validate_.min_std,
        seed=config.split.seed,
        fetch=fetch,
    )
    tiles.close()
    at = np.flatnonzero(fresh.to_numpy(zero_copy_only=False))
    for name in ("place", "split"):
        values = np.asarray(rows[name].to_pylist(), object)
        values[at] = new[name].to_numpy()
        gathered.rows = store.with_column(gathered.rows, name, values.tolist())
    return counts


def _write(
    config: Config, root: Path, old: Old, gathered: Gathered, writer: store.ShardWriter
) -> bool:
    """Tables of the store, the manifest last; whether there was nothing to write."""
    import pyarrow as pa
    import pyarrow.compute as pc

    same_aside = _write_quarantine(root, gathered)
    rows = gathered.rows.select(list(store.COLUMNS)).combine_chunks()
    leaving = old.table.filter(pc.invert(pc.is_in(old.table["key"], value_set=rows["key"])))
    retired = old.retired
    left = [leaving]
    if gathered.aside is not None:
        aside = gathered.aside.select(list(store.COLUMNS))
        left.append(aside.filter(pc.invert(pc.is_in(aside["key"], value_set=leaving["key"]))))
    more = pa.concat_tables([t.cast(old.table.schema) for t in left])
    stays = pc.invert(pc.is_in(retired["key"], value_set=more["key"]))
    both = pa.concat_tables([retired.filter(stays), more]).sort_by("key").combine_chunks()
    same_retired = store.same_rows(both, retired)
    if old.ordinal and same_retired and store.same_rows(rows, old.table):
        return same_aside
    if not same_retired:
        store.write_table(root / store.RETIRED, both, store.COLUMNS)
    classes = {
        coding: list(codings.class_names(coding, config.ingest.mask_codings).values())
        for coding in sorted(rows["mask_coding"].drop_null().unique().to_pylist())
    }
    if classes:
        write_json(root / store.CLASSES, classes)
    labels = pc.value_counts(rows["label"].drop_null()).to_pylist()
    entry = {
        "ordinal": old.ordinal + 1,
        "sources": config.ingest.sources,
        "tiles": len(rows),
        "classes": tables.by_class({row["values"]: row["counts"] for row in labels}),
        "generated": bool(pc.any(rows["generated"]).as_py()),
        **class_facts.summary_of(rows, classes),
    }
    history = {"schema": store.SCHEMA, "ingests": [*old.history, entry]}
    write_json(root / store.HISTORY, history)
    numbers = {"shards": writer.shards, "ingest": old.ordinal + 1}
    store.write_table(root / store.MANIFEST, rows, store.COLUMNS, numbers)
    return False


def _write_quarantine(root: Path, gathered: Gathered) -> bool:
    """What was set aside, by source; whether it is as before."""
    rows: list[dict[str, str | None]] = [
        {"source": image.path, "source_root": image.root, "reason": reason, "key": None}
        for image, reason in gathered.bad + gathered.duplicates
    ]
    if gathered.aside is not None:
        rows += gathered.aside.select(list(store.QUARANTINE_COLUMNS)).to_pylist()
    rows.sort(key=lambda row: (row["source_root"], row["source"], row["key"] or ""))
    path = root / store.QUARANTINE
    with contextlib.suppress(BadInput):
        if store.read_arrow(path, store.QUARANTINE_COLUMNS, "").to_pylist() == rows:
            return True
    store.write_table(path, rows, store.QUARANTINE_COLUMNS)
    return False


def _figures(report: Report, gathered: Gathered, fresh: int, links: dict[str, int]) -> None:
    import pyarrow.compute as pc

    rows, aside = gathered.rows, gathered.bad + gathered.duplicates
    reasons = Counter(_kind(reason) for _, reason in aside)
    if gathered.aside is not None:
        reasons.update(_kind(reason) for reason in gathered.aside["reason"].to_pylist())

    def counts(column: str) -> dict[str, int]:
        found = pc.value_counts(rows[column].drop_null()).to_pylist()
        return {row["values"]: row["counts"] for row in found}

    labelled = counts("label")
    labels = tables.by_class(labelled)
    sizes = pc.value_counts(rows["place"]).field("counts")
    report.figures = {
        "images_found": 0,
        "images_read": 0,
        "tiles": len(rows),
        "new_tiles": fresh,
        "new_shards": 0,
        "set_aside": sum(reasons.values()),
        "set_aside_reasons": dict(reasons.most_common()),
        "duplicates": len(gathered.duplicates),
        "other_files": 0,
        "classes": len(labels),
        "labelled": sum(labelled.values()),
        "masks": len(rows) - rows["mask_shard"].null_count,
        "boxes": int(pc.sum(rows["boxes_count"]).as_py() or 0),
        "heights": len(rows) - rows["height_shard"].null_count,
        "pairs": len(rows) - rows["second"].null_count,
        "windows_skipped": gathered.skipped,
        "places": len(sizes),
        "biggest_place": pc.max(sizes).as_py() or 0,
        "near_duplicates": links["near_duplicates"],
        "overlapping": links["overlapping"],
        "unused": counts("split").get("unused", 0),
        "generated": bool(pc.any(rows["generated"]).as_py()),
    }
    report.tables["classes"] = [{"class": n, "tiles": c} for n, c in sorted(labels.items())]
    report.tables["set_aside"] = [{"reason": r, "count": c} for r, c in reasons.most_common()]
