"""What is missing or odd on this machine and in this workspace, and how to mend it.

A check is a function that yields findings. Each runs in a thread of its own with a time limit, all
side by side: what hangs or breaks is a line of the table and ends none of the others. A check only
looks: what it must write to know, it removes.
"""

import contextlib
import errno
import fcntl
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import ringmo
from ringmo import clocks, console, environment
from ringmo.config import WHOLE, Config, flatten, read_yaml
from ringmo.errors import BadInput, RingmoError
from ringmo.stage import REVISIONS
from ringmo.workspace import MADE_BY, Workspace, template

OK, NOTE, PROBLEM = "ok", "note", "problem"
LIMIT_S = 15.0  # of a check; importing MLflow on a cold disk takes half of it
SKEW_NOTE_S, SKEW_PROBLEM_S = 2.0, 60.0  # S3 refuses at 15 minutes, heartbeats are 30 s apart
FRESH_RUN_BYTES = 3e9  # what a first run may write: no run has told yet
FREE_INODES = 10_000
FICLONE = 0x40049409  # Linux: share a file's bytes with another file


@dataclass(frozen=True)
class Finding:
    """check: what was looked at. state: ok, note or problem. found, and what to do."""

    check: str
    state: str
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Place:
    """Where the doctor looks. workspace and config: None where there is none that can be read."""

    workspace: Workspace | None
    config: Config | None


Check = Callable[[Place], Iterable[Finding]]


