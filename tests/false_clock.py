"""A time of day that is wrong for some processes and not for others."""

import struct
import subprocess
from pathlib import Path


class FalseClock:
    """Processes with its `environment` see the time of day so far ahead as `set` said last.

    folder: where it is built. Needs a C compiler.
    """

    def __init__(self, folder: Path) -> None:
        library, self._ahead = folder / "clock.so", folder / "clock"
        source = Path(__file__).with_suffix(".c")
        command = ["cc", "-shared", "-fPIC", "-O2", str(source), "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)
        self._ahead.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "RINGMO_TEST_CLOCK": str(self._ahead)}

    def set(self, ahead_s: int) -> None:
        with self._ahead.open("r+b") as file:  # mapped by those who read it: never shorter
            file.write(struct.pack("=q", ahead_s))
