"""What a running server answers, and what it refuses: every request over HTTP to a real process."""

import base64
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.io import MemoryFile
from served import MASKS, Served, png, tiff, write_task_model
from small_models import rgb

from ringmo import tasks
from ringmo.registry import bundle
from ringmo.workspace import init

pytestmark = pytest.mark.slow

KINDS = tasks.names()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every task with one encoder, one of radar, scenes, and what lies beside them."""
    made = tmp_path_factory.mktemp("served")
    for kind in KINDS:
        write_task_model(made / "models" / kind, kind)
    write_task_model(made / "models" / "radar", "segmentation", sensors=("sar",))
    write_task_model(made / "models" / "other", "scene", encoder_seed=7)
    root = made / "root"
    (root / "inside").mkdir(parents=True)
    (root / "inside" / "scene.tif").write_bytes(tiff(rgb(5, 300, 400)))
    (root / "scene.png").write_bytes(png(rgb(6, 90, 80)))
    (made / "secret.tif").write_bytes(tiff(rgb(7)))
    (root / "link.tif").symlink_to(made / "secret.tif")
    (root / "inner.tif").symlink_to(root / "inside" / "scene.tif")
    (root / "folder").symlink_to(made)
    (root / "text.tif").write_text("no image")
    (root / "all.vrt").write_text(vrt(made / "secret.tif"))
    shutil.copy(root / "all.vrt", root / "vrt.tif")
    os.mkfifo(root / "pipe.tif")
    return made


def vrt(other: Path) -> str:
    with rasterio.open(other) as file:
        size = f'rasterXSize="{file.width}" rasterYSize="{file.height}"'
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{i}"><SimpleSource><SourceFilename '
        f'relativeToVRT="0">{other}</SourceFilename><SourceBand>{i}</SourceBand></SimpleSource>'
        f"</VRTRasterBand>"
        for i in (1, 2, 3)
    )
    return f"<VRTDataset {size}>{bands}</VRTDataset>"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    served = Served(
        init(folder / "workspace"),
        *(word for kind in (*KINDS, "radar", "other") for word in ("--model", model(folder, kind))),
        *("--root", str(folder / "root")),
    )
    yield served
    assert served.stop() == 0, served.log


def model(folder: Path, name: str) -> str:
    return str(folder / "models" / name)


def expected(folder: Path, name: str, image: Any) -> Any:
    return bundle.load(Path(model(folder, name))).predict([image])[0]


def test_jpeg_png_and_tiff_bodies_are_answered_as_by_the_model(
    server: Served, folder: Path
) -> None:
    pixels = rgb(1)
    wanted = expected(folder, "scene", pixels)
    loaded = bundle.load(Path(model(folder, "scene")))
    for body in (png(pixels), tiff(pixels)):
        answer = server.post("/predict/scene", body)
        assert answer.status_code == 200
        told = answer.json()
        assert [told["probabilities"][name] for name in loaded.classes] == pytest.approx(
            wanted, abs=2e-5
        )
        assert told["label"] == loaded.classes[int(wanted.argmax())]
        assert told["version"] == answer.headers["ringmo-version"] == f"scene-{loaded.hash[:12]}"
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    assert server.post("/predict/scene", stream.getvalue()).json()["confidence"] > 0
    # What curl sends without a word about the type.
    form = {"content_type": "application/x-www-form-urlencoded"}
    assert server.post("/predict/scene", png(pixels), **form).status_code == 200


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_answers_in_its_forms(server: Served, folder: Path, kind: str) -> None:
    pixels = rgb(2, 50, 70)
    asked: Any = {"rgb": pixels, "second": rgb(3, 50, 70)} if kind == "change" else pixels
    wanted = expected(folder, kind, asked)
    files = {n: tiff(p) for n, p in asked.items()} if kind == "change" else {"rgb": tiff(pixels)}
    body = {"images": {name: base64.b64encode(data).decode() for name, data in files.items()}}

    def forms(accept: str) -> Any:
        return server.post(f"/predict/{kind}", body, accept=accept)

    told = forms("application/json").json()
    assert told["task"] == kind and told["version"].startswith(f"{kind}-")
    if kind == "scene":
        assert forms("image/png").status_code == 406
        (footprint,) = forms("application/geo+json").json()["features"]
        assert footprint["properties"]["label"] == told["label"]
        return
    if "boxes" in wanted:
        assert len(told["boxes"]) == len(wanted["boxes"]) > 0
        assert told["boxes"][0]["points"] == pytest.approx(
            np.array(wanted["boxes"][0]["points"]), abs=0.05
        )
        geo = forms("application/geo+json").json()
        assert geo["ringmo:coordinates"] == "degrees"
        lon, lat = np.array(geo["features"][0]["geometry"]["coordinates"][0]).T
        assert (abs(lon - 15) < 0.1).all() and (abs(lat - 45.15) < 0.1).all()
        assert forms("image/tiff").status_code == 406
        return
    what = "mask" if "mask" in wanted else "height"
    with MemoryFile(forms("image/tiff").content) as memory, memory.open() as file:
        assert file.crs.to_epsg() == 32633 and file.transform.c == 500_000
        assert file.tags()["ringmo_version"] == told["version"]
        np.testing.assert_allclose(file.read(1), wanted[what], atol=1e-4)
        assert what == "height" or file.tags(1)["class_2"] == MASKS[2]
    picture = Image.open(io.BytesIO(forms("image/png").content))
    assert picture.size == (70, 50)
    if what == "mask":
        assert (np.asarray(picture) == wanted["mask"]).all()
        inside = base64.b64decode(told["mask"])
        assert (np.asarray(Image.open(io.BytesIO(inside))) == wanted["mask"]).all()
        areas = forms("application/geo+json").json()["features"]
        assert {area["properties"]["class"] for area in areas} <= set(MASKS)
    else:
        assert told["mean_m"] == pytest.approx(float(wanted["height"].mean()), abs=1e-3)
        assert forms("application/geo+json").status_code == 406


def test_several_tasks_with_one_encoder_share_its_pass(server: Served) -> None:
    body, spared = png(rgb(4, 32, 32)), "ringmo_encoder_images_spared_total"
    alone = {
        name: server.post(f"/predict/{name}", body).json() for name in KINDS if name != "change"
    }
    assert server.metric(spared) == 0
    asked = "&".join(f"model={name}" for name in (*alone, "other"))
    answer = server.post(f"/predict?{asked}", body)
    told = answer.json()["answers"]
    other = told.pop("other")
    assert other["label"] in other["probabilities"]
    # One encoder passed the image for five models; `other` has another.
    assert server.metric(spared) == len(alone) - 1 == 4
    assert answer.headers["ringmo-version"].count(", ") == len(alone)
    for name, one in alone.items():
        assert told[name].keys() == one.keys()
        for what in ("label", "mask", "picture", "version"):
            assert told[name].get(what) == one.get(what)
        for mine, its in zip(told[name].get("boxes", []), one.get("boxes", []), strict=True):
            assert mine["points"] == pytest.approx(np.array(its["points"]), abs=0.02)


def test_windows_of_scenes_below_the_root(server: Served, folder: Path) -> None:
    window = {"col": 100, "row": 50, "width": 64, "height": 48}
    wanted = expected(folder, "segmentation", rgb(5, 300, 400)[50:98, 100:164])
    for path in ("inside/scene.tif", "inner.tif", "./inside/../inside/scene.tif"):
        body = {"image": {"path": path, "window": window}}
        answer = server.post("/predict/segmentation", body, accept="image/tiff")
        assert answer.status_code == 200, answer.text
        with MemoryFile(answer.content) as memory, memory.open() as file:
            assert (file.read(1) == wanted["mask"]).all()
            assert file.transform.c == 500_000 + 100 * 10
    whole = server.post("/predict/segmentation", {"image": {"path": "scene.png"}})
    assert whole.status_code == 200
    beyond = {"image": {"path": "scene.png", "window": window}}
    assert server.post("/predict/scene", beyond).status_code == 422


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../secret.tif", 404),
        ("link.tif", 404),
        ("folder/secret.tif", 404),
        ("{folder}/root/scene.png", 404),
        ("{folder}/secret.tif", 404),
        ("/vsicurl/http://127.0.0.1:{port}/metrics", 404),
        ("vsizip/x.zip", 404),
        ("GTIFF_DIR:1:inside/scene.tif", 404),
        ("inside/scene.tif\0", 404),
        ("inside", 404),
        ("pipe.tif", 404),
        ("s3://bucket/scene.tif", 404),
        ("missing.tif", 404),
        ("all.vrt", 415),
        ("vrt.tif", 415),
        ("text.tif", 415),
    ],
)
def test_no_reference_leaves_the_root(server: Served, folder: Path, path: str, status: int) -> None:
    path = path.replace("{folder}", str(folder)).replace("{port}", str(server.port))
    answer = server.post("/predict/scene", {"image": {"path": path}})
    assert answer.status_code == status, answer.text
    assert str(folder) not in answer.text.replace(path, "")


def bomb_png(side: int) -> bytes:
    """A PNG that says it is huge."""
    data = bytearray(png(rgb(1)))
    data[16:24] = side.to_bytes(4, "big") * 2
    return bytes(data)


BAD = {
    "empty": (b"", 415, "empty body"),
    "text": (b"hello", 415, "not an image"),
    "gif": (b"GIF89a" + bytes(50), 415, "not an image"),
    "truncated jpeg": (None, 422, "damaged"),
    "truncated png": (png(rgb(1))[:300], 422, "damaged"),
    "truncated tiff": (tiff(rgb(1))[:3000], 422, "damaged"),
    "tiff of noise": (b"II*\0" + bytes(range(256)) * 4, 422, "damaged"),
    "png bomb": (bomb_png(60_000), 413, "60000 x 60000 pixels"),
    "png of a line": (png(np.zeros((2, 4000, 3), np.uint8)), 413, "4000 x 2 pixels"),
    "png without header": (b"\x89PNG\r\n\x1a\n", 422, "damaged PNG"),
    "grey": (png(rgb(1)[..., 0]), 422, "1 bands, the model reads 3"),
    "four bands": (tiff(np.dstack([rgb(1), rgb(1)[..., :1]])), 422, "4 bands"),
    "floats": (tiff(rgb(1).astype(np.float32)), 422, "float32"),
    "sixteen bits": (tiff(rgb(1).astype(np.uint16)), 422, "uint16"),
    "no data": (tiff(np.zeros((40, 50, 3), np.uint8), nodata=0), 422, "no pixel has data"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_in_one_line(server: Served, name: str) -> None:
    body, status, says = BAD[name]
    if body is None:
        stream = io.BytesIO()
        Image.fromarray(rgb(1, 200, 200)).save(stream, "JPEG")
        body = stream.getvalue()[:4000]
    for model in ("scene", "segmentation"):
        answer = server.post(f"/predict/{model}", body)
        assert (answer.status_code, says in answer.text) == (status, True), answer.text
        assert "\n" not in answer.json()["error"] and "/vsimem" not in answer.text


def test_a_sparse_tiff_is_a_bomb_too(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    profile = {"driver": "GTiff", "height": 50_000, "width": 50_000, "count": 3, "dtype": "uint8"}
    rasterio.open(path, "w", **profile, tiled=True, sparse_ok=True, compress="deflate").close()
    answer = server.post("/predict/scene", path.read_bytes())
    assert answer.status_code == 413 and "50000 x 50000" in answer.text
    # Small, and yet compressed in one piece of gigabytes.
    blocks = {"blockxsize": 16_384, "blockysize": 16_384, "tiled": True, "sparse_ok": True}
    rasterio.open(path, "w", **(profile | {"height": 64, "width": 64}), **blocks).close()
    answer = server.post("/predict/scene", path.read_bytes())
    assert answer.status_code == 422 and "pieces of" in answer.text


def test_a_body_refers_to_no_other_file(server: Served, folder: Path) -> None:
    text = vrt(folder / "secret.tif").encode()
    assert server.post("/predict/scene", text).status_code == 415
    # VRT in the place of a TIFF's metadata, and behind its magic number.
    described = tiff(rgb(1))
    assert server.post("/predict/scene", b"II*\0" + text).status_code == 422
    assert server.post("/predict/scene", described + text).status_code == 200


def test_nan_is_filled_and_nothing_but_nan_is_refused(server: Served) -> None:
    power = np.random.default_rng(1).gamma(2, 0.05, (40, 50, 2)).astype(np.float32)
    power[:8] = np.nan
    power[8:10] = np.inf
    assert server.post("/predict/radar", tiff(power)).status_code == 200
    power[:] = np.nan
    answer = server.post("/predict/radar", tiff(power))
    assert answer.status_code == 422 and "no pixel has data" in answer.text


def test_one_pixel_is_an_image(server: Served) -> None:
    for name in KINDS:
        body: Any = png(rgb(1, 1, 1))
        if name == "change":
            body = {"images": dict.fromkeys(("rgb", "second"), base64.b64encode(body).decode())}
        answer = server.post(f"/predict/{name}", body)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"{}", "give `image` or `images`"),
        (b'{"image": "###"}', "no base64"),
        (b'{"image": {"path": "scene.png", "driver": "VRT"}}', "image"),
        (b'{"image": {"path": "scene.png", "window": {"col": -1}}}', "window"),
        (b'{"images": {"nir": "aGVsbG8="}}', "what is read is rgb"),
    ],
)
def test_bad_json_is_refused_in_one_line(server: Served, body: bytes, says: str) -> None:
    answer = server.post("/predict/scene", body, content_type="application/json")
    assert answer.status_code == 422 and says in answer.json()["error"], answer.text
    assert len(answer.text) < 500


def test_pairs_must_be_whole_and_of_one_size(server: Served) -> None:
    one, other = (base64.b64encode(png(rgb(1, s, s))).decode() for s in (40, 41))
    assert "second is missing" in server.post("/predict/change", {"image": one}).text
    answer = server.post("/predict/change", {"images": {"rgb": one, "second": other}})
    assert answer.status_code == 422 and "of one size" in answer.text


def test_other_routes(server: Served) -> None:
    assert server.post("/predict/nothing", b"x").status_code == 404
    assert server.post("/predict?model=nothing", b"x").status_code == 404
    assert server.get("/predict/scene").status_code == 405
    assert server.get("/nothing").json()["status"] == 404
    assert server.post("/predict/scene", png(rgb(1)), accept="text/html").status_code == 406
    assert server.get("/health").json() == {"status": "alive"}
    assert server.get("/ready").json() == {"status": "ready"}
    served = {one["name"]: one for one in server.get("/models").json()["models"]}
    assert [one["name"] for one in served["change"]["reads"]] == ["rgb", "second"]
    assert served["scene"]["encoder"] == served["height"]["encoder"] != served["other"]["encoder"]
    # A page of another site whose name was pointed at this machine.
    assert server.get("/models", host="evil.example").status_code == 421


def test_pages_take_nothing_from_elsewhere(server: Served) -> None:
    for path in ("/", "/docs"):
        page = server.get(path)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http://" not in page.text and "https://" not in page.text
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/predict", "/predict/{name}", "/health", "/ready", "/metrics"} <= paths.keys()


def test_metrics_count_requests_and_batches(server: Served) -> None:
    def seen() -> list[float]:
        return [
            server.metric(f'{name}{{model="scene"{more}}}')
            for name, more in (
                ("ringmo_requests_total", ',status="200"'),
                ("ringmo_requests_total", ',status="415"'),
                ("ringmo_request_seconds_count", ""),
                ("ringmo_batch_size_count", ""),
                ("ringmo_batch_size_sum", ""),
            )
        ]

    before = seen()
    server.post("/predict/scene", png(rgb(1)))
    server.post("/predict/scene", b"nothing")
    assert [now - was for now, was in zip(seen(), before, strict=True)] == [1, 1, 1, 1, 1]
    assert server.metric("ringmo_queue_length") == server.metric("ringmo_requests_within") == 0
    (version,) = [
        line
        for line in server.get("/metrics").text.splitlines()
        if "info{bundle" in line and 'model="scene"' in line
    ]
    assert version.endswith(" 1.0")


def test_a_request_cut_off_half_way_leaves_nothing(server: Served) -> None:
    gone = 'ringmo_requests_total{model="scene",status="499"}'
    before = server.metric(gone)
    body = png(rgb(1))
    for part in (b"", body[:100]):
        with socket.create_connection(("127.0.0.1", server.port)) as caller:
            head = f"POST /predict/scene HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            caller.sendall(f"{head}\r\n\r\n".encode() + part)
    limit = time.monotonic() + 10
    while server.metric(gone) < before + 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert server.metric("ringmo_requests_within") == 0
    assert server.post("/predict/scene", body).status_code == 200


def test_the_picture_is_what_people_see(server: Served) -> None:
    pixels = rgb(1)
    told = json.loads(server.post("/predict/scene?picture=true", tiff(pixels)).content)
    picture = Image.open(io.BytesIO(base64.b64decode(told["images"]["rgb"])))
    assert (np.asarray(picture) == pixels).all()
