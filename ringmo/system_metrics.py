"""What a stage asks of its machine: load, memory, network, GPUs, and the energy that goes into it.

Sampled beside the stage into system.jsonl, a file like figures.jsonl, which a Forwarder sends on.
The names are those of MLflow's own monitor, so that its pages have them under "System metrics":
of the whole machine, but for `stage_…`, which are of the stage's processes alone. GPUs are those
the stage may use.

Energy is measured or absent, never guessed: of GPUs their power as nvidia-smi reads it, integrated
over time; of processors the counters of Intel's and AMD's RAPL.
"""

import contextlib
import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_S = 5.0
# A line is written when so much of the time since the start has passed again: a day makes 1,000.
LINE_SHARE = 1 / 150
NVIDIA_SMI_S = 20.0  # how long it may take
GAP_S = 60.0  # between two readings of power; what lies further apart is not integrated
COVERED = 0.9  # of the time must be, or the energy counts as not measured
POWERCAP = Path("/sys/class/powercap")
FILE = "system.jsonl"

JOULE_WH = 1 / 3600


def peak_memory_mb() -> float:
    """The most that this process had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says of a process counts the one that started it, too.
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Processors:
    """Energy of the processors' packages, from RAPL's counters of microjoules.

    `missing` says why there is none: no such counters, or they may not be read.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.missing: str | None = None
        self.joules = 0.0
        self._range: dict[Path, int] = {}
        self._last: dict[Path, int] = {}
        try:
            # intel-rapl:0 is a package (AMD's too), intel-rapl:0:1 a part of one, and
            # intel-rapl-mmio:0 the first package once more.
            for zone in sorted(powercap.glob("intel-rapl:[0-9]*")):
                if zone.name.count(":") == 1 and _text(zone / "name").startswith("package"):
                    self._range[zone] = int(_text(zone / "max_energy_range_uj"))
                    self._last[zone] = int(_text(zone / "energy_uj"))
        except PermissionError as error:
            self.missing = f"processors: {error.filename} may not be read by this user"
        except (OSError, ValueError) as error:
            self.missing = f"processors: {powercap}: {error}"
        if not self._range and self.missing is None:
            self.missing = "processors: no RAPL counters on this machine"

    def read(self) -> None:
        """Add what was used since the last reading; a counter that wrapped once is understood."""
        if self.missing:
            return
        try:
            for zone, last in self._last.items():
                now = int(_text(zone / "energy_uj"))
                used = now - last if now >= last else now - last + self._range[zone]
                self.joules += used / 1e6
                self._last[zone] = now
        except (OSError, ValueError) as error:
            self.missing = f"processors: RAPL stopped answering: {error}"


def _text(path: Path) -> str:
    return path.read_text().strip()


