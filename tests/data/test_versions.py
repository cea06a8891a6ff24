"""DVC's door: versions follow the store, the graph is dvc.yaml's, remotes give back the bytes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from typing import Any

import pytest
from false_clock import FalseClock
from small_imagery import class_folders, tree

from ringmo import config as params
from ringmo.config import Config
from ringmo.data import versions
from ringmo.errors import BadInput, Unreachable
from ringmo.stage import REVISIONS


def config(workspace: Any) -> Config:
    return Config.load(workspace.params_file)


def test_stages_come_after_what_they_read(workspace):
    found = versions.stages(workspace)
    names = [stage.name for stage in found]
    assert sorted(names) == [
        "evaluate@scene", "finetune@scene", "pretrain", "scratch@scene", "select", "validate",
    ]  # fmt: skip
    for stage in found:
        assert all(names.index(up) < names.index(stage.name) for up in stage.upstream)
    last = found[-1]
    assert (last.name, last.outs) == ("evaluate@scene", ("work/evaluate-scene",))
    assert last.upstream == ("finetune@scene", "scratch@scene", "select")
    assert "revisions.yaml:evaluate" in last.params
    assert "work/finetune-scene/model" in last.deps


def test_everything_has_changed_before_the_first_run(workspace):
    changed = versions.changed(workspace)
    assert set(changed) == {stage.name for stage in versions.stages(workspace)}
    assert all(changed.values())


def test_revisions_follow_the_code_and_keep_their_comment(workspace):
    path = workspace.root / "revisions.yaml"
    versions.sync_revisions(workspace)
    before = path.read_text()
    path.write_text(before.replace("select: 1", "select: 0\ngone: 3"))
    versions.sync_revisions(workspace)
    from ringmo.config import read_yaml

    assert read_yaml(path) == REVISIONS
    assert path.read_text().startswith("#")


def test_log_cut_short_by_a_kill_is_read(workspace):
    workspace.versions_file.parent.mkdir(parents=True)
    workspace.versions_file.write_text('{"version": "a.dir"}\n{"vers')
    assert versions.versions(workspace) == [{"version": "a.dir"}]


def test_lock_entry_is_what_ran(workspace):
    assert versions.lock_entry(workspace, "select") == {}
    (workspace.root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  select:\n    cmd: x\n")
    assert versions.lock_entry(workspace, "select") == {"cmd": "x"}


def test_no_store_is_one_line(workspace):
    with pytest.raises(BadInput, match="ringmo ingest"):
        versions.add_store(workspace, config(workspace))


def test_a_selection_names_the_version_it_was_made_from(workspace):
    workspace.versions_file.parent.mkdir(parents=True)
    rows = ('{"version": "a.dir", "manifest": "11"}', '{"version": "b.dir", "manifest": "22"}')
    workspace.versions_file.write_text("\n".join(rows))
    lock = (
        "stages:\n  select:\n    deps:\n    - path: data/store/manifest.parquet\n      md5: '11'\n"
    )
    (workspace.root / "dvc.lock").write_text(lock)
    assert versions.selected_version(workspace) == "a.dir"


@pytest.mark.slow
def test_versions_follow_the_store_through_links_that_may_not_be_written(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in", each=6)
    run(source)
    first = versions.add_store(workspace, config(workspace))
    old = tree(workspace.store)
    assert versions.add_store(workspace, config(workspace)) == first
    assert versions.data_version(workspace) == first
    class_folders(source, start=50, each=4)
    (source / "class0" / "bad.jpg").write_bytes(b"")
    run(source)
    second = versions.add_store(workspace, config(workspace))
    rows = versions.versions(workspace)
    assert [row["version"] for row in rows] == [first, second]
    assert [(row["tiles"], row["set_aside"]) for row in rows] == [(18, 0), (30, 1)]
    assert rows[1]["classes"] == 3
    assert not rows[1]["generated"]
    # The version before is whole in the cache, its manifest never written in place.
    cache = workspace.root / ".dvc" / "cache" / "files" / "md5"
    kept = {path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert set(old.values()) <= kept


@pytest.mark.slow
def test_one_stage_runs_by_this_python_whatever_path_is(run, workspace, tmp_path, monkeypatch):
    run(class_folders(tmp_path / "in"))
    versions.add_store(workspace, config(workspace))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command = versions.repro_command(workspace, "validate")
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((workspace.work("validate") / "verdict.json").read_text())["ok"]
    changed = versions.changed(workspace)
    assert "validate" not in changed
    assert versions.lock_entry(workspace, "validate")["cmd"] == "ringmo validate"
    params.edit(workspace.params_file, {"validate.min_per_class": 9})
    assert versions.changed(workspace)["validate"] == ["validate modified"]


def lose_and_pull(workspace: Any) -> None:
    before = tree(workspace.store)
    shutil.rmtree(workspace.store)
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    versions.pull(workspace, config(workspace))
    assert tree(workspace.store) == before


@pytest.mark.slow
def test_folder_remote_gives_the_store_back(run, workspace, tmp_path):
    run(class_folders(tmp_path / "in", each=5))
    versions.add_store(workspace, config(workspace))
    versions.push(workspace, config(workspace))
    assert "../.ringmo/remote" in (workspace.root / ".dvc" / "config").read_text()
    lose_and_pull(workspace)


@pytest.mark.slow
def test_s3_remote_gives_the_store_back_and_refuses_the_wrong_secret(
    run, workspace, tmp_path, s3, monkeypatch
):
    run(class_folders(tmp_path / "in", each=5))
    versions.add_store(workspace, config(workspace))
    remote = {"versioning.remote": "s3://bucket/tiles", "versioning.endpoint": s3}
    params.edit(workspace.params_file, remote)
    versions.push(workspace, config(workspace))
    lose_and_pull(workspace)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    with pytest.raises(BadInput) as error:
        versions.pull(workspace, config(workspace))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True])
def test_remote_that_does_not_answer_is_unreachable(run, workspace, tmp_path, monkeypatch, listens):
    """Also one that takes every request and says nothing."""
    monkeypatch.setattr(versions, "READ_TIMEOUT_S", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    run(class_folders(tmp_path / "in", each=3))
    versions.add_store(workspace, config(workspace))
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1] if listens else 9
    dead = {"versioning.remote": "s3://bucket/x", "versioning.endpoint": f"http://127.0.0.1:{port}"}
    params.edit(workspace.params_file, dead)
    with silent, pytest.raises(Unreachable) as error:
        versions.push(workspace, config(workspace))
    assert "\n" not in str(error.value)


PUSH_AND_LIST = """
import sys
from ringmo.config import Config
from ringmo.data import versions
from ringmo.data.buckets import Bucket
from ringmo.errors import Unreachable
from ringmo.workspace import Workspace
place = Workspace.find(sys.argv[1])
config = Config.load(place.params_file)
there = Bucket(config.versioning.remote, config.versioning.endpoint)
for ask in (
    lambda: versions.push(place, config),
    lambda: list(there.objects()),
    lambda: versions.Remote(place, config).objects(),
):
    try:
        ask()
    except Unreachable as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_s3_refuses_is_named_and_worth_another_try(run, workspace, tmp_path, s3):
    """A real server refuses what is signed at another time, and says not why where DVC asks."""
    run(class_folders(tmp_path / "in", each=5))
    versions.add_store(workspace, config(workspace))
    remote = {"versioning.remote": "s3://bucket/clock", "versioning.endpoint": s3}
    params.edit(workspace.params_file, remote)
    clock = FalseClock(tmp_path)

    def said() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LIST, str(workspace.root)],
            env=os.environ | clock.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    for ahead_s, where in ((7200, "behind"), (-7200, "ahead of")):
        clock.set(ahead_s)
        refused = said()
        assert len(refused) == 3
        for line in refused:
            assert re.search(rf"its clock is 7\d\d\d s {where} this machine's", line)
    clock.set(0)
    assert said() == []


