"""One encoder for several models: held once, and passed once for the same images."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringmo.models.backbone import Encoder

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle

# Batches of windows whose features are kept for the next model. It begins with the first of them:
# of an image with more windows none are kept.
KEPT = 8


class Shared:
    """An encoder's feature maps, kept from one model to the next that reads the same images.

    In place of an encoder's own `stages` and `forward`; without `keeping` they do what they did.
    Of one thread: another's passes are not seen. spared: images that needed no pass.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._stages, self._forward = encoder.stages, encoder.forward
        self._of_thread = threading.local()
        self.spared = 0
        # In place of its methods, so that whatever holds this very module asks here. mypy takes
        # a method for what nobody assigns to.
        encoder.stages = self.stages  # type: ignore[method-assign]
        encoder.forward = self.forward  # type: ignore[method-assign]

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """While models of this encoder answer one after the other for the same images."""
        self._of_thread.kept = []
        try:
            yield
        finally:
            self._of_thread.kept = None

    def stages(self, images: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
        kept = getattr(self._of_thread, "kept", None)
        if kept is None or not isinstance(images, Mapping):
            return self._stages(images)
        for seen, features in kept:
            if seen.keys() == images.keys() and all(_same(seen[n], images[n]) for n in seen):
                self.spared += len(next(iter(images.values())))
                return list(features)
        features = self._stages(images)
        if len(kept) == KEPT:
            self._of_thread.kept = None
        else:
            kept.append((dict(images), features))
        return list(features)

    def forward(self, images: Tensor | Mapping[str, Tensor], sensor: str | None = None) -> Tensor:
        if getattr(self._of_thread, "kept", None) is None or not isinstance(images, Mapping):
            return self._forward(images, sensor)
        # The last of the stages is what `forward` returns, its channels first.
        return self.stages(images)[-1].permute(0, 2, 3, 1)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def encoder_hash(bundle: "Bundle") -> str:
    """Of an encoder's weights and of all that decides what it reads: two that are equal in it
    make the same of the same pixels."""
    about = {
        "architecture": bundle.meta["architecture"],
        "image_size": bundle.encoder.image_size,
        "sensors": {name: sensor.model_dump() for name, sensor in bundle.sensors.items()},
    }
    whole = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(bundle.encoder.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()
