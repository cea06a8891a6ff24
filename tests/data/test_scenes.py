"""Scenes of any size: bounded memory, the same bytes however read, odd files understood."""

import io
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.io import MemoryFile
from rasterio.transform import Affine, from_origin
from real import REAL
from small_imagery import geotiff, pixels, sensed, write_bands

from ringmo.config import Config, Ingest, Sensor
from ringmo.data import scenes
from ringmo.data.decode import decode
from ringmo.data.scenes import Layout, Look, Tile, Window, cut, look
from ringmo.errors import BadInput
from ringmo.workspace import template

GEOTIFF = REAL / "geotiff"


@pytest.fixture(scope="module")
def sensors() -> dict[str, Sensor]:
    more = {("pan", 1, "uint8"), ("pan16", 1, "uint16"), ("dem", 1, "int16"), ("rgbn", 4, "uint8")}
    made = {
        name: Sensor(bands=[f"b{i}" for i in range(n)], dtype=dtype, mean=[90] * n, std=[40] * n)
        for name, n, dtype in more
    }
    return Config.load(template("params.yaml")).sensors | made


def settings(**values: Any) -> Ingest:
    return Config.load(template("params.yaml")).ingest.model_copy(
        update={"tile_size": 64, **values}
    )


def tiles_of(path: Path, found: Look, share: float = 1.0) -> list[Tile | None]:
    return [t for a, b in found.groups for t in cut(path, found.windows[a:b], share)]


def opened(tile: Tile) -> Any:
    return MemoryFile(tile.data).open()


def scene(path: Path, values: Any, **profile: Any) -> Path:
    """A GeoTIFF of (H, W, C), compressed and tiled unless the profile says other."""
    usual = {"compress": "deflate", "predictor": 2, "tiled": True, "interleave": "pixel"}
    usual |= {"blockxsize": 64, "blockysize": 64}
    return write_bands(path, values, **usual | profile)


# The grid


@pytest.mark.parametrize(
    ("length", "stride", "starts"),
    [
        (150, 64, [0, 64, 86]),
        (128, 64, [0, 64]),
        (150, 32, [0, 32, 64, 86]),
        (150, 48, [0, 48, 86]),
        (310, 100, [0, 100, 200, 246]),
        (300, 100, [0, 100, 200]),
        (40, 32, [0]),
    ],
)
def test_windows_lie_a_stride_apart_and_the_last_ends_with_the_scene(
    length, stride, starts, tmp_path, sensors
):
    path = scene(tmp_path / "a.tif", pixels(1, 200, length))
    found = look(path, settings(stride=stride), sensors)
    assert sorted({w.row for w in found.windows}) == starts
    assert [(w.row, w.col) for w in found.windows] == sorted((w.row, w.col) for w in found.windows)
    whole = pixels(1, 200, length)
    for window, tile in zip(found.windows, tiles_of(path, found), strict=True):
        r, c = window.row, window.col
        assert tile is not None and tile.window == window and (tile.row, tile.col) == (r, c)
        assert (decode(tile.data) == whole[r : r + window.height, c : c + 64]).all()


