"""Imagery of more than 8 bits and three bands: nothing lost coming in, nothing poisonous out."""

from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.io import MemoryFile
from small_imagery import SENSORS, class_folders, encoded, pixels, sensed, tree, write_bands

from ringmo.config import Config, Sensor
from ringmo.data import store
from ringmo.data.decode import decode
from ringmo.data.measures import eight_bit, measure
from ringmo.data.scenes import sensor_of
from ringmo.data.store import TileStore
from ringmo.errors import BadInput
from ringmo.workspace import template


@pytest.fixture(scope="module")
def sensors() -> dict[str, Sensor]:
    return Config.load(template("params.yaml")).sensors


def reasons(workspace: Any) -> dict[str, str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(workspace.store / store.QUARANTINE).to_pylist()
    return {row["source"]: row["reason"] for row in rows}


def stored(workspace: Any, row: Any) -> bytes:
    return TileStore(workspace.store).read(row.shard, row.offset, row.size)


@pytest.mark.parametrize("sensor", SENSORS)
def test_a_file_that_fits_one_tile_stays_as_it_came(sensor, run, workspace, manifest, tmp_path):
    values = sensed(sensor, 1)
    path = write_bands(tmp_path / "in" / "a.tif", values)
    run(path.parent)
    (tile,) = manifest().itertuples()
    dtype = "float32" if sensor == "s1" else SENSORS[sensor][1]
    assert (tile.sensor, tile.bands, tile.dtype) == (sensor, SENSORS[sensor][0], dtype)
    assert stored(workspace, tile) == path.read_bytes()
    found = decode(stored(workspace, tile))
    assert found.dtype == dtype
    assert (found == values.astype(dtype)).all()
    table = workspace.store / store.MANIFEST
    before, time = tree(workspace.store), table.stat().st_mtime_ns
    assert run(path.parent).figures["unchanged"]
    assert tree(workspace.store) == before
    assert table.stat().st_mtime_ns == time


@pytest.mark.parametrize("sensor", SENSORS)
def test_a_large_scene_is_cut_without_loss(sensor, run, workspace, manifest, tmp_path):
    values = sensed(sensor, 1, 150, 140)
    write_bands(tmp_path / "in" / "scene.tif", values)
    run(tmp_path / "in", ingest__tile_size=64)
    tiles = manifest()
    assert len(tiles) == 9
    for tile in tiles.itertuples():
        part = values[tile.row : tile.row + 64, tile.col : tile.col + 64]
        with MemoryFile(stored(workspace, tile)) as memory, memory.open() as one:
            assert one.dtypes[0] == values.dtype
            assert (one.read().transpose(1, 2, 0) == part).all()
            assert one.profile["compress"] == "deflate"
            assert one.bounds == (tile.minx, tile.miny, tile.maxx, tile.maxy)
        assert decode(stored(workspace, tile)).dtype == tile.dtype


def holed(sensor: str, value: float, width: int = 40, size: int = 48) -> Any:
    """Bands whose first columns have no data."""
    values = sensed(sensor, 7, size, size)
    values[:, : size - width] = value
    return values


@pytest.mark.parametrize(
    ("sensor", "value"), [("s2l2a", -9999), ("s2l2a", 0), ("s1", -9999), ("s1", np.nan)]
)
def test_nodata_counts_and_decodes_to_the_mean_of_its_band(
    sensor, value, run, workspace, manifest, tmp_path
):
    values = holed(sensor, value)
    write_bands(tmp_path / "in" / "a.tif", values, nodata=value)
    run(tmp_path / "in")
    (tile,) = manifest().itertuples()
    assert tile.nodata_share == pytest.approx(8 / 48, abs=1e-5)
    found = decode(stored(workspace, tile))
    assert np.isfinite(found).all()
    assert (found[:, 8:] == values[:, 8:].astype(found.dtype)).all()
    means = values[:, 8:].mean(axis=(0, 1))
    assert np.abs(found[:, :8] - means).max() <= (0.5 if sensor == "s2l2a" else 1e-4)


def test_nan_needs_no_nodata_value_and_one_bad_band_is_a_bad_pixel(
    run, workspace, manifest, tmp_path
):
    values = sensed("s1", 7)
    values[:12, :, 1] = np.nan
    values[12, 0, 0] = np.inf
    values[12, 1, 0] = 1e300  # which no float32 holds
    write_bands(tmp_path / "in" / "a.tif", values)
    run(tmp_path / "in")
    (tile,) = manifest().itertuples()
    assert tile.nodata_share == pytest.approx((12 * 48 + 2) / 48**2, abs=1e-5)
    found = decode(stored(workspace, tile))
    assert np.isfinite(found).all()
    # The other band of such a pixel is what was measured.
    assert (found[:12, :, 0] == values[:12, :, 0].astype(np.float32)).all()


def test_zero_in_one_band_is_a_measurement_and_no_missing_pixel(run, workspace, manifest, tmp_path):
    values = sensed("s2l1c", 7)
    values[:24, :, 10] = 0  # cirrus over a clear sky
    write_bands(tmp_path / "in" / "a.tif", values, nodata=0)
    run(tmp_path / "in")
    (tile,) = manifest().itertuples()
    assert tile.nodata_share == 0


@pytest.mark.parametrize("sensor", ["s2l2a", "s1"])
def test_windows_without_data_are_left_out_and_gaps_outlive_the_cut(
    sensor, run, workspace, manifest, tmp_path
):
    """A mask of its own, no nodata value: the tile says it too, and its values are the scene's."""
    values = sensed(sensor, 3, 192, 192)
    valid = np.full((192, 192), 255, np.uint8)
    valid[:, :70] = 0
    path = tmp_path / "in" / "scene.tif"
    write_bands(path, values)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), rasterio.open(path, "r+") as scene:
        scene.write_mask(valid)
    report = run(path.parent, ingest__tile_size=64)
    assert report.figures["windows_skipped"] == 3
    tiles = manifest()
    assert set(tiles["col"]) == {64, 128}
    for tile in tiles.itertuples():
        hole = 6 if tile.col == 64 else 0
        assert tile.nodata_share == pytest.approx(hole / 64, abs=1e-5)
        part = values[tile.row : tile.row + 64, tile.col : tile.col + 64]
        with MemoryFile(stored(workspace, tile)) as memory, memory.open() as one:
            assert (one.read().transpose(1, 2, 0) == part).all()
            assert (one.dataset_mask()[:, :hole] == 0).all()
        found = decode(stored(workspace, tile))
        assert (found[:, hole:] == part[:, hole:].astype(found.dtype)).all()
        if hole:
            assert np.ptp(found[:, :hole], axis=(0, 1)).max() == 0


