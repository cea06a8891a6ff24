"""MAE, RingMo's sibling for ViT: the encoder sees only the tokens that are not masked.

So it is fast, and masks whole patches: with single pixels masked, no token is empty enough to drop.
"""

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ringmo.config import Model, Pretrain
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, one_of
from ringmo.models.masking import pimask, share_of
from ringmo.models.position import sine_cosine


class MAE(nn.Module):
    """Encoder on the kept tokens, then a light ViT on all, a learnt token standing for the others.

    The light ViT is 512 wide and 8 deep with 16 heads; of a small encoder it has the width and
    the heads, and two thirds of the depth. The last layer is each sensor's own.

    Raises:
        BadInput: an encoder without sine-cosine positions.

    Source: He et al., CVPR 2022, with per-patch normalised targets. The class token ends with the
    encoder.
    """

    positions: Tensor

    def __init__(
        self, model: Model, settings: Pretrain, encoder: Encoder, bands: Mapping[str, int]
    ) -> None:
        super().__init__()
        if model.backbone != "vit" or model.position != "sincos":
            raise BadInput(
                f"pretrain.method: mae needs model.backbone: vit and model.position: sincos, "
                f"found {model.backbone} and {model.position}"
            )
        self.encoder = encoder
        self.image_size, self.patch_size = model.image_size, model.patch_size
        self.mask_ratio = settings.mask_ratio
        self.side = model.image_size // model.patch_size
        self.kept = self.side**2 - share_of(settings.mask_ratio, self.side**2)
        if not self.kept:
            raise BadInput(
                f"pretrain.mask_ratio: {settings.mask_ratio} of {self.side**2} patches leaves "
                f"nothing to see"
            )

        width = min(512, model.embed_dim)
        heads = 16 if width == 512 else model.num_heads[0]
        depth = min(8, max(1, 2 * model.depths[0] // 3))
        self.embed = nn.Linear(model.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer(
            "positions", sine_cosine(self.side, self.side, width), persistent=False
        )
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoders = nn.ModuleDict(
            {name: nn.Linear(width, self.patch_size**2 * count) for name, count in bands.items()}
        )
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def masks(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """One mask an image, bool (B, 1, H, W), True = masked: whole tokens, of the same count."""
        return pimask(
            batch,
            self.image_size,
            self.image_size,
            mask_patch_size=self.patch_size,
            mask_ratio=self.mask_ratio,
            inside_ratio=1.0,
            generator=generator,
            device=device,
        )

    def forward(self, images: Tensor, mask: Tensor, sensor: str | None = None) -> Tensor:
        """The loss: mean squared error on the pixels of masked patches, each patch normalised.

        A float32 scalar, whatever the autocast.

        Args:
            images: (B, bands, H, W), normalised. mask: bool (B, 1, H, W), as `masks` draws them.
            sensor: which the images are of; may be left out where there is one.
        """
        sensor = one_of(self.decoders, sensor)
        guess, hidden = self._decode(images, mask, sensor)
        with torch.autocast(images.device.type, enabled=False):
            patches = self._patches(images.float())
            mean, deviation = _measures(patches)
            error = (guess.float() - (patches - mean) / deviation).square().mean(-1)
            loss: Tensor = (error * hidden).sum() / hidden.sum()
        return loss

    def reconstruct(self, images: Tensor, mask: Tensor, sensor: str | None = None) -> Tensor:
        """The whole image as the model fills it in: (B, bands, H, W), in normalised space.

        The model knows a patch's pattern, not its mean and deviation: these are the image's own.
        """
        sensor = one_of(self.decoders, sensor)
        guess, _ = self._decode(images, mask, sensor)
        mean, deviation = _measures(self._patches(images.float()))
        patches = guess.float() * deviation + mean
        side, size = self.side, self.patch_size
        whole = patches.reshape(len(images), side, side, size, size, images.shape[1])
        return whole.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)

    def _decode(self, images: Tensor, mask: Tensor, sensor: str) -> tuple[Tensor, Tensor]:
        """Pixels of all patches (B, N, p·p·bands) and which were masked (B, N)."""
        hidden = mask[:, 0, :: self.patch_size, :: self.patch_size].flatten(1)
        # Stable, so that kept tokens stay in order; a fixed number of them, so that nothing waits.
        order = hidden.byte().argsort(dim=1, stable=True)
        features = self.encoder.forward_kept(images, order[:, : self.kept], sensor)
        seen = self.embed(features)
        token = self.mask_token.to(seen.dtype).expand(len(seen), order.shape[1] - self.kept, -1)
        back = order.argsort(1)[:, :, None].expand(-1, -1, seen.shape[2])
        tokens = torch.cat((seen, token), 1).gather(1, back) + self.positions
        return self.decoders[sensor](self.norm(self.blocks(tokens))), hidden

    def _patches(self, images: Tensor) -> Tensor:
        """(B, bands, H, W) → (B, N, p·p·bands), row by row."""
        side, size = self.side, self.patch_size
        cut = images.reshape(*images.shape[:2], side, size, side, size)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _measures(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch (B, N, 1); the deviation of a flat patch is not quite 0."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
