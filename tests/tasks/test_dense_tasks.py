"""Segmentation, change and height: what they learn from, learn, answer and show."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from backbones import BACKBONES
from real import REAL
from torch import Tensor, nn

from ringmo import config, tasks
from ringmo.config import Config, Finetune, Model
from ringmo.data.ingest import ingest
from ringmo.data.loading import SelectedTiles
from ringmo.data.selection import select
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder
from ringmo.tasks import change, dense, height
from ringmo.tasks.base import SECOND, UNKNOWN, Images, Sample, Task
from ringmo.tasks.samples import Samples
from ringmo.training.augmentation import turned, turned_back

SETTINGS = Finetune(
    epochs=1,
    warmup_epochs=0,
    batch_size=4,
    base_lr=0.1,
    min_lr=0.0,
    crop_scale=(0.5, 1.0),
    label_smoothing=0.0,
)
BALANCED = SETTINGS.model_copy(update={"class_weights": "balanced"})
SMALL = Model(
    image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
)
SEGMENTATION, CHANGE, HEIGHT = (tasks.find(n) for n in ("segmentation", "change", "height"))
EACH = pytest.mark.parametrize("task", [SEGMENTATION, CHANGE, HEIGHT], ids=lambda t: t.name)


class Tiles:
    """Training tiles of which only the table is read."""

    def __init__(self, **columns: Any) -> None:
        self.table = pd.DataFrame(columns)

    def __len__(self) -> int:
        return len(self.table)


LAND = Tiles(
    key=["a", "b", "c"],
    mask_coding=["land", "roads", "land"],
    mask_names=[["field", "house"], ["background", "road", "house"], ["field", "house"]],
    # Numbers that are not there at the end are left out; the last count is of unknown pixels.
    mask_counts=[[60, 30, 10], [0, 20, 0], [40, 7]],
)
PAIRS = Tiles(
    key=["a", "b"],
    mask_coding=["binary", "zero_one"],
    mask_names=[["background", "object"], ["background", "object"]],
    mask_counts=[[90, 10, 0], [100, 0]],
)
HILLS = Tiles(
    height_mean=[100.0, 140.0, np.nan],
    height_std=[3.0, 5.0, np.nan],
    height_min=[90.0, 120.0, np.nan],
    height_max=[110.0, 150.0, np.nan],
)


def made(task: Task, count: int = 2, size: int = 64, classes: int = 2) -> Sample:
    torch.manual_seed(0)
    images = {"rgb": torch.randn(count, 3, size, size)}
    if task is CHANGE:
        images[SECOND] = torch.randn(count, 3, size, size)
    return Sample(
        images,
        np.arange(count),
        mask=torch.randint(0, classes, (count, size, size)),
        height=50 + 20 * torch.rand(count, size, size),
    )


def a_model(task: Task, model: Model = SMALL, classes: int = 2) -> Any:
    torch.manual_seed(0)
    return task.model(encoder(model, {"rgb": 3}, finetuning=True), classes, SETTINGS)


@EACH
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=list(BACKBONES))
def test_every_task_learns_and_answers_on_every_backbone(task: Task, backbone: Model) -> None:
    model, size = a_model(task, backbone), backbone.image_size
    sample = made(task, size=size)
    cost = task.loss(model, sample, SETTINGS)
    cost.backward()
    assert cost.ndim == 0 and cost > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    for side in (size, size + 24):
        sample = made(task, size=side)
        with torch.no_grad():
            answer = task.answer(model, sample.images)
        assert answer.shape == ((2, side, side) if task is HEIGHT else (2, 2, side, side))
        assert answer.dtype == torch.float32
        if task is not HEIGHT:
            assert torch.allclose(answer.sum(1), torch.ones(2, side, side), atol=1e-5)
        evidence = task.evidence(answer, sample)
        assert task.quality(evidence, ["a", "b"]).shape == (2,)
        figures = task.figures(evidence, ["a", "b"])
        assert np.isfinite(figures.whole[task.metric])
        assert task.lower | task.metres <= figures.whole.keys()
        images = [np.zeros((side, side, 3), np.uint8)] * (2 if task is CHANGE else 1)
        assert len(task.shown(images, answer, sample, 1, [])) == (5 if task is CHANGE else 3)


@EACH
def test_a_batch_costs_the_mean_of_its_images(task: Task) -> None:
    model, sample = a_model(task).eval(), made(task, 3)
    assert sample.mask is not None and sample.height is not None
    sample.mask[0, :40] = UNKNOWN  # an image counts as any other, however little of it is known
    sample.height[0, :40] = torch.nan
    each = [
        task.loss(
            model,
            Sample(
                {name: of[i : i + 1] for name, of in sample.images.items()},
                np.array([i]),
                mask=sample.mask[i : i + 1],
                height=sample.height[i : i + 1],
            ),
            SETTINGS,
        )
        for i in range(3)
    ]
    assert torch.allclose(task.loss(model, sample, SETTINGS), torch.stack(each).mean(), rtol=1e-4)


@EACH
def test_what_nobody_knows_costs_nothing_and_spoils_nothing(task: Task) -> None:
    model, sample = a_model(task), made(task)
    assert sample.mask is not None and sample.height is not None
    sample.mask[:], sample.height[:] = UNKNOWN, torch.nan
    cost = task.loss(model, sample, SETTINGS.model_copy(update={"label_smoothing": 0.1}))
    cost.backward()
    assert cost == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model.eval()
    evidence = task.evidence(task.answer(model, sample.images).detach(), sample)
    assert np.isnan(task.figures(evidence, ["a", "b"]).whole[task.metric])
    assert np.isnan(task.quality(evidence, ["a", "b"])).all()


def test_a_loss_a_hand_can_compute() -> None:
    logits = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # two pixels, below the second class
    mask = torch.tensor([[[0, 1]]])
    first, second = np.log(1 + np.exp(-1.0)), np.log(1 + np.exp(-2.0))
    sure = np.exp(-first), np.exp(-second)  # of what is true
    said = sure[0] + 1 - sure[1], sure[1] + 1 - sure[0]
    dice = np.mean([1 - 2 * sure[i] / (said[i] + 1) for i in range(2)])
    assert dense.mask_loss(logits, mask, None, 0.0).item() == pytest.approx(
        np.mean([first, second]) + dice
    )
    weighted = dense.mask_loss(logits, mask, torch.tensor([1.0, 3.0]), 0.0)
    assert weighted.item() == pytest.approx((first + 3 * second) / 2 + dice)
    mask[0, 0, 1] = 2  # a class that the model does not have, as one that nobody knows
    alone = first + 1 - 2 * sure[0] / (sure[0] + 1)
    assert dense.mask_loss(logits, mask, None, 0.0).item() == pytest.approx(alone)


def test_dice_agrees_with_segmentation_models_pytorch() -> None:
    from segmentation_models_pytorch.losses import DiceLoss

    torch.manual_seed(0)
    logits = torch.randn(1, 3, 24, 24)
    mask = torch.randint(0, 3, (1, 24, 24))
    mask[:, :3] = UNKNOWN
    entropy = nn.functional.cross_entropy(logits, mask, ignore_index=UNKNOWN)
    ours = dense.mask_loss(logits, mask, None, 0.0) - entropy
    assert torch.allclose(ours, DiceLoss("multiclass", ignore_index=UNKNOWN)(logits, mask))


def test_classes_are_those_of_all_codings() -> None:
    assert SEGMENTATION.classes(LAND, SETTINGS) == ["field", "house", "background", "road"]
    one = Tiles(mask_names=[["field"]])
    with pytest.raises(BadInput, match="of 1 classes"):
        SEGMENTATION.classes(one, SETTINGS)
    with pytest.raises(BadInput, match="0 tiles"):
        SEGMENTATION.classes(Tiles(mask_names=[]), SETTINGS)


def test_change_has_two_classes_whatever_its_codings_call_them() -> None:
    assert CHANGE.classes(PAIRS, SETTINGS) == ["unchanged", "changed"]
    three = Tiles(key=["k1"], mask_coding=["land"], mask_names=[["a", "b", "c"]])
    with pytest.raises(BadInput, match=r"tile k1.*`land`.*3 classes"):
        CHANGE.classes(three, SETTINGS)
    with pytest.raises(BadInput, match="two dates"):
        CHANGE.classes(Tiles(key=[], mask_coding=[], mask_names=[]), SETTINGS)
    with pytest.raises(BadInput, match="heights"):
        HEIGHT.classes(Tiles(key=[]), SETTINGS)
    assert HEIGHT.classes(HILLS, SETTINGS) == []


def test_balanced_weights_make_every_class_count_the_same() -> None:
    classes = SEGMENTATION.classes(LAND, SETTINGS)
    model = a_model(SEGMENTATION, classes=4)
    SEGMENTATION.prepare(model, LAND, classes, SETTINGS)
    assert model.class_weights is None
    SEGMENTATION.prepare(model, LAND, classes, BALANCED)
    pixels = np.array([100, 30, 0, 20])  # field, house, background, road
    weights = model.class_weights.numpy()
    assert (pixels * weights)[[0, 1, 3]] == pytest.approx([50, 50, 50])
    assert weights[2] == 0, "of a class without pixels nothing is known"
    change_model = a_model(CHANGE)
    CHANGE.prepare(change_model, PAIRS, ["unchanged", "changed"], BALANCED)
    assert change_model.class_weights.tolist() == pytest.approx([200 / 380, 200 / 20])
    cost = CHANGE.loss(change_model, made(CHANGE), BALANCED)
    assert cost.isfinite()


def test_heights_are_learnt_in_the_spread_of_the_training_tiles() -> None:
    model = a_model(HEIGHT)
    HEIGHT.prepare(model, HILLS, [], SETTINGS)
    assert model.mean_m.item() == pytest.approx(120)
    assert model.unit_m.item() == pytest.approx(np.sqrt((9 + 25) / 2 + 400), rel=1e-5)
    above = SETTINGS.model_copy(update={"heights": "above_lowest"})
    HEIGHT.prepare(model, HILLS, [], above)
    assert model.mean_m.item() == pytest.approx(15)
    assert model.unit_m.item() == pytest.approx(np.sqrt((9 + 25) / 2 + 25), rel=1e-5)
    flat = Tiles(height_mean=[2.0], height_std=[0.0], height_min=[2.0], height_max=[2.0])
    HEIGHT.prepare(model, flat, [], SETTINGS)
    assert HEIGHT.loss(model, made(HEIGHT), SETTINGS).isfinite()


def test_trivial_answers_know_the_labels_alone() -> None:
    classes = SEGMENTATION.classes(LAND, SETTINGS)
    said = SEGMENTATION.trivial(LAND, made(SEGMENTATION), classes, SETTINGS)
    assert said.shape == (2, 4, 64, 64) and (said.argmax(1) == classes.index("field")).all()
    quiet = CHANGE.trivial(PAIRS, made(CHANGE), ["unchanged", "changed"], SETTINGS)
    assert (quiet.argmax(1) == 0).all()
    assert (HEIGHT.trivial(HILLS, made(HEIGHT), [], SETTINGS) == 120).all()
    above = SETTINGS.model_copy(update={"heights": "above_lowest"})
    assert (HEIGHT.trivial(HILLS, made(HEIGHT), [], above) == 15).all()


def test_masks_without_change_are_no_trouble() -> None:
    model, sample = a_model(CHANGE).eval(), made(CHANGE)
    assert sample.mask is not None
    sample.mask[:] = 0
    assert CHANGE.loss(model, sample, SETTINGS).isfinite()
    quiet = CHANGE.trivial(PAIRS, sample, ["unchanged", "changed"], SETTINGS)
    evidence = CHANGE.evidence(quiet, sample)
    figures = CHANGE.figures(evidence, ["unchanged", "changed"])
    assert figures.whole["accuracy"] == 1 and np.isnan(figures.whole["f1"])
    assert [row["class"] for row in figures.classes] == ["unchanged"]
    assert CHANGE.quality(evidence, []).tolist() == [1, 1]


class Local(nn.Module):
    """A model that answers for a pixel by that pixel alone, and counts what it is given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = encoder(SMALL, {"rgb": 3})
        self.encoder.image_size = size
        self.head = nn.Conv2d(3, 4, 1)
        self.most = 0

    def forward(self, images: Images) -> Tensor:
        assert images["rgb"].shape[-2:] == (self.encoder.image_size,) * 2
        self.most = max(self.most, len(images["rgb"]))
        logits: Tensor = self.head(images["rgb"])
        return logits


