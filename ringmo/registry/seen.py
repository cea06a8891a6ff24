"""Which tiles a model saw: a table beside each version, and the search in all of them.

The table is an artifact of the version, so that it outlives the store: what trained a model can be
told when the imagery and the workspace are gone.
"""

import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo.data import store
from ringmo.data.tables import classes_of
from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pandas
    import pyarrow

SPLITS = ("train", "val", "test")
IMAGE = "image"
# Column → Arrow type. What repeats is written as numbers and a list of its texts.
COLUMNS = {
    "key": "string",
    "content_hash": "string",
    "split": "string",
    "part": "string",  # `image`, or what else a model reads of the ground, as its selection says
    "source": "string",
    "source_root": "string",
    "row": "int32",
    "col": "int32",
    "width": "int32",
    "height": "int32",
    "scale": "float64",
    "sensor": "string",
    "place": "string",
    "classes": "strings",  # that its labels name; empty where it trained without labels
}
REPEATING = ("split", "part", "source_root", "row", "col", "width", "height", "scale", "sensor")


def write(path: Path, selection: Path, manifest: "pandas.DataFrame | None") -> int:
    """Write the table of the tiles that a selection names; returns how many there are.

    Args:
        selection: of the pre-training or of a task, from `select`.
        manifest: of the data version it was made from; None where that is gone, and keys, hashes
            and splits are all there is.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ringmo.data.loading import BESIDE, SECOND

    chosen = pq.read_table(selection).to_pandas()
    rows = [chosen.assign(part=IMAGE)]
    for name in chosen.columns:
        if name == SECOND or name.startswith(BESIDE):
            others = chosen[[name, "split"]].rename(columns={name: "key"})
            rows.append(others.dropna(subset="key").assign(part=name))
    table = pd.concat(rows, ignore_index=True)
    if manifest is not None:
        known = manifest.set_index("key").reindex(table["key"])
        for name in COLUMNS:
            if name in known.columns and name != "split":
                values = pd.Series(known[name].to_numpy(), table.index)
                table[name] = table[name].fillna(values) if name in table else values
        for name in ("mask_counts", "boxes_classes"):
            table[name] = known[name].to_numpy()
    table["classes"] = _classes(table)
    schema = store.arrow_schema(COLUMNS)
    for name in COLUMNS:
        if name not in table:
            table[name] = None
    order = [name for name in ("source_root", "source", "row", "col", "key") if name in table]
    table = table.sort_values(order)[list(COLUMNS)]
    whole = pa.Table.from_pandas(table, schema=schema, preserve_index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        whole.replace_schema_metadata(schema.metadata),
        path,
        compression="zstd",
        use_dictionary=[*REPEATING, "classes.list.element"],
        # Neighbours' paths begin alike.
        column_encoding={"source": "DELTA_BYTE_ARRAY"},
    )
    return len(table)


def _classes(rows: "pandas.DataFrame") -> list[list[str]]:
    """The classes of each tile that its training read: its label's, its boxes', its mask's."""

    def texts(value: Any) -> list[str]:
        return [] if value is None or isinstance(value, float) else [str(one) for one in value]

    count = len(rows)
    nothing = [None] * count
    labels = rows.get("label", nothing)
    boxes = rows["boxes_classes"] if "boxes_hash" in rows else nothing
    names = rows.get("mask_names", nothing)
    pixels = rows.get("mask_counts", nothing)
    found = []
    for part, label, box, mask, counts in zip(
        rows["part"], labels, boxes, names, pixels, strict=True
    ):
        own: Iterable[str] = classes_of(label) if isinstance(label, str) else texts(box)
        masked = texts(mask)
        if masked and counts is not None and not isinstance(counts, float):
            own = [name for name, n in zip(masked, counts[:-1], strict=False) if n]
        found.append(sorted(set(own)) if part == IMAGE else [])
    return found


def read(path: Path, columns: Iterable[str] = tuple(COLUMNS)) -> "pyarrow.Table":
    """Columns of a table that `write` wrote.

    Raises:
        BadInput: missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        return pq.read_table(path, columns=[name for name in columns if name in names])
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: {str(error).splitlines()[0][:120]}") from None


def summary(path: Path) -> dict[str, Any]:
    """What a table holds: tiles, {split: tiles}, sources and classes.

    sources: rows of source (its root), tiles, share, {split: tiles}, classes, the largest first.
    classes: name → training tiles.
    """
    table = read(path, ("split", "part", "source_root", "classes")).to_pandas()
    table["source_root"] = table["source_root"].fillna("not recorded")
    sources = []
    for root, own in table.groupby("source_root"):
        row = {
            "source": str(root),
            "tiles": len(own),
            "share": len(own) / len(table),
            **splits(own["split"]),
            "classes": _training_classes(own),
        }
        sources.append(row)
    return {
        "tiles": len(table),
        **splits(table["split"]),
        "sources": sorted(sources, key=lambda row: -row["tiles"]),
        "classes": _training_classes(table),
    }


def _training_classes(table: "pandas.DataFrame") -> dict[str, int]:
    """Class → training tiles that its labels name it in."""
    train = table[table["split"] == "train"]
    counts = Counter(name for names in train["classes"] for name in names)
    return dict(sorted(counts.items()))


def splits(column: Any) -> dict[str, int]:
    """Tiles of each split that has any."""
    counts = Counter(column)
    return {split: counts[split] for split in SPLITS if counts[split]}


def of_key(table: "pyarrow.Table", key: str) -> Any:
    """Which rows are of a tile's key."""
    import pyarrow.compute as pc

    return pc.equal(table["key"], key)


def of_source(table: "pyarrow.Table", pattern: str) -> Any:
    """Which rows come from a source: its path below its root or the whole one, or a pattern."""
    import pyarrow as pa
    import pyarrow.compute as pc

    source, root = pc.fill_null(table["source"], ""), pc.fill_null(table["source_root"], "")
    whole = pc.binary_join_element_wise(root, source, "/")
    if not any(sign in pattern for sign in "*?["):
        equal = [pc.equal(column, pattern) for column in (source, whole, root)]
        return pc.or_(pc.or_(equal[0], equal[1]), equal[2])
    # Arrow's expressions lack some of what fnmatch writes.
    like = re.compile(translate(pattern)).match
    pairs = zip(source.to_pylist(), whole.to_pylist(), strict=True)
    return pa.chunked_array([[bool(like(one) or like(other)) for one, other in pairs]])


def of_file(table: "pyarrow.Table", file: Path) -> Any:
    """Which rows were cut from a file of these bytes, wherever it lay then.

    A tile's key is made of its image's bytes and its window: each window in the table is tried.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from ringmo.data.reading import key

    content = store.file_sha256(file)
    names = ["row", "col", "height", "width", "scale"]
    windows = table.select(names).group_by(names).aggregate([]).to_pylist()
    keys = [key(content, **window) for window in windows if window["row"] is not None]
    return pc.is_in(table["key"], pa.array(keys, pa.string()))
