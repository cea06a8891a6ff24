"""The encoder: timm's Swin Transformer of one to four stages, with RingMo's stem."""

from dataclasses import dataclass

from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn

from ringmo.config import Model
from ringmo.errors import BadInput
from ringmo.models.stem import PiConvStem


class Encoder(SwinTransformer):  # type: ignore[misc]
    """Swin without a head. Images (B, bands, H, W), normalised → features (B, H/s, W/s, C).

    `stride` is s, `num_features` is C.
    """

    stride: int

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.forward_features(images)
        return features


def encoder(model: Model, bands: int, drop_path: float = 0.0) -> Encoder:
    """An untrained encoder of this architecture for images of `bands` bands."""
    stem = {"embed_layer": PiConvStem} if model.stem == "pi_conv" else {}
    built = Encoder(
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=bands,
        num_classes=0,
        embed_dim=model.embed_dim,
        depths=tuple(model.depths),
        num_heads=tuple(model.num_heads),
        window_size=model.window_size,
        drop_path_rate=drop_path,
        **stem,
    )
    built.head = nn.Identity()  # timm's pools; here the tasks do
    built.stride = model.patch_size * 2 ** (len(model.depths) - 1)
    return built


def fuse_attention(model: nn.Module, fused: bool) -> None:
    """Choose PyTorch's fused attention, or plain products: the same numbers but for rounding.

    Fused wins on a GPU; on a CPU the gradient of the position bias makes it a fifth slower.
    """
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = fused


@dataclass(frozen=True)
class Transfer:
    """What came over when weights were copied by name."""

    matched: int
    parameters: int


def transfer(weights: dict[str, Tensor], into: nn.Module, where: str) -> Transfer:
    """Copy `weights` into a module of the same architecture, every one or none.

    Raises:
        BadInput: a name or a shape that does not fit; nothing was copied then.
    """
    own = into.state_dict()
    missing = sorted(own.keys() - weights.keys())
    foreign = sorted(weights.keys() - own.keys())
    shapes = sorted(
        name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
    )
    for names, wrong in (
        (missing, "is missing"),
        (foreign, "has no place in the model"),
        (shapes, "has another shape"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise BadInput(f"{where}: weight {names[0]} {wrong}{more}: another architecture?")
    into.load_state_dict(weights)
    return Transfer(len(own), sum(weight.numel() for weight in weights.values()))
