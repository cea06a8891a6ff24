"""The bundle: a model as two files, model.safetensors and model.json, and nothing else.

It holds all that answering needs: architecture, sensor and bands, normalisation, classes, and an
example with its answer. Loading one reads tensors and JSON, and executes nothing from it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ringmo.config import Model
from ringmo.data.decode import Pixels
from ringmo.data.loading import square
from ringmo.errors import BadInput
from ringmo.models.backbone import encoder, transfer
from ringmo.models.classifier import Classifier
from ringmo.stage import write_json

SCHEMA = 1
WEIGHTS = "model.safetensors"
META = "model.json"
EXAMPLE_IMAGE, EXAMPLE_ANSWER = "example.image", "example.answer"
TOLERANCE = 1e-4  # between machines: sums in another order differ by less than a tenth of this


class Meta(BaseModel):
    """What model.json must hold."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(alias="schema")
    kind: Literal["encoder", "scene"]
    architecture: Model
    image_size: int = Field(ge=1)
    sensor: str
    bands: list[str] = Field(min_length=1)
    mean: list[float]
    std: list[float]
    classes: list[str] | None
    generated: bool
    weights_sha256: str
    lineage: dict[str, Any]
    figures: dict[str, Any]


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
        """Probabilities (N, classes) for uint8 images (H, W, C) of any sizes.

        Raises:
            BadInput: an encoder's bundle, or an image that has other bands.
        """
        if self.meta["classes"] is None:
            raise BadInput(f"{self.folder} is an encoder and has no classes: fine-tune it first")
        return self._answer(images, batch_size)

    def embed(self, images: Sequence[Pixels], batch_size: int = 64) -> NDArray[np.float32]:
        """Features (N, C) of uint8 images (H, W, C): the encoder's mean over all positions."""
        trunk = self.model.encoder if isinstance(self.model, Classifier) else self.model
        return self._answer(images, batch_size, trunk)

    def check_example(self) -> None:
        """Whether the model, here and now, gives the answer that it gave when it was made.

        Raises:
            BadInput: it does not, within 1e-4.
        """
        image = self.example[EXAMPLE_IMAGE].permute(1, 2, 0).numpy()
        answer = torch.from_numpy(self._answer([image], 1)[0])
        difference = float((answer - self.example[EXAMPLE_ANSWER]).abs().max())
        if not difference <= TOLERANCE:
            raise BadInput(
                f"{self.folder}: the example's answer is off by {difference:.2g} "
                f"(at most {TOLERANCE:g}): the bundle or this installation is damaged"
            )

    def _answer(
        self, images: Sequence[Pixels], batch_size: int, model: nn.Module | None = None
    ) -> NDArray[np.float32]:
        answers = []
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            for image in chunk:
                if image.ndim != 3 or image.shape[2] != len(self.meta["bands"]):
                    raise BadInput(
                        f"an image of shape {image.shape}: this model reads "
                        f"(height, width, {len(self.meta['bands'])})"
                    )
            small = torch.stack([square(image, self.meta["image_size"]) for image in chunk])
            answers.append(answer(model or self.model, small.to(self.device), self.meta))
        if not answers:
            return np.zeros((0, len(self.meta["classes"] or [])), np.float32)
        return torch.cat(answers).cpu().numpy()


@torch.inference_mode()
def answer(model: nn.Module, images: Tensor, meta: dict[str, Any]) -> Tensor:
    """Of uint8 images (B, C, size, size): a classifier's probabilities or an encoder's features."""
    output: Tensor = model(normalise(images, meta["mean"], meta["std"]))
    return output.float().softmax(-1) if output.ndim == 2 else output.float().mean(dim=(1, 2))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, H, W) to float32 of mean 0 and deviation 1 a band."""
    shape = (1, len(mean), 1, 1)
    return (images.float() - images.new_tensor(mean, dtype=torch.float32).view(shape)) / (
        images.new_tensor(std, dtype=torch.float32).view(shape)
    )


def write(
    folder: Path, model: nn.Module, meta: dict[str, Any], example: Pixels | None = None
) -> None:
    """Write a bundle: the weights first, model.json last, each whole or not at all.

    Args:
        model: an Encoder or a Classifier; it is left in evaluation mode.
        meta: `Meta` without schema, example and weights_sha256, which are added here.
        example: an image (H, W, C) whose answer is recorded; without one, noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    if example is None:
        shape = (meta["image_size"], meta["image_size"], len(meta["bands"]))
        example = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    small = square(example, meta["image_size"])
    model.eval()
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    tensors[EXAMPLE_IMAGE] = small
    tensors[EXAMPLE_ANSWER] = answer(model, small[None].to(device), meta)[0].cpu()
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
        "example": {"image": EXAMPLE_IMAGE, "answer": EXAMPLE_ANSWER, "tolerance": TOLERANCE},
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    Meta.model_validate(whole)
    write_json(folder / META, whole)


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
    trunk = encoder(architecture, len(meta["bands"]))
    model: nn.Module = trunk
    if meta["kind"] == "scene":
        model = Classifier(trunk, len(meta["classes"]))
    transfer(tensors, model, str(folder / WEIGHTS))
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
    if (checked.kind == "scene") != bool(checked.classes) or not (
        len(checked.bands) == len(checked.mean) == len(checked.std)
    ):
        raise BadInput(f"{path}: classes, bands, mean and std do not fit each other or the kind")
    return meta, text