@pytest.mark.parametrize("side", [16, 17, 24, 31, 32, 100])
def test_windows_say_what_the_whole_would(side: int) -> None:
    model = Local(16).eval()
    images = {"rgb": torch.randn(3, 3, side, side)}
    answer = SEGMENTATION.answer(model, images)
    whole = model.head(images["rgb"]).softmax(1)
    assert torch.allclose(answer, whole, atol=1e-5)
    assert model.most <= max(3, dense.TOGETHER)


@pytest.mark.parametrize(("side", "size"), [(16, 16), (17, 16), (200, 64), (512, 224), (40, 39)])
def test_windows_reach_from_edge_to_edge_and_overlap_by_a_quarter(side: int, size: int) -> None:
    starts = dense.window_starts(side, size)
    assert starts[0] == 0 and starts[-1] == side - size
    assert all(0 < b - a <= round(0.75 * size) + 1 for a, b in pairwise(starts))


def test_where_windows_disagree_there_is_no_seam() -> None:
    def disagreeing(cut: Images) -> Tensor:
        levels = cut["rgb"][:, 0, 0, 0].round() % 2  # alternating, by where a window begins
        return levels[:, None, None].expand(-1, 32, 32)

    column = torch.arange(104) // 24
    images = {"rgb": column.expand(1, 1, 104, 104).float()}
    said = dense.windowed(disagreeing, images, 32)
    assert said.min() < 0.01 and said.max() > 0.99, "the windows do disagree"
    step = max(said.diff(dim=axis).abs().max().item() for axis in (1, 2))
    assert step < 0.35, "a plain border would be a step of 1, a mean one of a half"


