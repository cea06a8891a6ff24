"""Answers for images and scenes with a registered model, or with a bundle in a folder.

An image of more than SCENE_SIDE pixels along its longer side is a scene, and walked in blocks
(`scenes`); a smaller one is answered for as a whole.
"""

import glob
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import console
from ringmo.errors import BadInput
from ringmo.inference.given import S3, SUFFIXES, Given, in_bucket, is_scene
from ringmo.stage import write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.inference.scenes import About, SceneJob
    from ringmo.monitoring.record import Recorder

SCENE = "scene"
HELPER_GRACE_S = 10  # that a helping process gets to end
HELP = (
    "import json, sys; from ringmo.inference.predict import help_with; "
    "help_with(**json.loads(sys.argv[1]))"
)


def predict(
    workspace: Workspace,
    images: list[str],
    ref: str = "scene@champion",
    top: int = 5,
    batch_size: int = 64,
    out: Path | None = None,
    beside: Mapping[str, str] | None = None,
    probabilities: bool = False,
    workers: int = 1,
    scenes_alone: bool = False,
) -> list[dict[str, Any]]:
    """What the model says of each image, in the order given.

    Args:
        images: files, folders (searched for JPEG, PNG and GeoTIFF files), globs, and
            s3://BUCKET/PREFIX.
        ref: `scene@champion`, `change/7`, or a bundle's folder.
        top: how many classes the answer of a scene model lists.
        batch_size: images in memory at a time, of a scene model; others take one.
        out: a folder for predictions.json and the answers as files (`answers.written`; of scenes
            `scenes.SceneJob`); for scene models also a file ending in .json. Answers for scenes
            are always files: without `out` in .ringmo/answers.
        beside: what else the model reads of the same ground: `second` (the later date) or a
            sensor → a file, or a folder with files of the same names.
        probabilities: write those of all classes too, of scenes.
        workers: processes that share the scenes.
        scenes_alone: pass over what is in a bucket and no scene, and write no predictions.json: as
            a process that helps another.

    Returns:
        For each image that was read {image, label, confidence, top: [{label, probability}]}, or
        of other tasks and of scenes {image, said, …, files}; and {image, error} for each that was
        set aside.

    Raises:
        BadInput: no image at all could be read, the model is unknown or no task's, or images
            that belong together are missing.
        Unreachable: MLflow, or the store of a bucket, does not answer.
    """
    if top < 1:
        raise BadInput(f"--top {top}: at least 1")
    if workers < 1:
        raise BadInput(f"--workers {workers}: at least 1")
    from ringmo.inference.model import open_bundle

    given = find_given(workspace, images)
    bundle = open_bundle(ref, workspace=workspace.root)
    if bundle.task is None:
        raise BadInput(f"{ref} is an encoder and has no classes: name a task's model")
    if bundle.task.name != SCENE and out is not None and out.suffix == ".json":
        raise BadInput(f"--out {out}: name a folder: masks, heights and boxes are files")
    names = _names(given)
    about = _about(workspace, ref, bundle)
    answers: list[dict[str, Any]] = [{} for _ in given]
    local = [i for i, one in enumerate(given) if one.bucket is None]
    small = [i for i in local if not is_scene(given[i].path)]
    rest = sorted(set(range(len(given))) - set(small))
    with _recording(workspace, bundle, about) as recorder:
        how = (recorder, top, batch_size, out, beside or {})
        _answer_images(bundle, given, small, names, answers, *how)
        if rest:
            folder = out if out is not None else workspace.state / "answers"
            folder = folder.parent if folder.suffix == ".json" else folder
            asked = (ref, about, folder, beside or {}, probabilities, top, workers, recorder)
            line = _Scenes(workspace, bundle, *asked, scenes_alone)
            line.answer([(i, given[i], names[i]) for i in rest], answers)
    failed = [answer for answer in answers if "error" in answer]
    if len(failed) == len(answers):
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise BadInput(f"{failed[0]['image']}: {failed[0]['error']}{more}: no image could be read")
    if failed:
        console.note(f"{len(failed)} of {len(answers)} images could not be read and are set aside")
    if out is not None and not scenes_alone:
        _write(out, answers)
    return answers


