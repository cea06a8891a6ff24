"""Heights: found beside their images, cut with them, stored without loss, judged."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_imagery import geotiff, sensed, tree, write, write_bands

from ringmo.config import About, Config
from ringmo.data import heights, store
from ringmo.data.layouts import Labels, Window
from ringmo.data.scenes import Window as SceneWindow
from ringmo.data.sources import Image, Listing, list_images
from ringmo.data.validation import validate
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import run_stage


def ramp(number: int = 0, height: int = 48, width: int = 48) -> Any:
    rows, cols = np.mgrid[:height, :width]
    return (number + rows * 0.5 + cols * 0.25).astype(np.float32)


def scene(folder: Path, number: int = 0, values: Any = None, name: str = "dsm", **more: Any) -> Any:
    """An image and its heights, both with coordinates; returns the heights."""
    left = 2000.0 * number
    geotiff(folder / "images" / f"{number}.tif", number, left, 5e6)
    values = ramp(number) if values is None else values
    profile = {"left": left, "gsd": 1.0} | more
    write_bands(folder / name / f"{number}.tif", values[..., None], **profile)
    return values


def listed(folder: Path, labels: str = "auto", **about: Any) -> Listing:
    return list_images("in", folder, labels, about=About(**about))


def of(row: Any, workspace: Any) -> Any:
    place = row["height_shard"], int(row["height_offset"]), int(row["height_size"])
    return heights.decoded(store.TileStore(workspace.store).read(*place))


def cut(image: Image, window: Window, size: tuple[int, int] = (48, 48)) -> Any:
    from ringmo.data.scenes import georeference

    transform, crs = georeference(image.file)
    with Labels(image, size, {}, crs, transform) as labels:
        return labels.of(window)


WHOLE = SceneWindow(0, 0, 48, 48)


@pytest.mark.parametrize(
    ("images", "of_heights"),
    [
        (["images/0.tif"], "dsm/0.tif"),
        (["images/0.tif"], "DEM/0.tif"),
        (["train/rgb/0.tif", "train/img/0.tif"], "train/nDSM/0.tif"),
        (["S2L2A/0.tif", "S1RTC/0.tif"], "DEM/0.tif"),
        (["JAX_004_RGB.tif"], "JAX_004_AGL.tif"),
        (["top/area1.tif"], "1_DSM_normalisation/area1.tif"),
    ],
)
def test_published_folders_of_heights_are_found(tmp_path, images, of_heights):
    for number, image in enumerate(images):
        geotiff(tmp_path / image, number, 0, 5e6)
    write_bands(tmp_path / of_heights, ramp()[..., None])
    listing = listed(tmp_path)
    assert sorted(i.path for i in listing.images) == sorted(images)
    for image in listing.images:
        assert [(a.part, a.path) for a in image.attachments] == [("height", of_heights)]
        assert image.label is None
        assert image.attachments[0].shared == (len(images) > 1)
    # Without labels they are no imagery either.
    bare = listed(tmp_path, "none")
    assert sorted(i.path for i in bare.images) == sorted(images)
    assert not any(image.attachments for image in bare.images)


def test_what_only_has_the_name_of_heights_is_imagery(tmp_path):
    for name in ("beach", "depth", "height"):
        write(tmp_path / name / "0.png", ord(name[0]), "PNG")  # pictures, of classes so called
    assert len(listed(tmp_path, layout="classes").images) == 3
    assert len(listed(tmp_path).images) == 3
    with pytest.raises(BadInput, match="no image has heights"):
        listed(tmp_path, layout="height")
    write_bands(tmp_path / "elev" / "0.tif", ramp()[..., None])
    (image,) = [
        i for i in listed(tmp_path, height_files=["elev/*"]).images if i.path == "beach/0.png"
    ]
    assert [a.path for a in image.attachments] == ["elev/0.tif"]


def test_heights_come_back_exactly_and_say_where_they_lie(run, workspace, manifest, tmp_path):
    import rasterio

    values = [ramp(i) for i in range(3)]
    values[1][:10] = -32768
    values[2] = np.round(values[2]).astype(np.int16)
    scene(tmp_path / "in", 0, values[0])
    scene(tmp_path / "in", 1, values[1], nodata=-32768)
    scene(tmp_path / "in", 2, values[2])
    report = run(tmp_path / "in")
    assert report.figures["heights"] == report.figures["tiles"] == 3
    rows = manifest().set_index("source")
    for i, expected in enumerate(values):
        row = rows.loc[f"images/{i}.tif"]
        expected = expected.astype(np.float32)
        expected[expected == -32768] = np.nan
        found = of(row, workspace)
        assert found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True)
        assert (row["height_width"], row["height_height"]) == (48, 48)
        known = expected[~np.isnan(expected)].astype(float)
        assert row["height_known"] == known.size / expected.size
        assert row["height_min"] == known.min() and row["height_max"] == known.max()
        assert row["height_mean"] == pytest.approx(known.mean(), rel=1e-12)
        assert row["height_std"] == pytest.approx(known.std(), rel=1e-12)
    assert rows.loc["images/1.tif"]["height_known"] == 38 / 48
    # Any reader of tar and TIFF finds them, placed.
    with tarfile.open(workspace.store / "tiles-000000.tar") as shard:
        name = next(n for n in shard.getnames() if n.endswith(".height.tif"))
        data = shard.extractfile(name).read()
    with rasterio.open(io.BytesIO(data)) as raster:
        assert raster.crs.to_epsg() == 32631 and np.isnan(raster.nodata)
        key = name.split(".")[0]
        assert raster.bounds.left == rows.reset_index().set_index("key").loc[key]["minx"]


def test_scale_and_offset_of_the_file_give_metres(tmp_path):
    import rasterio

    scene(tmp_path, 0, np.full((48, 48), 120, np.int16))
    with rasterio.open(tmp_path / "dsm" / "0.tif", "r+") as raster:
        raster.scales, raster.offsets = (0.1,), (100.0,)
    (image,) = listed(tmp_path).images
    (member,) = cut(image, WHOLE)
    assert member.facts["height_min"] == member.facts["height_max"] == pytest.approx(112.0)


def test_scenes_are_cut_with_their_heights_and_resampled_around_gaps(tmp_path):
    values = ramp()
    values[:, 20:24] = np.nan
    scene(tmp_path, 0, values)
    (image,) = listed(tmp_path).images
    (part,) = cut(image, SceneWindow(8, 16, 16, 24))
    assert np.array_equal(heights.decoded(part.data), values[8:24, 16:40], equal_nan=True)
    (half,) = cut(image, SceneWindow(0, 0, 24, 24, 2.0))
    found = heights.decoded(half.data)
    expected = values.reshape(24, 2, 24, 2).mean(axis=(1, 3))  # NaN in both columns of a gap
    assert np.isnan(found[:, 10:12]).all() and not np.isnan(found[:, :10]).any()
    assert np.allclose(found, expected, equal_nan=True)
    (double,) = cut(image, SceneWindow(0, 0, 96, 96, 0.5))
    found = heights.decoded(double.data)
    # Bilinear on a plane is the plane; nothing of a gap's neighbours leaks beyond it.
    at = (np.arange(2, 30) + 0.5) / 2 - 0.5
    assert np.allclose(found[2:30, 2:30], at[:, None] * 0.5 + at[None] * 0.25, atol=1e-5)
    assert np.isnan(found[:, 41:47]).all()


def test_a_corrected_height_is_written_anew_and_moves_nothing_else(
    run, workspace, manifest, tmp_path
):
    for i in range(4):
        scene(tmp_path / "in", i)
    run(tmp_path / "in")
    before, shard = manifest(), tree(workspace.store)["tiles-000000.tar"]
    assert run(tmp_path / "in").figures["unchanged"]
    scene(tmp_path / "in", 2, ramp(2) + 7)
    report = run(tmp_path / "in")
    assert report.figures["new_tiles"] == 0 and report.figures["new_shards"] == 1
    after = manifest()
    same = [name for name in after.columns if not name.startswith("height_")]
    assert after[same].equals(before[same])
    changed = after["source"][after["height_hash"] != before["height_hash"]]
    assert list(changed) == ["images/2.tif"]
    assert tree(workspace.store)["tiles-000000.tar"] == shard
    (tmp_path / "in" / "dsm" / "2.tif").unlink()
    run(tmp_path / "in")
    gone = manifest().set_index("source").loc["images/2.tif"]
    assert gone["height_size"] == 0 and np.isnan(gone["height_mean"])
    from ringmo.data.compact import compact

    compact(workspace)
    rows = manifest().set_index("source")
    assert np.array_equal(of(rows.loc["images/3.tif"], workspace), ramp(3))


def test_heights_that_do_not_fit_set_their_image_aside(run, workspace, tmp_path):
    import pyarrow.parquet as pq

    for i in range(9):
        scene(tmp_path / "in", i)
    scene(tmp_path / "in", 0, ramp(0, 20, 48))
    scene(tmp_path / "in", 1, left=2010.0)
    (tmp_path / "in" / "dsm" / "2.tif").write_bytes(b"II*\0 no more")
    write_bands(tmp_path / "in" / "dsm" / "3.tif", sensed("rgb", 3), left=6000.0, gsd=1.0)
    scene(tmp_path / "in", 4, np.full((48, 48), np.nan, np.float32))
    report = run(tmp_path / "in", ingest__max_bad_share=0.5)
    rows = pq.read_table(workspace.store / store.QUARANTINE).to_pylist()
    reasons = {row["source"]: row["reason"] for row in rows}
    assert reasons["images/0.tif"] == "its heights have 48x20 pixels, the image 48x48"
    assert reasons["images/1.tif"] == "its heights lie elsewhere, 10 pixels away"
    assert reasons["images/2.tif"].startswith("damaged heights: ")
    assert reasons["images/3.tif"] == "its heights have 3 bands of uint8: one of metres"
    # Nowhere known is as if there were none.
    assert len(reasons) == 4 and report.figures["tiles"] == 5
    assert report.figures["heights"] == 4


def test_a_store_of_the_third_schema_gains_heights_and_keeps_its_splits(
    run, workspace, manifest, tmp_path
):
    import pyarrow.parquet as pq

    for i in range(6):
        scene(tmp_path / "in", i)
    run(tmp_path / "in")
    whole = manifest()
    path = workspace.store / store.MANIFEST
    table = pq.read_table(path).drop_columns(list(store.ADDED[4]))
    metadata = {**table.schema.metadata, store.SCHEMA_KEY: b"3"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    old = manifest()
    assert (old["height_size"] == 0).all() and old["height_mean"].isna().all()
    (workspace.state / "scan.parquet").unlink()
    report = run(tmp_path / "in")
    assert report.figures["new_tiles"] == 0 and report.figures["heights"] == 6
    after = manifest()
    same = [n for n in after.columns if n not in ("height_shard", "height_offset")]
    assert after[same].equals(whole[same])


@pytest.mark.slow
def test_heights_are_judged_and_shown(run, workspace, manifest, tmp_path):
    from ringmo.data import page

    for i in range(12):
        scene(tmp_path / "in", i)
    run(tmp_path / "in")
    config = Config.load(workspace.params_file)
    judged = run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
    assert judged.figures["broken"] == 0
    page.write(config, workspace, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<h2>Heights</h2><p>0 to 46.25 m; 0.0% of the pixels unknown" in text
    assert text.count("0.tif: 0 to 35.25 m") == 1

    def broken(column: str, value: float) -> str:
        tiles = manifest()
        tiles.loc[3, column] = value
        path = workspace.store / store.MANIFEST
        numbers = store.read_facts(path)
        numbers.pop("schema")
        kept = path.read_bytes()
        store.write_table(path, tiles, store.COLUMNS, numbers)
        with pytest.raises(AnswerIsNo) as error:
            run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
        path.write_bytes(kept)
        return str(error.value)

    assert "(heights_fit)" in broken("height_width", 47)
    assert "(heights_measured)" in broken("height_known", 0)
    assert "(heights_measured)" in broken("height_mean", 99)
    assert "(labels_in_shard)" in broken("height_offset", 10**9)
    assert "(height_range)" in broken("height_min", -9999)


def test_real_places_have_one_terrain_for_all_their_sensors(terramesh, run, workspace, manifest):
    import rasterio

    report = run(terramesh, ingest__exclude=["LULC/*"])
    rows = manifest()
    assert report.figures["tiles"] == report.figures["heights"] == 12
    assert sorted(rows["sensor"].unique()) == ["rgb", "s1", "s2l1c", "s2l2a"]
    for _, row in rows.iterrows():
        with rasterio.open(terramesh / "DEM" / Path(row["source"]).name) as raster:
            assert np.array_equal(of(row, workspace), raster.read(1).astype(np.float32))
    assert rows.groupby("place")["height_hash"].nunique().eq(1).all()
