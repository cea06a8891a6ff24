"""Public data sets: torchgeo's own classes download from a server on this machine."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_imagery import tree

from ringmo import cli
from ringmo.data import fetch
from ringmo.data.sources import list_images
from ringmo.errors import AnswerIsNo, BadInput, Unreachable

pytestmark = pytest.mark.slow  # torchgeo takes its time to import

CLASSES = ("Forest", "River")
IMAGES = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"


class Server:
    """Gives the bytes of `files`; `how` says what it does wrong."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.how = "well"
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.asked[name] += 1
                if outer.how == "refuses":
                    self.send_error(503)
                    return
                if name not in outer.files:
                    self.send_error(404)
                    return
                data = outer.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if not name.endswith(".zip") or outer.how == "well":
                    self.wfile.write(data)
                    return
                self.wfile.write(data[: len(data) // 2])
                if outer.how == "stalls":
                    self.wfile.flush()
                    time.sleep(2)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def geotiff(seed: int, bands: int = 13) -> bytes:
    from rasterio.io import MemoryFile

    pixels = np.random.default_rng(seed).integers(0, 4000, (bands, 16, 16), np.uint16)
    profile = {"driver": "GTiff", "width": 16, "height": 16, "count": bands, "dtype": "uint16"}
    with MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(pixels)
        return bytes(memory.read())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def eurosat(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """torchgeo's EuroSAT100, as if its makers had put six images on our server."""
    from torchgeo.datasets import EuroSAT100

    images = {
        f"{IMAGES}/{name}/{name}_{i}.tif": geotiff(10 * c + i)
        for c, name in enumerate(CLASSES)
        for i in range(3)
    }
    splits = {
        split: "".join(f"{name}_{i}.jpg\n" for name in CLASSES).encode()
        for i, split in enumerate(("train", "val", "test"))
    }
    server.files = {EuroSAT100.filename: zipped(images)}
    server.files |= {EuroSAT100.split_filenames[s]: data for s, data in splits.items()}
    monkeypatch.setattr(EuroSAT100, "url", server.url)
    monkeypatch.setattr(EuroSAT100, "md5", md5(server.files[EuroSAT100.filename]))
    sums = {split: md5(data) for split, data in splits.items()}
    monkeypatch.setattr(EuroSAT100, "split_md5s", sums)
    return images


@pytest.fixture
def inria(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive that a user brings by hand."""
    from torchgeo.datasets import InriaAerialImageLabeling

    root = "AerialImageDataset/train"
    data = zipped({f"{root}/{kind}/a1.tif": geotiff(1, 3) for kind in ("images", "gt")})
    monkeypatch.setattr(InriaAerialImageLabeling, "md5", md5(data))
    return data


def test_what_came_is_checked_unpacked_and_ready_to_train_on(
    eurosat: dict[str, bytes], server: Server, tmp_path: Path
) -> None:
    found = fetch.fetch("eurosat100", tmp_path / "public")
    folder = tmp_path / "public" / "eurosat100" / IMAGES
    assert (found["folder"], found["images"]) == (str(folder), 6)
    assert found["next"] == f"ringmo run --data {folder}"
    assert found["papers"] and found["pages"][0] in fetch.text(found)
    assert {f"{IMAGES}/{name}": data for name, data in tree(folder).items()} == eurosat
    listed = list_images(str(folder), folder, "auto").images
    assert {image.label for image in listed} == set(CLASSES)
    assert [path.name for path in (tmp_path / "public").iterdir()] == ["eurosat100"]
    assert not list(tmp_path.rglob("*.zip")), "an archive that is unpacked takes space twice"
    asked = dict(server.asked)
    assert fetch.fetch("eurosat100", tmp_path / "public") == found
    assert server.asked == asked, "what is there is not asked for again"


def nothing_left(to: Path) -> bool:
    return not to.exists() or not list(to.iterdir())


def test_other_bytes_than_the_checksum_says_are_refused(
    eurosat: dict[str, bytes], server: Server, tmp_path: Path
) -> None:
    other = zipped({**eurosat, f"{IMAGES}/Forest/more.tif": b"planted"})
    server.files["EuroSAT100.zip"] = other
    with pytest.raises(AnswerIsNo, match=rf"EuroSAT100.zip .* has MD5 {md5(other)}"):
        fetch.fetch("eurosat100", tmp_path / "public")
    assert nothing_left(tmp_path / "public")


@pytest.mark.parametrize("how", ["breaks off", "stalls", "refuses"])
def test_a_connection_that_fails_leaves_nothing_and_can_be_tried_again(
    how: str,
    eurosat: dict[str, bytes],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    server.how = how
    with pytest.raises(Unreachable) as error:
        fetch.fetch("eurosat100", tmp_path / "public")
    said = {"breaks off": "broke off", "stalls": "timed out", "refuses": "answers 503"}
    assert said[how] in str(error.value) and "\n" not in str(error.value)
    assert nothing_left(tmp_path / "public")
    server.how = "well"
    assert fetch.fetch("eurosat100", tmp_path / "public")["images"] == 6


def test_a_closed_network_is_one_line(
    eurosat: dict[str, bytes], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.close()
    to = str(tmp_path / "public")
    assert cli.main(["data", "fetch", "eurosat100", "--to", to, "--quiet"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"({server.url[7:-1]}) does not answer" in said.err
    assert nothing_left(tmp_path / "public")


def test_json_is_one_object_whatever_torchgeo_prints(
    eurosat: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "fetch", "eurosat100", "--to", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


def test_two_at_once_download_once(
    eurosat: dict[str, bytes], server: Server, tmp_path: Path
) -> None:
    found: list[Any] = []
    both = [
        threading.Thread(target=lambda: found.append(fetch.fetch("eurosat100", tmp_path)))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(found) == 2 and found[0] == found[1]
    alone = server.asked["EuroSAT100.zip"]
    server.asked.clear()
    fetch.fetch("eurosat100", tmp_path / "again")
    assert server.asked["EuroSAT100.zip"] == alone


def test_what_no_fetch_finished_is_not_overwritten(
    eurosat: dict[str, bytes], tmp_path: Path
) -> None:
    mine = tmp_path / "eurosat100" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(BadInput, match="is in the way"):
        fetch.fetch("eurosat100", tmp_path)
    assert mine.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_archives_brought_by_hand_are_checked_and_unpacked(inria: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "inria" / "NEW2-AerialImageDataset.zip"
    with pytest.raises(BadInput, match=rf"bring {archive.name} from https://project.inria.fr"):
        fetch.fetch("inria", tmp_path)
    archive.parent.mkdir()
    archive.write_bytes(inria[:-30])
    with pytest.raises(BadInput, match="not whole, or another version"):
        fetch.fetch("inria", tmp_path)
    assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(inria)
    found = fetch.fetch("inria", tmp_path)
    assert found["images"] == 2 and archive.read_bytes() == inria
    assert [path.name for path in tmp_path.iterdir()] == ["inria"]


def test_a_zip_cannot_write_outside_its_folder(
    inria: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchgeo.datasets import InriaAerialImageLabeling

    stream = io.BytesIO(inria)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("../../out.tif", b"out")
        archive.writestr("/tmp/ringmo-out.tif", b"out")
    monkeypatch.setattr(InriaAerialImageLabeling, "md5", md5(stream.getvalue()))
    to = tmp_path / "deep" / "public"
    (to / "inria").mkdir(parents=True)
    (to / "inria" / "NEW2-AerialImageDataset.zip").write_bytes(stream.getvalue())
    fetch.fetch("inria", to)
    assert not Path("/tmp/ringmo-out.tif").exists()
    assert {p.relative_to(to).parts[0] for p in to.rglob("*out.tif")} == {"inria"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["public"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize("kind", ["path", "link"])
def test_a_tar_that_would_write_outside_its_folder_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchgeo.datasets import XView2

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo("../../out.png" if kind == "path" else "train/images")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(member, io.BytesIO(b""))
    data = stream.getvalue()
    name = "train_images_labels_targets.tar.gz"
    metadata = {**XView2.metadata, "train": {**XView2.metadata["train"], "md5": md5(data)}}
    monkeypatch.setattr(XView2, "metadata", metadata)
    to = tmp_path / "deep" / "public"
    (to / "xview2").mkdir(parents=True)
    (to / "xview2" / name).write_bytes(data)
    with pytest.raises(BadInput, match="refused to unpack"):
        fetch.fetch("xview2", to)
    assert [p.name for p in tmp_path.rglob("*") if not p.is_dir()] == [name]


def test_each_set_is_as_torchgeo_has_it(tmp_path: Path) -> None:
    import inspect

    import torchgeo.datasets
    from torchgeo.datasets.errors import DatasetNotFoundError

    for name, known in fetch.SETS.items():
        dataset = getattr(torchgeo.datasets, known.of)
        downloads = "download" in inspect.signature(dataset).parameters
        assert downloads != known.by_hand, name
        sums = fetch.checksums(dataset)
        assert any(file.endswith(fetch.ARCHIVES) for file in sums), name
        if downloads:
            # Nothing that this machine downloads is unpacked unchecked.
            assert all(len(md5) == 32 for md5 in sums.values()), name
        pages, papers = fetch._told(dataset)
        assert pages and papers, name
        for split in known.splits or (None,):
            call = {} if split is None else {"split": split}
            with pytest.raises(DatasetNotFoundError):
                dataset(root=str(tmp_path), checksum=True, **call)


def test_names_and_missing_parts_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ["--to", str(tmp_path / "public")]
    for name in ("torchgeo", "torchgeo.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments, said in (
        (["resisc-45", *to], "did you mean resisc45?"),
        (["isaid", *to], "there are eurosat"),
        (["ucmerced", *to], "pip install 'ringmo[fetch]'"),
        ([], "There are eurosat"),
    ):
        assert cli.main(["data", "fetch", *arguments]) == 2
        error = capsys.readouterr().err.removeprefix("fetch: loading torchgeo\n")
        assert said in error and error.count("\n") == 1
    assert nothing_left(tmp_path / "public")


def test_the_list_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ringmo import cli; assert cli.main(['data', 'fetch', '--list']) == 0; "
        "assert not {'torchgeo', 'torch'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"{name} " in done.stdout for name in fetch.SETS)
