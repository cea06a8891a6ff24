"""Cleaning: what nothing reaches goes, and what stays can be made again to the last bit."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from imagery import write_class_folders
from registered_chain import recorded, registered_chain
from servers import S3, MLflow
from stages import prepared

from ringmo import chain, cleaning, config
from ringmo.cli import main
from ringmo.config import Config
from ringmo.data import versions
from ringmo.errors import BadInput
from ringmo.evaluation.evaluate import evaluate
from ringmo.registry import lineage, promotion, reproduce, verify
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker
from ringmo.stage import run_stage
from ringmo.training.finetune import finetune
from ringmo.workspace import Workspace

pytestmark = pytest.mark.slow

CLEAN = {"clean.keep_runs": 1, "clean.keep_days": 0}


def cycle(workspace: Workspace, seed: int, sources: Path | None = None) -> None:
    """What a retraining does: new imagery where there is some, a new model, registered, promoted.

    The encoder stays, as with pretrain.refresh: keep.
    """
    config.edit(workspace.params_file, {"finetune.scene.seed": seed})
    settings = Config.load(workspace.params_file)
    if sources is not None:
        write_class_folders(sources, 2, seed=100 + seed)
        prepared(settings, workspace)
        versions.add_store(workspace, settings)
    for stage, alone in (("finetune", False), ("scratch", True)):
        run_stage(
            workspace,
            f"{stage}@scene",
            lambda out, alone=alone: finetune(settings, workspace, out, "scene", alone),
        )
    run_stage(workspace, "evaluate@scene", lambda out: evaluate(settings, workspace, out, "scene"))
    recorded(workspace)
    model = chain.register(settings, workspace, "scene").figures["model"]
    number = int(model.rpartition("/")[2])
    promotion.promote(workspace, "scene", number, by="test", reason="newer", force=True)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """scene/1 to scene/4 on encoder/1, three data versions; champion is 4, `previous` 3."""
    folder = tmp_path_factory.mktemp("grown")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Tracker(Workspace(folder))
        database = folder / ".ringmo" / "mlflow" / "mlflow.db"
        lenient = {"gate.scene.max_drop": 1.0, "pretrain.refresh": "keep"}
        lenient |= {"evaluate.histogram_baseline": False, "evaluate.bootstrap_samples": 100}
        workspace = registered_chain(folder, database, **lenient)
        for seed in (2, 3, 4):
            cycle(workspace, seed, folder / "town" if seed < 4 else None)
    config.edit(workspace.params_file, CLEAN)
    shutil.rmtree(workspace.state / "running")  # trainings of this very process, which lives on
    return workspace


@pytest.fixture
def place(grown: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # a run's files, by its id, which each copy has again
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Workspace(tmp_path / "workspace")
    shutil.copytree(grown.root, made.root)
    places = ("model_versions.source", "model_versions.storage_location", "runs.artifact_uri")
    with sqlite3.connect(made.state / "mlflow" / "mlflow.db") as database:
        for where in (*places, "experiments.artifact_location"):
            table, column = where.split(".")
            database.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)",
                (str(grown.root), str(made.root)),
            )
    database.close()
    return made


def clean(place: Workspace, **how: Any) -> dict[str, Any]:
    return cleaning.clean(Config.load(place.params_file), place, **how)


def counts(result: dict[str, Any]) -> dict[str, int]:
    return {row["kind"]: row["count"] for row in result["kinds"] if row["count"]}


def files(place: Workspace) -> dict[str, int]:
    """Every file but what MLflow and DVC note for themselves, with its size."""
    own = (place.state / "mlflow" / "mlflow.db", place.root / ".dvc" / "tmp")
    return {
        str(path.relative_to(place.root)): path.stat().st_size
        for path in place.root.rglob("*")
        if path.is_file() and not any(path.is_relative_to(one) for one in own)
        if path.suffix != ".lock"
    }


def holds(place: Workspace, ref: str) -> None:
    """Every link of its lineage was compared, pixels included, and holds."""
    links = verify.verify(place, ref, deep=True)
    assert not verify.broken(links), verify.text(links)
    own = [link for link in links if link.of == ref and link.state != verify.OK]
    # The training's commit is not this one where the tree has changes.
    assert {link.link for link in own} <= {"code"}, verify.text(links)


@pytest.mark.long
def test_what_goes_is_shown_first_and_what_stays_can_be_made_again(
    place: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(place)
    data = [row["version"] for row in versions.versions(place)]
    assert len(data) == 3
    where = ["--workspace", str(place.root)]
    assert main(["clean", "--dry-run", "--json", *where]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert files(place) == before
    # The first data version is the encoder's, the last that of the champion and `previous`.
    assert shown["models"] == ["scene/2", "scene/1"] and shown["data_versions"] == [data[1]]
    assert counts(shown)["models' files"] == 2
    assert main(["clean", "--dry-run", *where]) == 0
    said = capsys.readouterr().out
    assert "Next: ringmo clean" in said and "DVC cache" in said

    assert main(["clean", "--json", *where]) == 0
    done = json.loads(capsys.readouterr().out)
    assert counts(done) == counts(shown)
    after = files(place)
    freed = sum(before.values()) - sum(after.values())
    assert freed == pytest.approx(done["bytes"], rel=0.01) and freed > 100_000
    assert counts(clean(place)) == {}, "all that goes went at once"

    for ref in ("scene/4", "scene/3", "encoder/1"):
        holds(place, ref)
    command = [sys.executable, "-m", "ringmo", "reproduce", "scene@previous", "--json", *where]
    command += ["--to", str(tmp_path / "again")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.stdout, made.stderr[-3000:]
    again = json.loads(made.stdout)
    assert again["identical"] or again.get("reasons"), again
    # Its encoder is of an earlier selection, whose labels alone its k-NN figure was of.
    other = {row["figure"] for row in again["figures"] if row["same"] == reproduce.DIFFERS}
    assert other <= {"knn_accuracy"} or again["reasons"], again

    # What went says so, and no stack of calls.
    today = datetime.now(UTC).date().isoformat()
    gone = f"scene/1: its files were cleaned on {today} (`ringmo clean`)"
    told = lineage.text(lineage.lineage(place, "scene/1"))
    assert gone in told and data[0] in told
    with pytest.raises(BadInput, match="its files were cleaned on"):
        reproduce.reproduce(place, "scene/1", tmp_path / "gone")
    assert main(["lineage", "scene/1", "--verify", *where]) == 0
    assert gone in capsys.readouterr().out
    assert main(["models", "scene", *where]) == 0
    assert f"cleaned {today}" in capsys.readouterr().out
    assert main(["predict", str(next(tmp_path.rglob("*.tar"))), "--model", "scene/1", *where]) == 2
    assert gone in capsys.readouterr().err
    assert main(["data", "diff", data[1], data[2], *where]) == 2
    assert f"cleaned on {today}" in capsys.readouterr().err
    assert main(["data", "diff", data[0], data[2], *where]) == 0


def test_the_last_runs_and_the_young_stay(place: Workspace) -> None:
    config.edit(place.params_file, {"clean.keep_runs": 4})
    assert "models' files" not in counts(clean(place, dry_run=True))
    config.edit(place.params_file, {"clean.keep_runs": 3})
    assert clean(place, dry_run=True)["models"] == ["scene/1"]
    config.edit(place.params_file, {"clean.keep_runs": 1, "clean.keep_days": 1})
    assert counts(clean(place, dry_run=True)) == {}


def test_an_alias_of_ones_own_keeps_a_version(place: Workspace) -> None:
    Tracker(place).set_alias("scene", "paper", 1)
    assert clean(place)["models"] == ["scene/2"]
    holds(place, "scene/1")


def test_a_promotion_under_way_keeps_both_its_versions(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Tracker, "set_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            promotion.promote(place, "scene", 2, by="ada", reason="", force=True)
    assert clean(place)["models"] == ["scene/1"]
    promotion.settle(place, "scene")
    champion = Tracker(place).aliased("scene", "champion")
    assert champion is not None and champion.version == 2
    holds(place, "scene/2")


KILLED = """
import os, sys
from functools import wraps
from pathlib import Path
from ringmo import cleaning
from ringmo.config import Config
from ringmo.workspace import Workspace

