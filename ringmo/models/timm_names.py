"""RingMo's encoders under names of timm's, and encoders with a plain stem as timm's own models.

    import ringmo.models.timm_names
    timm.create_model("ringmo_swin_base", features_only=True)

timm (to 1.0.31 at least) looks for models of other packages nowhere: it knows these names once
this module is imported, in each process that makes a model, and not before.

Models here read normalised images, as all of timm's do.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.backbone import LAYER_SCALE, SHARED_TABLE, TABLE, fitted_table, one_of
from ringmo.models.position import sine_cosine
from ringmo.models.stem import PiConvStem

FIRST = "patch_embed.convolutions.0"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of params.yaml's sensor rgb, over 255


class PiConvEmbed(PiConvStem):
    """RingMo's stem with what timm asks of a patch embedding. Takes its PatchEmbed's arguments."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Any = None,
        strict_img_size: bool = True,
        output_fmt: str = "NHWC",
        device: Any = None,
        dtype: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(patch_size, in_chans, embed_dim, norm_layer)
        self.patch_size = (patch_size, patch_size)
        self.strict_img_size, self.output_fmt = strict_img_size, output_fmt
        self.set_input_size(img_size)
        self.to(device=device, dtype=dtype)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None
    ) -> None:
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError("RingMo's stem keeps its patch size")
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            self.img_size = (height, width)
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, images: Tensor) -> Tensor:
        if self.strict_img_size and tuple(images.shape[-2:]) != self.img_size:
            height, width = self.img_size
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels: this model reads "
                f"{height} x {width}; make it with img_size={tuple(images.shape[-2:])}"
            )
        tokens = super().forward(images)
        return tokens.flatten(1, 2) if self.output_fmt == "NLC" else tokens


class RingMoSwin(SwinTransformer):  # type: ignore[misc]  # timm has no types
    """timm's Swin with RingMo's stem. Arguments are timm's.

    Args:
        sensor: whose stem is taken from a bundle; may be left out where it has one.
    """

    def __init__(self, sensor: str | None = None, **options: Any) -> None:
        super().__init__(embed_layer=PiConvEmbed, **options)
        self.sensor = sensor
        self.register_load_state_dict_pre_hook(_renamed)


class RingMoViT(Beit):  # type: ignore[misc]  # timm has no types
    """timm's BEiT with RingMo's stem: relative positions a block, no absolute ones, LayerScale.

    The features are normalised before they are averaged, as RingMo's are, not after as BEiT's.
    Arguments are timm's, and as of `RingMoSwin`.
    """

    patch_embed: Any

    def __init__(self, sensor: str | None = None, global_pool: str = "avg", **options: Any) -> None:
        super().__init__(global_pool="", **options)
        self.global_pool = global_pool
        plain = self.patch_embed
        weight: Tensor = plain.proj.weight
        self.patch_embed = PiConvEmbed(
            plain.img_size,
            plain.patch_size[0],
            weight.shape[1],
            self.embed_dim,
            output_fmt="NLC",
            device=weight.device,
            dtype=weight.dtype,
        )
        self.sensor = sensor
        self.register_load_state_dict_pre_hook(_renamed)


def _renamed(model: nn.Module, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded: those of a bundle under timm's names. Others are left alone."""
    if not prefix and _of_bundle(weights):
        fitting = from_bundle(weights, model)
        weights.clear()
        weights.update(fitting)


def _of_bundle(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("stems.", "encoder.stems.")) for name in weights)


