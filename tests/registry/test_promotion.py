"""There always is one champion, and every move is on record."""

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import die_at, forked, start
from registered import write_model

from ringmo import config
from ringmo.cli import main
from ringmo.errors import AnswerIsNo, BadInput, Unreachable
from ringmo.registry import promotion
from ringmo.registry.tracker import Tracker, Version
from ringmo.workspace import Workspace, init


def aliases(workspace: Workspace) -> dict[str, int]:
    return {alias: v.version for v in Tracker(workspace).versions("scene") for alias in v.aliases}


def versions(workspace: Workspace) -> dict[int, Version]:
    return {version.version: version for version in Tracker(workspace).versions("scene")}


def promote(workspace: Workspace, *numbers: int, **options: Any) -> None:
    for number in numbers:
        promotion.promote(workspace, "scene", number, by="ada", reason="better", **options)


def rollback(workspace: Workspace) -> dict[str, Any]:
    return promotion.rollback(workspace, "scene", by="bob", reason="roofs are called rivers")


def whole_record(workspace: Workspace) -> list[dict[str, Any]]:
    """The history, once it is sure that nothing is unfinished or doubtful in it."""
    rows = promotion.history(workspace, "scene")
    assert all(row["intact"] and row["status"] == "FINISHED" for row in rows)
    assert [row["number"] for row in rows] == list(range(len(rows), 0, -1))
    assert Tracker(workspace).claims(f"{promotion.EXPERIMENT}/") == {}
    return rows