def _answer_images(
    bundle: Any,
    given: Sequence[Given],
    which: Sequence[int],
    names: Sequence[str],
    answers: list[dict[str, Any]],
    recorder: "Recorder | None",
    top: int,
    batch_size: int,
    out: Path | None,
    beside: Mapping[str, str],
) -> None:
    """Fill in the answers for those images that are no scenes."""
    if bundle.task.name != SCENE:
        batch_size = 1
    together = {i: _together(given[i].path, beside) for i in which}
    with console.progress("predict", len(which)) as bar:
        for start in range(0, len(which), batch_size):
            chunk = which[start : start + batch_size]
            read = [_read(together[i], bundle) for i in chunk]
            pairs = zip(chunk, read, strict=True)
            good = [(i, one) for i, one in pairs if not isinstance(one, str)]
            paths = [str(given[i].path.resolve()) for i, _ in good]
            told = iter(_told(bundle, [one for _, one in good], recorder, paths))
            for i, pixels in zip(chunk, read, strict=True):
                path = given[i].path
                answer: dict[str, Any] = {"image": given[i].name}
                if isinstance(pixels, str):
                    answer["error"] = pixels
                elif bundle.task.name == SCENE:
                    answer |= _best(next(told), bundle.classes, top)
                else:
                    answer |= _other(next(told), path, out, names[i], bundle.classes)
                answers[i] = answer
            bar.advance(len(chunk))


class _Scenes:
    """Scenes, and what lies in buckets, one after the other; other processes may do the same."""

    def __init__(
        self,
        workspace: Workspace,
        bundle: Any,
        ref: str,
        about: "About",
        out: Path,
        beside: Mapping[str, str],
        probabilities: bool,
        top: int,
        workers: int,
        recorder: "Recorder | None",
        scenes_alone: bool,
    ) -> None:
        self.workspace, self.bundle, self.ref, self.out = workspace, bundle, ref, out
        self.beside, self.probabilities, self.top, self.workers = (
            beside,
            probabilities,
            top,
            workers,
        )
        self.about, self.recorder, self.scenes_alone = about, recorder, scenes_alone

    def answer(
        self, scenes: Sequence[tuple[int, Given, str]], answers: list[dict[str, Any]]
    ) -> None:
        """Fill in the answers."""
        with ExitStack() as stack:
            if self.workers > 1:
                names = [given.name for _, given, _ in scenes]
                stack.enter_context(_helpers(self, names, self.workers - 1))
            open_still = []
            for number, (i, given, name) in enumerate(scenes, 1):
                label = given.path.name + (f" ({number}/{len(scenes)})" if len(scenes) > 1 else "")
                try:
                    answer = self._one(given, name, label)
                except BadInput as error:
                    answer = {"image": given.name, "error": str(error)}
                if answer is None:
                    open_still.append((i, given, name))
                else:
                    answers[i] = answer
            self._wait(open_still, answers)

    def _wait(self, scenes: list[tuple[int, Given, str]], answers: list[dict[str, Any]]) -> None:
        """Until other processes have delivered these, or have died and left them to us."""
        from ringmo.inference.scenes import POLL_S

        if scenes:
            console.note(f"{len(scenes)} scenes: waiting for blocks of other processes")
        while scenes:
            time.sleep(POLL_S)
            for one in list(scenes):
                i, given, name = one
                try:
                    answer = self._one(given, name, given.path.name)
                except BadInput as error:
                    answer = {"image": given.name, "error": str(error)}
                if answer is not None:
                    answers[i] = answer
                    scenes.remove(one)

    def _one(self, given: Given, name: str, label: str) -> dict[str, Any] | None:
        first = next(iter(self.bundle.sensors))
        marks = {} if given.mark is None else {first: given.mark}
        if marks and (there := self._job({first: given.path}, given, name, marks).done()):
            return there
        try:
            with given.here(self.out / ".fetched") as path:
                if given.bucket is not None and not is_scene(path):
                    if self.scenes_alone:  # whoever is helped answers it
                        return {}
                    return self._image(given, path, name)
                others = {
                    what: of
                    for what, of in _together(path, self.beside).items()
                    if what is not None
                }
                job = self._job({first: path, **others}, given, name, marks)
                if (there := job.done()) is not None:
                    return there
                try:
                    return self._walked(job, label)
                finally:
                    job.close()
        except OSError as error:
            raise BadInput(f"{error.filename or given.name}: {error.strerror}") from None

    def _job(
        self, paths: Mapping[str, Path], given: Given, name: str, marks: Mapping[str, Any]
    ) -> "SceneJob":
        from ringmo.inference.scenes import SceneJob

        return SceneJob(
            self.bundle,
            self.about,
            paths,
            self.out,
            name,
            given.name,
            self.probabilities,
            marks,
            recorder=self.recorder,
        )

    def _walked(self, job: "SceneJob", label: str) -> dict[str, Any] | None:
        job.open()
        for note in job.notes:
            console.note(f"{job.shown}: {note}")
        with console.progress(label, job.pixels) as bar:
            job.work(bar.advance)
            answer = job.deliver()
        if answer is not None and "times" not in answer:
            answer["times"] = job.times.told()
        return answer

    def _image(self, given: Given, path: Path, name: str) -> dict[str, Any]:
        """An object that is no scene."""
        read = _read(_together(path, self.beside), self.bundle)
        if isinstance(read, str):
            return {"image": given.name, "error": read}
        (told,) = _told(self.bundle, [read], self.recorder, [given.name])
        if self.bundle.task.name == SCENE:
            return {"image": given.name, **_best(told, self.bundle.classes, self.top)}
        return {"image": given.name, **_other(told, path, self.out, name, self.bundle.classes)}


