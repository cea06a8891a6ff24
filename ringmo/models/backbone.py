"""The encoder: a stem for each sensor, and one trunk for all, of timm's Swin or ViT blocks.

Also how weights come over: from pre-training to fine-tuning at another size, and from timm.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.position import resized_table, sine_cosine, table_sides
from ringmo.models.stem import PiConvStem

TABLE = "relative_position_bias_table"
LAYER_SCALE = 0.1  # of a ViT with relative positions, as in RingMo's recipe


class SwinTrunk(SwinTransformer):  # type: ignore[misc]
    """timm's Swin without stem and head: tokens (B, h, w, C) → features (B, h/s, w/s, C·s)."""

    def __init__(self, model: Model, drop_path: float) -> None:
        super().__init__(
            img_size=model.image_size,
            patch_size=model.patch_size,
            num_classes=0,
            embed_dim=model.embed_dim,
            depths=tuple(model.depths),
            num_heads=tuple(model.num_heads),
            window_size=model.window_size,
            drop_path_rate=drop_path,
        )
        del self.patch_embed  # each sensor has its own stem
        self.head = nn.Identity()  # timm's pools; here the tasks do

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.norm(self.layers(tokens))
        return features

    def stages(self, tokens: Tensor) -> list[Tensor]:
        """What each stage makes of tokens; the last is what `forward` returns."""
        features: list[Tensor] = []
        for stage in self.layers:
            tokens = stage(tokens)
            features.append(tokens)
        return [*features[:-1], self.norm(features[-1])]

    def levels(self) -> list[list[nn.Parameter]]:
        levels: list[list[nn.Parameter]] = [[]]
        for stage in self.layers:
            below = list(stage.downsample.parameters())
            for block in stage.blocks:
                levels.append([*below, *block.parameters()])
                below = []
        levels[-1] += self.norm.parameters()
        return levels


class RelativeTrunk(Beit):  # type: ignore[misc]
    """timm's BEiT without stem and head: tokens (B, h, w, C) → features (B, h, w, C).

    No absolute positions. The class token takes part in attention and is cut off at the end.
    """

    def __init__(self, model: Model, drop_path: float, finetuning: bool) -> None:
        super().__init__(
            img_size=model.image_size,
            patch_size=model.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=model.embed_dim,
            depth=model.depths[0],
            num_heads=model.num_heads[0],
            drop_path_rate=drop_path,
            init_values=LAYER_SCALE,
            use_abs_pos_emb=False,
            use_rel_pos_bias=finetuning,
            use_shared_rel_pos_bias=not finetuning,
        )
        del self.patch_embed

    def forward(self, tokens: Tensor) -> Tensor:
        # Not len(tokens): torch.export would take the batch it is traced with for the only one.
        x = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens.flatten(1, 2)), 1)
        # Four dimensions: with three, PyTorch's fused attention falls back to its slow path.
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()[None]
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=shared)
        features: Tensor = self.norm(x)[:, 1:].reshape(tokens.shape)
        return features

    def levels(self) -> list[list[nn.Parameter]]:
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self.norm.parameters()
        if self.rel_pos_bias is not None:
            blocks[-1] += self.rel_pos_bias.parameters()
        return [[self.cls_token], *blocks]


class SincosTrunk(VisionTransformer):  # type: ignore[misc]
    """timm's ViT without stem and head, on fixed sine-cosine positions.

    Tokens (B, h, w, C) → features (B, h, w, C); with the numbers of kept tokens (B, K), of which
    row r and column c has r·w + c, only these pass the blocks → (B, K, C). The class token takes
    part in attention and is cut off at the end.
    """

    positions: Tensor

    def __init__(self, model: Model, drop_path: float) -> None:
        super().__init__(
            img_size=model.image_size,
            patch_size=model.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=model.embed_dim,
            depth=model.depths[0],
            num_heads=model.num_heads[0],
            pos_embed="none",
            drop_path_rate=drop_path,
        )
        del self.patch_embed
        side = model.image_size // model.patch_size
        fixed = sine_cosine(side, side, model.embed_dim)
        self.register_buffer("positions", fixed, persistent=False)

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        x = tokens.flatten(1, 2) + self.positions
        if kept is not None:
            x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        # Not len(x): torch.export would take the batch it is traced with for the only one.
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        features: Tensor = self.norm(self.blocks(x))[:, 1:]
        return features if kept is not None else features.reshape(tokens.shape)

    def levels(self) -> list[list[nn.Parameter]]:
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self.norm.parameters()
        return [[self.cls_token], *blocks]


