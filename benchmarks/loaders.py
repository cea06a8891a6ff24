"""Images a second of one loader alone, measured in a process of its own.

    python -m benchmarks.loaders '{"contender": "ours", "workers": 2, …}'

`folder` is ImageFolder with PIL, as most people write it: random resized crop, flip, tensor,
normalise. The others give whole images as uint8 tensors of one size, made by the same decoder
and the same resizing as ours, so that what differs is how bytes get to it and tensors from it.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WARM_BATCHES, WARM_S = 8, 0.5
PASSES = 50  # more than a measurement lasts


def ours(spec: dict[str, Any]) -> Iterator[int]:
    """Tiles by key from the store, in full random order, each decoded every time."""
    import numpy as np

    from ringmo.data import loading
    from ringmo.workspace import Workspace

    loading.CACHE_BYTES = 0
    workspace = Workspace(Path(spec["folder"]) / "workspace")
    tiles = loading.SelectedTiles(workspace, workspace.work("select") / "pretrain.parquet", "train")
    order = np.concatenate([loading.shuffled(len(tiles), 0, epoch) for epoch in range(PASSES)])
    batches = tiles.batches(order, spec["batch"], spec["size"], workers=spec["workers"])
    for batch in batches:
        yield len(batch.images)


def folder(spec: dict[str, Any]) -> Iterator[int]:
    from torch.utils.data import DataLoader

    from benchmarks.plain import images

    dataset = images(Path(spec["folder"]) / "train", spec["crop"], (0.67, 1.0))
    dataset.samples *= PASSES
    loader: Any = DataLoader(
        dataset, spec["batch"], shuffle=True, num_workers=spec["workers"], drop_last=True
    )
    for batch, _ in loader:
        yield len(batch)


def webdataset(spec: dict[str, Any]) -> Iterator[int]:
    import webdataset as wds

    from ringmo.data.decode import decode
    from ringmo.data.loading import squares

    def batch(images: list[Any]) -> Any:
        return squares(images, spec["size"]).permute(0, 3, 1, 2)

    shards = sorted(str(p) for p in (Path(spec["folder"]) / "workspace/data/store").glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .repeat()
        .shuffle(500)
        .map(lambda sample: decode(sample["jpg"]))
        .batched(spec["batch"], collation_fn=batch, partial=False)
    )
    for images in wds.WebLoader(dataset, batch_size=None, num_workers=spec["workers"]):
        yield len(images)


def litdata(spec: dict[str, Any]) -> Iterator[int]:
    import litdata as lit

    from ringmo.data.decode import decode
    from ringmo.data.loading import squares

    def batch(files: list[bytes]) -> Any:
        return squares([decode(data) for data in files], spec["size"]).permute(0, 3, 1, 2)

    dataset = lit.StreamingDataset(str(Path(spec["folder"]) / "litdata"), shuffle=True)
    loader = lit.StreamingDataLoader(
        dataset,
        batch_size=spec["batch"],
        num_workers=spec["workers"],
        collate_fn=batch,
        drop_last=True,
    )
    for images in loader:
        yield len(images)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images a second, once the first batches are through, for so many seconds or to the end."""
    asked = time.perf_counter()
    for number, _ in enumerate(batches, 1):
        if number >= WARM_BATCHES and time.perf_counter() - asked >= WARM_S:
            break
    images, started = 0, time.perf_counter()
    for count in batches:
        images += count
        if time.perf_counter() - started >= seconds:
            break
    elapsed = time.perf_counter() - started
    if not images:
        raise SystemExit("too few images to measure with: ask for more (--images)")
    return images / elapsed


if __name__ == "__main__":
    from benchmarks.child import begin

    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    contender = {"ours": ours, "folder": folder, "webdataset": webdataset, "litdata": litdata}
    found = rate(contender[asked["contender"]](asked), asked["seconds"])
    print(json.dumps({"images_per_s": found}), flush=True)
