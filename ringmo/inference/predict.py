"""Answers for images with a registered model, or with a bundle in a folder."""

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.errors import BadInput
from ringmo.stage import write_json
from ringmo.workspace import Workspace

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
SCENE = "scene"


def predict(
    workspace: Workspace,
    images: list[str],
    ref: str = "scene@champion",
    top: int = 5,
    batch_size: int = 64,
    out: Path | None = None,
    beside: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What the model says of each image, in the order given.

    Args:
        images: files, folders (searched for JPEG, PNG and GeoTIFF files) and globs.
        ref: `scene@champion`, `change/7`, or a bundle's folder.
        top: how many classes the answer of a scene model lists.
        batch_size: images in memory at a time, of a scene model; others take one.
        out: a folder for predictions.json and, of all but scene models, the answers as files
            (`answers.written`); for scene models also a file ending in .json.
        beside: what else the model reads of the same ground: `second` (the later date) or a
            sensor → a file, or a folder with files of the same names.

    Returns:
        For each image that was read {image, label, confidence, top: [{label, probability}]}, or
        of other tasks {image, said, …, files}; and {image, error} for each that was set aside.

    Raises:
        BadInput: no image at all could be read, the model is unknown or no task's, or images
            that belong together are missing.
        Unreachable: MLflow does not answer.
    """
    if top < 1:
        raise BadInput(f"--top {top}: at least 1")
    from ringmo.inference.model import open_bundle

    paths = find_images(images)
    bundle = open_bundle(ref, workspace=workspace.root)
    if bundle.task is None:
        raise BadInput(f"{ref} is an encoder and has no classes: name a task's model")
    if bundle.task.name != SCENE:
        batch_size = 1
        if out is not None and out.suffix == ".json":
            raise BadInput(f"--out {out}: name a folder: masks, heights and boxes are files")
    together = [_together(path, beside or {}) for path in paths]
    names = _names(paths)

    answers: list[dict[str, Any]] = []
    with console.progress("predict", len(paths)) as bar:
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            read = [_read(one, bundle) for one in together[start : start + batch_size]]
            told = iter(_told(bundle, [one for one in read if not isinstance(one, str)]))
            for path, pixels in zip(chunk, read, strict=True):
                answer: dict[str, Any] = {"image": str(path)}
                if isinstance(pixels, str):
                    answer["error"] = pixels
                elif bundle.task.name == SCENE:
                    answer |= _best(next(told), bundle.classes, top)
                else:
                    answer |= _other(next(told), path, out, names[path], bundle.classes)
                answers.append(answer)
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


def _told(bundle: Any, images: list[Any]) -> Any:
    return bundle.predict(images) if images else []


def _other(
    told: dict[str, Any], image: Path, out: Path | None, name: str, classes: list[str]
) -> dict[str, Any]:
    from ringmo.inference import answers

    files = answers.written(told, image, out, name, classes) if out is not None else []
    return {**answers.summed_up(told, classes), "files": files}


def _names(paths: list[Path]) -> dict[Path, str]:
    """What each image's answer is called: its own name, or its folders' before it where two
    images share theirs."""
    stems = [path.stem for path in paths]
    return {
        path: path.stem
        if stems.count(path.stem) == 1
        else "-".join(path.with_suffix("").parts[-3:])
        for path in paths
    }


def _together(path: Path, beside: Mapping[str, str]) -> dict[str | None, Path]:
    """An image and what else there is of its ground; its own name is None."""
    found: dict[str | None, Path] = {None: path}
    for name, given in beside.items():
        other = Path(given)
        if other.is_dir():
            other = other / path.name
            if not other.is_file():
                same = sorted(p for p in Path(given).glob(f"{path.stem}.*") if p.is_file())
                if not same:
                    raise BadInput(f"--with {name}={given}: nothing there is called {path.name}")
                other = same[0]
        elif not other.is_file():
            raise BadInput(f"--with {name}={given}: no such file or folder")
        found[name] = other
    return found


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
    others = [answer for answer in answers if "said" in answer]
    if others:
        cells = [
            (a["image"], a["said"], ", ".join(Path(f).name for f in a["files"])) for a in others
        ]
        lines = [console.table(cells, ("image", "answer", "files"))]
        if not any(a["files"] for a in others):
            lines.append("Next: the same with --out DIR writes masks, heights or boxes as files")
        return "\n".join(lines + _not_read(answers))
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
    return "\n".join(lines + _not_read(answers))


def _not_read(answers: list[dict[str, Any]]) -> list[str]:
    return [f"not read: {a['image']}: {a['error']}" for a in answers if "error" in a]


def _read(paths: dict[str | None, Path], bundle: Any) -> Any:
    """Pixels (H, W, bands) by what they are of, or the reason why there are none."""
    from ringmo.data.decode import decode
    from ringmo.inference.whole_images import check_sizes
    from ringmo.registry.bundle import fit

    first = next(iter(bundle.sensors))
    pixels = {}
    for name, path in paths.items():
        of = first if name in (None, "second") else name
        if of not in bundle.sensors:
            raise BadInput(f"--with {name}: this model reads {', '.join(bundle.sensors)}")
        try:
            image = decode(path.read_bytes())
            pixels[name or first] = fit(image, bundle.meta["sensors"][of])
        except BadInput as error:
            return str(error) if name is None else f"{path}: {error}"
        except OSError as error:
            return str(error.strerror)
    try:
        check_sizes(pixels)
    except BadInput as error:
        return str(error)
    return pixels


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
