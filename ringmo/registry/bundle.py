"""The bundle: a model as two files, model.safetensors and model.json, and nothing else.

It holds all that answering needs: architecture, sensors with their bands, steps and normalisation,
classes, and an example with its answer. Loading one reads tensors and JSON, and executes nothing
from it.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ringmo.config import Model, Sensor
from ringmo.data.decode import Pixels, filled, fitted
from ringmo.data.loading import square
from ringmo.data.values import decoded_pixels
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, encoder, one_of, transfer
from ringmo.models.classifier import Classifier
from ringmo.models.normal import Normal
from ringmo.stage import write_json

SCHEMA = 2
WEIGHTS = "model.safetensors"
META = "model.json"
EXAMPLE_IMAGE, EXAMPLE_ANSWER = "example.image", "example.answer"
TOLERANCE = 1e-4  # between machines: sums in another order differ by less than a tenth of this


class Example(BaseModel):
    """Which sensor the recorded image is of."""

    model_config = ConfigDict(extra="allow", frozen=True)

    sensor: str


class Meta(BaseModel):
    """What model.json must hold. A task's model has one sensor, and names it."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    schema_version: Literal[2] = Field(alias="schema")
    kind: Literal["encoder", "scene"]
    architecture: Model
    image_size: int = Field(ge=1)
    resize: int | None = Field(None, ge=1)
    sensors: dict[str, Sensor] = Field(min_length=1)
    sensor: str | None = None
    example: Example
    classes: list[str] | None
    generated: bool
    weights_sha256: str
    lineage: dict[str, Any]
    figures: dict[str, Any]

    @field_validator("sensors")
    @classmethod
    def _normalised(cls, sensors: dict[str, Sensor]) -> dict[str, Sensor]:
        if any(sensor.mean is None for sensor in sensors.values()):
            raise ValueError("mean and std are null: a model needs their numbers")
        return sensors


@dataclass
class Bundle:
    """A loaded model. `hash` is over both files; `meta` is model.json."""

    folder: Path
    meta: dict[str, Any]
    model: nn.Module
    hash: str
    device: str
    example: dict[str, Tensor]

    def predict(self, images: Sequence[Pixels], batch_size: int = 64) -> NDArray[np.float32]:
        """Probabilities (N, classes) for images (H, W, C) of any sizes and their sensor's type.

        Raises:
            BadInput: an encoder's bundle, or an image that has other bands or another type.
        """
        if self.meta["classes"] is None:
            raise BadInput(f"{self.folder} is an encoder and has no classes: fine-tune it first")
        return self._answer(images, batch_size)

    def embed(
        self, images: Sequence[Pixels], batch_size: int = 64, sensor: str | None = None
    ) -> NDArray[np.float32]:
        """Features (N, C) of images (H, W, C): the encoder's mean over all positions.

        Args:
            sensor: what the images are of; may be left out where the encoder reads one.

        Raises:
            BadInput: no such sensor, or an image that is not of it.
        """
        trunk = self.model.encoder if isinstance(self.model, Classifier) else self.model
        assert isinstance(trunk, Encoder)
        return self._answer(images, batch_size, trunk, sensor)

    def check_example(self) -> None:
        """Whether the model, here and now, gives the answer that it gave when it was made.

        Raises:
            BadInput: it does not, within 1e-4.
        """
        image = self.example[EXAMPLE_IMAGE].permute(1, 2, 0).numpy()
        sensor = self.meta["example"]["sensor"]
        answer = torch.from_numpy(self._answer([image], 1, sensor=sensor)[0])
        difference = float((answer - self.example[EXAMPLE_ANSWER]).abs().max())
        if not difference <= TOLERANCE:
            raise BadInput(
                f"{self.folder}: the example's answer is off by {difference:.2g} "
                f"(at most {TOLERANCE:g}): the bundle or this installation is damaged"
            )

    def _answer(
        self,
        images: Sequence[Pixels],
        batch_size: int,
        model: Encoder | None = None,
        sensor: str | None = None,
    ) -> NDArray[np.float32]:
        sensor, answers = one_of(self.meta["sensors"], sensor), []
        for start in range(0, len(images), batch_size):
            chunk = []
            for image in images[start : start + batch_size]:
                try:
                    chunk.append(fit(image, self.meta["sensors"][sensor]))
                except BadInput as error:
                    raise BadInput(f"an image of shape {image.shape}: {error}") from None
            small = torch.stack([square(image, read_size(self.meta)) for image in chunk])
            answers.append(answer(model or self.model, small.to(self.device), self.meta, sensor))
        if not answers:
            wide = len(self.meta["classes"] or []) if model is None else model.num_features
            return np.zeros((0, wide), np.float32)
        return torch.cat(answers).cpu().numpy()


def fit(image: Pixels, sensor: Mapping[str, Any]) -> Pixels:
    """An image (H, W, bands) as a model reads it of this sensor; complex values as their power.

    Raises:
        BadInput: it is none of this sensor; the reason.
    """
    of = Sensor.model_validate(sensor)
    bands = len(of.bands)
    if image.ndim != 3:
        raise BadInput(f"{image.ndim} dimensions, the model reads (height, width, {bands})")
    if image.shape[2] != bands:
        raise BadInput(f"{image.shape[2]} bands, the model reads {bands}")
    if of.dtype == "complex64" and image.dtype.kind == "c":
        image = filled(image, None)
    image = fitted(image, of.decoded)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise BadInput("pixels that are NaN or infinite: fill them first, with their band's mean")
    return image


