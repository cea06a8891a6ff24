"""The way into the registry and out of it: a bundle becomes a version, a version a bundle.

Registering is keyed by the bundle's hash: done twice is done once. The files are uploaded first
and the version is created last, with all its tags in one step, so a kill leaves either a whole
version or none, and the next call makes what is missing.
"""

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ringmo
from ringmo import console, hardware, tasks
from ringmo.config import Config, digest
from ringmo.errors import BadInput
from ringmo.registry import card_data, origins
from ringmo.registry.tracker import CLEANED, GENERATED, Tracker, Version, claim, save_pyfunc
from ringmo.stage import Report
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    from ringmo.registry.bundle import Bundle

ENCODER = origins.ENCODER
REFERENCE = "reference.parquet"  # what production is compared with (`monitoring.reference`)
CODE = ("ringmo", "flows", "pyproject.toml", "constraints.txt")  # what a source patch covers


def register(config: Config, workspace: Workspace, task: str, tags: Mapping[str, Any]) -> Version:
    """Make the workspace's model a version of registered model `task`, and the candidate.

    Args:
        task: a task's name, or `encoder`.
        tags: more to keep with it, such as flow_run.

    Raises:
        BadInput: no bundle, a damaged one, or one whose example does not hold.
        Unreachable: MLflow does not answer.
    """
    from ringmo.registry import bundle

    stage = stage_of(task)
    folder = workspace.work(stage) / (ENCODER if task == ENCODER else "model")
    model = bundle.load(folder)
    model.check_example()
    tracker = Tracker(workspace)
    with claim(workspace.state / "registry.lock"):
        version = tracker.of_bundle(task, model.hash)
        if version is None or version.cleaned:
            version = _create(config, workspace, tracker, task, stage, model, tags)
        if "candidate" not in version.aliases:
            tracker.set_alias(task, "candidate", version.version)
    return tracker.version(task, version.version) or version


def stage_of(model: str) -> str:
    """The stage that makes a registered model: a task's, or the encoder."""
    return "pretrain" if model == ENCODER else f"finetune@{model}"


def open_bundle(tracker: Tracker, version: Version) -> "Bundle":
    """The model of a version, checked against the hash that it was registered under.

    Raises:
        BadInput: its files are gone, damaged, or not the ones that were registered.
    """
    from ringmo.registry import bundle

    model = bundle.load(tracker.bundle_folder(version))
    if version.bundle_hash and model.hash != version.bundle_hash:
        raise BadInput(
            f"{version}: its files are not the ones that were registered "
            f"(hash {model.hash[:12]}, registered {version.bundle_hash[:12]})"
        )
    return model