def examine(chosen: str | os.PathLike[str] | None = None) -> list[Finding]:
    """All findings, in the order of the checks.

    chosen: the workspace's folder, as for every verb; where there is none, the machine is looked at
    alone.
    """
    place, findings = _place(chosen)
    boxes: list[list[Finding]] = [[] for _ in CHECKS]
    threads = [
        threading.Thread(target=_isolated, args=(name, check, place, box), daemon=True)
        for (name, check), box in zip(CHECKS, boxes, strict=True)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + LIMIT_S
    for (name, _), thread, box in zip(CHECKS, threads, boxes, strict=True):
        thread.join(max(0.0, end - time.monotonic()))
        findings += box
        if thread.is_alive():
            said = f"no result within {LIMIT_S:.0f} s"
            findings.append(Finding(name, PROBLEM, said, "a disk or a server that hangs?"))
    return findings


def _isolated(name: str, check: Check, place: Place, box: list[Finding]) -> None:
    try:
        box.extend(check(place))
    except RingmoError as error:
        box.append(Finding(name, PROBLEM, str(error)))
    except Exception as error:  # ends none of the others
        box.append(Finding(name, PROBLEM, f"the check broke: {type(error).__name__}: {error}"))


def _place(chosen: str | os.PathLike[str] | None) -> tuple[Place, list[Finding]]:
    try:
        workspace = Workspace.find(chosen)
    except BadInput as error:
        if chosen:
            raise
        said = str(error).partition(":")[0]
        return Place(None, None), [Finding("workspace", NOTE, said, "cd to one, or --workspace")]
    try:
        config = Config.load(workspace.params_file)
    except BadInput as error:
        return Place(workspace, None), [Finding("params.yaml", PROBLEM, str(error), "mend the key")]
    return Place(workspace, config), [Finding("workspace", OK, str(workspace.root))]


# The machine


def _python(_: Place) -> Iterator[Finding]:
    wanted = metadata.metadata("ringmo")["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    if here in SpecifierSet(wanted):
        yield Finding("python", OK, here)
    else:
        todo = f"make an environment with Python {wanted}"
        yield Finding("python", PROBLEM, f"{here}, and ringmo needs {wanted}", todo)


def _packages(_: Place) -> Iterator[Finding]:
    """The ranges of pyproject.toml, and where they are at hand the exact versions."""
    from packaging.requirements import Requirement

    install = "pip install 'ringmo[platform]'"
    absent, wrong, extras = [], [], ("", "train", "platform")
    for text in metadata.requires("ringmo") or []:
        wanted = Requirement(text)
        own = wanted.name == "ringmo" or not any(
            wanted.marker is None or wanted.marker.evaluate({"extra": extra}) for extra in extras
        )
        if own:
            continue
        here = _version(wanted.name)
        if here is None:
            absent.append(wanted.name)
        elif not wanted.specifier.contains(here.partition("+")[0], prereleases=True):
            wrong.append(f"{wanted.name} {here} ({wanted.specifier})")
    if wrong:
        yield Finding("packages", PROBLEM, ", ".join(wrong[:6]), f"{install} -c constraints.txt")
    if absent:
        said = f"absent: {', '.join(sorted(absent)[:6])}{' …' * (len(absent) > 6)}"
        todo = f"for more than prediction: {install}"
        yield Finding("packages", NOTE, said, todo)
    other = []
    with contextlib.suppress(BadInput):  # an installed package has no list of pins
        for line in template("constraints.txt").read_text().splitlines():
            name, equals, pinned = line.partition("==")
            here = _version(name) if equals else None
            if here and here.partition("+")[0] != pinned.partition("+")[0]:
                other.append(f"{name} {here} (tried: {pinned})")
    if other:
        said = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        yield Finding("packages", NOTE, said, f"{install} -c constraints.txt")
    if not (wrong or absent or other):
        yield Finding("packages", OK, "as pinned")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu(place: Place) -> Iterator[Finding]:
    cards = _cards()
    wanted = place.config.hardware if place.config else None
    built = _torch_cuda()
    if not cards:
        if wanted is not None and wanted.accelerator == "cuda":
            todo = "install the driver, or set hardware.accelerator: auto"
            yield Finding("gpu", PROBLEM, "hardware.accelerator is cuda; no card found", todo)
        else:
            yield Finding("gpu", OK, "none: trains on the processor")
        if wanted is not None and wanted.precision == "bf16":
            todo = "set hardware.precision: auto"
            yield Finding("bf16", PROBLEM, "hardware.precision is bf16; no card for it", todo)
        return
    names = ", ".join(f"{name} ({memory})" for name, memory, _ in cards)
    if built is None:
        todo = "pip install torch from the index for your CUDA (pytorch.org/get-started)"
        yield Finding("gpu", PROBLEM, f"{names}, but this PyTorch is built without CUDA", todo)
    elif said := _cuda_trouble():
        todo = f"a driver for CUDA {built}, or a PyTorch for the driver that is here"
        yield Finding("gpu", PROBLEM, f"{names}, but PyTorch cannot use it: {said}", todo)
    else:
        yield Finding("gpu", OK, f"{names}, CUDA {built}")
    slow = [name for name, _, capability in cards if capability < 8.0]
    if slow:
        state = PROBLEM if wanted is not None and wanted.precision == "bf16" else NOTE
        said = f"{', '.join(slow)} does not compute in bf16"
        yield Finding("bf16", state, said, "hardware.precision: auto (it trains in float32)")
    else:
        yield Finding("bf16", OK, "computed by the card")


def _cards() -> list[tuple[str, str, float]]:
    """Name, memory and compute capability of each card that the driver shows."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except FileNotFoundError:
        return []
    if told.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines()]
    return [(row[0], row[1], float(row[2])) for row in rows if len(row) == 3]


def _torch_cuda() -> str | None:
    """The CUDA that PyTorch was built for, without importing it."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
    return found[1] if found else None


def _cuda_trouble() -> str | None:
    """Why PyTorch finds no card; asked in a process of its own."""
    ask = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    return None if not done.returncode else done.stderr.strip().splitlines()[-1][:160]


def _memory(_: Place) -> Iterator[Finding]:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    said = f"{console.size(min(free, total))} free of {console.size(total)}"
    if free < 2e9:
        yield Finding("memory", PROBLEM, said, "end other programs, or a smaller batch_size")
    elif free < 4e9:
        yield Finding("memory", NOTE, said, "a smaller batch_size where a training is killed")
    else:
        yield Finding("memory", OK, said)


def _shared_memory(_: Place, path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Processes that train together exchange gradients through it."""
    try:
        size = shutil.disk_usage(path)
    except OSError:
        yield Finding("shared memory", NOTE, f"{path} is missing", "mount a tmpfs there")
        return
    said = f"{console.size(size.free)} free in {path}"
    if size.free < 64 * 2**20:
        todo = "empty it; in a container: --shm-size=1g (several GPUs talk through it)"
        yield Finding("shared memory", PROBLEM, said, todo)
    elif size.total < 1e9:
        todo = "for several GPUs in a container: --shm-size=1g"
        yield Finding("shared memory", NOTE, said, todo)
    else:
        yield Finding("shared memory", OK, said)


def _open_files(_: Place) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if hard == resource.RLIM_INFINITY else hard
    if soft < 1024:
        todo = f"ulimit -n 4096 (allowed here: up to {limit})"
        yield Finding("open files", PROBLEM, f"at most {soft} of a process", todo)
    else:
        yield Finding("open files", OK, f"at most {soft} of a process")


def _disk(place: Place) -> Iterator[Finding]:
    """Room for one more run where it writes: workspace, DVC's cache, temporary files."""
    yield from _room("disk: temporary files", Path(tempfile.gettempdir()), 0.5e9)
    if place.workspace is None:
        return
    from ringmo.data import versions

    need, said = _needed(place.workspace)
    yield from _room("disk: workspace", place.workspace.root, need, said)
    cache = versions.Cache(place.workspace).root
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if there.stat().st_dev != place.workspace.root.stat().st_dev:
        yield from _room("disk: DVC cache", there, need, said)


def _needed(workspace: Workspace) -> tuple[float, str]:
    """Bytes that a run like the last one writes: results twice (work/ and MLflow), and its
    checkpoints, of which there are three at a time with two moments to each weight."""
    sizes = [(p.name, p.stat().st_size) for p in (workspace.root / "work").rglob("*.*")]
    if not sizes:
        return FRESH_RUN_BYTES, "a first run may take"
    weights = max((size for name, size in sizes if name == "model.safetensors"), default=0)
    return 2.0 * sum(size for _, size in sizes) + 9.0 * weights, "a run like the last one takes"


def _room(check: str, folder: Path, need: float, why: str = "needed:") -> Iterator[Finding]:
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    said = f"{console.size(free)} free; {why} {console.size(round(need))}"
    todo = "ringmo clean --dry-run shows what may go"
    if free < need:
        yield Finding(check, PROBLEM, said, todo)
    elif space.f_files and space.f_favail < FREE_INODES:
        yield Finding(check, PROBLEM, f"room for {space.f_favail} more files only", todo)
    elif free < 2 * need:
        yield Finding(check, NOTE, said, todo)
    else:
        yield Finding(check, OK, said)


def _time_zone(place: Place) -> Iterator[Finding]:
    from zoneinfo import ZoneInfo

    local = time.strftime("%Z, UTC%z")
    zone = place.config.schedule.timezone if place.config else "UTC"
    try:
        there = ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        todo = "a name such as UTC or Europe/Berlin"
        yield Finding("time zone", PROBLEM, f"schedule.timezone: no zone `{zone}` here", todo)
        return
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    if now.astimezone(there).utcoffset() != now.astimezone().utcoffset():
        said = f"schedules run by {zone}; this machine's clock shows {local}"
        yield Finding("time zone", NOTE, said, "schedule.timezone, if that is not meant")
    else:
        yield Finding("time zone", OK, local)


# The environment


def _variables(place: Place) -> Iterator[Finding]:
    known = {variable.name for variable in environment.VARIABLES}
    odd = False
    for name in sorted(os.environ):
        if name in known:
            continue
        near = next((one for one in sorted(known) if _mistyped(name, one)), None)
        if near:
            odd = True
            yield Finding("environment", PROBLEM, f"{name} is set", f"is {near} meant?")
        elif name.startswith("RINGMO_"):
            odd = True
            known_ours = ", ".join(sorted(one for one in known if one.startswith("RINGMO_")))
            yield Finding("environment", NOTE, f"{name}: ringmo reads no such", known_ours)
    for variable in environment.VARIABLES:
        value = variable.read()
        if value is None:
            continue
        if variable.kind is int and not value.isdecimal():
            odd = True
            yield Finding("environment", PROBLEM, f"{variable.name}={value!r} is no number", "")
        elif variable.name.endswith(("_URI", "_URL")) and not re.match(r"[a-z0-9+]+:/", value):
            odd = True
            todo = f"http://{value}, or https://"
            yield Finding("environment", PROBLEM, f"{variable.name}={value}: no scheme", todo)
        elif variable.name == "PREFECT_API_URL" and not value.rstrip("/").endswith("/api"):
            odd = True
            todo = f"{value.rstrip('/')}/api"
            yield Finding("environment", PROBLEM, f"{variable.name} does not end in /api", todo)
    if not odd:
        yield Finding("environment", OK, "no variable looks mistyped")


def _mistyped(name: str, known: str) -> bool:
    """One letter wrong, missing, too many, or two changed places; or in small letters."""
    if name.upper() == known.upper():
        return True
    if abs(len(name) - len(known)) > 1:
        return False
    first = _same_start(name, known)
    last = _same_start(name[first:][::-1], known[first:][::-1])
    one, other = name[first : len(name) - last], known[first : len(known) - last]
    return max(len(one), len(other)) == 1 or (len(one) == 2 and one == other[::-1])


def _same_start(one: str, other: str) -> int:
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _telemetry(_: Place) -> Iterator[Finding]:
    quiet = environment.quiet_telemetry({})
    on = [name for name, value in quiet.items() if os.environ.get(name, value) != value]
    # Every one of these names means "off" by any text but these.
    off = {"1", "true", "yes"}
    on = [n for n in on if not (quiet[n] in off and os.environ[n].lower() in off)]
    if on:
        said = ", ".join(f"{name}={os.environ[name]}" for name in on)
        yield Finding("telemetry", NOTE, f"on by your choice: {said}", "unset it to be quiet")
    else:
        yield Finding("telemetry", OK, "off: nothing leaves this machine by itself")


def _secrets(place: Place) -> Iterator[Finding]:
    files = [Path.home() / ".aws" / "credentials"]
    if place.workspace is not None:
        root = place.workspace.root
        files += [*sorted(root.glob(".env*")), root / ".dvc" / "config.local"]
        config = root / ".dvc" / "config"
        if config.is_file() and re.search(
            r"(?m)^\s*(secret_access_key|password)", config.read_text()
        ):
            todo = "dvc remote modify --local …, and change the secret: this file is shared"
            yield Finding("secrets", PROBLEM, f"{config} holds one", todo)
    open_to_others = [path for path in files if path.is_file() and path.stat().st_mode & 0o077]
    for path in open_to_others:
        mode = f"{path.stat().st_mode & 0o777:o}"
        yield Finding("secrets", PROBLEM, f"{path} is open to others ({mode})", f"chmod 600 {path}")
    if not open_to_others:
        yield Finding("secrets", OK, "no file with secrets is open to others")


# Servers


def _servers(place: Place) -> Iterator[Finding]:
    uri = environment.TRACKING_URI.read()
    if uri and uri.startswith("http"):
        user, word = os.environ.get("MLFLOW_TRACKING_USERNAME"), "MLFLOW_TRACKING_PASSWORD"
        login = f"{user}:{os.environ.get(word, '')}" if user else None
        ask = "/api/2.0/mlflow/experiments/search?max_results=1"
        paths = ("/health", "/version", ask)
        names = f"MLFLOW_TRACKING_USERNAME and {word}"
        yield from _server("MLflow", uri.rstrip("/"), "mlflow", paths, login, names)
    elif uri:
        yield from _database(uri)
    api = environment.PREFECT_API_URL.read()
    if api:
        login = environment.PREFECT_AUTH.read()
        paths = ("/health", "/admin/version", "/admin/version")
        name = environment.PREFECT_AUTH.name
        yield from _server("Prefect", api.rstrip("/"), "prefect", paths, login, name)
    for variable in ("MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"):
        if url := os.environ.get(variable):
            said, skew = _asked(url)
            if said is None:
                todo = f"is it up, is {variable} right?"
                yield Finding("S3", PROBLEM, f"{url} does not answer", todo)
            else:
                yield from _clock("S3", url, skew)
    if not (uri or api):
        yield Finding("servers", OK, "none named: this workspace's own are used")


def _server(
    what: str, url: str, package: str, paths: tuple[str, str, str], login: str | None, names: str
) -> Iterator[Finding]:
    """Does it answer, by which version and clock, and does it let us in."""
    health, skew = _asked(url + paths[0], login)
    if health is None:
        yield Finding(what, PROBLEM, f"{url} does not answer", "is it up, is the address right?")
        return
    yield from _clock(what, url, skew)
    status, _ = _asked(url + paths[2], login)
    if status in (401, 403):
        why = "refused" if login else "wants a login"
        yield Finding(what, PROBLEM, f"{url} {why} ({status})", f"set {names}")
        return
    there = _text(url + paths[1], login).strip('"\n ')
    here = _version(package) or ""
    if re.match(r"\d+\.\d+", there) and there.split(".")[:2] != here.split(".")[:2]:
        state = PROBLEM if there.split(".")[0] != here.split(".")[0] else NOTE
        todo = f"pip install {package}=={there}, or bring the server to {here}"
        yield Finding(what, state, f"{url} is version {there}, here is {here}", todo)
    else:
        yield Finding(what, OK, f"{url} answers" + (f", version {there}" if there else ""))


def _asked(url: str, login: str | None = None) -> tuple[int | None, float | None]:
    return clocks.asked(_request(url, login))


def _text(url: str, login: str | None) -> str:
    try:
        with urlopen(_request(url, login), timeout=clocks.ANSWER_S) as answer:
            return str(answer.read(200).decode(errors="replace"))
    except (OSError, ValueError):
        return ""


def _request(url: str, login: str | None) -> Request:
    return Request(url, headers=environment.basic_auth(login) if login else {})


def _clock(what: str, url: str, skew: float | None) -> Iterator[Finding]:
    if skew is None or abs(skew) <= SKEW_NOTE_S:
        return
    state = PROBLEM if abs(skew) > SKEW_PROBLEM_S else NOTE
    said = f"the clock of {url} is {clocks.said(skew)}"
    yield Finding(f"{what}: clock", state, said, "let NTP set both (timedatectl set-ntp true)")


def _database(uri: str) -> Iterator[Finding]:
    parts = urlsplit(uri)
    shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    if parts.scheme.startswith("sqlite"):
        file = Path(uri.partition("///")[2])
        if file.parent.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK):
            yield Finding("MLflow", OK, shown)
        else:
            yield Finding("MLflow", PROBLEM, f"{file} cannot be written", "MLFLOW_TRACKING_URI")
        return
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 5432), clocks.ANSWER_S):
            yield Finding("MLflow", OK, f"{shown} answers")
    except OSError as error:
        todo = "is it up, is MLFLOW_TRACKING_URI right?"
        yield Finding("MLflow", PROBLEM, f"{shown} does not answer: {error}", todo)


