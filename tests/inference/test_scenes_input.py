"""What scenes may be: other bands, grids and scales, objects in buckets, and nothing of use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from pixelwise import bundle_of, pixels, whole, write_scene
from rasterio.transform import from_origin
from servers import S3
from small_models import SWIN, write_model

from ringmo import config
from ringmo.config import Sensor
from ringmo.errors import BadInput
from ringmo.inference import scenes
from ringmo.inference.predict import predict, text
from ringmo.inference.reading import Scene, band_order
from ringmo.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A real scene model of 32 pixels."""
    return str(write_model(tmp_path / "bundle", SWIN, classes=["airport", "forest"]))


def mask(bundle: Any, out: Path, scene: Path, **others: Path) -> NDArray[Any]:
    about = scenes.about(bundle, "segmentation/7")
    job = scenes.SceneJob(bundle, about, {"rgb": scene, **others}, out, "s")
    job.work()
    assert job.deliver() is not None
    with rasterio.open(out / "s.mask.tif") as file:
        values: NDArray[Any] = file.read(1)
    return values


def test_bands_are_taken_by_their_names(tmp_path: Path) -> None:
    image = pixels(90, 80)
    turned = np.dstack([image[:, :, ::-1], image[:, :, :1]])
    scene = write_scene(tmp_path / "in.tif", turned, photometric="minisblack")
    bundle = bundle_of()
    with pytest.raises(BadInput, match="4 bands, the model reads 3: red, green, blue"):
        mask(bundle, tmp_path, scene)
    with rasterio.open(scene, "r+") as file:
        file.descriptions = ("blue", "green", "red", "nir")
    assert (mask(bundle, tmp_path, scene) == whole(bundle, image).argmax(0)).all()
    with rasterio.open(scene, "r+") as file:
        file.descriptions = ("blue", "green", "swir", "nir")
    with pytest.raises(BadInput, match=r"4 bands \(blue, green, swir, nir\), the model reads 3"):
        mask(bundle, tmp_path, scene)
    deep = write_scene(tmp_path / "deep.tif", image.astype(np.uint16))
    with pytest.raises(BadInput, match="pixels of uint16, the model reads uint8"):
        mask(bundle, tmp_path, deep)


def test_b2_and_b02_blue_are_one_band(tmp_path: Path) -> None:
    sensor = Sensor(bands=["B04", "B03", "B02"], dtype="uint16", mean=[0] * 3, std=[1] * 3)
    scene = write_scene(tmp_path / "in.tif", pixels(20, 20).astype(np.uint16))
    with rasterio.open(scene, "r+") as file:
        file.descriptions = ("B2_blue", "B3_green", "B4_red")
        assert band_order(file, sensor) == [2, 1, 0]


def test_names_that_begin_alike_are_other_bands(tmp_path: Path) -> None:
    def order(bands: list[str], names: list[str]) -> list[int] | None:
        sensor = Sensor(bands=bands, dtype="uint8", mean=[0] * len(bands), std=[1] * len(bands))
        image = np.zeros((20, 20, len(names)), np.uint8)
        scene = write_scene(tmp_path / "in.tif", image, photometric="rgb")
        with rasterio.open(scene, "r+") as file:
            file.descriptions = names
            return band_order(file, sensor)

    with pytest.raises(BadInput, match="the model reads 2: red, red_edge"):
        order(["red", "red_edge"], ["blue", "green", "red", "nir"])
    assert order(["swir_1", "swir_2"], ["red", "swir_2", "swir_1"]) == [2, 1]
    assert order(["B8", "B8A"], ["B08", "B8A_narrow", "B4"]) is not None
    # What the file says of its bands counts more than that it is shown as RGB.
    with pytest.raises(BadInput, match="its bands are nir, red, green: blue missing"):
        order(["red", "green", "blue"], ["nir", "red", "green"])


def test_a_large_palette_is_answered_as_a_small_one(
    workspace: Workspace, model: str, tmp_path: Path
) -> None:
    from PIL import Image

    image = pixels(64, 1100)
    paletted = Image.fromarray(image).quantize(64)
    paletted.save(tmp_path / "in.png")
    bundle = bundle_of()
    said = mask(bundle, tmp_path, tmp_path / "in.png")
    assert (said == whole(bundle, np.array(paletted.convert("RGB"))).argmax(0)).all()
    (answer,) = predict(workspace, [str(tmp_path / "in.png")], model, out=tmp_path / "out")
    assert "error" not in answer


