"""An interrupted registration leaves a whole version or none, and can be done again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import die_at, start

from ringmo.config import Config
from ringmo.errors import Unreachable
from ringmo.registry.register import open_bundle, register
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

pytestmark = pytest.mark.slow


def _register(root: Path, moment: int | None = None) -> None:
    if moment is not None:
        die_at(moment)
    workspace = Workspace(root)
    register(Config.load(workspace.params_file), workspace, "scene", {"flow_run": "f7"})


def test_killed_at_any_call_it_leaves_whole_versions_only(
    tracked: Workspace, make_model: Any
) -> None:
    """SIGKILL before and after each call that writes, one after the other."""
    moment = 0
    while True:
        make_model(moment)
        process = start(_register, tracked.root, moment)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        _register(tracked.root)
        versions = Tracker(tracked).versions("scene")
        assert [v.version for v in versions] == list(range(moment + 1, 0, -1))
        assert versions[0].aliases == ("candidate",) and versions[0].tags["flow_run"] == "f7"
        open_bundle(Tracker(tracked), versions[0]).check_example()
        moment += 1
    assert moment >= 10


def _down(central: Any) -> None:
    central.s3.stop()


def _read_only(central: Any) -> None:
    central.s3.stop()
    central.s3.start("--read-only")


@pytest.mark.parametrize("through", ["server", "client"])
@pytest.mark.parametrize("fault", [_down, _read_only])
def test_an_artifact_store_that_takes_nothing(
    central: Any,
    workspace: Workspace,
    config: Config,
    make_model: Any,
    fault: Callable[[Any], None],
    through: str,
) -> None:
    """Files go through MLflow's server, or straight to S3 where an experiment says so."""
    make_model()
    if through == "client":
        Tracker(workspace)._client.create_experiment("finetune-scene", "s3://bucket/straight")
    fault(central)
    try:
        with pytest.raises(Unreachable) as said:
            register(config, workspace, "scene", {})
    finally:
        central.s3.stop()
        central.s3.start()
    assert said.value.exit_code == 3 and "\n" not in str(said.value)
    assert Tracker(workspace).versions("scene") == []
    version = register(config, workspace, "scene", {})
    assert (version.version, version.aliases) == (1, ("candidate",))
    assert version.source.startswith("s3:" if through == "client" else "mlflow-artifacts:")
    open_bundle(Tracker(workspace), version).check_example()
