"""Models with an answer for each pixel: the encoder's feature maps through UPerNet's decoder.

The decoder is segmentation-models-pytorch's (Xiao et al., ECCV 2018). It stands alone: without the
second, auxiliary head that UPerNet is often trained with.
"""

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from ringmo.models.backbone import Encoder
from ringmo.models.pyramid import MapNorm, Pyramid
from ringmo.tasks.base import SECOND, Images

NARROWEST, WIDEST = 64, 256  # channels of the decoder
# The least that smp asks for; beside that it does not use it.
DEPTH = 3


class UPerNet(nn.Module):
    """Maps of a pyramid → (B, width, H, W) of the finest one's size.

    Wide as a quarter of the encoder's last stage: a decoder for a Swin-B would be most of a small
    model's work.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.width = min(WIDEST, max(NARROWEST, channels[-1] // 4))
        # smp skips the first two maps of an encoder, those of strides 1 and 2.
        self.decoder = UPerNetDecoder([0, 0, *channels], DEPTH, self.width)
        # The pyramid has normalised them; a second time, the difference of two dates would be as
        # large where nothing changed.
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in channels)
        # Pooled maps have as few as one position, of which BatchNorm cannot tell anything.
        psp = self.decoder.psp
        for layers in (*(block[1] for block in psp.blocks), psp.out_conv):
            layers[1] = MapNorm(self.width)
        initialize_decoder(self.decoder)

    def forward(self, maps: list[Tensor]) -> Tensor:
        decoded: Tensor = self.decoder([None, None, *maps])
        return decoded


class Dense(nn.Module):
    """Images of the encoder's size, by sensor → (B, outputs, S, S).

    class_weights: (outputs,), what a pixel of each class counts in the loss, or None. No part of
    the state.
    """

    class_weights: Tensor | None

    def __init__(self, encoder: Encoder, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pyramid = Pyramid(encoder)
        self.upernet = UPerNet(self.pyramid.channels)
        self.head = nn.Conv2d(self.upernet.width, outputs, 1)
        # Small weights: the first answers are near uniform, whatever the encoder's scale.
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]  # a Conv2d may have none
        self.register_buffer("class_weights", None, persistent=False)

    def forward(self, images: Images) -> Tensor:
        size = next(iter(images.values())).shape[-2:]
        coarse = self.head(self.upernet(self.maps(images)))
        return nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)

    def maps(self, images: Images) -> list[Tensor]:
        """What the decoder reads, finest first."""
        maps: list[Tensor] = self.pyramid(self.encoder.stages(images))
        return maps


class Siamese(Dense):
    """Two dates through one encoder; the decoder reads how far their features are apart.

    The later date is of the first sensor; what other sensors show stands beside both. Which date
    is the later makes no difference.

    Source: the difference of features as in FC-Siam-diff (Daudt et al., ICIP 2018).
    """

    def maps(self, images: Images) -> list[Tensor]:
        before = {name: of for name, of in images.items() if name != SECOND}
        after = {**before, next(iter(before)): images[SECOND]}
        # One after the other, and not as a batch of both: so drop path drops the same of both.
        return [
            (one - other).abs()
            for one, other in zip(super().maps(before), super().maps(after), strict=True)
        ]


class Heights(Dense):
    """Images of the encoder's size, by sensor → metres (B, S, S).

    mean_m, unit_m: of the training tiles' heights; what the head predicts is in these units, from
    this mean.
    """

    mean_m: Tensor
    unit_m: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, 1)
        self.register_buffer("mean_m", torch.tensor(0.0))
        self.register_buffer("unit_m", torch.tensor(1.0))

    def forward(self, images: Images) -> Tensor:
        # Metres of a mountain do not fit half precision.
        return self.mean_m + self.unit_m * super().forward(images)[:, 0].float()