class Gpus:
    """Load, memory, power and energy of GPUs, as nvidia-smi reads them.

    Args:
        chosen: their numbers or UUIDs, as CUDA_VISIBLE_DEVICES names them; None: all; "": none.
    """

    _ASKED = "index,utilization.gpu,memory.used,memory.total,power.draw,power.limit"

    def __init__(self, chosen: str | None) -> None:
        self.missing: str | None = None if chosen != "" else "GPUs: the stage uses none"
        self.joules = 0.0
        self.covered_s = 0.0
        self.names: set[str] = set()
        self.metrics: dict[str, float] = {}
        self.peak_megabytes = 0.0
        self._command = [
            "nvidia-smi",
            f"--query-gpu={self._ASKED}",
            "--format=csv,noheader,nounits",
        ]
        if chosen:
            self._command += ["-i", chosen]
        self._last: tuple[float, float] | None = None  # seconds, watts

    def read(self) -> None:
        if self.missing:
            return
        try:
            asked = subprocess.run(
                self._command, capture_output=True, text=True, timeout=NVIDIA_SMI_S
            )
        except FileNotFoundError:
            self.missing = "GPUs: none here (no nvidia-smi)"
            return
        except (OSError, subprocess.TimeoutExpired):
            return  # a gap
        if asked.returncode:
            if not self.names:
                said = (asked.stdout.strip() or asked.stderr.strip()).splitlines()
                self.missing = f"GPUs: nvidia-smi says: {said[0][:120] if said else 'nothing'}"
            return
        now, watts, memory = time.monotonic(), 0.0, 0.0
        for line in asked.stdout.splitlines():
            index, *values = (part.strip() for part in line.split(","))
            if len(values) != self._ASKED.count(","):
                continue
            busy, used, total, power, limit = (_number(value) for value in values)
            self.names.add(index)
            of = f"gpu_{index}"
            self._set(f"{of}_utilization_percentage", busy)
            if used is not None:
                used *= 2**20 / 1e6
                memory += used
                self._set(f"{of}_memory_usage_megabytes", used)
                if total:
                    self._set(f"{of}_memory_usage_percentage", 100 * used / (total * 2**20 / 1e6))
            if power is None:
                self.missing = f"GPUs: number {index} does not tell its power"
                continue
            watts += power
            self._set(f"{of}_power_usage_watts", power)
            if limit:
                self._set(f"{of}_power_usage_percentage", 100 * power / limit)
        self.peak_megabytes = max(self.peak_megabytes, memory)
        if self._last is not None and now - self._last[0] <= GAP_S:
            passed = now - self._last[0]
            self.joules += passed * (watts + self._last[1]) / 2
            self.covered_s += passed
        self._last = now, watts

    def _set(self, name: str, value: float | None) -> None:
        if value is not None:
            self.metrics[name] = round(value, 1)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


@dataclass
class _Readings:
    """Counters of one moment, of which a line shows the differences."""

    at: float
    busy: float
    idle: float
    stage_s: float
    received: int
    sent: int
    stage_bytes: int = 0