place, left = Workspace(Path(sys.argv[1])), int(sys.argv[2])

def counted(remove):
    @wraps(remove)
    def one(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        remove(*arguments)
    return one

cleaning._remove_path = counted(cleaning._remove_path)
cleaning.Tracker.remove_artifacts = counted(cleaning.Tracker.remove_artifacts)
cleaning.clean(Config.load(place.params_file), place)
"""


@pytest.mark.parametrize("removals", [0, 7])
def test_killed_in_the_middle_the_next_one_goes_on(place: Workspace, removals: int) -> None:
    shown = clean(place, dry_run=True)
    done = subprocess.run([sys.executable, "-c", KILLED, str(place.root), str(removals)])
    assert done.returncode == -signal.SIGKILL
    holds(place, "scene/4")
    holds(place, "scene/3")
    clean(place)
    assert counts(clean(place)) == {}
    for ref in ("scene/1", "scene/2"):
        assert "cleaned on" in lineage.text(lineage.lineage(place, ref))
    kept = Tracker(place).artifact_uri
    for number in (1, 2):
        version = Tracker(place).version("scene", number)
        assert version is not None and not Path(kept(version.run_id)).exists()
    holds(place, "scene/3")
    assert shown["models"] == ["scene/2", "scene/1"]


def test_it_waits_for_who_trains_and_says_who(place: Workspace) -> None:
    changes = {"finetune.scene.epochs": 2000, "finetune.scene.checkpoint_every_s": 0}
    config.edit(place.params_file, changes)
    command = [sys.executable, "-m", "ringmo"]
    where = ["--workspace", str(place.root)]
    training = subprocess.Popen(
        [*command, "finetune", "scene", *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 600
        while not _checkpoints(place, training.pid):
            assert training.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
        assert any("finetune@scene" in one for one in cleaning.at_work(place))
        removal = subprocess.Popen([*command, "clean", *where], stderr=subprocess.PIPE, text=True)
        assert removal.stderr is not None
        line = removal.stderr.readline()
        assert line == f"clean: waiting for finetune@scene (process {training.pid})\n"
        assert removal.poll() is None and Tracker(place).version("scene", 1).cleaned is None
    finally:
        training.kill()
        training.wait()
    assert removal.wait(60) == 0
    removal.stderr.close()
    assert Tracker(place).version("scene", 1).cleaned
    # What it had reached is there: the same command goes on from it.
    assert _checkpoints(place, training.pid)


def _checkpoints(place: Workspace, pid: int) -> list[Path]:
    try:
        said = json.loads((place.state / "running" / "finetune-scene.json").read_text())
    except (OSError, ValueError):
        return []
    return list((place.root / said["run_dir"]).rglob("*.safetensors")) * (said["pid"] == pid)


def test_nobody_begins_meanwhile(place: Workspace) -> None:
    """An ingest that is begun during a removal waits for its end, and says for whom."""
    begun = subprocess.Popen(
        [sys.executable, "-m", "ringmo", "ingest", "--workspace", str(place.root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with cleaning._undisturbed(place):
        assert begun.stderr is not None
        assert f"process {os.getpid()}" in begun.stderr.readline()
        assert begun.poll() is None
    assert begun.wait(120) == 0
    begun.stderr.close()


@pytest.mark.long
def test_cycle_after_cycle_the_size_stays(place: Workspace) -> None:
    sizes = []
    for seed in (11, 12, 13):
        cycle(place, seed)
        clean(place)
        sizes.append(sum(files(place).values()))
    assert max(sizes) < 1.02 * min(sizes), sizes
    assert counts(clean(place)) == {}
    holds(place, "scene/7")


def test_the_same_model_made_again_is_a_version_with_files_again(place: Workspace) -> None:
    first = Tracker(place).version("scene", 1)
    assert first is not None
    kept = place.root.parent / "kept"
    shutil.copytree(Tracker(place).bundle_folder(first), kept)
    clean(place)
    work = place.work("finetune@scene") / "model"
    shutil.rmtree(work)
    shutil.copytree(kept, work)
    settings = Config.load(place.params_file)
    again = register(settings, place, "scene", {})
    assert (again.version, again.bundle_hash) == (5, first.bundle_hash)
    assert Tracker(place).bundle_folder(again).is_dir()
    found = Tracker(place).of_bundle("scene", first.bundle_hash)
    assert found is not None and found.version == 5


def test_what_others_may_use_goes_only_when_asked_for(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = S3(tmp_path / "s3")
    s3.start()
    try:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        remote = {"versioning.remote": "s3://bucket/tiles"}
        remote["versioning.endpoint"] = f"http://127.0.0.1:{s3.port}"
        config.edit(place.params_file, remote)
        settings = Config.load(place.params_file)
        versions.push(place, settings)
        orphan = tmp_path / "s3" / "bucket" / "tiles" / "files" / "md5" / "ab"
        orphan.mkdir(exist_ok=True)
        (orphan / ("0" * 30)).write_bytes(b"x" * 1000)
        before = sorted(p.name for p in (tmp_path / "s3").rglob("*") if p.is_file())
        clean(place)
        assert before == sorted(p.name for p in (tmp_path / "s3").rglob("*") if p.is_file())
        done = clean(place, shared=True)
        assert counts(done) == {"DVC remote": 1} and done["bytes"] == 1000
        assert not (orphan / ("0" * 30)).exists()
        # What it still has gives the store back.
        shutil.rmtree(place.store)
        shutil.rmtree(place.root / ".dvc" / "cache")
        versions.pull(place, settings)
        holds(place, "scene/4")
    finally:
        s3.stop()


def test_a_server_s_files_go_only_when_asked_for(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that MLFLOW_TRACKING_URI names, which keeps the files itself."""
    folder = tmp_path / "server"
    folder.mkdir()
    database = f"sqlite:///{folder / 'mlflow.db'}"
    server = MLflow(database, str(folder / "kept"), kept=True)
    try:
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        cycle(place, 21)
        cycle(place, 22)
        cycle(place, 23)
        there = sorted(p for p in (folder / "kept").rglob("*") if p.is_file())
        notes = clean(place)["notes"]
        assert any("--shared" in note for note in notes)
        assert there == sorted(p for p in (folder / "kept").rglob("*") if p.is_file())
        assert clean(place, shared=True)["models"] == ["scene/1"]
        holds(place, "scene/3")
        holds(place, "scene/2")
        with pytest.raises(BadInput, match="cleaned on"):
            Tracker(place).bundle_folder(Tracker(place).version("scene", 1))
    finally:
        server.stop()


def test_a_server_s_log_is_cut_while_it_writes(place: Workspace) -> None:
    logs = place.state / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / "mlflow.log"
    log.write_text("old\n" * (cleaning.LOG_BYTES // 4 + 1))
    with log.open("ab", buffering=0) as server:
        server.write(b"before\n")
        assert counts(clean(place))["servers' logs"] == 1
        server.write(b"after\n")
    said = log.read_text()
    assert len(said) < 1.1 * cleaning.LOG_KEPT and said.endswith("old\nbefore\nafter\n")


def test_samples_and_what_killed_commands_left_go_by_their_age(place: Workspace) -> None:
    today = datetime.now(UTC).date()
    days = [today - timedelta(days=n) for n in (0, 29, 30, 400)]
    for day in days:
        folder = place.state / "production" / "scene" / day.isoformat()
        folder.mkdir(parents=True)
        (folder / "part-1.parquet").write_bytes(b"rows")
    left, new = place.root / "work" / ".pretrain.tmp", place.root / "work" / ".select.tmp"
    for path in (left, new):
        path.mkdir()
    os.utime(left, (time.time() - 7200,) * 2)
    answers = place.state / "answers"
    (answers / ".begun.work").mkdir(parents=True)
    (answers / "finished.mask.tif").write_bytes(b"somebody's")
    for path in answers.iterdir():
        os.utime(path, (1, 1))
    done = counts(clean(place))
    assert done["samples of production"] == 2 and done["left by what was killed"] == 1
    assert sorted(p.name for p in (place.state / "production" / "scene").iterdir()) == [
        days[1].isoformat(), days[0].isoformat(),
    ]  # fmt: skip
    assert new.is_dir() and not left.exists()
    assert [path.name for path in answers.iterdir()] == ["finished.mask.tif"]


def test_figures_that_mlflow_has_not_got_stay(place: Workspace) -> None:
    old = place.state / "runs" / "finetune-scene-0123456789abcdef"
    shutil.copytree(sorted((place.state / "runs").glob("finetune-scene-*"))[0], old)
    state = {"stage": "finetune@scene", "status": "FINISHED", "closed": False, "tags": {}}
    (old / "mlflow.json").write_text(json.dumps(state))
    for path in (old, *old.rglob("*")):
        os.utime(path, (1, 1))
    clean(place)
    assert old.is_dir()
    (old / "mlflow.json").write_text(json.dumps(state | {"closed": True}))
    os.utime(old / "mlflow.json", (1, 1))
    os.utime(old, (1, 1))
    clean(place)
    assert not old.exists()


def test_without_the_list_of_its_data_the_cache_is_left_alone(place: Workspace) -> None:
    current = versions.data_version(place)
    assert current is not None
    cache = versions.Cache(place)
    cache.file(current).unlink()
    before = sorted(digest for digest, _ in cache.objects())
    done = clean(place)
    assert any("DVC's cache is left alone" in note for note in done["notes"])
    assert before == sorted(digest for digest, _ in cache.objects())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
