"""Make a model again from its lineage alone, in a folder of its own, and compare.

    code      this one where it is that commit, else that commit beside it, with the source patch
    data      by hash, from DVC's cache or its remote, as links where the disk has them
    stages    those that the version came from, by DVC, from the version's own parameters
    compared  inputs by hash, weights, every figure

On the same processor, threads and library versions the weights are the same to the last bit;
elsewhere sums are added up in another order, and the figures must lie within their intervals. The
workspace is read and never written. What was killed goes on with the same command.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringmo import console, hardware
from ringmo.config import Config
from ringmo.data import store, versions
from ringmo.environment import quiet_telemetry
from ringmo.errors import BadInput, RingmoError, Unreachable
from ringmo.process_group import run_group
from ringmo.registry import origins, register, seen
from ringmo.registry.listing import resolve
from ringmo.registry.origins import ENCODER, STORE, Origins
from ringmo.registry.tracker import Tracker, Version, claim
from ringmo.stage import REVISIONS, whole_folder, write_json
from ringmo.workspace import CHAMPION, DVC_CONFIG, Workspace

NEEDED = ("dvc.lock", "dvc.yaml", "params.yaml", "revisions.yaml")
MARK = "reproduces.json"  # in the folder's .ringmo: what it is for
TIMES = ("images_per_s", "seconds")  # in a figure's name: no property of the model
SAME, WITHIN, DIFFERS = "same", "within its interval", "differs"


@dataclass
class _Plan:
    """What a reproduction is of and where it runs. missing: a line for each input that is not."""

    version: Version
    kept: Origins
    encoder: Version | None
    place: Workspace
    code: Path | None = None  # of another commit; None: this one
    stages: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreachable: bool = False

    def lacks(self, what: str) -> None:
        self.missing.append(what)


def reproduce(workspace: Workspace, ref: str, to: Path | None = None) -> dict[str, Any]:
    """Train and evaluate a registered model again, in `to`, and compare.

    Args:
        to: an empty folder, or the one of a reproduction that was interrupted; default:
            .ringmo/reproduced/MODEL-VERSION.

    Returns:
        model, folder, reproduced; weights: rows of model, was, now, same; inputs: rows of stage,
        path, same; figures: rows of stage, figure, was, now, same; environment: what is installed
        otherwise; reasons: why bits cannot be compared, empty where they can.

    Raises:
        BadInput: an input is missing, a line each; a folder of something else; a stage that fails.
        Unreachable: MLflow, or the remote that has the data, does not answer.
    """
    tracker = Tracker(workspace)
    version = resolve(workspace, ref, tracker)
    if not version.run_id:
        raise BadInput(f"{ref} was never registered: it has no lineage to start from")
    name = f"{version.model}-{version.version}"
    root = (to or workspace.state / "reproduced" / name).expanduser().resolve()
    if root == workspace.root:
        raise BadInput(f"--to {root}: that is the workspace itself; name another folder")
    plan = _Plan(version, _origins(tracker, version), _encoder(tracker, version), Workspace(root))
    with claim(_claimed(root, version) / "reproduce.lock"):
        _prepare(workspace, tracker, plan)
        if plan.missing:
            lines = "\n".join(f"  - {line}" for line in plan.missing)
            kind = Unreachable if plan.unreachable else BadInput
            raise kind(f"{version} cannot be made again, {len(plan.missing)} missing:\n{lines}")
        differing = _environment(plan)
        for line in differing:
            console.note(f"environment: {line}")
        config = Config.load(plan.place.params_file)
        for stage in plan.stages:
            _run(plan, config, stage)
        result = _compared(plan, tracker) | {"environment": differing}
        write_json(root / "reproduction.json", result)
    return result


def _origins(tracker: Tracker, version: Version) -> Origins:
    try:
        kept = Origins(tracker.lineage_folder(version))
    except BadInput as error:
        raise BadInput(f"{version} cannot be made again: its lineage is gone: {error}") from None
    if lacking := [name for name in NEEDED if not (kept.folder / name).is_file()]:
        lines = "\n".join(f"  - {name}: not among its lineage files" for name in lacking)
        raise BadInput(f"{version} cannot be made again, {len(lacking)} missing:\n{lines}")
    return kept


def _encoder(tracker: Tracker, version: Version) -> Version | None:
    if version.model == ENCODER:
        return version
    return tracker.of_bundle(ENCODER, version.tags.get("encoder_hash"))


def _claimed(root: Path, version: Version) -> Path:
    """The folder's .ringmo, once it is sure that the folder is for this version."""
    state = root / ".ringmo"
    mark = {"version": str(version), "bundle_hash": version.bundle_hash}
    try:
        there = json.loads((state / MARK).read_text())
    except FileNotFoundError:
        if root.is_dir() and any(root.iterdir()):
            raise BadInput(f"{root} is not empty: name a new folder with --to") from None
        write_json(state / MARK, mark)
    else:
        if there != mark:
            raise BadInput(f"{root} is for {there['version']}: name another folder with --to")
    return state


