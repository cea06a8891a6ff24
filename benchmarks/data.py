"""The rows of imagery at scale: ingest, growth, validation, near-duplicates, versions."""

import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.imagery import Imagery, scene, sentinel
from benchmarks.table import Bench, Row, compare
from ringmo import console

CORES = 2
SIDE = 400  # pixels of an image
IMAGES = 10_200  # as many as growth needs: they are prepared once
COSTED = 500  # images of which each measure is timed
# 0.8 and 3.1 GB of pixels, 0.9 and 3.7: what starting the readers takes weighs less in the larger.
SCENE_SIDES, SENTINEL_SIDES = (16_000, 32_000), (6000, 12_000)
KNOWN, SEED = 1_000_000, 200  # tiles of a store that grows by a hundredth; real ones among them
ROWS = 2_000_000
MEMORY_MB = 4000
FAILED = "not measured: failed, see below"
# Of an --images trial, so many for each image.
TRIAL_ROWS, TRIAL_PIXELS = 100, 20


def ingest(bench: Bench) -> None:
    """JPEG tiles as they come, with all measures; and what each measure costs."""
    imagery = bench.prepare(SIDE, bench.images or IMAGES)
    row = Row(f"ingest of JPEG {SIDE}×{SIDE}, all measures, two cores", "images/s", "≥ 400")
    bench.rows.append(row)
    runs = [_ingested(bench, imagery.train, CORES) for _ in range(bench.rounds)]
    rates = [found["images_per_s"] for found in runs if found]
    spec = {"source": str(imagery.train), "workspace": str(imagery.folder / "workspace")}
    spec |= {"images": COSTED, "as_reader": True}
    parts = bench.tried("what each measure costs", "ingest", 1, measure="costs", **spec)
    if not rates or parts is None:
        row.note = FAILED
        return
    row.ours = statistics.median(rates)
    row.reached = row.ours >= 400
    row.runs = {"ours": [round(rate, 1) for rate in rates]}
    whole = 1e3 * CORES / row.ours  # ms of one core an image
    shares = {name: 100 * ms / whole for name, ms in parts["ms"].items()}
    bench.shares = dict(sorted(shares.items(), key=lambda part: -part[1]))
    bench.shares["listing, comparing, placing, writing, waiting"] = 100 - sum(shares.values())
    row.note = (
        f"{imagery.count} images, from the call of ingest to the whole store, {whole:.1f} ms of "
        f"one core an image; its parts: see below"
    )


def _ingested(bench: Bench, source: Path, workers: int) -> dict[str, Any] | None:
    """One ingest into a workspace that is removed after it."""
    workspace = bench.scratch / "ingested"
    what = f"ingest of {source.parent.name}, {workers} workers"
    spec = {"source": str(source), "workspace": str(workspace), "workers": workers}
    try:
        return bench.tried(what, "ingest", CORES, measure="ingest", **spec)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def workers(bench: Bench) -> None:
    """Two Dask workers against one."""
    # Starting the workers weighs less in the larger.
    for count in [bench.images] if bench.images else [IMAGES, 3 * IMAGES]:
        _workers(bench, bench.prepare(SIDE, count))


def _workers(bench: Bench, imagery: Imagery) -> None:
    what = f"ingest of {imagery.count} images by two Dask workers, against one"
    row = Row(what, "images/s", "≥ 1.7 times")
    bench.rows.append(row)
    runs: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(bench.rounds):
        for count, rates in runs.items():
            found = _ingested(bench, imagery.train, count)
            rates += [found["images_per_s"]] if found else []
    if not all(runs.values()):
        row.note = FAILED
        return
    compare(row, runs[2], runs[1], 1.7)
    row.note = f"JPEGs of {SIDE}×{SIDE}; starting the workers counts"