def test_nothing_but_nodata_is_set_aside(run, workspace, tmp_path):
    class_folders(tmp_path / "in", classes=1)
    write_bands(tmp_path / "in" / "empty.tif", np.full((48, 48, 2), np.nan, np.float32))
    large = np.full((200, 200, 12), -1, np.int16)
    write_bands(tmp_path / "in" / "large.tif", large, nodata=-1)
    run(tmp_path / "in", ingest__tile_size=64, ingest__max_bad_share=0.5)
    assert reasons(workspace)["empty.tif"] == "no data in it"
    assert reasons(workspace)["large.tif"] == "no window of it has enough data"


def test_a_nodata_value_that_its_pixels_cannot_have_is_no_obstacle(run, manifest, tmp_path):
    """GDAL's own tools leave such scenes behind when they change the dtype."""
    values = sensed("rgb", 3, 150, 140)
    path = write_bands(tmp_path / "in" / "scene.tif", values, nodata=199)
    data = path.read_bytes()
    assert data.count(b"199\0") == 1
    path.write_bytes(data.replace(b"199\0", b"-99\0"))
    run(path.parent, ingest__tile_size=64)
    assert len(manifest()) == 9


@pytest.mark.parametrize(
    ("bands", "dtype", "said"),
    [
        (11, "int16", "11 bands of int16 fit no sensor (nearest: s2l2a, 12 bands of int16)"),
        (1, "float64", "1 band of float64 fits no sensor (nearest: s1, 2 bands of float32)"),
        (3, "uint16", "3 bands of uint16 fit no sensor (nearest: landsat, 7 bands of uint16)"),
        (2, "complex64", "2 bands of complex64 fit no sensor (nearest: s1, 2 bands of float32)"),
    ],
)
def test_what_fits_no_sensor_is_told_the_nearest(bands, dtype, said, run, workspace, tmp_path):
    class_folders(tmp_path / "in")
    write_bands(tmp_path / "in" / "odd.tif", np.ones((48, 48, bands), dtype))
    run(tmp_path / "in", ingest__max_bad_share=0.5)
    assert reasons(workspace)["odd.tif"] == said