LAYOUTS = [
    Layout(33_000, 100_000, 256, 256, 3),
    Layout(33_000, 100_000, 512, 512, 3),
    Layout(33_000, 100_000, 1, 100_000, 3),
    Layout(4_000, 100_000, 1, 100_000, 26),
    Layout(4_000, 100_000, 128, 128, 26),
    Layout(20_000, 20_000, 1, 20_000, 3),
    Layout(10_980, 10_980, 512, 512, 26),
    Layout(700, 900, 700, 900, 3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("stride", "scale"), [(None, 1.0), (100, 1.0), (None, 2.5), (None, 0.5)])
def test_groups_are_rows_or_parts_of_them_in_order_and_bounded(layout, stride, scale):
    height, width = int(layout.height / scale), int(layout.width / scale)
    grid = scenes._windows(height, width, settings(tile_size=256, stride=stride), scale)
    windows, groups = scenes._parted(grid, layout)
    assert sorted(windows, key=lambda w: (w.row, w.col)) == grid
    assert [a for a, _ in groups] == [0, *(b for _, b in groups[:-1])]
    assert groups[-1][1] == len(windows)
    in_rows = layout.in_strips or 512 * layout.width * layout.pixel_bytes < 64e6
    assert not in_rows or windows == grid
    ends = {windows[-1].col}
    for first, last in groups:
        part = windows[first:last]
        rows = {w.row for w in part}
        cols = {w.col for w in part}
        assert len(part) == len(rows) * len(cols) or len(rows) == 1
        # Several rows of a scene that is read by rows are whole ones.
        assert not in_rows or len(rows) == 1 or (part[0].col == 0 and part[-1].col in ends)
        pixels = (part[-1].row + 256 - part[0].row) * (part[-1].col + 256 - part[0].col)
        assert len(part) == 1 or pixels * max(scale**2, 1) * layout.pixel_bytes <= (
            layout.group_bytes
        )


@pytest.mark.parametrize(
    "layout",
    [
        Layout(8_192, 8_192, 512, 512, 3),
        Layout(8_192, 8_192, 512, 512, 26),
        Layout(4_096, 102_400, 512, 512, 3),
        Layout(8_192, 8_192, 1024, 1024, 13),
    ],
    ids=str,
)
def test_groups_of_a_tiled_scene_read_each_block_once(layout):
    grid = scenes._windows(layout.height, layout.width, settings(tile_size=256), 1.0)
    windows, groups = scenes._parted(grid, layout)
    blocks: list[tuple[int, int]] = []
    for first, last in groups:
        blocks += {
            (w.row // layout.block_height, w.col // layout.block_width) for w in windows[first:last]
        }
    whole = layout.height // layout.block_height * (layout.width // layout.block_width)
    assert len(blocks) == len(set(blocks)) == whole


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tiled": False, "blockysize": 7},
        {"interleave": "band"},
        {"nodata": 90},
        {"stride": 40},
        {"gsd_m": 17},
        {"gsd_m": 7, "stride": 50},
        {"gsd_m": 23.7, "nodata": 90, "tiled": False, "blockysize": 3},
    ],
    ids=str,
)
def test_a_tiles_bytes_do_not_depend_on_what_is_read_with_it(
    change, monkeypatch, tmp_path, sensors
):
    own = {name: change[name] for name in ("stride", "gsd_m") if name in change}
    profile = {name: value for name, value in change.items() if name not in own}
    path = scene(tmp_path / "a.tif", pixels(3, 400, 300), **profile)
    found = look(path, settings(**own), sensors)
    together = [t and t.data for t in cut(path, found.windows, 1.0)]
    alone = [t and t.data for w in found.windows for t in cut(path, [w], 1.0)]
    assert together == alone
    for name in ("READ_BYTES", "GROUP_BYTES", "STRIP_GROUP_BYTES"):
        monkeypatch.setattr(scenes, name, 20_000)
    small = look(path, settings(**own), sensors)
    assert len(small.groups) > len(found.groups)
    parts = [t and t.data for t in tiles_of(path, small)]
    expected = dict(zip(found.windows, together, strict=True))
    assert dict(zip(small.windows, parts, strict=True)) == expected