@torch.inference_mode()
def answer(
    model: nn.Module, images: Tensor, meta: Mapping[str, Any], sensor: str | None = None
) -> Tensor:
    """A classifier's probabilities (B, classes), or an encoder's features (B, C).

    Args:
        images: (B, bands, S, S), as decoded, S as `read_size` says.
        meta: `sensors` and the sizes are read. sensor: may be left out where there is one.
    """
    sensor = one_of(meta["sensors"], sensor)
    images = middle(images, meta["image_size"])
    normal = Normal(Sensor.model_validate(meta["sensors"][sensor]), images.device)(images)
    output: Tensor = model(normal) if isinstance(model, Classifier) else model(normal, sensor)
    return output.float().softmax(-1) if output.ndim == 2 else output.float().mean(dim=(1, 2))


def read_size(meta: Mapping[str, Any]) -> int:
    """To how many pixels a tile is scaled; the model reads the middle `image_size` of them."""
    return int(meta.get("resize") or meta["image_size"])


def middle(images: Tensor, size: int) -> Tensor:
    """The middle size × size pixels of square images (B, C, S, S)."""
    edge = (images.shape[-1] - size) // 2
    return images[:, :, edge : edge + size, edge : edge + size]


def write(
    folder: Path, model: nn.Module, meta: dict[str, Any], example: Pixels | None = None
) -> None:
    """Write a bundle: the weights first, model.json last, each whole or not at all.

    Args:
        model: an Encoder or a Classifier; it is left in evaluation mode.
        meta: `Meta` without schema, example and weights_sha256, which are added here.
        example: an image (H, W, C) of the first sensor, whose answer is recorded; without one,
            noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    sensor = next(iter(meta["sensors"]))
    if example is None:
        example = _noise(meta["sensors"][sensor], read_size(meta))
    small = square(fit(example, meta["sensors"][sensor]), read_size(meta))
    model.eval()
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    tensors[EXAMPLE_IMAGE] = small
    tensors[EXAMPLE_ANSWER] = answer(model, small[None].to(device), meta, sensor)[0].cpu()
    data = to_bytes(tensors)
    temporary = folder / f".{WEIGHTS}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / WEIGHTS)
    whole = {
        "schema": SCHEMA,
        **meta,
        "example": {
            "image": EXAMPLE_IMAGE,
            "answer": EXAMPLE_ANSWER,
            "tolerance": TOLERANCE,
            "sensor": sensor,
        },
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    Meta.model_validate(whole)
    write_json(folder / META, whole)


def _noise(sensor: Mapping[str, Any], size: int) -> Pixels:
    """An image (size, size, C) about as bright as the sensor's."""
    random = np.random.default_rng(0)
    noise = random.normal(sensor["mean"], sensor["std"], (size, size, len(sensor["bands"])))
    return decoded_pixels(noise, Sensor.model_validate(sensor))


def load_meta(folder: Path) -> dict[str, Any]:
    """model.json, checked, without the weights.

    Raises:
        BadInput: no bundle, damaged, or of another schema.
    """
    return _read(folder)[0]


def load(folder: Path, device: str = "cpu") -> Bundle:
    """The model of a bundle, in evaluation mode.

    Raises:
        BadInput: no bundle, another schema, truncated or damaged files, weights that do not fit.
    """
    meta, text = _read(folder)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise BadInput(f"{folder / WEIGHTS}: {error.strerror}: no whole bundle") from None
    if hashlib.sha256(data).hexdigest() != meta["weights_sha256"]:
        raise BadInput(f"{folder / WEIGHTS} is damaged: its hash is not the one in {META}")
    try:
        tensors = read_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{folder / WEIGHTS} is damaged: {error}") from None
    example = {
        name: tensors.pop(name) for name in (EXAMPLE_IMAGE, EXAMPLE_ANSWER) if name in tensors
    }
    if len(example) < 2:
        raise BadInput(f"{folder / WEIGHTS} lacks the example: no whole bundle")
    architecture = Model.model_validate(meta["architecture"])
    bands = {name: len(sensor["bands"]) for name, sensor in meta["sensors"].items()}
    scene = meta["kind"] == "scene"
    trunk = encoder(architecture, bands, finetuning=scene)
    model: nn.Module = Classifier(trunk, len(meta["classes"])) if scene else trunk
    came = transfer(tensors, model, str(folder / WEIGHTS))
    if other := [*came.resized, *came.left_out]:
        raise BadInput(f"{folder / WEIGHTS}: weight {other[0]} is not of the model in {META}")
    whole = hashlib.sha256(data + text).hexdigest()
    return Bundle(folder, meta, model.to(device).eval(), whole, device, example)


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    path = folder / META
    try:
        text = path.read_bytes()
        meta = json.loads(text)
    except FileNotFoundError:
        raise BadInput(f"{folder} holds no bundle: {META} is missing") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from None
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        found = meta.get("schema") if isinstance(meta, dict) else meta
        raise BadInput(f"{path}: schema: this version reads {SCHEMA}, found {found!r}")
    try:
        checked = Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {key}: {first['msg']}") from None
    one = len(checked.sensors) == 1 and checked.sensor in checked.sensors
    if (
        (checked.kind == "scene") != bool(checked.classes)
        or (checked.kind == "scene" and not one)
        or checked.example.sensor not in checked.sensors
    ):
        raise BadInput(f"{path}: classes, sensors and sensor do not fit each other or the kind")
    return meta, text
