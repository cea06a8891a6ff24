"""The same JPEGs in every contender's own layout, in a folder that is removed after the run.

    train/tiles/*.jpg      folders of files, for ImageFolder
    workspace/             our tile store; its shards are WebDataset's tars, too
    litdata/               LitData's chunks, made when asked for

Real tiles are used byte for byte where they have the size asked for; other sizes are mosaics of
them, so that the detail of a pixel, and with it the cost of decoding, stays real.
"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmo import config
from ringmo.data.decode import decode, kind
from ringmo.data.store import COLUMNS, MANIFEST, ShardWriter, sha256, write_table
from ringmo.workspace import Workspace, init

ROOT = Path(__file__).parents[1]
BESIDE = ROOT.parent / "shared" / "data"  # real imagery, where a machine has it
SHARD_MB = 4  # small shards: WebDataset and LitData share them among their workers
QUALITY = 90
PIECES = 500  # of so many images mosaics are made
BLOCK = 512  # pixels a side of a GeoTIFF's blocks
# LitData starts its workers anew with each pass: its one pass is made as long as a measurement.
LITDATA_PASSES, LITDATA_IMAGES = 8, 6000  # at least


@dataclass(frozen=True)
class Source:
    """Files to make images of, and what to call them in the table."""

    files: list[Path]
    name: str

    @classmethod
    def find(cls, folder: Path | None, scratch: Path) -> "Source":
        """Images below `folder`; without one those beside the checkout, or a made-up world."""
        beside = BESIDE / "scene" / "aid"
        if folder is None and beside.is_dir():
            folder = beside
        if folder is None:
            from ringmo.data import generated

            made = generated.make(scratch / "generated")
            return cls(sorted(made.glob("*/*.tif")), "the generated world (no real imagery here)")
        endings = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings)
        if not files:
            raise SystemExit(f"{folder} holds no JPEG, PNG or TIFF: name another with DATA=FOLDER")
        return cls(files, "/".join(folder.resolve().parts[-2:]))


@dataclass(frozen=True)
class Imagery:
    """Prepared images. side: pixels. real: how many are files as they came, of count."""

    folder: Path
    side: int
    count: int
    real: int
    kilobytes: float

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "workspace")

    @property
    def shards(self) -> list[str]:
        return sorted(str(path) for path in self.workspace.store.glob("*.tar"))

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def litdata(self) -> Path:
        return self.folder / "litdata"

    def describe(self) -> str:
        kind = "files as they came" if self.real == self.count else f"mosaics, quality {QUALITY}"
        return f"{self.count} JPEGs of {self.side}×{self.side}, {self.kilobytes:.1f} kB, {kind}"


def prepare(source: Source, folder: Path, side: int, count: int, val: int = 0) -> Imagery:
    """`count` JPEGs of side × side pixels, the last `val` of them for validation."""
    files = [source.files[i] for i in np.random.default_rng(0).permutation(len(source.files))]

    @lru_cache(PIECES)
    def piece(number: int) -> NDArray[np.uint8]:
        image = decode(files[number].read_bytes())[:, :, :3]
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def one(number: int) -> tuple[bytes, bool]:
        if number < len(files):
            data = files[number].read_bytes()
            if kind(data) == "jpg" and decode(data).shape == (side, side, 3):
                return data, True
        random = np.random.default_rng((1, number))
        numbers = iter(random.integers(min(PIECES, len(files)), size=side * side))
        return _mosaic((piece(int(i)) for i in numbers), side), False

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(one, range(count)))
    images: dict[str, bytes] = {}
    for data, _ in made:
        images.setdefault(sha256(data), data)

    folder.mkdir(parents=True)
    workspace = init(folder / "workspace")
    workspace.store.mkdir(parents=True)
    (folder / "train" / "tiles").mkdir(parents=True)
    writer, rows = ShardWriter(workspace.store, 0, SHARD_MB), []
    for i, (digest, data) in enumerate(images.items()):
        split = "train" if i < len(images) - val else "val"
        key = digest[:16]
        if split == "train":
            (folder / "train" / "tiles" / f"{key}.jpg").write_bytes(data)
        shard, offset = writer.add(f"{key}.jpg", data)
        row: dict[str, object] = dict.fromkeys(COLUMNS)
        row |= {"key": key, "shard": shard, "member": f"{key}.jpg", "offset": offset}
        row |= {"size": len(data), "row": 0, "col": 0, "width": side, "height": side}
        row |= {"sensor": "rgb", "bands": 3, "dtype": "uint8", "content_hash": digest}
        rows.append(row | {"split": split, "generated": False, "ingest": 1})
    writer.commit()
    write_table(workspace.store / MANIFEST, rows, COLUMNS)
    columns = {name: COLUMNS[name] for name in ("key", "content_hash", "split")}
    write_table(workspace.work("select") / "pretrain.parquet", rows, columns)
    sizes = [len(data) for data in images.values()]
    real = sum(is_real for _, is_real in made)
    return Imagery(folder, side, len(images), real, sum(sizes) / len(sizes) / 1e3)


def scene(source: Source, path: Path, side: int) -> None:
    """A GeoTIFF of side × side pixels of mosaics: uint8 RGB, tiled, deflated."""
    pieces = _pieces(source, 2)
    strips = (_canvas(pieces, side, high).transpose(2, 0, 1) for high in _heights(side))
    _write_scene(path, side, strips, photometric="rgb")


def sentinel(path: Path, side: int) -> bool:
    """The same of real Sentinel-2 scenes, 13 bands of int16; False where there are none."""
    import rasterio

    real = []
    for one in sorted((BESIDE / "geotiff" / "terramesh" / "S2L1C").glob("*.tif")):
        with rasterio.open(one) as opened:
            real.append(opened.read())
    if not real:
        return False
    dice = np.random.default_rng(3)
    bands, tall, wide = real[0].shape

    def strip(high: int) -> NDArray[np.int16]:
        canvas = np.zeros((bands, high, side), np.int16)
        for top in range(0, high, tall):
            for left in range(0, side, wide):
                turned = np.rot90(real[dice.integers(len(real))], dice.integers(4), (1, 2))
                part = canvas[:, top : top + tall, left : left + wide]
                part[...] = turned[:, : part.shape[1], : part.shape[2]]
        return canvas

    _write_scene(path, side, map(strip, _heights(side)))
    return True


def _heights(side: int) -> list[int]:
    """Of strips of whole blocks that fill a scene, so that it is never held."""
    return [min(2 * BLOCK, side - top) for top in range(0, side, 2 * BLOCK)]


def _write_scene(path: Path, side: int, strips: Iterator[NDArray[Any]], **more: Any) -> None:
    import rasterio
    from rasterio.windows import Window

    first = next(strips)
    profile = {
        "driver": "GTiff",
        "count": len(first),
        "height": side,
        "width": side,
        "dtype": first.dtype,
        "crs": "EPSG:32633",
        "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_800_000),
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "predictor": 2,
        "interleave": "pixel",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    top = 0
    with rasterio.open(path, "w", **profile, **more) as file:
        for strip in chain([first], strips):
            file.write(strip, window=Window(0, top, side, strip.shape[1]))
            top += strip.shape[1]


def _pieces(source: Source, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Images of the source at random, without end."""

    @lru_cache(PIECES)
    def piece(number: int) -> NDArray[np.uint8]:
        image = decode(source.files[number].read_bytes())[:, :, :3]
        return np.broadcast_to(image, (*image.shape[:2], 3))

    dice = np.random.default_rng(seed)
    few = dice.permutation(len(source.files))[:PIECES]
    while True:
        yield piece(int(few[dice.integers(len(few))]))


