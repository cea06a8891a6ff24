"""Where this checkout lies, and real imagery beside it, where this machine has some."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared" / "data"
