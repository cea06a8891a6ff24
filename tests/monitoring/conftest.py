"""A workspace whose champion is watched."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from answering import write_model
from made_store import make_selections, make_store

from ringmo import config
from ringmo.config import Config
from ringmo.data.store import file_sha256
from ringmo.monitoring import reference
from ringmo.registry import bundle, promotion
from ringmo.registry.register import REFERENCE, register
from ringmo.stage import Report
from ringmo.workspace import Workspace, init


@pytest.fixture(scope="session")
def watched_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """scene/1, the champion, with a reference of 120 tiles; scene/2, from before there were any."""
    place = init(tmp_path_factory.mktemp("watched") / "workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        make_selections(place, make_store(place, per_class=100))
        selection = place.work("select") / "scene.parquet"
        values = Config.load(place.params_file)
        for folder, vit in (("first", False), ("second", True)):
            shutil.rmtree(place.work("finetune@scene"), ignore_errors=True)
            where = place.work("finetune@scene") / "model"
            model = write_model(where, "scene", vit=vit, selection=file_sha256(selection))
            evaluated = place.work("evaluate@scene")
            shutil.rmtree(evaluated, ignore_errors=True)
            figures = {"test_accuracy": 0.5, "bundle_hash": model.hash}
            Report("evaluate@scene", figures=figures).write(evaluated / "report.json")
            if folder == "first":
                assert reference.write(evaluated / REFERENCE, model, place, selection) == 120
            register(values, place, "scene", {"verdict": "passed"})
            bundle.load(where).check_example()
        promotion.promote(place, "scene", 1, by="ada", reason="first")
        yield place


@pytest.fixture
def watched(watched_once: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """It, before production has recorded anything."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("production", "references", "drift"):
        shutil.rmtree(watched_once.state / name, ignore_errors=True)
    config.edit(watched_once.params_file, {"monitoring.days": 7})
    return watched_once


@pytest.fixture
def champion(watched: Workspace) -> Any:
    from ringmo.inference.model import open_bundle

    return open_bundle("scene@champion", workspace=watched.root)
