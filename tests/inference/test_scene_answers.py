"""Scenes: the answer does not depend on windows, blocks, processes or interruptions."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pixelwise
import pytest
import rasterio
import shapely
import torch
from numpy.typing import NDArray
from PIL import Image
from pixelwise import CLASSES, bundle_of, pixels, whole, write_scene
from rasterio.transform import from_origin
from small_models import SWIN
from torch import Tensor, nn

from ringmo.config import Finetune, Model
from ringmo.errors import BadInput
from ringmo.inference import block_answers, scenes, stac
from ringmo.inference.block_answers import blocks
from ringmo.inference.reading import Scene
from ringmo.inference.windows import Windows
from ringmo.models.backbone import encoder
from ringmo.registry.bundle import PLAIN, Bundle
from ringmo.tasks import find
from ringmo.tasks.dense import colour

pytestmark = pytest.mark.usefixtures("one_thread")


def answered(bundle: Bundle, out: Path, *files: Path, **how: Any) -> dict[str, Any]:
    """The answer for a scene, into a folder; the model's name is segmentation/7."""
    paths = dict(zip(["rgb", "second"], files, strict=False))
    tags = {"data_version": "c3b8", "run": "f00d"}
    about = scenes.about(bundle, f"{bundle.meta['kind']}/7", tags)
    job = scenes.SceneJob(bundle, about, paths, out, "s", **how)
    job.work()
    answer = job.deliver()
    assert answer is not None and not job.work_folder.exists()
    return answer


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        values: NDArray[Any] = file.read()
    return values


@pytest.mark.parametrize("shift", [(0, 0), (5, 17)])
@pytest.mark.parametrize("side", [512, 2048])
def test_a_pixelwise_model_s_mosaic_is_the_whole_answer(
    tmp_path: Path, monkeypatch: Any, shift: tuple[int, int], side: int
) -> None:
    monkeypatch.setattr(block_answers, "LARGEST", side)
    image = pixels(530, 701)
    scene = write_scene(tmp_path / "in.tif", image)
    bundle = bundle_of(size=64)
    answered(bundle, tmp_path, scene, shift=shift, probabilities=True)
    truth = whole(bundle, image)
    assert np.abs(read(tmp_path / "s.probabilities.tif") - truth).max() <= 1e-6
    sure = np.sort(truth, 0)[-1] - np.sort(truth, 0)[-2] > 1e-5
    assert (read(tmp_path / "s.mask.tif")[0] == truth.argmax(0))[sure].all()


def test_heights_and_changes_are_whole_answers_too(tmp_path: Path) -> None:
    before, after = pixels(200, 300), pixels(200, 300, 1)
    one, other = write_scene(tmp_path / "1.tif", before), write_scene(tmp_path / "2.tif", after)
    heights = bundle_of("height")
    answer = answered(heights, tmp_path / "h", one)
    got, truth = read(tmp_path / "h" / "s.height.tif")[0], whole(heights, before)
    assert np.abs(got - truth).max() <= 1e-6 and "lowest" in answer["said"]
    change = bundle_of("change")
    answered(change, tmp_path / "c", one, other, probabilities=True)
    got, truth = read(tmp_path / "c" / "s.probabilities.tif"), whole(change, before, after)
    assert np.abs(got - truth).max() <= 1e-6
    with pytest.raises(BadInput, match="give --with second=FILE"):
        answered(change, tmp_path / "d", one)


@pytest.mark.parametrize("scale", [2.0, 0.5, 1.37])
def test_at_another_scale_blocks_make_no_difference(
    tmp_path: Path, monkeypatch: Any, scale: float
) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(530, 601))
    bundle = bundle_of(size=64, tile_pixels=round(100 * scale), resize=100)
    answered(bundle, tmp_path / "one", scene, probabilities=True)
    monkeypatch.setattr(block_answers, "LARGEST", 512)
    answered(bundle, tmp_path / "many", scene, probabilities=True)
    one, many = (read(tmp_path / n / "s.probabilities.tif") for n in ("one", "many"))
    assert one.shape == (3, 530, 601) and np.abs(one - many).max() <= 1e-6
    assert np.abs(one.sum(0) - 1).max() < 1e-5  # all of it has an answer


