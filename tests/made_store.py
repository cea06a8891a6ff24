"""A small tile store of plain colours with noise, and its selections, without the ingest."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ringmo.data.store import COLUMNS, MANIFEST, ShardWriter, sha256, write_table

COLOURS = {"Beach": (220, 200, 150), "Forest": (30, 90, 40), "Port": (60, 80, 160)}


def png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_store(workspace: Any, per_class: int = 20, side: int = 48, seed: int = 0) -> pd.DataFrame:
    """Tiles in three classes which their colour tells apart: 60 % train, 20 % val, 20 % test."""
    random = np.random.default_rng(seed)
    workspace.store.mkdir(parents=True, exist_ok=True)
    writer, rows = ShardWriter(workspace.store, 0, 64), []
    for label, colour in COLOURS.items():
        for i in range(per_class):
            noise = random.normal(0, 12, (side, side, 3))
            data = png(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
            digest = sha256(data)
            member = f"{digest[:16]}.png"
            shard, offset = writer.add(member, data)
            facts: dict[str, Any] = dict.fromkeys(COLUMNS)
            facts |= {"key": digest[:16], "shard": shard, "member": member, "offset": offset}
            facts |= {"size": len(data), "source": f"{label}/{i}.png", "source_root": "made"}
            facts |= {"row": 0, "col": 0, "width": side, "height": side, "sensor": "rgb"}
            facts |= {"bands": 3, "dtype": "uint8", "content_hash": digest, "phash": "0" * 16}
            facts |= {"place": f"{label}-{i}", "label": label, "generated": True, "ingest": 1}
            share = i / per_class
            facts["split"] = "train" if share < 0.6 else "val" if share < 0.8 else "test"
            rows.append(facts)
    writer.commit()
    write_table(workspace.store / MANIFEST, rows, COLUMNS)
    return pd.DataFrame(rows)


def make_selections(workspace: Any, manifest: pd.DataFrame) -> None:
    """work/select/pretrain.parquet and scene.parquet, as the stage `select` writes them."""
    folder: Path = workspace.work("select")
    folder.mkdir(parents=True, exist_ok=True)
    ordered = manifest.sort_values("key")
    scene = ordered[["key", "content_hash", "split", "label"]]
    scene.to_parquet(folder / "scene.parquet", index=False)
    unlabelled = ordered[ordered["split"] != "test"][["key", "content_hash", "split"]]
    unlabelled.to_parquet(folder / "pretrain.parquet", index=False)
