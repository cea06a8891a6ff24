import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from real import REAL
from scenes import TINY, scenes
from torch import Tensor, nn

from ringmo.config import Finetune
from ringmo.data import boxes as annotations
from ringmo.data.decode import decode
from ringmo.errors import BadInput
from ringmo.evaluation import pictures
from ringmo.inference.whole_images import _of_boxes
from ringmo.models import rotated
from ringmo.models.backbone import encoder
from ringmo.tasks import find
from ringmo.tasks.base import Objects, Sample, joined
from ringmo.tasks.objects import AT_EDGE, TOLD, Found, ObjectTask, drawn, own_boxes
from ringmo.training.augmentation import turned

NAMES = ("detection", "oriented")
EACH = pytest.mark.parametrize("name", NAMES)
SETTINGS = Finetune(
    epochs=2, warmup_epochs=0, batch_size=4, base_lr=1e-3, min_lr=0, crop_scale=(0.5, 1.0)
)
CLASSES = ["long", "square"]


def task_of(name: str) -> ObjectTask:
    task = find(name)
    assert isinstance(task, ObjectTask)
    return task


def sample(count: int, name: str, seed: int = 0, empty: int = 0, size: int = 64) -> Sample:
    images, objects = scenes(count, seed, size, turned=name == "oriented", empty=empty)
    return Sample(images, np.arange(count), objects=objects)


def perfect(task: ObjectTask, given: Sample, score: float = 0.9) -> list[Found]:
    assert given.objects is not None
    return [
        Found(
            task.true(one, given.size).corners,
            torch.full((len(one.labels),), score),
            one.labels,
            given.size,
        )
        for one in given.objects
    ]


class Tiles:
    def __init__(self, classes: list[list[str]]) -> None:
        self.table = pd.DataFrame({"boxes_classes": classes})

    def __len__(self) -> int:
        return len(self.table)


@EACH
def test_tiles_with_boxes_are_usable_even_without_an_object(name: str) -> None:
    tiles = pd.DataFrame({"boxes_size": [120, 0, 26]})
    assert task_of(name).usable(tiles).tolist() == [True, False, True]


@EACH
def test_classes_are_those_of_the_training_tiles(name: str) -> None:
    found = task_of(name).classes(Tiles([["ship"], [], ["car", "ship"]]), SETTINGS)
    assert found == ["car", "ship"]
    with pytest.raises(BadInput, match="no object in any"):
        task_of(name).classes(Tiles([[], []]), SETTINGS)


@EACH
def test_perfect_answers_have_perfect_figures_and_no_answer_none(name: str) -> None:
    task, given = task_of(name), sample(6, name, empty=2)
    evidence = task.evidence(perfect(task, given), given)
    figures = task.figures(evidence, CLASSES)
    assert figures.whole["map50"] == pytest.approx(1)
    assert task.metric in figures.whole
    assert [row["class"] for row in figures.classes] == CLASSES
    assert sum(row["objects"] for row in figures.classes) == evidence["objects"].sum()
    assert all(row["best_f1"] == 1 and row["ap50"] == pytest.approx(1) for row in figures.classes)
    assert task.quality(evidence, CLASSES).tolist() == [1] * 6
    none = task.trivial(Tiles([["long"]]), given, CLASSES, SETTINGS)
    nothing = task.evidence(none, given)
    assert task.figures(nothing, CLASSES).whole["map50"] == 0
    assert task.quality(nothing, CLASSES).tolist() == [0] * 4 + [1] * 2


@EACH
def test_weights_choose_tiles(name: str) -> None:
    task, given = task_of(name), sample(4, name)
    answer = perfect(task, given)
    answer[0] = answer[0].taken(torch.zeros(0, dtype=torch.int64))
    evidence = task.evidence(answer, given)
    assert 0 < task.figures(evidence, CLASSES).whole["map50"] < 1
    chosen = np.array([0, 1, 1, 1])
    assert task.figures(evidence, CLASSES, chosen).whole["map50"] == pytest.approx(1)
    assert task.figures(evidence, CLASSES, 1 - chosen).whole["map50"] == 0
    nothing = task.figures(evidence, CLASSES, 0 * chosen)
    assert math.isnan(nothing.whole["map50"]) and nothing.classes == []


