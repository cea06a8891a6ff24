"""`make bench`: everything side by side, and a table of it in benchmarks/results/.

    make bench                                  all rows, half an hour and more on two cores
    make bench ONLY=loader,step OUT=FILE        some rows, as JSON into FILE
    make bench ONLY=ingest,cut,growth,validate,duplicates,versioning,dask    those of the data
    make bench ONLY=rotated                     overlap of boxes at any angle
    make bench ONLY=server                      the HTTP server, against mlflow models serve
    make bench ONLY=scenes                      whole scenes: memory, speed, the model's share
    make bench DATA=FOLDER                      with images below this folder

Each measurement runs in a process of its own, on the same cores with the same threads, contenders
in turn, several rounds; a row holds medians. The baselines' worker processes are tuned first. Rows
that need a GPU say "not measured" where there is none, as do those of packages that are missing.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import data, rotated, scenes, server
from benchmarks.imagery import ROOT, Imagery, Source, optimise
from benchmarks.table import Bench, Row, compare
from ringmo import console

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "webdataset", "litdata",
    "rasterio", "pandas", "pyarrow", "distributed", "dvc", "great-expectations", "shapely",
    "mlflow", "fastapi", "uvicorn",
)  # fmt: skip
ROWS = (
    *("loader", "step", "pimask", "swin-b", "vit-b"),
    *("ingest", "cut", "growth", "validate", "duplicates", "versioning", "dask"),
    *("rotated", "server", "scenes"),
)
CORES = 2
ROUNDS = 3
SECONDS = 2.5  # of one measurement of a loader
WORKERS = (1, 2, 3)  # tried for each baseline
BATCH = 64
CONTENDERS = {"folder": "ImageFolder + PIL", "webdataset": "WebDataset", "litdata": "LitData"}

SMALL = {"recipe": "small", "batch": 64, "epochs": 3, "device": "cpu"}
SMALL_STEPS, SMALL_VAL = 20, 256  # an epoch; held-out tiles
LARGE = {"batch": 256, "epochs": 4, "device": "cuda"}
LARGE_STEPS, LARGE_VAL = 20, 256
NO_GPU = "not measured: no CUDA device"


@dataclass(frozen=True)
class Load:
    """JPEGs of `side` pixels on their way to crops of `crop`, as whole tiles of `size`.

    goal: times ImageFolder with PIL; None: only told, and only against that.
    """

    side: int
    size: int
    crop: int
    images: int
    goal: float | None


LOADS = (
    Load(400, 288, 192, 480, 2.5),  # recipes/ringmo-swin-b.yaml
    # The crop that 150 pixels have the detail for; a tile is never enlarged.
    Load(150, 150, 128, 3600, 5.0),
    # recipes/small.yaml: for the plain recipe a small crop is less work after decoding.
    Load(150, 96, 64, 3600, None),
)


def loaders(bench: Bench) -> None:
    """Each loader alone, on two cores: ours against three others on the same images."""
    missing = [name for name in ("webdataset", "litdata") if not _installed(name)]
    tried = WORKERS if bench.images is None else WORKERS[:1]
    for load in LOADS:
        imagery = bench.prepare(load.side, bench.images or load.images)
        others = CONTENDERS if load.goal is not None else {"folder": CONTENDERS["folder"]}
        if "litdata" in others and "litdata" not in missing and not imagery.litdata.exists():
            console.note("bench: writing them for LitData")
            optimise(imagery)

        def once(contender: str, workers: int, load: Load = load, at: Imagery = imagery) -> float:
            """Images a second; 0 where it failed."""
            found = bench.tried(
                f"loader {load.side} to {load.crop}, {contender} with {workers} workers",
                "loaders",
                CORES,
                contender=contender,
                workers=workers,
                folder=str(at.folder),
                size=load.size,
                crop=load.crop,
                batch=BATCH,
                seconds=SECONDS if bench.images is None else 0.5,
            )
            return found["images_per_s"] if found else 0.0

        best = {"ours": CORES}
        for name in [name for name in others if name not in missing]:
            rates = {n: once(name, n) for n in tried} if len(tried) > 1 else {tried[0]: 0.0}
            best[name] = max(rates, key=lambda workers: rates[workers])
        runs: dict[str, list[float]] = {name: [] for name in best}
        for _ in range(bench.rounds):
            for name, workers in best.items():
                runs[name].append(once(name, workers))
        for name, title in others.items():
            goal = load.goal if name == "folder" else 1.0
            row = Row(
                f"loader alone, JPEG {load.side}×{load.side} for crops of {load.crop}, two cores, "
                f"against {title}",
                "images/s",
                f"≥ {goal:g} times" if goal is not None else "none",
            )
            bench.rows.append(row)
            if name in missing:
                row.note = f"not measured: {name} is not installed (`pip install 'ringmo[bench]'`)"
            elif 0.0 in runs[name] + runs["ours"]:
                row.note = "not measured: failed, see below"
            else:
                compare(row, runs["ours"], runs[name], goal)
                kind = f"crops of {load.crop}" if name == "folder" else f"tiles of {load.size}"
                row.note = (
                    f"ours: whole tiles of {load.size}; {title}: {kind}, {best[name]} workers, "
                    f"the best of {', '.join(map(str, tried))}"
                )


def steps(bench: Bench) -> None:
    """The whole step on two cores: the ladder from the plain recipe to ours."""
    count = (bench.images or SMALL_STEPS * SMALL["batch"]) + SMALL_VAL  # type: ignore[operator]
    imagery = bench.prepare(150, count, SMALL_VAL)
    row = Row("pre-training step, small Swin, two cores, no GPU", "images/s", "≥ 1.5 times")
    rungs = ("plain", "loader", "augment", "pimask", "kept", "fast", "engine")
    _climb(bench, "small", row, imagery, SMALL, rungs, CORES, [(2, 1), (2, 2), (1, 2)], 1.5)
    row.note += "; ours decodes a tile once where memory allows, as it does in training"


def pimask(bench: Bench) -> None:
    """What drawing the masks costs of a step."""
    for title, device, spec in (
        ("PIMask at 192, batch 256, of the Swin-B step", "cuda", {"size": 192, "patch": 32}),
        (
            "PIMask at 64, batch 64, of the small step on two cores",
            "cpu",
            {"size": 64, "patch": 16},
        ),
    ):
        row = Row(title, "% of the step", "< 1")
        bench.rows.append(row)
        small = device == "cpu"
        if not small and not _has_gpu():
            row.note = NO_GPU
            continue
        ladder = bench.ladders.get("small" if small else "ringmo-swin-b")
        batch = SMALL["batch"] if small else LARGE["batch"]
        if not ladder:
            row.note = f"not measured: needs the step ({'step' if small else 'swin-b'} in ONLY)"
            continue
        rate = {rung["rung"]: rung["images_per_s"] for rung in ladder}["engine"]
        cores = CORES if small else None
        found = bench.tried(
            title, "steps", cores, rung="masking", device=device, batch=batch, **spec
        )
        if found is None:
            row.note = "not measured: failed, see below"
            continue
        step_ms = batch / rate * 1e3  # type: ignore[operator]
        row.ours, row.baseline = (100 * found[k] / step_ms for k in ("ours_ms", "baseline_ms"))
        row.ratio, row.reached = row.baseline / row.ours, row.ours < 1
        row.note = (
            f"{found['ours_ms']:.2f} of {step_ms:.0f} ms; baseline: NumPy, an image at a time, on "
            f"one core"
        )


def swin_b(bench: Bench) -> None:
    """Swin-B at 192 with PIMask on one GPU: the ladder, and where the time goes."""
    fast = Row("one GPU, bf16: Swin-B at 192 with PIMask", "images/s", "≥ 3000")
    twice = Row("one GPU, bf16: Swin-B at 192, against the plain recipe", "images/s", "≥ 2 times")
    bench.rows.append(fast)
    if not _has_gpu():
        fast.note = twice.note = NO_GPU
        bench.rows.append(twice)
        return
    imagery = bench.prepare(400, LARGE_STEPS * LARGE["batch"] + LARGE_VAL, LARGE_VAL)  # type: ignore[operator]
    cores = len(os.sched_getaffinity(0))
    tries = [(cores, workers) for workers in sorted({cores // 2, cores, 2 * cores})]
    rungs = ("plain", "loader", "augment", "pimask", "kept", "fast", "engine", "compiled")
    name = "ringmo-swin-b"
    _climb(bench, name, twice, imagery, {**LARGE, "recipe": name}, rungs, None, tries, 2.0)
    fast.ours = twice.ours
    fast.reached = fast.ours is not None and fast.ours >= 3000
    _profile(bench, imagery, name)


def vit_b(bench: Bench) -> None:
    """ViT-B/16 at 224 on one GPU: how much of the card's matrix rate is reached."""
    used = Row("one GPU, bf16: ViT-B/16 at 224", "% of the card's bf16 matrix rate", "≥ 40")
    waits = Row("one GPU, bf16: ViT-B/16 at 224, time waiting for data", "%", "< 5")
    bench.rows += [used, waits]
    if not _has_gpu():
        used.note = waits.note = NO_GPU
        return
    imagery = bench.prepare(400, LARGE_STEPS * LARGE["batch"] + LARGE_VAL, LARGE_VAL)  # type: ignore[operator]
    name = "ringmo-vit-b"
    runs = []
    for rung in ("engine", "compiled"):
        what = f"{name}, {rung}"
        spec = {**LARGE, "recipe": name, "folder": str(imagery.folder), "rung": rung, "seed": 1}
        found = bench.tried(what, "steps", None, **spec)
        if found is not None:
            runs.append((rung, found))
    if not runs:
        used.note = waits.note = "not measured: failed, see below"
        return
    rung, best = max(runs, key=lambda run: run[1]["mfu"])
    used.ours, used.reached = 100 * best["mfu"], best["mfu"] >= 0.4
    waits.ours, waits.reached = 100 * best["wait_share"], best["wait_share"] < 0.05
    used.note = f"{best['images_per_s']:.0f} images/s, {rung}"
    _profile(bench, imagery, name)


