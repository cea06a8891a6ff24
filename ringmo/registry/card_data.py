"""What a version's card tells and neither its tags nor its figures hold: the data that it learnt
from, in numbers, and what its stages took.

Written beside the version's files when it is registered, since the workspace may be gone when
somebody asks. Only what is surely of this model: a selection is known by its hash, an evaluation by
the bundle's. What cannot be told stays out, and the card says that it is not recorded.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmo.config import About, Config
from ringmo.data import footprint_map, store
from ringmo.data.tables import classes_of
from ringmo.errors import BadInput
from ringmo.registry.origins import ENCODER
from ringmo.registry.seen import SPLITS
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas

    from ringmo.registry.bundle import Bundle

FOLDER, FILE = "card-data", "data.json"
SCHEMA = 1
FOOTPRINTS = 1000  # on the map, evenly chosen
# Of a manifest's row what is told here.
COLUMNS = (
    *("sensor", "source_root", "place", "generated", "width", "height", "gsd_m", "acquired"),
    *("crs", "minx", "miny", "maxx", "maxy", "mask_counts", "height_min", "height_max"),
    "height_mean",
)


def write(
    config: Config, workspace: Workspace, task: str, model: "Bundle", evaluated: bool, folder: Path
) -> None:
    """Write folder/data.json, and of an encoder the last reconstructions of its training.

    Args:
        evaluated: whether work/evaluate-TASK is of this very model.
    """
    folder.mkdir(parents=True)
    if task == ENCODER:
        stages = ["pretrain"]
    else:
        stages = [
            f"finetune@{task}",
            *[f"{of}@{task}" for of in ("scratch", "evaluate")] * evaluated,
        ]
    reports = {stage: _report(workspace, stage) for stage in stages}
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    told = {
        "schema": SCHEMA,
        "parameters": weights,
        "bytes": sum(path.stat().st_size for path in model.folder.glob("model.*")),
        "stages": {
            stage: {"seconds": report.seconds, "figures": report.figures, "notes": report.notes}
            for stage, report in reports.items()
            if report is not None
        },
        "data": _data(config, workspace, task, model),
    }
    write_json(folder / FILE, told)
    training = reports[stages[0]]
    if task == ENCODER and training is not None and training.run_dir:
        pictures = sorted((workspace.root / training.run_dir / "pictures").glob("epoch-*.png"))
        epochs = [path.stem.split("-")[1] for path in pictures]
        for path, epoch in zip(pictures, epochs, strict=True):
            if epoch == epochs[-1]:
                (folder / path.name).write_bytes(path.read_bytes())


def _report(workspace: Workspace, stage: str) -> Report | None:
    """A stage's report, with what it took where this very execution was measured: that is told
    beside the output, which DVC keeps by its hash (`forward.Forwarder.finish`)."""
    report = Report.read(workspace.work(stage) / "report.json")
    last = Report.read(workspace.report_file(stage))
    if report is not None and last is not None and last.seconds == report.seconds:
        report.figures = {**last.figures, **report.figures}
    return report


def read(path: Path | None) -> dict[str, Any]:
    """What `write` wrote; empty where there is nothing, or another schema's."""
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else {}


