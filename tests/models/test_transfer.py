"""Weights come over whole, or with what did not fit named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_architecture import SINCOS, SMALL, VIT
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder, timm_weights, transfer
from ringmo.models.classifier import Classifier
from ringmo.models.position import resized_table, sine_cosine

ARCHITECTURES = pytest.mark.parametrize(
    "model", [SMALL, VIT, SINCOS], ids=["swin", "vit", "sincos"]
)
RGB = {"rgb": 3}


def filled(module: nn.Module) -> nn.Module:
    """Every weight its own value: position tables of BEiT start as zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


@ARCHITECTURES
def test_all_weights_come_over(model: Model) -> None:
    first, second = filled(encoder(model, RGB)), encoder(model, RGB).eval()
    came = transfer(first.state_dict(), second, "encoder")
    assert came.matched == len(first.state_dict())
    assert came.parameters == sum(value.numel() for value in first.state_dict().values())
    assert came.resized == came.left_out == came.fresh == []
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(images), second(images))


def test_swin_s_windows_grow_from_6_at_192_to_7_at_224() -> None:
    before = SMALL.model_copy(
        update={"image_size": 96, "window_size": 6, "depths": [2, 1], "embed_dim": 8}
    )
    after = before.model_copy(update={"image_size": 112, "window_size": 7})
    pretrained, tuned = filled(encoder(before, RGB)), encoder(after, RGB, 0.1, finetuning=True)
    came = transfer(pretrained.state_dict(), tuned, "encoder")
    assert len(came.resized) == 3 and came.left_out == []
    assert all(name.endswith("attn.relative_position_bias_table") for name in came.resized)
    old, new = pretrained.state_dict(), tuned.state_dict()
    for name, value in new.items():
        wanted = resized_table(old[name], 13) if name in came.resized else old[name]
        assert torch.equal(value, wanted)
    assert tuned(torch.randn(1, 3, 112, 112)).shape == (1, 14, 14, 16)