def real_model(kind: str, classes: list[str], size: int = 64) -> nn.Module:
    torch.manual_seed(1)
    trunk = encoder(Model.model_validate({**SWIN, "image_size": size}), {"rgb": 3}, finetuning=True)
    model: nn.Module = find(kind).model(trunk, len(classes), Finetune.model_validate(PLAIN))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def test_a_real_model_s_windows_leave_no_seams(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(400, 500))
    bundle = bundle_of(model=real_model("segmentation", CLASSES), size=64)
    answered(bundle, tmp_path, scene, probabilities=True)
    said = read(tmp_path / "s.probabilities.tif").astype(np.float64)
    assert said.std() > 0.05  # it says something
    grid = Windows(400, 500, 64, 40)
    for axis, starts in ((1, grid.rows), (2, grid.cols)):
        step = np.abs(np.diff(said, axis=axis)).mean(axis=(0, 3 - axis))
        edges = np.unique(np.concatenate([starts[1:], starts[:-1] + 64])) - 1
        inner = np.setdiff1d(np.arange(len(step)), edges)
        assert step[edges].mean() <= 1.1 * step[inner].mean()


def test_nodata_is_skipped_and_stays_nodata(tmp_path: Path) -> None:
    image = pixels(300, 400)
    image[:, 200:] = 0
    image[120:130, 20:30] = 0
    scene = write_scene(tmp_path / "in.tif", image, nodata=0)
    bundle = bundle_of()
    about = scenes.about(bundle, "segmentation/7")
    job = scenes.SceneJob(bundle, about, {"rgb": scene}, tmp_path, "s")
    job.work()
    assert job.times.windows < 0.7 * len(Windows(300, 400, 32, 20).rows) * 20
    job.deliver()
    mask = read(tmp_path / "s.mask.tif")[0]
    gone = (image == 0).all(2)
    assert ((mask == 255) == gone).all() and gone.any()
    assert (mask == whole(bundle, image).argmax(0))[~gone].mean() > 0.9999


def test_blocks_that_were_never_written_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    profile = {
        "driver": "GTiff", "height": 700, "width": 900, "count": 3, "dtype": "uint8",
        "tiled": True, "blockxsize": 128, "blockysize": 128, "sparse_ok": True,
        "interleave": "pixel", "crs": "EPSG:32631",
        "transform": from_origin(500_000, 5_700_000, 0.5, 0.5),
    }  # fmt: skip
    image = pixels(128, 256)
    with rasterio.open(path, "w", **profile) as file:
        file.write(image.transpose(2, 0, 1), window=((256, 384), (384, 640)))
    answered(bundle_of(), tmp_path, path)
    mask = read(tmp_path / "s.mask.tif")[0]
    there = np.zeros((700, 900), bool)
    there[256:384, 384:640] = True
    assert ((mask != 255) == there).all()