def from_bundle(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A bundle's weights (model.safetensors) as those of one of this module's models.

    Position tables come to the model's size. Of a scene model the head comes too, where the
    model has one for as many classes; else the model's own stays.

    Raises:
        BadInput: another architecture, another stem, or no such sensor; naming the first weight.
    """
    if not _of_bundle(weights):
        return dict(weights)
    named = _timm_named(weights, getattr(model, "sensor", None))
    if isinstance(model, SwinTransformer):
        named = {re.sub(r"^head\.", "head.fc.", name): weight for name, weight in named.items()}
    if "patch_embed.proj.weight" in named:
        raise BadInput("this bundle's stem is a plain patch embedding: see timm_names.to_timm")
    own = model.state_dict()
    if SHARED_TABLE in named and SHARED_TABLE not in own:
        shared = named.pop(SHARED_TABLE)
        named |= {name: shared for name in own if name.endswith(TABLE)}
    fitting = {}
    for name, target in own.items():
        weight = named.get(name)
        if name.startswith("head.") and (weight is None or weight.shape != target.shape):
            weight = target
        if weight is None:
            raise BadInput(f"weight {name} is missing in the bundle: another architecture?")
        if name.endswith(TABLE) and weight.shape != target.shape:
            weight = _resized(name, weight, target)
        # Of another number of bands: timm adapts the first convolution, and says so.
        bands = name == f"{FIRST}.weight" and weight.shape[0] == target.shape[0]
        if weight.shape != target.shape and not bands:
            raise BadInput(
                f"weight {name} is {tuple(weight.shape)} in the bundle and "
                f"{tuple(target.shape)} in the model: another architecture?"
            )
        fitting[name] = weight
    if foreign := sorted(n for n in named.keys() - own.keys() if not n.startswith("head.")):
        raise BadInput(f"weight {foreign[0]} has no place in the model: another architecture?")
    return fitting


def _resized(name: str, table: Tensor, target: Tensor) -> Tensor:
    fitting = fitted_table(name, table, target)
    if fitting is None:
        raise BadInput(
            f"weight {name} is {tuple(table.shape)} in the bundle and {tuple(target.shape)} in "
            f"the model: another architecture, or windows that are no squares"
        )
    return fitting


def _timm_named(weights: Mapping[str, Tensor], sensor: str | None) -> dict[str, Tensor]:
    """A bundle's encoder, and the head of a scene model, in timm's names."""
    if any(name.startswith("encoder.stems.") for name in weights):
        head = {n: w for n, w in weights.items() if n in ("head.weight", "head.bias")}
        weights = {
            name.removeprefix("encoder."): weight
            for name, weight in weights.items()
            if name.startswith("encoder.")
        } | head
    names = {name.split(".")[1]: None for name in weights if name.startswith("stems.")}
    stem = f"stems.{one_of(names, sensor)}."
    named = {}
    for name, weight in weights.items():
        if name.startswith(stem):
            named[f"patch_embed.{name.removeprefix(stem)}"] = weight
        elif name.startswith("trunk."):
            named[name.removeprefix("trunk.")] = weight
        elif name.startswith("head."):
            named[name] = weight
    return named


def _made(kind: type[nn.Module], name: str, pretrained: bool, **options: Any) -> nn.Module:
    if kind is RingMoSwin:
        stages = tuple(range(len(options["depths"])))
        indices: Any = {"out_indices": options.pop("out_indices", stages)}
        indices["flatten_sequential"] = True
    else:
        last = options.pop("out_indices", min(3, options["depth"]))
        indices = {"out_indices": last, "feature_cls": "getter"}
    made: nn.Module = build_model_with_cfg(
        kind, name, pretrained, pretrained_filter_fn=from_bundle, feature_cfg=indices, **options
    )
    return made


def _swin(name: str, pretrained: bool, **options: Any) -> nn.Module:
    return _made(RingMoSwin, name, pretrained, **{"patch_size": 4, "window_size": 7} | options)


def _vit(name: str, pretrained: bool, **options: Any) -> nn.Module:
    positions = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": LAYER_SCALE}
    return _made(RingMoViT, name, pretrained, **{"patch_size": 16} | positions | options)


def ringmo_swin_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin-T with RingMo's stem, 224 × 224 pixels in windows of 7."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _swin("ringmo_swin_tiny", pretrained, **sizes | options)


def ringmo_swin_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin-B with RingMo's stem, 224 × 224 pixels in windows of 7."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _swin("ringmo_swin_base", pretrained, **sizes | options)


def ringmo_vit_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViT-B with RingMo's stem and relative positions, 224 × 224 pixels in patches of 16."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _vit("ringmo_vit_base", pretrained, **sizes | options)


def ringmo_vit_large(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViT-L with RingMo's stem and relative positions, 224 × 224 pixels in patches of 16."""
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _vit("ringmo_vit_large", pretrained, **sizes | options)


NAMES = (ringmo_swin_tiny, ringmo_swin_base, ringmo_vit_base, ringmo_vit_large)

# No classifier is named: timm would throw a bundle's head away, of as many classes or not.
default_cfgs = generate_default_cfgs(
    {
        made.__name__: {
            "num_classes": 0,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": MEAN,
            "std": STD,
            "first_conv": FIRST,
            "license": "apache-2.0",
        }
        for made in NAMES
    }
)
for _one in NAMES:
    register_model(_one)


# The other way: what needs no ringmo where it is loaded


def to_timm(
    folder: Path | str, sensor: str | None = None
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """A bundle's encoder as one of timm's own models: weights, name and arguments for it.

    `timm.create_model(name, **arguments)` with these weights gives the encoder's features from
    `forward_features`: of Swin (B, h, w, C); of a ViT (B, 1 + h·w, C), the class token first.

    Args:
        sensor: whose stem it gets; may be left out where the bundle has one.

    Raises:
        BadInput: no bundle, no such sensor, or `stem: pi_conv`, which timm does not have.
    """
    from ringmo.registry import bundle

    loaded = bundle.load(Path(folder))
    model = Model.model_validate(loaded.meta["architecture"])
    if model.stem != "patch":
        raise BadInput(
            f"{folder}: model.stem is {model.stem}, which none of timm's own models has: use "
            f"ringmo_{model.backbone}_… of ringmo.models.timm_names, or pre-train with stem: patch"
        )
    name = one_of(loaded.meta["sensors"], sensor)
    weights = _timm_named(loaded.model.state_dict(), name)
    weights = {n: w.contiguous() for n, w in weights.items() if not n.startswith("head.")}
    common: dict[str, Any] = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": len(loaded.meta["sensors"][name]["bands"]),
        "num_classes": 0,
        "embed_dim": model.embed_dim,
    }
    if model.backbone == "swin":
        stages = {"depths": model.depths, "num_heads": model.num_heads}
        windows = {"window_size": model.window_size}
        return weights, "swin_base_patch4_window7_224", common | stages | windows
    common |= {"global_pool": "", "depth": model.depths[0], "num_heads": model.num_heads[0]}
    if model.position == "relative":
        shared = SHARED_TABLE in weights
        positions = {
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": not shared,
            "use_shared_rel_pos_bias": shared,
            "init_values": LAYER_SCALE,
        }
        return weights, "beit_base_patch16_224", common | positions
    # timm's positions are learnt, and the class token has one: of ours it has none.
    side = model.image_size // model.patch_size
    fixed = sine_cosine(side, side, model.embed_dim)
    weights["pos_embed"] = torch.cat((torch.zeros_like(fixed[:1]), fixed))[None]
    return weights, "vit_base_patch16_224", common


def write_timm(folder: Path | str, out: Path | str, sensor: str | None = None) -> str:
    """`to_timm` as a folder that timm loads by itself, without ringmo; returns the call for it.

    It holds model.safetensors, which `create_model(…, checkpoint_path=)` takes, and config.json.

    Raises:
        BadInput: as `to_timm`, or `out` cannot be written.
    """
    from safetensors.torch import save_file

    from ringmo.stage import write_json

    weights, name, arguments = to_timm(folder, sensor)
    size = arguments["img_size"]
    settings = {
        "architecture": name,
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "pretrained_cfg": {
            "input_size": [arguments["in_chans"], size, size],
            "fixed_input_size": True,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
        },
        "model_args": arguments,
    }
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(weights, Path(out) / "model.safetensors", {"format": "pt"})
        write_json(Path(out) / "config.json", settings)
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror}") from None
    return f'timm.create_model("local-dir:{out}", pretrained=True)'
