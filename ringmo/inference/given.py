"""What a user names to be answered for: files, folders, globs, and the same in S3.

Objects are brought here one at a time, whole, and removed when they are answered for: a scene is
then read as any file is, as often as it takes, and a broken line costs no more than a new try.
"""

import fcntl
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringmo.errors import BadInput
from ringmo.inference.progress_folder import joined, removed

if TYPE_CHECKING:
    from ringmo.data.buckets import Bucket, Object

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
S3 = "s3://"
SCENE_SIDE = 1024  # pixels: an image with more along its longer side is a scene


@dataclass(frozen=True)
class Given:
    """A file, or an object with its bucket. name: as people know it."""

    name: str
    path: Path
    bucket: "Bucket | None" = None
    of: "Object | None" = None

    @property
    def mark(self) -> list[object] | None:
        """What changes with an object's bytes; of a file its size and date tell."""
        return None if self.of is None else [self.name, self.of.size, self.of.mark]

    @contextmanager
    def here(self, folder: Path) -> Iterator[Path]:
        """The file; an object is in the folder meanwhile. Several processes share one copy.

        Raises:
            BadInput, Unreachable: the object cannot be brought here.
        """
        if self.bucket is None or self.of is None:
            yield self.path
            return
        place = folder / f"{self.of.mark:x}"
        target = place / self.path.name
        with joined(place) as users:
            try:
                with (place / "fetch.lock").open("a") as fetching:
                    fcntl.flock(fetching, fcntl.LOCK_EX)
                    if not target.exists():
                        try:
                            self.bucket.fetch(self.of.path, target)
                        except FileNotFoundError:
                            raise BadInput("it is gone") from None
                yield target
            finally:
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass  # somebody else still reads it, and removes it then
                else:
                    removed(place, users)


def in_bucket(url: str, endpoint: str | None) -> list[Given]:
    """Images below s3://BUCKET/PREFIX, one object, or those that a glob fits.

    Raises:
        BadInput: there are none, or the bucket cannot be read. Unreachable: no answer.
    """
    from ringmo.data.buckets import Bucket

    name, _, key = url.removeprefix(S3).partition("/")
    parts, pattern = key.split("/"), None
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if fixed is not None:
        parts, pattern = parts[:fixed], "/".join(parts[fixed:])
    elif Path(key).suffix.lower() in SUFFIXES:
        parts, pattern = parts[:-1], parts[-1]
    base = "/".join([f"{S3}{name}", *(part for part in parts if part)])
    bucket = Bucket(base, endpoint)
    found = [
        Given(f"{base}/{one.path}", Path(one.path), bucket, one)
        for one in bucket.objects()
        if Path(one.path).suffix.lower() in SUFFIXES
        and (pattern is None or fnmatch.fnmatch(one.path, pattern))
    ]
    if not found:
        raise BadInput(f"{url}: no JPEG, PNG or TIFF object there")
    return found


def is_scene(path: Path) -> bool:
    """Whether an image is a scene, by its size; what cannot be opened is none."""
    from ringmo.data import scenes

    try:
        with scenes.opened(path) as file:
            return bool(max(file.height, file.width) > SCENE_SIDE)
    except (BadInput, OSError):
        return False
