"""Labels for images with a registered model, or with a bundle in a folder."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.errors import BadInput
from ringmo.stage import write_json
from ringmo.workspace import Workspace

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


def predict(
    workspace: Workspace,
    images: list[str],
    ref: str = "scene@champion",
    top: int = 5,
    batch_size: int = 64,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """The most likely classes of each image, in the order given.

    Args:
        images: files, folders (searched for JPEG, PNG and GeoTIFF files) and globs.
        ref: `scene@champion`, `scene/7`, or a bundle's folder.
        top: how many classes each answer lists.
        batch_size: images in memory at a time.
        out: a folder for predictions.json, or a file ending in .json.

    Returns:
        {image, label, confidence, top: [{label, probability}]} for each image that was read, and
        {image, error} for each that was set aside.

    Raises:
        BadInput: no image at all could be read, or the model is unknown or no classifier.
        Unreachable: MLflow does not answer.
    """
    if top < 1:
        raise BadInput(f"--top {top}: at least 1")
    paths = find_images(images)
    bundle = _open(workspace, ref)
    classes: list[str] | None = bundle.meta["classes"]
    if not classes:
        raise BadInput(f"{ref} is an encoder and has no classes: name a task's model")
    sensor = bundle.meta["sensors"][bundle.meta["sensor"]]

    answers: list[dict[str, Any]] = []
    with console.progress("predict", len(paths)) as bar:
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            read = [_read(path, sensor) for path in chunk]
            probabilities = iter(bundle.predict([p for p in read if not isinstance(p, str)]))
            for path, pixels in zip(chunk, read, strict=True):
                if isinstance(pixels, str):
                    answers.append({"image": str(path), "error": pixels})
                else:
                    answers.append({"image": str(path), **_best(next(probabilities), classes, top)})
            bar.advance(len(chunk))
    failed = [answer for answer in answers if "error" in answer]
    if len(failed) == len(answers):
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise BadInput(f"{failed[0]['image']}: {failed[0]['error']}{more}: no image could be read")
    if failed:
        console.note(f"{len(failed)} of {len(answers)} images could not be read and are set aside")
    if out is not None:
        _write(out, answers)
    return answers


def find_images(images: Iterable[str]) -> list[Path]:
    """The files that paths, folders and globs stand for, each once, in order.

    Raises:
        BadInput: one of them stands for nothing.
    """
    found: dict[Path, None] = {}
    for given in images:
        path = Path(given)
        if path.is_dir():
            inside = sorted(
                Path(folder) / name
                for folder, _, names in os.walk(path)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES
            )
            if not inside:
                raise BadInput(f"{given}: no JPEG, PNG or TIFF file in this folder")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            matches = [Path(name) for name in sorted(glob.glob(given, recursive=True))]  # noqa: PTH207
            if not matches:
                raise BadInput(f"{given}: no such file, and no glob that matches one")
            found.update(dict.fromkeys(match for match in matches if match.is_file()))
    if not found:
        raise BadInput("no image given: name files, folders or globs")
    return list(found)


def text(answers: list[dict[str, Any]]) -> str:
    """A table for people; what was set aside comes last, with its reason."""
    rows = [
        (
            answer["image"],
            answer["label"],
            f"{100 * answer['confidence']:.1f} %",
            ", ".join(f"{r['label']} {100 * r['probability']:.0f} %" for r in answer["top"][1:3]),
        )
        for answer in answers
        if "error" not in answer
    ]
    lines = [console.table(rows, ("image", "label", "confidence", "next"))] if rows else []
    lines += [f"not read: {a['image']}: {a['error']}" for a in answers if "error" in a]
    return "\n".join(lines)


def _open(workspace: Workspace, ref: str) -> Any:
    """The bundle of a reference; MLflow is asked only where a registered version is named."""
    from ringmo.registry import bundle

    if (Path(ref) / "model.json").is_file():
        return bundle.load(Path(ref))
    from ringmo.registry import lineage
    from ringmo.registry.register import open_bundle
    from ringmo.registry.tracker import Tracker

    tracker = Tracker(workspace)
    return open_bundle(tracker, lineage.resolve(workspace, ref, tracker))


def _read(path: Path, sensor: dict[str, Any]) -> Any:
    """Pixels (H, W, bands) as the sensor's, or the reason why there are none."""
    from ringmo.data.decode import decode
    from ringmo.registry.bundle import fit

    try:
        return fit(decode(path.read_bytes()), sensor)
    except BadInput as error:
        return str(error)
    except OSError as error:
        return str(error.strerror)


def _best(probabilities: Any, classes: list[str], top: int) -> dict[str, Any]:
    order = probabilities.argsort()[::-1][:top]
    ranked = [{"label": classes[i], "probability": float(probabilities[i])} for i in order]
    return {"label": ranked[0]["label"], "confidence": ranked[0]["probability"], "top": ranked}


def _write(out: Path, answers: list[dict[str, Any]]) -> None:
    path = out if out.suffix == ".json" else out / "predictions.json"
    try:
        write_json(path, answers)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
