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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ringmo import tasks
from ringmo.config import MAX_SIDE, Finetune, Model, Sensor
from ringmo.data.decode import Pixels, filled, fitted
from ringmo.data.loading import SelectedTiles, padded, square
from ringmo.data.values import decoded_pixels
from ringmo.errors import BadInput
from ringmo.models.backbone import Encoder, encoder, one_of, transfer
from ringmo.models.normal import Normal
from ringmo.stage import write_json
from ringmo.tasks.base import SECOND, Images, Task
from ringmo.tasks.samples import Samples

if TYPE_CHECKING:
    from ringmo.workspace import Workspace

SCHEMA = 3
READ = (2, SCHEMA)  # what schema 2 lacks has a default
WEIGHTS = "model.safetensors"
META = "model.json"
EXAMPLE_IMAGE, EXAMPLE_ANSWER = "example.image", "example.answer"
ENCODER = "encoder"
TOLERANCE = 1e-4  # between machines: sums in another order differ by less than a tenth of this


class Example(BaseModel):
    """Which sensor the recorded image is of."""

    model_config = ConfigDict(extra="allow", frozen=True)

    sensor: str


# Of a scene model of schema 2, which had no settings that its making needs.
PLAIN = {
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 1,
    "base_lr": 1.0,
    "min_lr": 0.0,
    "crop_scale": [1.0, 1.0],
}