# The tiles' files


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
def test_a_cut_tile_is_a_geotiff_as_gdal_would_write_it(bands, dtype, tmp_path):
    """Values, coordinates and nodata; through the encoder itself, since no sensor has them all."""
    values = np.random.default_rng(bands).integers(1, 250, (150, 200, bands)).astype(dtype)
    values[:5] = 0
    path = scene(tmp_path / "a.tif", values, compress="lzw", predictor=1, nodata=0)
    windows = [Window(0, 0, 64, 64), Window(17, 50, 60, 70)]
    with rasterio.open(path) as source:
        for tile, w in zip(cut(path, windows, 1.0), windows, strict=True):
            assert tile is not None
            with opened(tile) as one:
                area = ((w.row, w.row + w.height), (w.col, w.col + w.width))
                assert (one.read() == source.read(window=area)).all()
                assert one.dtypes == source.dtypes
                assert (one.crs, one.nodata) == (source.crs, 0)
                assert one.transform == source.window_transform(
                    rasterio.windows.Window(w.col, w.row, w.width, w.height)
                )
                assert one.bounds == tile.bounds
                assert one.profile["compress"] == "deflate"
                assert (one.dataset_mask() == source.dataset_mask(window=area)).all()
                assert ColorInterp.alpha not in one.colorinterp
            if dtype == "uint8" and bands in (1, 3):
                found = np.asarray(Image.open(io.BytesIO(tile.data)))
                assert (found.reshape(tile.pixels.shape) == tile.pixels).all()


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"interleave": "band"},
        {"blockxsize": 32, "blockysize": 16},
        {"compress": "lzw"},
        {"compress": "jpeg", "photometric": "ycbcr", "predictor": 1},
        {"BIGTIFF": "YES"},
        {"nodata": 77},
    ],
    ids=str,
)
def test_whole_blocks_are_taken_as_they_are_stored(profile, tmp_path, sensors):
    path = tmp_path / "a.tif"
    values = pixels(1, 200, 150)
    usual = {"compress": "deflate", "predictor": 2, "blockxsize": 64, "blockysize": 64}
    usual |= {"crs": "EPSG:32631", "transform": from_origin(0, 5e6, 1, 1), "interleave": "pixel"}
    with rasterio.open(
        path, "w", driver="GTiff", width=200, height=150, count=3, dtype="uint8", tiled=True,
        **usual | profile,
    ) as target:  # fmt: skip
        target.write(values.transpose(2, 0, 1))
    data = path.read_bytes()
    windows = [Window(64, 64, 64, 64), Window(0, 0, 128, 64), Window(128, 192, 22, 8)]
    with rasterio.open(path) as source:
        for tile, w in zip(cut(path, windows, 1.0), windows, strict=True):
            assert tile is not None
            with opened(tile) as one:
                area = ((w.row, w.row + w.height), (w.col, w.col + w.width))
                assert one.profile["compress"] == source.profile["compress"]
                assert (one.read() == source.read(window=area)).all()
                assert (one.crs, one.nodata) == (source.crs, source.nodata)
                assert one.bounds == tile.bounds
                place = int(one.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", 1))
                size = int(one.get_tag_item("BLOCK_SIZE_0_0", "TIFF", 1))
                assert data.count(tile.data[place : place + size]) == 1
            assert (decode(tile.data) == tile.pixels).all()
            if profile.get("interleave") != "band":
                found = np.asarray(Image.open(io.BytesIO(tile.data)).convert("RGB"))
                lossy = profile.get("compress") == "jpeg"
                assert np.abs(found.astype(int) - tile.pixels).max() <= (16 if lossy else 0)
    # Beside the grid of blocks there is nothing to take.
    (tile,) = cut(path, [Window(10, 64, 64, 64)], 1.0)
    assert tile is not None
    with opened(tile) as one:
        assert one.profile["compress"] == "deflate" and one.block_shapes[0] == (64, 64)
        assert (one.read() == tile.pixels.transpose(2, 0, 1)).all()


def test_a_block_that_is_damaged_is_never_taken(tmp_path, sensors):
    path = scene(tmp_path / "a.tif", pixels(1, 200, 150))
    with rasterio.open(path) as source:
        place = int(source.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", 1))
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged"):
        tiles_of(path, look(path, settings(), sensors))


def test_alpha_of_a_scene_reaches_its_tiles(tmp_path, sensors):
    values = np.dstack([pixels(1, 200, 150), np.full((150, 200), 255, np.uint8)])
    values[:, :90, 3] = 0
    path = scene(tmp_path / "a.tif", values)
    with rasterio.open(path, "r+") as target:
        target.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue,
                              ColorInterp.alpha)  # fmt: skip
    found = look(path, settings(), sensors)
    assert found.sensor == "rgb"
    tiles = tiles_of(path, found, 0.5)
    assert [t is None for t in tiles[:4]] == [True, False, False, False]
    for tile in tiles:
        if tile is not None:
            assert tile.pixels.shape[2] == 3 and (decode(tile.data) == tile.pixels).all()
            with opened(tile) as one:
                hole = max(90 - tile.col, 0)
                assert (one.dataset_mask()[:, hole:] == 255).all()
                assert (one.dataset_mask()[:, :hole] == 0).all()


def test_internal_mask_of_8_bits_becomes_alpha_where_something_is_missing(tmp_path, sensors):
    path = scene(tmp_path / "a.tif", pixels(1, 200, 150))
    valid = np.full((150, 200), 255, np.uint8)
    valid[:, :20] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), rasterio.open(path, "r+") as target:
        target.write_mask(valid)
    first, second, *_ = tiles_of(path, look(path, settings(), sensors))
    assert first is not None and second is not None
    with opened(first) as one, opened(second) as other:
        assert (one.count, other.count) == (4, 3)
        assert (one.dataset_mask() == valid[:64, :64]).all()