@EACH
def test_a_class_that_only_the_test_tiles_have_counts_as_missed(name: str) -> None:
    task, given = task_of(name), sample(4, name)
    answer = perfect(task, given)
    assert given.objects is not None
    first = given.objects[0]
    given.objects[0] = Objects(first.corners, first.labels + 2, first.difficult)
    kinds = len({int(label) for one in given.objects for label in one.labels})
    answer[0] = answer[0].taken(torch.zeros(0, dtype=torch.int64))
    unknown = len(set(first.labels.tolist()))
    figures = task.figures(task.evidence(answer, given), [*CLASSES, "third", "fourth"])
    assert figures.whole["map50"] == pytest.approx((kinds - unknown) / kinds)
    missed = [row for row in figures.classes if row["class"] in ("third", "fourth")]
    assert len(missed) == unknown and all(row["ap50"] == 0 for row in missed)


@EACH
def test_evidence_of_batches_is_evidence_of_the_whole(name: str) -> None:
    task, given = task_of(name), sample(5, name)
    assert given.objects is not None
    answer = perfect(task, given)
    whole = task.evidence(answer, given)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        some = Sample(
            {"rgb": given.images["rgb"][part]}, given.rows[part], objects=given.objects[part]
        )
        parts.append(task.evidence(answer[part], some))
    together = joined(parts)
    for key, rows in whole.items():
        assert np.array_equal(rows, together[key], equal_nan=rows.dtype.kind == "f"), key


@EACH
@pytest.mark.parametrize("number", range(8))
def test_what_was_found_on_a_turned_image_is_turned_back(name: str, number: int) -> None:
    task, given = task_of(name), sample(1, name, seed=3)
    assert given.objects is not None
    # A point's way is found by pixels: one bright pixel, turned as images are.
    size = given.size
    moved = []
    for x, y in given.objects[0].corners.reshape(-1, 2).round().clamp(0, size - 1).tolist():
        image = torch.zeros(size, size)
        image[int(y), int(x)] = 1
        row, column = divmod(int(turned(image, number).argmax()), size)
        moved.append([column + 0.5, row + 0.5])
    corners = torch.tensor(moved).reshape(-1, 4, 2)
    if number >= 4:  # a model answers clockwise on any image
        corners = corners[:, [1, 0, 3, 2]]
    labels = given.objects[0].labels
    on_turned = [Found(corners, torch.linspace(0.9, 0.8, len(labels)), labels, size)]
    [back] = task.turned_back([on_turned], [number])
    wanted = given.objects[0].corners.round().clamp(0, size - 1) + 0.5
    assert len(back.labels) == len(labels)
    for found, true in zip(back.corners, wanted, strict=True):
        distance = torch.cdist(found, true)
        assert distance.amin(0).max() < 1e-4 and distance.amin(1).max() < 1e-4
    x, y = back.corners.unbind(2)
    assert ((x * y.roll(-1, 1) - x.roll(-1, 1) * y).sum(1) > 0).all()  # still clockwise


@EACH
def test_answers_on_turned_images_become_one(name: str) -> None:
    task, given = task_of(name), sample(2, name)
    answer = perfect(task, given)
    quarter = [[Found(c.corners.clone(), c.scores - 0.1, c.labels, c.size) for c in answer]] * 2
    both = task.turned_back([answer, *quarter], [0, 0, 0])
    for one, true in zip(both, answer, strict=True):
        assert len(one.labels) == len(true.labels)
        assert one.scores.min() > 0.85


