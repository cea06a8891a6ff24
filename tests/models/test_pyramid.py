"""Every backbone gives feature maps of the scales it promises, from one sensor or several."""

import pytest
import torch
from backbones import BACKBONES, VIT

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder
from ringmo.models.pyramid import Pyramid

RGB = {"rgb": 3}
EACH = pytest.mark.parametrize("model", BACKBONES.values(), ids=list(BACKBONES))


@EACH
def test_maps_have_the_channels_and_strides_they_promise(model: Model) -> None:
    made = encoder(model, RGB)
    pyramid = Pyramid(made)
    images = torch.randn(2, 3, model.image_size, model.image_size)
    stages = made.stages({"rgb": images})
    maps = pyramid(stages)
    for found, channels, strides in (
        (stages, made.stage_channels, made.stage_strides),
        (maps, pyramid.channels, pyramid.strides),
    ):
        assert len(found) == len(channels) == len(strides)
        for each, width, stride in zip(found, channels, strides, strict=True):
            side = -(-model.image_size // stride)
            assert each.shape == (2, width, side, side)
    sum(each.square().sum() for each in maps).backward()
    unused = [
        name
        for module in (made, pyramid)
        for name, parameter in module.named_parameters()
        if parameter.grad is None
    ]
    assert unused == [], "two ranks would wait for their gradients"


@EACH
def test_the_last_stage_is_what_the_encoder_returns(model: Model) -> None:
    made = encoder(model, RGB).eval()
    images = torch.randn(2, 3, model.image_size, model.image_size)
    assert torch.equal(made.stages({"rgb": images})[-1].permute(0, 2, 3, 1), made(images))


def test_a_vit_s_scales_are_four_of_its_patches() -> None:
    pyramid = Pyramid(encoder(VIT, RGB))
    patch = VIT.patch_size
    assert pyramid.strides == [patch // 4, patch // 2, patch, patch * 2]


def test_stages_leave_the_names_of_weights_as_they_were() -> None:
    names = {name.split(".")[0] for name in encoder(BACKBONES["swin of 2"], RGB).state_dict()}
    assert names == {"stems", "trunk"}


@EACH
def test_tokens_of_several_sensors_are_averaged(model: Model) -> None:
    made = encoder(model, {"rgb": 3, "sar": 2}).eval()
    size = model.image_size
    images = {"rgb": torch.randn(2, 3, size, size), "sar": torch.randn(2, 2, size, size)}
    each = [made.tokens(of, name) for name, of in images.items()]
    assert torch.allclose(made.tokens(images), (each[0] + each[1]) / 2)
    assert torch.equal(made({"sar": images["sar"]}), made(images["sar"], "sar"))
    assert torch.allclose(made(images), made.trunk((each[0] + each[1]) / 2))
    with pytest.raises(BadInput, match="second"):
        made({**images, "second": images["rgb"]})