# Resampling


def gdal_means(path: Path, window: Window, how: Resampling) -> Any:
    """What GDAL makes of the same source pixels, without overviews."""
    s = window.scale
    area = rasterio.windows.Window(
        window.col * s, window.row * s, window.width * s, window.height * s
    )
    with rasterio.open(path, OVERVIEW_LEVEL="NONE") as source:
        return source.read(
            window=area,
            out_shape=(source.count, window.height, window.width),
            resampling=how,
        ).transpose(1, 2, 0)


@pytest.mark.parametrize("gsd", [20, 25, 10.7, 99])
@pytest.mark.parametrize("sensor", ["rgb", "s2l2a", "s1"])
def test_shrinking_takes_the_mean_of_all_that_a_pixel_covers(gsd, sensor, tmp_path, sensors):
    values = sensed(sensor, 1, 420, 300)
    path = write_bands(tmp_path / "a.tif", values)
    found = look(path, settings(tile_size=32, gsd_m=gsd), sensors)
    assert found.sensor == sensor
    tiles = tiles_of(path, found) if found.windows else [found.tile]
    for tile in tiles:
        assert tile is not None
        assert tile.window.scale == pytest.approx(gsd / 10)
        expected = gdal_means(path, tile.window, Resampling.average)
        off = np.abs(tile.pixels - expected.astype(float))
        # GDAL rounds a half up, we to the even number.
        assert off.max() <= (1 if sensor != "s1" else 1e-3)
        assert (off > 0.5).mean() < 0.2
        if gsd == 20:
            side = tile.window.height, 2, tile.window.width, 2, values.shape[2]
            r, c = 2 * tile.row, 2 * tile.col
            exact = values[r : r + 2 * side[0], c : c + 2 * side[2]].reshape(side).mean((1, 3))
            assert np.abs(tile.pixels - exact).max() <= (0.5 if sensor != "s1" else 1e-4)
        assert (decode(tile.data) == tile.pixels).all()


@pytest.mark.parametrize("gsd", [5, 4, 7.3])
def test_enlarging_is_smooth_and_seamless(gsd, tmp_path, sensors):
    path = write_bands(tmp_path / "a.tif", pixels(1, 100, 80))
    found = look(path, settings(tile_size=32, gsd_m=gsd), sensors)
    whole = Window(0, 0, int(80 * 10 / gsd), int(100 * 10 / gsd), gsd / 10)
    expected = gdal_means(path, whole, Resampling.bilinear).astype(int)
    for tile in tiles_of(path, found):
        assert tile is not None
        part = expected[tile.row : tile.row + 32, tile.col : tile.col + 32]
        assert np.abs(tile.pixels - part).max() <= 1
        assert (tile.pixels != part).mean() < 0.1


def test_a_pixel_is_the_same_in_every_tile_that_has_it(tmp_path, sensors):
    path = write_bands(tmp_path / "a.tif", sensed("s1", 5, 400, 300))
    for gsd in (23.3, 7.9):
        found = look(path, settings(tile_size=48, stride=31, gsd_m=gsd), sensors)
        seen: dict[tuple[int, int], Any] = {}
        for tile in tiles_of(path, found):
            assert tile is not None
            for r, c in itertools.product(range(0, 48, 5), range(0, 48, 5)):
                value = tile.pixels[r, c].tolist()
                assert seen.setdefault((tile.row + r, tile.col + c), value) == value