# What it starts from


def _prepare(workspace: Workspace, tracker: Tracker, plan: _Plan) -> None:
    place, kept = plan.place, plan.kept
    for name in (*NEEDED[1:], CHAMPION):
        # Versions from before there was a champion.yaml need none.
        if not (place.root / name).exists() and (kept.folder / name).is_file():
            shutil.copyfile(kept.folder / name, place.root / name)
    (place.root / ".dvc").mkdir(exist_ok=True)
    if not (place.root / ".dvc" / "config").exists():
        (place.root / ".dvc" / "config").write_text(DVC_CONFIG)
    (place.root / ".dvcignore").write_text("/.ringmo\n/code\n")
    _code(plan)
    values = Config.load(place.params_file)
    _stages(plan)
    _data(workspace, plan)
    _initial_weights(workspace, tracker, plan, values)
    if values.pretrain.refresh == "keep":
        _kept_selection(tracker, plan)
    elif values.pretrain.refresh in ("champion", "continue"):
        _taken_encoder(tracker, plan)


def _stages(plan: _Plan) -> None:
    """The stages that lead to the model and its figures, as far as its lock has them."""
    lock = origins.stages_of(plan.kept.lock, plan.version.model)
    made = register.stage_of(plan.version.model)
    if made not in lock:
        plan.lacks(f"dvc.lock has no {made}: the model was made without DVC")
        return
    known = {stage.name: stage for stage in versions.stages(plan.place)}
    evaluated = f"evaluate@{plan.version.model}"
    wanted, ahead = set(), [evaluated if evaluated in lock else made]
    while ahead:
        name = ahead.pop()
        if name not in wanted:
            wanted.add(name)
            ahead += known[name].upstream
    # Its verdict is an input by hash; the rules themselves are run again where it is gone.
    plan.stages = [name for name in known if name in wanted and name != "validate"]


def _code(plan: _Plan) -> None:
    commit = plan.version.tags.get("code_version", "")
    clean = plan.version.tags.get("code_clean") == "true"
    patch = plan.kept.folder / origins.PATCH
    if not commit:
        plan.lacks("code: no commit was recorded")
        return
    if not clean and not patch.is_file():
        plan.lacks(f"{origins.PATCH}: the code was not as commit {commit[:12]}, and it is gone")
        return
    if register.is_this_code(commit, None if clean else patch.read_bytes()):
        return
    if not register.commit_known(commit):
        here = register.code_version()[0]
        plan.lacks(f"code: {commit[:20]} is not in this code's repository (this is {here[:20]})")
        return
    plan.code = plan.place.root / "code"
    if not plan.code.is_dir():
        temporary = plan.place.root / ".code.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(register.archive(commit))) as tar:
            tar.extractall(temporary, filter="data")
        if not clean and patch.stat().st_size and (said := _patched(temporary, patch)):
            plan.lacks(f"{origins.PATCH} does not fit commit {commit[:12]}: {said}")
            return
        temporary.rename(plan.code)


def _patched(folder: Path, patch: Path) -> str:
    """Apply a patch in a folder; returns what git complains of."""
    # As a folder of files, whatever repository it may lie in.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", str(patch.resolve())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return " ".join(done.stderr.split())[:200] if done.returncode else ""