@dataclass
class Sampler:
    """Samples until it is stopped; `follow` says into which folder.

    folder: whose disk is looked at. gpus: as `Gpus` takes them.
    """

    folder: Path
    gpus: str | None = None
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._lines: list[dict[str, Any]] = []  # until it is known where they go
        self._file: Path | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system metrics", daemon=True)
        self._execution = round(time.time() * 1000)
        self._peak_bytes = 0

    def start(self) -> None:
        self._began = self._written = time.monotonic()
        self._processors, self._gpus = Processors(), Gpus(self.gpus)
        self._before = self._first = self._read()
        self._thread.start()

    def measure(self, pid: int) -> None:
        """The stage is this process and all it starts; without this, the calling process is."""
        self.pid = pid

    def follow(self, folder: Path) -> None:
        """Write to system.jsonl there, also what was sampled so far."""
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / FILE
            self._step = _next_step(self._file)
            lines, self._lines = self._lines, []
            for line in lines:
                self._append(line)

    def stop(self) -> None:
        """Sample once more, and end. Again is nothing."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._processors.read()
            self._gpus.read()
            self._write(self._read())

    def _sample(self) -> None:
        self._gpus.read()
        while not self._stop.wait(SAMPLE_S):
            self._processors.read()
            self._gpus.read()
            now = self._read()
            if now.at - self._written >= (now.at - self._began) * LINE_SHARE:
                self._write(now)

    def _read(self) -> _Readings:
        import psutil

        times, network = psutil.cpu_times(), psutil.net_io_counters()
        idle = times.idle + getattr(times, "iowait", 0.0)
        readings = _Readings(
            at=time.monotonic(),
            busy=sum(times) - idle - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0),
            idle=idle,
            stage_s=0.0,
            received=network.bytes_recv if network else 0,
            sent=network.bytes_sent if network else 0,
        )
        for process in _tree(self.pid):
            with contextlib.suppress(psutil.Error), process.oneshot():
                readings.stage_s += sum(process.cpu_times()[:4])  # with children that have ended
                readings.stage_bytes += process.memory_info().rss
        self._peak_bytes = max(self._peak_bytes, readings.stage_bytes)
        return readings

    def _write(self, now: _Readings) -> None:
        import psutil

        before, self._before, self._written = self._before, now, now.at
        busy, idle = now.busy - before.busy, now.idle - before.idle
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self.folder))
        metrics = {
            "cpu_utilization_percentage": 100 * busy / max(busy + idle, 1e-9),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (now.received - self._first.received) / 1e6,
            "network_transmit_megabytes": (now.sent - self._first.sent) / 1e6,
            **self._gpus.metrics,
        }
        passed = now.at - before.at
        # A process that ends with its parent gone takes its time out of the sum.
        if passed > 0 and now.stage_bytes and now.stage_s >= before.stage_s:
            metrics["stage_cpu_percentage"] = 100 * (now.stage_s - before.stage_s) / passed
        if now.stage_bytes:  # else it has ended
            metrics["stage_memory_megabytes"] = now.stage_bytes / 1e6
        line = {
            "time": round(time.time(), 3),
            "execution": {"started_ms": self._execution, **self._used(now.at - self._began)},
            **{f"system/{name}": float(f"{value:.6g}") for name, value in metrics.items()},
        }
        with self._lock:
            if self._file is None:
                self._lines.append(line)
            else:
                self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        # A disk that is full takes no figures; the stage must not end for that.
        with contextlib.suppress(OSError), self._file.open("a") as file:
            file.write(json.dumps({"step": self._step, **line}) + "\n")
            self._step += 1

    def _used(self, seconds: float) -> dict[str, Any]:
        """What this execution took so far."""
        processors, gpus = self._processors, self._gpus
        measured, missing, joules = [], [], 0.0
        if processors.missing:
            missing.append(processors.missing)
        else:
            measured.append("processor packages by RAPL")
            joules += processors.joules
        if gpus.missing is None and gpus.covered_s < COVERED * seconds:
            missing.append(f"GPUs: {gpus.covered_s:.0f} of {seconds:.0f} s have readings of power")
        elif gpus.missing:
            missing.append(gpus.missing)
        else:
            measured.append(f"GPU {', '.join(sorted(gpus.names))} by nvidia-smi")
            joules += gpus.joules
        return {
            "seconds": round(seconds, 2),
            "peak_memory_mb": round(self._peak_bytes / 1e6),
            "peak_gpu_memory_mb": round(gpus.peak_megabytes) if gpus.names else None,
            "energy_wh": round(joules * JOULE_WH, 4) if measured else None,
            "measured": measured,
            "missing": missing,
        }


def _tree(pid: int) -> list[Any]:
    import psutil

    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _next_step(path: Path) -> int:
    """A training that goes on appends to the file of the executions before."""
    return max((line["step"] for line in _lines(path)), default=-1) + 1


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # a kill left half of it
            lines.append(json.loads(line))
    return lines


def usage(folder: Path) -> dict[str, Any]:
    """What all executions of a run took, interrupted ones included, from its system.jsonl.

    Returns:
        hours of wall time; peak_memory_gb of the stage's processes together (memory they share
        counts for each) and peak_gpu_memory_gb of the GPUs, both as sampled; energy_wh of the
        whole GPUs and processors, whoever else used them, where it was measured in every
        execution; energy_source: what was measured and what was not, and why. Empty where nothing
        was sampled.
    """
    last = {line["execution"]["started_ms"]: line["execution"] for line in _lines(folder / FILE)}
    executions = list(last.values())
    if not executions:
        return {}
    energies = [one["energy_wh"] for one in executions]
    measured = {what: None for one in executions for what in one["measured"]}
    missing = {why: None for one in executions for why in one["missing"]}
    same = len({tuple(one["measured"]) for one in executions}) == 1
    figures = {
        "hours": round(sum(one["seconds"] for one in executions) / 3600, 5),
        "peak_memory_gb": max(one["peak_memory_mb"] for one in executions) / 1000,
    }
    if gpu := [one["peak_gpu_memory_mb"] for one in executions if one["peak_gpu_memory_mb"]]:
        figures["peak_gpu_memory_gb"] = max(gpu) / 1000
    if measured and same:
        figures["energy_wh"] = round(sum(energies), 4)
    what = ", ".join(measured) if same else "not measured in every execution"
    said = "; ".join([what or "not measured", *missing])
    return {**figures, "energy_source": said}