def test_the_resampled_tile_says_where_it_lies_and_how_fine_it_is(tmp_path, sensors):
    path = geotiff(tmp_path / "a.tif", 1, 500_000, 4_000_000, side=300, width=400, gsd=2.0)
    found = look(path, settings(gsd_m=5.0), sensors)
    assert found.size == (300, 400)
    assert {w.scale for w in found.windows} == {2.5}
    for tile in tiles_of(path, found):
        assert tile is not None and tile.gsd_m == 5.0
        left, top = 500_000 + 5 * tile.col, 4_000_000 - 5 * tile.row
        assert tile.bounds == (left, top - 320, left + 320, top)
        with opened(tile) as one:
            assert one.bounds == tile.bounds and one.res == (5, 5)
            assert one.crs == "EPSG:32631"


def test_a_small_image_is_resampled_as_one_tile_and_of_the_wanted_distance_left_alone(
    tmp_path, sensors
):
    path = geotiff(tmp_path / "a.tif", 1, 0, 0, side=80, gsd=1.0)
    whole = look(path, settings(gsd_m=2.0), sensors)
    assert whole.tile is not None and whole.windows == whole.groups == []
    assert whole.tile.pixels.shape == (40, 40, 3)
    with opened(whole.tile) as one:
        assert one.res == (2, 2) and one.bounds == (0, -80, 80, 0)
        assert (one.read().transpose(1, 2, 0) == whole.tile.pixels).all()
    for near in (1.0, 1.0099, 0.9901):
        same = look(path, settings(gsd_m=near), sensors).tile
        assert same is not None and same.data == path.read_bytes()


@pytest.mark.parametrize("sensor", ["rgb", "s2l2a", "s1"])
def test_no_data_takes_no_part_in_a_mean(sensor, tmp_path, sensors):
    values = np.full_like(sensed(sensor, 1, 200, 200), 100)
    values[:, :101] = 0
    path = write_bands(tmp_path / "a.tif", values, nodata=0)
    for gsd in (20, 30, 5):
        for tile in tiles_of(path, look(path, settings(gsd_m=gsd, tile_size=32), sensors)):
            assert tile is not None
            with opened(tile) as one:
                assert set(np.unique(one.read())) <= {0, 100}
                assert one.nodata == 0
                centres = (tile.col + np.arange(32) + 0.5) * gsd / 10
                assert ((one.dataset_mask() > 0) == (centres > 101)).mean() > 0.96
                valid = np.ones((32, 32), bool) if tile.valid is None else tile.valid
                assert ((one.dataset_mask() > 0) == valid).all()


def test_a_mean_that_comes_to_the_nodata_value_stays_a_measurement(tmp_path, sensors):
    values = np.full((100, 100, 3), 49, np.uint8)
    values[::2] = 51
    path = write_bands(tmp_path / "a.tif", values, nodata=50)
    tile = look(path, settings(gsd_m=20), sensors).tile
    assert tile is not None and tile.valid is None
    assert (tile.pixels == 51).all()


def test_images_without_a_known_distance_are_left_as_they_are(tmp_path, sensors):
    picture = tmp_path / "a.png"
    Image.fromarray(pixels(1, 90, 90)).save(picture)
    bare = tmp_path / "b.tif"
    Image.fromarray(pixels(1, 90, 90)).save(bare)
    for path in (picture, bare):
        tile = look(path, settings(gsd_m=50), sensors).tile
        assert tile is not None and tile.data == path.read_bytes() and math.isnan(tile.gsd_m)


def test_degrees_are_metres_by_their_latitude(tmp_path, sensors):
    degrees = 10 / 111_320
    path = write_bands(
        tmp_path / "a.tif", pixels(1, 300, 300), crs="EPSG:4326",
        transform=from_origin(20, 60, 2 * degrees, degrees),
    )  # fmt: skip
    found = look(path, settings(gsd_m=20), sensors)
    (scale,) = {w.scale for w in found.windows}
    assert scale == pytest.approx(20 / math.sqrt(200 * math.cos(math.radians(60))), rel=1e-3)


