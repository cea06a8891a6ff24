"""Every tile's features beside its footprint, in a file that GeoPandas reads."""

import json
import math
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from made_store import make_store
from PIL import Image
from pyproj import Transformer
from rasterio.transform import from_origin
from small_models import rgb, sar, write_model

from ringmo.cli import main
from ringmo.config import Config, edit
from ringmo.errors import BadInput
from ringmo.inference import embed as embedding
from ringmo.inference.embed import embed, footprints, text
from ringmo.registry import bundle
from ringmo.workspace import Workspace


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", sensors=("rgb", "sar"))


def config(workspace: Workspace) -> Config:
    return Config.load(workspace.params_file)


def write_scene(
    path: Path,
    pixels: np.ndarray[Any, Any],
    crs: str | None = "EPSG:32631",
    corner: tuple[float, float] = (500_000, 5_000_000),
    gsd: float = 10,
) -> None:
    height, width, bands = pixels.shape
    place = {"crs": crs, "transform": from_origin(*corner, gsd, gsd)} if crs else {}
    with rasterio.open(
        path, "w", "GTiff", width, height, bands, dtype=pixels.dtype, tiled=True, blockxsize=64,
        blockysize=64, **place,
    ) as file:  # fmt: skip
        file.write(pixels.transpose(2, 0, 1))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A JPEG, a scene of 3 × 2 windows of 64 pixels, radar, a text, and a truncated file."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(rgb(1)).save(folder / "a.png")
    write_scene(folder / "b.tif", rgb(2, 128, 192))
    write_scene(folder / "c.tif", sar(3))
    (folder / "notes.txt").write_text("no image")
    (folder / "z.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


def test_each_tile_has_its_own_features_and_footprint(
    workspace: Workspace, model: Path, images: Path, tmp_path: Path
) -> None:
    edit(workspace.params_file, {"ingest.tile_size": 64})
    out = tmp_path / "out" / "tiles.parquet"
    done = embed(config(workspace), workspace, str(images), str(model), out)
    assert done["tiles"] == 8 and done["sensors"] == {"rgb": 7, "sar": 1}
    assert done["located"] == 7 and done["features"] == 32
    assert [Path(one["source"]).name for one in done["failed"]] == ["z.png"]
    assert "damaged" in done["failed"][0]["reason"] and "z.png" in text(done)

    table = geopandas.read_parquet(out)
    assert table.crs == "EPSG:4326" and table["key"].isna().all()
    own, scene = bundle.load(model), rgb(2, 128, 192)
    vectors = np.stack(table["embedding"].to_list())
    assert vectors.dtype == np.float32
    expected = {(str(images / "a.png"), 0, 0): own.embed([rgb(1)], sensor="rgb")}
    expected[str(images / "c.tif"), 0, 0] = own.embed([sar(3)], sensor="sar")
    for row in (0, 64):
        for col in (0, 64, 128):
            cut = scene[row : row + 64, col : col + 64]
            expected[str(images / "b.tif"), row, col] = own.embed([cut], sensor="rgb")
    windows = table[["source", "row", "col"]].itertuples(index=False, name=None)
    found = dict(zip(windows, vectors, strict=True))
    assert found.keys() == expected.keys()
    for window, vector in expected.items():
        assert np.allclose(found[window], vector[0], atol=1e-5)

    to_degrees = Transformer.from_crs("EPSG:32631", "EPSG:4326", always_xy=True)
    of_scene = table[table["source"].str.endswith("b.tif")].set_index(["row", "col"])
    for (row, col), shape in of_scene["geometry"].items():
        left, top = 500_000 + 10 * col, 5_000_000 - 10 * row
        ring = [(left, top - 640), (left + 640, top - 640), (left + 640, top), (left, top)]
        corners = [to_degrees.transform(*corner) for corner in ring]
        assert shapely.equals_exact(
            shapely.normalize(shape), shapely.normalize(shapely.Polygon(corners)), 1e-9
        )
        assert shape.exterior.is_ccw
    assert table["geometry"].isna().sum() == 1


def test_the_file_says_what_geoparquet_asks(
    workspace: Workspace, model: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiles.parquet"
    embed(config(workspace), workspace, str(images / "b.tif"), str(model), out)
    file = pq.ParquetFile(out)
    geo = json.loads(file.metadata.metadata[b"geo"])
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB" and column["geometry_types"] == ["Polygon"]
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 4326}
    assert np.allclose(column["bbox"], geopandas.read_parquet(out).total_bounds)
    assert str(file.schema_arrow.field("embedding").type) in (
        "fixed_size_list<element: float>[32]",
        "fixed_size_list<item: float>[32]",
    )
    assert file.metadata.metadata[b"ringmo.model"].decode() == bundle.load(model).hash


def test_tiles_of_the_store_have_their_keys_and_labels(
    workspace: Workspace, model: Path, tmp_path: Path
) -> None:
    """In several row groups, and without coordinates."""
    made = make_store(workspace, per_class=7)
    out = tmp_path / "tiles.parquet"
    embedding_rows, embedding.ROW_GROUP = embedding.ROW_GROUP, 8
    try:
        done = embed(config(workspace), workspace, "store", str(model), out)
    finally:
        embedding.ROW_GROUP = embedding_rows
    assert done["tiles"] == 21 and done["located"] == 0 and done["left_out"] == 0
    table = geopandas.read_parquet(out).set_index("key")
    assert table["label"].to_dict() == made.set_index("key")["label"].to_dict()
    assert table["source"].str.startswith("made/").all() and table["geometry"].isna().all()


def test_tiles_of_other_sensors_are_left_out_and_counted(
    workspace: Workspace, tmp_path: Path
) -> None:
    make_store(workspace, per_class=2)
    model = write_model(tmp_path / "radar", sensors=("sar",))
    with pytest.raises(BadInput, match="no tile of store that this model reads"):
        embed(config(workspace), workspace, "store", str(model), tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.glob("*.parquet*")] == []


def test_a_failure_leaves_the_old_file_and_no_other(
    workspace: Workspace, model: Path, images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "tiles.parquet"
    out.write_text("the old one")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(embedding, "footprints", broken)
    with pytest.raises(RuntimeError):
        embed(config(workspace), workspace, str(images), str(model), out)
    assert out.read_text() == "the old one"
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


def test_footprints_lie_where_they_lie_on_earth() -> None:
    """By hand: across 180 degrees, around a pole, in other units, and nowhere."""
    across, geographic, pole, world, nowhere, bad = footprints(
        ["EPSG:32601", "EPSG:4326", "EPSG:3413", "EPSG:4326", None, "EPSG:32631"],
        np.array(
            [
                [165_000, 0, 168_000, 3_000],  # zone 1 west of its edge: 179.99 to -179.98
                [179.5, -1, 180.5, 1],
                [-1e5, -1e5, 1e5, 1e5],
                [-180, -90, 180, 90],
                [math.nan] * 4,
                [math.inf, 0, 1, 1],
            ]
        ),
    )
    assert across.geom_type == geographic.geom_type == "MultiPolygon"
    for shape in (across, geographic):
        assert shape.bounds[0] >= -180 and shape.bounds[2] <= 180
    assert np.isclose(geographic.area, 2.0)
    assert geographic.contains(shapely.Point(-179.75, 0))
    assert geographic.contains(shapely.Point(179.75, 0))
    # 3 km at the equator, at UTM's scale there of 1.001: 0.0269 degrees of 111.3 km each.
    assert np.isclose(across.area, 0.0269**2, rtol=0.02)
    assert pole.contains(shapely.Point(77, 89.9)) and pole.bounds[1] < 89
    assert world.bounds == (-180, -90, 180, 90)
    assert nowhere is None and bad is None


def test_the_command_writes_the_file_and_says_so(
    workspace: Workspace, model: Path, images: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "tiles.parquet"
    common = ["--workspace", str(workspace.root), "--model", str(model), "--json"]
    assert main(["embed", str(images / "*.tif"), "--out", str(out), *common]) == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == len(geopandas.read_parquet(out))
    assert main(["embed", str(images / "*.tif"), "--out", str(tmp_path), *common]) == 2
    assert "is a folder" in json.loads(capsys.readouterr().out)["error"]
    assert main(["embed", str(images / "*.jp2"), "--out", str(out), *common]) == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_scene_is_never_held(workspace: Workspace, model: Path, tmp_path: Path) -> None:
    """Memory does not grow with the scene: 200 MB of pixels cost less than half of that."""
    import subprocess
    import sys

    profile = {"width": 8192, "height": 8192, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(
        tmp_path / "large.tif", "w", "GTiff", blockxsize=512, blockysize=512, **profile
    ) as file:
        strip = np.random.default_rng(0).integers(0, 255, (3, 512, 8192), dtype=np.uint8)
        for top in range(0, 8192, 512):
            file.write(strip, window=rasterio.windows.Window(0, top, 8192, 512))
    write_scene(tmp_path / "small.tif", rgb(2, 1536, 1536))
    code = (
        "import resource, sys; from ringmo.cli import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    edit(workspace.params_file, {"ingest.tile_size": 512})
    used = {}
    for name in ("small", "large"):
        arguments = ["embed", str(tmp_path / f"{name}.tif"), "--out", str(tmp_path / "o.parquet")]
        arguments += ["--model", str(model), "--workspace", str(workspace.root), "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        used[name] = int(done.stdout.split()[-1])
    print(used)
    assert used["large"] - used["small"] < 100, used