class Encoder(nn.Module):
    """Images (B, bands, H, W), normalised → features (B, H/stride, W/stride, num_features).

    `stems` are one a sensor, by its name; the trunk is one for all. Images are one sensor's, or a
    mapping from sensors to theirs: what the stems make of them is averaged, position by position.

    stage_channels, stage_strides: of the maps that `stages` returns; strides are in pixels.
    """

    trunk: SwinTrunk | RelativeTrunk | SincosTrunk

    def __init__(
        self,
        stems: Mapping[str, nn.Module],
        trunk: SwinTrunk | RelativeTrunk | SincosTrunk,
        stride: int,
        image_size: int,
    ) -> None:
        super().__init__()
        self.stems = nn.ModuleDict(dict(stems))
        self.trunk = trunk
        self.stride, self.image_size, self.frozen = stride, image_size, False
        self.num_features: int = trunk.num_features
        scales = range(len(trunk.layers) if isinstance(trunk, SwinTrunk) else 1)
        self.stage_channels = [self.num_features >> scale for scale in reversed(scales)]
        self.stage_strides = [stride >> scale for scale in reversed(scales)]

    def forward(self, images: Tensor | Mapping[str, Tensor], sensor: str | None = None) -> Tensor:
        features: Tensor = self.trunk(self.tokens(images, sensor))
        return features

    def forward_kept(self, images: Tensor, kept: Tensor, sensor: str | None = None) -> Tensor:
        """Features (B, K, C) of the tokens that are kept, which alone pass the blocks.

        Args:
            kept: int64 (B, K), numbers of tokens, row by row. Needs sine-cosine positions.
        """
        features: Tensor = self.trunk(self.tokens(images, sensor), kept)
        return features

    def train(self, mode: bool = True) -> "Encoder":
        """As of any module; a frozen one stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """No training changes it from here on."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def stages(self, images: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
        """Feature maps (B, C_i, H_i, W_i) of all Swin stages, finest first; a ViT has one.

        Only the last has passed a LayerNorm, the trunk's own.
        """
        tokens, trunk = self.tokens(images), self.trunk
        features = trunk.stages(tokens) if isinstance(trunk, SwinTrunk) else [trunk(tokens)]
        return [each.permute(0, 3, 1, 2) for each in features]

    def tokens(self, images: Tensor | Mapping[str, Tensor], sensor: str | None = None) -> Tensor:
        """What a sensor's stem makes of images, or several stems on average: (B, H/p, W/p, C).

        Raises:
            BadInput: no such sensor, or none named where there are several.
        """
        if isinstance(images, Mapping):
            each = [self.tokens(of, name) for name, of in images.items()]
            return torch.stack(each).mean(0) if len(each) > 1 else each[0]
        tokens: Tensor = self.stems[one_of(self.stems, sensor)](images)
        return tokens

    def levels(self) -> list[list[nn.Parameter]]:
        """All parameters, from the lowest: stems and class token, then one list a block.

        Swin's downsampling belongs to the block after it, what stands above the blocks to the last.
        """
        lowest, *blocks = self.trunk.levels()
        return [[*self.stems.parameters(), *lowest], *blocks]


