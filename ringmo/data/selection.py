"""Which tiles a training may see, and in which split: small tables of keys and hashes.

Trainings depend on these and not on the store, so that a corrected label runs one fine-tuning
again and not the pre-training. Beside them, the normalisation of sensors whose mean and std are
null in params.yaml: those of the training tiles.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ringmo import console, tasks
from ringmo.config import Config, Sensor
from ringmo.data import store
from ringmo.data.loading import BESIDE, SECOND
from ringmo.data.tables import classes_of
from ringmo.errors import BadInput
from ringmo.stage import REVISIONS, Report, parameters, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas

PRETRAIN_COLUMNS = {"key": "string", "content_hash": "string", "split": "string"}
NORMALISATION = "normalisation.json"
KEPT = "kept-selection.parquet"
KEPT_NORMALISATION = "kept-normalisation.json"


def select(config: Config, workspace: Workspace, out: Path) -> Report:
    """Write out/pretrain.parquet (train and val, no labels) and out/TASK.parquet for each task.

    The first holds tiles of all sensors in pretrain.mix, the others those of select.sensor that
    have labels of the task, and where select.beside names further sensors, their tiles. Test
    tiles are never in the first, blank ones never among what trains. out/normalisation.json has
    the mean and std of the first's training tiles for sensors whose own are null.

    Raises:
        BadInput: the manifest is missing or damaged, no tile of a sensor can train, or a task has
            labels and none to train or to test with.
    """
    manifest = store.TileStore(workspace.store).manifest()
    mix = list(config.pretrain.mix)
    # The tasks' sensor is always among them.
    tiles = manifest[manifest["sensor"].isin(mix)].sort_values("key")
    blank = (tiles["std"] < config.validate_.min_std) & (tiles["split"] != "test")
    tiles = tiles[~blank]

    seen = tiles[tiles["split"].isin(["train", "val"])][list(PRETRAIN_COLUMNS)]
    kept = workspace.state / KEPT
    keep = config.pretrain.refresh == "keep" and kept.exists()
    if keep:
        remedy = "remove it, or set pretrain.refresh to full"
        before = store.read_table(kept, PRETRAIN_COLUMNS, remedy)
        # A tile that has left the store cannot be read; its absence is no new imagery.
        seen = before.merge(tiles[["key", "content_hash"]], on=["key", "content_hash"])
        seen = seen.sort_values("key")
    sensors = _a_sensor(seen, tiles, mix)
    store.write_table(out / "pretrain.parquet", seen, PRETRAIN_COLUMNS)
    store.write_table(kept, seen, PRETRAIN_COLUMNS)
    kept = workspace.state / KEPT_NORMALISATION
    known = _read_normalisation(kept, "remove it") if keep and kept.exists() else {}
    normalisation = _normalisation(config, seen, tiles, known)
    write_json(out / NORMALISATION, normalisation)
    write_json(kept, normalisation)

    tables = {name: _of_task(config, workspace, tiles, name) for name in config.tasks}
    for name, table in tables.items():
        store.write_table(out / f"{name}.parquet", table, columns(config, name))

    write_json(
        out / "params.json",
        parameters(
            "select",
            {"select": config.select, "split": config.split},
            sensor=config.select.sensor,
            tiles={"all": len(manifest)},
            revision=REVISIONS["select"],
        ),
    )
    report = Report("select")
    report.figures = {
        "tiles": len(seen),
        "labelled": len(set().union(*(table["key"] for table in tables.values()))),
        "blank": int(blank.sum()),
        "generated": bool(tiles["generated"].any()),
    }
    report.tables["sensors"] = [{"sensor": name, "tiles": n} for name, n in sensors.items()]
    report.tables["tasks"] = [
        {"task": name, "tiles": len(table), **_splits(table), "beside": _beside(config, name)}
        for name, table in tables.items()
    ]
    others = [name for name in tasks.names() if name not in config.tasks]
    report.figures["other_tasks"] = [n for n in others if tasks.find(n).usable(tiles).any()]
    each = ", ".join(f"{n} {name}" for name, n in sensors.items())
    console.note(f"select: {len(seen)} tiles to pre-train on{f' ({each})' if len(mix) > 1 else ''}")
    for row in report.tables["tasks"]:
        said = "{task}: {tiles} labelled tiles: {train} train, {val} val, {test} test".format(**row)
        console.note(f"select: {said}")
        if row["tiles"] and not (row["train"] and row["test"]):
            # Its evaluation would find that out, after hours of training.
            raise BadInput(
                f"{said}: one at least of train and of test is needed: ingest more labelled "
                "imagery, set split.by to block for a few large scenes, or take "
                f"{row['task']} out of `tasks`"
            )
    if report.figures["other_tasks"]:
        more = ", ".join(report.figures["other_tasks"])
        console.note(f"select: there are labels for {more} too (`tasks` in params.yaml)")
    return report


def columns(config: Config, task: str) -> dict[str, str]:
    """Those of a task's selection."""
    beside = {BESIDE + sensor: "string" for sensor in config.select.beside}
    return {**PRETRAIN_COLUMNS, **tasks.find(task).columns, **beside}


