"""What made a result: commit, machine and versions, for trainings, ablations and benchmarks alike.

Importing it imports the standard library alone; torch is asked when a machine is described.
"""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "torchvision", "detectron2", "fvcore", "numpy", "triton", "ghm_d2")


def describe(device: "str | torch.device" = "cpu") -> dict[str, Any]:
    """Date, commit, machine and versions as JSON values, for the head of a result file.

    Args:
        device: where the result is computed.

    Returns:
        date (ISO 8601, UTC, to the second), commit, dirty (whether the commit carries its mark,
        None outside a checkout), machine and versions.
    """
    head = commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": None if head is None else head.endswith("-dirty"),
        "machine": machine(device),
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from; None outside one.

    Returns:
        40 hexadecimal digits, followed by "-dirty" where tracked files differ from it.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True)
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Otherwise an installation inside another project's checkout would give that project's commit.
    if git("rev-parse", "--show-toplevel") != str(_ROOT):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the packages that matter; None for one not installed."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    build = getattr(sys.modules.get("torch"), "version", None)
    return {**found, "cuda": getattr(build, "cuda", None)}


def _version(package: str) -> str | None:
    # An imported package knows the version that really runs, with its build ("+cu130").
    running = getattr(sys.modules.get(package), "__version__", None)
    if running is not None:
        return str(running)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: "str | torch.device" = "cpu") -> dict[str, Any]:
    """Processor, memory (GiB), threads and load; for a CUDA device also its name and memory.

    Args:
        device: where the result is computed.
    """
    import torch

    device = torch.device(device)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": processor_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return found


def hardware(device: "str | torch.device" = "cpu", processes: int = 1) -> str:
    """The machine in a few words, as "8 x NVIDIA A100" or "AMD EPYC, 2 threads".

    Args:
        device: of one process.
        processes: how many work together, each on a GPU of its own or with as many CPU threads.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    times = f"{processes} processes with " if processes > 1 else ""
    threads = torch.get_num_threads()
    return f"{processor_name()}, {times}{threads} thread{'s' if threads > 1 else ''}"


def processor_name() -> str:
    """The model name of the first CPU, or what Python knows of it where the system has no list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