def _data(workspace: Workspace, plan: _Plan) -> None:
    """The data version and the verdict on it, by hash."""
    version = str(plan.version.tags.get("data_version") or "")
    if not version:
        plan.lacks("data: no data version was recorded")
        return
    config = Config.load(workspace.params_file)
    ours, theirs = versions.Cache(workspace), versions.Cache(plan.place)
    data = ours.listing(version) or plan.kept.listing(STORE)
    files = versions.listed(data) if data else {}
    if data:
        _give(theirs.file(version), data)
    for name, md5 in files.items():
        ours_too = workspace.store / name
        if _link(ours.file(md5), theirs.file(md5)) or not ours_too.is_file():
            continue
        if versions.file_md5(ours_too) == md5:
            _link(ours_too, theirs.file(md5))
    absent = {name: md5 for name, md5 in files.items() if not theirs.file(md5).is_file()}
    if absent or not data:
        (plan.place.root / "data").mkdir(exist_ok=True)
        pointer = plan.place.root / f"{STORE}.dvc"
        pointer.write_text(f"outs:\n- md5: {version}\n  hash: md5\n  path: store\n")
        try:
            versions.fetch(plan.place, config, workspace, f"{STORE}.dvc")
        except RingmoError as error:
            plan.unreachable |= isinstance(error, Unreachable)
            what = f"{len(absent)} of {len(files)} files" if files else "all files"
            plan.lacks(f"data {version[:12]}: {what} are not in DVC's cache, and {error}")
            return
        finally:
            pointer.unlink()
        data = theirs.listing(version)
        files = versions.listed(data) if data else {}
    with console.progress("data", len(files)) as bar:
        for name, md5 in files.items():
            path = theirs.file(md5)
            if not path.is_file():
                plan.lacks(f"data {version[:12]}: {name} ({md5}) is in neither cache nor remote")
            elif versions.file_md5(path) != md5:
                path.unlink()
                plan.lacks(f"data {version[:12]}: {name} ({md5}) is damaged in DVC's cache")
            else:
                _link(path, plan.place.store / name)
            bar.advance()
    _verdict(plan, ours)


def _verdict(plan: _Plan, ours: versions.Cache) -> None:
    name = "work/validate/verdict.json"
    deps = plan.kept.lock.get("select", {}).get("deps", [])
    md5 = next((dep["md5"] for dep in deps if dep["path"] == name), "")
    if plan.stages and not (md5 and _link(ours.file(md5), plan.place.root / name)):
        plan.stages = ["validate", *plan.stages]


def _initial_weights(workspace: Workspace, tracker: Tracker, plan: _Plan, values: Config) -> None:
    if not values.pretrain.init:
        return
    file = workspace.root / values.pretrain.init
    if not file.is_file():
        plan.lacks(f"pretrain.init: {file} is gone")
        return
    if plan.encoder is not None:
        meta = tracker.bundle_folder(plan.encoder) / "model.json"
        wanted = json.loads(meta.read_text())["lineage"].get("encoder")
        if wanted and store.file_sha256(file) != wanted:
            plan.lacks(f"pretrain.init: {file} is not the file that it started from")
            return
    if not Path(values.pretrain.init).is_absolute():
        _link(file, plan.place.root / values.pretrain.init)


def _kept_selection(tracker: Tracker, plan: _Plan) -> None:
    """refresh: keep. What the encoder saw was chosen from an older data version, and is an input.

    The encoder's own record of its tiles names them, and its bundle their mean and deviation.
    """
    from ringmo.config import Sensor
    from ringmo.data.selection import KEPT, KEPT_NORMALISATION, PRETRAIN_COLUMNS

    if plan.encoder is None:
        plan.lacks(f"encoder {plan.version.tags.get('encoder_hash', '')[:12]}: not registered")
        return
    tiles = _origins(tracker, plan.encoder).tiles
    if tiles is None:
        plan.lacks(f"{plan.encoder}: the tiles it saw were not recorded (pretrain.refresh: keep)")
        return
    table = seen.read(tiles, (*PRETRAIN_COLUMNS, "part")).to_pandas()
    state = plan.place.state
    rows = table[table["part"] == seen.IMAGE].sort_values("key")
    store.write_table(state / KEPT, rows[list(PRETRAIN_COLUMNS)], PRETRAIN_COLUMNS)
    meta = json.loads((tracker.bundle_folder(plan.encoder) / "model.json").read_text())
    known = {}
    for name, described in meta["sensors"].items():
        sensor = Sensor.model_validate(described)
        known[name] = {
            "reading": sensor.reading,
            "mean": described["mean"],
            "std": described["std"],
        }
    write_json(state / KEPT_NORMALISATION, known)


