"""Backup and restore: SQLite and folders, PostgreSQL and S3; and what is half or damaged."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagery import write_class_folders
from registered import register_three
from servers import S3, Postgres, postgres_programs

from ringmo import backup, config
from ringmo.cli import main
from ringmo.config import Config
from ringmo.data import versions
from ringmo.data.ingest import ingest
from ringmo.errors import BadInput
from ringmo.registry import promotion
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

SERVERS = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "PGPASSWORD")


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's own tables, with a flow in them."""
    home = tmp_path_factory.mktemp("prefect")
    upgrade = ["prefect", "server", "database", "upgrade", "--yes"]
    env = os.environ | {"PREFECT_HOME": str(home)}
    subprocess.run([sys.executable, "-m", *upgrade], env=env, check=True, capture_output=True)
    with sqlite3.connect(home / "prefect.db") as database:
        database.execute("INSERT INTO flow (name, tags) VALUES ('retrain', '[]')")
    database.close()
    return home / "prefect.db"


@pytest.fixture(scope="module")
def full_once(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Workspace:
    """A workspace with a pushed data version, three versions of a model and a champion."""
    from tiny import TINY

    from ringmo.workspace import init

    with pytest.MonkeyPatch.context() as patch:
        for name in SERVERS:
            patch.delenv(name, raising=False)
        made = init(tmp_path_factory.mktemp("full") / "workspace")
        config.edit(made.params_file, TINY)
        data_version(made)
        register_three(made)
        promotion.promote(made, "scene", 2, by="ada", reason="a test")
        promotion.promote(made, "scene", 3, by="bob", reason="another", force=True)
        (made.state / "prefect").mkdir()
        shutil.copyfile(prefect_database, made.state / "prefect" / "prefect.db")
    return made


def data_version(place: Workspace) -> None:
    images = write_class_folders(place.root / "imagery", each=3)
    config.edit(place.params_file, {"ingest.sources": [str(images)]})
    values = Config.load(place.params_file)
    ingest(values, place)
    versions.add_store(place, values)
    versions.push(place, values)


def registry(place: Workspace) -> Any:
    """What a registry says of itself, but for the absolute paths of its files."""
    tracker = Tracker(place)
    said = [
        (str(v), v.aliases, dict(v.tags), v.run_id, v.created) for v in tracker.versions("scene")
    ]
    hashes = [
        sorted(p.read_bytes() for p in tracker.bundle_folder(v).iterdir())
        for v in tracker.versions("scene")
    ]
    return said, hashes, promotion.history(place, "scene")


def rows(database: Path) -> list[str]:
    with sqlite3.connect(database) as opened:
        found = list(opened.iterdump())
    opened.close()
    return found


@pytest.mark.long
def test_the_local_default_comes_back_elsewhere(full_once: Workspace, tmp_path: Path) -> None:
    """SQLite and folders; the old workspace is gone, the new one has another name."""
    source = tmp_path / "before"
    shutil.copytree(full_once.root, source, symlinks=True)
    # As if nothing had ever been at the first place: paths must not lead back there.
    moved = Workspace(source)
    for database in (full_once.state / "mlflow" / "mlflow.db",):
        backup.Sqlite(moved.state / "mlflow" / database.name).move_paths(
            str(full_once.root), str(source)
        )
    before, flows = registry(moved), rows(moved.state / "prefect" / "prefect.db")
    tiles = {p.name: p.read_bytes() for p in moved.store.iterdir() if p.is_file()}

    # Somebody writes meanwhile: a transaction that is not over is not in the copy, and is no
    # reason to wait.
    writer = sqlite3.connect(moved.state / "prefect" / "prefect.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("INSERT INTO flow (name, tags) VALUES ('half', '[]')")
    done = backup.backup(Config.load(moved.params_file), moved, tmp_path / "saved")
    writer.execute("ROLLBACK")
    writer.close()
    assert set(done["parts"]) == {"mlflow", "prefect", "artifacts", "dvc", "workspace"}
    assert all(part["files"] and part["bytes"] for part in done["parts"].values())
    sums = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    subprocess.run(sums, cwd=tmp_path / "saved", check=True)
    shutil.rmtree(source)

    back = Workspace(tmp_path / "after")
    assert main(["restore", str(tmp_path / "saved"), "--workspace", str(back.root)]) == 0
    assert registry(back) == before
    assert rows(back.state / "prefect" / "prefect.db") == flows
    assert {p.name: p.read_bytes() for p in back.store.iterdir() if p.is_file()} == tiles
    assert versions.changed(back).keys() <= {"validate", "select", *versions.changed(back)}
    assert versions.data_version(back) is not None


def test_a_half_finished_backup_is_never_taken_for_whole(
    full_once: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle: the folder has another name, restore refuses it, and it goes on."""
    to = tmp_path / "saved"
    # The last thing before the sums are written never ends.
    script = (
        "import sys, time; from ringmo import backup\n"
        "backup._sums = lambda *_: (print('here', flush=True), time.sleep(600))\n"
        "from ringmo.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "backup", str(to)]
    child = subprocess.Popen(
        [*command, "--workspace", str(full_once.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None and child.stdout.readline() == b"here\n"
    child.kill()
    child.communicate()
    assert not to.exists()
    half = tmp_path / "saved.unfinished"
    assert half.is_dir()
    for name in (half, to):
        assert main(["restore", str(name), "--workspace", str(tmp_path / "new")]) == 2
        assert "it was never finished" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

    kept = max((half / "dvc").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    before = kept.stat().st_mtime_ns
    assert main(["backup", str(to), "--workspace", str(full_once.root)]) == 0
    assert not half.exists()
    assert (to / kept.relative_to(half)).stat().st_mtime_ns == before, "brought twice"
    assert main(["backup", str(to), "--workspace", str(full_once.root)]) == 2


@pytest.fixture(scope="module")
def saved_once(full_once: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("saved") / "backup"
    with pytest.MonkeyPatch.context() as patch:
        for name in SERVERS:
            patch.delenv(name, raising=False)
        backup.backup(Config.load(full_once.params_file), full_once, to)
    return to


@pytest.mark.parametrize("wrong", ["bit", "missing", "more", "sums"])
def test_a_damaged_backup_changes_nothing(saved_once: Path, tmp_path: Path, wrong: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved_once, copy)
    victim = max((copy / "artifacts").rglob("*.safetensors"))
    if wrong == "bit":
        whole = bytearray(victim.read_bytes())
        whole[len(whole) // 2] ^= 1
        victim.write_bytes(whole)
    elif wrong == "missing":
        victim.unlink()
    elif wrong == "more":
        (copy / "artifacts" / "stranger").write_text("not of it")
    else:
        (copy / "SHA256SUMS").write_text("")
    with pytest.raises(BadInput, match=r"damaged|missing|not of it"):
        backup.restore(tmp_path / "new", copy)
    assert not (tmp_path / "new").exists()


def test_a_restore_never_overwrites(full_once: Workspace, saved_once: Path, tmp_path: Path) -> None:
    place = Workspace(tmp_path / "new")
    (place.state / "prefect").mkdir(parents=True)
    (place.state / "prefect" / "prefect.db").write_bytes(b"somebody's")
    with pytest.raises(BadInput, match="is there already"):
        backup.restore(place.root, saved_once)
    assert not place.params_file.exists() and not (place.state / "mlflow" / "mlflow.db").exists()
    shutil.rmtree(place.root)
    (place.root / "data").mkdir(parents=True)
    place.versions_file.write_text("{}\n")
    with pytest.raises(BadInput, match="has data of its own"):
        backup.restore(place.root, saved_once)


def test_a_restore_that_broke_off_goes_on(
    saved_once: Path, full_once: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workspace(tmp_path / "new")
    load = backup.Sqlite.load

    def breaks(self: backup.Sqlite, source: Path) -> None:
        if "prefect" in source.name:
            raise KeyboardInterrupt
        load(self, source)

    monkeypatch.setattr(backup.Sqlite, "load", breaks)
    with pytest.raises(KeyboardInterrupt):
        backup.restore(place.root, saved_once)
    assert (place.state / "mlflow" / "mlflow.db").exists()
    monkeypatch.setattr(backup.Sqlite, "load", load)
    backup.restore(place.root, saved_once)
    assert registry(place)[2] == registry(full_once)[2]


def test_servers_elsewhere_are_told_where_to_back_up(
    full_once: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="MLFLOW_BACKEND_STORE_URI"):
        backup.backup(Config.load(full_once.params_file), full_once, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    made = Postgres()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.mark.slow
def test_postgres_and_s3_come_back(
    workspace: Workspace,
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both databases in PostgreSQL, artifacts and data versions in S3, and all of it lost."""
    monkeypatch.setenv("PATH", f"{postgres_programs()}{os.pathsep}{os.environ['PATH']}")
    s3 = S3(tmp_path / "s3")
    for name in ("artifacts", "dvc"):
        (tmp_path / "s3" / name).mkdir()
    s3.start()
    try:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        endpoint = s3.environment["MLFLOW_S3_ENDPOINT_URL"]
        remote = {"versioning.remote": "s3://dvc/store", "versioning.endpoint": endpoint}
        config.edit(workspace.params_file, remote)
        data_version(workspace)
        mlflow, prefect = postgres.database(), postgres.database()
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", postgres.uri(mlflow))
        flows = postgres.uri(prefect).replace("psycopg2", "asyncpg")
        monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", flows)
        monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://artifacts")
        upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(upgrade, check=True, capture_output=True)
        postgres.execute("INSERT INTO flow (name, tags) VALUES ('retrain', '[]')", prefect)
        # The registry in the database itself, its files through the same S3.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.uri(mlflow))
        register_three(workspace)
        promotion.promote(workspace, "scene", 2, by="ada", reason="a test")
        from ringmo.data.buckets import Bucket

        Bucket("s3://artifacts/1/a b", endpoint).put("ü.txt", workspace.params_file)
        # Every row and every counter; the tables' own definitions PostgreSQL words anew.
        dump = ["pg_dump", "-h", "127.0.0.1", "-p", str(postgres.port), "-U", "ringmo"]
        dump += ["--data-only", "--inserts"]

        def dumped(database: str) -> list[str]:
            done = subprocess.run([*dump, database], check=True, capture_output=True, text=True)
            # Each dump has a random key in it, against what hides in one.
            return sorted(line for line in done.stdout.splitlines() if "restrict" not in line)

        before = dumped(mlflow), dumped(prefect)
        objects = {
            p.relative_to(tmp_path / "s3").as_posix(): p.read_bytes()
            for p in (tmp_path / "s3").rglob("*")
            if p.is_file()
        }
        assert main(["backup", str(tmp_path / "saved"), "--workspace", str(workspace.root)]) == 0
        assert "1/a b/ü.txt" in (tmp_path / "saved" / "SHA256SUMS").read_text()

        # Not empty yet: nothing is touched.
        assert main(["restore", str(tmp_path / "saved"), "--workspace", str(tmp_path / "w")]) == 2
        assert "is not empty" in capsys.readouterr().err
        assert not (tmp_path / "w").exists()

        for name in ("artifacts", "dvc"):
            shutil.rmtree(tmp_path / "s3" / name)
            (tmp_path / "s3" / name).mkdir()
        for database in (mlflow, prefect):
            postgres.execute(f"DROP DATABASE {database} WITH (FORCE)")
            postgres.execute(f"CREATE DATABASE {database}")
        assert main(["restore", str(tmp_path / "saved"), "--workspace", str(tmp_path / "w")]) == 0
        assert (dumped(mlflow), dumped(prefect)) == before
        assert objects == {
            p.relative_to(tmp_path / "s3").as_posix(): p.read_bytes()
            for p in (tmp_path / "s3").rglob("*")
            if p.is_file()
        }
        back = Workspace(tmp_path / "w")
        assert Tracker(back).aliased("scene", "champion").version == 2  # type: ignore[union-attr]
        assert versions.data_version(back) == versions.data_version(workspace)
        assert (back.store / "manifest.parquet").is_file()
        told = json.loads((tmp_path / "saved" / "backup.json").read_text())
        assert told["databases"] == {"mlflow": "mlflow.pgdump", "prefect": "prefect.pgdump"}

        postgres_secret = "not a path: postgresql"
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", postgres_secret)
        assert main(["backup", str(tmp_path / "two"), "--workspace", str(workspace.root)]) == 2
    finally:
        s3.stop()