def test_a_registry_that_does_not_answer_is_reported_as_worth_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the chain: an outage is waited for longer than a crash is tried again."""
    workspace = init(tmp_path / "workspace")
    monkeypatch.setenv("RINGMO_WORKSPACE", str(workspace.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["promote", "scene/1"]) == 3
    report = json.loads(workspace.report_file("promote@scene").read_text())
    assert report["retry"] and report["exit_code"] == 3 and "does not answer" in report["reason"]


def test_the_champion_gives_way_and_comes_back(anywhere: Workspace) -> None:
    promote(anywhere, 1)
    assert aliases(anywhere) == {"champion": 1, "candidate": 3}
    moved = promotion.promote(anywhere, "scene", by="ada", reason="better")
    assert (moved["from"], moved["to"], moved["moved"]) == (1, 3, True)
    assert aliases(anywhere) == {"champion": 3, "previous": 1, "candidate": 3}
    assert rollback(anywhere)["to"] == 1
    assert aliases(anywhere) == {"champion": 1, "candidate": 3}
    rows = whole_record(anywhere)
    assert [(r["what"], r["from"], r["to"], r["who"]) for r in rows] == [
        ("rollback", 3, 1, "bob"),
        ("promote", 1, 3, "ada"),
        ("promote", None, 1, "ada"),
    ]
    assert rows[0]["why"] == "roofs are called rivers"


def test_a_second_rollback_goes_back_one_further(three: Workspace) -> None:
    promote(three, 1, 2, 3)
    assert rollback(three)["to"] == 2
    assert aliases(three) == {"champion": 2, "previous": 1, "candidate": 3}
    assert rollback(three)["to"] == 1
    with pytest.raises(AnswerIsNo, match="no previous champion"):
        rollback(three)
    # A promotion after a rollback is undone by going back to what it took the place of.
    promote(three, 3)
    assert aliases(three)["previous"] == 1
    assert rollback(three)["to"] == 1


def test_promoting_the_champion_again_changes_nothing(three: Workspace) -> None:
    promote(three, 2)
    again = promotion.promote(three, "scene", 2, by="ada", reason="")
    assert again["moved"] is False and "nothing to do" in promotion.move_text(again)
    assert len(whole_record(three)) == 1


def test_there_is_nothing_to_roll_back_to_at_first(three: Workspace) -> None:
    with pytest.raises(AnswerIsNo):
        rollback(three)
    promote(three, 1)
    with pytest.raises(AnswerIsNo):
        rollback(three)
    with pytest.raises(BadInput, match="scene/9"):
        promote(three, 9)


# What the gate has to do with it


def test_a_refused_version_needs_force(three: Workspace) -> None:
    verdict = {"verdict": "refused", "verdict_reasons": "5 points worse"}
    Tracker(three).tag_version(versions(three)[3], verdict)
    with pytest.raises(AnswerIsNo, match=r"5 points worse.*--force"):
        promote(three, 3)
    assert promotion.history(three, "scene") == []
    promote(three, 3, force=True)
    assert promotion.history(three, "scene")[0]["forced"] is True


def test_a_verdict_holds_against_the_champion_it_was_given_against(three: Workspace) -> None:
    promote(three, 1)
    Tracker(three).tag_version(versions(three)[3], {"verdict_against": "scene/1"})
    promote(three, 2)
    with pytest.raises(AnswerIsNo, match=r"compared it with scene/1.*champion is scene/2"):
        promote(three, 3)
    assert rollback(three)["to"] == 1
    promote(three, 3)


# What is never promoted, by force neither


def _damaged(workspace: Workspace) -> None:
    weights = Path(versions(workspace)[2].source) / "data" / "bundle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


def _deleted(workspace: Workspace) -> None:
    shutil.rmtree(versions(workspace)[2].source)


def _unreadable(workspace: Workspace) -> None:
    weights = Path(versions(workspace)[2].source) / "data" / "bundle" / "model.safetensors"
    weights.unlink()
    weights.mkdir()


def _of_another_task(workspace: Workspace) -> None:
    place = Path(versions(workspace)[2].source) / "data" / "bundle"
    shutil.rmtree(place)
    write_model(workspace, kind="encoder", folder=place)
    _registered_as_it_is(workspace, place)


def _answering_otherwise(workspace: Workspace) -> None:
    """Weights of another training in the file, and a hash that fits them."""
    from safetensors.torch import load, save

    place = Path(versions(workspace)[2].source) / "data" / "bundle"
    tensors = load((place / "model.safetensors").read_bytes())
    moved = {n: t + 0.5 for n, t in tensors.items() if n.endswith("weight")}
    _rewrite(place, save(tensors | moved))
    _registered_as_it_is(workspace, place)


def _not_loading(workspace: Workspace) -> None:
    """Weights of another architecture."""
    from safetensors.torch import load, save

    place = Path(versions(workspace)[2].source) / "data" / "bundle"
    tensors = load((place / "model.safetensors").read_bytes())
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    _rewrite(place, save(tensors | {name: tensors[name][:1].contiguous()}))
    _registered_as_it_is(workspace, place)


def _rewrite(place: Path, weights: bytes) -> None:
    from hashlib import sha256

    (place / "model.safetensors").write_bytes(weights)
    meta = json.loads((place / "model.json").read_text())
    meta["weights_sha256"] = sha256(weights).hexdigest()
    (place / "model.json").write_text(json.dumps(meta))


def _registered_as_it_is(workspace: Workspace, place: Path) -> None:
    from hashlib import sha256

    both = (place / "model.safetensors").read_bytes() + (place / "model.json").read_bytes()
    tags = {"bundle_hash": sha256(both).hexdigest()}
    Tracker(workspace).tag_version(versions(workspace)[2], tags)


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (_damaged, "damaged"),
        (_deleted, "moved or deleted"),
        (_unreadable, "Is a directory"),
        (_of_another_task, "scene/2 is a model for encoder, not for scene"),
        (_answering_otherwise, "the example's answer is off"),
        (_not_loading, "weight"),
    ],
)
def test_what_cannot_answer_is_never_promoted(
    three: Workspace, happens: Callable[[Workspace], None], said: str
) -> None:
    promote(three, 1)
    happens(three)
    for force in (False, True):
        with pytest.raises(BadInput, match=said):
            promote(three, 2, force=force)
    assert aliases(three)["champion"] == 1
    assert len(whole_record(three)) == 1


@pytest.mark.parametrize("happens", [_damaged, _deleted, _unreadable, _of_another_task])
def test_there_is_no_way_back_to_what_is_damaged(
    three: Workspace, happens: Callable[[Workspace], None]
) -> None:
    promote(three, 2, 3)
    happens(three)
    with pytest.raises(BadInput):
        rollback(three)
    assert aliases(three)["champion"] == 3


@pytest.mark.slow
def test_files_that_left_the_store_are_missed_though_there_is_a_copy(
    three_central: Workspace, central: Any
) -> None:
    promote(three_central, 1, 2)
    assert rollback(three_central)["to"] == 1
    bundle = versions(three_central)[2].bundle_hash
    assert (three_central.state / "bundles" / bundle).is_dir()
    for weights in central.s3.folder.rglob("*/data/bundle/model.safetensors"):
        weights.unlink()
    time.sleep(0.01)
    with pytest.raises(BadInput, match="moved or deleted"):
        promote(three_central, 2, force=True)
    assert aliases(three_central)["champion"] == 1


# The record


def test_a_changed_entry_is_noticed(three: Workspace, capsys: Any) -> None:
    promote(three, 1, 2)
    tracker = Tracker(three)
    first = tracker.runs(promotion.EXPERIMENT, {"number": "1"})[0]
    tracker.tag_run(first.id, {"who": "eve"})
    assert [row["intact"] for row in promotion.history(three, "scene")] == [True, False]
    assert main(["models", "scene", "--history", "--workspace", str(three.root)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "intact" in shown[2] and "BROKEN" in shown[3] and "eve" in shown[3]
    assert any(line.startswith("1 of 2 entries are BROKEN") for line in shown)


def test_a_missing_entry_is_noticed_and_its_number_not_given_again(three: Workspace) -> None:
    promote(three, 1, 2)
    tracker = Tracker(three)
    tracker._client.delete_run(tracker.runs(promotion.EXPERIMENT, {"number": "2"})[0].id)
    promote(three, 3)
    rows = promotion.history(three, "scene")
    # What the record does not know of any more is entered as it is found.
    assert [(row["number"], row["what"], row["to"], row["intact"]) for row in rows] == [
        (4, "promote", 3, True),
        (3, "outside", 2, False),
        (1, "promote", 1, True),
    ]


def test_what_was_moved_in_mlflow_itself_is_respected_and_entered(three: Workspace) -> None:
    Tracker(three).set_alias("scene", "champion", 2)
    promote(three, 1)
    Tracker(three).set_alias("scene", "champion", 3)
    promotion.settle(three, "scene")
    assert [(r["what"], r["from"], r["to"]) for r in whole_record(three)] == [
        ("outside", 1, 3),
        ("promote", 2, 1),
        ("outside", None, 2),
    ]
    assert aliases(three) == {"champion": 3, "previous": 1, "candidate": 3}


def test_a_champion_that_was_taken_away_is_put_back(three: Workspace) -> None:
    promote(three, 1, 2)
    Tracker(three).remove_alias("scene", "champion")
    promotion.settle(three, "scene")
    assert aliases(three) == {"champion": 2, "previous": 1, "candidate": 3}
    assert len(whole_record(three)) == 2


def test_a_version_deleted_from_the_registry_is_passed_over(three: Workspace) -> None:
    promote(three, 1, 2, 3)
    Tracker(three)._client.delete_model_version("scene", "2")
    assert rollback(three)["to"] == 1


def test_a_rollback_is_quick_and_loads_no_model(three: Workspace) -> None:
    """Two seconds of a processor at most, MLflow's import aside, however busy the machine is."""
    promote(three, 1, 2)
    code = (
        "import sys, time; from ringmo.cli import main; from ringmo.registry import promotion; "
        "from ringmo.registry.tracker import Tracker; from ringmo.workspace import Workspace; "
        "place = sys.argv[1]; Tracker(Workspace.find(place)); began = time.process_time(); "
        "code = main(['rollback', 'scene', '--json', '--workspace', place]); "
        "print(time.process_time() - began); "
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(three.root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, processor_s = done.stdout.splitlines()
    assert json.loads(answer)["to"] == 1
    assert json.loads(answer)["seconds"] > 0
    assert float(processor_s) < 2


# Several at once


def _promote(root: Path, version: int, barrier: Any = None) -> None:
    if barrier is not None:
        claim = Tracker.claim_name

        def together(self: Tracker, name: str, tags: Any) -> bool:
            barrier.wait(60)
            return claim(self, name, tags)

        Tracker.claim_name = together
    try:
        promotion.promote(Workspace(root), "scene", version, by=f"ada {version}", reason="race")
    except AnswerIsNo as error:
        print(error)
        sys.exit(error.exit_code)


@pytest.mark.slow
def test_two_at_once_cannot_both_win(anywhere: Workspace, tmp_path: Path) -> None:
    """They have seen the same champion, passed all checks, and claim in the same moment."""
    promote(anywhere, 1)
    other = anywhere
    if (anywhere.root / ".ringmo" / "mlflow" / "mlflow.db").exists() is False:
        other = init(tmp_path / "another-machine")
        config.edit(other.params_file, {"run.grace_s": 7})
    barrier = forked().Barrier(2)
    both = [start(_promote, place.root, n, barrier) for place, n in ((anywhere, 2), (other, 3))]
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [0, 1]
    winner = 2 if both[0].exitcode == 0 else 3
    now = aliases(anywhere)
    assert (now["champion"], now["previous"]) == (winner, 1)
    assert [row["to"] for row in whole_record(anywhere)] == [winner, 1]


def test_who_wakes_up_late_does_not_move_the_champion_back(
    three: Workspace, monkeypatch: Any
) -> None:
    """Stopped between reading the record and pointing the alias, while others go on."""
    promote(three, 1)
    point = Tracker.set_alias
    slept = []

    def late(self: Tracker, model: str, alias: str, version: int) -> None:
        if alias == "champion" and version == 2 and not slept:
            slept.append(True)
            promote(three, 3)  # finishes the move to 2, and makes another
            assert aliases(three)["champion"] == 3
        point(self, model, alias, version)

    monkeypatch.setattr(Tracker, "set_alias", late)
    promote(three, 2)
    assert slept and aliases(three) == {"champion": 3, "previous": 2, "candidate": 3}
    assert [row["to"] for row in whole_record(three)] == [3, 2, 1]


# Faults


def _promote_and_die(root: Path, version: int, moment: int) -> None:
    die_at(moment)
    _promote(root, version)


@pytest.mark.slow
def test_killed_at_any_call_the_next_command_finishes(three: Workspace) -> None:
    """SIGKILL before and after each call that writes, one after the other."""
    _promote(three.root, 1)
    target, moment, killed = 2, 0, 0
    while True:
        process = start(_promote_and_die, three.root, target, moment)
        process.join()
        before = aliases(three)
        assert "champion" in before
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        killed += 1
        _promote(three.root, target)
        now = aliases(three)
        assert now["champion"] == target and now["previous"] == 5 - target if killed > 1 else 1
        rows = whole_record(three)
        assert [row["to"] for row in rows[:2]] == [target, 5 - target if killed > 1 else 1]
        target, moment = 5 - target, moment + 1
    assert killed >= 10


@pytest.mark.slow
@pytest.mark.long
def test_mlflow_down_between_two_aliases(
    three_central: Workspace, central: Any, monkeypatch: Any
) -> None:
    promote(three_central, 1)
    point = Tracker.set_alias

    def down(self: Tracker, model: str, alias: str, version: int) -> None:
        if alias == "champion":
            central.mlflow.stop()
        point(self, model, alias, version)

    monkeypatch.setattr(Tracker, "set_alias", down)
    try:
        with pytest.raises(Unreachable, match="on record, and the next command finishes it"):
            promote(three_central, 2)
    finally:
        central.mlflow.start()
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", central.url)
    assert aliases(three_central) == {"champion": 1, "previous": 1, "candidate": 3}
    with pytest.raises(BadInput):
        promote(three_central, 9)
    assert aliases(three_central) == {"champion": 2, "previous": 1, "candidate": 3}
    assert len(whole_record(three_central)) == 2


def _hold(database: Path, free: threading.Event, held: threading.Event, limit_s: float) -> None:
    with sqlite3.connect(database, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        held.set()
        free.wait(limit_s)
        other.execute("ROLLBACK")
    other.close()


def _held(workspace: Workspace, limit_s: float) -> tuple[threading.Thread, threading.Event]:
    free, held = threading.Event(), threading.Event()
    database = workspace.state / "mlflow" / "mlflow.db"
    other = threading.Thread(target=_hold, args=(database, free, held, limit_s))
    other.start()
    assert held.wait(10)
    return other, free


def test_a_database_that_is_locked_for_a_while_is_waited_for(three: Workspace) -> None:
    other, _ = _held(three, 2)
    started = time.monotonic()
    promote(three, 1)
    assert time.monotonic() - started > 1
    other.join()
    assert aliases(three)["champion"] == 1


@pytest.mark.slow
def test_a_database_that_is_locked_for_too_long_is_said_in_one_line(
    three: Workspace, capsys: Any
) -> None:
    promote(three, 1)
    other, free = _held(three, 120)
    try:
        command = ["promote", "scene/2", "--reason", "x", "--workspace", str(three.root)]
        assert main(command) == 3
    finally:
        free.set()
        other.join()
    said = capsys.readouterr().err.strip()
    assert "database is locked" in said and "\n" not in said
    assert aliases(three) == {"champion": 1, "candidate": 3}
    assert len(whole_record(three)) == 1
