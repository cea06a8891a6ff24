"""Imagery in a real S3 server, and in one that throttles, breaks off and does not answer."""

import http.client
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from small_imagery import class_folders, geotiff, tree, write

from ringmo.data import buckets
from ringmo.data.sources import list_images
from ringmo.errors import BadInput, Unreachable


@pytest.fixture
def bucket(s3, tmp_path) -> Path:
    """The folder that the server shows as s3://bucket."""
    return tmp_path / "s3" / "bucket"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(buckets, "FIRST_PAUSE_S", 0.01)


class Faulty(ThreadingHTTPServer):
    """Passes requests on to a server, the first of them with a fault each.

    faults: what happens to the coming requests for objects: `throttle` answers 503, `truncate`
    ends the answer in its middle, `drop` gives none.
    """

    daemon_threads = True

    def __init__(self, to: str) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.to = urlsplit(to).netloc
        self.faults: list[str] = []
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Connections that break off are the point."""


class Passing(BaseHTTPRequestHandler):
    server: Faulty

    def do_GET(self) -> None:
        is_object = "list-type" not in self.path
        fault = ""
        if is_object:
            self.server.asked.append(self.path)
            fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "throttle":
            body = b"<Error><Code>SlowDown</Code><Message>slower</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        if fault == "drop":
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(self.server.to)
        upstream.request("GET", self.path, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)
        self.close_connection = fault == "truncate"

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def faulty(s3) -> Iterator[Faulty]:
    server = Faulty(s3)
    yield server
    server.shutdown()
    server.server_close()


def test_a_prefix_is_ingested_as_its_folder_would_be(run, workspace, manifest, s3, bucket):
    source = class_folders(bucket / "imagery", classes=2, each=6)
    write(bucket / "other" / "far.jpg", 999)
    (source / "notes.txt").write_text("no image")
    geotiff(source / "class0" / "large.tif", 5, 500_000, 5_000_000, side=600, gsd=10)
    report = run("s3://bucket/imagery", ingest__endpoint=s3)
    tiles = manifest().drop(columns=["source_root"])
    assert report.figures["images_found"] == 13 and report.figures["other_files"] == 1
    assert sorted(tiles["label"].unique()) == ["class0", "class1"]
    assert not list((workspace.state / "fetched").glob("*")), "fetched objects stay behind"
    shutil.rmtree(workspace.store)
    shutil.rmtree(workspace.state)
    run(source)
    assert tiles.equals(manifest().drop(columns=["source_root"]))


def test_only_what_is_new_or_changed_is_fetched(run, workspace, manifest, faulty, bucket):
    source = class_folders(bucket / "imagery", classes=2, each=6)
    run("s3://bucket/imagery/", ingest__endpoint=faulty.address)
    assert len(faulty.asked) == 12
    before = tree(workspace.store)
    faulty.asked.clear()
    assert run("s3://bucket/imagery/", ingest__endpoint=faulty.address).figures["unchanged"]
    assert faulty.asked == [] and tree(workspace.store) == before
    write(source / "class1" / "new.jpg", 77)
    write(source / "class0" / "0000.jpg", 78)
    (source / "class0" / "0001.jpg").unlink()
    report = run("s3://bucket/imagery/", ingest__endpoint=faulty.address)
    assert sorted(path.rpartition("/")[2].partition("?")[0] for path in faulty.asked) == [
        "0000.jpg",
        "new.jpg",
    ]
    assert report.figures["new_tiles"] == 2 and report.figures["tiles"] == 12


@pytest.mark.parametrize("fault", ["throttle", "truncate", "drop"])
def test_faults_are_tried_again(run, manifest, faulty, bucket, fault):
    class_folders(bucket / "imagery", classes=2, each=3)
    faulty.faults = [fault, "", fault, fault, "", fault]
    report = run("s3://bucket/imagery", ingest__endpoint=faulty.address)
    assert report.figures["tiles"] == 6 and report.figures["set_aside"] == 0
    assert len(faulty.asked) == 10


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["throttle", "truncate", "drop"])
def test_faults_that_stay_end_in_one_line_and_change_nothing(run, workspace, faulty, bucket, fault):
    source = class_folders(bucket / "imagery", classes=2, each=3)
    run("s3://bucket/imagery", ingest__endpoint=faulty.address)
    before = tree(workspace.store)
    write(source / "class1" / "new.jpg", 77)
    faulty.faults = [fault] * 200
    with pytest.raises(Unreachable, match="s3://bucket/imagery") as error:
        run("s3://bucket/imagery", ingest__endpoint=faulty.address)
    assert "\n" not in str(error.value) and tree(workspace.store) == before
    faulty.faults = []
    assert run("s3://bucket/imagery", ingest__endpoint=faulty.address).figures["tiles"] == 7


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line(run, workspace, s3, bucket, monkeypatch):
    class_folders(bucket / "imagery", classes=2, each=3)

    def said(source: str, kind: type[Exception] = BadInput, endpoint: str = s3) -> str:
        with pytest.raises(kind) as error:
            run(source, ingest__endpoint=endpoint)
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
        assert not workspace.store.exists() or not list(workspace.store.iterdir())
        return str(error.value)

    assert "no such bucket" in said("s3://nowhere/imagery")
    assert "no image" in said("s3://bucket/empty")
    assert "s3://bucket" in said("s3://bucket/imagery", Unreachable, "http://127.0.0.1:9")
    assert "s3://" in said("s3://bucket/imagery", endpoint="no address")
    assert "reads folders, lists and s3" in said("gs://bucket/imagery")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "refused" in said("s3://bucket/imagery")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "credentials" in said("s3://bucket/imagery")


def test_an_object_that_goes_while_it_is_read_is_set_aside(run, s3, bucket, monkeypatch):
    source = class_folders(bucket / "imagery", classes=2, each=12)
    objects = buckets.Bucket.objects

    def listed(self: buckets.Bucket) -> Iterator[buckets.Object]:
        yield from list(objects(self))
        (source / "class0" / "0003.jpg").unlink(missing_ok=True)

    monkeypatch.setattr(buckets.Bucket, "objects", listed)
    report = run("s3://bucket/imagery", ingest__endpoint=s3)
    assert report.figures["tiles"] == 23
    assert report.figures["set_aside_reasons"] == {"cannot be read: it is gone": 1}


def test_labels_in_a_bucket_are_those_of_its_folder(s3, bucket, tmp_path):
    """Masks, boxes, a Shapefile of several objects, and second dates; nothing stays here."""
    import rasterio
    from test_layouts import VOC, cut, draw, grey, pair, save, scene, squares, voc, window

    source = bucket / "sets"
    for name in ("0", "1"):
        pair(source / "masks", grey([0, 1]), name)
    voc(source / "voc", VOC)
    for date in ("A", "B"):
        write(source / "change" / date / "x.png", ord(date), "PNG")
    save(source / "change" / "label" / "x.png", grey([0, 255]))
    scene(source / "vectors" / "scene.tif")
    draw(source / "vectors" / "scene.shp", "EPSG:3857", squares(), ["a", "b", "c", "d"])
    fetched = tmp_path / "fetched"
    for name in ("masks", "voc", "change", "vectors"):
        remote = buckets.Bucket(f"s3://bucket/sets/{name}", s3)
        listings = [
            list_images("in", where, "auto", fetched=fetched) for where in (source / name, remote)
        ]
        assert not list(fetched.glob("*")), "what was looked at stays"
        here, there = (listing.images for listing in listings)
        assert [i.path for i in here] == [i.path for i in there]
        for one, other in zip(here, there, strict=True):
            assert (one.masks, one.layout, one.second) == (other.masks, other.layout, other.second)
            assert [a.path for a in one.attachments] == [a.path for a in other.attachments]
            with rasterio.open(one.file) as opened:
                size = (opened.height, opened.width)
                where = {"size": size, "crs": opened.crs, "transform": opened.transform}
            members = [cut(image, window(0, 0, *size), **where) for image in (one, other)]
            assert members[0] == members[1] and (one.attachments == ()) == (members[0] == [])
        assert not list(fetched.glob("*")), "fetched labels stay behind"
    image = there[0]
    (bucket / "sets" / "vectors" / "scene.dbf").unlink()
    with pytest.raises(BadInput, match="its vectors cannot be read: it is gone"):
        cut(image, **where)
    assert not list(fetched.glob("*"))


def test_images_of_a_bucket_reach_workers_and_share_a_connection_there(s3, bucket, tmp_path):
    class_folders(bucket / "imagery", classes=2, each=1)
    remote = buckets.Bucket("s3://bucket/imagery", s3)
    images = list_images("in", remote, "auto", fetched=tmp_path / "fetched").images
    # Dask pickles what it sends between its own processes; here it is ours, made a line above.
    first, second = (pickle.loads(pickle.dumps(image)) for image in images)
    assert first == images[0] and first.bucket is second.bucket and first.bucket is not remote
    first.fetch()
    assert first.file.read_bytes() == (bucket / "imagery" / first.path).read_bytes()
    first.forget()
    assert not first.file.exists()