def test_what_no_distance_can_be_made_of_is_set_aside_with_both(tmp_path, sensors):
    path = geotiff(tmp_path / "a.tif", 1, 0, 0, side=40, gsd=10.0)
    with pytest.raises(BadInput, match=r"pixels of 10 m, over 8 times ingest.gsd_m \(1 m\)"):
        look(path, settings(gsd_m=1), sensors)
    with pytest.raises(BadInput, match=r"40 x 40 pixels of 10 m: less than one of 500 m"):
        look(path, settings(gsd_m=500), sensors)


# Odd but valid files


def test_control_points_give_a_footprint_where_they_are_three(tmp_path, sensors):
    from rasterio.control import GroundControlPoint as Point

    def with_points(count: int, crs: str) -> Tile:
        path = tmp_path / f"{count}{crs}.tif"
        points = [
            Point(row, col, x=500_000 + 2 * col, y=4_000_000 - 2 * row)
            for row, col in ((0, 0), (0, 90), (90, 0), (90, 90))[:count]
        ]
        with rasterio.open(
            path, "w", driver="GTiff", width=90, height=90, count=3, dtype="uint8",
            gcps=points, crs=rasterio.CRS.from_string(crs) if crs else rasterio.CRS(),
        ) as target:  # fmt: skip
            target.write(pixels(1, 90, 90).transpose(2, 0, 1))
        tile = look(path, settings(), sensors).tile
        assert tile is not None and tile.data == path.read_bytes()
        return tile

    tile = with_points(4, "EPSG:32631")
    assert tile.crs == "EPSG:32631" and tile.gsd_m == pytest.approx(2)
    assert tile.bounds == pytest.approx((500_000, 3_999_820, 500_180, 4_000_000))
    for tile in (with_points(2, "EPSG:32631"), with_points(4, "")):
        assert tile.crs is None and math.isnan(tile.bounds[0])


def test_a_rotated_scene_has_the_box_about_its_corners_and_rotated_tiles(tmp_path, sensors):
    turned = Affine.translation(5e5, 4e6) @ Affine.rotation(30) @ Affine.scale(2, -2)
    path = scene(tmp_path / "a.tif", pixels(1, 200, 150), transform=turned)
    for tile in tiles_of(path, look(path, settings(), sensors)):
        assert tile is not None and tile.gsd_m == 2
        with opened(tile) as one:
            expected = turned @ Affine.translation(tile.col, tile.row)
            assert np.allclose(tuple(one.transform), tuple(expected), rtol=0, atol=1e-6)
            corners = [one.transform @ (x, y) for x in (0, 64) for y in (0, 64)]
        xs, ys = zip(*corners, strict=True)
        assert tile.bounds == pytest.approx((min(xs), min(ys), max(xs), max(ys)))
        assert tile.bounds[2] - tile.bounds[0] > 128


@pytest.mark.parametrize("georeference", [{"crs": None}, {"transform": Affine.identity()}])
def test_half_a_georeference_is_none(georeference, tmp_path, sensors):
    path = scene(tmp_path / "a.tif", pixels(1, 200, 150), **georeference)
    for tile in tiles_of(path, look(path, settings(gsd_m=3), sensors)):
        assert tile is not None and tile.crs is None and math.isnan(tile.bounds[0])


def test_a_scene_across_180_degrees_goes_on_beyond_them(tmp_path, sensors):
    path = scene(
        tmp_path / "a.tif", pixels(1, 200, 150), crs="EPSG:4326",
        transform=from_origin(179.99, 10, 1e-4, 1e-4),
    )  # fmt: skip
    tiles = tiles_of(path, look(path, settings(), sensors))
    assert max(t.bounds[2] for t in tiles if t) == pytest.approx(180.01)


def test_scale_and_offset_tags_change_no_pixel(tmp_path, sensors):
    values = sensed("s2l2a", 1, 200, 150)
    path = scene(tmp_path / "a.tif", values)
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = [1e-4] * 12, [-0.1] * 12
    first = tiles_of(path, look(path, settings(), sensors))[0]
    assert first is not None and (first.pixels == values[:64, :64]).all()


