"""Which tiles a training may see, and in which split: small tables of keys and hashes.

Trainings depend on these and not on the store, so that a corrected label runs one fine-tuning
again and not the pre-training.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ringmo import console
from ringmo.config import Config
from ringmo.data import store
from ringmo.errors import BadInput
from ringmo.stage import Report
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas

PRETRAIN_COLUMNS = {"key": "string", "content_hash": "string", "split": "string"}
TASK_COLUMNS = {**PRETRAIN_COLUMNS, "label": "string"}
KEPT = "kept-selection.parquet"


def select(config: Config, workspace: Workspace, out: Path) -> Report:
    """Write out/pretrain.parquet (train and val, no labels) and out/scene.parquet (labelled).

    The first holds tiles of all sensors in pretrain.mix, the second those of select.sensor. Test
    tiles are never in the first, blank ones never among what trains.

    Raises:
        BadInput: the manifest is missing or damaged, or no tile of a sensor can train.
    """
    manifest = store.TileStore(workspace.store).manifest()
    mix = list(config.pretrain.mix)
    # The tasks' sensor is always among them.
    tiles = manifest[manifest["sensor"].isin(mix)].sort_values("key")
    blank = (tiles["std"] < config.validate_.min_std) & (tiles["split"] != "test")
    tiles = tiles[~blank]

    seen = tiles[tiles["split"].isin(["train", "val"])][list(PRETRAIN_COLUMNS)]
    kept = workspace.state / KEPT
    if config.pretrain.refresh == "keep" and kept.exists():
        remedy = "remove it, or set pretrain.refresh to full"
        before = store.read_table(kept, PRETRAIN_COLUMNS, remedy)
        # A tile that has left the store cannot be read; its absence is no new imagery.
        seen = before.merge(tiles[["key", "content_hash"]], on=["key", "content_hash"])
        seen = seen.sort_values("key")
    sensors = _a_sensor(seen, tiles, mix)
    store.write_table(out / "pretrain.parquet", seen, PRETRAIN_COLUMNS)
    store.write_table(kept, seen, PRETRAIN_COLUMNS)

    usable = tiles["split"].isin(["train", "val", "test"]) & tiles["label"].notna()
    usable &= tiles["sensor"] == config.select.sensor
    labelled = tiles[usable][list(TASK_COLUMNS)]
    labelled = fewer_labels(labelled, config.select.labels_per_class, config.split.seed)
    for task in config.tasks:
        store.write_table(out / f"{task}.parquet", labelled, TASK_COLUMNS)

    splits = labelled["split"].value_counts()
    report = Report("select")
    report.figures = {
        "tiles": len(seen),
        "labelled": len(labelled),
        "classes": int(labelled["label"].nunique()),
        **{split: int(splits.get(split, 0)) for split in ("train", "val", "test")},
        "blank": int(blank.sum()),
        "generated": bool(tiles["generated"].any()),
    }
    report.tables["sensors"] = [{"sensor": name, "tiles": n} for name, n in sensors.items()]
    each = ", ".join(f"{n} {name}" for name, n in sensors.items())
    console.note(
        f"select: {len(seen)} tiles to pre-train on{f' ({each})' if len(mix) > 1 else ''}; "
        "{labelled} labelled in {classes} classes: "
        "{train} train, {val} val, {test} test".format(**report.figures)
    )
    return report


def _a_sensor(
    seen: "pandas.DataFrame", tiles: "pandas.DataFrame", mix: list[str]
) -> dict[str, int]:
    """How many of the selected tiles each sensor has; each must have one that trains."""
    sensor = seen["key"].map(tiles.set_index("key")["sensor"])
    for name in mix:
        if not ((sensor == name) & (seen["split"] == "train")).any():
            raise BadInput(
                f"no tile of sensor `{name}` to train on: see select.sensor, pretrain.mix and "
                f"pretrain.refresh in params.yaml, and what `ringmo ingest` found"
            )
    return {name: int((sensor == name).sum()) for name in mix}


def fewer_labels(labelled: "pandas.DataFrame", limit: int | None, seed: int) -> "pandas.DataFrame":
    """At most `limit` training samples a class (None: all): the first by a seeded hash, so that
    fewer are always among more."""
    if limit is None:
        return labelled
    train = labelled[labelled["split"] == "train"]
    order = train["key"].map(lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
    rank = order.groupby(train["label"]).rank(method="first")
    return labelled.drop(index=train.index[rank > limit])
