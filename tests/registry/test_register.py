"""A model enters the registry once, whole, and with all that its lineage needs."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from faults import start

from ringmo.config import Config
from ringmo.errors import BadInput, Unreachable
from ringmo.registry.register import open_bundle, register
from ringmo.registry.tracker import Tracker
from ringmo.stage import Report
from ringmo.workspace import Workspace


def _register(root: Path) -> None:
    workspace = Workspace(root)
    register(Config.load(workspace.params_file), workspace, "scene", {"flow_run": "f7"})


def test_registering_twice_is_registering_once(
    tracked: Workspace, config: Config, make_model: Any
) -> None:
    make_model(accuracy=0.61)
    first = register(config, tracked, "scene", {"flow_run": "f7"})
    second = register(config, tracked, "scene", {"flow_run": "f8"})
    assert (first.version, second.version) == (1, 1)
    assert len(Tracker(tracked).versions("scene")) == 1
    assert first.aliases == ("candidate",)
    assert first.tags["flow_run"] == second.tags["flow_run"] == "f7"


def test_another_model_is_another_version_and_the_candidate(
    tracked: Workspace, config: Config, make_model: Any
) -> None:
    make_model(1)
    register(config, tracked, "scene", {})
    make_model(2)
    assert register(config, tracked, "scene", {}).version == 2
    newest, oldest = Tracker(tracked).versions("scene")
    assert newest.aliases == ("candidate",) and oldest.aliases == ()


def test_a_version_tells_its_origins(tracked: Workspace, config: Config, make_model: Any) -> None:
    (tracked.root / "dvc.lock").write_text("schema: '2.0'\n")
    encoder = register(config, tracked, "encoder", {}) if make_model(kind="encoder") else None
    assert encoder is not None
    make_model(encoder_hash=encoder.bundle_hash, accuracy=0.61)
    version = register(config, tracked, "scene", {"reason": "schedule"})
    assert version.tags["encoder_version"] == "encoder/1"
    assert version.tags["selection"] == "5e1ec7"
    assert version.tags["reason"] == "schedule"
    assert version.figure("test_accuracy") == 0.61
    assert len(version.tags["stage_lock"]) == 64
    assert version.tags["code_clean"] in ("true", "false")
    lineage = Path(version.source) / "lineage"
    assert {"dvc.lock", "params.yaml", "revisions.yaml", "environment.txt"} <= {
        path.name for path in lineage.iterdir()
    }
    assert (lineage / "params.yaml").read_bytes() == tracked.params_file.read_bytes()
    assert "torch==" in (lineage / "environment.txt").read_text()
    assert (lineage / "source.patch").exists() == (version.tags["code_clean"] == "false")
    assert not [
        p for p in Path(version.source).rglob("*") if p.suffix in (".pkl", ".pt", ".pickle")
    ]


def test_the_files_are_kept_by_the_training_s_own_run(
    tracked: Workspace, config: Config, make_model: Any
) -> None:
    from ringmo.registry.forward import Forwarder

    make_model()
    run_dir = tracked.run_dir("finetune@scene", "1" * 64)
    run_dir.mkdir(parents=True)
    report = Report("finetune@scene", run_dir=str(run_dir.relative_to(tracked.root)))
    with Forwarder(tracked, "finetune@scene", {}) as forwarder:
        forwarder.finish(report, tracked.work("finetune@scene"))
    report.write(tracked.work("finetune@scene") / "report.json")
    assert register(config, tracked, "scene", {}).run_id == forwarder.run_id


def test_a_damaged_bundle_is_not_registered(
    tracked: Workspace, config: Config, make_model: Any
) -> None:
    weights = make_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(BadInput, match="damaged"):
        register(config, tracked, "scene", {})
    assert Tracker(tracked).versions("scene") == []


def test_files_changed_after_registration_are_noticed(
    tracked: Workspace, config: Config, make_model: Any
) -> None:
    make_model(1)
    version = register(config, tracked, "scene", {})
    make_model(2, folder=Path(version.source) / "data" / "bundle")
    with pytest.raises(BadInput, match="not the ones that were registered"):
        open_bundle(Tracker(tracked), version)


@pytest.mark.slow
@pytest.mark.parametrize("server", [True], indirect=True)
def test_a_server_that_keeps_the_files_gives_them_back(
    workspace: Workspace, config: Config, make_model: Any, server: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    make_model()
    version = register(config, workspace, "scene", {"verdict": "passed"})
    assert version.source.startswith("mlflow-artifacts:")
    model = open_bundle(Tracker(workspace), version)
    model.check_example()
    assert model.folder == workspace.state / "bundles" / version.bundle_hash
    server.stop()
    with pytest.raises(Unreachable):
        register(config, workspace, "scene", {})


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_whole_versions_only(
    tracked: Workspace, config: Config, make_model: Any
) -> None:
    """SIGKILL at random moments, then the same again: one version, whole, the candidate."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    make_model(1000)
    begun = time.monotonic()
    whole = start(_register, tracked.root)
    whole.join()
    assert whole.exitcode == 0
    begun = time.monotonic()
    make_model(1001)
    second = start(_register, tracked.root)
    second.join()
    takes = time.monotonic() - begun
    killed = 0
    for i in range(8):
        make_model(i)
        process = start(_register, tracked.root)
        process.join(moments.uniform(0.2, 1.0) * takes)
        process.kill()
        process.join()
        killed += process.exitcode != 0
        _register(tracked.root)
        versions = Tracker(tracked).versions("scene")
        assert [v.version for v in versions] == list(range(i + 3, 0, -1))
        assert versions[0].aliases == ("candidate",) and versions[0].tags["flow_run"] == "f7"
        open_bundle(Tracker(tracked), versions[0]).check_example()
    assert killed >= 2