def test_uint16_that_int16_cannot_hold_is_refused(tmp_path: Path) -> None:
    sensor = {"bands": ["a", "b", "c"], "dtype": "int16", "mean": [0] * 3, "std": [1e4] * 3}
    bundle = bundle_of(sensors={"rgb": sensor})
    image = pixels(200, 300).astype(np.uint16)
    image[:1] = 40_000  # half a per cent
    few = write_scene(tmp_path / "few.tif", image)
    assert (mask(bundle, tmp_path, few) < 3).all()
    image[:20] = 40_000
    many = write_scene(tmp_path / "many.tif", image)
    with pytest.raises(BadInput, match="10 % of its values of uint16 are over 32767"):
        mask(bundle, tmp_path / "many", many)


def test_notes_name_the_files_that_were_given(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scenes, "_in_turn", lambda scene, side: list(scene.rasters))
    one = write_scene(tmp_path / "before.tif", pixels(100, 120))
    other = write_scene(tmp_path / "after.tif", pixels(140, 160))
    bundle = bundle_of("change")
    about = scenes.about(bundle, "change/7")
    job = scenes.SceneJob(bundle, about, {"rgb": one, "second": other}, tmp_path, "s")
    job.work()
    answer = job.deliver()
    assert answer is not None
    assert answer["notes"] == ["after.tif was brought to the pixels of before.tif"]


def test_another_ground_sampling_distance_is_resampled_or_refused(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(400, 500))  # half a metre

    def of(low: float, high: float) -> Scene:
        return Scene(bundle_of(gsd_m={"low": low, "high": high}), {"rgb": scene})

    with of(0.3, 0.45) as near:
        assert near.scale == 1 and not near.notes
    with of(1.0, 2.0) as finer:
        assert finer.scale == pytest.approx(2, rel=0.01)
        assert "resampled from 0.5" in finer.notes[0]
    with of(0.1, 0.2) as coarser:
        assert coarser.scale == pytest.approx(0.4, rel=0.01)
    with pytest.raises(BadInput, match=r"over 8 times the 0\.05 m"):
        of(0.04, 0.05)
    with pytest.raises(BadInput, match="less than half a window"):
        of(30, 30)


def test_a_later_date_on_another_grid_is_brought_to_the_first(tmp_path: Path) -> None:
    before, after = pixels(200, 240), pixels(200, 240, 1)
    one = write_scene(tmp_path / "1.tif", before)
    bundle = bundle_of("change")
    place = from_origin(500_000 - 10, 5_700_000 + 10, 0.5, 0.5)
    wide = np.pad(after, ((20, 20), (20, 20), (0, 0)), mode="edge")
    other = write_scene(tmp_path / "2.tif", wide)
    with rasterio.open(other, "r+") as file:
        file.transform = place
    said = mask(bundle, tmp_path, one, second=other)
    assert (said == whole(bundle, before, after).argmax(0)).mean() > 0.99
    with rasterio.open(other, "r+") as file:
        file.transform = from_origin(600_000, 5_700_000, 0.5, 0.5)
    with pytest.raises(BadInput, match="other ground"):
        mask(bundle, tmp_path, one, second=other)
    bare = write_scene(tmp_path / "3.tif", pixels(100, 100), crs=None)
    with pytest.raises(BadInput, match="cannot be brought together"):
        mask(bundle, tmp_path, one, second=bare)


