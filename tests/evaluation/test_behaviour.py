"""Measuring a model, and what it does when images change, with models whose behaviour is known."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_store
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ringmo.config import Sensor
from ringmo.data.loading import SelectedTiles
from ringmo.errors import BadInput
from ringmo.evaluation import behaviour as behaving
from ringmo.evaluation.behaviour import behaviour, changes
from ringmo.evaluation.measuring import (
    TURNS,
    answered,
    measured,
    part,
    trivial,
    turned_sample,
)
from ringmo.registry.bundle import PLAIN, Bundle
from ringmo.tasks import find
from ringmo.tasks.base import UNKNOWN, Images, Objects, Sample, joined
from ringmo.training.augmentation import turned

RGB = {"bands": ["red", "green", "blue"], "dtype": "uint8", "mean": [120.0] * 3, "std": [60.0] * 3}


class NearestColour(nn.Module):
    """Knows the classes' colours, and asks the tile's mean, of some bands only."""

    multi_label = False

    def __init__(self, bands: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(image_size=32)
        self.bands = list(bands)
        colours = torch.tensor([made_store.COLOURS[name] for name in sorted(made_store.COLOURS)])
        self.colours = (colours - 120) / 60

    def forward(self, images: Images) -> Tensor:
        mean = images["rgb"].mean((2, 3))[:, None, self.bands]
        return -10 * (mean - self.colours[:, self.bands]).square().sum(2)


def made(model: nn.Module, kind: str = "scene", classes: Any = None) -> Bundle:
    meta = {
        "kind": kind,
        "classes": sorted(made_store.COLOURS) if classes is None else classes,
        "sensors": {"rgb": RGB},
        "sensor": "rgb",
        "image_size": 32,
        "settings": PLAIN,
    }
    return Bundle(Path("made"), meta, model.eval(), "0", "cpu", {})


@pytest.fixture
def selection(workspace: Any) -> Path:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    path: Path = workspace.work("select") / "scene.parquet"
    return path


def test_only_what_a_model_looks_at_matters_to_it(workspace: Any, selection: Path) -> None:
    bundle = made(NearestColour((0,)))  # red alone
    tiles = bundle.tiles(workspace, selection, "test")
    evidence = measured(bundle, tiles)
    assert evidence["right"].all() and len(evidence["right"]) == len(tiles) == 12
    found = {one.change: one for one in behaviour(bundle, tiles, evidence, 200)}
    assert list(found) == list(changes(bundle))
    for name in ("mirrored", "turned 90", "turned 180", "turned 270", "noise"):
        one = found[name]
        assert (one.value, one.drop.value, one.drop.low, one.drop.high) == (1, 0, 0, 0)
    # Without red every tile is 120, nearest to Port's 60: a third is right. Other bands: nothing.
    lost = found["band lost"]
    assert lost.value == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert lost.drop.value == pytest.approx(2 / 9)
    assert 0 < lost.drop.low < 2 / 9 < lost.drop.high
    # Forest (30) becomes 54, which is Port's 60; Port (60) becomes 36: Forest's 30.
    assert found["brighter"].drop.value == pytest.approx(1 / 3)
    assert found["darker"].drop.value == pytest.approx(1 / 3)


def test_few_tiles_are_enough_and_the_same_for_every_change(
    workspace: Any, selection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behaving, "TILES", 4)
    bundle = made(NearestColour((0, 1, 2)))
    tiles = bundle.tiles(workspace, selection, "test")
    evidence = measured(bundle, tiles)
    asked: list[int] = []
    real = measured

    def counted(*given: Any, **named: Any) -> Any:
        asked.append(len(named["rows"]))
        return real(*given, **named)

    monkeypatch.setattr(behaving, "measured", counted)
    behaviour(bundle, tiles, evidence, 100)
    assert set(asked) == {4}
    assert len(asked) == 7 + 3  # of three bands each is lost once


def test_noise_is_the_tile_s_own(workspace: Any, selection: Path) -> None:
    bundle = made(NearestColour((0, 1, 2)))
    samples = bundle.samples(bundle.tiles(workspace, selection, "test"))
    (together,) = (behaving.noisy(sample) for sample in samples.batches(32, 64))
    apart = [behaving.noisy(sample) for sample in samples.batches(32, 5)]
    assert torch.equal(together.images["rgb"], torch.cat([one.images["rgb"] for one in apart]))
    (plain,) = samples.batches(32, 64)
    noise = together.images["rgb"] - plain.images["rgb"]
    assert float(noise.std()) == pytest.approx(behaving.NOISE, rel=0.02)
    assert not torch.equal(noise[0], noise[1])


def test_a_changed_tile_is_what_is_answered(workspace: Any, selection: Path) -> None:
    bundle = made(NearestColour((0, 1, 2)))
    tiles = bundle.tiles(workspace, selection, "test")

    def dark(sample: Sample) -> Sample:
        images = {name: torch.full_like(of, -2.0) for name, of in sample.images.items()}
        return Sample(images, sample.rows, sample.labels)

    forest = bundle.classes.index("Forest")
    assert (measured(bundle, tiles, change=dark)["predicted"] == forest).all()
    some = measured(bundle, tiles, rows=np.array([7, 2]))
    whole = measured(bundle, tiles)
    for name, of in part(whole, [7, 2]).items():
        assert np.array_equal(some[name], of)


def test_who_never_looks_says_the_commonest_class(workspace: Any, selection: Path) -> None:
    bundle = made(NearestColour((0, 1, 2)))
    train, test = (bundle.tiles(workspace, selection, split) for split in ("train", "test"))
    guessed = trivial(bundle, train, test)
    assert len(set(guessed["predicted"].tolist())) == 1 and len(guessed["right"]) == len(test)
    assert guessed["right"].mean() == pytest.approx(1 / 3)


def test_an_encoder_answers_nothing(workspace: Any, selection: Path) -> None:
    bundle = made(NearestColour((0,)), "encoder", [])
    with pytest.raises(BadInput, match="an encoder, which answers nothing"):
        measured(bundle, SelectedTiles(workspace, selection, "test"))


class Threshold(nn.Module):
    """Segmentation by brightness, or by what lies in the left half of the image."""

    def __init__(self, left: bool = False) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(image_size=32)
        self.left = left

    def forward(self, images: Images) -> Tensor:
        of = images["rgb"][:, 0]
        if self.left:
            of = torch.where(torch.arange(of.shape[-1]) < of.shape[-1] // 2, 1.0, -1.0).expand_as(
                of
            )
        return 20 * torch.stack((-of, of), 1)


def halves(count: int = 3) -> Sample:
    """Tiles that are bright on the left, with a mask that says so and an odd corner."""
    images = torch.full((count, 3, 32, 32), -1.0)
    images[..., :16] = 1.0
    images[0, :, :4, :8] = -1.0
    mask = (images[:, 0] > 0).long()
    mask[:, 31, 31] = UNKNOWN
    return Sample({"rgb": images}, np.arange(count), mask=mask)


@pytest.mark.parametrize("number", range(8))
def test_truth_turns_with_the_image(number: int) -> None:
    task, sample = find("segmentation"), halves()
    after = turned_sample(sample, number)
    answer = task.answer(Threshold(), after.images)
    assert task.figures(task.evidence(answer, after), ["low", "high"]).whole["miou"] == 1
    assert after.mask is not None and sample.mask is not None
    assert torch.equal(after.mask == UNKNOWN, turned(sample.mask, number) == UNKNOWN)
    # A model that goes by the place and not by what it sees is found out.
    placed = task.evidence(task.answer(Threshold(left=True), after.images), after)
    whole = part(placed, [1, 2])
    same = task.figures(whole, ["low", "high"]).whole["miou"] == 1
    assert same == (number in (0, 6))  # 6: mirrored and turned by half, so upside down


@pytest.mark.parametrize("number", range(8))
def test_objects_turn_with_the_image_and_stay_clockwise(number: int) -> None:
    """The middle of a bright rectangle is where its corners say."""
    images = torch.zeros(1, 3, 20, 20)
    images[:, :, 2:5, 3:13] = 1  # rows 2 to 5, columns 3 to 13
    corners = torch.tensor([[[3.0, 2.0], [13.0, 2.0], [13.0, 5.0], [3.0, 5.0]]])
    objects = Objects(corners, torch.tensor([4]), torch.tensor([True]))
    heights = torch.where(images[:, 0] > 0, 7.0, float("nan"))
    sample = Sample({"rgb": images}, np.arange(1), height=heights, objects=[objects])
    after = turned_sample(sample, number)
    assert after.objects is not None and after.height is not None
    (moved,) = after.objects
    left, top, right, bottom = (int(value) for value in moved.boxes[0])
    bright = torch.zeros(20, 20, dtype=torch.bool)
    bright[top:bottom, left:right] = True
    assert torch.equal(bright, after.images["rgb"][0, 0] > 0)
    assert torch.equal(bright, after.height[0] == 7)
    x, y = moved.corners[0].unbind(1)
    assert float((x * y.roll(-1) - x.roll(-1) * y).sum()) == 2 * 30  # clockwise, and as large
    assert (moved.labels, moved.difficult) == (objects.labels, objects.difficult)


def test_answers_in_several_positions_are_put_together() -> None:
    """The left half of the image, seen from all eight sides, is every half as often."""
    bundle = made(Threshold(left=True), "segmentation", ["low", "high"])
    sample = halves(1)
    for flips, turns in TURNS.items():
        answer = answered(bundle, sample, flips)
        assert isinstance(answer, Tensor) and len(turns) == flips
        by_hand = [
            turned(find("segmentation").answer(bundle.model, sample.images), turn) for turn in turns
        ]
        undone = torch.stack(by_hand).mean(0)
        assert flips > 4 or torch.allclose(answer, undone)  # these turns undo themselves
    assert torch.allclose(answer, torch.full_like(answer, 0.5))


def test_a_part_of_the_evidence_keeps_the_objects_of_its_tiles() -> None:
    parts = [
        {
            "right": np.array([1, 2]),
            "object_tile": np.array([1, 0, 1]),
            "object_score": np.array([0.1, 0.2, 0.3]),
        },
        {
            "right": np.array([3]),
            "object_tile": np.array([0]),
            "object_score": np.array([0.4]),
        },
    ]
    whole = joined(parts)
    found = part(whole, [2, 1])
    assert found["right"].tolist() == [3, 2]
    assert found["object_tile"].tolist() == [0, 1, 1]
    assert found["object_score"].tolist() == [0.4, 0.1, 0.3]
    assert part(whole, [])["object_tile"].tolist() == []


def test_what_one_band_holds_is_never_lost() -> None:
    bundle = made(NearestColour((0,)))
    sensor = Sensor.model_validate(RGB)
    assert len(sensor.bands) == 3 and "band lost" in changes(bundle)
    grey = {"bands": ["grey"], "dtype": "uint8", "mean": [120.0], "std": [60.0]}
    bundle.meta["sensors"] = {"rgb": grey}
    assert "band lost" not in changes(bundle)
