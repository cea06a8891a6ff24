"""A workspace over small imagery of its own."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def run(workspace: Any) -> Callable[..., Any]:
    """Ingest folders into the workspace; keyword arguments are params (dots as two underscores)."""

    def ingest_now(*sources: Path | str, **params: Any) -> Any:
        from ringmo import config
        from ringmo.config import Config
        from ringmo.data.ingest import ingest

        changes = {name.replace("__", "."): value for name, value in params.items()}
        changes["ingest.sources"] = [str(source) for source in sources]
        config.edit(workspace.params_file, changes)
        return ingest(Config.load(workspace.params_file), workspace)

    return ingest_now


@pytest.fixture(scope="session")
def terramesh() -> Path:
    """Real places, each seen by several sensors, where this machine has them."""
    folder = REPOSITORY.parent / "shared" / "data" / "geotiff" / "terramesh"
    if not folder.is_dir():
        pytest.skip("no real imagery beside the checkout")
    return folder


@pytest.fixture
def manifest(workspace: Any) -> Callable[[], Any]:
    def read() -> Any:
        from ringmo.data.store import TileStore

        return TileStore(workspace.store).manifest()

    return read


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real S3 server that refuses wrong secrets; its address."""
    from benchmarks import ingest

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # put back after the test, whatever the server sets
    with ingest.s3(tmp_path / "s3", "--dir-cache-time", "1ms") as address:
        yield address