def declared(**sensors: tuple[str, str]) -> dict[str, Sensor]:
    """Sensors by name: dtype and bands."""
    return {
        name: Sensor.model_validate(
            {"bands": bands.split(), "dtype": dtype, "clip": [0, 9], "mean": None, "std": None}
        )
        for name, (dtype, bands) in sensors.items()
    }


def test_two_sensors_of_the_same_kind_are_told_apart():
    two = declared(planet=("uint16", "blue green red nir"), naip=("uint16", "red green blue nir"))
    assert sensor_of(4, "uint16", two, chosen="naip") == "naip"
    assert sensor_of(4, "uint16", two, names=("Blue", "GREEN", "red", "nir")) == "planet"
    for names in ((), ("a", "b", "c", "d"), (None,) * 4, ("nir", "red", "green", "blue")):
        with pytest.raises(BadInput, match=r"planet and naip: .*ingest\.about: {SOURCE: {sensor:"):
            sensor_of(4, "uint16", two, names=names)
    # What is said of a source comes before what its files say, and must be possible.
    assert sensor_of(4, "uint16", two, "naip", ("blue", "green", "red", "nir")) == "naip"
    with pytest.raises(BadInput, match="3 bands of uint16: not of sensor naip") as refused:
        sensor_of(3, "uint16", two, chosen="naip")
    assert "4 bands of uint16" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="not of sensor naip"):
        sensor_of(4, "uint8", two, chosen="naip")


def test_uint16_is_of_a_sensor_of_int16_where_none_is_of_uint16():
    one = declared(s2=("int16", "B2 B3 B4"))
    assert sensor_of(3, "uint16", one) == sensor_of(3, "int16", one) == "s2"
    assert sensor_of(3, "uint16", one, chosen="s2") == "s2"
    both = one | declared(planet=("uint16", "blue green red"))
    assert sensor_of(3, "uint16", both, names=("B2", "B3", "B4")) == "planet"
    for dtype in ("int8", "int32", "uint32", "float32", "complex64"):
        with pytest.raises(BadInput, match=f"3 bands of {dtype} fit no sensor \\(nearest: s2"):
            sensor_of(3, dtype, one)


def test_complex_of_any_size_is_of_a_complex_sensor():
    sar = declared(sar=("complex64", "HH"), dem=("float32", "height"))
    for dtype in ("complex64", "complex128", "complex_int16"):
        assert sensor_of(1, dtype, sar) == "sar"
    assert sensor_of(1, "float64", sar) == "dem"


def test_grey_images_fit_a_sensor_of_one_band_where_there_is_one(
    run, workspace, manifest, tmp_path
):
    from ringmo import config as params

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "grey.png").write_bytes(encoded(pixels(1)[:, :, 0]))
    (folder / "grey.jpg").write_bytes(encoded(pixels(2)[:, :, 0], "JPEG"))
    (folder / "deep.png").write_bytes(encoded(pixels(3)[:, :, 0].astype(np.uint16) * 200))
    for i in range(9):
        (folder / f"{i}.png").write_bytes(encoded(pixels(10 + i)))
    assert run(folder, ingest__max_bad_share=0.5).figures["set_aside"] == 3
    assert "1 band of uint8 fits no sensor (nearest: rgb" in reasons(workspace)["grey.png"]
    one = {"bands": ["pan"], "mean": [120], "std": [60]}
    changes = {"sensors.pan": one | {"dtype": "uint8"}, "sensors.deep": one | {"dtype": "uint16"}}
    params.edit(workspace.params_file, changes)
    assert run(folder).figures["set_aside"] == 0
    tiles = manifest().set_index("source")
    assert tiles["sensor"]["grey.png"] == tiles["sensor"]["grey.jpg"] == "pan"
    assert tiles["sensor"]["deep.png"] == "deep"
    assert tiles["mean"]["grey.png"] == round(float(pixels(1)[:, :, 0].mean()), 4)