class Bright(nn.Module):
    """Says a box of class 0 for each bright square of an image, as far as the image shows it."""

    def __init__(self, size: int, values: int) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.image_size = size
        self.values = values

    def forward(self, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images["rgb"][:, 0]:
            boxes = []
            for value in image.unique().tolist():
                if value > 0:
                    rows, columns = (image == value).nonzero().unbind(1)
                    spans = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    boxes.append([float(v) for v in spans])
            spans = torch.tensor(boxes).reshape(-1, 4)
            said = spans if self.values == 4 else rotated.from_spans(spans)
            labels = torch.zeros(len(boxes), dtype=torch.int64)
            found.append(
                {"boxes": said, "scores": torch.full((len(boxes),), 0.9), "labels": labels}
            )
        return found


@EACH
def test_windows_of_a_larger_image_find_each_object_once_and_whole(name: str) -> None:
    task = task_of(name)
    image = torch.zeros(1, 3, 150, 150)
    true = [
        [5, 5, 14, 12],
        [44, 40, 56, 50],
        [70, 2, 78, 15],
        [100, 100, 149, 109],
        [90, 60, 97, 68],
    ]
    for number, (left, top, right, bottom) in enumerate(true, 1):
        image[:, :, top:bottom, left:right] = number
    [found] = task.answer(Bright(64, 4 if name == "detection" else 5), {"rgb": image})
    assert found.size == 150
    assert sorted(found.boxes.round().int().tolist()) == sorted(true)
    [small] = task.answer(Bright(150, 4 if name == "detection" else 5), {"rgb": image})
    assert sorted(small.boxes.round().int().tolist()) == sorted(true)


def test_a_box_as_wide_as_the_overlap_is_one_window_s() -> None:
    """Both have it as cut."""
    starts, size = [0, 40], 64
    low, high = torch.tensor([starts[1] + AT_EDGE]), torch.tensor([starts[0] + size - AT_EDGE])
    owners = [bool(own_boxes(low, high, starts, step, size)) for step in (0, 1)]
    assert owners == [False, True]


@EACH
def test_users_are_told_corners_classes_and_scores_from_the_floor_on(name: str) -> None:
    task, given = task_of(name), sample(1, name)
    [found] = perfect(task, given)
    found.scores[-1] = TOLD / 2
    [told] = task.told([found], CLASSES)
    assert len(told["boxes"]) == len(found.labels) - 1 > 0
    for box, corners, label in zip(told["boxes"], found.corners, found.labels, strict=False):
        assert box["class"] == CLASSES[label] and box["score"] == 0.9
        assert torch.allclose(torch.tensor(box["points"]), corners, atol=0.006)
        assert box["box"][0] == pytest.approx(min(x for x, _ in box["points"]))


@EACH
def test_pictures_show_what_was_missed_and_what_is_wrong(name: str) -> None:
    task, given = task_of(name), sample(2, name, empty=1)
    image = np.zeros((64, 64, 3), np.uint8)
    answer = perfect(task, given)
    truth, said = task.shown([image], answer, given, 0, CLASSES)
    assert truth.shape == said.shape == (256, 256, 3) and truth.dtype == np.uint8
    assert np.array_equal(truth, said) and truth.any()
    nothing = [one.taken(one.labels < 0) for one in answer]
    missed, empty = task.shown([image], nothing, given, 0, CLASSES)
    assert not empty.any() and (missed != truth).any()
    wrong = [Found(o.corners, o.scores, 1 - o.labels, o.size) for o in answer]
    _, crossed = task.shown([image], wrong, given, 0, CLASSES)
    assert (crossed > 0).sum() > (said > 0).sum()
    assert not any(one.any() for one in task.shown([image], answer, given, 1, CLASSES))


def test_upright_truth_is_cut_off_at_the_image_and_rotated_truth_is_not() -> None:
    corners = torch.tensor(
        [
            [[-10.0, 10], [10, 10], [10, 20], [-10, 20]],
            [[70.0, 10], [90, 10], [90, 20], [70, 20]],
            [[30.0, 30], [30, 30], [40, 40], [40, 40]],
        ]
    )
    objects = Objects(corners, torch.zeros(3, dtype=torch.int64), torch.zeros(3).bool())
    upright = task_of("detection").true(objects, 64)
    assert upright.boxes.tolist() == [[0, 10, 10, 20], [30, 30, 40, 40]]
    turned_ones = task_of("oriented").true(objects, 64)
    assert turned_ones.boxes.round().tolist() == [[-10, 10, 10, 20], [70, 10, 90, 20]]
    assert turned_ones.difficult.tolist() == [False, True]


def fitted(
    task: ObjectTask, given: Sample, steps: int, rate: float = 2e-3, classes: int = 2
) -> Any:
    torch.manual_seed(0)
    model: Any = task.model(encoder(TINY, {"rgb": 3}), classes, SETTINGS)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    for step in range(steps):
        torch.manual_seed(step)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10, 2 * (1 - step / steps))
        cost = task.loss(model, given, SETTINGS)
        optimiser.zero_grad()
        cost.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    return model.eval()


@pytest.mark.slow
@EACH
@pytest.mark.long
def test_a_small_batch_can_be_learnt_by_heart(name: str) -> None:
    task, given = task_of(name), sample(6, name, empty=1)
    model = fitted(task, given, 100)
    with torch.no_grad():
        answer = task.answer(model, given.images)
    figures = task.figures(task.evidence(answer, given), CLASSES).whole
    assert figures["map50"] > 0.8, figures


@pytest.mark.slow
@pytest.mark.long
@EACH
def test_objects_of_scenes_never_seen_are_found(name: str) -> None:
    task, given = task_of(name), sample(24, name)
    model = fitted(task, given, 120)
    unseen = sample(12, name, seed=99)
    with torch.no_grad():
        evidence = task.evidence(task.answer(model, unseen.images), unseen)
    assert task.figures(evidence, CLASSES).whole["map50"] > 0.5