def test_what_is_delivered_explains_itself(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(1300, 600))
    with rasterio.open(scene, "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2024:05:01 10:20:30")
    bundle = bundle_of(classes=["water", "field", "town & road"])
    answer = answered(bundle, tmp_path, scene)
    assert sum(answer["shares"].values()) == pytest.approx(1)
    with rasterio.open(tmp_path / "s.mask.tif") as file:
        assert file.crs.to_epsg() == 32631 and file.nodata == 255
        assert file.transform == from_origin(500_000, 5_700_000, 0.5, 0.5)
        assert file.overviews(1) == [2, 4] and file.block_shapes == [(512, 512)]
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.colormap(1)[1] == (230, 159, 0, 255)
        tags = file.tags()
    wanted = {"MODEL": "segmentation/7", "DATA_VERSION": "c3b8", "RUN": "f00d", "SCENE": str(scene)}
    assert {f"RINGMO_{k}": v for k, v in wanted.items()}.items() <= tags.items()
    assert json.loads(tags["RINGMO_PARAMETERS"])["resize"] == 32
    names = (tmp_path / "s.mask.tif.aux.xml").read_text()
    assert "<Category>town &amp; road</Category>" in names
    legend = ElementTree.parse(tmp_path / "s.mask.qml").iter("paletteEntry")
    told = [(one.get("value"), one.get("color"), one.get("label")) for one in legend]
    assert told[1:] == [("1", "#e69f00", "field"), ("2", "#56b4e9", "town & road")]
    item = json.loads((tmp_path / "s.stac.json").read_text())
    check_item(item, tmp_path)
    assert item["properties"]["datetime"] == "2024-05-01T10:20:30Z"
    assert item["properties"]["proj:code"] == "EPSG:32631"
    assert 51 < item["bbox"][1] < item["bbox"][3] < 52
    with Image.open(tmp_path / "s.preview.png") as picture:
        assert 300 <= picture.width <= 1024 and picture.height <= 1124
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100


def test_a_recorder_sees_every_batch_as_the_model_does(tmp_path: Path) -> None:
    image = pixels(100, 120)
    scene = write_scene(tmp_path / "in.tif", image)
    bundle, seen = bundle_of(tile_pixels=64), []

    class Keeps:
        def add(self, pixels: Any, answer: Any, named: Any) -> None:
            assert len(answer) == len(named) == len(pixels["rgb"])
            assert pixels["rgb"].shape[1:] == (3, 32, 32) and pixels["rgb"].dtype == torch.uint8
            seen.extend(named)

    about = scenes.about(bundle, "segmentation/7")
    job = scenes.SceneJob(bundle, about, {"rgb": scene}, tmp_path, "s", "A", recorder=Keeps())
    job.work()
    job.close()
    assert len(seen) == len(set(seen)) == job.times.windows
    assert seen[0] == f"{scene.resolve()}#0,0,64,64"
    assert seen[1].startswith(f"{scene.resolve()}#40,0,")
    seen.clear()
    stored = "s3://bucket/in.tif"
    job = scenes.SceneJob(
        bundle, about, {"rgb": scene}, tmp_path / "s3", "s", stored, recorder=Keeps()
    )
    job.work()
    job.close()
    assert seen[0] == f"{stored}#0,0,64,64"


def check_item(item: dict[str, Any], folder: Path) -> None:
    """What the STAC item specification 1.1.0 asks for."""
    assert item["type"] == "Feature" and item["stac_version"] == "1.1.0"
    assert isinstance(item["id"], str) and item["id"]
    assert isinstance(item["links"], list) and isinstance(item["stac_extensions"], list)
    times = item["properties"]
    assert "datetime" in times
    if times["datetime"] is None:
        assert {"start_datetime", "end_datetime"} <= times.keys()
    if item["geometry"] is None:
        assert "bbox" not in item
    else:
        assert item["geometry"]["type"] in ("Polygon", "MultiPolygon") and len(item["bbox"]) == 4
    for asset in item["assets"].values():
        assert (folder / asset["href"]).is_file() and "/" in asset["type"]


