"""Public data sets by name, downloaded and checked by torchgeo: `ringmo data fetch eurosat`.

A set comes into a folder of its own under a temporary name, which it loses when every archive's
checksum was right and all is unpacked: what breaks off leaves nothing. torchgeo is an optional
extra and takes long to import, so that only a fetch itself imports it.
"""

import contextlib
import difflib
import fcntl
import gzip
import hashlib
import http.client
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import sys
import tarfile
import urllib.error
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ringmo import console
from ringmo.data.sources import IMAGE_SUFFIXES
from ringmo.errors import AnswerIsNo, BadInput, Unreachable
from ringmo.stage import write_json

FACTS = "fetched.json"  # written last: a folder that has it is whole
ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
TIMEOUT_S = 60  # without a byte; urllib alone would wait for ever


@dataclass(frozen=True)
class Known:
    """A data set: its class in torchgeo.datasets, and where below its folder the imagery lies.

    splits: torchgeo brings one a call; None where one call brings all.
    """

    of: str
    what: str
    imagery: str = ""
    splits: tuple[str, ...] | None = None
    by_hand: bool = False


_EUROSAT = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
_THREE = ("train", "val", "test")
_TWO = ("train", "test")
SETS = {
    "eurosat": Known(
        "EuroSAT", "10 classes of land use, Sentinel-2, 13 bands with B8A last", _EUROSAT, _THREE
    ),
    "eurosat100": Known("EuroSAT100", "100 images of eurosat, to try with", _EUROSAT, _THREE),
    "resisc45": Known("RESISC45", "NWPU-RESISC45, 45 classes of scenes, RGB", "NWPU-RESISC45"),
    "ucmerced": Known(
        "UCMerced", "UC Merced, 21 classes of land use, RGB", "UCMerced_LandUse/Images"
    ),
    "patternnet": Known("PatternNet", "38 classes of scenes, RGB", "PatternNet/images"),
    "millionaid": Known(
        "MillionAID", "Million-AID, a million scenes of 51 classes, RGB", "", _TWO, True
    ),
    "loveda": Known("LoveDA", "land cover of 7 classes, RGB, masks", "", _THREE),
    "landcoverai": Known("LandCoverAI", "land cover of 5 classes, RGB, masks", "output"),
    "gid15": Known("GID15", "land cover of 15 classes, Gaofen-2, masks", "GID"),
    "potsdam": Known("Potsdam2D", "ISPRS Potsdam, 6 classes, RGB and NIR, masks", by_hand=True),
    "vaihingen": Known("Vaihingen2D", "ISPRS Vaihingen, 6 classes, masks", by_hand=True),
    "inria": Known("InriaAerialImageLabeling", "buildings, RGB, masks", "", by_hand=True),
    "deepglobe": Known(
        "DeepGlobeLandCover", "land cover of 7 classes, RGB, masks", "data", by_hand=True
    ),
    "levir-cd": Known("LEVIRCD", "pairs of dates, change of buildings, RGB"),
    "levir-cd+": Known("LEVIRCDPlus", "more such pairs", "LEVIR-CD+"),
    "oscd": Known("OSCD", "Onera, pairs of dates, change of cities, Sentinel-2"),
    "xview2": Known("XView2", "pairs of dates, damaged buildings, RGB", "", _TWO, True),
    "dior": Known("DIOR", "20 classes of objects, RGB, boxes", "", _TWO),
    "dota": Known("DOTA", "DOTA 2.0, 18 classes, RGB, oriented boxes", "", ("train", "val")),
    # Of its test images torchgeo 0.8.1 has a wrong checksum; they have no boxes either.
    "fair1m": Known("FAIR1M", "37 classes, RGB, oriented boxes", "", ("train", "val")),
    "soda-a": Known("SODAA", "small objects of 9 classes, RGB, oriented boxes"),
}


def listing() -> list[dict[str, str]]:
    """Every set: name, what, and how it comes."""
    ways = {False: "downloads", True: "by hand: torchgeo cannot download it"}
    return [{"name": n, "what": s.what, "how": ways[s.by_hand]} for n, s in SETS.items()]