def test_overviews_are_not_looked_at_and_their_weight_is_left_behind(tmp_path, sensors):
    path = write_bands(tmp_path / "a.tif", pixels(1, 500, 500))
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4], Resampling.nearest)
        target.build_overviews([2], Resampling.nearest)
    found = look(path, settings(gsd_m=40), sensors).tile
    assert found is not None
    assert np.abs(found.pixels - gdal_means(path, found.window, Resampling.average)
                  .astype(int)).max() <= 1  # fmt: skip
    padded = geotiff(tmp_path / "b.tif", 1, 0, 0, side=60)
    with padded.open("ab") as file:
        file.write(bytes(200_000))
    tile = look(padded, settings(), sensors).tile
    assert tile is not None and len(tile.data) < 12_000
    assert (decode(tile.data) == pixels(1, 60, 60)).all()


def test_cog_and_bigtiff_are_tiffs(tmp_path, sensors):
    values = pixels(1, 700, 600)
    for name, profile in {
        "cog": {"driver": "COG", "blocksize": 256, "compress": "deflate", "predictor": "YES"},
        "big": {"driver": "GTiff", "BIGTIFF": "YES"},
    }.items():
        path = tmp_path / f"{name}.tif"
        with rasterio.open(
            path, "w", width=700, height=600, count=3, dtype="uint8", crs="EPSG:32631",
            transform=from_origin(0, 0, 1, 1), **profile,
        ) as target:  # fmt: skip
            target.write(values.transpose(2, 0, 1))
        for tile in tiles_of(path, look(path, settings(tile_size=256), sensors)):
            assert tile is not None
            assert (decode(tile.data) == values[tile.row :, tile.col :][:256, :256]).all()


def test_one_pixel_is_an_image(tmp_path, sensors):
    from ringmo.data.measures import measure

    path = write_bands(tmp_path / "a.tif", pixels(1, 1, 1))
    Image.fromarray(pixels(1, 1, 1)).save(tmp_path / "a.png")
    for file in (path, tmp_path / "a.png"):
        tile = look(file, settings(), sensors).tile
        assert tile is not None and tile.pixels.shape == (1, 1, 3)
        assert measure(tile.pixels, tile.valid, sensors["rgb"]).std >= 0
    (same,) = cut(path, [Window(0, 0, 1, 1)], 1.0)
    assert same is not None and (decode(same.data) == pixels(1, 1, 1)).all()


