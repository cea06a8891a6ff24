"""RingMo's encoders in timm: the same numbers, by timm's own ways."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from small_models import SENSORS, SWIN, VIT, rgb, sar, write_model
from torch import Tensor

import ringmo.models.timm_names as timm_names
from ringmo.errors import BadInput
from ringmo.models.normal import Normal
from ringmo.registry import bundle

SMALL_SWIN = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 4),
    "window_size": 4,
}
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLASSES = ["airport", "forest", "river"]


def normal(name: str = "rgb", count: int = 2) -> Tensor:
    """A batch as a model reads it."""
    pixels = [rgb(i, 32, 32) if name == "rgb" else sar(i) for i in range(count)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Normal(SENSORS[name], "cpu")(images)


def weights(folder: Path) -> dict[str, str]:
    return {"file": str(folder / "model.safetensors")}


@torch.no_grad()
def close(made: Tensor, ours: Tensor) -> bool:
    return made.shape == ours.shape and bool((made - ours).abs().max() <= 1e-5)


def test_timm_knows_the_names_once_they_are_imported_and_not_before() -> None:
    """The limit that the docs state: timm finds models of other packages by nothing else."""
    code = (
        "import timm, ringmo\n"
        "assert not timm.is_model('ringmo_swin_base')\n"
        "import ringmo.models.timm_names\n"
        "print(sorted(timm.list_models('ringmo_*')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["ringmo_swin_base", "ringmo_swin_tiny", "ringmo_vit_base", "ringmo_vit_large"]
    assert done.stdout.strip() == str(names)


@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [
        ("ringmo_swin_base", [128, 256, 512, 1024], [4, 8, 16, 32]),
        ("ringmo_swin_tiny", [96, 192, 384, 768], [4, 8, 16, 32]),
        ("ringmo_vit_base", [768] * 3, [16] * 3),
        ("ringmo_vit_large", [1024] * 3, [16] * 3),
    ],
)
def test_sizes_are_ringmo_s(name: str, channels: list[int], reductions: list[int]) -> None:
    with torch.device("meta"):
        made = timm.create_model(name, features_only=True)
        maps = made(torch.zeros(1, 3, 224, 224))
    assert made.feature_info.channels() == channels
    assert made.feature_info.reduction() == reductions
    last = getattr(made, "output_fmt", "NCHW") == "NHWC"
    for one, width, reduction in zip(maps, channels, reductions, strict=True):
        side = 224 // reduction
        assert one.shape == ((1, side, side, width) if last else (1, width, side, side))


def test_features_of_a_swin_look_like_those_of_timm_s_own() -> None:
    options = {"features_only": True, "out_indices": (0, 1), **SMALL_SWIN, "patch_size": 4}
    ours = timm.create_model("ringmo_swin_base", **options)
    own = timm.create_model("swin_base_patch4_window7_224", **options)
    assert ours.output_fmt == own.output_fmt == "NHWC"
    assert [m.shape for m in ours(normal())] == [m.shape for m in own(normal())]
    for told in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, told)() == getattr(own.feature_info, told)()


@pytest.mark.parametrize("classes", [None, CLASSES])
@pytest.mark.parametrize(
    ("name", "small", "architecture"),
    [("ringmo_swin_base", SMALL_SWIN, SWIN), ("ringmo_vit_base", SMALL_VIT, VIT)],
)
def test_a_bundle_s_weights_give_its_encoder_s_features(
    tmp_path: Path,
    name: str,
    small: dict[str, Any],
    architecture: dict[str, Any],
    classes: list[str] | None,
) -> None:
    """By pretrained_cfg and by checkpoint_path; of a ViT's encoder the shared table goes along."""
    ours = bundle.load(write_model(tmp_path / "model", architecture, classes=classes)).model
    trunk = ours.encoder if classes else ours
    expected = trunk(normal())
    path = tmp_path / "model" / "model.safetensors"
    count = len(classes or [])
    for how in (
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
        {"checkpoint_path": str(path)},
    ):
        made = timm.create_model(name, num_classes=count, **small, **how).eval()
        features = made.forward_features(normal())
        if name == "ringmo_vit_base":
            features = features[:, 1:].reshape(expected.shape)
        assert close(features, expected)
        if classes:
            assert close(made(normal()), ours(normal()))
    how = {"pretrained": True, "pretrained_cfg_overlay": weights(path.parent)}
    last = timm.create_model(name, features_only=True, **how, **small).eval()(normal())[-1]
    if name == "ringmo_vit_base":
        last = last.permute(0, 2, 3, 1)
    assert close(trunk.trunk.norm(last), expected)  # timm's maps are those before the last norm


def test_a_sensor_chooses_its_stem(tmp_path: Path) -> None:
    ours = bundle.load(write_model(tmp_path, sensors=("rgb", "sar"))).model
    how = {"pretrained": True, "pretrained_cfg_overlay": weights(tmp_path), **SMALL_SWIN}
    for name, bands in (("rgb", 3), ("sar", 2)):
        made = timm.create_model("ringmo_swin_tiny", sensor=name, in_chans=bands, **how).eval()
        assert close(made.forward_features(normal(name)), ours(normal(name), name))
    with pytest.raises(BadInput, match="name the sensor: this model reads rgb, sar"):
        timm.create_model("ringmo_swin_tiny", **how)


