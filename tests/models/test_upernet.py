"""Models with an answer for each pixel work on every encoder, learn, and look where they should."""

from typing import Any

import pytest
import torch
from backbones import BACKBONES
from test_pyramid import EACH, RGB
from torch import nn

from ringmo.config import Model
from ringmo.models.backbone import encoder
from ringmo.models.upernet import Dense, Heights, Siamese
from ringmo.tasks.base import Images

TWO = {"rgb": 3, "sar": 2}


def images(model: Model, count: int = 2, *, second: bool = False) -> Images:
    size = model.image_size
    made = {"rgb": torch.randn(count, 3, size, size), "sar": torch.randn(count, 2, size, size)}
    return {**made, "second": torch.randn_like(made["rgb"])} if second else made


@EACH
def test_answers_have_the_images_size_and_every_weight_learns(model: Model) -> None:
    for made, given, shape in (
        (Dense(encoder(model, TWO), 5), images(model), (2, 5)),
        (Siamese(encoder(model, TWO), 2), images(model, second=True), (2, 2)),
        (Heights(encoder(model, TWO)), images(model), (2,)),
    ):
        said = made(given)
        assert said.shape == (*shape, model.image_size, model.image_size)
        said.square().sum().backward()
        still = [n for n, p in made.named_parameters() if p.grad is None]
        assert still == [], "two ranks would wait for their gradients"


@EACH
def test_one_image_is_enough_for_a_training_step(model: Model) -> None:
    made = Siamese(encoder(model, TWO), 2).train()
    made(images(model, 1, second=True)).sum().backward()


def test_it_looks_at_all_sensors() -> None:
    model = BACKBONES["swin of 2"]
    made = _lively(Dense(encoder(model, TWO), 3))
    given = images(model)
    for name in given:
        other = {**given, name: given[name] + torch.randn_like(given[name])}
        assert not torch.allclose(made(given), made(other), atol=1e-4)


@EACH
def test_two_equal_dates_are_alike_everywhere(model: Model) -> None:
    made = _lively(Siamese(encoder(model, RGB), 2))
    given = images(model, second=True)
    same = {"rgb": given["rgb"], "second": given["rgb"]}
    other = {"rgb": given["second"], "second": given["second"]}
    assert torch.allclose(made(same), made(other), atol=1e-5), "it looks at more than the change"
    assert not torch.allclose(
        made(same), made({"rgb": given["rgb"], "second": given["second"]}), atol=1e-3
    )


def test_the_order_of_dates_makes_no_difference() -> None:
    model = BACKBONES["swin of 3"]
    made = _lively(Siamese(encoder(model, TWO), 2))
    given = images(model, second=True)
    swapped = {**given, "rgb": given["second"], "second": given["rgb"]}
    assert torch.allclose(made(given), made(swapped), atol=1e-5)


def test_heights_are_metres_from_the_mean_in_its_unit() -> None:
    model = BACKBONES["vit"]
    made = _lively(Heights(encoder(model, RGB)))
    given = {"rgb": images(model)["rgb"]}
    plain = made(given)
    made.mean_m.fill_(300.0)
    made.unit_m.fill_(25.0)
    assert torch.allclose(made(given), 300 + 25 * plain, atol=1e-3)
    again = Heights(encoder(model, RGB)).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(given), made(given)), "mean and unit belong to the weights"


def test_batch_norm_is_what_ranks_convert() -> None:
    made = Dense(encoder(BACKBONES["swin of 4"], RGB), 2)
    kinds = {
        type(m) for m in made.upernet.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    }
    assert kinds == {nn.BatchNorm2d}


def test_class_weights_are_no_part_of_the_state() -> None:
    made = Dense(encoder(BACKBONES["vit"], RGB), 2)
    made.class_weights = torch.ones(2)
    assert "class_weights" not in made.state_dict()
    assert made.to(torch.float64).class_weights.dtype == torch.float64, "it moves with the model"


@pytest.mark.parametrize("name", ["swin of 4", "vit"])
def test_it_can_be_told_where_a_square_lies(name: str) -> None:
    """A model, decoder included, that cannot place what it sees would pass any test of shapes."""
    torch.manual_seed(0)
    model = BACKBONES[name]
    made = Dense(encoder(model, RGB), 2).train()
    size = model.image_size
    truth = torch.zeros(4, size, size, dtype=torch.int64)
    for i, (top, left) in enumerate(
        ((0, 0), (0, size // 2), (size // 2, 0), (size // 4, size // 4))
    ):
        truth[i, top : top + size // 2, left : left + size // 2] = 1
    given = {"rgb": 0.3 * torch.randn(4, 3, size, size) + truth[:, None]}
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(given), truth).backward()
        optimizer.step()
    right = (made(given).argmax(1) == truth).float().mean()
    assert right > 0.95, "the commonest class alone has 0.75"


def _lively(model: Any) -> Any:
    """Weights of a size that shows differences, in evaluation mode."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 if "head" in name else 0.1)
    return model.eval()