def _buckets(place: Place) -> Iterator[Finding]:
    """Every bucket that params.yaml names: sources are read, the remote is written."""
    if place.config is None:
        return
    from ringmo.data import buckets

    remote, ingest = place.config.versioning, place.config.ingest
    asked = [(url, ingest.endpoint, False) for url in ingest.sources if url.startswith("s3://")]
    asked += [(remote.remote, remote.endpoint, True)] if remote.remote.startswith("s3://") else []
    for url, endpoint, write in asked:
        try:
            buckets.probe(url, endpoint, write=write)
        except RingmoError as error:
            yield Finding("S3", PROBLEM, str(error))
        else:
            yield Finding("S3", OK, f"{url}: " + ("read and written" if write else "read"))


# The workspace


def _ports(place: Place) -> Iterator[Finding]:
    if place.config is None or place.workspace is None:
        return
    from ringmo import services

    taken, running = False, services.status(place.workspace)
    for name in ("mlflow", "prefect"):
        port = getattr(place.config.services, f"{name}_port")
        if running[name]["where"] != "down":
            continue
        try:
            services.check_port(name, port)
        except BadInput as error:
            taken = True
            found, _, todo = str(error).partition(": ")
            yield Finding("ports", PROBLEM, found, todo)
    if not taken:
        yield Finding("ports", OK, "free for `ringmo up`, or taken by its own")