def _taken_encoder(tracker: Tracker, plan: _Plan) -> None:
    """refresh: champion, continue. An encoder that was there already took the place of a training,
    or was where it started."""
    wanted = (plan.kept.yaml(CHAMPION) or {}).get("encoder")
    if wanted is None:  # continue, when there was no champion yet
        return
    taken = tracker.of_bundle(ENCODER, wanted)
    if taken is None:
        plan.lacks(f"encoder {wanted[:12]}, which {CHAMPION} names: not registered")
        return
    folder = plan.place.state / "bundles" / wanted
    if not folder.is_dir():
        try:
            source = tracker.bundle_folder(taken)
        except BadInput as error:
            plan.lacks(str(error))
            return
        with whole_folder(folder) as filling:
            shutil.copytree(source, filling, dirs_exist_ok=True)


def _link(source: Path, target: Path) -> bool:
    """`source` at `target` too: the same bytes on disk, or a copy where the disk has no links."""
    if target.is_file():
        return True
    if not source.is_file():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    return True


def _give(target: Path, data: bytes) -> None:
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(target)


def _environment(plan: _Plan) -> list[str]:
    """What is installed otherwise than it was: the libraries that matter each, others counted."""
    path = plan.kept.folder / "environment.txt"
    if not path.is_file():
        return ["environment.txt was not recorded"]

    def named(lines: list[str]) -> dict[str, str]:
        pairs = (line.partition("==") for line in lines if "==" in line)
        return {name.lower().replace("_", "-"): number for name, _, number in pairs}

    was, now = named(path.read_text().splitlines()), named(origins.installed())
    said = [
        f"{name} was {was.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in hardware.PINS
        if was.get(name) != now.get(name)
    ]
    others = {n for n in was.keys() | now.keys() if was.get(n) != now.get(n)} - {*hardware.PINS}
    if others:
        names = ", ".join(sorted(others)[:6]) + ("…" if len(others) > 6 else "")
        said.append(f"{len(others)} other packages differ: {names}")
    revisions = plan.kept.yaml("revisions.yaml")
    if plan.code is None and revisions != REVISIONS:
        said.append(f"revisions of the stages were {revisions}, are {REVISIONS}")
    return said


# Running and comparing


def _run(plan: _Plan, config: Config, stage: str) -> None:
    """One stage, where it is not done: on as many threads as then, and on a GPU only if then."""
    place = plan.place
    report = place.report_file(stage)
    was = plan.kept.report(stage)
    environment = quiet_telemetry(os.environ)
    if plan.code is not None:
        environment["PYTHONPATH"] = str(plan.code)
    if was is not None and "threads" in was.machine:
        environment["OMP_NUM_THREADS"] = str(was.machine["threads"])
        if "gpu" not in was.machine:
            environment["CUDA_VISIBLE_DEVICES"] = ""
    console.note(f"\n── {stage}")
    command = versions.repro_command(place, stage)
    for left in range(config.run.retries, -1, -1):
        status = run_group(command, place.root, environment, config.run.grace_s)
        # Without a reason it was DVC that failed: so it does on locks of one that was killed.
        if not status or _json(report).get("reason") or not left:
            break
        time.sleep(max(1.0, config.run.retry_delay_s))
    if status:
        why = _json(report).get("reason") or f"ended with {status}"
        raise BadInput(f"{stage}: {why} (in {place.root}; the same command goes on)")


def _compared(plan: _Plan, tracker: Tracker) -> dict[str, Any]:
    place, kept = plan.place, plan.kept
    inputs, figures, reasons = [], [], []
    for stage in plan.stages:
        was = {dep["path"]: dep.get("md5") for dep in kept.lock.get(stage, {}).get("deps", [])}
        now = {dep["path"]: dep.get("md5") for dep in versions.lock_entry(place, stage)["deps"]}
        inputs += [
            {"stage": stage, "path": path, "same": now.get(path) == md5}
            for path, md5 in was.items()
        ]
        before, after = kept.report(stage), _json(place.work(stage) / "report.json")
        if before is None or not before.machine:
            reasons.append(f"{stage}: the machine it ran on was not recorded")
        elif stage != "validate":
            here = after.get("machine") or hardware.described()
            reasons += [f"{stage}: {d}" for d in hardware.differences(before.machine, here)]
            if "gpu" in before.machine and not before.machine.get("deterministic"):
                reasons.append(f"{stage}: a GPU adds up in no fixed order")
        old = before.figures if before else _tagged(plan.version)
        figures += _figures(stage, old, after.get("figures", {}))
    weights = _weights(plan, tracker)
    identical = all(row["same"] for row in weights)
    close = all(row["same"] != DIFFERS for row in figures if row["interval"])
    same = all(row["same"] == SAME for row in figures)
    return {
        "model": str(plan.version),
        "folder": str(place.root),
        "reproduced": (identical and same) or (bool(reasons) and close),
        "identical": identical,
        "weights": weights,
        "inputs": inputs,
        "figures": figures,
        "reasons": list(dict.fromkeys(reasons)),
    }


