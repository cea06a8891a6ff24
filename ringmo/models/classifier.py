"""The scene classifier: encoder, mean over all positions, one linear layer."""

from collections.abc import Mapping

from torch import Tensor, nn

from ringmo.models.backbone import Encoder


class Classifier(nn.Module):
    """Images (B, bands, H, W), normalised, or a mapping from sensors → logits (B, classes).

    multi_label: whether a tile may have several classes; the logits are then each class's own.
    """

    def __init__(self, encoder: Encoder, classes: int, multi_label: bool = False) -> None:
        super().__init__()
        self.encoder, self.multi_label = encoder, multi_label
        self.register_buffer("class_weights", None, persistent=False)
        self.head = nn.Linear(encoder.num_features, classes)
        # Small weights: the first answers are near uniform, whatever the encoder's scale.
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(self.encoder(images).mean(dim=(1, 2)))
        return logits