def _data(
    config: Config, workspace: Workspace, task: str, model: "Bundle"
) -> dict[str, Any] | None:
    """The tiles of the model's selection, in numbers; None where it is no longer here."""
    import pandas as pd

    name = "pretrain" if task == ENCODER else task
    selection = workspace.work("select") / f"{name}.parquet"
    try:
        if store.file_sha256(selection) != model.meta["lineage"].get("selection"):
            return None
        chosen = pd.read_parquet(selection)
        manifest = store.TileStore(workspace.store).manifest().set_index("key")
    except (OSError, BadInput):
        return None
    there = chosen[chosen["key"].isin(manifest.index)]
    known = manifest.reindex(there["key"])[[n for n in COLUMNS if n in manifest]]
    own = [column for column in there if column not in known]
    tiles = pd.concat([there[own].reset_index(drop=True), known.reset_index(drop=True)], axis=1)
    sides = Counter(zip(tiles["width"].tolist(), tiles["height"].tolist(), strict=True))
    made_up = tiles["generated"].fillna(False).astype(bool)
    return {
        "tiles": len(chosen),
        "left_the_store": len(chosen) - len(tiles),
        "generated": int(made_up.sum()),
        "splits": _counts(tiles["split"]),
        "places": {s: int(tiles["place"][tiles["split"] == s].nunique()) for s in SPLITS},
        "sizes": [[wide, high, count] for (wide, high), count in sides.most_common(3)],
        "sources": [
            {
                "source": str(source),
                "tiles": len(group),
                "splits": _counts(group["split"]),
                "licence": config.ingest.about.get(str(source), About()).licence,
                "generated": bool(made_up[group.index].any()),
            }
            for source, group in tiles.groupby("source_root")
        ],
        "sensors": [
            {"sensor": str(sensor), "tiles": len(group), "splits": _counts(group["split"])}
            for sensor, group in tiles.groupby("sensor")
        ],
        "gsd_m": _range(tiles, "gsd_m"),
        "acquired": _range(tiles[tiles["acquired"].notna()], "acquired"),
        **_labels(task, tiles, model),
        "footprints": _footprints(tiles),
    }


def _counts(splits: "pandas.Series[Any]") -> dict[str, int]:
    found = splits.value_counts()
    return {split: int(found.get(split, 0)) for split in SPLITS}


def _range(tiles: "pandas.DataFrame", column: str) -> dict[str, Any]:
    """Of the tiles that train, and of those that test: how many are known, lowest, highest."""
    told = {}
    for split in ("train", "test"):
        values = tiles[column][tiles["split"] == split].dropna()
        ends = [values.min(), values.max()] if len(values) else [None, None]
        low, high = (float(end) if isinstance(end, float) else end for end in ends)
        told[split] = {"known": len(values), "low": low, "high": high}
    return told


def _labels(task: str, tiles: "pandas.DataFrame", model: "Bundle") -> dict[str, Any]:
    """How often each class is there, by split, and in what that is counted; or the heights."""
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    if "label" in tiles:
        counted = "tiles"
        for label, split in zip(tiles["label"], tiles["split"], strict=True):
            counts[split].update(classes_of(str(label)))
    elif "mask_names" in tiles:
        counted = "pixels"
        for names, pixels, split in zip(
            tiles["mask_names"], tiles["mask_counts"], tiles["split"], strict=True
        ):
            # A change is one whatever its coding calls it; the last count is of what nobody knows.
            own = model.classes if task == "change" else names
            for name, count in zip(own, pixels[:-1], strict=False):
                counts[split][str(name)] += int(count)
    elif "boxes_classes" in tiles:
        counted = "objects"
        for classes, split in zip(tiles["boxes_classes"], tiles["split"], strict=True):
            counts[split].update(str(name) for name in classes)
    elif task == "height":
        mean = tiles["height_mean"].mean()
        ends = [tiles["height_min"].min(), tiles["height_max"].max(), mean]
        names = ("lowest", "highest", "mean")
        return {"heights": {n: float(v) for n, v in zip(names, ends, strict=True) if v == v}}
    else:
        return {}
    order = list(dict.fromkeys([*model.classes, *sorted(set().union(*counts.values()))]))
    rows = [{"class": name, **{split: counts[split][name] for split in SPLITS}} for name in order]
    return {"classes": rows, "counted": counted}


def _footprints(tiles: "pandas.DataFrame") -> dict[str, Any]:
    """known: tiles that lie somewhere on Earth. bounds of all that are drawn: west, south, east,
    north, split, the source's number."""
    located = tiles[tiles["crs"].notna()]
    if located.empty:
        return {"known": 0, "drawn": []}
    some = located.iloc[footprint_map.evenly(len(located), FOOTPRINTS).tolist()]
    bounds = footprint_map.degrees(some)
    earthly = np.isfinite(bounds).all(1)
    there = some[earthly]
    sources = sorted(set(tiles["source_root"].astype(str)))
    drawn = [
        [*(round(float(end), 5) for end in ends), str(split), sources.index(str(source))]
        for ends, split, source in zip(
            bounds[earthly], there["split"], there["source_root"], strict=True
        )
    ]
    everywhere = len(some) == len(located)
    return {"known": int(earthly.sum()) if everywhere else len(located), "drawn": drawn}
