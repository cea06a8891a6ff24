"""What is asked again when it fails, how often, and what is not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Failed

from flows import stages
from flows.stages import OUTAGE_TRIES, StageFailed, patiently, waits, worth_a_retry
from ringmo.config import Config
from ringmo.errors import BadInput, Unreachable
from ringmo.process_group import GroupEnded
from ringmo.workspace import Workspace


@pytest.fixture
def config(workspace: Workspace) -> Config:
    return Config.load(workspace.params_file)


def test_an_outage_is_waited_out_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values that a new workspace has."""
    slept: list[float] = []
    monkeypatch.setattr(stages.time, "sleep", slept.append)
    config = Config.load(Path("params.yaml"))
    left = [OUTAGE_TRIES]

    def answers_at_last() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise Unreachable("MLflow does not answer")
        return "here"

    assert patiently(config, answers_at_last) == "here"
    assert slept == [10, 20, 40, 80, 160, 320] and sum(slept) > 600

    def never() -> str:
        raise Unreachable("MLflow does not answer")

    with pytest.raises(Unreachable):
        patiently(config, never)

    def refuses() -> str:
        raise BadInput("no such model")

    slept.clear()
    with pytest.raises(BadInput):
        patiently(config, refuses)
    assert slept == []


def test_a_crash_is_tried_again_as_often_as_params_say_and_a_refusal_never(config: Config) -> None:
    again = worth_a_retry(config.run.retries)

    def asked(error: BaseException, run_count: int) -> bool:
        answer: Any = again(None, SimpleNamespace(run_count=run_count), Failed(data=error))
        return bool(answer)

    crash = StageFailed("killed", 3, retry=True, crashed=True)
    assert [asked(crash, n) for n in (1, 2, 3)] == [True, True, False]
    outage = StageFailed("S3 does not answer", 3, retry=True)
    assert all(asked(outage, n) for n in range(1, OUTAGE_TRIES + 1))
    assert not asked(StageFailed("the gate says no", 1, retry=False), 1)
    assert not asked(GroupEnded(), 1)
    assert len(waits(config)) == OUTAGE_TRIES