def one_of(sensors: Iterable[str], sensor: str | None) -> str:
    """The sensor that is meant; it may be left out where there is one.

    Raises:
        BadInput: not among `sensors`, or none named where there are several.
    """
    known = list(sensors)
    if sensor is None and len(known) == 1:
        return known[0]
    if sensor is None or sensor not in known:
        asked = "name the sensor" if sensor is None else f"sensor `{sensor}` is unknown here"
        raise BadInput(f"{asked}: this model reads {', '.join(known)}")
    return sensor


def encoder(
    model: Model, bands: Mapping[str, int], drop_path: float = 0.0, *, finetuning: bool = False
) -> Encoder:
    """An untrained encoder of this architecture.

    Args:
        bands: sensor → number of bands; each gets a stem of its own.
        drop_path: the last block's rate; those below it have less, the first none.
        finetuning: a ViT with relative positions then has a table for each block, else one.

    Raises:
        BadInput: a sensor's name that cannot be part of a weight's name.
    """
    trunk: SwinTrunk | RelativeTrunk | SincosTrunk
    if model.backbone == "swin":
        trunk = SwinTrunk(model, drop_path)
    elif model.position == "relative":
        trunk = RelativeTrunk(model, drop_path, finetuning)
    else:
        trunk = SincosTrunk(model, drop_path)
    for name in bands:
        if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
            raise BadInput(f"sensor `{name}`: letters, digits, _ and -, and no reserved word")
    return Encoder(
        {name: _stem(model, count) for name, count in bands.items()},
        trunk,
        model.stride,
        model.image_size,
    )


def _stem(model: Model, bands: int) -> nn.Module:
    layer = PiConvStem if model.stem == "pi_conv" else PatchEmbed
    stem: nn.Module = layer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=bands,
        embed_dim=model.embed_dim,
        norm_layer=nn.LayerNorm if model.backbone == "swin" else None,
        output_fmt="NHWC",
    )
    return stem


def fuse_attention(model: nn.Module, fused: bool) -> None:
    """Choose PyTorch's fused attention, or plain products: the same numbers but for rounding.

    Fused wins on a GPU; on a CPU the gradient of the position bias makes it a fifth slower.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]  # timm's own switch


@dataclass(frozen=True)
class Transfer:
    """What came over when weights were copied by name, and what did not.

    matched: tensors filled; parameters: values in them. resized: position tables that were
    brought to another size. left_out: weights that have no place and need none: heads, stems of
    other sensors. fresh: stems that stay as they were.
    """

    matched: int
    parameters: int
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)


def transfer(
    weights: Mapping[str, Tensor],
    into: nn.Module,
    where: str,
    *,
    fresh: Collection[str] = (),
) -> Transfer:
    """Copy `weights` into a module of the same architecture: all of it is filled, or nothing.

    Position tables come to the module's size, and a table that a ViT's blocks share goes to every
    block. Heads, and stems of sensors that the module lacks, are left out and reported; anything
    else that does not fit is refused.

    Args:
        where: what the weights are from, for the message.
        fresh: sensors whose stems may lack weights and then stay as they are.

    Raises:
        BadInput: naming the first tensor that does not fit; nothing was copied then.
    """
    own = into.state_dict()
    given = _unshared(weights, own)
    sensors = {match[1] for name in own if (match := _STEM.search(name))}
    taken: dict[str, Tensor] = {}
    resized: list[str] = []
    kept: list[str] = []
    missing: list[str] = []
    shapes: list[str] = []
    for name, target in own.items():
        source = given.get(name)
        if source is None:
            stem = _STEM.search(name)
            (kept if stem and stem[1] in fresh else missing).append(name)
        elif source.shape == target.shape and _same_kind(source, target):
            taken[name] = source
        elif (table := fitted_table(name, source, target)) is not None:
            taken[name] = table
            resized.append(name)
        else:
            shapes.append(name)
    left_out: list[str] = []
    foreign: list[str] = []
    for name in given.keys() - own.keys():
        stem = _STEM.search(name)
        needless = (stem and stem[1] not in sensors) or _HEAD.match(name)
        (left_out if needless else foreign).append(name)
    # A stem is one thing: half of it fresh would be a mismatch that nobody sees.
    half = {m[1] for name in kept if (m := _STEM.search(name))} & {
        m[1] for name in taken if (m := _STEM.search(name))
    }
    missing += [name for name in kept if _STEM.search(name)[1] in half]  # type: ignore[index]
    for names, wrong in (
        (missing, "is missing"),
        (foreign, "has no place in the model"),
        (shapes, "has another shape"),
    ):
        if names:
            first = sorted(names)[0]
            if names is shapes:
                wrong += f" ({_size(given[first])}, not {_size(own[first])})"
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise BadInput(f"{where}: weight {first} {wrong}{more}: another architecture?")
    into.load_state_dict(taken, strict=False)
    values = sum(weight.numel() for weight in taken.values())
    return Transfer(len(taken), values, resized, sorted(left_out), kept)


_STEM = re.compile(r"(?:^|\.)stems\.([^.]+)\.")
# What timm's models and pre-training have above the trunk.
_HEAD = re.compile(r"(head|fc_norm|head_drop|decoders|lbp_decoders|mask_token)(\.|$)")
SHARED_TABLE = f"rel_pos_bias.{TABLE}"


def _unshared(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with a shared position table copied to each block that has one of its own."""
    given = dict(weights)
    for name, table in weights.items():
        if name.endswith(SHARED_TABLE) and name not in own:
            start = re.escape(name.removesuffix(SHARED_TABLE))
            block = re.compile(rf"{start}blocks\.\d+\.attn\.{TABLE}")
            copies = {other: table for other in own if block.fullmatch(other)}
            if copies and not copies.keys() & given.keys():
                del given[name]
                given |= copies
    return given