@pytest.mark.parametrize("size", [32, 48])
def test_the_table_that_vit_blocks_share_becomes_each_block_s(size: int) -> None:
    pretrained = filled(encoder(VIT, RGB))
    tuned = encoder(VIT.model_copy(update={"image_size": size}), RGB, finetuning=True).eval()
    came = transfer(pretrained.state_dict(), tuned, "encoder")
    tables = [n for n in tuned.state_dict() if n.endswith("relative_position_bias_table")]
    assert came.resized == (tables if size == 48 else []) and len(tables) == 2
    assert came.matched == len(tuned.state_dict())
    shared = pretrained.state_dict()["trunk.rel_pos_bias.relative_position_bias_table"]
    for name in tables:
        assert torch.equal(tuned.state_dict()[name], resized_table(shared, size // 4 - 1))
    if size == 32:
        images = torch.randn(1, 3, 32, 32)
        assert torch.allclose(pretrained(images), tuned(images), atol=1e-6)


def test_fixed_positions_fit_any_size() -> None:
    larger = encoder(SINCOS.model_copy(update={"image_size": 48}), RGB)
    came = transfer(filled(encoder(SINCOS, RGB)).state_dict(), larger, "encoder")
    assert came.resized == [] and came.matched == len(larger.state_dict())
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 6, 6, 32)


@ARCHITECTURES
def test_stems_of_other_sensors_are_left_out_and_said_so(model: Model) -> None:
    several = filled(encoder(model, {"rgb": 3, "s1": 2}))
    one = encoder(model, {"s1": 2}).eval()
    came = transfer(several.state_dict(), one, "encoder")
    assert came.left_out == sorted(n for n in several.state_dict() if n.startswith("stems.rgb."))
    images = torch.randn(1, 2, 32, 32)
    assert torch.equal(several(images, "s1"), one(images))


def test_a_new_sensor_s_stem_may_stay_fresh_but_no_other() -> None:
    given = filled(encoder(SMALL, RGB)).state_dict()
    several = encoder(SMALL, {"rgb": 3, "s1": 2})
    with pytest.raises(BadInput, match=r"stems\.s1.* is missing"):
        transfer(given, several, "encoder")
    before = {name: value.clone() for name, value in several.state_dict().items()}
    came = transfer(given, several, "encoder", fresh=["s1"])
    assert came.fresh and all(name.startswith("stems.s1.") for name in came.fresh)
    for name, value in several.state_dict().items():
        assert torch.equal(value, before[name] if name in came.fresh else given[name])
    # Half a stem is no fresh stem.
    torn = {**given, came.fresh[0]: before[came.fresh[0]]}
    with pytest.raises(BadInput, match=r"stems\.s1.* is missing"):
        transfer(torn, several, "encoder", fresh=["s1"])


@ARCHITECTURES
def test_weights_of_another_architecture_are_refused_and_nothing_changes(model: Model) -> None:
    trunk = encoder(model, RGB)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    whole = filled(encoder(model, RGB)).state_dict()
    deeper = [count + 1 for count in model.depths]
    norm = "trunk.norm.weight"
    refused = [
        (encoder(model.model_copy(update={"embed_dim": 64}), RGB).state_dict(), "another shape"),
        (encoder(model.model_copy(update={"depths": deeper}), RGB).state_dict(), "no place"),
        ({n: w for n, w in whole.items() if n != norm}, r"trunk\.norm\.weight is missing"),
        ({**whole, "trunk.surprise": torch.zeros(1)}, r"trunk\.surprise has no place"),
        ({**whole, norm: whole[norm][:-1]}, r"trunk\.norm\.weight has another shape \((15|31|63)"),
        ({**whole, norm: whole[norm].long()}, r"trunk\.norm\.weight has another shape"),
        (encoder(model, {"rgb": 4}).state_dict(), r"stems\.rgb\."),
        ({}, "missing"),
    ]
    for weights, says in refused:
        with pytest.raises(BadInput, match=says) as caught:
            transfer(weights, trunk, "the file")
        assert str(caught.value).startswith("the file: weight ") and "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())


def test_a_swin_is_no_vit_and_a_table_with_other_heads_no_table() -> None:
    for one, other in ((SMALL, VIT), (VIT, SINCOS), (SINCOS, VIT)):
        with pytest.raises(BadInput, match="another architecture"):
            transfer(encoder(one, RGB).state_dict(), encoder(other, RGB), "encoder")
    weights = encoder(SMALL, RGB).state_dict()
    table = "trunk.layers.0.blocks.0.attn.relative_position_bias_table"
    for wrong in (torch.zeros(49, 3), torch.zeros(50, 2), torch.zeros(52, 2)):
        with pytest.raises(BadInput, match="shape"):
            transfer({**weights, table: wrong}, encoder(SMALL, RGB), "encoder")


def test_an_encoder_in_a_classifier_keeps_its_head() -> None:
    model = Classifier(encoder(VIT, RGB, finetuning=True), 4)
    other = Classifier(encoder(VIT, RGB, finetuning=True), 4)
    assert transfer(filled(model).state_dict(), other, "model").left_out == []
    with pytest.raises(BadInput, match=r"head\.bias has another shape"):
        transfer(model.state_dict(), Classifier(encoder(VIT, RGB, finetuning=True), 5), "model")


# --- weights of timm's own models ---

PATCH = {"stem": "patch"}
FAMILIES = {
    "swin": (
        SMALL.model_copy(update=PATCH),
        lambda: SwinTransformer(
            img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 4),
            window_size=4, num_classes=7,
        ),
        ["head.fc.bias", "head.fc.weight"],
    ),
    "vit": (
        VIT.model_copy(update=PATCH),
        lambda: Beit(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, init_values=0.1,
            use_abs_pos_emb=False, use_rel_pos_bias=True, use_fc_norm=False, num_classes=7,
        ),
        ["head.bias", "head.weight"],
    ),
    "sincos": (
        SINCOS.model_copy(update=PATCH),
        lambda: VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, global_pool="token",
            num_classes=7,
        ),
        ["head.bias", "head.weight"],
    ),
}  # fmt: skip