def _climb(
    bench: Bench,
    name: str,
    row: Row,
    imagery: Imagery,
    common: dict[str, Any],
    rungs: tuple[str, ...],
    cores: int | None,
    tries: list[tuple[int, int]],
    goal: float,
) -> None:
    """Measure a ladder; its first rung is the row's baseline, its engine the row's ours.

    Args:
        tries: threads and workers for the plain recipe; the fastest is taken.
    """
    from benchmarks.steps import RUNGS

    common = {**common, "folder": str(imagery.folder)}
    bench.rows.append(row)
    rates = {}
    for threads, workers in tries:
        spec = {"rung": "plain", "seed": 0, "threads": threads, "workers": workers}
        what = f"{name}, plain with {workers} workers and {threads} threads"
        found = bench.tried(what, "steps", cores, **{**common, "epochs": 2}, **spec)
        rates[threads, workers] = found["images_per_s"] if found else 0.0
    threads, workers = max(rates, key=lambda pair: rates[pair])
    found_of: dict[str, list[dict[str, Any]]] = {rung: [] for rung in rungs}
    for seed in range(1, bench.rounds + 1):
        for rung in rungs:
            # Two seeds show the noise of the loss; more rounds only the two that are compared.
            if seed > 2 and rung not in ("plain", "engine"):
                continue
            spec = {"rung": rung, "seed": seed, "workers": workers}
            spec |= {"threads": threads} if rung == "plain" and cores else {}
            found = bench.tried(f"{name}, seed {seed}, {rung}", "steps", cores, **common, **spec)
            if found is not None:
                found_of[rung].append(found)
    bench.ladders[name] = ladder = []
    for rung, found in found_of.items():
        if found:
            rates_of = [one["images_per_s"] for one in found]
            ladder.append(
                {
                    "rung": rung,
                    "what": RUNGS[rung],
                    "images_per_s": statistics.median(rates_of),
                    "memory_mb": statistics.median(
                        one.get("gpu_memory_mb", one["memory_mb"]) for one in found
                    ),
                    "losses": [round(one["loss"], 4) for one in found],
                }
            )
    rungs_of = {rung: [one["images_per_s"] for one in found] for rung, found in found_of.items()}
    if not rungs_of["plain"] or not rungs_of["engine"]:
        row.note = "not measured: failed, see below"
        return
    # What a user gets on this machine with its fastest setting.
    ours = max(("engine", "compiled"), key=lambda r: statistics.median(rungs_of.get(r) or [0.0]))
    compare(row, rungs_of[ours], rungs_of["plain"], goal)
    row.note = f"ours: {ours}; plain recipe: {workers} workers, {threads} threads, the best tried"