def png16(values: Any) -> bytes:
    """A PNG of 16 bits a band."""
    height, width, bands = values.shape
    with MemoryFile() as memory:
        with memory.open(
            driver="PNG", width=width, height=height, count=bands, dtype="uint16"
        ) as target:
            target.write(values.transpose(2, 0, 1))
        return bytes(memory.read())


def test_png_of_16_bits_keeps_them():
    values = pixels(3).astype(np.uint16) * 257 - 5
    found = decode(png16(values))
    assert found.dtype == np.uint16
    assert (found == values).all()
    assert (decode(png16(values[:, :, :1])) == values[:, :, :1]).all()
    for share in (0.1, 0.5, 0.9):
        data = png16(values)
        with pytest.raises(BadInput, match="damaged PNG"):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_scene_of_bands_is_an_error(share, tmp_path):
    data = write_bands(tmp_path / "a.tif", sensed("s2l2a", 1)).read_bytes()
    with pytest.raises(BadInput, match="damaged"):
        decode(data[: int(share * len(data))])


def test_unread_dtype_is_named():
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=4, height=4, count=1, dtype="int32", photometric="minisblack"
        ) as target:
            target.write(np.ones((1, 4, 4), np.int32))
        with pytest.raises(BadInput, match="bands of int32"):
            decode(bytes(memory.read()))


def test_three_deviations_span_8_bits(sensors):
    s1 = sensors["s1"]
    mean, std = np.array(s1.mean, np.float32), np.array(s1.std, np.float32)
    levels = np.stack([mean - 4 * std, mean - 3 * std, mean, mean + 3 * std])[None]
    assert (eight_bit(levels, s1)[0, :, 0] == [0, 0, 128, 255]).all()


def test_measures_of_bands_are_of_what_is_within_them(sensors):
    flat = np.broadcast_to(np.linspace(500, 4000, 12).astype(np.int16), (20, 20, 12)).copy()
    still = measure(flat, None, sensors["s2l2a"])
    assert (still.std, still.sharpness, still.saturated_share) == (0, 0, 0)
    values = sensed("s2l2a", 4)
    whole = measure(values, None, sensors["s2l2a"])
    expected = [values[..., b].std() * 255 / 6 / sensors["s2l2a"].std[b] for b in range(12)]
    assert whole.std == pytest.approx(np.sqrt(np.mean(np.square(expected))), rel=0.01)
    blown = measure(np.full_like(flat, 32_000), None, sensors["s2l2a"])
    assert blown.saturated_share == 1
    with pytest.raises(ValueError, match="need the sensor"):
        measure(flat)


def test_corrected_normalisation_measures_again_and_moves_nothing(
    run, workspace, manifest, tmp_path
):
    """A wrong mean would else leave every tile blank for ever."""
    for i in range(10):
        write_bands(tmp_path / "in" / f"{i}.tif", sensed("s1", 10 * i), 1000 * i)
    write_bands(tmp_path / "in" / "large.tif", sensed("s1", 7, 150, 140), 90_000)
    mean = Config.load(workspace.params_file).sensors["s1"].mean
    run(tmp_path / "in", ingest__tile_size=64, sensors__s1__mean=[900.0, 900.0])
    wrong = manifest().set_index("key")
    assert (wrong["std"] == 0).all()
    shards = [path for path in tree(workspace.store) if path.endswith(".tar")]
    report = run(tmp_path / "in", sensors__s1__mean=mean)
    right = manifest().set_index("key")
    assert (right["std"] > 2).all()
    assert report.figures["new_tiles"] == report.figures["new_shards"] == 0
    same = [name for name in right.columns if name not in ("mean", "std", "entropy", "sharpness")]
    same.remove("saturated_share")
    assert right[same].equals(wrong[same])
    assert [path for path in tree(workspace.store) if path.endswith(".tar")] == shards
    assert run(tmp_path / "in").figures["unchanged"]


