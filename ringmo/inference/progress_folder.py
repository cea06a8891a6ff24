"""What is known of a scene while it is answered: a folder with a file for each finished block.

The files are the journal: a block is done when its file is there, and files take their names when
they are whole. So a run that was killed goes on with the blocks that are missing, and several
processes, on one machine or on several that share the folder, take blocks from each other's list.
Who works on a block holds a lock on its number (POSIX, so that it ends with its process, also on
NFS); who finishes the last one puts the blocks together.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ringmo.errors import BadInput
from ringmo.stage import write_json

JOB, LOCKS, USERS = "job.json", "locks", "users.lock"
SETTINGS = 2**31 - 1  # the byte of LOCKS that guards JOB; those before it are blocks


def joined(folder: Path) -> IO[str]:
    """A folder's users file, with a shared lock that is held until it is closed.

    The folder is made where there is none; who finds it being removed begins anew.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            users = (folder / USERS).open("a")
        except FileNotFoundError:
            continue
        except FileExistsError:
            if folder.is_file():
                raise
            continue
        fcntl.flock(users, fcntl.LOCK_SH)
        if there(users, folder):
            return users
        users.close()


def there(users: IO[str], folder: Path) -> bool:
    """Whether a users file that is open is still the folder's."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(users.fileno()), (folder / USERS).stat())
    return False


def removed(folder: Path, *files: IO[str]) -> None:
    """Away at once, under its name: nobody finds a part of it, or adds to it meanwhile.

    Args:
        files: that are open in it, and are closed: NFS keeps a file that is not.
    """
    gone = folder.with_name(f"{folder.name}.{os.getpid()}.gone")
    with contextlib.suppress(OSError):
        folder.rename(gone)
    for file in files:
        file.close()
    shutil.rmtree(gone, ignore_errors=True)


class ProgressFolder:
    """The folder of one scene and what is asked of it. One process holds it once.

    Raises:
        BadInput: another process answers for the scene with other settings.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], blocks: int) -> None:
        self.folder, self.blocks = folder, blocks
        self._held: set[int] = set()
        while True:
            self._users = joined(folder)
            try:
                self._locks: IO[str] = (folder / LOCKS).open("a")
            except FileNotFoundError:  # removed by the one before
                self._users.close()
                continue
            try:
                if self._agreed(job):
                    break
            except BaseException:
                self.close()
                raise
            self.close()

    def _agreed(self, job: Mapping[str, Any]) -> bool:
        """Whether the folder is of this job now; not if it has just been removed.

        One process at a time looks at the settings, and none that waits for it counts as a user.
        """
        fcntl.flock(self._users, fcntl.LOCK_UN)
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, SETTINGS)
        fcntl.flock(self._users, fcntl.LOCK_SH)
        if not there(self._users, self.folder):
            return False
        known = self._read()
        if known is not None and known != json.loads(json.dumps(job)):
            self._take_over()
            known = None
        if known is None:
            write_json(self.folder / JOB, job)
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, SETTINGS)
        return True

    def _read(self) -> Any:
        try:
            return json.loads((self.folder / JOB).read_text())
        except FileNotFoundError:
            return None

    def _take_over(self) -> None:
        """Forget what was found for other settings, or another file, unless somebody works on."""
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                "another process answers for it with other settings: wait for it, or name another "
                "folder"
            ) from None
        for path in self.folder.iterdir():
            if path.name not in (USERS, LOCKS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        fcntl.flock(self._users, fcntl.LOCK_SH)

    def claim(self, number: int) -> bool:
        """Whether a block is ours: not done, and nobody else's. `blocks`: putting together."""
        if number in self._held or self.done(number):
            return False
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        if self.done(number):  # by who held the lock until now
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, number)
            return False
        self._held.add(number)
        return True

    def release(self, number: int) -> None:
        self._held.discard(number)
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, number)

    def done(self, number: int) -> bool:
        return number < self.blocks and self._path(number).exists()

    def finished(self) -> int:
        """How many blocks are done, by whomever."""
        return sum(1 for _ in self.folder.glob("[0-9]*.npz"))

    def write(self, number: int, arrays: Mapping[str, Any]) -> None:
        """A block's answer; with it the block is done, and no longer claimed."""
        temporary = self.folder / f".{number}.tmp"
        with zipfile.ZipFile(temporary, "w", compresslevel=1) as file:
            for name, values in arrays.items():
                # Noise in the last bits of floats costs time, and is no smaller afterwards.
                floats = values.dtype.kind == "f"
                file.compression = zipfile.ZIP_STORED if floats else zipfile.ZIP_DEFLATED
                with file.open(f"{name}.npy", "w", force_zip64=True) as inside:
                    np.lib.format.write_array(inside, values, allow_pickle=False)
        temporary.replace(self._path(number))
        self.release(number)

    def read(self, number: int, *names: str) -> dict[str, Any]:
        """What a block's answer has of these."""
        with np.load(self._path(number), allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}

    def once(self, name: str, source: Path, make: Callable[[Path, Path], None]) -> Path:
        """A file of this folder, made of `source` by the first process that needs it."""
        target = self.folder / name
        with (self.folder / f"{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                temporary = self.folder / f".new-{name}"
                make(source, temporary)
                temporary.replace(target)
        return target

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:07d}.npz"

    def close(self) -> None:
        self._locks.close()
        self._users.close()

    def remove(self) -> None:
        removed(self.folder, self._locks, self._users)