def fetch(name: str, to: Path) -> dict[str, Any]:
    """Bring a public data set into the folder `to`/`name`; once it is there, only say where.

    A set that cannot be downloaded is checked and unpacked from the archives in that folder.

    Returns:
        name, folder (of its imagery), images, pages (its makers'), papers (to cite), next (the
        command that trains on it).

    Raises:
        BadInput: no such set, no torchgeo, archives that must be brought by hand, no space.
        AnswerIsNo: what came has another checksum.
        Unreachable: the network does not answer, or broke off.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name.lower(), SETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETS)}"
        raise BadInput(f"{name}: no such data set; {hint}")
    known = SETS[name]
    target = to.expanduser().resolve() / name
    try:
        if not (target / FACTS).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target.parent):
                if not (target / FACTS).is_file():  # another fetch may have brought it meanwhile
                    _bring(name, known, target)
        facts = json.loads((target / FACTS).read_text())
        folder = target / known.imagery
        folder = folder if folder.is_dir() else target
        images = sum(
            Path(file).suffix.lower() in IMAGE_SUFFIXES
            for _, _, files in os.walk(folder)
            for file in files
        )
    except OSError as error:
        said = error.strerror or str(error).splitlines()[0]
        raise BadInput(f"fetch: {error.filename or target.parent}: {said}") from error
    except ValueError:
        raise BadInput(f"{target / FACTS} is damaged: remove {target}, then fetch again") from None
    return {
        "name": name,
        "folder": str(folder),
        "images": images,
        "pages": facts["pages"],
        "papers": facts["papers"],
        "next": f"ringmo run --data {shlex.quote(str(folder))}",
    }


def text(found: dict[str, Any]) -> str:
    """What `fetch` returned, for people."""
    rows = [(name, found[name]) for name in ("name", "folder", "images")]
    rows += [("licence", f"torchgeo tells none: see {found['pages'][0]} before you use it")]
    rows += [("cite", paper) for paper in found["papers"]]
    return f"{console.table(rows)}\nNext: {found['next']}"


def _dataset(known: Known) -> Any:
    """The set's class."""
    if not hasattr(tarfile, "data_filter"):
        raise BadInput("fetch: unpacking safely needs Python 3.11.4 or newer")
    console.note("fetch: loading torchgeo")
    try:
        import torchgeo.datasets
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "torchgeo":
            raise
        raise BadInput("torchgeo is not installed: `pip install 'ringmo[fetch]'`") from None
    return getattr(torchgeo.datasets, known.of)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One fetch at a time into a folder; the next waits."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note(f"fetch: another one is at work in {folder}, waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bring(name: str, known: Known, target: Path) -> None:
    dataset = _dataset(known)
    sums = checksums(dataset)
    if known.by_hand:
        _check_by_hand(name, sums, dataset, target)
    elif target.exists() and any(target.iterdir()):
        raise BadInput(f"{target} is in the way: no fetch finished it; remove it, or choose --to")
    part = target.with_name(f".{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        if known.by_hand:
            for file in sums:
                if (target / file).is_file():
                    (part / file).parent.mkdir(parents=True, exist_ok=True)
                    (part / file).symlink_to(target / file)
        with _answering(dataset, part, sums):
            _call(known, dataset, part, sums)
        for file in sums:
            if file.endswith(ARCHIVES):
                (part / file).unlink(missing_ok=True)
        pages, papers = _told(dataset)
        facts = {"name": name, "class": f"{dataset.__module__}.{dataset.__name__}", "md5": sums}
        facts |= {"fetched": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(part / FACTS, facts | {"pages": pages, "papers": papers})
        if not known.by_hand:
            shutil.rmtree(target, ignore_errors=True)
            part.replace(target)
            return
        made = sorted(part.iterdir(), key=lambda path: path.name == FACTS)  # the facts come last
        if there := [path.name for path in made if (target / path.name).exists()]:
            raise BadInput(f"{target / there[0]} is in the way: remove it, then fetch again")
        for path in made:
            path.replace(target / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_by_hand(name: str, sums: dict[str, str], dataset: Any, target: Path) -> None:
    """Before anything is unpacked: is something there, and is it what torchgeo knows?"""
    there = [file for file in sums if (target / file).is_file()]
    if not there:
        pages = " or ".join(_told(dataset)[0])
        raise BadInput(
            f"{name}: torchgeo cannot download it: bring {', '.join(sums)} from {pages} into "
            f"{target}, then fetch again"
        )
    for file in there:
        if not _is_md5(sums[file]):
            console.note(f"fetch: {file}: not checked, torchgeo's checksum of it is cut short")
        elif (found := _md5(target / file)) != sums[file]:
            raise BadInput(
                f"{target / file} is not whole, or another version: MD5 {found}, wanted "
                f"{sums[file]}: bring it again"
            )


def _call(known: Known, dataset: Any, part: Path, sums: dict[str, str]) -> None:
    """Let torchgeo download, check and unpack: it does when an object is made."""
    from torchgeo.datasets.errors import DatasetNotFoundError

    options: dict[str, Any] = {"root": str(part)}
    options["checksum"] = all(map(_is_md5, sums.values()))
    if "download" in inspect.signature(dataset).parameters:
        options["download"] = True
    missing = []
    calls = [{"split": split} for split in known.splits] if known.splits else [{}]
    for call in calls:
        try:
            dataset(**options, **call)
        except DatasetNotFoundError:
            missing.append(call.get("split", "all"))
    if len(missing) == len(calls):
        raise BadInput(f"{known.of}: not all of {', '.join(sums)} are there")
    if missing:
        console.note(f"fetch: without {', '.join(missing)}: not there")


@contextlib.contextmanager
def _answering(dataset: Any, part: Path, sums: dict[str, str]) -> Iterator[None]:
    """Say what went wrong outside in one line, and keep what torchgeo prints off the result."""
    hosts = " or ".join(sorted({urlparse(u).netloc for u in _urls(dataset)})) or "the network"
    before = socket.getdefaulttimeout()
    with contextlib.ExitStack() as stack:
        talk: Any = sys.stderr
        if console.quiet:
            talk = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stderr(talk))
        stack.enter_context(contextlib.redirect_stdout(talk))
        socket.setdefaulttimeout(TIMEOUT_S)
        try:
            yield
        except urllib.error.HTTPError as error:
            what = f"{urlparse(error.url).netloc} answers {error.code} ({error.reason})"
            raise Unreachable(f"{what} for {Path(urlparse(error.url).path).name}") from None
        except tarfile.FilterError as error:
            raise BadInput(f"refused to unpack: {error}") from None
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise BadInput(f"damaged archive: {error}") from None
        except RuntimeError as error:
            if "gdown" in str(error):
                raise BadInput(f"{hosts} needs one more package: `pip install gdown`") from None
            if "corrupted" not in str(error):
                raise
            raise _unlike(part, sums, hosts) from None
        # torchgeo passes on whatever its many ways of downloading raise: sorted just below.
        except Exception as error:
            if not _of_network(error):
                raise
            reason = getattr(error, "reason", None) or error
            said = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
            raise Unreachable(
                f"the network ({hosts}) does not answer: {said.splitlines()[0]}; where it is "
                f"closed, bring the set another way and give its folder to `ringmo run --data`"
            ) from None
        finally:
            socket.setdefaulttimeout(before)


def _of_network(error: Exception) -> bool:
    outside = (
        *(urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError),
        *(http.client.HTTPException, socket.gaierror),
    )
    # What fetches from Google Drive has errors of its own.
    return isinstance(error, outside) or type(error).__module__.startswith(("requests", "gdown"))


def _unlike(part: Path, sums: dict[str, str], hosts: str) -> Exception:
    """Why a download is not what its checksum says."""
    for file, wanted in sums.items():
        path = part / file
        if not path.is_file() or not _is_md5(wanted) or (found := _md5(path)) == wanted:
            continue
        if file.endswith(ARCHIVES) and not _whole(path):
            return Unreachable(
                f"{hosts} broke off: {file} ends after {path.stat().st_size} bytes, or is another "
                f"page in its place; try again"
            )
        return AnswerIsNo(
            f"{file} from {hosts} has MD5 {found} and should have {wanted}: the file has changed "
            f"there, or on its way; nothing was kept"
        )
    return AnswerIsNo(f"what came from {hosts} has another checksum: nothing was kept")


def _whole(path: Path) -> bool:
    """Whether an archive's end is there."""
    if path.suffix == ".zip":
        return zipfile.is_zipfile(path)
    try:
        with gzip.open(path) if path.suffix != ".tar" else path.open("rb") as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


def checksums(dataset: Any) -> dict[str, str]:
    """File → MD5, as a class of torchgeo.datasets tells them in one of its several ways."""
    found: dict[str, str] = {}

    def walk(value: Any) -> None:
        if not isinstance(value, dict):
            return
        file, md5 = value.get("filename"), value.get("md5") or value.get("md5sum")
        if isinstance(file, str) and isinstance(md5, str):
            found[file] = md5
        else:
            for inner in value.values():
                walk(inner)

    def pair(files: Any, md5s: Any) -> None:
        if isinstance(files, dict) and isinstance(md5s, dict):
            for key in files.keys() & md5s.keys():
                pair(files[key], md5s[key])
        elif isinstance(files, str) and isinstance(md5s, str):
            found[files] = md5s
        elif isinstance(files, tuple) and isinstance(md5s, tuple):
            found.update(zip(files, md5s, strict=True))

    for _, value in inspect.getmembers(dataset, lambda value: isinstance(value, dict)):
        walk(value)
    ways = (("filename", "md5"), ("filenames", "md5s"), ("paths", "md5s"))
    for files, md5s in (*ways, ("split_filenames", "split_md5s")):
        pair(getattr(dataset, files, None), getattr(dataset, md5s, None))
    if not found:
        found = dict(dataset.md5s)
    return dict(sorted(found.items()))


def _urls(dataset: Any) -> list[str]:
    """Addresses among a class's values."""

    def within(value: Any) -> Iterable[str]:
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            yield value
        elif isinstance(value, dict | tuple | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from within(inner)

    return [u for n, v in inspect.getmembers(dataset) if n[:1] != "_" for u in within(v)]


def _told(dataset: Any) -> tuple[list[str], list[str]]:
    """Pages and papers that the class's text names."""
    texts = (inspect.cleandoc(kind.__doc__ or "") for kind in inspect.getmro(dataset))
    told = next((one for one in texts if "please cite" in one), "")
    head, _, cited = told.partition("please cite")
    pages = [re.sub(r"\s", "", link) for link in re.findall(r"<(https?://[^>]+)>", head)]
    return list(dict.fromkeys(pages)), re.findall(r"^\* (https?://\S+)", cited, re.MULTILINE)


def _is_md5(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