def _profile(bench: Bench, imagery: Imagery, recipe: str) -> None:
    """A table of the device's time by operation, beside the results."""
    spec = {**LARGE, "recipe": recipe, "folder": str(imagery.folder), "rung": "fast", "seed": 1}
    found = bench.tried(f"{recipe}, profile", "steps", None, profile=True, **spec)
    if found is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{_stamp()}-profile-{recipe}.txt").write_text(found["profile"])


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU."""
    import psutil

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    gpu = None
    if _has_gpu():
        import torch

        gpu = torch.cuda.get_device_name()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {name: of(name) for name in PACKAGES}


def commit() -> str | None:
    """The checkout's commit, `+` where files differ from it; None outside of git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head and head + ("+" if git("status", "--porcelain") else "")
    except OSError:
        return None


def markdown(found: dict[str, Any]) -> str:
    """The result for people."""
    on, with_ = found["machine"], found["versions"]
    lines = [
        "# Measured side by side",
        "",
        f"{found['date']}, commit {found['commit'] or 'unknown'}; {on['processor']}, "
        f"{on['cores']} cores, {on['memory_gb']} GB, GPU: {on['gpu'] or 'none'}; load before: "
        f"{on['load_before']}.",
        "",
        ", ".join(f"{name} {number or 'not installed'}" for name, number in with_.items()) + ".",
        "",
        f"Images: {found['source']}: {'; '.join(found['imagery']) or 'none needed'}.",
        "",
        "| what | ours | baseline | ratio | unit | goal | reached | |",
        "|---|---:|---:|---:|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row["what"], _number(row["ours"]), _number(row["baseline"]), _number(row["ratio"])]
        silent = "**not measured**" if row["ours"] is None else ""
        reached = {True: "yes", False: "**no**", None: silent}[row["reached"]]
        cells += [row["unit"], row["goal"], reached, row["note"]]
        lines.append(f"| {' | '.join(cells)} |")
    for name, ladder in found["ladders"].items():
        lines += [
            "",
            f"## From the plain recipe to ours: {name}",
            "",
            "Each row has all the changes above it. Loss: on the same held-out tiles after the "
            "same steps, a value a seed.",
            "",
            "| | images/s | times plain | memory, MB | loss |",
            "|---|---:|---:|---:|---|",
        ]
        for rung in ladder:
            lines.append(
                f"| {rung['what']} | {_number(rung['images_per_s'])} "
                f"| {rung['images_per_s'] / ladder[0]['images_per_s']:.2f} "
                f"| {_number(rung['memory_mb'])} | {', '.join(map(str, rung['losses']))} |"
            )
    if found["shares"]:
        lines += [
            "",
            "## What an image costs in ingest",
            "",
            "| part | % of its time |",
            "|---|---:|",
        ]
        lines += [f"| {name} | {share:.1f} |" for name, share in found["shares"].items()]
    if found["failures"]:
        lines += ["", "## Failed", "", *(f"- {failure}" for failure in found["failures"])]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _stamp() -> str:
    gpu = machine()["gpu"]
    where = gpu.replace(" ", "-").lower() if gpu else f"{machine()['cores']}-cores"
    return f"{datetime.date.today()}-{where}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure side by side.")
    parser.add_argument("--only", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help="write the JSON there, and no table")
    parser.add_argument("--data", type=Path, help="a folder of images")
    parser.add_argument("--images", type=int, help="use so few and measure briefly: a trial")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    given = parser.parse_args(arguments)
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    unknown = [name for name in only if name not in ROWS]
    if unknown or not only:
        parser.error(f"--only: {', '.join(unknown) or 'nothing'}: rows are {', '.join(ROWS)}")
    if given.data is not None and not given.data.is_dir():
        parser.error(f"--data: {given.data} is no folder")

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
    parts = {
        "loader": loaders, "step": steps, "swin-b": swin_b, "vit-b": vit_b, "pimask": pimask,
        "ingest": data.ingest, "cut": data.cut, "growth": data.growth,
        "validate": data.validation, "duplicates": data.duplicates,
        "versioning": data.versioning, "dask": data.workers, "rotated": rotated.rows,
        "server": server.rows,
        "scenes": scenes.rows,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ringmo-bench-") as folder:
        scratch = Path(folder)
        bench = Bench(Source.find(given.data, scratch), scratch, given.images, given.rounds)
        for name, part in parts.items():  # pimask after the steps, growth after ingest
            if name in only:
                part(bench)
    found |= {"source": bench.source.name, "imagery": [i.describe() for i in bench.ready.values()]}
    found |= {"rows": [asdict(row) for row in bench.rows], "ladders": bench.ladders}
    found |= {"shares": bench.shares}
    found |= {"failures": bench.failures}
    table = markdown(found)
    print(table)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{_stamp()}.json"
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        path.with_suffix(".md").write_text(table)
        console.note(f"bench: {path.with_suffix('.md').relative_to(ROOT)} and .json")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
