"""What the sources hold beyond the tile store, by listing them: no image is opened."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ringmo.config import Config
from ringmo.data import ingest, scan
from ringmo.errors import RingmoError
from ringmo.stage import Report
from ringmo.workspace import Workspace


@dataclass
class Look:
    """sources: a row each: source, images, new (or changed), gone, error (why it cannot be listed;
    the numbers are None then). mark: changes with what is new."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    mark: str = ""

    @property
    def new(self) -> int:
        return sum(row["new"] or 0 for row in self.sources)

    @property
    def gone(self) -> int:
        return sum(row["gone"] or 0 for row in self.sources)

    @property
    def errors(self) -> list[str]:
        return [row["error"] for row in self.sources if row["error"]]


def look(config: Config, workspace: Workspace) -> Look | None:
    """List every source and compare it with what earlier ingests read; None while one is at work.

    What an ingest would find to do is `new` and `gone`; a source that does not answer keeps none of
    the others from being listed.
    """
    seen, marks = Look(), hashlib.sha256()
    try:
        with ingest.alone(workspace, wait=False):
            known = scan.Scan(workspace.state / "scan.parquet", ingest._settings(config))
            for source in dict.fromkeys(config.ingest.sources):
                seen.sources.append(_source(config, workspace, source, known, marks))
    except BlockingIOError:
        return None
    seen.mark = marks.hexdigest()[:16]
    return seen


def _source(
    config: Config, workspace: Workspace, source: str, known: scan.Scan, marks: Any
) -> dict[str, Any]:
    about = {name: said for name, said in config.ingest.about.items() if name == source}
    alone = config.ingest.model_copy(update={"sources": [source], "about": about})
    only = config.model_copy(update={"ingest": alone})
    row: dict[str, Any] = {"source": source, "images": None, "new": None, "gone": None}
    try:
        images, _ = ingest._images(only, workspace, Report("look"))
    except RingmoError as error:
        return row | {"error": str(error)}
    rows = known.match(images, ingest._attached(only, images))
    new = [images[i] for i in np.flatnonzero(rows < 0)]
    for image in new:
        facts = (image.folder, image.path, image.size, image.mtime_ns, image.attached)
        marks.update(repr(facts).encode())
    here = {(image.folder, image.path) for image in images}
    before = known.paths({image.folder for image in images})
    return row | {
        "images": len(images),
        "new": len(new),
        "gone": len(before - here),
        "error": None,
    }