def _own_services(place: Place) -> Iterator[Finding]:
    if place.workspace is None:
        return
    from ringmo import services

    recorded = services.recorded(place.workspace)
    alive = services.status(place.workspace)
    dead = [name for name in recorded if alive.get(name, {}).get("where") == "down"]
    for name in dead:
        log = place.workspace.state / "logs" / f"{name}.log"
        said = f"{name} (process {recorded[name].get('pid')}) ended by itself: see {log}"
        yield Finding("services", PROBLEM, said, "ringmo up")
    for name, row in alive.items():
        path = {"mlflow": "/health", "prefect": "/api/health"}.get(name)
        if row["where"] == "local" and path and _asked(row["url"] + path)[0] != 200:
            said = f"{name} runs (process {row['pid']}) and does not answer at {row['url']}"
            yield Finding("services", PROBLEM, said, "ringmo down && ringmo up")
        elif row["where"] == "local":
            yield Finding("services", OK, f"{name} runs (process {row['pid']})")
    if not recorded:
        yield Finding("services", OK, "none started here")


def _made_by(place: Place) -> Iterator[Finding]:
    if place.workspace is None:
        return
    try:
        made = (place.workspace.root / MADE_BY).read_text().strip()
    except FileNotFoundError:
        return  # made before it was noted, or the checkout itself
    if made == ringmo.__version__:
        yield Finding("made by", OK, f"ringmo {made}")
    else:
        said = f"ringmo {made}; this is {ringmo.__version__}"
        todo = f"see the changelog; then: echo {ringmo.__version__} > {MADE_BY}"
        yield Finding("made by", NOTE, said, todo)