class Bright(nn.Module):
    """Finds bright blobs, each in its span, as a detector answers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = pixelwise.Pixelwise(3, size=64).encoder

    def forward(self, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        from scipy.ndimage import find_objects, label

        said = []
        for image in images["rgb"]:
            blobs = find_objects(label((image[0] > 1).numpy())[0])
            boxes = [(c.start, r.start, c.stop, r.stop) for r, c in blobs]
            at = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            area = (at[:, 2] - at[:, 0]) * (at[:, 3] - at[:, 1])
            said.append(
                {
                    "boxes": at,
                    "scores": 0.5 + area / 10_000,
                    "labels": torch.zeros(len(at), dtype=torch.int64),
                }
            )
        return said


@pytest.mark.parametrize("side", [512, 2048])
def test_objects_are_found_once_and_whole(tmp_path: Path, monkeypatch: Any, side: int) -> None:
    import geopandas

    monkeypatch.setattr(block_answers, "LARGEST", side)
    random = np.random.default_rng(3)
    image = np.full((700, 900, 3), 60, np.uint8)
    true = set()
    for top in range(3, 680, 41):
        for left in range(3, 880, 37):
            high, wide = random.integers(6, 14, 2)
            image[top : top + high, left : left + wide] = 255
            true.add((left, top, min(left + wide, 900), min(top + high, 700)))
    scene = write_scene(tmp_path / "in.tif", image)
    bundle = bundle_of("detection", Bright(), size=64)
    answer = answered(bundle, tmp_path, scene)
    found = geopandas.read_file(tmp_path / "s.boxes.gpkg")
    assert found.crs.to_epsg() == 32631 and answer["boxes"] == len(found) == len(true)
    spans = found.geometry.bounds.to_numpy()
    own = np.stack(
        [
            (spans[:, 0] - 500_000) * 2, (5_700_000 - spans[:, 3]) * 2,
            (spans[:, 2] - 500_000) * 2, (5_700_000 - spans[:, 1]) * 2,
        ],
        1,
    )  # fmt: skip
    assert {tuple(round(v) for v in row) for row in own.tolist()} == true
    assert set(found["class"]) == {"water"} and found["score"].between(0, 1).all()
    import pyogrio

    kept = pyogrio.read_info(tmp_path / "s.boxes.gpkg")["layer_metadata"]
    assert kept["RINGMO_MODEL"] == "detection/7" and kept["RINGMO_RUN"] == "f00d"


def test_merging_what_touches_is_merging_all_at_once(monkeypatch: Any) -> None:
    from ringmo.inference import scene_boxes
    from ringmo.models import rotated
    from ringmo.tasks.base import spans
    from ringmo.tasks.objects import Found

    monkeypatch.setattr(scene_boxes, "LOOKED_UP", 50)
    monkeypatch.setattr(scene_boxes, "COMPARED", 20)
    dice = torch.Generator().manual_seed(2)
    middle = torch.rand((300, 2), generator=dice) * 400
    sides = torch.rand((300, 2), generator=dice) * 30 + 5
    boxes = torch.cat([middle, sides, torch.rand((300, 1), generator=dice) * 3 - 1.5], 1)
    corners = rotated.to_corners(rotated.canonical(boxes))
    scores, labels = torch.rand(300, generator=dice), torch.randint(2, (300,), generator=dice)
    for kind in ("oriented", "detection"):
        task: Any = find(kind)
        upright = corners
        if kind == "detection":
            left, top, right, bottom = spans(corners).unbind(1)
            ring = [(left, top), (right, top), (right, bottom), (left, bottom)]
            upright = torch.stack([torch.stack(point, 1) for point in ring], 1)
        kept = task.single(Found(upright, scores, labels, 0))
        found = scene_boxes.merged(task, upright.double(), scores, labels)
        assert torch.equal(found.scores, scores[kept]) and 10 < len(kept) < 300
    assert not len(scene_boxes.merged(task, upright[:0].double(), scores[:0], labels[:0]).scores)


def test_a_scene_model_says_what_each_window_shows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(block_answers, "LARGEST", 512)
    scene = write_scene(tmp_path / "in.tif", pixels(700, 1000))
    model = real_model("scene", CLASSES)
    bundle = bundle_of("scene", model, size=64, tile_pixels=128)
    answer = answered(bundle, tmp_path, scene)
    assert answer["cells"] == 6 * 8
    with rasterio.open(tmp_path / "s.mask.tif") as file:
        assert file.shape == (6, 8) and file.transform == from_origin(500_000, 5_700_000, 64, 64)
        mask = file.read(1)
    with (tmp_path / "s.cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    for row in rows:
        assert row["label"] == CLASSES[mask[int(row["row"]), int(row["col"])]]
    # The preview has each cell where it lies: the last column is 104 of 128 pixels, not 125.
    with Image.open(tmp_path / "s.preview.png") as opened:
        picture = np.asarray(opened)[:700, :1000].astype(int)
    with rasterio.open(scene) as file:
        ground = file.read().transpose(1, 2, 0)
    colours = np.array([colour(i) for i in range(3)])
    over = np.abs((2 * picture - ground)[..., None, :] - colours).sum(-1).argmin(-1)
    assert len(np.unique(mask)) > 1
    assert over.tolist() == np.kron(mask, np.ones((128, 128), int))[:700, :1000].tolist()
    said = bundle.predict([pixels(700, 1000)[128:256, 256:384]])[0]
    (cell,) = [row for row in rows if (row["row"], row["col"]) == ("1", "2")]
    assert [float(cell[name]) for name in CLASSES] == pytest.approx(said.tolist(), abs=5e-3)
    assert float(cell["x"]) == 500_000 + 64 * 2.5


def test_of_several_classes_a_cell_names_all_that_are_likely(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "in.tif", pixels(200, 300))
    model = real_model("scene", CLASSES)
    model.multi_label = True
    settings = Finetune.model_validate({**PLAIN, "multi_label": True}).model_dump(mode="json")
    answered(bundle_of("scene", model, size=64, settings=settings), tmp_path, scene)
    with (tmp_path / "s.cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        likely = [name for name in CLASSES if float(row[name]) >= 0.5]
        assert row["label"] == ";".join(likely)
    assert any(";" in row["label"] for row in rows)


def test_a_scene_without_objects_has_an_empty_answer(tmp_path: Path) -> None:
    import pyogrio

    scene = write_scene(tmp_path / "in.tif", np.full((100, 200, 3), 60, np.uint8))
    answer = answered(bundle_of("detection", Bright(), size=64), tmp_path, scene)
    assert answer["boxes"] == 0 and answer["said"] == "no objects (score from 0.5)"
    about = pyogrio.read_info(tmp_path / "s.boxes.gpkg")
    assert about["features"] == 0 and about["crs"] == "EPSG:32631"
    assert (tmp_path / "s.preview.png").exists()


def test_a_preview_shows_floats_with_gaps_at_any_scale(tmp_path: Path) -> None:
    """Also where the model's pixels are others than the scene's."""
    random = np.random.default_rng(4)
    image = random.normal(900, 40, (300, 400, 3)).astype(np.float32)
    image[:, 250:] = np.nan
    scene = write_scene(tmp_path / "in.tif", image)
    deep = (np.nan_to_num(image) * 10).astype(np.uint16)
    deep[:, 250:] = 65535
    whole_numbers = write_scene(tmp_path / "deep.tif", deep, nodata=65535)
    for file, dtype in ((scene, "float32"), (whole_numbers, "uint16")):
        sensor = {"bands": ["a", "b", "c"], "dtype": dtype, "mean": [900] * 3, "std": [40] * 3}
        for gsd_m in (None, {"low": 1.0, "high": 1.0}):
            out = tmp_path / f"{dtype}{gsd_m is None}"
            bundle = bundle_of(sensors={"rgb": sensor}, gsd_m=gsd_m)
            answered(bundle, out, file)
            with Image.open(out / "s.preview.png") as opened:
                picture = np.asarray(opened)[:300, :400]
            assert picture[:, :248].std() > 15  # half of the ground's contrast
            assert (picture[:, 254:] == 0).all()


def test_ground_control_points_are_passed_on(tmp_path: Path) -> None:
    from rasterio.control import GroundControlPoint

    path = write_scene(tmp_path / "in.tif", pixels(100, 120), crs=None)
    points = [
        GroundControlPoint(row, col, 3 + col / 1000, 50 - row / 1000)
        for row in (0, 100)
        for col in (0, 120)
    ]
    with rasterio.open(path, "r+") as file:
        file.gcps = (points, "EPSG:4326")
    answered(bundle_of(), tmp_path, path)
    with rasterio.open(tmp_path / "s.mask.tif") as file:
        kept, crs = file.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]
    assert crs.to_epsg() == 4326
    item = json.loads((tmp_path / "s.stac.json").read_text())
    assert item["bbox"] == pytest.approx([3, 49.9, 3.12, 50])


def test_a_picture_of_the_whole_globe_has_no_corners_on_it(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "in.tif", pixels(60, 60), crs=None)
    with rasterio.open(path, "r+") as file:
        file.crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y"
        file.transform = from_origin(-5.5e6, 5.5e6, 11e6 / 60, 11e6 / 60)
    answered(bundle_of(), tmp_path, path)
    check_item(json.loads((tmp_path / "s.stac.json").read_text()), tmp_path)


def placed(path: Path, crs: Any, transform: Any) -> tuple[Any, Any]:
    """The STAC outline of 60 x 60 pixels there."""
    with rasterio.open(write_scene(path, pixels(60, 60), crs=None), "r+") as file:
        file.crs, file.transform = crs, transform
    with Scene(bundle_of(), {"rgb": path}) as scene:
        return stac.footprint(scene)


def test_outlines_lie_where_they_lie_on_earth(tmp_path: Path) -> None:
    path = tmp_path / "in.tif"
    for west in (-180, 0):
        geometry, box = placed(path, "EPSG:4326", from_origin(west, 90, 6, 3))
        assert box == [-180, -90, 180, 90] and shapely.geometry.shape(geometry).area == 360 * 180
    geometry, box = placed(path, "EPSG:3413", from_origin(-1e5, 1e5, 2e5 / 60, 2e5 / 60))
    pole = shapely.geometry.shape(geometry)
    assert box[0] == -180 and box[2] == 180 and box[3] == 90 and 88 < box[1] < 89
    assert all(pole.contains(shapely.Point(lon, 89.9)) for lon in (-170, -60, 0, 77, 160))
    geometry, box = placed(path, "EPSG:32601", from_origin(165_000, 3_000, 50, 50))
    assert geometry["type"] == "MultiPolygon" and box[0] == pytest.approx(179.99, abs=0.01)
    assert box[2] == pytest.approx(-179.98, abs=0.01) and box[0] < 180


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (33, 31)])
def test_scenes_smaller_than_a_window_have_an_answer(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    image = pixels(*shape)
    bundle = bundle_of()
    answer = answered(bundle, tmp_path, write_scene(tmp_path / "in.tif", image, crs=None))
    assert (read(tmp_path / "s.mask.tif")[0] == whole(bundle, image).argmax(0)).all()
    assert "no coordinates" in answer["notes"][0]
    item = json.loads((tmp_path / "s.stac.json").read_text())
    check_item(item, tmp_path)
    assert item["geometry"] is None


def test_every_window_belongs_to_one_block_and_every_pixel_to_a_window() -> None:
    for height, width, size, stride in ((100, 130, 32, 24), (32, 50, 32, 24), (96, 64, 32, 32)):
        grid = Windows(height, width, size, stride)
        every = blocks(height, width, 40)
        begun = [w for b in every for w in grid.beginning(b.rows, b.cols)]
        assert len(begun) == len(set(begun)) == len(grid.rows) * len(grid.cols)
        covered = np.zeros((height, width), bool)
        for row in grid.rows:
            for col in grid.cols:
                covered[row : row + size, col : col + size] = True
        assert covered.all()
