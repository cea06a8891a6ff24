"""Feature maps of several scales, as heads for dense answers and objects read them."""

from torch import Tensor, nn

from ringmo.models.backbone import Encoder, SwinTrunk


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, H, W)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """`Encoder.stages` → maps (B, channels_i, S/strides_i, S/strides_i), finest first.

    Swin has the scales: each stage but the last, which the trunk normalises, gets a LayerNorm
    (Liu et al., ICCV 2021). A ViT's one map of patches p becomes four of strides p/4, p/2, p and
    2p, each of it alone (the simple feature pyramid of Li et al., ViTDet, ECCV 2022); the last is
    of half the size, rounded up. The encoder is no part of it.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        if isinstance(encoder.trunk, SwinTrunk):
            self.channels = list(encoder.stage_channels)
            self.strides = list(encoder.stage_strides)
            scales: list[nn.Module] = [MapNorm(channels) for channels in self.channels[:-1]]
            self.scales = nn.ModuleList([*scales, nn.Identity()])
        else:
            [width], [patch] = encoder.stage_channels, encoder.stage_strides
            half, quarter = width // 2, width // 4
            self.channels = [quarter, half, width, width]
            self.strides = [patch // 4, patch // 2, patch, 2 * patch]
            finest = (
                nn.ConvTranspose2d(width, half, 2, 2),
                MapNorm(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
                MapNorm(quarter),
            )
            finer = (nn.ConvTranspose2d(width, half, 2, 2), MapNorm(half))
            coarser = nn.MaxPool2d(2, 2, ceil_mode=True)
            self.scales = nn.ModuleList(
                [nn.Sequential(*finest), nn.Sequential(*finer), nn.Identity(), coarser]
            )

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        if len(stages) < len(self.scales):
            stages = stages * len(self.scales)
        return [scale(stage) for scale, stage in zip(self.scales, stages, strict=True)]