class Meta(BaseModel):
    """What model.json must hold. A task's model names the sensor of its tiles among its sensors.

    tile_pixels: of the longer side of the tiles it learnt from, which were scaled to `resize`.
    gsd_m: their ground sampling distance, `low` and `high` (5 and 95 % of them), metres; of tiles
    without coordinates None.
    settings: finetune.TASK, as it was.
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    schema_version: Literal[2, 3] = Field(alias="schema")
    kind: str
    architecture: Model
    image_size: int = Field(ge=1, le=MAX_SIDE)
    resize: int | None = Field(None, ge=1, le=MAX_SIDE)
    tile_pixels: int | None = Field(None, ge=1)
    gsd_m: dict[Literal["low", "high"], Annotated[float, Field(gt=0)]] | None = None
    settings: Finetune = Finetune.model_validate(PLAIN)
    sensors: dict[str, Sensor] = Field(min_length=1)
    sensor: str | None = None
    example: Example
    classes: list[str] | None
    generated: bool
    weights_sha256: str
    lineage: dict[str, Any]
    figures: dict[str, Any]

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind != ENCODER and kind not in tasks.names():
            raise ValueError(tasks.unknown(kind))
        return kind

    @field_validator("sensors")
    @classmethod
    def _normalised(cls, sensors: dict[str, Sensor]) -> dict[str, Sensor]:
        if any(sensor.mean is None for sensor in sensors.values()):
            raise ValueError("mean and std are null: a model needs their numbers")
        return sensors


# An image (H, W, bands); or several of one ground, by their sensors' names, the later date of a
# change pair under `second`.
Image = Pixels | Mapping[str, Pixels]


@dataclass
class Bundle:
    """A loaded model. `hash` is over both files; `meta` is model.json."""

    folder: Path
    meta: dict[str, Any]
    model: nn.Module
    hash: str
    device: str
    example: dict[str, Tensor]

    @property
    def task(self) -> Task | None:
        """What it answers; None for an encoder."""
        return None if self.meta["kind"] == ENCODER else tasks.find(self.meta["kind"])

    @property
    def classes(self) -> list[str]:
        return list(self.meta["classes"] or [])

    @property
    def settings(self) -> Finetune:
        return Finetune.model_validate(self.meta.get("settings", PLAIN))

    @property
    def sensors(self) -> dict[str, Sensor]:
        """What it reads, of a task's model the sensor of its tiles first."""
        first = self.meta.get("sensor")
        names = sorted(self.meta["sensors"], key=lambda name: name != first)
        return {name: Sensor.model_validate(self.meta["sensors"][name]) for name in names}

    @property
    def reads(self) -> dict[str, Sensor]:
        """What it reads of one ground: `sensors`, and of a pair the later date as `second`."""
        found = self.sensors
        if self.task is not None and SECOND in self.task.parts:
            found[SECOND] = next(iter(found.values()))
        return found

    @property
    def encoder(self) -> Encoder:
        trunk = self.model if self.meta["kind"] == ENCODER else self.model.encoder
        assert isinstance(trunk, Encoder)
        return trunk

    def tiles(
        self, workspace: "Workspace", selection: Path, split: str | None = None
    ) -> SelectedTiles:
        """The tiles of a selection that it reads, with all that its task needs of them."""
        first, *beside = self.sensors
        return SelectedTiles(workspace, selection, split, first, task=self.task, beside=beside)

    def samples(self, tiles: SelectedTiles) -> Samples:
        """What makes samples of tiles, as this model reads them."""
        assert self.task is not None
        how = self.settings.heights, self.settings.multi_label
        return Samples(self.task, tiles, self.classes, self.sensors, self.device, *how)

    def predict(self, images: Sequence[Image], batch_size: int = 64) -> Any:
        """What the task says of images of any sizes and their sensor's type.

        Of scenes probabilities (N, classes); else one dict an image (`Task.told`), for its own
        pixels.

        Raises:
            BadInput: an encoder's bundle, or an image that has other bands or another type.
        """
        if self.task is None:
            raise BadInput(f"{self.folder} is an encoder and has no classes: fine-tune it first")
        from ringmo.inference import whole_images

        return whole_images.predict(self, self.task, images, batch_size)

    def embed(
        self, images: Sequence[Pixels], batch_size: int = 64, sensor: str | None = None
    ) -> NDArray[np.float32]:
        """Features (N, C) of images (H, W, C): the encoder's mean over all positions.

        Args:
            sensor: what the images are of; may be left out where the encoder reads one.

        Raises:
            BadInput: no such sensor, or an image that is not of it.
        """
        name = one_of(self.meta["sensors"], sensor)
        answers = [np.zeros((0, self.encoder.num_features), np.float32)]
        for start in range(0, len(images), batch_size):
            chunk = [self.fit(image, name) for image in images[start : start + batch_size]]
            small = torch.stack([square(image, read_size(self.meta)) for image in chunk])
            answers.append(features(self.encoder, small.to(self.device), self.meta, name))
        return np.concatenate(answers)

    def fit(self, image: Pixels, name: str) -> Pixels:
        """`fit` to what it reads under a name, with an error that says which image."""
        try:
            return fit(image, self.reads[name])
        except BadInput as error:
            raise BadInput(f"an image of shape {image.shape}: {error}") from None

    def normalised(self, images: Mapping[str, Tensor]) -> Images:
        """Images (B, bands, S, S), as decoded, by what they are of, as the model reads them."""
        return _normalised(self.meta, images, self.device)

    @property
    def example_pixels(self) -> dict[str, Pixels]:
        """The example's images (S, S, bands), at the size they are read at, by what they are of."""
        images = _example_images(self.example, self.meta)
        return {name: image[0].permute(1, 2, 0).numpy() for name, image in images.items()}

    def check_example(self) -> None:
        """Whether the model, here and now, gives the answer that it gave when it was made.

        Raises:
            BadInput: it does not, within 1e-4 of the largest number.
        """
        images = self.normalised(_example_images(self.example, self.meta))
        answer = _signature(self.model, self.meta, images)
        was = self.example[EXAMPLE_ANSWER]
        difference = float((answer - was).abs().max()) / max(1.0, float(was.abs().max()))
        if not difference <= TOLERANCE:
            raise BadInput(
                f"{self.folder}: the example's answer is off by {difference:.2g} "
                f"(at most {TOLERANCE:g}): the bundle or this installation is damaged"
            )


@torch.inference_mode()
def features(
    model: Encoder, images: Tensor, meta: Mapping[str, Any], sensor: str
) -> NDArray[np.float32]:
    """An encoder's features (B, C): the mean over all positions.

    Args:
        images: (B, bands, S, S), as decoded, S as `read_size` says. meta: `sensors` and the sizes
            are read.
    """
    normal = Normal(Sensor.model_validate(meta["sensors"][sensor]), images.device)
    size = meta["image_size"]
    edge = (images.shape[-1] - size) // 2
    inner = images[:, :, edge : edge + size, edge : edge + size]
    mean: Tensor = model(normal(inner), sensor).float().mean(dim=(1, 2))
    return mean.cpu().numpy()


def _normalised(
    meta: Mapping[str, Any], images: Mapping[str, Tensor], device: torch.device | str
) -> Images:
    """Images (B, bands, S, S), as decoded, as a model reads them."""
    normal = {}
    for name, image in images.items():
        sensor = Sensor.model_validate(meta["sensors"][meta["sensor"] if name == SECOND else name])
        normal[name] = Normal(sensor, device)(image.to(device))
    return normal


