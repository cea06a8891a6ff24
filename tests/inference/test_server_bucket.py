"""Windows of scenes that lie in a bucket, asked of a running server over a real S3 server."""

from collections.abc import Iterator
from typing import Any

import pytest
from rasterio.io import MemoryFile
from served import Served, png, tiff, write_task_model
from servers import S3
from small_models import rgb

from ringmo.registry import bundle
from ringmo.workspace import Workspace, init

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    store = S3(tmp_path_factory.mktemp("s3"))
    below = store.folder / "bucket" / "scenes"
    (below / "inside").mkdir(parents=True)
    (below / "inside" / "scene 1.tif").write_bytes(tiff(rgb(5, 300, 400)))
    (below / "scene.png").write_bytes(png(rgb(6, 90, 80)))
    (below / "text.tif").write_text("no image")
    (below / "cut.tif").write_bytes(tiff(rgb(7, 300, 400))[:-5000])
    other = f"/vsis3/bucket/scenes/{'inside'}/scene 1.tif"
    (below / "all.vrt").write_text(
        f'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{other}</SourceFilename></SimpleSource></VRTRasterBand>"
        "</VRTDataset>"
    )
    (store.folder / "bucket" / "secret.png").write_bytes(png(rgb(8)))
    store.start()
    yield store
    store.stop()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, bucket: S3) -> Workspace:
    made = init(tmp_path_factory.mktemp("served") / "workspace")
    write_task_model(made.root / "model", "segmentation")
    text = made.params_file.read_text()
    there = f"endpoint: http://127.0.0.1:{bucket.port}"
    made.params_file.write_text(text.replace("endpoint: null", there, 1))
    return made


def started(workspace: Workspace, environment: dict[str, str], root: str) -> Served:
    model = str(workspace.root / "model")
    return Served(workspace, "--model", model, "--root", root, environment=environment)


@pytest.fixture(scope="module")
def server(workspace: Workspace, bucket: S3) -> Iterator[Served]:
    served = started(workspace, bucket.environment, "s3://bucket/scenes")
    yield served
    assert served.stop() == 0, served.log


def ask(server: Served, path: str, window: Any = None, **headers: str) -> Any:
    image = {"path": path} | ({"window": window} if window else {})
    return server.post("/predict", {"image": image}, **headers)


def test_a_window_of_an_object_is_answered(server: Served, workspace: Workspace) -> None:
    window = {"col": 100, "row": 50, "width": 64, "height": 48}
    pixels = rgb(5, 300, 400)[50:98, 100:164]
    wanted = bundle.load(workspace.root / "model").predict([pixels])[0]
    body = {"image": {"path": "inside/scene 1.tif", "window": window}}
    (name,) = server.told["models"]
    answer = server.post(f"/predict/{name}", body, accept="image/tiff")
    assert answer.status_code == 200, answer.text + server.log
    with MemoryFile(answer.content) as memory, memory.open() as file:
        assert (file.read(1) == wanted["mask"]).all()
        assert file.transform.c == 500_000 + 100 * 10
    assert ask(server, "scene.png").status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../secret.png", 404),
        ("inside/../../secret.png", 404),
        ("/secret.png", 404),
        ("s3://bucket/secret.png", 404),
        ("/vsis3/bucket/secret.png", 404),
        ("inside//scene 1.tif", 404),
        ("inside", 404),
        ("scene.png\0", 404),
        ("scene.png?x=1", 404),
        ("missing.tif", 404),
        ("all.vrt", 415),
        ("text.tif", 415),
        ("cut.tif", 422),
    ],
)
def test_no_reference_leaves_the_prefix(server: Served, path: str, status: int) -> None:
    answer = ask(server, path)
    assert answer.status_code == status, answer.text


def test_an_object_that_was_replaced_is_read_anew(
    server: Served, bucket: S3, workspace: Workspace
) -> None:
    path = bucket.folder / "bucket" / "scenes" / "changing.png"
    loaded = bundle.load(workspace.root / "model")
    for seed in (11, 12):
        path.write_bytes(png(rgb(seed, 64, 64)))
        (name,) = server.told["models"]
        answer = server.post(
            f"/predict/{name}", {"image": {"path": path.name}}, accept="image/tiff"
        )
        with MemoryFile(answer.content) as memory, memory.open() as file:
            assert (file.read(1) == loaded.predict([rgb(seed, 64, 64)])[0]["mask"]).all()


@pytest.mark.long
def test_a_bucket_that_is_away_is_no_image_s_fault(workspace: Workspace, bucket: S3) -> None:
    """It is the server's message, and the server lives on."""
    own = S3(bucket.folder.parent / "away")
    (own.folder / "bucket" / "a.png").write_bytes(png(rgb(1)))
    own.port = bucket.port  # same address: another store takes its place after it ended
    bucket.stop()
    try:
        wrong = bucket.environment | {"AWS_ACCESS_KEY_ID": "nobody"}
        own.start()
        with pytest.raises(AssertionError, match="refused"):
            started(workspace, wrong, "s3://bucket/")
        served = started(workspace, bucket.environment, "s3://bucket/")
        assert ask(served, "a.png").status_code == 200
        own.stop()
        answer = ask(served, "a.png")
        assert answer.status_code == 502, answer.text
        assert "127.0.0.1" in answer.json()["error"]
        own.start()
        assert ask(served, "a.png").status_code == 200
        assert served.stop() == 0
    finally:
        own.stop()
        bucket.start()
