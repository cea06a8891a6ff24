"""There always is one champion, and every move is on record."""

import multiprocessing
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from ringmo.config import Config
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.registry import promotion
from ringmo.registry.register import register
from ringmo.registry.tracker import Tracker, Version
from ringmo.workspace import Workspace


@pytest.fixture
def three(tracked: Workspace, config: Config, make_model: Any) -> list[Version]:
    """Three versions that the gate has passed."""
    versions = []
    for seed in (1, 2, 3):
        make_model(seed)
        versions.append(register(config, tracked, "scene", {"verdict": "passed"}))
    return versions


def aliases(workspace: Workspace) -> dict[str, int]:
    return {alias: v.version for v in Tracker(workspace).versions("scene") for alias in v.aliases}


def test_the_champion_gives_way_and_comes_back(tracked: Workspace, three: list[Version]) -> None:
    promotion.promote(tracked, "scene", 1, by="ada", reason="first")
    assert aliases(tracked) == {"champion": 1, "candidate": 3}
    moved = promotion.promote(tracked, "scene", by="ada", reason="better")
    assert (moved["from"], moved["to"], moved["moved"]) == (1, 3, True)
    assert aliases(tracked) == {"champion": 3, "previous": 1, "candidate": 3}
    promotion.rollback(tracked, "scene", by="bob", reason="roofs are called rivers")
    assert aliases(tracked) == {"champion": 1, "previous": 3, "candidate": 3}
    rows = promotion.history(tracked, "scene")
    assert [(r["what"], r["from"], r["to"], r["who"]) for r in rows] == [
        ("rollback", 3, 1, "bob"),
        ("promote", 1, 3, "ada"),
        ("promote", None, 1, "ada"),
    ]
    assert rows[0]["why"] == "roofs are called rivers"
    assert all(row["intact"] and row["status"] == "FINISHED" for row in rows)


def test_promoting_the_champion_again_changes_nothing(
    tracked: Workspace, three: list[Version]
) -> None:
    promotion.promote(tracked, "scene", 2, by="ada", reason="")
    again = promotion.promote(tracked, "scene", 2, by="ada", reason="")
    assert again["moved"] is False and "nothing to do" in promotion.move_text(again)
    assert len(promotion.history(tracked, "scene")) == 1


def test_a_refused_version_needs_force(tracked: Workspace, three: list[Version]) -> None:
    verdict = {"verdict": "refused", "verdict_reasons": "5 points worse"}
    Tracker(tracked).tag_version(three[2], verdict)
    with pytest.raises(AnswerIsNo, match=r"5 points worse.*--force"):
        promotion.promote(tracked, "scene", 3, by="ada", reason="")
    assert promotion.history(tracked, "scene") == []
    promotion.promote(tracked, "scene", 3, by="ada", reason="I know why", force=True)
    assert promotion.history(tracked, "scene")[0]["forced"] is True


def test_a_model_that_does_not_load_is_never_promoted(
    tracked: Workspace, three: list[Version]
) -> None:
    promotion.promote(tracked, "scene", 1, by="ada", reason="")
    weights = Path(three[1].source) / "data" / "bundle" / "model.safetensors"
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(BadInput, match="damaged"):
        promotion.promote(tracked, "scene", 2, by="ada", reason="", force=True)
    assert aliases(tracked)["champion"] == 1


def test_there_is_nothing_to_roll_back_to_at_first(
    tracked: Workspace, three: list[Version]
) -> None:
    with pytest.raises(AnswerIsNo):
        promotion.rollback(tracked, "scene", by="ada", reason="")
    promotion.promote(tracked, "scene", 1, by="ada", reason="")
    with pytest.raises(AnswerIsNo):
        promotion.rollback(tracked, "scene", by="ada", reason="")
    with pytest.raises(BadInput, match="scene/9"):
        promotion.promote(tracked, "scene", 9, by="ada", reason="")


def test_an_interrupted_move_is_finished_by_the_next_command(
    tracked: Workspace, three: list[Version]
) -> None:
    promotion.promote(tracked, "scene", 1, by="ada", reason="")
    # What a kill right after the entry was written leaves behind.
    tracker = Tracker(tracked)
    champion = tracker.aliased("scene", "champion")
    done = tracker.set_alias
    try:
        tracker.set_alias = _killed  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            promotion._move(tracker, "promote", champion, three[1], "ada", "", False)
    finally:
        tracker.set_alias = done  # type: ignore[method-assign]
    assert aliases(tracked)["champion"] == 1
    with pytest.raises(BadInput):
        promotion.promote(tracked, "scene", 9, by="bob", reason="")
    assert aliases(tracked) == {"champion": 2, "previous": 1, "candidate": 3}
    assert promotion.history(tracked, "scene")[0]["status"] == "FINISHED"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_changed_entry_is_noticed(tracked: Workspace, three: list[Version]) -> None:
    promotion.promote(tracked, "scene", 1, by="ada", reason="first")
    promotion.promote(tracked, "scene", 2, by="ada", reason="second")
    tracker = Tracker(tracked)
    first = tracker.runs(promotion.EXPERIMENT, {"number": "1"})[0]
    tracker.tag_run(first.id, {"who": "eve"})
    rows = promotion.history(tracked, "scene")
    assert [row["intact"] for row in rows] == [True, False]


def _promote(root: Path, version: int) -> None:
    promotion.promote(Workspace(root), "scene", version, by="ada", reason="kill test")


@pytest.mark.slow
def test_killed_at_any_moment_there_is_one_champion(
    tracked: Workspace, three: list[Version]
) -> None:
    """SIGKILL at random moments and right after the entry appears; the next command finishes."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(
        ["mlflow", "torch", "ringmo.registry.promotion", "ringmo.models.classifier"]
    )
    _promote(tracked.root, 1)
    database = tracked.state / "mlflow" / "mlflow.db"
    begun = time.monotonic()
    whole = start.Process(target=_promote, args=(tracked.root, 2))
    whole.start()
    whole.join()
    takes = time.monotonic() - begun
    assert whole.exitcode == 0
    interrupted = 0
    target = 2
    for i in range(10):
        target = target % 3 + 1
        process = start.Process(target=_promote, args=(tracked.root, target))
        process.start()
        if i % 2:
            process.join(moments.uniform(0.3, 1.0) * takes)
        else:
            with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as watch:
                query = "SELECT count(*) FROM runs WHERE status = 'RUNNING'"
                while process.is_alive() and not watch.execute(query).fetchone()[0]:
                    pass
        process.kill()
        process.join()
        interrupted += any(
            row["status"] == "RUNNING" for row in promotion.history(tracked, "scene")
        )
        assert "champion" in aliases(tracked)
        _promote(tracked.root, target)
        now = aliases(tracked)
        assert now["champion"] == target and now["previous"] != target
        rows = promotion.history(tracked, "scene")
        assert all(row["status"] == "FINISHED" and row["intact"] for row in rows)
        assert rows[0]["to"] == target
    assert interrupted >= 2


@pytest.mark.slow
def test_two_promotions_at_once_are_one_after_the_other(
    tracked: Workspace, three: list[Version]
) -> None:
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(
        ["mlflow", "torch", "ringmo.registry.promotion", "ringmo.models.classifier"]
    )
    both = [start.Process(target=_promote, args=(tracked.root, n)) for n in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    second, first = promotion.history(tracked, "scene")
    assert {first["to"], second["to"]} == {1, 2} and second["from"] == first["to"]
    assert aliases(tracked)["champion"] == second["to"]
    assert second["intact"] and first["intact"]
