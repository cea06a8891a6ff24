import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, encoder, fuse_attention
from ringmo.models.classifier import Classifier
from ringmo.models.stem import STRIDES, PiConvStem

SMALL = Model(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
VIT = Model(
    backbone="vit", image_size=32, patch_size=8, embed_dim=32, depths=[2], num_heads=[2]
)  # fmt: skip
SINCOS = VIT.model_copy(update={"position": "sincos"})
ARCHITECTURES = pytest.mark.parametrize(
    "model", [SMALL, VIT, SINCOS], ids=["swin", "vit", "sincos"]
)

SWIN_T = Model(
    image_size=192, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=6
)
SWIN_B = SWIN_T.model_copy(
    update={"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
)
VIT_B = Model(
    backbone="vit", image_size=224, patch_size=16, embed_dim=768, depths=[12], num_heads=[12]
)
VIT_L = VIT_B.model_copy(update={"embed_dim": 1024, "depths": [24], "num_heads": [16]})
LARGER = {"image_size": 224, "window_size": 7}


@pytest.mark.parametrize("patch", STRIDES)
def test_stem_gives_one_token_a_patch(patch: int) -> None:
    stem = PiConvStem(patch_size=patch, in_chans=3, embed_dim=16, norm_layer=nn.LayerNorm)
    assert stem(torch.randn(1, 3, 64, 64)).shape == (1, 64 // patch, 64 // patch, 16)


def test_stem_refuses_a_patch_it_has_no_strides_for() -> None:
    with pytest.raises(ValueError, match="not 5"):
        PiConvStem(patch_size=5, in_chans=3, embed_dim=16)


@ARCHITECTURES
@pytest.mark.parametrize("stem", ["pi_conv", "patch"])
def test_no_token_sees_its_neighbour_before_the_trunk(model: Model, stem: str) -> None:
    trunk = encoder(model.model_copy(update={"stem": stem}), {"rgb": 3}).eval()
    patch = model.patch_size
    images = torch.randn(1, 3, 32, 32)
    before = trunk.tokens(images)
    images[:, :, patch : 2 * patch, 3 * patch : 4 * patch] += 1
    changed = (trunk.tokens(images) - before).abs().amax(-1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("stem", ["pi_conv", "patch"])
def test_swin_may_have_any_number_of_stages(stages: int, stem: str) -> None:
    model = Model(
        image_size=64,
        embed_dim=16,
        depths=[1] * stages,
        num_heads=[2] * stages,
        window_size=4,
        stem=stem,  # type: ignore[arg-type]
    )
    trunk = encoder(model, {"rgb": 4})
    images = torch.randn(2, 4, 64, 64)
    assert trunk(images).shape == (2, 64 // trunk.stride, 64 // trunk.stride, trunk.num_features)
    assert Classifier(trunk, 5)(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("model", "shape", "millions"),
    [
        (SWIN_B, (6, 6, 1024), 86.7),
        (SWIN_B.model_copy(update=LARGER), (7, 7, 1024), 86.7),
        (SWIN_T, (6, 6, 768), 27.5),
        (SWIN_T.model_copy(update=LARGER), (7, 7, 768), 27.5),
        (VIT_B, (14, 14, 768), 85.8),
        (VIT_B.model_copy(update={"image_size": 192}), (12, 12, 768), 85.8),
        (VIT_L, (14, 14, 1024), 303.3),
        (VIT_L.model_copy(update={"position": "sincos"}), (14, 14, 1024), 303.3),
    ],
)
@pytest.mark.parametrize("finetuning", [False, True])
def test_sizes_of_the_paper(
    model: Model, shape: tuple[int, ...], millions: float, finetuning: bool
) -> None:
    with torch.device("meta"):
        trunk = encoder(model, {"rgb": 3}, 0.1, finetuning=finetuning)
        features = trunk(torch.empty(2, 3, model.image_size, model.image_size))
    assert features.shape == (2, *shape)
    count = sum(p.numel() for p in trunk.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)


def test_swin_b_has_the_windows_and_drop_path_of_the_paper() -> None:
    with torch.device("meta"):
        for update, window in (({}, 6), (LARGER, 7)):
            trunk = encoder(SWIN_B.model_copy(update=update), {"rgb": 3}, 0.1).trunk
            blocks = [block for stage in trunk.layers for block in stage.blocks]
            assert {block.window_size for block in blocks} == {(window, window)}
            tables = {block.attn.relative_position_bias_table.shape[0] for block in blocks}
            assert tables == {(2 * window - 1) ** 2}
            # Every second block's windows are shifted, but for the last stage: it has one window.
            shifts = [block.shift_size[0] for block in blocks]
            assert shifts == [0, window // 2] * 11 + [0, 0]
            assert blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_vit_shares_one_position_table_in_pretraining_and_has_one_a_block_after() -> None:
    before = encoder(VIT, {"rgb": 3})
    after = encoder(VIT, {"rgb": 3}, finetuning=True)
    tables = [
        [name for name, _ in model.named_parameters() if "relative_position_bias_table" in name]
        for model in (before, after)
    ]
    assert tables[0] == ["trunk.rel_pos_bias.relative_position_bias_table"]
    assert tables[1] == [f"trunk.blocks.{i}.attn.relative_position_bias_table" for i in (0, 1)]
    for model in (before, after):
        weights = model.state_dict()
        assert "trunk.pos_embed" not in weights and "trunk.cls_token" in weights
        assert weights["trunk.blocks.1.gamma_1"].eq(0.1).all()
        assert {"trunk.blocks.0.attn.q_bias", "trunk.blocks.0.attn.v_bias"} <= weights.keys()
    # The stem has a LayerNorm with Swin only.
    assert not any(name.startswith("stems.rgb.norm") for name in before.state_dict())
    assert "stems.rgb.norm.weight" in encoder(SMALL, {"rgb": 3}).state_dict()


@ARCHITECTURES
def test_several_sensors_have_a_stem_each_and_one_trunk(model: Model) -> None:
    trunk = encoder(model, {"rgb": 3, "s2": 12, "s1": 2})
    one = encoder(model, {"rgb": 3})
    stems = {name: sum(p.numel() for p in stem.parameters()) for name, stem in trunk.stems.items()}
    # Everything but the stems is there once, in the same storage whichever sensor runs.
    total = sum(p.numel() for p in trunk.parameters())
    assert total == sum(p.numel() for p in one.trunk.parameters()) + sum(stems.values())
    assert len({p.data_ptr() for p in trunk.parameters()}) == len(list(trunk.parameters()))
    for name, bands in (("rgb", 3), ("s2", 12), ("s1", 2)):
        trunk.zero_grad()
        features = trunk(torch.randn(2, bands, 32, 32), name)
        features.square().sum().backward()
        moved = {
            n.split(".")[1] for n, p in trunk.stems.named_parameters("stems") if p.grad is not None
        }
        assert moved == {name}
        assert any(p.grad is not None and p.grad.any() for p in trunk.trunk.parameters())
    with pytest.raises(BadInput, match="name the sensor"):
        trunk(torch.randn(2, 3, 32, 32))
    with pytest.raises(BadInput, match="`s3` is unknown here: this model reads rgb, s2, s1"):
        trunk(torch.randn(2, 3, 32, 32), "s3")
    for name in ("s.2", "keys", ""):
        with pytest.raises(BadInput, match="sensor"):
            encoder(model, {name: 3})


@ARCHITECTURES
@pytest.mark.parametrize("finetuning", [False, True])
def test_levels_hold_every_parameter_once_and_rise(model: Model, finetuning: bool) -> None:
    trunk = encoder(model, {"rgb": 3, "s1": 2}, finetuning=finetuning)
    names = {id(p): name for name, p in trunk.named_parameters()}
    levels = [[names[id(p)] for p in level] for level in trunk.levels()]
    assert sorted(name for level in levels for name in level) == sorted(names.values())
    assert len(levels) == 1 + sum(model.depths)
    assert {name.split(".")[0] for name in levels[0]} <= {"stems", "trunk"}
    assert "trunk.norm.weight" in levels[-1]
    if model.backbone == "swin":
        assert all(name.startswith("stems.") for name in levels[0])
        assert "trunk.layers.1.downsample.reduction.weight" in levels[2]
    else:
        assert "trunk.cls_token" in levels[0]
        assert all(not name.startswith("trunk.blocks.1") for name in levels[1])


@ARCHITECTURES
def test_fused_attention_gives_the_same_features(model: Model) -> None:
    trunk = encoder(model, {"rgb": 3}).eval()
    for parameter in trunk.parameters():  # position tables of BEiT start at zero
        nn.init.normal_(parameter, std=0.05)
    images = torch.randn(2, 3, 32, 32)
    answers = []
    for fused in (False, True):
        fuse_attention(trunk, fused)
        assert _fused(trunk) == {fused}
        with torch.inference_mode():
            answers.append(trunk(images))
    assert torch.allclose(*answers, atol=1e-5)


def _fused(model: Encoder) -> set[bool]:
    return {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")}  # type: ignore[misc]


def test_keeping_every_token_is_the_whole_forward() -> None:
    trunk = encoder(SINCOS, {"rgb": 3}).eval()
    images = torch.randn(2, 3, 32, 32)
    every = torch.arange(16).expand(2, -1)
    with torch.inference_mode():
        whole = trunk(images).flatten(1, 2)
        assert torch.allclose(trunk.forward_kept(images, every), whole, atol=1e-6)
        # In another order they are the same tokens: each carries its position with it.
        order = torch.randperm(16).expand(2, -1)
        shuffled = trunk.forward_kept(images, order)
        assert torch.allclose(shuffled, whole[:, order[0]], atol=1e-5)
        few = trunk.forward_kept(images, every[:, :4])
        assert few.shape == (2, 4, 32)
        # What is dropped is gone.
        images[:, :, 8:] = 5
        assert torch.equal(trunk.forward_kept(images, every[:, :4]), few)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"backbone": "vit", "depths": [2, 2], "num_heads": [2, 2]}, "one value for a vit"),
        ({"position": "sincos"}, "needs backbone: vit"),
        ({"window_size": None}, "swin needs one"),
        ({"image_size": 36}, "multiple of 8"),
        ({"backbone": "vit", "depths": [2], "num_heads": [3]}, "3 heads do not divide 16"),
    ],
)
def test_architectures_that_cannot_be_are_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Model.model_validate({**SMALL.model_dump(), **values})


def test_a_vit_is_the_same_whatever_windows_stood_there_before() -> None:
    assert VIT.window_size is None
    assert Model.model_validate({**VIT.model_dump(), "window_size": 6}) == VIT