def test_turned_answers_are_turned_back() -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    eight = [turned(image, number) for number in range(8)]
    assert len({tuple(each.flatten().tolist()) for each in eight}) == 8
    for number, each in enumerate(eight):
        assert torch.equal(turned_back(each, number), image)
    assert turned(image, 1)[0, 0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
    assert turned(image, 4)[0, 0].tolist() == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]
    model = Local(16).eval()
    images = torch.randn(2, 3, 40, 40)
    turns = [0, 3, 5]
    answers = [SEGMENTATION.answer(model, {"rgb": turned(images, turn)}) for turn in turns]
    once = SEGMENTATION.answer(model, {"rgb": images})
    assert torch.allclose(SEGMENTATION.turned_back(answers, turns), once, atol=1e-5)
    maps = [turned(once[:, 0], turn) for turn in turns]
    assert torch.allclose(HEIGHT.turned_back(maps, turns), once[:, 0], atol=1e-6)


def test_users_are_told_masks_and_metres() -> None:
    answer = torch.tensor([0.2, 0.7, 0.1])[None, :, None, None].expand(2, 3, 8, 8)
    first, _ = SEGMENTATION.told(answer, ["a", "b", "c"])
    assert first["mask"].dtype == np.uint8 and (first["mask"] == 1).all()
    assert first["confidence"].dtype == np.float32 and first["confidence"] == pytest.approx(0.7)
    (metres,) = HEIGHT.told(torch.full((1, 8, 8), 3.5), [])
    assert metres["height"].dtype == np.float32 and (metres["height"] == 3.5).all()