def _mosaic(pieces: Iterator[NDArray[np.uint8]], side: int) -> bytes:
    """A mosaic as a JPEG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(_canvas(pieces, side, side)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _canvas(pieces: Iterator[NDArray[np.uint8]], wide: int, high: int) -> NDArray[np.uint8]:
    """Images side by side, row under row, until it is full."""
    canvas = np.zeros((high, wide, 3), np.uint8)
    top = 0
    while top < high:
        left = height = 0
        while left < wide:
            image = next(pieces)
            part = image[: height or high - top, : wide - left]
            height = height or part.shape[0]
            canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
            left += image.shape[1]
        top += height
    return canvas


def parameters(imagery: Imagery, recipe: str, changes: dict[str, object]) -> config.Config:
    """params.yaml of the workspace: a recipe, then `changes`."""
    values = config.flatten(config.read_yaml(ROOT / "recipes" / f"{recipe}.yaml"))
    path = imagery.workspace.params_file
    config.edit(path, values | changes)
    return config.Config.load(path)


def optimise(imagery: Imagery) -> None:
    """The images as LitData keeps them. In a process of its own: it starts others and prints."""
    passes = max(LITDATA_PASSES, LITDATA_IMAGES // imagery.count)
    spec = json.dumps({"train": str(imagery.train), "to": str(imagery.litdata), "passes": passes})
    command = [sys.executable, "-m", "benchmarks.imagery", spec]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=600)


def _bytes_of(path: str) -> bytes:
    return Path(path).read_bytes()


if __name__ == "__main__":
    import litdata

    asked = json.loads(sys.argv[1])
    litdata.optimize(
        _bytes_of,
        sorted(str(path) for path in Path(asked["train"]).glob("*/*")) * asked["passes"],
        asked["to"],
        chunk_bytes=f"{SHARD_MB}MB",
        num_workers=1,
        verbose=False,
    )