def test_a_sensor_of_another_name_is_the_tiles_new_sensor(run, workspace, manifest, tmp_path):
    from ringmo import config as params

    write_bands(tmp_path / "in" / "a.tif", sensed("s1", 1))
    run(tmp_path / "in")
    sensor = Config.load(workspace.params_file).sensors["s1"].model_dump()
    text = workspace.params_file.read_text().replace("  s1: ", "  radar: ")
    workspace.params_file.write_text(text)
    assert Config.load(workspace.params_file).sensors["radar"].model_dump() == sensor
    assert run(tmp_path / "in").figures["new_tiles"] == 0
    assert list(manifest()["sensor"]) == ["radar"]
    params.edit(workspace.params_file, {"sensors.s1": sensor})
    with pytest.raises(BadInput, match="2 bands of float64 fit sensors radar and s1"):
        run(tmp_path / "in")


def test_folders_of_sensors_are_no_classes_but_classes_of_many_sensors_are(run, manifest, tmp_path):
    for i in range(4):
        for sensor in ("rgb", "s1"):
            values = sensed(sensor, 10 * i + len(sensor))
            write_bands(tmp_path / "apart" / sensor.upper() / f"{i}.tif", values, 1000 * i)
            place = tmp_path / "together" / ("town" if i % 2 else "wood") / f"{sensor}{i}.tif"
            write_bands(place, values, 1000 * i, nodata=250)
    report = run(tmp_path / "apart")
    assert manifest()["label"].isna().all()
    assert report.figures["classes"] == 0
    assert any("no labels from RGB, S1" in note for note in report.notes)
    assert run(tmp_path / "apart").figures["unchanged"]
    report = run(tmp_path / "together")
    assert set(manifest()["label"]) == {"town", "wood"}
    assert not report.notes