def cut(bench: Bench) -> None:
    """A large GeoTIFF into tiles, against a plain loop that reads the same windows."""
    trial = [TRIAL_PIXELS * bench.images] if bench.images else None
    path = bench.scratch / "scene" / "scene.tif"
    for side in trial or SCENE_SIDES:
        console.note(f"bench: preparing a scene of {side} pixels a side")
        scene(bench.source, path, side)
        _cut(bench, path, f"RGB, {side} pixels a side")
    for side in trial or SENTINEL_SIDES:
        what = f"13 bands of int16, {side} pixels a side"
        if sentinel(path, side):
            _cut(bench, path, what)
        else:
            note = "not measured: no Sentinel-2 imagery beside the checkout"
            bench.rows.append(Row(_cutting(what), "tiles/s", "≥ 0.6 times", note=note))
    path.unlink(missing_ok=True)


def _cutting(what: str) -> str:
    return f"cutting a GeoTIFF ({what}), two cores, against a plain rasterio loop"


def _cut(bench: Bench, path: Path, what: str) -> None:
    row = Row(_cutting(what), "tiles/s", "≥ 0.6 times")
    bench.rows.append(row)
    workspace = bench.scratch / "cut"
    ours: list[float] = []
    plain: list[float] = []
    for _ in range(bench.rounds):
        shutil.rmtree(workspace, ignore_errors=True)
        spec = {"source": str(path.parent), "workspace": str(workspace), "workers": CORES}
        found = bench.tried(f"cutting {what}", "ingest", CORES, measure="ingest", **spec)
        if found is None:
            break
        ours.append(found["tiles_per_s"])
        spec = {"scene": str(path), "workspace": str(workspace)}
        found = bench.tried(f"plain loop, {what}", "ingest", CORES, measure="windows", **spec)
        if found is None:
            break
        plain.append(found["tiles_per_s"])
    shutil.rmtree(workspace, ignore_errors=True)
    if len(ours) != len(plain) or not ours:
        row.note = FAILED
        return
    compare(row, ours, plain, 0.6)
    row.note = (
        f"{path.stat().st_size / 1e6:.0f} MB, tiled, deflated; ours: the whole ingest, two "
        f"processes: measured, encoded, stored; plain: one loop over one open file, reads alone"
    )


def growth(bench: Bench) -> None:
    """One per cent of new images into a store of a million."""
    new = bench.images or KNOWN // 100
    known, seed = 100 * new, min(SEED, new)
    row = Row("1 % new data in a large store", "% of the full cost", "≤ 2")
    bench.rows.append(row)
    imagery = bench.prepare(SIDE, new + seed)
    workspace = bench.scratch / "grown"
    spec = {"workspace": str(workspace), "from": str(imagery.train), "seed": seed}
    made = _made(bench, spec, known, files=True)
    spec |= {"workers": CORES, "measure": "grow"}
    found = bench.tried("1 % new data", "growth", CORES, **spec) if made else None
    shutil.rmtree(workspace, ignore_errors=True)
    rate = _rate(bench, imagery)
    if found is None or rate is None:
        row.note = FAILED
        return
    full = known / rate + found["listing_s"]
    row.ours = 100 * found["seconds"] / full
    row.reached = row.ours <= 2
    row.note = (
        f"{found['new']} new JPEGs beside {known} files of a generated store: "
        f"{found['seconds']:.1f} s, peak {found['memory_mb'] / 1e3:.1f} GB; of these the new "
        f"images alone {found['new'] / rate:.1f} s; full cost: {full:.0f} s = {known} images at "
        f"{rate:.0f} a second and {found['listing_s']:.1f} s of listing"
    )


def _made(bench: Bench, spec: dict[str, Any], tiles: int, files: bool) -> bool:
    what = f"making a store of {tiles} tiles"
    spec = {**spec, "measure": "make", "tiles": tiles, "files": files}
    return bench.tried(what, "growth", CORES, **spec) is not None


