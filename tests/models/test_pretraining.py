"""RingMo, SimMIM and MAE: one interface, three ways to hide pixels."""

import numpy as np
import pytest
import torch
from test_architecture import SINCOS, SMALL, VIT, VIT_B, VIT_L
from torch import Tensor, nn

from ringmo.config import Model, Pretrain
from ringmo.errors import BadInput
from ringmo.models.lbp import local_binary_pattern
from ringmo.models.mae import MAE
from ringmo.models.pretraining import pretraining_model
from ringmo.models.ringmo import RingMo, masked_l1

BANDS = {"rgb": 3, "s1": 2}


def settings(method: str, **values: object) -> Pretrain:
    given = {
        "epochs": 2, "warmup_epochs": 1, "batch_size": 4, "base_lr": 1e-3, "min_lr": 0.0,
        "crop_scale": (0.5, 1.0), "mask_patch_size": 8, "mask_ratio": 0.6,
    }  # fmt: skip
    return Pretrain.model_validate({**given, "method": method, **values})


def built(method: str, model: Model = SINCOS, **values: object) -> RingMo | MAE:
    torch.manual_seed(0)
    made = pretraining_model(model, settings(method, **values), BANDS)
    for parameter in made.parameters():  # LayerScale and zeros would hide mistakes
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return made


CASES = [
    ("ringmo", SMALL), ("ringmo", VIT), ("ringmo", SINCOS),
    ("simmim", SMALL), ("simmim", VIT), ("simmim", SINCOS),
    ("mae", SINCOS),
]  # fmt: skip
ALL = pytest.mark.parametrize(("method", "model"), CASES)


def draw(model: RingMo | MAE, batch: int = 4, seed: int = 0) -> Tensor:
    return model.masks(batch, torch.Generator().manual_seed(seed))


@ALL
def test_loss_is_a_float32_number_and_reaches_every_weight_of_the_sensor(
    method: str, model: Model
) -> None:
    made = built(method, model, lbp=True)
    images = torch.randn(4, 2, 32, 32)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = made(images, draw(made), "s1")
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
        made.zero_grad()
        loss.backward()
        without = [n for n, p in made.named_parameters() if p.grad is None]
        assert without and all(".rgb." in name for name in without)
    assert made.reconstruct(images, draw(made), "s1").shape == images.shape
    with pytest.raises(BadInput, match="name the sensor"):
        made(images, draw(made))


@ALL
def test_what_is_masked_cannot_reach_the_reconstruction(method: str, model: Model) -> None:
    made = built(method, model).eval()
    images, mask = torch.randn(4, 3, 32, 32), draw(made)
    if method == "mae":  # whose pictures borrow each patch's mean and deviation
        parts = made._patches(torch.rand(4, 3, 32, 32))  # type: ignore[operator]
        hidden = mask[:, 0, ::8, ::8].flatten(1)
        other = made._patches(images) * 1.0  # type: ignore[operator]
        other[hidden] = parts[hidden]
        seen = [made._decode(i, mask, "rgb")[0] for i in (images, _whole(other))]  # type: ignore[operator]
        assert torch.equal(*seen)
        return
    hidden_images = torch.where(mask, torch.full_like(images, 9.0), images)
    shown = [made.reconstruct(i, mask, "rgb") for i in (images, hidden_images)]
    assert torch.equal(*shown)
    # And what is not masked does: the comparison above is no coincidence.
    assert not torch.equal(shown[0], made.reconstruct(images + 1, mask, "rgb"))