def _graph(place: Place) -> Iterator[Finding]:
    """dvc.yaml against this version's: what ran must be what this code knows."""
    if place.workspace is None:
        return
    ours, theirs = (
        (read_yaml(path) or {}).get("stages") or {}
        for path in (place.workspace.root / "dvc.yaml", template("dvc.yaml"))
    )
    absent = sorted(theirs.keys() - ours.keys())
    other = sorted(name for name in theirs.keys() & ours.keys() if ours[name] != theirs[name])
    own = sorted(ours.keys() - theirs.keys())
    todo = f"take this version's: cp {template('dvc.yaml')} {place.workspace.root}"
    if absent or other:
        said = "; ".join(
            f"{what}: {', '.join(names)}"
            for what, names in (("stages missing", absent), ("stages that differ", other))
            if names
        )
        yield Finding("dvc.yaml", PROBLEM, said, todo)
    elif own:
        yield Finding("dvc.yaml", NOTE, f"stages of your own: {', '.join(own)}")
    else:
        yield Finding("dvc.yaml", OK, "as this version's")
    revisions = place.workspace.root / "revisions.yaml"
    there = (read_yaml(revisions) or {}) if revisions.is_file() else {}
    again = sorted(name for name, number in REVISIONS.items() if there.get(name, number) != number)
    if again:
        said = f"results of {', '.join(again)} are of another version's code"
        yield Finding("revisions", NOTE, said, "ringmo run makes them anew")


