"""The scene classifier: encoder, mean over all positions, one linear layer."""

from torch import Tensor, nn

from ringmo.models.backbone import Encoder


class Classifier(nn.Module):
    """Images (B, bands, H, W), normalised → logits (B, classes)."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, classes)
        # Small weights: the first answers are near uniform, whatever the encoder's scale.
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images).mean(dim=(1, 2)))
        return logits