def test_other_sizes_and_bands_are_adapted_and_heads_come_fresh(tmp_path: Path) -> None:
    """Tables grow as in fine-tuning; timm repeats the first convolution for more bands."""
    folder = write_model(tmp_path, classes=CLASSES)
    how = {"pretrained": True, "pretrained_cfg_overlay": weights(folder)}
    large = SMALL_SWIN | {"img_size": 64, "window_size": 8}
    made = timm.create_model("ringmo_swin_base", num_classes=7, in_chans=4, **large, **how)
    assert made(torch.zeros(1, 4, 64, 64)).shape == (1, 7)
    given = load_file(folder / "model.safetensors")
    blocks = "layers.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(made.state_dict()[blocks], given[f"encoder.trunk.{blocks}"])
    first = made.state_dict()["patch_embed.convolutions.0.weight"]
    assert first.shape[1] == 4 and first.abs().sum() > 0
    # The middle of a resized table, the offset of no distance, keeps its value.
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert close(made.state_dict()[table][112], given[f"encoder.trunk.{table}"][24])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"embed_dim": 32}, "another architecture"),
        ({"depths": (1, 2)}, "is missing in the bundle"),
        ({"sensor": "s2"}, "sensor `s2` is unknown here"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    with pytest.raises(BadInput, match=said):
        timm.create_model("ringmo_swin_base", checkpoint_path=str(path), **SMALL_SWIN | changed)
    path = write_model(tmp_path, VIT) / "model.safetensors"
    with pytest.raises(BadInput, match=r"weight blocks.1.\S+ has no place in the model"):
        timm.create_model("ringmo_vit_base", checkpoint_path=str(path), **SMALL_VIT | {"depth": 1})


def test_smp_decodes_what_the_encoder_gives(tmp_path: Path) -> None:
    """`smp.Unet("tu-ringmo_…")` with a bundle's weights, at any number of bands, and it learns."""
    import segmentation_models_pytorch as smp

    folder = write_model(tmp_path, SWIN | {"depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]})
    unet = smp.Unet(
        "tu-ringmo_swin_base",
        encoder_weights=True,
        classes=5,
        pretrained_cfg_overlay=weights(folder),
        **SMALL_SWIN | {"depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)},
    )
    given = load_file(folder / "model.safetensors")["stems.rgb.convolutions.0.weight"]
    assert torch.equal(unet.encoder.model.state_dict()["patch_embed.convolutions.0.weight"], given)
    logits = unet(normal())
    assert logits.shape == (2, 5, 32, 32)
    logits.square().mean().backward()
    assert unet.encoder.model.patch_embed.convolutions[0].weight.grad.abs().sum() > 0


PLAIN = {
    "swin": SWIN | {"stem": "patch"},
    "vit": VIT | {"stem": "patch"},
    "sincos": VIT | {"stem": "patch", "position": "sincos"},
}


def test_a_plain_stem_s_bundle_is_one_of_timm_s_own_models(tmp_path: Path) -> None:
    """Without ringmo: in a process that cannot import it, by both of timm's ways."""
    code = (
        "import sys, json, torch, timm\n"
        "sys.modules['ringmo'] = None\n"
        f"images = torch.load({str(tmp_path / 'images.pt')!r})\n"
        "said = {}\n"
    )
    torch.save(normal(), tmp_path / "images.pt")
    expected = {}
    for kind in PLAIN:
        for classes in (None, CLASSES):
            case = f"{kind} of {'a task' if classes else 'pre-training'}"
            folder = write_model(tmp_path / case, PLAIN[kind], classes=classes)
            ours = bundle.load(folder).model
            expected[case] = (ours.encoder if classes else ours)(normal())
            call = timm_names.write_timm(folder, tmp_path / f"{case} for timm")
            _, name, arguments = timm_names.to_timm(folder)
            weights = str(tmp_path / f"{case} for timm" / "model.safetensors")
            code += (
                f"arguments = json.loads({json.dumps(arguments)!r})\n"
                f"b = timm.create_model({name!r}, **arguments, checkpoint_path={weights!r})\n"
                "with torch.no_grad():\n"
                f"    said[{case!r}] = [m.eval().forward_features(images) for m in ({call}, b)]\n"
            )
    code += f"torch.save(said, {str(tmp_path / 'said.pt')!r})\n"
    subprocess.run([sys.executable, "-c", code], check=True)
    answers = torch.load(tmp_path / "said.pt")
    assert answers.keys() == expected.keys() and len(answers) == 6
    for case, both in answers.items():
        for said in both:
            if not case.startswith("swin"):  # the class token is the first
                said = said[:, 1:].reshape(expected[case].shape)
            assert close(said, expected[case]), case


def test_the_way_to_timm_and_back_is_the_same_weights(tmp_path: Path) -> None:
    """What `pretrain.init` reads of timm is what `write_timm` writes."""
    from ringmo.config import Model
    from ringmo.models.backbone import timm_weights

    folder = write_model(tmp_path / "model", PLAIN["swin"])
    timm_names.write_timm(folder, tmp_path / "plain")
    model = Model.model_validate(PLAIN["swin"])
    back = timm_weights(tmp_path / "plain" / "model.safetensors", model, "rgb")
    own = bundle.load(folder).model.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[n], own[n]) for n in own)


def test_where_timm_has_no_such_model_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stem is pi_conv, which none of timm's own models has"):
        timm_names.to_timm(write_model(tmp_path / "ours"))
    folder = write_model(tmp_path / "plain", PLAIN["swin"], ("rgb", "sar"))
    with pytest.raises(BadInput, match="name the sensor: this model reads rgb, sar"):
        timm_names.to_timm(folder)
    assert timm_names.to_timm(folder, "sar")[2]["in_chans"] == 2
    with pytest.raises(BadInput, match=r"timm_names.to_timm"):
        timm.create_model(
            "ringmo_swin_base",
            sensor="rgb",
            checkpoint_path=str(folder / "model.safetensors"),
            **SMALL_SWIN,
        )