def test_what_is_no_picture_of_brightness_is_set_aside_with_its_reason(tmp_path, sensors):
    grey = pixels(1, 60, 60)[:, :, 0]
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.tif")
    Image.fromarray(grey > 99).save(tmp_path / "bit.tif")
    pages = [Image.fromarray(pixels(i, 60, 60)) for i in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name, reason in {
        "palette": "colours by number, of a palette",
        "bit": "one bit a pixel: no imagery",
        "pages": "3 images in one file",
    }.items():
        with pytest.raises(BadInput, match=reason):
            look(tmp_path / f"{name}.tif", settings(), sensors)


def test_bands_of_different_depth_are_one_line(tmp_path, sensors):
    """TIFF can say it, GDAL cannot read it."""
    path = geotiff(tmp_path / "a.tif", 1, 0, 0, side=20)
    data = path.read_bytes()
    assert data.count(b"\x08\0\x08\0\x08\0") == 1
    path.write_bytes(data.replace(b"\x08\0\x08\0\x08\0", b"\x08\0\x10\0\x08\0"))
    with pytest.raises(BadInput) as error:
        look(path, settings(), sensors)
    assert "\n" not in str(error.value)


def test_pieces_too_large_to_decode_are_refused_with_what_to_do(monkeypatch, tmp_path, sensors):
    monkeypatch.setattr(scenes, "MAX_BLOCK_BYTES", 60_000)
    values = pixels(1, 200, 300)
    half = scene(tmp_path / "half.tif", values, tiled=False, blockysize=150)
    with pytest.raises(BadInput, match=r"pieces of 0 MB: rewrite it, gdal_translate"):
        look(half, settings(), sensors)


@pytest.mark.parametrize("side", [20_000, 1_000_000, 2**31 - 1])
def test_a_tiny_file_that_declares_a_huge_scene_is_a_bomb(side, tmp_path, sensors):
    path = tmp_path / "a.tif"
    Image.fromarray(pixels(1, 50, 50)).save(path)
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[4:8], "little")
    for i in range(int.from_bytes(data[start : start + 2], "little")):
        entry = start + 2 + 12 * i
        if int.from_bytes(data[entry : entry + 2], "little") in (256, 257):
            data[entry + 2 : entry + 4] = (4).to_bytes(2, "little")
            data[entry + 8 : entry + 12] = side.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BadInput) as error:
        look(path, settings(), sensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_large_picture_is_cut_in_groups_of_whole_rows(form, monkeypatch, tmp_path, sensors):
    monkeypatch.setattr(scenes, "STRIP_GROUP_BYTES", 300 * 3 * 130)
    path = tmp_path / f"a.{form}"
    Image.fromarray(pixels(1, 300, 400)).save(path, form)
    found = look(path, settings(), sensors)
    assert found.groups == [(0, 10), (10, 20), (20, 30), (30, 35)]
    whole = decode(path.read_bytes())
    for tile in tiles_of(path, found):
        assert tile is not None and tile.form == "tif"
        part = whole[tile.row : tile.row + 64, tile.col : tile.col + 64]
        assert np.abs(tile.pixels.astype(int) - part).max() <= (16 if form == "JPEG" else 0)


def test_real_odd_files_become_what_they_are(sensors):
    """rasterio's and rio-cogeo's fixtures, where this machine has them."""
    if not GEOTIFF.is_dir():
        pytest.skip("no real imagery beside the checkout")
    usual = settings(tile_size=256)
    gcps = GEOTIFF / "cog-fixtures" / "cog_gcps.tif"
    found = look(gcps, usual, sensors)
    assert found.sensor == "pan16" and found.size == (837, 1280)
    for tile in tiles_of(gcps, found):
        assert tile is not None and tile.crs == "EPSG:4326" and 150 < tile.gsd_m < 250
        with opened(tile) as one:
            assert not one.transform.is_identity
    dateline = GEOTIFF / "cog-fixtures" / "cog_dateline.tif"
    tiles = tiles_of(dateline, look(dateline, usual, sensors))
    assert {t.crs for t in tiles if t} == {"EPSG:32660"}
    goes = GEOTIFF / "rasterio-fixtures" / "goes.tif"
    for tile in tiles_of(goes, look(goes, usual, sensors)):
        assert tile is not None and all(map(math.isfinite, tile.bounds))
    nodata = GEOTIFF / "rasterio-fixtures" / "RGB.byte.tif"
    shares = [
        t and t.valid is not None for t in tiles_of(nodata, look(nodata, usual, sensors), 0.5)
    ]
    assert shares.count(None) == 2 and True in shares


# Memory


MEASURE = """
import resource, sys
from pathlib import Path
from ringmo.config import Config
from ringmo.data import scenes
from ringmo.workspace import template

config = Config.load(template("params.yaml"))
small, large = Path(sys.argv[1]), Path(sys.argv[2])

def peak(path):
    found = scenes.look(path, config.ingest, config.sensors)
    tiles = 0
    for first, last in found.groups:
        for tile in scenes.cut(path, found.windows[first:last], 1.0):
            tiles += tile is not None
    assert tiles == len(found.windows)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak(small)
print(peak(large) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "side", "limit"),
    [
        ({"tiled": True, "blockxsize": 512, "blockysize": 512}, 12_000, 250),
        ({"tiled": False, "blockysize": 1}, 20_000, 600),
    ],
    ids=["tiled", "strips"],
)
@pytest.mark.long
def test_a_scene_is_never_held(profile, side, limit, tmp_path):
    """Scenes of 430 MB and 1.2 GB; megabytes beyond what a scene of 3 MB takes."""
    small = write_bands(tmp_path / "small.tif", pixels(1, 1000, 1000))
    path = tmp_path / "large.tif"
    rows = np.tile(pixels(2, 1000, 1000), (1, side // 1000, 1)).transpose(2, 0, 1)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8",
        interleave="pixel", compress="deflate", zlevel=1, **profile,
    ) as target:  # fmt: skip
        for row in range(0, side, 1000):
            target.write(rows, window=((row, row + 1000), (0, side)))
    command = [sys.executable, "-c", MEASURE, str(small), str(path)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < limit
