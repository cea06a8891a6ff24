"""`ringmo similar`: the tiles whose features point most nearly where an image's do.

Exact: every tile is looked at, some thousands at a time. Only tiles of the image's own sensor
are: nothing teaches an encoder that the same place looks the same to two.
"""

import os
import shutil
from collections.abc import Iterable
from html import escape
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console
from ringmo.config import Config, Sensor
from ringmo.data import scenes, versions
from ringmo.data.colours import visible
from ringmo.data.decode import Pixels, decode
from ringmo.data.page import inline_jpeg, save
from ringmo.data.store import TileStore
from ringmo.errors import BadInput
from ringmo.inference.embed import (
    MODEL_KEY,
    NEEDED,
    Writer,
    embedded,
    manifest,
    of_store,
    source_of,
)
from ringmo.inference.model import open_bundle
from ringmo.registry.bundle import Bundle
from ringmo.training.machine import choose_device
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow

ROWS = 8192  # that are compared at a time
PART = 20_000  # tiles of a file of the cache: what an interruption loses at most
KEPT = 3  # models whose embeddings of the store are kept, the last ones used
SIDE = 160  # pixels at which the page shows a tile
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
h1 { font-size: 1.4em } .note { color: #666 } .sheet { display: flex; flex-wrap: wrap; gap: 18px }
figure { margin: 0; width: 160px; overflow-wrap: anywhere; font-size: 13px }
figure img, .none { width: 160px; height: 160px; object-fit: contain; background: #eee }
.none { display: block; padding: 4px; box-sizing: border-box; color: #666 }
.score { font-weight: 600 }
"""


def similar(
    config: Config,
    workspace: Workspace,
    image: Path,
    ref: str,
    among: Path | None = None,
    top: int = 10,
    out: Path | None = None,
) -> dict[str, Any]:
    """The nearest tiles by cosine similarity of their features, and a page that shows them.

    The store's embeddings are kept in .ringmo/embeddings/, by the model's hash: each tile is
    embedded once, and after an ingest only the new ones are.

    Args:
        image: at most twice ingest.tile_size.
        ref: as of `ringmo.load`; of a task's model, its encoder.
        among: a file that `ringmo embed` wrote with this model; None: the workspace's store.
        out: of the page; None: .ringmo/similar.html.

    Returns:
        image, sensor, model, data_version (None for a file), searched (tiles), page, similar: the
        nearest first, each with score (1 at most), key, source, label, row, col, height, width,
        longitude, latitude (of its middle; None where it has no footprint).

    Raises:
        BadInput: no image of the model's sensors, no such model or file, or a file that another
            model wrote; nothing of the image's sensor to search.
        Unreachable: MLflow does not answer.
    """
    if top < 1:
        raise BadInput(f"--top {top}: at least 1")
    bundle = open_bundle(ref, str(choose_device(config.hardware)), workspace.root)
    sensor, pixels = _query(config, image, bundle)
    vector = bundle.embed([pixels], sensor=sensor)[0]
    if among is None:
        files, known = of_cache(workspace, bundle), manifest(workspace, NEEDED)
    else:
        files, known = [_checked(among, bundle)], None
    found, searched = _nearest(files, vector, sensor, known, top)
    if not found:
        raise BadInput(
            f"no tile of sensor {sensor}, which {image} is of, in {among or 'the store'}"
        )
    version = None if among else versions.data_version(workspace)
    page = (out or workspace.state / "similar.html").resolve()
    pictures = _pictures(workspace, bundle, found, known)
    about = f"{searched:,} tiles of {among or 'the store'}, model {bundle.hash[:12]}"
    query = _picture(pixels, bundle.sensors[sensor])
    _write(
        page, image, query, found, pictures, about + (f", data {version[:8]}" if version else "")
    )
    return {
        "image": str(image),
        "sensor": sensor,
        "model": bundle.hash,
        "data_version": version,
        "searched": searched,
        "page": str(page),
        "similar": found,
    }


def text(result: dict[str, Any]) -> str:
    """The tiles as a table for people, and where the page is."""
    rows = [
        (
            f"{one['score']:.4f}",
            one["label"] or "",
            one["source"],
            f"{one['row']}, {one['col']}",
            _place(one),
        )
        for one in result["similar"]
    ]
    table = console.table(rows, ("score", "label", "source", "row, column", "latitude, longitude"))
    return (
        f"{table}\n\nOf {result['searched']} tiles; "
        f"to look at: open file://{result['page']} in a browser"
    )


def _place(one: dict[str, Any]) -> str:
    return "" if one["latitude"] is None else f"{one['latitude']:.5f}, {one['longitude']:.5f}"


def _query(config: Config, image: Path, bundle: Bundle) -> tuple[str, Pixels]:
    try:
        look = scenes.look(image, config.ingest, bundle.sensors)
    except OSError as error:
        raise BadInput(f"{image}: {error.strerror}") from None
    except BadInput as error:
        raise BadInput(f"{image}: {error}") from None
    if look.tile is None:
        raise BadInput(
            f"{image}: {look.size[1]} x {look.size[0]} pixels are a scene, not a tile: cut out "
            f"what to look for, {2 * config.ingest.tile_size} pixels (twice ingest.tile_size) "
            f"at most"
        )
    return look.sensor, look.tile.pixels


# Embeddings


def of_cache(workspace: Workspace, bundle: Bundle) -> list[Path]:
    """Files with the embeddings of all tiles of the store, after those that lacked one got it.

    Tiles that have left the store stay in them, and are passed over.
    """
    from ringmo.registry.tracker import claim

    folder = workspace.state / "embeddings" / bundle.hash[:16]
    with claim(workspace.state / "embeddings.lock"):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        models = sorted(folder.parent.iterdir(), key=lambda path: -path.stat().st_mtime)
        for old in models[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        _complete(workspace, bundle, folder)
        return sorted(folder.glob("*.parquet"))


def _complete(workspace: Workspace, bundle: Bundle, folder: Path) -> None:
    """Embed the tiles of the store that no file of the folder has."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    table = manifest(workspace, ("key", "sensor"))
    missing = pc.is_in(table["sensor"], pa.array(list(bundle.meta["sensors"]))).to_numpy()
    for file in files:
        done = pq.read_table(file, columns=["key", "sensor"], partitioning=None)
        missing = missing & ~np.isin(_named(table), _named(done))
    if not missing.any():
        return
    reading, tiles = of_store(workspace, bundle, np.flatnonzero(missing))
    batches = embedded(bundle, tiles)
    with console.progress("embed", reading.total) as bar:
        for number, first in zip(count(len(files)), batches, strict=False):
            with Writer(folder / f"{number:06d}.parquet", bundle) as writer:
                writer.add(*first)
                written = len(first[0])
                bar.to(reading.done)
                while written < PART and (batch := next(batches, None)):
                    writer.add(*batch)
                    written += len(batch[0])
                    bar.to(reading.done)
    for one in reading.failed:
        console.note(f"not searched: {one['source']}: {one['reason']}")


def _named(table: "pyarrow.Table") -> NDArray[np.str_]:
    """Key and sensor of each row: a sensor may get another name while the tile stays."""
    import pyarrow.compute as pc

    joined = pc.binary_join_element_wise(table["key"], table["sensor"], " ")
    names: NDArray[np.str_] = joined.to_numpy().astype(np.str_)
    return names


def _checked(path: Path, bundle: Bundle) -> Path:
    """A file of `ringmo embed`, if this model wrote it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        by = (pq.read_schema(path).metadata or {}).get(MODEL_KEY, b"").decode()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: {str(error).splitlines()[0][:120]}") from None
    if not by:
        raise BadInput(f"{path} is no file that `ringmo embed` wrote")
    if by != bundle.hash:
        raise BadInput(
            f"{path} was written by another model ({by[:12]}, not {bundle.hash[:12]}): features "
            f"of two models cannot be compared: run `ringmo embed` with this one"
        )
    return path


def _nearest(
    files: Iterable[Path],
    vector: NDArray[np.float32],
    sensor: str,
    known: "pyarrow.Table | None",
    top: int,
) -> tuple[list[dict[str, Any]], int]:
    """The nearest tiles of a sensor, and how many there were to compare with.

    Args:
        known: the manifest, without which a tile of the cache does not count; its label and
            source are the ones told.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    at = None if known is None else pd.Index(known["key"].to_numpy())
    direction = vector / max(float(np.linalg.norm(vector)), 1e-12)
    best: list[dict[str, Any]] = []
    searched = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(ROWS):
            vectors = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
            lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
            scores = (vectors @ direction) / lengths
            usable = np.asarray(batch["sensor"].to_numpy(zero_copy_only=False) == sensor)
            if at is not None:
                usable &= at.get_indexer(batch["key"].to_numpy(zero_copy_only=False)) >= 0
            searched += int(usable.sum())
            scores[~usable] = -np.inf
            order = np.argsort(-scores, kind="stable")[:top]
            rows = batch.drop_columns(["embedding"]).take(order).to_pylist()
            best += [
                {"score": float(score), **row}
                for score, row in zip(scores[order], rows, strict=True)
                if score > -np.inf
            ]
            best = sorted(best, key=lambda one: -one["score"])[:top]
    return [_told(one, known, at) for one in best], searched


def _told(one: dict[str, Any], known: "pyarrow.Table | None", at: Any) -> dict[str, Any]:
    """A found tile as it is told."""
    import shapely

    if known is not None:
        row = known.slice(int(at.get_loc(one["key"])), 1).to_pylist()[0]
        one |= {"label": row["label"], "source": source_of(row)}
    shape = shapely.from_wkb(one.pop("geometry"))
    middle = None if shape is None else getattr(shape, "geoms", [shape])[0].centroid
    one["longitude"] = None if middle is None else round(middle.x, 7)
    one["latitude"] = None if middle is None else round(middle.y, 7)
    return one


# The page


def _pictures(
    workspace: Workspace,
    bundle: Bundle,
    found: Iterable[dict[str, Any]],
    known: "pyarrow.Table | None",
) -> list[str]:
    """Each tile as inline HTML: from the store, or else from the file that it is a window of."""
    tiles, sensors, shown = TileStore(workspace.store), bundle.sensors, []
    places = {}
    if known is not None:
        wanted = {one["key"] for one in found}
        keys = known["key"].to_pylist()
        rows = [i for i, key in enumerate(keys) if key in wanted]
        places = {row["key"]: row for row in known.take(rows).to_pylist()}
    for one in found:
        try:
            if one["key"] in places:
                row = places[one["key"]]
                data = tiles.read(row["shard"], row["offset"], row["size"])
                pixels = decode(data, row["dtype"])
            else:
                names = ("row", "col", "height", "width", "scale")
                window = scenes.Window(**{name: one[name] for name in names})
                (tile,) = scenes.cut(Path(one["source"]), [window], 1.0)
                assert tile is not None
                pixels = tile.pixels
            shown.append(_picture(pixels, sensors[one["sensor"]]))
        except (BadInput, OSError) as error:
            shown.append(f"<span class=none>{escape(str(error))}</span>")
    return shown


def _picture(pixels: Pixels, sensor: Sensor) -> str:
    from PIL import Image

    colours = visible(pixels, sensor)
    picture = Image.fromarray(colours[:, :, 0] if colours.shape[2] == 1 else colours)
    return f"<img src='{inline_jpeg(picture, (2 * SIDE, 2 * SIDE))}'>"


def _write(
    page: Path,
    image: Path,
    query: str,
    found: list[dict[str, Any]],
    pictures: list[str],
    about: str,
) -> None:
    figures = []
    for one, picture in zip(found, pictures, strict=True):
        lines = [f"<span class=score>{one['score']:.4f}</span> {escape(one['label'] or '')}"]
        source = escape(one["source"])
        if Path(one["source"]).is_absolute():
            source = f"<a href='{escape(Path(one['source']).as_uri())}'>{source}</a>"
        lines.append(source)
        lines.append(f"<span class=note>row {one['row']}, column {one['col']}</span>")
        if one["latitude"] is not None:
            point = f"mlat={one['latitude']}&amp;mlon={one['longitude']}"
            link = f"https://www.openstreetmap.org/?{point}#map=14/{one['latitude']}/{one['longitude']}"
            lines.append(f"<a href='{link}'>{_place(one)}</a>")
        caption = "<br>".join(lines)
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    whole = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>Like {escape(image.name)}</title><style>{STYLE}</style>"
        f"<h1>Tiles like {escape(str(image))}</h1><figure>{query}</figure>"
        f"<p class=note>{escape(about)}. The score is the cosine of the features, 1 at most.</p>"
        f"<div class=sheet>{''.join(figures)}</div></html>"
    )
    save(page, whole)
