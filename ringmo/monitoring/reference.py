"""What production is compared with: the same facts of the tiles that a model never learnt from.

`evaluate` makes it of validation and test tiles, and a version takes it along as
reference.parquet. Of a version from before that, it is made from the tile store where that is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ringmo import console
from ringmo.data.loading import BESIDE, SECOND, SelectedTiles
from ringmo.data.store import file_sha256
from ringmo.errors import BadInput
from ringmo.monitoring import facts
from ringmo.monitoring.comparison import MOST
from ringmo.monitoring.record import WINDOW, write_table
from ringmo.registry.bundle import read_size
from ringmo.registry.register import REFERENCE
from ringmo.stage import whole_file

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.registry.bundle import Bundle
    from ringmo.registry.tracker import Tracker, Version
    from ringmo.workspace import Workspace

SPLITS = ("val", "test")
TOGETHER = 32  # tiles answered at a time
PIXELS = 32 * 256 * 256  # and no more pixels than that


def write(path: Path, bundle: "Bundle", workspace: "Workspace", selection: Path) -> int:
    """Write the facts of at most MOST validation and test tiles; returns how many there are.

    Rows are as `record` writes them; a tile's place stands for its scene.

    Raises:
        BadInput: a damaged store or selection.
    """
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        tiles = bundle.tiles(workspace, selection, split)
        rows += _rows(bundle, tiles, split)
    if not rows:
        return 0
    with whole_file(path) as temporary:
        write_table(temporary, rows)
    return len(rows)


def _rows(bundle: "Bundle", tiles: SelectedTiles, split: str) -> list[dict[str, Any]]:
    task = bundle.task
    assert task is not None
    # Half of each split at most, drawn once and for all.
    chosen = np.sort(np.random.default_rng(0).permutation(len(tiles))[: MOST // len(SPLITS)])
    size = read_size(bundle.meta)
    sensor, together = next(iter(bundle.sensors)), max(1, min(TOGETHER, PIXELS // size**2))
    embeddings = facts.Embeddings(bundle)
    rows: list[dict[str, Any]] = []
    try:
        with console.progress("reference", len(chosen)) as bar:
            for batch in tiles.batches(chosen, together, size) if len(chosen) else ():
                pixels = {sensor: batch.images}
                for name, part in batch.parts.items():
                    if name == SECOND or name.startswith(BESIDE):
                        pixels[name.removeprefix(BESIDE)] = part
                with torch.inference_mode():
                    answer = task.answer(bundle.model, bundle.normalised(pixels))
                count, side = len(batch.rows), batch.images.shape[-1]
                columns = facts.of_tiles(
                    bundle, pixels, answer, range(count), embeddings.taken(count, side)
                )
                about = tiles.table.iloc[batch.rows]
                for i, (_, tile) in enumerate(about.iterrows()):
                    window = ",".join(str(tile[n]) for n in ("col", "row", "width", "height"))
                    rows.append(
                        {
                            "key": str(tile["key"]),
                            "name": f"{tile['source_root']}/{tile['source']}{WINDOW}{window}",
                            "scene": str(tile["place"]),
                            "split": split,
                            **{name: of[i] for name, of in columns.items()},
                        }
                    )
                bar.advance(count)
    finally:
        embeddings.close()
    return rows


def of_version(
    workspace: "Workspace",
    tracker: "Tracker | None",
    version: "Version",
    opened: "Callable[[], Bundle]",
) -> "tuple[pd.DataFrame, str]":
    """A version's reference, and where it came from, in words.

    Args:
        opened: gives its bundle, which is needed only where there is no reference yet.

    Raises:
        BadInput: it took none along, and the tiles it was measured on are not here.
    """
    import tempfile

    import pandas as pd

    made = workspace.state / "references" / f"{version.bundle_hash[:16]}.parquet"
    if made.is_file():
        return pd.read_parquet(made), f"made from the tile store ({made.name})"
    with tempfile.TemporaryDirectory() as scratch:
        path = tracker.version_path(version, REFERENCE, Path(scratch)) if tracker else None
        if path is not None:
            return pd.read_parquet(path), f"of {version}, as registered"
        selection = _selection(workspace, tracker, version, Path(scratch))
        if selection is None or not (workspace.store / "manifest.parquet").is_file():
            raise BadInput(
                f"{version} has no reference, and its validation and test tiles are not here: "
                f"go to the workspace that made it, or evaluate and register it again"
            )
        console.note(f"{version} has no reference: made now from its tiles in the store")
        if not write(made, opened(), workspace, selection):
            raise BadInput(f"{version}: the store has no validation or test tiles of its sensor")
    return pd.read_parquet(made), "made now from the tile store: the version has none"


def _selection(
    workspace: "Workspace", tracker: "Tracker | None", version: "Version", scratch: Path
) -> Path | None:
    """The selection that a version learnt from, as far as it is still known."""
    import pandas as pd

    wanted = version.tags.get("selection")
    own = workspace.work("select") / f"{version.model}.parquet"
    if own.is_file() and file_sha256(own) == wanted:
        return own
    seen = tracker.version_path(version, "lineage/tiles.parquet", scratch) if tracker else None
    if seen is None:
        return None
    table = pd.read_parquet(seen)
    if (table["part"] != "image").any():  # which tile goes with which is not in there
        return None
    known = set(pd.read_parquet(workspace.store / "manifest.parquet", columns=["key"])["key"])
    table = table[table["key"].isin(known)]
    path = scratch / "selection.parquet"
    table[["key", "content_hash", "split"]].to_parquet(path, index=False)
    return path