def test_what_two_versions_differ_in(run, workspace, tmp_path):
    source = class_folders(tmp_path / "in")

    def version():
        run(source)
        return versions.add_store(workspace, config(workspace))

    first = version()
    class_folders(source, classes=1, each=4, start=50)
    (source / "class1" / "0003.jpg").unlink()
    (source / "class2" / "0005.jpg").rename(source / "class0" / "moved.jpg")
    second = version()
    found = versions.diff(workspace, first[:8], second)
    assert (found["from"], found["to"]) == (first, second)
    assert found["tiles"] == {"added": 4, "removed": 1, "relabelled": 1}
    assert found["classes"] == {
        "class0": {"added": 5, "removed": 0},
        "class1": {"added": 0, "removed": 1},
        "class2": {"added": 0, "removed": 1},
    }
    assert found["sensors"] == {"rgb": {"added": 4, "removed": 1}}
    assert found["places"] == {"added": 4, "removed": 1}
    back = versions.diff(workspace, "latest", "latest~1")
    assert back["tiles"] == {"added": 1, "removed": 4, "relabelled": 1}
    for name, said in (("f" * 12, "no such version"), ("latest~2", "there are 2 versions")):
        with pytest.raises(BadInput, match=said):
            versions.diff(workspace, name, second)
    same = versions.diff(workspace, second, second)
    assert same["classes"] == {} and same["tiles"]["added"] == 0
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    with pytest.raises(BadInput, match="not in this workspace's DVC cache"):
        versions.diff(workspace, first, second)
