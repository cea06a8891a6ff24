"""Parts of the server that no request over HTTP shows alone: the alias thread, batches, the end."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from rasterio.crs import CRS
from rasterio.transform import from_origin
from served import png, tiff, write_task_model
from small_models import rgb
from starlette.testclient import TestClient

from ringmo.config import Monitoring
from ringmo.errors import BadInput, Unreachable
from ringmo.inference.server import app, batching, formats, running, sharing
from ringmo.inference.server import models as versions
from ringmo.inference.server.app import Limits, Server, Within, application
from ringmo.inference.server.batching import Engine
from ringmo.inference.server.images import Picture
from ringmo.inference.server.measures import Measures
from ringmo.inference.server.models import Loaded, Models
from ringmo.inference.whole_images import prepared, raw_answers
from ringmo.monitoring import record
from ringmo.monitoring.facts import Embeddings
from ringmo.registry import listing
from ringmo.registry.tracker import Version
from ringmo.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

JSON = {"content-type": "application/json"}
LIMITS = Limits(8, 1_000_000, 1024, 20)


def loaded(workspace: Workspace, folder: Path, *kinds: str) -> Models:
    """Models of these tasks with one encoder, each from a folder."""
    refs = [str(write_task_model(folder / kind, kind)) for kind in kinds]
    models = Models(workspace, refs, "cpu", Measures(), Monitoring(share=0))
    models.load()
    return models


def server_of(models: Models, limits: Limits = LIMITS) -> Server:
    return Server(models, Engine(32, models.measures), models.measures, limits, None)


def client_of(server: Server) -> TestClient:
    return TestClient(application(server, None, "localhost"), base_url="http://localhost")


def image_of(model: Loaded, seed: int, side: int) -> Any:
    return prepared(model.bundle, model.task, rgb(seed, side, side))


def wait(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


# The aliases


class Registry:
    """What the aliases are, or what becomes of asking."""

    def __init__(self, patch: pytest.MonkeyPatch, models: Models) -> None:
        self.said: dict[str, Version | Exception] = {}
        self.asked, self.trackers = 0, 0
        patch.setattr(versions.listing, "resolve", self.resolve)
        patch.setattr(versions, "Tracker", self.tracker)
        for slot in models.slots.values():
            slot.follows = True
            self.said[slot.ref] = Version("scene", 0, {}, (), "", slot.ref, 0)
            slot.loaded.version = str(self.said[slot.ref])

    def tracker(self, _: Workspace) -> Any:
        self.trackers += 1
        return object()

    def resolve(self, _: Workspace, ref: str, tracker: Any = None) -> Version:
        self.asked += 1
        if isinstance(told := self.said[ref], Exception):
            raise told
        return told

    def rounds(self, models: Models, count: int) -> None:
        for _ in range(count):
            tracker = None
            for slot in models.slots.values():
                tracker = models._look(slot, tracker)


def answers(models: Models) -> float | None:
    return models.measures.registry.get_sample_value("ringmo_registry_answers")


def test_an_alias_that_is_gone_is_told_once_and_is_no_silent_registry(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    models = loaded(workspace, tmp_path, "scene", "segmentation")
    assert answers(models) == 1
    registry = Registry(monkeypatch, models)
    one, other = models.slots.values()
    good = registry.said[one.ref]
    registry.said[one.ref] = BadInput(f"{one.ref}: no such version")
    registry.rounds(models, 3)
    assert registry.trackers == 3  # one a round
    said = capsys.readouterr().err
    assert said.count("no such version") == 1 and "answers again" not in said
    assert answers(models) == 1
    registry.said[one.ref] = registry.said[other.ref] = Unreachable("MLflow does not answer")
    registry.rounds(models, 3)
    assert answers(models) == 0
    assert capsys.readouterr().err.count("does not answer") == 1
    registry.said[one.ref] = good
    registry.said[other.ref] = BadInput("no such version")
    registry.rounds(models, 2)
    assert answers(models) == 1
    assert capsys.readouterr().err.count("the registry answers again") == 1


def test_whatever_goes_wrong_the_alias_is_followed_on(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    models = loaded(workspace, tmp_path, "scene")
    registry = Registry(monkeypatch, models)
    (slot,) = models.slots.values()
    new = write_task_model(tmp_path / "new", "scene", seed=9)
    registry.said[slot.ref] = RuntimeError("what nobody thought of")
    models.follow(0.01)
    try:
        wait(lambda: registry.asked > 3)
        # A version of another name in another folder, as a new champion is.
        registry.said[slot.ref] = Version("scene", 7, {}, (), "", str(new), 0)
        wait(lambda: slot.loaded.bundle.folder == new)
    finally:
        models.stop()
    assert models._thread is not None
    models._thread.join(20)
    assert capsys.readouterr().err.count("what nobody thought of") == 1


def test_a_folder_with_an_at_in_its_path_has_no_alias(workspace: Workspace, tmp_path: Path) -> None:
    models = loaded(workspace, tmp_path / "me@home", "scene")
    assert not any(slot.follows for slot in models.slots.values())
    models.follow(0.01)
    assert models._thread is None


# Batches


def test_one_image_that_fails_does_not_fail_its_batch(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slot,) = loaded(workspace, tmp_path, "scene").slots.values()
    model = slot.loaded
    images = [image_of(model, seed, 32) for seed in range(3)]
    began, go = threading.Event(), threading.Event()
    sizes = []

    def faulty(bundle: Any, task: Any, batch: Any, *more: Any) -> Any:
        sizes.append(len(batch))
        began.set()
        go.wait(20)
        if any(image is images[1] for image in batch):
            raise ValueError("this one")
        return raw_answers(bundle, task, batch)

    monkeypatch.setattr(batching, "raw_answers", faulty)

    async def ask() -> list[Any]:
        engine = Engine(8, Measures())
        engine.start()
        first = engine.submit((model,), image_of(model, 9, 32), "first")
        await asyncio.to_thread(began.wait, 20)  # the others come while it computes
        jobs = [engine.submit((model,), image, str(i)) for i, image in enumerate(images)]
        go.set()
        try:
            return await asyncio.gather(first, *jobs, return_exceptions=True)
        finally:
            await asyncio.to_thread(engine.stop)
            assert not engine.alive

    _, one, failed, other = asyncio.run(ask())
    assert sizes == [1, 3, 1, 1, 1] and isinstance(failed, ValueError)
    for (said,), image in ((one, images[0]), (other, images[2])):
        (wanted,) = raw_answers(model.bundle, model.task, [image])
        np.testing.assert_allclose(said, wanted, atol=1e-5)


def test_a_batch_of_larger_images_is_smaller() -> None:
    engine = Engine(32, Measures())
    assert [engine._most(side) for side in (32, 1024, 2048, 4096)] == [32, 32, 8, 2]
    assert engine._most(100_000) == 1


@pytest.mark.parametrize("fails", [True, False])
def test_what_nobody_waits_for_any_longer_is_not_computed(fails: bool) -> None:
    """Of a request to several models: once one failed, or the time is over."""
    jobs: list[Any] = []

    class Never:
        on_way = 0

        def expect(self, more: int) -> None: ...

        def submit(self, *_: object) -> Any:
            jobs.append(asyncio.get_running_loop().create_future())
            return jobs[-1]

    async def ask() -> None:
        server = Server(SimpleNamespace(), Never(), Measures(), LIMITS, None)  # type: ignore[arg-type]
        groups = [((SimpleNamespace(version=str(i)),), None) for i in range(2)]
        server._prepared = lambda *_: ({}, groups, "x")  # type: ignore[method-assign,assignment,return-value]
        how = (formats.JSON, True, False)
        request: Any = SimpleNamespace(headers={})
        asked = asyncio.create_task(server._computed(request, [], how, b"", Within(server)))
        while len(jobs) < 2:
            await asyncio.sleep(0.01)
        if fails:
            jobs[0].set_exception(ValueError("no"))
        else:
            asked.cancel()
        with pytest.raises(ValueError if fails else asyncio.CancelledError):
            await asked
        assert all(job.done() for job in jobs) and jobs[1].cancelled()

    asyncio.run(ask())


# One encoder for several models


@pytest.mark.parametrize(("side", "spares"), [(200, True), (700, False)])
def test_features_are_kept_of_all_windows_or_of_none(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: int,
    spares: bool,
) -> None:
    models = loaded(workspace, tmp_path, "segmentation", "height")
    one, other = (slot.loaded for slot in models.slots.values())
    monkeypatch.setattr(sharing, "KEPT", 4)
    assert one.shared is other.shared
    seen = [Embeddings(model.bundle) for model in (one, other)]
    image = image_of(one, 3, side)
    alone = []
    for model, embeddings in zip((one, other), seen, strict=True):
        raw_answers(model.bundle, model.task, [image])
        alone.append(embeddings.taken(1, image.side))
        for each in seen:
            each._calls().clear()
    with one.shared.keeping():
        for model, embeddings, wanted in zip((one, other), seen, alone, strict=True):
            raw_answers(model.bundle, model.task, [image])
            found = embeddings.taken(1, image.side)
            assert found is not None and wanted is not None
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        # None is held for a model that would not find the first.
        assert bool(one.shared._of_thread.kept) == spares
    assert (one.shared.spared > 0) == spares


# Requests


def test_bodies_and_pixels_of_all_requests_together_are_limited(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_of(loaded(workspace, tmp_path, "scene"))
    pixels = rgb(1, 40, 40)
    body = png(pixels)
    with client_of(server) as client:
        assert client.post("/predict/scene", content=body).status_code == 200
        # The body has room, and the pixels have not.
        monkeypatch.setattr(app, "HELD_BYTES", len(body) + pixels.nbytes - 1)
        refused = client.post("/predict/scene", content=body)
        assert refused.status_code == 429 and "too many large images" in refused.text
        assert refused.headers["retry-after"] == "1"
        assert server.held == server.within == 0
        monkeypatch.setattr(app, "HELD_BYTES", len(body) + pixels.nbytes)
        assert client.post("/predict/scene", content=body).status_code == 200


def test_a_picture_is_asked_for_in_all_the_ways_that_the_page_says(
    workspace: Workspace, tmp_path: Path
) -> None:
    with client_of(server_of(loaded(workspace, tmp_path, "scene"))) as client:
        for value, there in (("true", True), ("1", True), ("yes", True), ("0", False)):
            told = client.post(f"/predict/scene?picture={value}", content=png(rgb(1))).json()
            assert ("images" in told) == there, value
        assert client.post("/predict/scene?picture=so", content=b"x").status_code == 422


def test_all_that_may_be_refused_is_in_the_schema(workspace: Workspace, tmp_path: Path) -> None:
    with client_of(server_of(loaded(workspace, tmp_path, "scene"))) as client:
        posts = client.get("/openapi.json").json()["paths"]
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| 4")]
    named = {code.strip() for row in rows for code in row.split(",")} | {"500", "504"}
    for path in ("/predict", "/predict/{name}"):
        assert set(posts[path]["post"]["responses"]) - {"200"} == named


# Answers


def test_a_box_across_180_degrees_runs_counter_clockwise() -> None:
    # At the western edge of zone 1 the longitudes go from 180 to -180.
    place = from_origin(301_500, 6e6, 100, 100)
    pixels = np.zeros((60, 60, 3), np.uint8)
    picture = Picture(pixels, place, CRS.from_epsg(32601))
    points = [[10.0, 20.0], [30.0, 25.0], [28.0, 40.0], [8.0, 35.0]]
    box = {"class": "ship", "score": 0.9, "points": points, "box": [8.0, 20.0, 30.0, 40.0]}
    bundle = SimpleNamespace(classes=["ship"])
    model: Any = SimpleNamespace(bundle=bundle, version="ships/1", name="ships")
    for turned in (points, points[::-1]):
        told = formats._geojson(model, {"boxes": [{**box, "points": turned}]}, picture)
        (feature,) = told["features"]
        (ring,) = feature["geometry"]["coordinates"]
        assert {x > 0 for x, _ in ring} == {True, False} and ring[0] == ring[-1]
        polygon = shapely.Polygon([(x % 360, y) for x, y in ring])
        assert polygon.is_valid and polygon.exterior.is_ccw


def test_an_area_with_a_hole_keeps_it() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 1
    model: Any = SimpleNamespace(bundle=SimpleNamespace(classes=["field", "road"]), version="x/1")
    picture = Picture(np.zeros((20, 20, 3), np.uint8))
    areas = {
        one["properties"]["class"]: shapely.geometry.shape(one["geometry"])
        for one in formats._geojson(model, {"mask": mask}, picture)["features"]
    }
    assert areas["field"].area == 300 and areas["road"].area == 100
    assert all(area.is_valid and area.exterior.is_ccw for area in areas.values())
    (hole,) = areas["field"].interiors
    assert not hole.is_ccw


# The end


def test_a_request_that_is_cut_off_is_counted(workspace: Workspace, tmp_path: Path) -> None:
    models = loaded(workspace, tmp_path, "scene")

    async def slow() -> Any:
        await asyncio.sleep(60)
        yield b""

    async def ask() -> int:
        server = server_of(models)
        slots = list(models.slots.values())
        request: Any = SimpleNamespace(headers={}, stream=slow)
        asked = asyncio.create_task(server.predict(request, slots, several=False, as_picture=False))
        while not server.within:
            await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert server.within == 0
        return server.cut_off

    assert asyncio.run(ask()) == 1


@pytest.mark.parametrize("cut_off", [0, 2])
def test_the_end_waits_for_body_and_answer_and_says_what_came_of_it(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    cut_off: int,
) -> None:
    folder = write_task_model(tmp_path / "scene", "scene")
    seen: list[Any] = []
    made = running.Server

    def kept(*arguments: Any) -> Server:
        seen.append(made(*arguments))
        seen[-1].engine.start = lambda: None
        return seen[-1]

    def run(self: Any) -> None:
        assert self.config.timeout_graceful_shutdown >= 2 * 20 + app.LINGER_S
        seen[0].cut_off = cut_off

    monkeypatch.setattr(running, "Server", kept)
    monkeypatch.setattr(running._Announcing, "run", run)
    monkeypatch.setattr(running.signal, "signal", lambda *_: None)
    running.serve(
        workspace,
        [str(folder)],
        host="127.0.0.1",
        port=0,
        root=None,
        limits=LIMITS,
        batch_size=4,
        poll_s=5,
        device="cpu",
        monitoring=Monitoring(share=0),
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert ("every request that was let in was answered" in last) == (cut_off == 0)
    assert ("2 of the requests that were let in were cut off" in last) == (cut_off == 2)


def test_rows_of_the_last_batches_are_written(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that still computes when the server ends; and one of a version that was replaced."""
    models = loaded(workspace, tmp_path, "scene")
    (slot,) = models.slots.values()
    everything = Monitoring(share=1.0)

    def recorded(model: Loaded, version: str) -> Loaded:
        model.recorder = record.Recorder(workspace, model.bundle, version, everything)
        models._recorders.add(model.recorder)
        return model

    old = recorded(slot.loaded, "scene/1")
    version = listing.of_folder(write_task_model(tmp_path / "new", "scene", seed=9))
    new = recorded(models._load(slot, version, None), "scene/2")
    models._take_over(slot, new)
    began = threading.Event()

    def slow(*given: Any) -> Any:
        began.set()
        time.sleep(0.5)
        return raw_answers(*given)

    monkeypatch.setattr(batching, "raw_answers", slow)
    server = server_of(models)
    with client_of(server) as client:
        assert client.portal is not None
        for number, model in enumerate((old, new)):
            image = image_of(model, number, 32)
            client.portal.call(server.engine.submit, (model,), image, f"late {number}")
        began.wait(20)
    rows = pd.concat(
        pd.read_parquet(p) for p in record.folder(workspace, "scene").rglob("*.parquet")
    )
    assert sorted(zip(rows["version"], rows["name"], strict=True)) == [
        ("scene/1", "late 0"),
        ("scene/2", "late 1"),
    ]


def test_two_sensors_are_each_shown_as_their_model_reads_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    refs = [
        str(write_task_model(tmp_path / "scene", "scene")),
        str(write_task_model(tmp_path / "radar", "segmentation", sensors=("sar",))),
    ]
    models = Models(workspace, refs, "cpu", Measures(), Monitoring(share=0))
    models.load()
    power = np.random.default_rng(1).gamma(2, 0.05, (40, 50, 2)).astype(np.float32)
    images = {"rgb": png(rgb(1, 40, 50)), "sar": tiff(power)}
    body = {"images": {name: base64.b64encode(data).decode() for name, data in images.items()}}
    with client_of(server_of(models)) as client:
        answer = client.post("/predict?picture=true", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["images"]) == {"rgb", "sar"}