def test_classes_have_their_own_colours() -> None:
    colours = np.array([dense.colour(number) for number in range(40)] + [dense.NOBODY_KNOWS], int)
    apart = np.abs(colours[:, None] - colours).sum(2)[~np.eye(len(colours), dtype=bool)]
    assert apart.min() > 20
    mask = np.array([[0, 3], [UNKNOWN, 39]])
    assert dense.coloured(mask)[1].tolist() == [list(dense.NOBODY_KNOWS), list(dense.colour(39))]


def test_heights_are_shown_in_viridis() -> None:
    from matplotlib import colormaps

    shown = height.coloured(np.linspace(0, 9, 100)[None], 0, 9)[0].astype(int)
    wanted = np.rint(255 * colormaps["viridis"](np.linspace(0, 1, 100))[:, :3])
    assert np.abs(shown - wanted).max() <= 6
    assert height.coloured(np.array([[np.nan]]), 0, 1)[0, 0].tolist() == list(dense.NOBODY_KNOWS)


def test_change_shows_both_dates_and_what_of_the_answer_is_right() -> None:
    random = np.random.default_rng(0)
    dates = random.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    first, second = torch.zeros(2, 1, 3, 32, 32)
    truth = torch.zeros(1, 32, 32, dtype=torch.int64)
    truth[:, :10], truth[:, 30:] = 1, UNKNOWN
    answer = torch.zeros(1, 2, 32, 32)
    answer[:, 1, :, :16], answer[:, 0, :, 16:] = 1, 1
    sample = Sample({"rgb": first, SECOND: second}, np.array([0]), mask=truth)
    before, after, mask, said, right = CHANGE.shown(list(dates), answer, sample, 0, [])
    assert np.array_equal(before, dates[0]) and np.array_equal(after, dates[1])
    assert mask[0, 0].tolist() == list(dense.colour(1)) == said[20, 3].tolist()
    corners = [right[row, column].tolist() for row, column in ((0, 0), (0, 31), (20, 0), (20, 31))]
    assert corners == [list(change.FOUND), list(change.MISSED), list(change.FALSE), [255] * 3]
    assert right[31, 0].tolist() == list(dense.NOBODY_KNOWS)


# On real imagery


