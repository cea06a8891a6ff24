"""An S3 server of a test's own, which the environment names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import S3


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    server = S3(tmp_path / "s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.stop()