def _whole(patches: Tensor) -> Tensor:
    cut = patches.reshape(4, 4, 4, 8, 8, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(4, 3, 32, 32)


@ALL
def test_loss_hears_of_masked_pixels_alone(method: str, model: Model) -> None:
    """The target's gradient is nowhere but on masked pixels (MAE: in masked patches)."""
    made = built(method, model).eval()
    images, mask = torch.randn(4, 3, 32, 32), draw(made)
    # Only as a target: what the model sees is cut off from the gradient.
    target = images.clone().requires_grad_()
    if method == "mae":
        guess, hidden = made._decode(images, mask, "rgb")  # type: ignore[operator]
        made._decode = lambda *_: (guess.detach(), hidden)  # type: ignore[assignment, method-assign]
    else:
        features = made._features(images, mask, "rgb")  # type: ignore[operator]
        made._features = lambda *_: features.detach()  # type: ignore[assignment, method-assign]
    made(target, mask, "rgb").backward()
    assert target.grad is not None
    reached = target.grad.abs().sum(1, keepdim=True) > 0
    assert not reached[~mask].any()
    assert reached[mask].float().mean() > 0.99


@ALL
def test_losses_of_halves_average_to_the_whole(method: str, model: Model) -> None:
    made = built(method, model, lbp=True).eval()
    images, mask = torch.randn(8, 3, 32, 32), draw(made, 8)
    whole = made(images, mask, "rgb")
    halves = [made(i, m, "rgb") for i, m in zip(images.chunk(2), mask.chunk(2), strict=True)]
    assert torch.allclose(sum(halves) / 2, whole, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("method", ["ringmo", "simmim"])
def test_loss_is_that_of_the_reconstruction(method: str) -> None:
    made = built(method, SMALL).eval()
    images, mask = torch.randn(4, 3, 32, 32), draw(made)
    wanted = masked_l1(made.reconstruct(images, mask, "rgb"), images, mask)
    assert torch.allclose(made(images, mask, "rgb"), wanted)


@pytest.mark.parametrize("model", [SMALL, VIT], ids=["swin", "vit"])
def test_ringmo_sees_zero_where_single_pixels_are_masked(model: Model) -> None:
    made = built("ringmo", model).eval()
    assert made.mask_token is None
    images, mask = torch.randn(4, 3, 32, 32), draw(made)
    per_patch = mask.view(4, 4, 8, 4, 8).sum((2, 4))
    assert set(per_patch.unique().tolist()) == {0, 39}  # ceil(0.6 · 64)
    assert ((per_patch > 0).sum((1, 2)) == 10).all()  # ceil(0.6 · 16)
    wanted = made.decoders["rgb"](
        made.encoder(images * ~mask, "rgb").permute(0, 3, 1, 2)
    )  # fmt: skip
    assert torch.equal(made.reconstruct(images, mask, "rgb"), wanted)


@pytest.mark.parametrize("model", [SMALL, VIT], ids=["swin", "vit"])
def test_simmim_puts_a_learnt_token_in_place_of_masked_patches(model: Model) -> None:
    made = built("simmim", model, inside_ratio=0.3).eval()
    images, mask = torch.randn(4, 3, 32, 32), draw(made)
    patches = mask.view(4, 4, 8, 4, 8)
    assert torch.equal(patches.any(4).any(2), patches.all(4).all(2))  # whole patches
    assert (mask.sum((1, 2, 3)) == 10 * 64).all()
    size, seen = model.patch_size, []
    made.encoder.trunk.register_forward_pre_hook(lambda _, tokens: seen.append(tokens[0]))
    made.reconstruct(images, mask, "rgb")
    stem = made.encoder.tokens(images, "rgb")
    for y in range(32 // size):
        for x in range(32 // size):
            hidden = mask[:, 0, y * size, x * size]
            assert (seen[0][hidden, y, x] == made.mask_token).all()
            assert torch.equal(seen[0][~hidden, y, x], stem[~hidden, y, x])


def test_simmim_masks_must_not_cut_through_tokens() -> None:
    with pytest.raises(BadInput, match="cuts through tokens"):
        built("simmim", VIT, mask_patch_size=4)


def test_the_second_target_is_the_local_binary_pattern() -> None:
    made = built("ringmo", SMALL, lbp=True).eval()
    images, mask = torch.randn(4, 3, 32, 32), draw(made)
    assert made.lbp_decoders is not None
    features = made.encoder(images.masked_fill(mask, 0), "rgb").permute(0, 3, 1, 2)
    first = masked_l1(made.decoders["rgb"](features), images, mask)
    texture = local_binary_pattern(images) / 9
    second = masked_l1(made.lbp_decoders["rgb"](features), texture, mask)
    assert torch.allclose(made(images, mask, "rgb"), first + second)
    assert built("ringmo", SMALL).lbp_decoders is None


def test_decoder_is_one_convolution_and_a_pixel_shuffle() -> None:
    for model, features, side in ((SMALL, 32, 8), (VIT, 32, 8)):
        convolution, shuffle = built("ringmo", model).decoders["rgb"]  # type: ignore[misc]
        assert convolution.weight.shape == (side**2 * 3, features, 1, 1)
        assert shuffle.upscale_factor == side


def test_mae_s_encoder_sees_only_what_is_not_masked() -> None:
    made = built("mae", mask_ratio=0.75)
    assert isinstance(made, MAE) and made.kept == 4
    seen: list[Tensor] = []
    made.encoder.trunk.blocks.register_forward_pre_hook(lambda _, tokens: seen.append(tokens[0]))
    mask = draw(made)
    assert (mask.sum((1, 2, 3)) == 12 * 64).all()
    made(torch.randn(4, 3, 32, 32), mask, "rgb")
    assert seen[0].shape == (4, 5, 32)  # and the class token


def test_mae_s_loss_is_on_the_normalised_pixels_of_masked_patches() -> None:
    made = built("mae", mask_ratio=0.75).eval()
    assert isinstance(made, MAE)
    images, mask = torch.randn(2, 3, 32, 32) * 3 + 1, draw(made, 2)
    with torch.no_grad():
        guess, _ = made._decode(images, mask, "rgb")
        total, count = 0.0, 0
        for n in range(2):
            for y in range(4):
                for x in range(4):
                    if mask[n, 0, 8 * y, 8 * x]:
                        patch = images[n, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                        pixels = patch.permute(1, 2, 0).flatten()
                        wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                        total += float((guess[n, 4 * y + x] - wanted).square().mean())
                        count += 1
        assert count == 24
        assert float(made(images, mask, "rgb")) == pytest.approx(total / count, rel=1e-4)


def test_mae_s_pictures_put_each_patch_in_its_place() -> None:
    made = built("mae").eval()
    assert isinstance(made, MAE)
    images = torch.randn(2, 3, 32, 32)
    patches = made._patches(images)
    mean, deviation = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
    perfect = (patches - mean) / deviation
    made._decode = lambda *_: (perfect, None)  # type: ignore[assignment, method-assign, return-value]
    assert torch.allclose(made.reconstruct(images, draw(made, 2), "rgb"), images, atol=1e-4)


@pytest.mark.parametrize(("model", "millions"), [(VIT_B, 111.7), (VIT_L, 329.2)])
def test_mae_s_decoder_is_the_paper_s(model: Model, millions: float) -> None:
    sincos = model.model_copy(update={"position": "sincos", "stem": "patch"})
    with torch.device("meta"):
        made = pretraining_model(sincos, settings("mae", mask_ratio=0.75), {"rgb": 3})
    assert isinstance(made, MAE)
    assert (made.embed.out_features, len(made.blocks), made.blocks[0].attn.num_heads) == (
        512,
        8,
        16,
    )
    assert made.kept == 49
    # The open code's models without their two stored position tables (0.15 and 0.1 M).
    count = sum(p.numel() for p in made.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.005)


def test_mae_needs_a_vit_with_fixed_positions_and_something_to_see() -> None:
    for model in (SMALL, VIT):
        with pytest.raises(BadInput, match=r"pretrain\.method: mae needs"):
            built("mae", model)
    with pytest.raises(BadInput, match=r"mask_ratio.*nothing to see"):
        built("mae", mask_ratio=0.99)


@ALL
def test_a_seed_repeats_the_masks(method: str, model: Model) -> None:
    made = built(method, model)
    assert torch.equal(draw(made), draw(made))
    assert not torch.equal(draw(made), draw(made, seed=1))
    mask = draw(made)
    assert mask.shape == (4, 1, 32, 32) and mask.dtype == torch.bool
    assert len(set(mask.sum((1, 2, 3)).tolist())) == 1


@pytest.mark.parametrize(
    ("method", "model", "steps"),
    [("ringmo", SMALL, 100), ("ringmo", VIT, 100), ("simmim", SMALL, 100), ("mae", SINCOS, 250)],
)
def test_pretraining_learns_to_fill_in(method: str, model: Model, steps: int) -> None:
    """Stripes of random phase: soon the loss is well under that of guessing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only waits for a second thread
    torch.manual_seed(1)
    made = pretraining_model(model, settings(method), {"rgb": 3})
    optimiser = torch.optim.AdamW(made.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        phase = torch.rand(16, 1, 1, 1) * 6.283
        rows = torch.arange(32.0).view(1, 1, 32, 1)
        images = (rows * 0.4 + phase).sin().expand(16, 3, 32, 32) * 1.4
        loss = made(images, made.masks(16))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