def _parameters(place: Place) -> Iterator[Finding]:
    """Keys that this version has and params.yaml leaves out: their defaults are used."""
    if place.workspace is None or place.config is None:
        return
    ours, theirs = (
        {key for key in flatten(read_yaml(path)) if not key.startswith(("sensors.", *WHOLE))}
        for path in (place.workspace.params_file, template("params.yaml"))
    )
    # A task that is not trained here needs no section.
    absent = sorted(
        key
        for key in theirs - ours
        if not key.startswith(("finetune.", "gate.", "compare.labels."))
        or key.split(".")[1] in place.config.tasks
    )
    if absent:
        said = f"left out: {', '.join(absent[:5])}" + f" and {len(absent) - 5} more" * (
            len(absent) > 5
        )
        todo = f"defaults are used; with comments in {template('params.yaml')}"
        yield Finding("params.yaml", NOTE, said, todo)
    else:
        yield Finding("params.yaml", OK, "has every key of this version")


def _links(place: Place) -> Iterator[Finding]:
    """Whether store and cache may share their bytes on disk."""
    if place.workspace is None:
        return
    from ringmo.data import versions

    cache = versions.Cache(place.workspace).root
    source = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    into = place.workspace.store if place.workspace.store.is_dir() else place.workspace.root
    with tempfile.NamedTemporaryFile(dir=source, prefix=".doctor-") as file:
        file.write(b"x" * 4096)
        file.flush()
        target = into / f".doctor-{os.getpid()}"
        try:
            how = _reflink(file.fileno(), target) or _hardlink(Path(file.name), target)
        finally:
            target.unlink(missing_ok=True)
    if how:
        yield Finding("DVC links", OK, f"{how} between store and cache")
    else:
        todo = "put both on one file system that has links; else each shard is on disk twice"
        yield Finding("DVC links", NOTE, f"none between {into} and {source}", todo)