def _tagged(version: Version) -> dict[str, float]:
    """Figures of a version that was registered before reports were kept."""
    found = {}
    for name in version.tags:
        value = version.figure(name)
        if value is not None:
            found[name] = value
    return found


def _figures(stage: str, was: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each number that the stage told then and tells now, or told then and not now."""
    rows = []
    for name, value in was.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        end = name.endswith(("_low", "_high")) and name.rpartition("_")[0] in was
        if not number or end or any(time in name for time in TIMES):
            continue
        found = now.get(name)
        low, high = was.get(f"{name}_low"), was.get(f"{name}_high")
        ends = [now.get(f"{name}_{side}") for side in ("low", "high")]
        if found == value and ends == [low, high]:
            same = SAME
        elif found is not None and low is not None and low <= found <= high:
            same = WITHIN
        else:
            same = DIFFERS
        interval = None if low is None else [low, high]
        row = {"stage": stage, "figure": name, "was": value, "interval": interval}
        rows.append(row | {"now": found, "same": same})
    return rows


def _weights(plan: _Plan, tracker: Tracker) -> list[dict[str, Any]]:
    """The weights then and now, of each model that was trained on the way."""
    rows = []
    for stage in plan.stages:
        kind = stage.partition("@")[0]
        if kind not in ("pretrain", "finetune", "scratch"):
            continue
        name = f"{ENCODER if kind == 'pretrain' else 'model'}/model.safetensors"
        listing = plan.kept.listing(f"work/{stage.replace('@', '-')}")
        path = plan.place.work(stage) / name
        if stage == register.stage_of(plan.version.model):
            was, now = _registered(plan, tracker), store.file_sha256(path)
        elif listing:
            was, now = versions.listed(listing)[name], versions.file_md5(path)
        else:
            continue
        rows.append({"stage": stage, "was": was, "now": now, "same": was == now})
    return rows


def _registered(plan: _Plan, tracker: Tracker) -> str:
    if "weights" in plan.version.tags:
        return plan.version.tags["weights"]
    meta = tracker.bundle_folder(plan.version) / "model.json"
    return str(json.loads(meta.read_text())["weights_sha256"])


def text(done: dict[str, Any]) -> str:
    """The comparison as tables for people."""

    def shown(row: dict[str, Any]) -> str:
        ends = row["interval"]
        return f"{row['was']}" + (f" ({ends[0]} to {ends[1]})" if ends else "")

    rows = [(r["stage"], r["figure"], shown(r), r["now"], r["same"]) for r in done["figures"]]
    parts = [console.table(rows, ("stage", "figure", "was", "now", "same?"))]
    other = [row for row in done["inputs"] if not row["same"]]
    if other:
        first = other[0]
        parts.append(f"The first input that differs: {first['path']}, which {first['stage']} reads")
    weights = [
        (f"weights, {r['stage']}", "identical" if r["same"] else "differ", r["now"][:16])
        for r in done["weights"]
    ]
    parts.append(console.table(weights))
    if done["identical"]:
        end = f"weights: identical. {done['model']} was made again, bit for bit."
        if not done["reproduced"]:
            end = "weights: identical, but figures differ: see the table."
    elif done["reasons"]:
        why = "\n".join(f"  {reason}" for reason in done["reasons"])
        close = "lie within their intervals" if done["reproduced"] else "do NOT all lie within"
        end = f"weights: not comparable bit for bit:\n{why}\nThe figures {close}."
    else:
        end = "weights: DIFFER, though machine, threads and libraries are the same."
    parts += [end, f"Everything is in {done['folder']}"]
    return "\n\n".join(parts)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(path.read_text())
    return found
