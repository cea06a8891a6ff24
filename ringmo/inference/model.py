"""A trained model for other people's code: what `ringmo.load` gives.

Pixels go in as their sensor's files have them, and never any other way: scale, offset, decibels,
clip, mean and deviation are applied inside, by the model's own numbers.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.data.decode import Pixels, decode
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, one_of
from ringmo.models.normal import Normal
from ringmo.registry.bundle import META, Bundle
from ringmo.registry.bundle import load as load_bundle
from ringmo.tasks.base import SECOND
from ringmo.workspace import Workspace

NAME = re.compile(r"[a-z][a-z0-9_-]*(@[a-z]+|/\d+)")

# Pixels (H, W, bands), or the file that they are in.
Image = Pixels | str | os.PathLike[str]


class TrainedModel(nn.Module):
    """A bundle's model in evaluation mode. `to`, `train`, `parameters` are as of any module.

    predict, embed: decoded images of any sizes, or files, to NumPy's arrays, without gradients.
    forward, features: batches of the model's own size to tensors, with gradients.

    model: the network, which reads normalised images. meta: model.json. hash: of both its files.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._bundle = bundle
        self.model, self.meta, self.hash = bundle.model, bundle.meta, bundle.hash
        self.sensors = bundle.sensors
        self.normal = nn.ModuleDict(
            {name: Normal(sensor, bundle.device) for name, sensor in self.sensors.items()}
        )
        self.eval()

    @property
    def classes(self) -> list[str] | None:
        """Names by number; None of an encoder."""
        classes = self.meta["classes"]
        return None if classes is None else list(classes)

    @property
    def encoder(self) -> Encoder:
        """What reads normalised images: `normalise` makes them, `features` does both."""
        return self._bundle.encoder

    @property
    def image_size(self) -> int:
        """Pixels of a side of what `forward` and `features` read."""
        return int(self.meta["image_size"])

    def forward(
        self, images: Tensor | Mapping[str, Tensor], sensor: str | None = None
    ) -> Tensor | Any:
        """What the network says of a batch: of scenes logits (B, classes); an encoder `features`.

        Of another task, what its network gives in training.

        Args:
            images: (B, bands, S, S), pixels as decoded and of any dtype, S as `image_size` says;
                or several of one ground by sensor, the later date of a change pair as `second`.
                They must be finite, which is not looked at.
            sensor: which `images` are of; may be left out where the model reads one.

        Raises:
            BadInput: another size or number of bands, or an unknown sensor.
        """
        if not isinstance(images, Mapping):
            images = {self._one_of(sensor): images}
        if self._bundle.task is None:
            (name,) = images
            return self.features(images[name], name)
        normal = {name: self.normalise(image, name) for name, image in images.items()}
        return self.model(normal)

    def features(self, images: Tensor, sensor: str | None = None) -> Tensor:
        """The encoder's last feature map: (B, C, S/stride, S/stride); arguments as `forward`'s."""
        name = self._one_of(sensor)
        features: Tensor = self.encoder(self.normalise(images, name), name)
        return features.permute(0, 3, 1, 2)

    def normalise(self, images: Tensor, sensor: str | None = None) -> Tensor:
        """Pixels as decoded → what the network reads; arguments and errors as `forward`'s."""
        name = self._one_of(sensor)
        bands, size = len(self.sensors[name].bands), self.image_size
        if images.ndim != 4 or images.shape[1:] != (bands, size, size):
            raise BadInput(
                f"a batch of shape {tuple(images.shape)}: this model reads (B, {bands}, {size}, "
                f"{size}) of {name}; predict and embed take images of any size"
            )
        normal: Tensor = self.normal[name](images)
        return normal

    def predict(self, images: Sequence[Image | Mapping[str, Image]], batch_size: int = 64) -> Any:
        """What the task says: of scenes probabilities (N, classes), else one dict an image.

        Args:
            images: of any sizes; several of one ground as a mapping, as in `forward`.

        Raises:
            BadInput: an encoder, a file that is no image, or an image of another sensor.
        """
        return self._placed().predict([_pixels(image) for image in images], batch_size)

    def embed(
        self, images: Sequence[Image], batch_size: int = 64, sensor: str | None = None
    ) -> NDArray[np.float32]:
        """Features (N, C) of images of any sizes: the encoder's mean over all positions.

        Raises:
            BadInput: as `predict`, or no such sensor.
        """
        pixels = [_pixels(image) for image in images]
        return self._placed().embed(pixels, batch_size, sensor=self._one_of(sensor))

    def _one_of(self, sensor: str | None) -> str:
        """A sensor's name; of a task's model its tiles' sensor where none is given."""
        if sensor is None or sensor == SECOND:
            sensor = self.meta.get("sensor")
        return one_of(self.sensors, sensor)

    def _placed(self) -> Bundle:
        """The bundle, told on which device its network is by now."""
        return replace(self._bundle, device=str(next(self.model.parameters()).device))


def is_folder(ref: str | os.PathLike[str]) -> bool:
    """Whether a reference is a bundle's folder, and the registry need not be asked."""
    return (Path(ref) / META).is_file() or not NAME.fullmatch(str(ref))


def open_bundle(
    ref: str | os.PathLike[str],
    device: str = "cpu",
    workspace: str | os.PathLike[str] | None = None,
) -> Bundle:
    """The bundle that a reference names; the registry is asked only where it is no folder.

    Raises:
        BadInput, Unreachable: as `ringmo.load`.
    """
    if is_folder(ref):
        return load_bundle(Path(ref), device)
    from ringmo.registry import listing, register
    from ringmo.registry.tracker import Tracker

    where = Workspace.find(workspace)
    tracker = Tracker(where)
    bundle = register.open_bundle(tracker, listing.resolve(where, str(ref), tracker))
    return replace(bundle, model=bundle.model.to(device), device=device)


def _pixels(image: Any) -> Any:
    if isinstance(image, Mapping):
        return {name: _pixels(one) for name, one in image.items()}
    if not isinstance(image, str | os.PathLike):
        return np.asarray(image)
    try:
        return decode(Path(image).read_bytes())
    except OSError as error:
        raise BadInput(f"{image}: {error.strerror}") from None
    except BadInput as error:
        raise BadInput(f"{image}: {error}") from None
