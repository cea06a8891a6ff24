"""One chain as a worker runs it, disturbed at its stages, and what can be said of it afterwards."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fault_rig import Rig
from imagery import write_class_folders
from servers import wait_until
from tiny import TINY

from ringmo import config
from ringmo.config import read_yaml
from ringmo.workspace import Workspace, init

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
TRIES = 3  # flows.watch.TRIES, whose module would load Prefect here

STAGES = (  # as they come, one after the other
    *("ingest", "validate", "select", "pretrain", "scratch@scene", "finetune@scene"),
    *("evaluate@scene", "register@encoder", "register@scene"),
    *("promote@encoder", "promote@scene", "push"),
)
TRAININGS = ("pretrain", "finetune@scene", "scratch@scene")
SERVICES = ("worker", "prefect", "mlflow", "postgres", "s3")
OURS = ("stage", "flow")
# `machine`: worker, flow and stage at once, as when the power fails; the worker comes back.
KILLS = tuple(f"kill {name}" for name in (*OURS, *SERVICES, "machine"))
PAUSES = tuple(f"pause {name}" for name in (*OURS, *SERVICES))
# No byte is left where the workspace lies; once the run has ended there is room, and one begins.
FULL = "full disk"
# Of the worker's machine: it is wrong until the next stage, or for a minute, and then right again.
CLOCKS = {"clock 2 h ahead": 7200, "clock 2 h back": -7200}
FAULTS = (*KILLS, *PAUSES, FULL, *CLOCKS)
PAUSE_S = 60.0
LASTS = {  # long enough to be hit in the middle, and to save on the way
    "pretrain.epochs": 30,
    "pretrain.checkpoint_every_s": 0,
    "finetune.scene.epochs": 30,
    "finetune.scene.checkpoint_every_s": 0,
    "gate.scene.max_drop": 1.0,
    "gate.encoder.max_drop": 1.0,
    "run.retry_delay_s": 2,
    "schedule.retrain": None,
}
DEPLOY = """
import json, sys
from flows import watch
from flows.deployment import deploy
from ringmo.config import Config
from ringmo.workspace import Workspace
place = Workspace.find(sys.argv[1])
watch.AGAIN_S = float(sys.argv[2] or watch.AGAIN_S)
print(json.dumps(deploy(Config.load(place.params_file), place)))
"""


@dataclass
class Cell:
    """A fault at a stage: what became of it, and what is wrong if anything is."""

    fault: str
    stage: str
    outcome: str = ""
    seconds: float = 0.0  # from the fault to the next stage's beginning, or the run's end
    wrong: list[str] = field(default_factory=list)


class Run:
    """A workspace of its own on a rig, deployed; `begin` starts the chain.

    small: its disk has so many megabytes (a file system of its own, which root alone can mount).
    again_s: seconds before a crashed run is begun again, other than `flows.watch` has it.
    """

    def __init__(
        self, rig: Rig, folder: Path, remote: str, small: int = 0, again_s: str = ""
    ) -> None:
        self.rig = rig
        self.flow_runs: list[str] = []
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        if small:
            size = f"size={small}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.disk], check=True)
        self.place: Workspace = init(self.disk / "workspace")
        places = {
            "ingest.sources": [str(write_class_folders(folder / "in", 16))],
            "versioning.remote": f"s3://bucket/{remote}",
            "versioning.endpoint": f"http://127.0.0.1:{rig.s3.port}",
        }
        config.edit(self.place.params_file, TINY | LASTS | places)
        self.seen: list[tuple[float, str, int]] = []  # when, stage or "flow", process number
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        done = subprocess.run(
            [sys.executable, "-c", DEPLOY, str(self.place.root), again_s],
            env=rig.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads(done.stdout.splitlines()[-1])
        row = next(one for one in rows if one["deployment"].startswith("retrain/"))
        self.deployment: str = row["url"].rpartition("/")[2]

    def begin(self) -> None:
        if not self._watcher.is_alive():
            self._watcher.start()
        made = self.rig.api(f"deployments/{self.deployment}/create_flow_run", {})
        self.flow_runs.append(made["id"])

    @property
    def flow_run(self) -> str:
        """The last one that was begun."""
        return self.flow_runs[-1]

    def state(self) -> dict[str, Any]:
        """type, name and message, as Prefect's server has them."""
        found: dict[str, Any] = self.rig.api(f"flow_runs/{self.flow_run}")["state"]
        return found

    def disturb(self, fault: str, stage: str) -> Cell:
        """Wait until a stage is in the middle of its work, and apply a fault to it."""
        cell = Cell(fault, stage)
        pid = self._middle(stage)
        if fault == FULL:
            return self._filled(cell)
        if fault in CLOCKS:
            return self._misled(cell, pid)
        verb, _, whom = fault.partition(" ")
        number = signal.SIGKILL if verb == "kill" else signal.SIGSTOP
        began, flow = time.time(), self.flow()
        if whom == "stage":
            victims = [pid]
        elif whom == "flow":
            victims = [flow]
        elif whom == "machine":
            victims = [flow, *self._group(pid)]
            self.rig.kill("worker")
        else:
            victims = []
            self.rig.signal(whom, number) if verb == "pause" else self.rig.kill(whom)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)
        if verb == "pause":
            time.sleep(PAUSE_S)
            if whom in SERVICES:
                self.rig.signal(whom, signal.SIGCONT)
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGCONT)
        elif whom == "machine":
            self.rig.begin_again("worker")
        elif whom in SERVICES:
            self.rig.begin_again(whom)
        return self._passed_by(cell, began, flow, pid)

    def _passed_by(self, cell: Cell, began: float, flow: int, pid: int) -> Cell:
        """What has become of it, once a later stage begins."""
        self._passed(cell.stage, began)
        cell.seconds = round(time.time() - began, 1)
        later = {(name, p) for when, name, p in self.seen if when > began}
        if any(name == "flow" and p != flow for name, p in later):
            cell.outcome = "the run was begun again"
        elif any(name == cell.stage and p != pid for name, p in later):
            cell.outcome = "the stage was tried again"
        else:
            cell.outcome = "went on"
        return cell

    def _filled(self, cell: Cell) -> Cell:
        began, ballast = time.time(), self.disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        state = wait_until(lambda: self.state() if self._ended() else None, "the run's end", 1200)
        ballast.unlink()
        cell.seconds = round(time.time() - began, 1)
        cell.outcome = "went on"
        if state["type"] != "COMPLETED":
            cell.outcome = "the run ended, the next went on"
            if "No space left" not in state["message"] or "\n" in state["message"].strip():
                cell.wrong.append(f"it said: {state['message'][:200]}")
            self.begin()
        return cell

    def _misled(self, cell: Cell, pid: int) -> Cell:
        began, flow, clock = time.time(), self.flow(), self.rig.clock
        assert clock, "a rig without a false clock"
        clock.set(CLOCKS[cell.fault])
        with contextlib.suppress(TimeoutError):
            self._passed(cell.stage, began, PAUSE_S)
        clock.set(0)
        return self._passed_by(cell, began, flow, pid)

    def wait(self, limit_s: float = 3600) -> dict[str, Any]:
        """The run's last state, when it has one from which it is not begun again."""

        def ended() -> dict[str, Any] | None:
            state = self.state()
            if state["type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return None
            time.sleep(3 if state["type"] == "CRASHED" else 0)  # perhaps it is begun again
            return state if self.state()["type"] == state["type"] else None

        try:
            found: dict[str, Any] = wait_until(ended, "the end of the run", limit_s)
        finally:
            self._over.set()
            self._watcher.join(5)
        return found

    # What runs

    def flow(self) -> int:
        """Process number of the chain that holds the workspace; 0: none does."""
        try:
            return int(json.loads((self.place.state / "chain.lock").read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return 0

    def processes(self) -> dict[int, str]:
        """Living processes that work in the workspace: number → stage, or the command."""
        root = str(self.place.root)
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                inside = root in words or str((folder / "cwd").readlink()) == root
                if inside and words:
                    found[int(folder.name)] = _stage(words) or _shown(words)
            except OSError:
                continue
        return found

    def _watch(self) -> None:
        known: set[tuple[str, int]] = set()
        while not self._over.wait(0.2):
            now = {(name, pid) for pid, name in self.processes().items() if name in STAGES}
            flow = self.flow()
            if flow and psutil.pid_exists(flow):
                now.add(("flow", flow))
            for name, pid in now - known:
                self.seen.append((time.time(), name, pid))
            known |= now

    def _middle(self, stage: str) -> int:
        """Number of a stage's process that has begun its work."""

        def begun() -> int | None:
            for pid, name in self.processes().items():
                if name != stage:
                    continue
                with contextlib.suppress(psutil.NoSuchProcess):
                    age = time.time() - psutil.Process(pid).create_time()
                    if stage in TRAININGS:
                        lines = f"runs/{stage.replace('@', '-')}-*/figures.jsonl"
                        if any(f.stat().st_size for f in self.place.state.glob(lines)):
                            return pid
                    elif age > (0.3 if stage in ("push", *ENDS_SOON) else 1.5):
                        return pid
            if self._ended():
                raise RuntimeError(f"ended before {stage}: {self.state()['message']}")
            return None

        return int(wait_until(begun, f"{stage} to run", 1200))

    def _passed(self, stage: str, since: float, limit_s: float = 1200) -> None:
        """Until a later stage began, or the run ended."""
        after = STAGES[STAGES.index(stage) + 1 :]

        def passed() -> bool:
            return any(name in after for when, name, _ in self.seen if when > since) or (
                self._ended()
            )

        wait_until(passed, f"what comes after {stage}", limit_s)

    def _ended(self) -> bool:
        """For good: one that crashed is begun again a while later, TRIES times in all."""
        run = self.rig.api(f"flow_runs/{self.flow_run}")
        if run["state"]["type"] not in ENDED:
            return False
        if run["state"]["type"] == "CRASHED" and run["run_count"] < TRIES:
            return False
        time.sleep(3)
        return self.state()["type"] in ENDED

    def _group(self, pid: int) -> list[int]:
        """All processes of the stage's group, and its guard."""
        group = os.getpgid(pid)
        found = [p.pid for p in psutil.process_iter() if _group_of(p.pid) == group]
        guards = [p for p, what in self.processes().items() if "process_guard" in what]
        return [*guards, *found]

    # What came out

    def remove(self) -> None:
        """What still runs, and the small disk."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if os.path.ismount(self.disk):
            subprocess.run(["umount", "--lazy", self.disk], check=True)

    def facts(self) -> dict[str, Any]:
        """What must be the same, however a run was disturbed."""
        work, store = self.place.work, self.place.store
        files = {
            "encoder": work("pretrain") / "encoder" / "model.safetensors",
            "model": work("finetune@scene") / "model" / "model.safetensors",
            "model from scratch": work("scratch@scene") / "model" / "model.safetensors",
            # The manifest names the sources' folders, which are others in each run.
            **{path.name: path for path in sorted(store.glob("*.tar"))},
            **{path.name: path for path in sorted(work("select").glob("*.parquet"))},
        }
        hashes = {n: hashlib.sha256(path.read_bytes()).hexdigest() for n, path in files.items()}
        locked = sorted(read_yaml(self.place.root / "dvc.lock")["stages"])
        return {"files": hashes, "locked": locked}

    def wrong(self, expected: dict[str, Any]) -> list[str]:
        """What is not as it must be after the run; nothing is the good answer."""
        said = []
        state = self.state()
        if state["type"] != "COMPLETED":
            return [f"the run ended {state['name']}: {state['message']}"]
        facts = self.facts()
        said += [f"{k}: {facts[k]}, not {v}" for k, v in expected.items() if facts[k] != v]
        said += self._wrong_in_prefect()
        said += self._wrong_in_mlflow()
        said += self._done_twice()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self.processes(), "processes to end", 60)
        said += [f"left running: {what}" for what in self.processes().values()]
        for name, command in (
            ("lineage", ["ringmo", "lineage", "scene@champion", "--verify", "--deep"]),
            ("remote", ["dvc", "status", "--cloud", "--quiet"]),
        ):
            done = subprocess.run(
                [sys.executable, "-m", *command],
                env=self.rig.environment | {"RINGMO_WORKSPACE": str(self.place.root)},
                cwd=self.place.root,
                capture_output=True,
                text=True,
                timeout=180,
            )
            if done.returncode:
                said.append(f"{name}: {(done.stdout + done.stderr).strip()[-300:]}")
        return said

    def _wrong_in_prefect(self) -> list[str]:
        of_run = {"flow_runs": {"id": {"any_": self.flow_runs}}}
        time.sleep(2)  # the last states of steps arrive as events
        steps = self.rig.api("task_runs/filter", of_run)
        last = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        said = [
            f"step {step['name']} is {step['state_name']} for ever"
            for step in steps
            if step["state_type"] not in last
        ]
        for limit in self.rig.api("v2/concurrency_limits/filter", {}):
            if limit["active_slots"]:
                said.append(f"slot {limit['name']}: {limit['active_slots']} taken")
        return said

    def _wrong_in_mlflow(self) -> list[str]:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_MLFLOW, *self.flow_runs],
            env=self.rig.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if asked.returncode:
            return [f"MLflow: {asked.stderr[-300:]}"]
        answer = json.loads(asked.stdout.splitlines()[-1])
        stages = ["chain", *(stage.replace("@", "-") for stage in STAGES[1:7])]
        said = [
            f"MLflow's runs of {name}: {answer['runs'].get(name)}"
            for name in stages
            if answer["runs"].get(name) != ["FINISHED"]
        ]
        for model, versions in answer["versions"].items():
            if versions != ["READY"]:
                said.append(f"versions of {model} by this run: {versions}")
        if sorted(answer["versions"]) != ["encoder", "scene"]:
            said.append(f"models: {sorted(answer['versions'])}")
        return said

    def _done_twice(self) -> list[str]:
        """Stages that began anew after a later one had begun."""
        said = []
        for i, stage in enumerate(STAGES[1:-1], 1):  # ingest and push look and do what is left
            later = [when for when, name, _ in self.seen if name in STAGES[i + 1 :]]
            if any(name == stage and later and when > min(later) for when, name, _ in self.seen):
                said.append(f"{stage} ran again after it was done")
        return said

    def resumed(self) -> list[str]:
        """What trainings said of going on."""
        found = self.rig.api(
            "logs/filter", {"logs": {"flow_run_id": {"any_": self.flow_runs}}, "limit": 200}
        )
        return [row["message"] for row in found if "goes on from step" in row["message"]]


ENDS_SOON = ("promote@encoder", "promote@scene")

_ASK_MLFLOW = """
import collections, json, sys
from mlflow import MlflowClient
client = MlflowClient()
runs, versions = collections.defaultdict(list), collections.defaultdict(list)
for experiment in client.search_experiments():
    for flow_run in sys.argv[1:] if experiment.name != "chain" else sys.argv[-1:]:
        of_run = f"tags.flow_run = '{flow_run}'"
        for run in client.search_runs([experiment.experiment_id], of_run):
            runs[experiment.name].append(run.info.status)
for version in client.search_model_versions():
    if version.tags.get("flow_run") in sys.argv[1:]:
        versions[version.name].append(version.status)
print(json.dumps({"runs": runs, "versions": versions}))
"""


def _stage(words: list[str]) -> str | None:
    """The stage that a command line is."""
    if "push" in words and any("dvc" in word for word in words):
        return "push"
    at = next((i for i, word in enumerate(words) if Path(word).name == "ringmo"), None)
    if at is None or at + 1 >= len(words) or at > 3:
        return None
    verb, *rest = words[at + 1 :]
    if verb in ("ingest", "validate", "select", "pretrain"):
        return verb
    if verb == "finetune" and rest:
        return f"{'scratch' if '--from-scratch' in rest else 'finetune'}@{rest[0]}"
    if verb in ("evaluate", "register", "promote") and rest:
        return f"{verb}@{rest[0].partition('/')[0]}"
    return None


def _shown(words: list[str]) -> str:
    """A command line without the folder that its program lies in."""
    return " ".join([Path(words[0]).name, *words[1:]])


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