def _of_task(
    config: Config, workspace: Workspace, tiles: "pandas.DataFrame", task: str
) -> "pandas.DataFrame":
    """The tiles that a task can use."""
    kind = tasks.find(task)
    usable = tiles["split"].isin(["train", "val", "test"]) & kind.usable(tiles)
    chosen = tiles[usable & (tiles["sensor"] == config.select.sensor)]
    if "mask_names" in kind.columns:
        names = _class_names(workspace, chosen)
        chosen = chosen.assign(mask_names=chosen["mask_coding"].map(names))
    for sensor in config.select.beside:
        from ringmo.data.partners import partners

        keys = partners(tiles, config.select.sensor, sensor).reindex(chosen.index)
        # Ground that another sensor's tile has seen in training tests nothing.
        split = keys.map(tiles.set_index("key")["split"])
        fits = keys.notna() & ((split == chosen["split"]) | (split == "unused"))
        chosen = chosen.assign(**{BESIDE + sensor: keys})[fits]
    if "label" in kind.columns:
        seed = config.split.seed
        chosen = fewer_labels(chosen, config.select.labels_per_class, seed)
    return chosen[list(columns(config, task))]


def _class_names(workspace: Workspace, tiles: "pandas.DataFrame") -> dict[str, list[str]]:
    """Coding of masks → names of its classes, by number; numbers without names are their own."""
    from ringmo.data.facts import codings

    names = codings(workspace.store)
    masked = tiles[tiles["mask_coding"].notna()]
    for coding, counts in masked.groupby("mask_coding")["mask_counts"]:
        if not names.get(str(coding)):
            names[str(coding)] = [str(i) for i in range(max(len(each) - 1 for each in counts))]
    return names


def _beside(config: Config, task: str) -> list[str]:
    """What a task's model reads of the same ground beside the image."""
    second = [SECOND] if SECOND in tasks.find(task).parts else []
    return [*second, *config.select.beside]


def _splits(table: "pandas.DataFrame") -> dict[str, int]:
    counts = table["split"].value_counts()
    return {split: int(counts.get(split, 0)) for split in ("train", "val", "test")}


def resolved(config: Config, workspace: Workspace) -> dict[str, Sensor]:
    """The sensors of pretrain.mix with numbers for mean and std.

    Raises:
        BadInput: a sensor's are null and `select` has not found them.
    """
    sensors = {name: config.sensors[name] for name in config.pretrain.mix}
    if all(sensor.mean is not None for sensor in sensors.values()):
        return sensors
    path = workspace.work("select") / NORMALISATION
    found = _read_normalisation(path, "run `ringmo select`")
    for name, sensor in sensors.items():
        if sensor.mean is None:
            of = found.get(name, {})
            if of.get("reading") != sensor.reading:
                raise BadInput(f"{path}: nothing of sensor `{name}` as it is: run `ringmo select`")
            numbers = {"mean": of.get("mean"), "std": of.get("std")}
            try:
                sensors[name] = Sensor.model_validate({**sensor.described(), **numbers})
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise BadInput(f"{path}: {name}: {said}: run `ringmo select`") from None
    return sensors


def _read_normalisation(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}: {remedy}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(of, dict) for of in found.values()):
        raise BadInput(f"{path} is damaged: {remedy}")
    return found


def _normalisation(
    config: Config, seen: "pandas.DataFrame", tiles: "pandas.DataFrame", known: dict[str, Any]
) -> dict[str, Any]:
    """Sensor → mean and std a band of all its training pixels with data, where its own are null.

    Args:
        seen: the selection. tiles: rows of the manifest. known: what was kept, and stays where
            it is of pixels read in the same way.
    """
    import numpy as np

    normalisation = {}
    chosen = tiles[tiles["key"].isin(seen["key"][seen["split"] == "train"])]
    for name in config.pretrain.mix:
        sensor = config.sensors[name]
        if sensor.mean is not None:
            continue
        if known.get(name, {}).get("reading") == sensor.reading:
            normalisation[name] = known[name]
            continue
        own = chosen[(chosen["sensor"] == name) & (chosen["bands"] == len(sensor.bands))]
        own = own[own["band_means"].notna() & (own["nodata_share"] < 1)]
        if own.empty:
            raise BadInput(f"tiles of sensor `{name}` lack their bands' means: run `ringmo ingest`")
        pixels = own["width"] * own["height"] * (1 - own["nodata_share"])
        weights = (pixels / pixels.sum()).to_numpy()
        means, stds = np.stack(own["band_means"].to_list()), np.stack(own["band_stds"].to_list())
        mean = weights @ means
        std = np.sqrt(weights @ (stds**2 + (means - mean) ** 2))
        std[std == 0] = 1  # of a band that is the same everywhere
        normalisation[name] = {
            "reading": sensor.reading,
            "mean": [float(f"{value:.6g}") for value in mean],
            "std": [float(f"{value:.6g}") for value in std],
        }
        console.note(f"select: mean and std of sensor `{name}` are of {len(own)} training tiles")
    return normalisation


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
    fewer are always among more. A tile of several classes stays for any of them."""
    if limit is None:
        return labelled
    train = labelled[labelled["split"] == "train"]
    each = train["label"].map(classes_of).explode()
    order = train["key"].map(lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
    rank = order.reindex(each.index).groupby(each.to_numpy()).rank(method="first")
    least = rank.groupby(level=0).min()
    return labelled.drop(index=least.index[least > limit])
