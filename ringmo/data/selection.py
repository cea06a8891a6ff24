"""Which tiles a training may see: small tables of keys, content hashes, splits and labels.

Trainings depend on these and not on the store, so that a corrected label or a new file in another
sensor's folder does not train an encoder anew.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ringmo.config import Config, digest
from ringmo.data.store import TileStore
from ringmo.errors import BadInput
from ringmo.stage import Report
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas


def select(config: Config, workspace: Workspace, out: Path) -> Report:
    """Write out/pretrain.parquet and, for each task, out/TASK.parquet, sorted by key.

    Test tiles are in no selection for pre-training. Blank tiles train nothing.

    Report figures: tiles, labelled, classes, train, val, test, blank.

    Raises:
        BadInput: the store has no tile of select.sensor that can train.
    """
    manifest = TileStore(workspace.store).manifest()
    usable = manifest[
        (manifest["sensor"] == config.select.sensor) & (manifest["split"] != "unused")
    ]
    blank = (usable["std"] < config.validate_.min_std) & (usable["split"] != "test")
    usable = usable[~blank].sort_values("key", ignore_index=True)

    kept_file = workspace.state / "kept-selection.parquet"
    pretraining = usable[usable["split"].isin(["train", "val"])]
    pretraining = pretraining[["key", "content_hash", "split"]]
    if config.pretrain.refresh == "keep" and kept_file.exists():
        pretraining = _kept(kept_file, pretraining)
    if not (pretraining["split"] == "train").any():
        raise BadInput(
            f"no tile of sensor {config.select.sensor} is left to train on: ingest more imagery"
        )
    _write(pretraining, out / "pretrain.parquet")

    labelled = usable[usable["label"].notna()][["key", "content_hash", "split", "label"]]
    if config.select.labels_per_class is not None:
        labelled = _fewer(labelled, config.select.labels_per_class, config.split.seed)
    for task in config.tasks:
        _write(labelled, out / f"{task}.parquet")

    # DVC removes the outputs before a stage runs; what `refresh: keep` keeps lies elsewhere.
    kept_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept_file.with_suffix(".tmp")
    shutil.copyfile(out / "pretrain.parquet", temporary)
    temporary.replace(kept_file)
    return Report(
        "select",
        figures={
            "tiles": len(pretraining),
            "labelled": len(labelled),
            "classes": int(labelled["label"].nunique()),
            **{
                split: int((labelled["split"] == split).sum()) for split in ("train", "val", "test")
            },
            "blank": int(blank.sum()),
        },
    )


def _kept(file: Path, present: "pandas.DataFrame") -> "pandas.DataFrame":
    """The selection of the run before, less the tiles that are gone."""
    import pandas as pd

    kept = pd.read_parquet(file)
    return kept[kept["key"].isin(present["key"])].reset_index(drop=True)


def _fewer(tiles: "pandas.DataFrame", most: int, seed: int) -> "pandas.DataFrame":
    """At most this many training tiles a class; the same ones each time, and more adds to them."""
    order = [digest(key, seed) for key in tiles["key"]]
    rank = tiles.assign(order=order).groupby(["split", "label"])["order"].rank()
    return tiles[(tiles["split"] != "train") | (rank <= most)].reset_index(drop=True)


def _write(table: "pandas.DataFrame", path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {name: pyarrow.array(table[name].tolist(), pyarrow.string()) for name in table}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
