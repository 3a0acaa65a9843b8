"""How the benchmarks measure: interleaved timings, their spread, peak memory."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else Kineto prints notes about a missing GPU

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ghm_d2.errors import UserError

Call = Callable[[], Any]


def time_interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    budget_s: float = 2.0,
    min_repeats: int = 5,
    max_repeats: int = 50,
    warmups: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each repeat of each call, in rounds A B C, B C A, ..., to share drift equally.

    Args:
        calls: name to function.
        device: a CUDA device is timed with events on its stream, the CPU with the clock.
        budget_s: a call that has used this much time, without warm-up, is not repeated.
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
    """The most memory that was held at one time during `call` beyond what was held before it.

    On the CPU this adds up what PyTorch's allocator reports to the profiler, to the byte. The
    profiler sees the calling thread alone, so the call runs on one thread; on several threads a
    loss needs the scratch memory of each of them.
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
    """What in `call` made the host wait for the CUDA device; None if nothing did."""
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
    """Memory that is free on `device`, including what PyTorch has cached there."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


def choose_device(name: str | None) -> torch.device:
    """The device of this name; without one, CUDA where there is any.

    Raises:
        UserError: "cuda" is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError("PyTorch sees no CUDA device here: leave out --device, or give cpu.")
    return torch.device(name or ("cuda" if has_cuda else "cpu"))