def test_bad_scenes_are_set_aside_each_with_a_reason(
    workspace: Workspace, model: str, tmp_path: Path, capsys: Any
) -> None:
    folder, big = tmp_path / "in", pixels(40, 1100)
    good = write_scene(folder / "good.tif", big)
    (folder / "empty.tif").write_bytes(b"")
    (folder / "text.tif").write_text("no image at all")
    whole_file = write_scene(folder / "cut.tif", pixels(600, 1100)).read_bytes()
    (folder / "cut.tif").write_bytes(whole_file[: len(whole_file) // 2])
    hurt = bytearray(whole_file)
    hurt[len(hurt) // 2 : len(hurt) // 2 + 40_000] = bytes(40_000)
    (folder / "hurt.tif").write_bytes(hurt)
    write_scene(folder / "bands.tif", pixels(40, 1100)[:, :, :2])
    write_scene(folder / "black.tif", np.zeros((40, 1100, 3), np.uint8), nodata=0)
    write_scene(folder / "float.tif", np.full((40, 1100, 3), np.nan, np.float32))
    (folder / "other.vrt").write_text(
        f"<VRTDataset rasterXSize='1100' rasterYSize='40'><VRTRasterBand dataType='Byte' band='1'>"
        f"<SimpleSource><SourceFilename>{good}</SourceFilename></SimpleSource></VRTRasterBand>"
        f"</VRTDataset>"
    )
    given = [str(folder / "*.tif"), str(folder / "other.vrt")]
    out = tmp_path / "out"
    answers = predict(workspace, given, model, out=out)
    told = {Path(a["image"]).stem: a.get("error", "") for a in answers}
    assert [name for name, error in told.items() if not error] == ["good"]
    assert told["empty"] == "empty file" and told["text"] == told["other"] == "not an image"
    assert "damaged" in told["cut"] and "damaged" in told["hurt"]
    assert told["bands"] == "2 bands, the model reads 3: red, green, blue"
    assert told["black"] == "no data in any of its pixels"
    assert told["float"] == "pixels of float32, the model reads uint8"
    assert all("\n" not in error and str(tmp_path) not in error for error in told.values())
    assert "8 of 9 images" in capsys.readouterr().err
    # What was given up left nothing behind.
    names = {path.name.split(".")[0] for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {"good", "predictions"} and not list(out.glob(".*"))
    with pytest.raises(BadInput, match="no image could be read"):
        predict(workspace, [str(folder / "black.tif")], model, out=out)


def test_nan_is_nodata(tmp_path: Path) -> None:
    from small_models import SENSORS

    power = np.random.default_rng(1).gamma(2, 0.05, (100, 120, 2)).astype(np.float32)
    power[20:30, 40:50, 1] = np.nan
    power[60:, 70:] = np.inf
    scene = write_scene(tmp_path / "in.tif", power)
    bundle = bundle_of(sensors={"sar": SENSORS["sar"].model_dump()}, sensor="sar")
    with Scene(bundle, {"sar": scene}) as opened:
        box = opened.read((0, 100), (0, 120))
        wanted = np.isfinite(power).all(2)
        assert (box.valid == wanted).all() and (
            opened.own_valid((0, 100), (0, 120)) == wanted
        ).all()
        window = box.window(16, 32, 32)
    assert window is not None and np.isfinite(window["sar"]).all()
    with Scene(bundle, {"sar": scene}) as opened:
        assert opened.read((0, 100), (0, 120)).window(64, 80, 32) is None


def test_small_images_are_answered_as_ever_and_large_ones_as_scenes(
    workspace: Workspace, model: str, tmp_path: Path
) -> None:
    from PIL import Image

    Image.fromarray(pixels(40, 50)).save(tmp_path / "photo.jpg")
    Image.fromarray(pixels(700, 1200)).save(tmp_path / "large.png")
    files = [str(tmp_path / name) for name in ("photo.jpg", "large.png")]
    photo, large = predict(workspace, files, model, top=2)
    assert photo["label"] in ("airport", "forest") and "files" not in photo
    assert large["cells"] == -(-700 // 32) * -(-1200 // 32)
    answers = workspace.state / "answers"
    assert large["files"][0] == str(answers / "large.mask.tif") and Path(large["files"][0]).exists()
    said = text([photo, large])
    assert "confidence" in said and "pixels/s" in said and "Next: open" in said
    again = predict(workspace, files, model)
    assert "times" not in again[1] and again[1]["shares"] == large["shares"]  # done already


@pytest.mark.slow
def test_scenes_and_images_of_a_bucket_are_brought_here(
    workspace: Workspace, model: str, tmp_path: Path, s3: S3
) -> None:
    folder = s3.folder / "bucket" / "new"
    write_scene(folder / "a.tif", pixels(300, 1100))
    write_scene(folder / "deep" / "b.tif", pixels(40, 50))
    (folder / "notes.txt").write_text("no image")
    (folder / "c.tif").write_bytes(b"II*\0 no TIFF")
    config.edit(workspace.params_file, {"ingest.endpoint": f"http://127.0.0.1:{s3.port}"})
    out = tmp_path / "out"
    answers = predict(workspace, ["s3://bucket/new"], model, out=out)
    told = {answer["image"]: answer for answer in answers}
    assert set(told) == {f"s3://bucket/new/{name}" for name in ("a.tif", "c.tif", "deep/b.tif")}
    assert told["s3://bucket/new/a.tif"]["cells"] == 10 * 35
    assert (
        "label" in told["s3://bucket/new/deep/b.tif"] and "error" in told["s3://bucket/new/c.tif"]
    )
    assert not list(out.glob(".fetched/*"))
    item = json.loads((out / "a.stac.json").read_text())
    assert item["properties"]["ringmo:scene"] == "s3://bucket/new/a.tif"
    (again,) = predict(workspace, ["s3://bucket/new/*a.tif"], model, out=out)
    assert "times" not in again
    with pytest.raises(BadInput, match="no JPEG, PNG or TIFF object"):
        predict(workspace, ["s3://bucket/nothing"], model, out=out)
