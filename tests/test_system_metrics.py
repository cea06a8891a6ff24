"""What a stage takes is measured or absent: counters that wrap, GPUs that stop answering."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ringmo import system_metrics
from ringmo.system_metrics import Gpus, Processors, Sampler, usage


def zone(
    powercap: Path, name: str, energy: int, kind: str = "package-0", reach: int = 1000
) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "max_energy_range_uj").write_text(f"{reach}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder


def fake_nvidia_smi(folder: Path, monkeypatch: Any, script: str) -> None:
    """A program of that name, first on the path: it keeps its arguments, and says what is told."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_packages_are_summed_and_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", 900_000_000, reach=1_000_000_000)
    second = zone(tmp_path, "intel-rapl:1", 5, "package-1")
    zone(tmp_path, "intel-rapl:0:0", 0, "core")  # a part of the first
    zone(tmp_path, "intel-rapl-mmio:0", 0)  # the first once more
    zone(tmp_path, "intel-rapl:2", 0, "psys")  # the whole board
    processors = Processors(tmp_path)
    (first / "energy_uj").write_text("50000000")
    (second / "energy_uj").write_text("3000005")
    processors.read()
    assert processors.missing is None
    assert processors.joules == pytest.approx(150 + 3)


def test_counters_that_only_root_may_read_are_no_zero(tmp_path: Path, monkeypatch: Any) -> None:
    counter = zone(tmp_path, "intel-rapl:0", 1) / "energy_uj"
    read = Path.read_text

    def refused(path: Path, *args: Any, **kwargs: Any) -> str:  # root, who tests, may read all
        if path == counter:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    processors = Processors(tmp_path)
    assert processors.missing == f"processors: {counter} may not be read by this user"
    assert Processors(tmp_path / "none").missing == "processors: no RAPL counters on this machine"


def test_power_is_integrated_over_the_chosen_gpus(tmp_path: Path, monkeypatch: Any) -> None:
    two = "echo '1, 50, 1000, 2000, 100.0, 400.0'; echo '3, 70, 500, 2000, 300.0, 400.0'"
    fake_nvidia_smi(tmp_path, monkeypatch, two)
    now = [100.0]
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: now[0])
    gpus = Gpus("1,3")
    for now[0] in (100.0, 110.0, 120.0, 500.0):  # the last after a gap
        gpus.read()
    assert (tmp_path / "asked").read_text().split()[-2:] == ["-i", "1,3"]
    assert gpus.joules == pytest.approx(400 * 20)
    assert gpus.covered_s == 20
    assert gpus.metrics["gpu_3_utilization_percentage"] == 70
    assert gpus.metrics["gpu_1_power_usage_percentage"] == 25
    assert gpus.metrics["gpu_1_memory_usage_megabytes"] == pytest.approx(1048.6)
    assert gpus.peak_megabytes == pytest.approx(1500 * 2**20 / 1e6)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo '0, 5, 10, 20, [N/A], [N/A]'", "GPUs: number 0 does not tell its power"),
        ("echo 'No devices were found'; exit 6", "GPUs: nvidia-smi says: No devices were found"),
    ],
)
def test_a_gpu_without_a_reading_of_power_has_no_energy(
    tmp_path: Path, monkeypatch: Any, script: str, why: str
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    gpus = Gpus(None)
    gpus.read()
    assert gpus.missing == why


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "system.jsonl").read_text().splitlines()]


def sampled(folder: Path, monkeypatch: Any, powercap: Path, seconds: float = 0.4) -> dict[str, Any]:
    monkeypatch.setattr(system_metrics, "SAMPLE_S", 0.05)
    monkeypatch.setattr(Processors.__init__, "__defaults__", (powercap,))
    sampler = Sampler(folder)
    sampler.start()
    sampler.follow(folder / "feed")
    time.sleep(seconds)
    sampler.stop()
    return usage(folder / "feed")


def test_a_machine_without_counters_says_so_and_gives_no_energy(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    took = sampled(tmp_path, monkeypatch, tmp_path / "none")
    assert "energy_wh" not in took
    assert took["energy_source"] == (
        "not measured; processors: no RAPL counters on this machine; "
        "GPUs: none here (no nvidia-smi)"
    )
    assert took["hours"] == pytest.approx(0.4 / 3600, rel=0.9)
    assert took["peak_memory_gb"] > 0.01


def test_a_run_in_two_executions_took_what_both_took(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    counter = zone(tmp_path / "powercap", "intel-rapl:0", 0, reach=10**12) / "energy_uj"
    monkeypatch.setattr(Sampler, "_read", rising(counter, Sampler._read))
    once = sampled(tmp_path, monkeypatch, tmp_path / "powercap")
    twice = sampled(tmp_path, monkeypatch, tmp_path / "powercap")
    assert once["energy_source"].startswith("processor packages by RAPL; GPUs: none")
    assert once["energy_wh"] > 0
    assert twice["energy_wh"] > once["energy_wh"] and twice["hours"] > once["hours"]
    steps = [line["step"] for line in lines_of(tmp_path / "feed")]
    assert steps == list(range(len(steps)))


def rising(counter: Path, read: Any) -> Any:
    """Each time the machine is looked at, it has used 3.6 J more."""

    def looked(sampler: Sampler) -> Any:
        counter.write_text(str(int(counter.read_text()) + 3_600_000))
        return read(sampler)

    return looked


def test_the_stage_is_told_apart_from_the_machine(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(system_metrics, "SAMPLE_S", 0.05)
    # A child that keeps 300 MB and a core busy, through a parent that does nothing.
    busy = "x = bytearray(300_000_000)\nfor i in range(0, len(x), 4096): x[i] = 1\nwhile 1: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    child = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    sampler = Sampler(tmp_path)
    sampler.measure(child.pid)
    sampler.follow(tmp_path)
    sampler.start()
    time.sleep(2)
    os.killpg(child.pid, 9)
    child.wait()
    sampler.stop()
    assert usage(tmp_path)["peak_memory_gb"] > 0.3
    lines = lines_of(tmp_path)
    assert max(line.get("system/stage_cpu_percentage", 0) for line in lines) > 20
    names = {name.removeprefix("system/") for name in lines[0] if name.startswith("system/")}
    assert {
        *("cpu_utilization_percentage", "system_memory_usage_megabytes"),
        *("system_memory_usage_percentage", "disk_usage_percentage", "disk_usage_megabytes"),
        *("disk_available_megabytes", "network_receive_megabytes", "network_transmit_megabytes"),
    } <= names


def test_a_long_run_makes_fewer_lines_and_looking_costs_little(
    tmp_path: Path, monkeypatch: Any
) -> None:
    now = [0.0]
    sampler = Sampler(tmp_path)
    sampler.follow(tmp_path)
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: now[0])

    class Day:
        """The waiting of 24 hours, at once."""

        def wait(self, seconds: float) -> bool:
            now[0] += seconds
            return now[0] > 24 * 3600

    sampler._stop = Day()
    monkeypatch.setenv("PATH", str(tmp_path))
    sampler._began = sampler._written = 0.0
    sampler._processors, sampler._gpus = Processors(tmp_path), Gpus(None)
    sampler._before = sampler._first = reading = sampler._read()

    def read() -> Any:
        return system_metrics._Readings(**{**reading.__dict__, "at": now[0]})

    look = sampler._read
    monkeypatch.setattr(sampler, "_read", read)
    sampler._sample()
    lines = (tmp_path / "system.jsonl").read_text().splitlines()
    assert 500 < len(lines) < 1100
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(20):
        look()
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used / 20 < 0.01 * system_metrics.SAMPLE_S