def _about(workspace: Workspace, ref: str, bundle: Any) -> "About":
    """What the registry knows of the model; of a folder what the bundle says of itself."""
    from ringmo.inference import scenes
    from ringmo.inference.model import is_folder

    if is_folder(ref):
        return scenes.about(bundle, str(Path(ref).resolve()))
    from ringmo.registry.tracker import Tracker

    version = Tracker(workspace).of_bundle(bundle.task.name, bundle.hash)
    if version is None:
        return scenes.about(bundle, ref)
    return scenes.about(bundle, str(version), {**version.tags, "run": version.run_id})


def help_with(workspace: str, out: str, **asked: Any) -> None:
    """What a helping process does: `predict`, of scenes alone."""
    predict(Workspace(Path(workspace)), out=Path(out), scenes_alone=True, **asked)


class _helpers:
    """Processes that take their share of the scenes' blocks, and end with us."""

    def __init__(self, line: _Scenes, names: list[str], count: int) -> None:
        model = line.about.model if "/" in line.about.model else line.ref
        asked = {
            "workspace": str(line.workspace.root),
            "out": str(line.out.resolve()),
            "images": names,
            "ref": model,
            "beside": dict(line.beside),
            "probabilities": line.probabilities,
        }
        self.command = [sys.executable, "-c", HELP, json.dumps(asked)]
        self.threads = max(1, (os.cpu_count() or 1) // (count + 1))  # of each, of ours too
        self.count = count

    def __enter__(self) -> None:
        import torch

        self.had = torch.get_num_threads()
        torch.set_num_threads(min(self.had, self.threads))
        self.processes = [
            subprocess.Popen(
                self.command,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(self.count)
        ]

    def __exit__(self, *_: object) -> None:
        import torch

        # All is delivered, or we are to stop: a helper's blocks that are done stay done.
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(HELPER_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        torch.set_num_threads(self.had)


def _told(bundle: Any, images: list[Any], recorder: "Recorder | None", names: Sequence[str]) -> Any:
    if not images:
        return []
    from ringmo.inference import whole_images

    return whole_images.predict(bundle, bundle.task, images, len(images), recorder, names)


@contextmanager
def _recording(workspace: Workspace, bundle: Any, about: "About") -> "Iterator[Recorder | None]":
    """What keeps a sample of a registered version's answers (monitoring in params.yaml)."""
    if "run" not in about.tags:
        yield None
        return
    from ringmo.config import Config
    from ringmo.monitoring.record import Recorder

    settings = Config.load(workspace.params_file).monitoring
    recorder = Recorder(workspace, bundle, about.model, settings)
    try:
        yield recorder
    finally:
        recorder.close()


def _other(
    told: dict[str, Any], image: Path, out: Path | None, name: str, classes: list[str]
) -> dict[str, Any]:
    from ringmo.inference import answers

    files = answers.written(told, image, out, name, classes) if out is not None else []
    return {**answers.summed_up(told, classes), "files": files}


def _names(given: Sequence[Given]) -> list[str]:
    """What each image's answer is called: its own name, or its folders' before it where two
    images share theirs."""
    paths = [one.path if one.bucket is None else Path(one.name.removeprefix(S3)) for one in given]
    stems = [path.stem for path in paths]
    return [
        path.stem
        if stems.count(path.stem) == 1
        else "-".join(path.with_suffix("").parts[-3:]).lstrip("/")
        for path in paths
    ]


def find_given(workspace: Workspace, images: Sequence[str]) -> list[Given]:
    """`find_images`, and objects of buckets.

    Raises:
        BadInput: one of them stands for nothing. Unreachable: a store does not answer.
    """
    if not any(name.startswith(S3) for name in images):
        return [Given(str(path), path) for path in find_images(images)]
    from ringmo.config import Config

    endpoint = Config.load(workspace.params_file).ingest.endpoint
    found: dict[str, Given] = {}
    for name in images:
        for one in (
            in_bucket(name, endpoint)
            if name.startswith(S3)
            else [Given(str(path), path) for path in find_images([name])]
        ):
            found.setdefault(one.name, one)
    return list(found.values())


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
    """Tables for people; what was set aside comes last, with its reason."""
    others = [answer for answer in answers if "said" in answer]
    lines = []
    rows = [
        (
            answer["image"],
            answer["label"],
            f"{100 * answer['confidence']:.1f} %",
            ", ".join(f"{r['label']} {100 * r['probability']:.0f} %" for r in answer["top"][1:3]),
        )
        for answer in answers
        if "label" in answer
    ]
    if rows:
        lines.append(console.table(rows, ("image", "label", "confidence", "next")))
    if others:
        cells = [
            (a["image"], a["said"], ", ".join(Path(f).name for f in a["files"])) for a in others
        ]
        lines.append(console.table(cells, ("image", "answer", "files")))
    timed = [answer for answer in others if "times" in answer]
    if timed:
        lines.append(_timed(timed))
        lines.append(f"Next: open {Path(timed[0]['files'][0])} in QGIS")
    elif others and not any(a["files"] for a in others):
        lines.append("Next: the same with --out DIR writes masks, heights or boxes as files")
    return "\n".join(lines + _not_read(answers))


def _timed(scenes: list[dict[str, Any]]) -> str:
    """What the scenes that were answered now took."""
    rows = [
        (
            Path(scene["image"]).name,
            "x".join(map(str, scene["size"])),
            f"{scene['times']['seconds']:.1f}",
            f"{scene['times']['pixels_per_s']:,}",
            f"{scene['times']['model_share']:.0%}",
            f"{scene['times']['peak_memory_mb']}",
        )
        for scene in scenes
    ]
    return console.table(
        rows, ("scene", "pixels", "seconds", "pixels/s", "model busy", "peak memory, MB")
    )


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
