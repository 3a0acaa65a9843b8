"""The process of one run: train_net.py, which also watches its parent and its own memory.

    python -m ghm_d2.ablation.child USAGE.json [arguments of train_net.py]

Started by :mod:`ghm_d2.ablation.execute` with a pipe on stdin: when the parent dies, however it
dies, the pipe closes and this process ends, so that two never write into one folder.
"""

import os
import platform
import resource
import select
import sys
import threading
from pathlib import Path
from typing import Any

import detectron2
import numpy
import torch
import torchvision

from ghm_d2.ablation.files import read_json, write_json
from ghm_d2.engine import main
from ghm_d2.provenance import processor_name

_PERIOD = 5.0  # seconds between two looks at the memory
_recording = threading.Lock()


def peak_rss_mb() -> float:
    """The most memory (MB) that this process has held; Linux's own mark, else that of getrusage."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / 1024  # kB
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024**2 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """Where this runs: processor, GPU, threads and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    return {
        "cpu": processor_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "detectron2": detectron2.__version__,
            "numpy": numpy.__version__,
        },
    }


def _record(file: Path, starts: int) -> None:
    """Write the peaks of this process and of those before it in the same folder."""
    with _recording:
        before = read_json(file) or {}
        write_json(file, {"starts": starts, **_peaks(before), **machine()})


def _peaks(before: dict[str, Any]) -> dict[str, Any]:
    peaks: dict[str, Any] = {"peak_rss_mb": peak_rss_mb()}
    if torch.cuda.is_initialized():
        peaks["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1024**2
    for name in ("peak_rss_mb", "peak_gpu_mb"):
        known = [p[name] for p in (before, peaks) if p.get(name) is not None]
        peaks[name] = round(max(known), 1) if known else None
    return peaks


def _watch(file: Path, starts: int) -> None:
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], _PERIOD)
        if readable and not os.read(sys.stdin.fileno(), 1):
            os._exit(1)
        _record(file, starts)


def run(argv: list[str]) -> None:
    """What the module's docstring says."""
    file = Path(argv[0])
    starts = (read_json(file) or {}).get("starts", 0) + 1
    _record(file, starts)  # a start counts also where the first seconds are the last
    threading.Thread(target=_watch, args=(file, starts), daemon=True).start()
    main(argv[1:])
    _record(file, starts)


if __name__ == "__main__":
    run(sys.argv[1:])
