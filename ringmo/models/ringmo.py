"""RingMo, masked image modelling on every token, and its sibling SimMIM.

They differ in what hides a pixel. RingMo: single pixels are 0 in normalised space, before the
stem. SimMIM: whole patches, whose tokens are replaced by a learnt one after the stem.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ringmo.config import Model, Pretrain
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, one_of
from ringmo.models.lbp import LARGEST, local_binary_pattern
from ringmo.models.masking import pimask


class RingMo(nn.Module):
    """Encoder, then for each sensor a 1×1 convolution and a pixel shuffle back to the image.

    Args:
        bands: sensor → number of bands.
        settings: `method` ringmo or simmim; `lbp` adds the second target: local binary patterns,
            divided by 9 so that they lie in 0 to 1, by a decoder of their own.

    Raises:
        BadInput: SimMIM masks that cut through tokens.

    Source: RingMo (Sun et al., TGRS 2022) and its open framework; SimMIM (Xie et al., CVPR 2022).
    """

    def __init__(
        self, model: Model, settings: Pretrain, encoder: Encoder, bands: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_size, self.patch_size = model.image_size, model.patch_size
        self.mask_patch_size, self.mask_ratio = settings.mask_patch_size, settings.mask_ratio
        self.inside_ratio = settings.inside_ratio if settings.method == "ringmo" else 1.0
        self.decoders = _decoders(encoder, bands)
        self.lbp_decoders = _decoders(encoder, bands) if settings.lbp else None
        self.mask_token = None
        if settings.method == "simmim":
            if settings.mask_patch_size % model.patch_size:
                raise BadInput(
                    f"pretrain.mask_patch_size: {settings.mask_patch_size} cuts through tokens, "
                    f"SimMIM needs a multiple of model.patch_size ({model.patch_size})"
                )
            self.mask_token = nn.Parameter(torch.empty(model.embed_dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def masks(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """One mask an image, bool (B, 1, H, W), True = masked; all of the same count."""
        return pimask(
            batch,
            self.image_size,
            self.image_size,
            mask_patch_size=self.mask_patch_size,
            mask_ratio=self.mask_ratio,
            inside_ratio=self.inside_ratio,
            generator=generator,
            device=device,
        )

    def forward(self, images: Tensor, mask: Tensor, sensor: str | None = None) -> Tensor:
        """The loss: a float32 scalar, whatever the autocast.

        Args:
            images: (B, bands, H, W), normalised. mask: bool (B, 1, H, W).
            sensor: which the images are of; may be left out where there is one.
        """
        sensor = one_of(self.decoders, sensor)
        features = self._features(images, mask, sensor)
        loss = masked_l1(self.decoders[sensor](features), images, mask)
        if self.lbp_decoders is not None:
            texture = local_binary_pattern(images) / LARGEST
            loss = loss + masked_l1(self.lbp_decoders[sensor](features), texture, mask)
        return loss

    def reconstruct(self, images: Tensor, mask: Tensor, sensor: str | None = None) -> Tensor:
        """The whole image as the model fills it in: (B, bands, H, W), in normalised space."""
        sensor = one_of(self.decoders, sensor)
        whole: Tensor = self.decoders[sensor](self._features(images, mask, sensor))
        return whole

    def _features(self, images: Tensor, mask: Tensor, sensor: str) -> Tensor:
        """(B, C, H/stride, W/stride), from what the mask leaves to see."""
        if self.mask_token is None:
            features: Tensor = self.encoder(images.masked_fill(mask, 0.0), sensor)
        else:
            tokens = self.encoder.tokens(images, sensor)
            hidden = mask[:, 0, :: self.patch_size, :: self.patch_size, None]
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
            features = self.encoder.trunk(tokens)
        return features.permute(0, 3, 1, 2)


def _decoders(encoder: Encoder, bands: Mapping[str, int]) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            name: nn.Sequential(
                nn.Conv2d(encoder.num_features, encoder.stride**2 * count, 1),
                nn.PixelShuffle(encoder.stride),
            )
            for name, count in bands.items()
        }
    )


def masked_l1(reconstruction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error on masked pixels, in normalised space and float32; a scalar.

    Source: Σ|x - x̂|·m / (Σm + 1e-5) / bands, as in RingMo's open framework.
    """
    error = (images.float() - reconstruction.float()).abs() * mask
    return error.sum() / (mask.sum() + 1e-5) / images.shape[1]
