"""A flow of a known name that does nothing but live, for tests that kill it."""

import os
import time
from pathlib import Path

from prefect import flow


@flow(name="retrain")
def sleeping(folder: str) -> None:
    """Its first execution waits to be killed; a later one ends."""
    marks = sorted(Path(folder).glob("began-*"))
    Path(folder, f"began-{len(marks)}").write_text(str(os.getpid()))
    while not marks:
        time.sleep(0.2)
