"""RingMo's stem: convolutions as wide as their stride, so that none crosses a patch border."""

from typing import Any

from torch import Tensor, nn

# Strides of the three convolutions; their product is the patch size.
STRIDES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (4, 2, 2)}


class PiConvStem(nn.Module):
    """Patch embedding by three convolutions with C/4, C/4 and C channels.

    Takes the arguments of timm's PatchEmbed. (B, in_chans, H, W) → (B, H/p, W/p, C).
    `norm_layer` is what Swin has after its patch embedding, and a ViT has not.

    Source: `pi_conv` of RingMo's open framework.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if patch_size not in STRIDES:
            raise ValueError(f"patch_size: one of {', '.join(map(str, STRIDES))}, not {patch_size}")
        first, second, third = STRIDES[patch_size]
        width = embed_dim // 4
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_chans, width, first, first),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, second, second),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, embed_dim, third, third),
            nn.BatchNorm2d(embed_dim),
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.convolutions(images).permute(0, 2, 3, 1))
        return tokens
