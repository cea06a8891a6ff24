import math
from typing import Any

import pytest
import torch
from scenes import TINY, TINY_VIT, scenes
from torch import Tensor, nn

from ringmo.models.backbone import encoder
from ringmo.models.detector import ANCHOR, Detector
from ringmo.models.oriented import OrientedDetector
from ringmo.tasks.base import Objects

BOTH = pytest.mark.parametrize("kind", [Detector, OrientedDetector])
NOTHING = Objects(torch.zeros(0, 4, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0).bool())


def made(kind: type[nn.Module], architecture: Any = TINY, classes: int = 2) -> Any:
    torch.manual_seed(0)
    return kind(encoder(architecture, {"rgb": 3}), classes)


def total(model: Any, images: dict[str, Tensor], objects: list[Objects]) -> Tensor:
    return torch.stack(list(model.losses(images, objects).values())).sum()


@BOTH
@pytest.mark.parametrize("architecture", [TINY, TINY_VIT], ids=["swin", "vit"])
def test_every_parameter_learns_from_objects(kind: type[nn.Module], architecture: Any) -> None:
    model = made(kind, architecture)
    images, objects = scenes(2, turned=True)
    total(model, images, objects).backward()
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    # A mean over all positions has no use for a class token's last answers.
    assert [name for name in unused if "cls_token" not in name] == []


@BOTH
def test_images_without_any_object_are_learnt_from(kind: type[nn.Module]) -> None:
    model = made(kind)
    images, objects = scenes(2, empty=1)
    for given in ([NOTHING, NOTHING], objects):
        losses = model.losses(images, given)
        assert all(math.isfinite(loss.item()) for loss in losses.values()), losses
    losses = model.losses(images, [NOTHING, NOTHING])
    assert losses["box"].item() == losses["proposal"].item() == 0
    total(model, images, [NOTHING, NOTHING]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@BOTH
def test_objects_that_cannot_be_seen_are_no_objects(kind: type[nn.Module]) -> None:
    model = made(kind)
    images, [first] = scenes(1)
    odd = torch.tensor(
        [
            [[5.0, 5], [5, 5], [5, 5], [5, 5]],  # a point
            [[5.0, 5], [30, 5], [30, 5], [5, 5]],  # a line
            [[100.0, 100], [120, 100], [120, 120], [100, 120]],  # outside
            [[-30.0, 5], [-10, 5], [-10, 20], [-30, 20]],
        ]
    )
    more = Objects(
        torch.cat((first.corners, odd)),
        torch.cat((first.labels, torch.zeros(4, dtype=torch.int64))),
        torch.cat((first.difficult, torch.zeros(4).bool())),
    )
    found = []
    for objects in (first, more):
        torch.manual_seed(1)
        found.append(total(model, images, [objects]))
    assert torch.equal(found[0], found[1])


@BOTH
def test_corners_may_go_either_way_round(kind: type[nn.Module]) -> None:
    model = made(kind)
    images, [objects] = scenes(1, turned=True)
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        torch.manual_seed(1)
        turned = Objects(objects.corners[:, order], objects.labels, objects.difficult)
        found.append(total(model, images, [turned]).item())
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@BOTH
def test_equal_seeds_give_equal_losses_bit_for_bit(kind: type[nn.Module]) -> None:
    images, objects = scenes(3, turned=True, empty=1)

    def trained() -> list[Tensor]:
        model = made(kind)
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        costs = []
        for step in range(3):
            torch.manual_seed(step)
            cost = total(model, images, objects)
            optimiser.zero_grad()
            cost.backward()
            optimiser.step()
            costs.append(cost.detach())
        return costs

    assert torch.equal(torch.stack(trained()), torch.stack(trained()))


@BOTH
def test_a_batch_costs_what_its_images_cost_on_average(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chance would draw other samples for an image that stands elsewhere in its batch.
    monkeypatch.setattr(
        torch, "randperm", lambda count, device=None: torch.arange(count, device=device)
    )
    # The other stem's BatchNorm sees the whole batch.
    model = made(kind, TINY.model_copy(update={"stem": "patch"}))
    images, objects = scenes(3, turned=True, empty=1)
    whole = model.losses(images, objects)
    alone = [model.losses({"rgb": images["rgb"][i : i + 1]}, objects[i : i + 1]) for i in range(3)]
    for name, cost in whole.items():
        mean = sum(one[name].item() for one in alone) / 3
        assert cost.item() == pytest.approx(mean, rel=1e-4, abs=1e-6), name


@BOTH
def test_answers_are_boxes_scores_and_labels_of_each_image(kind: type[nn.Module]) -> None:
    model = made(kind, classes=3).eval()
    images, _ = scenes(2)
    with torch.no_grad():
        found = model(images)
        again = model(images)
    assert len(found) == 2
    for one, same in zip(found, again, strict=True):
        assert one["boxes"].shape == (len(one["scores"]), 4 if kind is Detector else 5)
        assert one["labels"].dtype == torch.int64 and one["scores"].dtype == torch.float32
        assert len(one["labels"]) and one["labels"].min() >= 0 and one["labels"].max() < 3
        assert (one["scores"].diff() <= 0).all()
        assert one["scores"].min() > 0 and one["scores"].max() <= 1
        assert torch.equal(one["boxes"], same["boxes"])


@BOTH
def test_signature_tells_models_apart(kind: type[nn.Module]) -> None:
    images, _ = scenes(2)
    one, other = made(kind).eval(), made(kind).eval()
    with torch.no_grad():
        before = one.signature(images)
        assert before.shape[0] == 2 and torch.equal(before, other.signature(images))
        classes = list(other.heads.parameters())[-4]
        classes[1] += 0.1
        assert not torch.allclose(before, other.signature(images), atol=1e-3)


def test_anchors_reach_from_small_objects_to_the_whole_image() -> None:
    for architecture in (TINY, TINY_VIT, TINY.model_copy(update={"image_size": 224})):
        model = made(Detector, architecture)
        sizes = [size for sizes in model.rpn.anchor_generator.sizes for size in sizes]
        assert min(sizes) == ANCHOR * model.maps.strides[0] <= 16
        assert architecture.image_size <= max(sizes) < 4 * architecture.image_size
        images = {"rgb": torch.randn(1, 3, architecture.image_size, architecture.image_size)}
        maps = model.maps(model.encoder.stages(images))
        sides = [each.shape[-1] for each in maps.values()]
        assert sides == [-(-architecture.image_size // stride) for stride in model.maps.strides]
