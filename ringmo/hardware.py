"""What a stage's figures depend on beside its inputs: processor, threads, GPU, library versions."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Libraries whose version can change a result's last bits, or what a table's bytes are.
PINS = (
    *("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pandas", "pyarrow"),
    *("pillow", "simplejpeg", "rasterio", "scikit-learn", "safetensors"),
)


def described() -> dict[str, Any]:
    """This machine as this process uses it; of PyTorch only where the process has loaded it.

    cpu: the model's name. threads: of PyTorch's operators. instructions: the widest that its
    kernels use. gpu: its name, where this process computed on one. processes: that train together.
    packages: `PINS` → version.
    """
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "packages": _packages(),
    }
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return found
    found |= {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if torch.cuda.is_initialized():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def in_short(machine: dict[str, Any]) -> str:
    """A machine in a line, for people."""
    parts = [machine.get("gpu"), machine.get("cpu")]
    if "threads" in machine:
        parts.append(f"{machine['threads']} threads, {machine['instructions']}")
    torch = machine.get("packages", {}).get("torch")
    parts.append(torch and f"torch {torch}")
    return ", ".join(part for part in parts if part)


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two machines of what can change a result, a phrase each.

    What PyTorch says is compared where both had loaded it.
    """
    names = ["cpu", "system", "processes"]
    if "threads" in was and "threads" in now:
        names += ["instructions", "threads", "deterministic"]
        names += ["gpu", "cuda", "cudnn", "cudnn_deterministic", "tf32"]
    said = [
        f"{name} was {was.get(name, 'none')}, is {now.get(name, 'none')}"
        for name in names
        if was.get(name) != now.get(name)
    ]
    before, here = was.get("packages", {}), now.get("packages", {})
    for name in PINS:
        if before.get(name) != here.get(name):
            said.append(f"{name} was {before.get(name)}, is {here.get(name)}")
    return said


def _packages() -> dict[str, str]:
    found = {}
    for name in PINS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
