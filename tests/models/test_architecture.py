import numpy as np
import pytest
import torch

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder, fuse_attention, transfer
from ringmo.models.classifier import Classifier
from ringmo.models.ringmo import RingMo, masked_l1
from ringmo.models.stem import STRIDES, PiConvStem

SMALL = Model(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)


@pytest.mark.parametrize("patch", STRIDES)
def test_stem_gives_one_token_a_patch_and_none_sees_its_neighbour(patch: int) -> None:
    stem = PiConvStem(img_size=64, patch_size=patch, in_chans=3, embed_dim=16).eval()
    images = torch.randn(1, 3, 64, 64)
    before = stem(images)
    assert before.shape == (1, 64 // patch, 64 // patch, 16)
    images[:, :, :patch, patch : 2 * patch] += 1
    changed = (stem(images) - before).abs().amax(-1)[0] > 0
    assert changed.nonzero().tolist() == [[0, 1]]


def test_stem_refuses_a_patch_it_has_no_strides_for() -> None:
    with pytest.raises(ValueError, match="not 5"):
        PiConvStem(img_size=20, patch_size=5, in_chans=3, embed_dim=16)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("stem", ["pi_conv", "patch"])
def test_any_number_of_stages_reconstructs_the_image(stages: int, stem: str) -> None:
    model = Model(
        image_size=64,
        embed_dim=16,
        depths=[1] * stages,
        num_heads=[2] * stages,
        window_size=4,
        stem=stem,  # type: ignore[arg-type]
    )
    trunk = encoder(model, bands=4)
    features = trunk(torch.randn(2, 4, 64, 64))
    assert features.shape == (2, 64 // trunk.stride, 64 // trunk.stride, trunk.num_features)
    images, mask = torch.randn(2, 4, 64, 64), torch.rand(2, 1, 64, 64) < 0.4
    assert RingMo(trunk, 4)(images, mask).shape == images.shape
    assert Classifier(trunk, 5)(images).shape == (2, 5)


def test_what_is_masked_cannot_reach_the_reconstruction() -> None:
    model = RingMo(encoder(SMALL, 3), 3).eval()
    images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 1, 32, 32) < 0.4
    hidden = torch.where(mask, torch.full_like(images, 9.0), images)
    assert torch.equal(model(images, mask), model(hidden, mask))


def test_loss_is_the_mean_error_on_masked_pixels() -> None:
    random = np.random.default_rng(3)
    images = random.normal(size=(2, 3, 8, 8)).astype("f4")
    guess = random.normal(size=(2, 3, 8, 8)).astype("f4")
    mask = random.random((2, 1, 8, 8)) < 0.4
    expected = (np.abs(images - guess) * mask).sum() / (mask.sum() + 1e-5) / 3
    tensors = (torch.from_numpy(guess), torch.from_numpy(images), torch.from_numpy(mask))
    assert masked_l1(*tensors).item() == pytest.approx(expected, rel=1e-5)
    half = masked_l1(tensors[0].bfloat16(), tensors[1], tensors[2])
    assert half.dtype == torch.float32


def test_fused_attention_gives_the_same_features() -> None:
    trunk = encoder(SMALL, 3).eval()
    images = torch.randn(2, 3, 32, 32)
    answers = []
    for fused in (False, True):
        fuse_attention(trunk, fused)
        with torch.inference_mode():
            answers.append(trunk(images))
    assert torch.allclose(*answers, atol=1e-5)


def test_encoder_weights_come_over_whole() -> None:
    first, second = encoder(SMALL, 3), encoder(SMALL, 3)
    came = transfer(first.state_dict(), second, "encoder")
    assert came.matched == len(first.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first.eval()(images), second.eval()(images))


def test_weights_of_another_architecture_are_refused_and_nothing_changes() -> None:
    trunk = encoder(SMALL, 3)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    wider = encoder(SMALL.model_copy(update={"embed_dim": 32}), 3).state_dict()
    deeper = encoder(SMALL.model_copy(update={"depths": [2, 1]}), 3).state_dict()
    fewer = dict(list(trunk.state_dict().items())[:-1])
    for weights, says in ((wider, "shape"), (deeper, "no place"), (fewer, "missing")):
        with pytest.raises(BadInput, match=says):
            transfer(weights, trunk, "encoder")
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())
