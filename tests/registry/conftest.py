"""Small real models, and what takes seconds made once: MLflow's database, servers, versions."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from registered import register_three, write_model
from servers import S3, MLflow, Postgres
from tiny import TINY

from ringmo.config import Config
from ringmo.workspace import Workspace


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in SQLite, without a run."""
    from ringmo.registry.tracker import Tracker

    root = tmp_path_factory.mktemp("mlflow")
    uri = os.environ.pop("MLFLOW_TRACKING_URI", None)
    Tracker(Workspace(root))
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    return root / ".ringmo" / "mlflow" / "mlflow.db"


@pytest.fixture
def tracked(workspace: Workspace, fresh_database: Path, monkeypatch: Any) -> Workspace:
    """A workspace whose MLflow is a SQLite file of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = workspace.state / "mlflow"
    folder.mkdir(parents=True)
    shutil.copyfile(fresh_database, folder / "mlflow.db")
    return workspace


@pytest.fixture(scope="session")
def registered_once(tmp_path_factory: pytest.TempPathFactory, fresh_database: Path) -> Workspace:
    """A workspace whose three models are registered; tests have copies of it."""
    from ringmo import config
    from ringmo.workspace import init

    made = init(tmp_path_factory.mktemp("registered") / "workspace")
    config.edit(made.params_file, TINY)
    (made.state / "mlflow").mkdir(parents=True)
    shutil.copyfile(fresh_database, made.state / "mlflow" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register_three(made)
    return made


@pytest.fixture
def three(registered_once: Workspace, tmp_path: Path, monkeypatch: Any) -> Workspace:
    """Three versions that the gate has passed, in a SQLite file; no champion."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Workspace(tmp_path / "workspace")
    shutil.copytree(registered_once.root, made.root)
    places = ("model_versions.source", "model_versions.storage_location", "runs.artifact_uri")
    with sqlite3.connect(made.state / "mlflow" / "mlflow.db") as database:
        for place in (*places, "experiments.artifact_location"):
            table, column = place.split(".")
            database.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)",
                (str(registered_once.root), str(made.root)),
            )
    database.close()
    return made


@pytest.fixture
def three_central(central: Any, workspace: Workspace) -> Workspace:
    """The same in MLflow over PostgreSQL and S3."""
    register_three(workspace)
    return workspace


@pytest.fixture(params=["sqlite", pytest.param("central", marks=pytest.mark.slow)])
def anywhere(request: Any) -> Workspace:
    """`three` and `three_central`, one after the other."""
    name = "three" if request.param == "sqlite" else "three_central"
    found: Workspace = request.getfixturevalue(name)
    return found


@pytest.fixture
def config(workspace: Workspace) -> Config:
    return Config.load(workspace.params_file)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, fresh_database: Path) -> Iterator[Workspace]:
    """A chain that ran, with its own sources, DVC's record and its registered models."""
    import torch
    from registered_chain import registered_chain

    threads = torch.get_num_threads()
    uri = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield registered_chain(tmp_path_factory.mktemp("made"), fresh_database)
    finally:
        torch.set_num_threads(threads)
        if uri:
            os.environ["MLFLOW_TRACKING_URI"] = uri


MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(workspace: Workspace) -> MakeModel:
    """`make_model(seed)` is `write_model` in the test's workspace."""
    return partial(write_model, workspace)


@pytest.fixture
def server(tmp_path: Path, fresh_database: Path, request: Any) -> Iterator[MLflow]:
    """Running, over SQLite; with `indirect` parameter True, one that keeps artifacts itself."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(fresh_database, folder / "mlflow.db")
    kept = getattr(request, "param", False)
    artifacts = str(folder / ("kept" if kept else "artifacts"))
    made = MLflow(f"sqlite:///{folder / 'mlflow.db'}", artifacts, kept=kept)
    try:
        made.start()
        yield made
    finally:
        made.stop()


class Central:
    """What several machines share: MLflow over PostgreSQL, its artifacts in S3."""

    def __init__(self, folder: Path) -> None:
        self.postgres, self.s3 = Postgres(), S3(folder)
        self.mlflow: MLflow | None = None

    def start(self) -> None:
        self.postgres.start()
        self.s3.start()
        self.name = self.postgres.database()
        database, artifacts = self.postgres.uri(self.name), "s3://bucket/mlflow"
        environment = self.s3.environment
        self.mlflow = MLflow(database, artifacts, kept=True, environment=environment)
        self.mlflow.start()

    def stop(self) -> None:
        if self.mlflow is not None:
            self.mlflow.stop()
        self.s3.stop()
        self.postgres.stop()

    @property
    def url(self) -> str:
        assert self.mlflow is not None
        return self.mlflow.url

    def empty(self) -> None:
        """As if nothing had ever been logged or registered."""
        rows = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        tables = [name for (name,) in self.postgres.rows(rows, self.name)]
        names = ", ".join(name for name in tables if name != "alembic_version")
        self.postgres.execute(f"TRUNCATE {names} RESTART IDENTITY CASCADE", self.name)


@pytest.fixture(scope="session")
def central_made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Central]:
    made = Central(tmp_path_factory.mktemp("s3"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def central(central_made: Central, monkeypatch: Any) -> Central:
    """Empty, and named by MLFLOW_TRACKING_URI; clients may reach its S3 themselves."""
    central_made.empty()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", central_made.url)
    for name, value in central_made.s3.environment.items():
        monkeypatch.setenv(name, value)
    return central_made