def _rate(bench: Bench, imagery: Imagery) -> float | None:
    """Images a second of ingest, from its own row where that was measured."""
    for row in bench.rows:
        if row.what.startswith("ingest of JPEG"):
            return row.ours
    found = _ingested(bench, imagery.train, CORES)
    return found["images_per_s"] if found else None


def validation(bench: Bench) -> None:
    """All suites over a manifest of two million rows."""
    seed = min(SEED, bench.images or SEED)
    tiles = TRIAL_ROWS * bench.images if bench.images else ROWS
    row = Row(f"validation of {tiles} manifest rows, all suites", "s", "≤ 180, 4 GB")
    bench.rows.append(row)
    workspace = bench.scratch / "validated"
    spec = {"workspace": str(workspace), "from": str(bench.prepare(SIDE, seed).train)}
    made = _made(bench, spec | {"seed": seed}, tiles, files=False)
    spec |= {"measure": "validate"}
    found = bench.tried(row.what, "growth", CORES, **spec) if made else None
    shutil.rmtree(workspace, ignore_errors=True)
    if found is None:
        row.note = FAILED
        return
    _limits(row, found)
    row.note = f"{_peak(found)}; {found['figures']['rules']} rules"


def duplicates(bench: Bench) -> None:
    """The search for near-duplicates among two million hashes."""
    count = TRIAL_ROWS * bench.images if bench.images else ROWS
    row = Row(f"near-duplicates among {count} perceptual hashes, 3 of 64 bits", "s", "≤ 180, 4 GB")
    bench.rows.append(row)
    listed = bench.scratch / "files.txt"  # thousands of paths are too long for a command line
    listed.write_text("\n".join(str(path) for path in bench.source.files[: bench.images]))
    found = bench.tried(row.what, "duplicates", CORES, listed=str(listed), hashes=count)
    if found is None:
        row.note = FAILED
        return
    _limits(row, found)
    row.note = (
        f"{_peak(found)}; {found['pairs']} pairs; all of {found['checked']} planted or found by "
        f"brute force are among them; {found['blank']} blank tiles left out before"
    )


def _limits(row: Row, found: dict[str, Any]) -> None:
    row.ours = found["seconds"]
    row.reached = row.ours <= 180 and found["memory_mb"] <= MEMORY_MB


def _peak(found: dict[str, Any]) -> str:
    return f"peak {found['memory_mb'] / 1e3:.2f} GB"


def versioning(bench: Bench) -> None:
    """A store under DVC and on S3, against the same images as single files."""
    imagery = bench.prepare(SIDE, bench.images or IMAGES)
    row = Row("versioning: dvc add and push to S3, against single files", "images/s", "≥ 5 times")
    bench.rows.append(row)
    ingested, workspace = bench.scratch / "stored", bench.scratch / "versioned"
    spec = {"source": str(imagery.train), "workspace": str(ingested), "workers": CORES}
    stored = bench.tried("a store to version", "ingest", CORES, measure="ingest", **spec)
    forms = {"store": ingested / "data" / "store", "files": imagery.train}
    runs: dict[str, list[float]] = {form: [] for form in forms}
    objects = {}
    for _ in range(bench.rounds if stored else 0):
        for form, folder in forms.items():
            spec = {"as": form, "from": str(folder), "workspace": str(workspace)}
            found = bench.tried(
                f"versioning as {form}", "ingest", CORES, measure="versions", **spec
            )
            shutil.rmtree(workspace, ignore_errors=True)
            if found is not None:
                runs[form].append(imagery.count / found["seconds"])
                objects[form] = found["objects"]
    shutil.rmtree(ingested, ignore_errors=True)
    if not all(runs.values()):
        row.note = FAILED
        return
    compare(row, runs["store"], runs["files"], 5.0)
    row.note = (
        f"{imagery.count} images; {objects['store']} objects against {objects['files']}; empty "
        f"caches and bucket, `rclone serve s3` on the same two cores"
    )