def _create(
    config: Config,
    workspace: Workspace,
    tracker: Tracker,
    task: str,
    stage: str,
    model: "Bundle",
    tags: Mapping[str, Any],
) -> Version:
    name = f"model-{model.hash[:12]}"
    about = _tags(config, workspace, tracker, task, model) | {
        key: value for key, value in tags.items() if value not in (None, "")
    }
    run_id = _home(workspace, tracker, stage, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        save_pyfunc(model.folder, folder)
        about["lineage_hash"] = origins.write(
            workspace,
            folder / "lineage",
            task,
            model.meta["lineage"].get("selection"),
            None if about["code_clean"] else _source_patch(),
        )
        evaluated = workspace.work(f"evaluate@{task}")
        judged = _evaluation(workspace, task, model) is not None
        card_data.write(config, workspace, task, model, judged, folder / card_data.FOLDER)
        if judged:
            (folder / "evaluation").mkdir()
            for path in [*evaluated.glob("*.png"), *evaluated.glob("*.json")]:
                (folder / "evaluation" / path.name).write_bytes(path.read_bytes())
            if (evaluated / REFERENCE).is_file():
                (folder / REFERENCE).write_bytes((evaluated / REFERENCE).read_bytes())
        tracker.log_folder(run_id, folder, name)
    home = tracker.run(run_id)
    again = {CLEANED: ""} if home and home.tags.get(CLEANED) else {}  # it has files once more
    tracker.tag_run(run_id, {"bundle_hash": model.hash, **again})
    source = f"{tracker.artifact_uri(run_id).rstrip('/')}/{name}"
    return tracker.create_version(task, source, run_id, about, _description(task, about))


def _home(workspace: Workspace, tracker: Tracker, stage: str, model: "Bundle") -> str:
    """The run that keeps the files: the training's own, or one made for a model without one."""
    report = Report.read(workspace.work(stage) / "report.json")
    if report is not None and report.run_dir:
        feed = workspace.root / report.run_dir / "mlflow.json"
        if feed.is_file():
            run_id = json.loads(feed.read_text()).get("run_id")
            if run_id and tracker.run(run_id):
                return str(run_id)
    experiment = stage.replace("@", "-")
    if same := tracker.runs(experiment, {"bundle_hash": model.hash}):
        return same[0].id
    run_id = tracker.create_run(
        experiment,
        f"{stage.replace('@', ' ')} · model without its training's run",
        {"bundle_hash": model.hash, GENERATED: model.meta[GENERATED]},
    )
    tracker.set_status(run_id, "FINISHED")
    return run_id


def _tags(
    config: Config, workspace: Workspace, tracker: Tracker, task: str, model: "Bundle"
) -> dict[str, Any]:
    """What a version must tell without any other file."""
    from ringmo.data.versions import selected_version

    lineage = model.meta["lineage"]
    lock = workspace.root / "dvc.lock"
    code, clean = code_version()
    # Of an encoder: the one that its pre-training started from.
    encoder = tracker.of_bundle(ENCODER, lineage.get("encoder"))
    about: dict[str, Any] = {
        "bundle_hash": model.hash,
        "weights": model.meta["weights_sha256"],
        "kind": model.meta["kind"],
        GENERATED: bool(model.meta[GENERATED]),
        "data_version": selected_version(workspace),
        "selection": lineage.get("selection"),
        "stage_lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
        "params_digest": digest(config),
        "code_version": code,
        "code_clean": clean,
        "ringmo_version": ringmo.__version__,
    }
    trained = Report.read(workspace.work(stage_of(task)) / "report.json")
    if trained is not None and trained.machine:
        about["machine"] = hardware.in_short(trained.machine)
    if task == ENCODER:
        about["refresh"] = config.pretrain.refresh
    if task != ENCODER or encoder:
        about["encoder_hash"] = lineage.get("encoder")
        about["encoder_version"] = str(encoder) if encoder else None
    if task != ENCODER:
        kind = tasks.find(task)
        about |= {"metric": kind.metric, "unit": kind.unit(kind.metric)}
    report = _evaluation(workspace, task, model)
    figures = model.meta["figures"] | (report.figures if report else {})
    return about | {
        name: value for name, value in figures.items() if isinstance(value, int | float)
    }


def _evaluation(workspace: Workspace, task: str, model: "Bundle") -> Report | None:
    """The evaluation's report, if it is this very model that was evaluated."""
    report = Report.read(workspace.work(f"evaluate@{task}") / "report.json")
    return report if report and report.figures.get("bundle_hash") == model.hash else None


def _description(task: str, about: Mapping[str, Any]) -> str:
    made_up = " Trained on generated imagery: its figures say nothing of real imagery."
    figure = ""
    if task != ENCODER:
        kind = tasks.find(task)
        value = about.get(f"test_{kind.metric}")
        if value is not None:
            said = console.figure(value, kind.unit(kind.metric))
            figure = f", {kind.metric} {said} on the test tiles"
    return f"RingMo {task}{figure}, data {str(about.get('data_version'))[:8]}." + (
        made_up if about[GENERATED] else ""
    )


def code_version() -> tuple[str, bool]:
    """The commit that this code is at, or the package's version, and whether it is unchanged."""
    commit = _git("rev-parse", "HEAD")
    if commit is None or _git("ls-files", "--error-unmatch", "ringmo/__init__.py") is None:
        return f"ringmo {ringmo.__version__}", True
    return commit.decode().strip(), not _git("status", "--porcelain", "--", *CODE)


def commit_known(commit: str) -> bool:
    """Whether this code's repository has the commit, or this package is the version it names."""
    if commit.startswith("ringmo "):
        return code_version() == (commit, True)
    return _git("cat-file", "-e", f"{commit}^{{commit}}") is not None


def is_this_code(commit: str, patch: bytes | None) -> bool:
    """Whether this code is the commit with the patch (None: as it is)."""
    return code_version() == (commit, patch is None) and (patch is None or patch == _source_patch())


def archive(commit: str) -> bytes:
    """The files of a commit of this code's repository, as a tar."""
    files = _git("archive", "--format=tar", commit)
    if files is None:
        raise BadInput(f"git cannot give the files of commit {commit}")
    return files


def _source_patch() -> bytes:
    patch = _git("diff", "HEAD", "--binary", "--", *CODE) or b""
    new = (_git("ls-files", "--others", "--exclude-standard", "--", *CODE) or b"").decode()
    for name in new.splitlines():
        # Exit status 1 says that they differ, as a file and no file do.
        patch += _git("diff", "--no-index", "--binary", "--", "/dev/null", name, ok=(0, 1)) or b""
    return patch


def _git(*arguments: str, ok: tuple[int, ...] = (0,)) -> bytes | None:
    """Output of a git command in the code's folder, None where it is no repository or fails."""
    code = Path(ringmo.__file__).parents[1]
    try:
        done = subprocess.run(["git", *arguments], cwd=code, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode in ok else None
