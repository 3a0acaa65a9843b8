"""How the benchmarks measure: interleaved timings, peak memory, spread, and on what machine."""

import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its notes about a missing GPU help nobody

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ghm_d2.provenance import processor_name

__all__ = [
    "available_bytes",
    "bootstrap_ratio",
    "environment",
    "host_sync",
    "peak_extra_bytes",
    "summarize",
    "time_interleaved",
]

Call = Callable[[], Any]
ROOT = Path(__file__).resolve().parents[1]


def time_interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    budget_s: float = 2.0,
    min_repeats: int = 5,
    max_repeats: int = 50,
    warmups: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each repeat of each call, in rounds A B C, B C A, ...: drift meets all alike.

    Args:
        calls: name to function.
        device: a CUDA device is timed with events on its stream, the CPU with the clock.
        budget_s: a call that has used so much time, warm-up apart, is not repeated any more.
        min_repeats: repeats that every call gets whatever its time.
        max_repeats: repeats after which a call stops.
        warmups: unmeasured calls of each, fewer where one takes more than half a second.
    """
    for call in calls.values():
        for _ in range(warmups):
            if _seconds(call, device) > 0.5:
                break
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    open_calls = list(calls)
    while open_calls:
        for name in list(open_calls):
            taken = seconds[name]
            taken.append(_seconds(calls[name], device))
            enough = len(taken) >= min_repeats and sum(taken) >= budget_s
            if enough or len(taken) >= max_repeats:
                open_calls.remove(name)
        open_calls = open_calls[1:] + open_calls[:1]
    return seconds


def _seconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def summarize(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles, in seconds, and the number of repeats."""
    q1, median, q3 = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"median_s": median, "q1_s": q1, "q3_s": q3, "repeats": len(seconds)}


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], samples: int = 5000
) -> dict[str, float]:
    """Ratio of the medians with its 95 % interval; the two sequences are paired by round."""
    pairs = np.array([numerator, denominator])
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, pairs.shape[1], (samples, pairs.shape[1]))
    tops, bottoms = np.median(pairs[:, chosen], axis=2)
    low, high = np.quantile(tops / bottoms, [0.025, 0.975])
    top, bottom = np.median(pairs, axis=1)
    return {"ratio": float(top / bottom), "low": float(low), "high": float(high)}


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """The most memory that was held at one time during ``call`` beyond what was held before it.

    On the CPU this adds up what PyTorch's allocator reports to the profiler, to the byte. The
    profiler hears the calling thread alone, so the call runs on one thread; a loss that deals
    blocks to several threads needs the scratch memory of each of them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about profiling in cycles
        with (
            _one_thread(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        ):
            call()
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    # PyTorch before 2.4 counts in microseconds; events of the same one are in order already.
    for event in sorted(events, key=lambda e: (getattr(e, "start_ns", None) or e.start_us)()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def host_sync(call: Call) -> str | None:
    """What in ``call`` made the host wait for the CUDA device; None if nothing did."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def available_bytes(device: torch.device) -> int:
    """Memory that is free on ``device``, with what PyTorch has cached there."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = _lines("/proc/meminfo")
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return kib[0] * 1024 if kib else 1 << 62


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date, for the head of a result file."""
    names = ("fvcore", "torchvision", "numpy", "triton")
    commit = _git("rev-parse", "HEAD")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain")),
        "machine": _machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in names},
        },
    }


def _machine(device: torch.device) -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    out: dict[str, Any] = {
        "device": device.type,
        "cpu": processor_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        out |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return out


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
