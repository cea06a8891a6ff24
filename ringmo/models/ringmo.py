"""RingMo: masked image modelling on every token, with one convolution as its decoder."""

from torch import Tensor, nn

from ringmo.models.backbone import Encoder


class RingMo(nn.Module):
    """Encoder, then a 1×1 convolution and a pixel shuffle back to the image.

    No mask token: a masked pixel is 0 in normalised space, and all tokens pass the encoder.
    """

    def __init__(self, encoder: Encoder, bands: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, encoder.stride**2 * bands, 1),
            nn.PixelShuffle(encoder.stride),
        )

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Normalised images (B, bands, H, W), mask (B, 1, H, W) → (B, bands, H, W)."""
        features = self.encoder(images.masked_fill(mask, 0.0))
        reconstruction: Tensor = self.decoder(features.permute(0, 3, 1, 2))
        return reconstruction


def masked_l1(reconstruction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error on masked pixels, in normalised space and float32; a scalar.

    Source: Σ|x - x̂|·m / (Σm + 1e-5) / bands, as in RingMo's open framework.
    """
    error = (images.float() - reconstruction.float()).abs() * mask
    return error.sum() / (mask.sum() + 1e-5) / images.shape[1]
