"""An interrupted registration leaves a whole version or none, and can be done again."""

import re
import resource
import sys
import tempfile
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


@pytest.mark.long
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


def _register_on_a_full_disk(root: Path, room: int, said: Path) -> None:
    """No file may grow beyond `room` bytes: writes end as they do where no space is left."""
    tempfile.gettempdir()  # it tries all there are by writing, once
    with said.open("w") as sys.stderr:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        ended = "registered"
        try:
            _register(root)
        except (Unreachable, OSError) as error:  # of the latter the command line says the same
            ended = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    said.write_text(ended)


@pytest.mark.parametrize(
    ("what", "room"), [("store", 3_000), ("store and database", 0), ("store and database", 30_000)]
)
def test_a_full_disk(
    what: str,
    room: int,
    request: Any,
    tracked: Workspace,
    make_model: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Some files fit, and the weights do not."""
    if what == "store":
        server = request.getfixturevalue("server")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    weights = make_model() / "model.safetensors"
    assert weights.stat().st_size > 30_000
    said = tmp_path / "said"
    process = start(_register_on_a_full_disk, tracked.root, room, said)
    process.join()
    assert process.exitcode == 0
    assert re.search("File too large|database or disk is full|disk I/O error", said.read_text())
    assert Tracker(tracked).versions("scene") == []
    _register(tracked.root)
    (version,) = Tracker(tracked).versions("scene")
    assert version.aliases == ("candidate",)
    open_bundle(Tracker(tracked), version).check_example()