def test_real_places_seen_by_four_sensors(run, workspace, manifest, terramesh, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = {"S2RGB": "rgb", "S2L2A": "s2l2a", "S2L1C": "s2l1c", "S1RTC": "s1"}
    for name in [*names, "DEM"]:
        (folder / name).mkdir()
        for file in sorted((terramesh / name).iterdir()):
            (folder / name / file.name).write_bytes(file.read_bytes())
    report = run(folder)
    tiles = manifest()
    assert report.figures["tiles"] == report.figures["heights"] == 12
    assert reasons(workspace) == {}
    assert report.figures["places"] == 3
    assert (tiles.groupby("place")["split"].nunique() == 1).all()
    assert tiles["label"].isna().all()
    sensors = Config.load(workspace.params_file).sensors
    for tile in tiles.itertuples():
        assert tile.sensor == names[tile.source.split("/")[0]]
        assert stored(workspace, tile) == (folder / tile.source).read_bytes()
        found = decode(stored(workspace, tile))
        assert str(found.dtype) == tile.dtype == sensors[tile.sensor].dtype
        with rasterio.open(folder / tile.source) as scene:
            whole = scene.read().transpose(1, 2, 0)
        assert (found == whole.astype(found.dtype)).all()
        assert tile.std > 2
        assert tile.gsd_m == pytest.approx(10)
        # What normalisation makes of real scenes is of the order of one.
        z = (found - np.array(sensors[tile.sensor].mean)) / np.array(sensors[tile.sensor].std)
        assert np.abs(z.mean(axis=(0, 1))).max() < 3
        assert z.std() < 2
    assert run(folder).figures["unchanged"]


def test_real_scene_of_floats_with_gaps_is_cut(run, manifest, terramesh, tmp_path):
    """Sen1Floods11: 512 x 512 in degrees, dB float32 with NaN as nodata, and 13 bands of int16."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("S1Hand", "S2Hand"):
        file = terramesh.parent / "sen1floods11" / f"Spain_7370579_{name}.tif"
        (folder / file.name).write_bytes(file.read_bytes())
    run(folder, ingest__tile_size=128)
    tiles = manifest()
    assert tiles["sensor"].value_counts().to_dict() == {"s1": 16, "s2l1c": 16}
    assert tiles["place"].nunique() == 1
    assert (tiles["std"] > 2).all()


def test_ready_made_sensors_take_real_files(run, workspace, manifest, terramesh, tmp_path):
    """A real scene in red, green, blue and near infrared, and a Landsat 8 crop, its three bands
    repeated to the seven of a Level-2 scene."""
    folder, real = tmp_path / "in", terramesh.parent / "landsat"
    folder.mkdir()
    (folder / "rgbn.tif").write_bytes((real / "rgbn.tif").read_bytes())
    with rasterio.open(real / "LC08_224078_20200518_B234_crop512.tif") as scene:
        values = scene.read().transpose(1, 2, 0)[..., [0, 0, 1, 2, 2, 1, 0]]
    write_bands(folder / "landsat.tif", values, gsd=30.0)
    run(folder, ingest__tile_size=128)
    tiles = manifest()
    assert tiles["sensor"].value_counts().to_dict() == {"rgbnir": 20, "landsat": 16}
    whole = values.reshape(-1, 7) * 2.75e-5 - 0.2
    landsat = tiles[tiles["sensor"] == "landsat"]
    assert np.allclose(np.stack(landsat["band_means"]).mean(0), whole.clip(0, 1).mean(0), rtol=1e-4)
    assert (tiles["std"][tiles["sensor"] == "rgbnir"] > 10).all()


def test_real_complex_radar_is_stored_as_it_came_and_measured_in_decibels(
    run, workspace, manifest, terramesh, tmp_path
):
    from ringmo import config as params

    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("hh", "vv"):
        path = terramesh.parent / "spacenet6" / f"sar_{name}.tif"
        (folder / path.name).write_bytes(path.read_bytes())
    sar = {"bands": ["amplitude"], "dtype": "complex64", "decibels": True, "clip": [30, 95]}
    params.edit(workspace.params_file, {"sensors.sar": sar | {"mean": None, "std": None}})
    run(folder)
    for tile in manifest().itertuples():
        assert (tile.sensor, tile.dtype) == ("sar", "float32")
        assert stored(workspace, tile) == (folder / tile.source).read_bytes()
        with rasterio.open(folder / tile.source) as scene:
            power = np.abs(scene.read(1).astype(np.complex128)) ** 2
        assert np.allclose(decode(stored(workspace, tile))[..., 0], power, rtol=1e-5)
        decibels = (10 * np.log10(power)).clip(30, 95)
        assert tile.band_means == pytest.approx([decibels.mean()], rel=1e-5)
        assert tile.band_stds == pytest.approx([decibels.std()], rel=1e-4)
        assert tile.std == pytest.approx(decibels.std() * 255 / 65, rel=0.01)
        assert tile.saturated_share < 0.01
    keys = set(manifest()["key"])
    run(folder, ingest__tile_size=64)
    cuts = manifest()
    assert len(cuts) == 2 * 16 and keys.isdisjoint(cuts["key"])
    for tile in cuts.itertuples():
        with rasterio.open(folder / tile.source) as scene:
            part = scene.read(1)[tile.row : tile.row + 64, tile.col : tile.col + 64]
        with MemoryFile(stored(workspace, tile)) as memory, memory.open() as one:
            assert one.dtypes == ("complex64",)
            assert (one.read(1) == part).all()


def test_sentinel_2_of_uint16_and_of_int16_are_one_sensor_and_train_together(
    run, workspace, manifest, tmp_path
):
    """Whole and cut, stored as they came, read as int16; what does not fit is set aside."""
    from ringmo.data.loading import SelectedTiles

    folder = tmp_path / "in"
    for i in range(6):
        values = sensed("s2l2a", 10 * i)
        values[:6] = 0
        write_bands(folder / f"{i}.tif", values.astype(("int16", "uint16")[i % 2]), nodata=0)
    large = sensed("s2l2a", 7, 150, 140).astype(np.uint16)
    large[0, 0] = 40_000
    write_bands(folder / "large.tif", large, 90_000)
    write_bands(folder / "beyond.tif", sensed("s2l2a", 99).astype(np.uint16) * 9, 95_000)
    run(folder, ingest__tile_size=64, ingest__max_bad_share=0.5)
    assert list(reasons(workspace)) == ["beyond.tif"]
    assert "of its values of uint16 are over 32767" in reasons(workspace)["beyond.tif"]
    tiles = manifest().sort_values("key")
    assert len(tiles) == 15 and set(tiles["dtype"]) == {"int16"}
    with rasterio.open(folder / "1.tif") as scene:
        assert scene.dtypes[0] == "uint16"
    (one,) = [tile for tile in tiles.itertuples() if tile.source == "1.tif"]
    assert stored(workspace, one) == (folder / "1.tif").read_bytes()
    (corner,) = [t for t in tiles.itertuples() if (t.source, t.row, t.col) == ("large.tif", 0, 0)]
    assert decode(stored(workspace, corner)).dtype == np.uint16
    selection = tmp_path / "all.parquet"
    tiles[["key", "content_hash", "split", "label"]].to_parquet(selection)
    every = SelectedTiles(workspace, selection)
    (batch,) = every.batches(np.arange(15), 16, 64)
    assert str(batch.images.dtype) == "torch.int16"
    assert every.image(list(tiles["key"]).index(corner.key))[0, 0].tolist() == [32_767] * 12


def test_a_source_says_its_sensor_where_its_files_do_not(run, workspace, manifest, tmp_path):
    from ringmo import config as params

    sensor = {"dtype": "uint16", "clip": [0, 9000], "mean": None, "std": None}
    bands = {"planet": ["blue", "green", "red"], "worldview": ["red", "green", "blue"]}
    changes = {f"sensors.{name}": sensor | {"bands": own} for name, own in bands.items()}
    params.edit(workspace.params_file, changes)
    folder = tmp_path / "in"
    path = write_bands(folder / "named.tif", sensed("rgb", 1).astype(np.uint16) * 30)
    with rasterio.open(path, "r+") as scene:
        scene.descriptions = ("Red", "Green", "Blue")
    write_bands(folder / "silent.tif", sensed("rgb", 2).astype(np.uint16) * 30, 9000)
    run(folder, ingest__max_bad_share=0.5)
    assert dict(zip(manifest()["source"], manifest()["sensor"], strict=True)) == {
        "named.tif": "worldview"
    }
    assert "fit sensors planet and worldview: say which" in reasons(workspace)["silent.tif"]
    run(folder, ingest__about={str(folder): {"sensor": "planet"}})
    assert set(manifest()["sensor"]) == {"planet"} and len(manifest()) == 2
    run(folder, ingest__about={str(folder): {"sensor": "worldview"}})
    assert set(manifest()["sensor"]) == {"worldview"}


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_scenes_are_cut_without_loss_and_one_bad_band_is_a_bad_pixel(
    dtype, run, workspace, manifest, tmp_path
):
    from ringmo import config as params

    random = np.random.default_rng(1)
    values = random.normal(0, 50, (150, 140, 2, 2)) @ np.array([1, 1j])
    values[:16, :, 1] = np.nan
    write_bands(tmp_path / "in" / "a.tif", values.astype(dtype))
    sar = {"bands": ["HH", "HV"], "dtype": "complex64", "decibels": True, "clip": [0, 60]}
    params.edit(workspace.params_file, {"sensors.sar": sar | {"mean": None, "std": None}})
    run(tmp_path / "in", ingest__tile_size=64)
    tiles = manifest()
    assert len(tiles) == 9
    for tile in tiles.itertuples():
        part = values.astype(dtype)[tile.row : tile.row + 64, tile.col : tile.col + 64]
        with MemoryFile(stored(workspace, tile)) as memory, memory.open() as one:
            assert one.dtypes[0] == dtype
            assert np.array_equal(one.read().transpose(1, 2, 0), part, equal_nan=True)
        assert tile.nodata_share == (0.25 if tile.row == 0 else 0)
        assert np.isfinite(decode(stored(workspace, tile))).all()


def test_complex_int16_is_read_whole(run, workspace, manifest, tmp_path):
    from ringmo import config as params

    sar = {"bands": ["HH"], "dtype": "complex64", "decibels": True, "clip": [0, 60]}
    params.edit(workspace.params_file, {"sensors.sar": sar | {"mean": None, "std": None}})
    path = tmp_path / "in" / "a.tif"
    path.parent.mkdir()
    values = np.random.default_rng(1).normal(0, 50, (48, 48, 2)).round() @ np.array([1, 1j])
    with rasterio.open(
        path, "w", driver="GTiff", width=48, height=48, count=1, dtype="complex_int16"
    ) as target:
        target.write(values.astype(np.complex64), 1)
    run(path.parent)
    (tile,) = manifest().itertuples()
    assert stored(workspace, tile) == path.read_bytes()
    assert np.allclose(decode(stored(workspace, tile))[..., 0], np.abs(values) ** 2, rtol=1e-6)
