"""A registered model for programs without ringmo: as ONNX, or as torch.export's program.

What goes in is float32 pixels (B, bands, S, S) as their sensor's files have them, one input for
each image of one ground, S as the model's `image_size` says; B is free. Normalisation is inside.
What comes out is the task's answer as a tensor: of scenes probabilities (B, classes), of masks
probabilities (B, classes, S, S), of heights metres (B, S, S); of an encoder its last feature map
(B, S/stride, S/stride, C). The file is kept only where it gives the model's own answers.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringmo.errors import BadInput
from ringmo.inference.model import open_bundle
from ringmo.models.normal import Normal
from ringmo.registry.bundle import TOLERANCE, Bundle
from ringmo.workspace import Workspace

FORMATS = ("onnx", "torch")
BATCHES = (1, 3)  # that the file is tried with; it is traced with another
TRACED = 2


class Standalone(nn.Module):
    """A bundle's model with its normalisation: tensors in, one tensor out."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model, self.task = bundle.model, bundle.task
        reads = bundle.reads
        self.names = list(reads)
        self.normal = nn.ModuleDict({n: Normal(reads[n], bundle.device) for n in reads})

    def forward(self, *images: Tensor) -> Tensor:
        normal = {
            name: self.normal[name](image) for name, image in zip(self.names, images, strict=True)
        }
        if self.task is not None:
            said: Tensor = self.task.answer(self.model, normal)
            return said
        features: Tensor = self.model(normal)
        return features


def export(workspace: Workspace, ref: str, form: str, out: Path) -> dict[str, Any]:
    """Write `out`, and say what is in it.

    Args:
        form: one of FORMATS.

    Returns:
        ref, version's bundle_hash, format, file, bytes, inputs, outputs, difference (the largest,
        of the largest number), tolerance.

    Raises:
        BadInput: the model is unknown or cannot be exported, a package is missing, or the file's
            answers are others, or it cannot be written. Unreachable: MLflow does not answer.
    """
    bundle = open_bundle(ref, workspace=workspace.root)
    task = bundle.task
    if task is not None and "boxes" in task.parts:
        raise BadInput(
            f"{ref}: {task.name} models are not exported: how many boxes there are, and which of "
            f"them stay, depends on the image; their encoder is (encoder@champion)"
        )
    if task is None and len(bundle.sensors) > 1:
        raise BadInput(
            f"{ref}: an encoder of {' and '.join(bundle.sensors)} is exported as part of a task's "
            f"model, which says which of them it reads"
        )
    if out.is_dir():
        raise BadInput(f"--out {out}: a folder: name a file")
    temporary = out.with_name(f".{out.name}.tmp")
    model = Standalone(bundle).eval()
    about = _about(bundle)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            run = (_onnx if form == "onnx" else _torch)(
                model, _inputs(bundle, TRACED), about, temporary
            )
            difference = max(_difference(model, run, _inputs(bundle, b)) for b in BATCHES)
        if not difference <= TOLERANCE:
            raise BadInput(
                f"{ref}: the {form} file's answers are off by {difference:.2g} (at most "
                f"{TOLERANCE:g}): nothing is written"
            )
        temporary.replace(out)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror or error}") from None
    # PyTorch's exporters and onnxruntime have no common error.
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadInput(f"{ref}: this architecture is not exported to {form}: {line}") from None
    finally:
        with contextlib.suppress(OSError):  # its folder is none
            temporary.unlink(missing_ok=True)
    return {
        "ref": ref,
        "bundle_hash": bundle.hash,
        "format": form,
        "file": str(out),
        "bytes": out.stat().st_size,
        **about,
        "difference": difference,
        "tolerance": TOLERANCE,
    }


def text(done: dict[str, Any]) -> str:
    """What was done, for people."""
    inputs = "; ".join(
        f"{one['name']} (batch, {len(one['bands'])}, {one['side']}, {one['side']})"
        for one in done["inputs"]
    )
    opened = "onnxruntime.InferenceSession" if done["format"] == "onnx" else "torch.export.load"
    return (
        f"{done['file']}: {done['bytes'] / 1e6:.1f} MB\n"
        f"It reads {inputs}: float32, pixels as decoded\n"
        f"Same answers as {done['ref']}: they differ by {done['difference']:.1g} at most\n"
        f'Next: {opened}("{done["file"]}")'
    )


def _about(bundle: Bundle) -> dict[str, Any]:
    size = int(bundle.meta["image_size"])
    inputs = [
        {
            "name": name,
            "bands": list(sensor.bands),
            "dtype": sensor.dtype,
            "side": size,
        }
        for name, sensor in bundle.reads.items()
    ]
    output = "features" if bundle.task is None else bundle.meta["kind"]
    return {"inputs": inputs, "output": output, "classes": bundle.classes}


def _inputs(bundle: Bundle, batch: int) -> tuple[Tensor, ...]:
    """The recorded example, turned a quarter further for each image of a batch."""
    size = int(bundle.meta["image_size"])
    found = []
    for pixels in bundle.example_pixels.values():
        edge = (pixels.shape[0] - size) // 2
        image = torch.from_numpy(pixels[edge : edge + size, edge : edge + size].copy()).float()
        image = image.permute(2, 0, 1)
        found.append(torch.stack([image.rot90(i, (1, 2)) for i in range(batch)]))
    return tuple(found)


Run = Callable[..., Tensor]


def _free(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch", min=1)
    return (tuple({0: batch} for _ in inputs),)


def _torch(model: Standalone, inputs: tuple[Tensor, ...], about: dict[str, Any], path: Path) -> Run:
    program = torch.export.export(model, inputs, dynamic_shapes=_free(inputs), strict=False)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"ringmo.json": json.dumps(about)})
    with path.open("rb") as file:
        run: Run = torch.export.load(file).module()
    return run


def _onnx(model: Standalone, inputs: tuple[Tensor, ...], about: dict[str, Any], path: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch.onnx writes with
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is not installed: `pip install 'ringmo[export]'`") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=_free(inputs),
            input_names=model.names,
            output_names=[about["output"]],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["ringmo"] = json.dumps(about)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*images: Tensor) -> Tensor:
        named = {n: image.numpy() for n, image in zip(model.names, images, strict=True)}
        return torch.from_numpy(session.run(None, named)[0])

    return run


def _difference(model: Standalone, run: Run, inputs: tuple[Tensor, ...]) -> float:
    wanted, found = model(*inputs), run(*inputs)
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max()) / max(1.0, float(wanted.abs().max()))
