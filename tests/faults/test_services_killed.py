"""Each service is killed once while a chain runs on all of them, and the run ends as it must."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_rig import Rig
from fault_run import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "rig")
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_every_service_is_killed_once_and_the_run_ends_well(rig: Rig, tmp_path: Path) -> None:
    """SIGKILL to one at a time, where it is needed or will be soon; all the other pairs of service
    and stage are `make faults`."""
    run = Run(rig, tmp_path / "run", "run", again_s="10")
    run.begin()
    cells = [
        run.disturb(fault, stage)
        for stage, fault in {
            "select": "kill prefect",
            "pretrain": "kill stage",
            "scratch@scene": "kill flow",
            "finetune@scene": "kill worker",
            "evaluate@scene": "kill postgres",
            "register@encoder": "kill mlflow",
            "push": "kill s3",
        }.items()
    ]
    run.wait()
    outcomes = {cell.fault: cell.outcome for cell in cells}
    assert run.wrong({}) == [], outcomes
    assert outcomes["kill worker"] == outcomes["kill prefect"] == "went on"
    assert outcomes["kill stage"] == "the stage was tried again"
    assert outcomes["kill flow"] == "the run was begun again"
    assert any("pretrain: goes on from step" in line for line in run.resumed())