def _same_kind(source: Tensor, target: Tensor) -> bool:
    return source.is_floating_point() == target.is_floating_point()


def fitted_table(name: str, source: Tensor, target: Tensor) -> Tensor | None:
    """A position table at the size of `target`; None for what is no such table."""
    if not name.endswith(TABLE) or source.shape[1:] != target.shape[1:]:
        return None
    have, want = table_sides(len(source)), table_sides(len(target))
    if have is None or want is None or have[1] != want[1]:
        return None
    return resized_table(source, want[0])


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def timm_weights(path: Path, model: Model, sensor: str) -> dict[str, Tensor]:
    """A plain timm Swin, BEiT or ViT from a safetensors file, in the names of this encoder.

    Its head is among them: `transfer` leaves it out and says so. What can be computed (Swin's
    masks and indices, a ViT's fixed positions) is dropped.

    Args:
        model: must have `stem: patch`, since a plain timm model has that.
        sensor: whose stem its patch embedding becomes.

    Raises:
        BadInput: no safetensors file, a truncated one, another stem, learnt absolute positions.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if model.stem != "patch":
        raise BadInput(f"{path}: timm's weights need model.stem: patch, not {model.stem}")
    try:
        weights = load(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is no safetensors file, or a damaged one: {error}") from None
    named: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(("relative_position_index", "attn_mask")):
            continue
        if name == "pos_embed" and model.position == "sincos" and model.backbone == "vit":
            _check_sincos(path, weight, model)
            continue
        if name.startswith("patch_embed."):
            name = f"stems.{sensor}.{name.removeprefix('patch_embed.')}"
        elif not _HEAD.match(name):
            name = f"trunk.{name}"
        named[name] = weight
    return named


def _check_sincos(path: Path, weight: Tensor, model: Model) -> None:
    """Fixed positions may be left out, at any image size; learnt ones are weights."""
    given = weight.flatten(0, -2)[1:].float()  # without the class token
    side = math.isqrt(len(given))
    fixed = sine_cosine(side, side, model.embed_dim)
    if given.shape != fixed.shape or not torch.allclose(given, fixed, atol=1e-3):
        raise BadInput(f"{path}: weight pos_embed is learnt, model.position: sincos is fixed")