def real_sample(name: str) -> tuple[Sample, list[str]]:
    """Real images around some objects, 64 pixels, as their annotations have them."""
    folder, kind = (("rsod", "annotations"), ("dota", "labelTxt"))[NAMES.index(name)]
    root = REAL / "detection" / folder
    if not root.is_dir():
        pytest.skip("no real imagery beside the checkout")
    crops, objects, names = [], [], []
    files = sorted((root / "images").iterdir())
    for path in files[:: max(1, len(files) // 4)]:  # they are sorted by class
        image = decode(path.read_bytes())[:, :, :3]
        [file] = (root / kind).glob(f"{path.stem}.*")
        try:
            found = annotations.read(file, image.shape[:2])
        except BadInput:  # one of DOTA's is of another cut of its scene
            continue
        corners = torch.tensor([box.points for box in found])
        names += [n for n in dict.fromkeys(box.name for box in found) if n not in names]
        # About some of its objects, as large as shows them whole.
        for about in (0,) if len(files) > 4 else (0, len(found) // 2):
            low, high = corners[about].amin(0), corners[about].amax(0)
            side = int(max(48, 1.6 * float((high - low).max())))
            left, top = ((low + high) / 2 - side / 2).int().clamp(min=0).tolist()
            part = image[top : top + side, left : left + side]
            side = min(part.shape[:2])
            pixels = torch.tensor(part[:side, :side]).permute(2, 0, 1)[None].float() / 64 - 2
            crops.append(nn.functional.interpolate(pixels, (64, 64), mode="area")[0])
            moved = (corners - torch.tensor([left, top])) * 64 / side
            inside = ((moved >= 0) & (moved <= 64)).flatten(1).all(1)
            numbers = torch.tensor([names.index(box.name) for box in found])
            difficult = torch.tensor([box.difficult for box in found])
            objects.append(Objects(moved[inside], numbers[inside], difficult[inside]))
    return Sample({"rgb": torch.stack(crops)}, np.arange(len(crops)), objects=objects), names


@pytest.mark.slow
@EACH
@pytest.mark.long
def test_real_objects_can_be_learnt_by_heart(name: str) -> None:
    task, (given, names) = task_of(name), real_sample(name)
    model = fitted(task, given, 100, classes=len(names))
    with torch.no_grad():
        evidence = task.evidence(task.answer(model, given.images), given)
    assert evidence["objects"].sum() >= 2
    assert task.figures(evidence, names).whole["map50"] > 0.5


def test_upright_answers_end_at_the_image_and_what_lies_in_the_padding_is_left_out() -> None:
    """An image of 50x20 pixels, answered as a square of 25 that holds it at half its size."""

    def box(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
        points = [[left, top], [right, top], [right, bottom], [left, bottom]]
        return {"class": "a", "score": 0.9, "points": points, "box": [left, top, right, bottom]}

    turned = {**box(2, 4, 8, 14), "points": [[5, 4], [8, 9], [5, 14], [2, 9]]}
    boxes = [box(-1, 2, 5, 4), box(20, 8, 26, 11), box(5, 11, 9, 15), turned]
    kept = _of_boxes(boxes, 2.0, 20, 50)
    assert [one["box"] for one in kept] == [[0, 4, 10, 8], [40, 16, 50, 20], [4, 8, 16, 28]]
    assert kept[0]["points"] == [[0, 4], [10, 4], [10, 8], [0, 8]]
    assert kept[2]["points"] == [[10, 8], [16, 18], [10, 28], [4, 18]]


def test_a_sheet_of_answers_names_the_colours_of_its_classes(tmp_path: Path) -> None:
    legend = task_of("detection").legend(CLASSES)
    assert [name for name, _ in legend] == CLASSES
    dark = np.zeros((8, 8, 3), np.uint8)
    truth = drawn(dark, torch.rand(1, 4, 2) * 8, torch.tensor([1]), np.array([False]), 8)
    assert (truth == legend[1][1]).all(-1).any()  # the colour that its objects have
    tall = {}
    for name, names in (("with", legend), ("without", [])):
        pictures.answers(tmp_path / f"{name}.png", [[dark]], ["a tile"], "tiles", names)
        sheet = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        tall[name] = len(sheet)
        shown = [bool((sheet == ink).all(-1).any()) for _, ink in legend]
        assert shown == [name == "with"] * len(CLASSES)
    assert tall["with"] > tall["without"]