def _reflink(source: int, target: Path) -> str | None:
    with target.open("wb") as file:
        try:
            fcntl.ioctl(file.fileno(), FICLONE, source)
        except OSError:
            file.close()
            target.unlink()
            return None
    return "reflinks"


def _hardlink(source: Path, target: Path) -> str | None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):
            raise BadInput(f"{target.parent} cannot be written: {error.strerror}") from None
        return None
    return "hard links"


def _locks(place: Place) -> Iterator[Finding]:
    if place.workspace is None:
        return
    from ringmo import cleaning
    from ringmo.data import versions

    dead = [(pid, cmd) for pid, cmd, lives in versions.at_work(place.workspace) if not lives]
    for pid, command in dead:
        said = f"DVC notes `{command}` (process {pid}), which is gone"
        yield Finding("locks", NOTE, said, "nothing: the next `ringmo run` takes it away")
    who = cleaning.at_work(place.workspace)
    for one in who:
        yield Finding("locks", NOTE, f"at work: {one}", "another run here waits for it")
    if not (dead or who):
        yield Finding("locks", OK, "nobody is at work")


def _promotions(place: Place) -> Iterator[Finding]:
    """Moves of an alias that were interrupted, and messages that nobody took."""
    if place.workspace is None:
        return
    from ringmo.registry import outbox
    from ringmo.registry.promotion import EXPERIMENT
    from ringmo.registry.tracker import Glance

    odd = False
    for tags in Glance(place.workspace).claims(f"{EXPERIMENT}/"):
        odd = True
        said = f"{tags.get('what')} of {tags.get('model')}/{tags.get('to')} is half done"
        todo = f"ringmo models {tags.get('model')} --history; the next promotion or run finishes it"
        yield Finding("promotions", PROBLEM, said, todo)
    waiting = len(outbox.waiting(place.workspace))
    if waiting:
        odd = True
        said = f"{waiting} messages wait for {place.config and place.config.promotion.webhook}"
        yield Finding("promotions", NOTE, said, "they are sent when it answers")
    if not odd:
        yield Finding("promotions", OK, "none is half done")


CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", _python),
    ("packages", _packages),
    ("gpu", _gpu),
    ("memory", _memory),
    ("shared memory", _shared_memory),
    ("open files", _open_files),
    ("disk", _disk),
    ("time zone", _time_zone),
    ("environment", _variables),
    ("telemetry", _telemetry),
    ("secrets", _secrets),
    ("servers", _servers),
    ("S3", _buckets),
    ("ports", _ports),
    ("services", _own_services),
    ("made by", _made_by),
    ("dvc.yaml", _graph),
    ("params.yaml", _parameters),
    ("DVC links", _links),
    ("locks", _locks),
    ("promotions", _promotions),
)


def problems(findings: list[Finding]) -> int:
    return sum(one.state == PROBLEM for one in findings)


def result(findings: list[Finding]) -> dict[str, Any]:
    return {"problems": problems(findings), "checks": [asdict(one) for one in findings]}


def text(findings: list[Finding]) -> str:
    """The findings as a table for people, and how many want to be mended."""
    rows = [(one.check, one.state, one.found, one.todo) for one in findings]
    count = problems(findings)
    end = f"{count} to mend." if count else "Nothing to mend."
    table = console.table(rows, ("check", "state", "found", "what to do"))
    return f"{table}\n\n{end}"