def plain(name: str, path: Path) -> nn.Module:
    """A freshly built timm model, its weights saved as safetensors."""
    model: nn.Module = filled(FAMILIES[name][1]())
    if name == "sincos":  # as MAE's weights have it
        with torch.no_grad():
            model.pos_embed.copy_(torch.cat((torch.zeros(1, 32), sine_cosine(4, 4, 32)))[None])  # type: ignore[union-attr, operator]
    save_file(model.state_dict(), path)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_s_weights_give_timm_s_features(name: str, tmp_path: Path) -> None:
    architecture, _, heads = FAMILIES[name]
    theirs = plain(name, tmp_path / "timm.safetensors")
    ours = encoder(architecture, {"optical": 3}, finetuning=True).eval()
    weights = timm_weights(tmp_path / "timm.safetensors", architecture, "optical")
    came = transfer(weights, ours, "timm.safetensors")
    assert came.left_out == heads
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = theirs.forward_features(images)  # type: ignore[operator]
        got = ours(images)
    if name != "swin":
        wanted = wanted[:, 1:].view(2, 4, 4, 32)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_timm_s_swin_of_another_window_is_resized(tmp_path: Path) -> None:
    plain("swin", tmp_path / "timm.safetensors")
    larger = FAMILIES["swin"][0].model_copy(update={"image_size": 48, "window_size": 6})
    weights = timm_weights(tmp_path / "timm.safetensors", larger, "rgb")
    came = transfer(weights, encoder(larger, RGB), "timm.safetensors")
    assert len(came.resized) == 2


def test_buffers_of_older_timm_files_are_dropped(tmp_path: Path) -> None:
    theirs = plain("swin", tmp_path / "timm.safetensors")
    older = {**theirs.state_dict(), "layers.0.blocks.0.attn_mask": torch.zeros(4, 16, 16)}
    older["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    save_file(older, tmp_path / "older.safetensors")
    model = FAMILIES["swin"][0]
    weights = timm_weights(tmp_path / "older.safetensors", model, "rgb")
    assert transfer(weights, encoder(model, RGB), "older").left_out == FAMILIES["swin"][2]


def test_learnt_absolute_positions_are_refused(tmp_path: Path) -> None:
    theirs = plain("sincos", tmp_path / "timm.safetensors")
    learnt = {**theirs.state_dict(), "pos_embed": torch.randn(1, 17, 32)}
    save_file(learnt, tmp_path / "learnt.safetensors")
    with pytest.raises(BadInput, match="pos_embed is learnt"):
        timm_weights(tmp_path / "learnt.safetensors", FAMILIES["sincos"][0], "rgb")
    model = FAMILIES["vit"][0]
    with pytest.raises(BadInput, match="another architecture"):
        weights = timm_weights(tmp_path / "learnt.safetensors", model, "rgb")
        transfer(weights, encoder(model, RGB), "learnt")


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "timm.safetensors"
    plain("swin", path)
    model = FAMILIES["swin"][0]
    with pytest.raises(BadInput, match="stem: patch, not pi_conv"):
        timm_weights(path, SMALL, "rgb")
    with pytest.raises(BadInput, match=r"missing\.safetensors: No such file"):
        timm_weights(tmp_path / "missing.safetensors", model, "rgb")
    whole = path.read_bytes()
    wrong = [b"", whole[:5], whole[:200], whole[:-1], whole + b"x", pickle.dumps(Evil())]
    wrong.append(np.arange(100).tobytes())
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(BadInput, match="safetensors") as refused:
            timm_weights(path, model, "rgb")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()