@torch.inference_mode()
def _signature(model: nn.Module, meta: Mapping[str, Any], images: Images) -> Tensor:
    """What the answer to the example is compared by: (n,), on the CPU."""
    if meta["kind"] != ENCODER:
        return tasks.find(meta["kind"]).signature(model, images)[0].float().cpu()
    (sensor,) = images
    said: Tensor = model(images[sensor], sensor).float().mean(dim=(1, 2))
    return said[0].cpu()


def _example_images(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The example's images, a batch of one each, by what they are of."""
    named = {
        name.removeprefix(f"{EXAMPLE_IMAGE}."): tensor[None]
        for name, tensor in tensors.items()
        if name.startswith(f"{EXAMPLE_IMAGE}.")
    }
    return {meta["example"]["sensor"]: tensors[EXAMPLE_IMAGE][None], **named}


def fit(image: Pixels, sensor: Sensor | Mapping[str, Any]) -> Pixels:
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


def read_size(meta: Mapping[str, Any]) -> int:
    """To how many pixels a tile is scaled; the model reads the middle `image_size` of them."""
    return int(meta.get("resize") or meta["image_size"])


def write(
    folder: Path,
    model: nn.Module,
    meta: dict[str, Any],
    example: Pixels | Mapping[str, Pixels] | None = None,
) -> None:
    """Write a bundle: the weights first, model.json last, each whole or not at all.

    Args:
        model: an Encoder or a task's model; it is left in evaluation mode.
        meta: `Meta` without schema, example and weights_sha256, which are added here.
        example: an image (H, W, C) of the model's sensor, or of its first one, whose answer is
            recorded; several by name where the model reads several; without one, noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    sensor = meta.get("sensor") or next(iter(meta["sensors"]))
    if example is None:
        example = _noise(meta["sensors"][sensor], read_size(meta))
    if not isinstance(example, Mapping):
        example = {sensor: example}
    model.eval()
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    small = {}
    for name, image in example.items():
        pixels = fit(image, meta["sensors"][sensor if name == SECOND else name])
        whole = meta["kind"] != ENCODER and tasks.find(meta["kind"]).padded
        small[name] = square(padded(pixels) if whole else pixels, read_size(meta))
        tensors[EXAMPLE_IMAGE + (f".{name}" if name != sensor else "")] = small[name]
    batch = {name: image[None] for name, image in small.items()}
    answered = _signature(model, meta, _normalised({**meta, "sensor": sensor}, batch, device))
    tensors[EXAMPLE_ANSWER] = answered.contiguous()
    data = to_bytes(tensors)
    temporary = folder / f".{WEIGHTS}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / WEIGHTS)
    whole_meta = {
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
    Meta.model_validate(whole_meta)
    write_json(folder / META, whole_meta)


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
    example = {name: tensors.pop(name) for name in list(tensors) if name.startswith("example.")}
    if not {EXAMPLE_IMAGE, EXAMPLE_ANSWER} <= example.keys():
        raise BadInput(f"{folder / WEIGHTS} lacks the example: no whole bundle")
    architecture = Model.model_validate(meta["architecture"])
    # Before memory is asked for: what a stranger wrote may name any size.
    sizes = [size for tensor in tensors.values() for size in tensor.shape]
    if architecture.embed_dim > max(sizes, default=0) or sum(architecture.depths) > len(tensors):
        raise BadInput(f"{folder / META}: architecture: {WEIGHTS} holds no model of this size")
    bands = {name: len(sensor["bands"]) for name, sensor in meta["sensors"].items()}
    task = None if meta["kind"] == ENCODER else tasks.find(meta["kind"])
    trunk = encoder(architecture, bands, finetuning=task is not None)
    model: nn.Module = trunk
    if task is not None:
        settings = Finetune.model_validate(meta.get("settings", PLAIN))
        model = task.model(trunk, len(meta["classes"]), settings)
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
    if not isinstance(meta, dict) or meta.get("schema") not in READ:
        found = meta.get("schema") if isinstance(meta, dict) else meta
        raise BadInput(f"{path}: schema: this version reads {SCHEMA}, found {found!r}")
    try:
        checked = Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {key}: {first['msg']}") from None
    encodes = checked.kind == ENCODER
    if (
        encodes != (checked.classes is None)
        or not (encodes or checked.sensor in checked.sensors)
        or checked.example.sensor not in checked.sensors
    ):
        raise BadInput(f"{path}: classes, sensors and sensor do not fit each other or the kind")
    return meta, text