def opened(workspace: Any, task: Task, *folders: Path) -> SelectedTiles:
    """All tiles of real folders that a task can use, through ingest and select."""
    for folder in folders:
        if not folder.is_dir():
            pytest.skip("no real imagery beside the checkout")
    changes = {"ingest.sources": [str(folder) for folder in folders], "tasks": [task.name]}
    config.edit(workspace.params_file, changes)
    settings = Config.load(workspace.params_file)
    ingest(settings, workspace)
    out = workspace.work("select")
    out.mkdir(parents=True)
    select(settings, workspace, out)
    return SelectedTiles(workspace, out / f"{task.name}.parquet", task=task)


def batch(workspace: Any, tiles: SelectedTiles, task: Task, size: int, count: int) -> Sample:
    classes = task.classes(tiles, SETTINGS)
    sensors = {"rgb": Config.load(workspace.params_file).sensors["rgb"]}
    return next(Samples(task, tiles, classes, sensors, "cpu").batches(size, count))


def learnt(task: Task, tiles: Any, sample: Sample, settings: Finetune = SETTINGS) -> Any:
    """A model that has seen nothing but this batch, sixty times."""
    classes = task.classes(tiles, settings)
    torch.manual_seed(0)
    model: Any = task.model(encoder(SMALL, {"rgb": 3}), len(classes), settings)
    task.prepare(model, tiles, classes, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, sample, settings).backward()
        optimizer.step()
    return model.eval()


def compared(
    task: Task, model: Any, tiles: Any, sample: Sample
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the model and of the trivial answer, by the same way."""
    classes = task.classes(tiles, SETTINGS)
    with torch.no_grad():
        answers = task.answer(model, sample.images), task.trivial(tiles, sample, classes, SETTINGS)
    model_s, trivial_s = (
        task.figures(task.evidence(answer, sample), classes).whole for answer in answers
    )
    return model_s, trivial_s


def test_roads_are_learnt(workspace: Any) -> None:
    tiles = opened(workspace, SEGMENTATION, REAL / "segmentation" / "roads")
    assert len(tiles) == 60
    sample = batch(workspace, tiles, SEGMENTATION, 64, 6)
    model, trivial = compared(SEGMENTATION, learnt(SEGMENTATION, tiles, sample), tiles, sample)
    assert trivial["miou"] < 0.5 and model["miou"] > trivial["miou"] + 0.2


def test_changes_are_learnt(workspace: Any) -> None:
    tiles = opened(workspace, CHANGE, REAL / "change" / "levir-cd")
    assert len(tiles) == 8
    sample = batch(workspace, tiles, CHANGE, 64, 8)
    model, trivial = compared(CHANGE, learnt(CHANGE, tiles, sample), tiles, sample)
    assert trivial["f1"] == 0 and model["f1"] > 0.5 and model["accuracy"] > trivial["accuracy"]


def test_tiles_of_one_date_are_for_segmentation_and_pairs_for_change(
    workspace: Any, tmp_path: Path
) -> None:
    folders = REAL / "segmentation" / "roads", REAL / "change" / "levir-cd"
    tiles = opened(workspace, SEGMENTATION, *folders)
    manifest = tiles.store.manifest()
    assert int(SEGMENTATION.usable(manifest).sum()) == 60
    assert int(CHANGE.usable(manifest).sum()) == 8
    assert not HEIGHT.usable(manifest).any()
    assert not HEIGHT.usable(manifest.drop(columns="height_size", errors="ignore")).any()


def test_the_lie_of_the_land_is_learnt() -> None:
    """Real elevation (metres) under real Sentinel-2 imagery."""
    import rasterio

    folder = REAL / "geotiff" / "terramesh"
    if not folder.is_dir():
        pytest.skip("no real imagery beside the checkout")

    def read(kind: str) -> Tensor:
        files = sorted((folder / kind).glob("*.tif"))
        bands = []
        for file in files:
            with rasterio.open(file) as scene:
                bands.append(scene.read().astype(np.float32))
        return torch.from_numpy(np.stack(bands))

    metres, colours = read("DEM")[:, 0], read("S2RGB")
    heights = metres[:, :64, :64].clone()
    tiles = Tiles(
        height_mean=heights.mean((1, 2)).tolist(),
        height_std=heights.std((1, 2)).tolist(),
        height_min=heights.amin((1, 2)).tolist(),
        height_max=heights.amax((1, 2)).tolist(),
    )
    heights[:, :5] = torch.nan
    images = {"rgb": (colours[:, :, :64, :64] - 110) / 50}
    sample = Sample(images, np.arange(len(heights)), height=heights)
    model, trivial = compared(HEIGHT, learnt(HEIGHT, tiles, sample), tiles, sample)
    assert model["mae"] < trivial["mae"] / 3
    assert model["rmse"] < trivial["rmse"] / 3
