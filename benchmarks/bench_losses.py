"""Measures time and memory of the harmonised losses beside mmdetection's and focal losses.

    python benchmarks/bench_losses.py                  # the CPU, then a GPU where there is one
    python benchmarks/bench_losses.py --device cpu --suites sizes --sizes 1e5 1e6

Every figure is for forward and backward together. The implementations take turns on the same
input, and peak memory is measured in separate calls. The floor reads the predictions twice and
writes as many values: no harmonised loss can do less.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import measure
import peers
import plot
import table
import torch
from cases import (
    CLASSES,
    EAGER,
    FLOOR,
    FUSED,
    MMDET,
    Case,
    Deltas,
    Logits,
    anchors_of_levels,
)
from tqdm import tqdm

from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.losses.kernels import device_examples, sigmoid_kernel
from ghm_d2.provenance import describe

RESULTS = Path(__file__).resolve().parent / "results"
SUITES = ("sizes", "regions", "levels", "ghm_r")
IMAGE = (800, 1333)
BINS_C, BINS_R = 30, 10  # the authors'
Record = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cpu, then cuda where there is one")
    add("--suites", nargs="+", choices=SUITES, default=SUITES)
    add("--sizes", nargs="+", type=float, default=[1e4, 1e5, 1e6, 1e7, 1e8], help="logits")
    add("--regions", nargs="+", type=int, default=[1, 10, 30, 100, 300, 1000])
    add("--region-size", type=float, default=4.8e6, help="logits of the suite regions")
    add("--images", nargs="+", type=int, default=[1, 2], help="of 800 x 1333, suite levels")
    add("--coordinates", nargs="+", type=float, default=[1e3, 1e4, 1e5, 1e6], help="suite ghm_r")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--limit-s", type=float, default=10, help="skip calls that are predicted to take longer")
    add("--budget-s", type=float, default=2, help="time for the repeats of one cell")
    add("--min-repeats", type=int, default=3)
    add("--max-repeats", type=int, default=50)
    add("--peers", type=Path, default=peers.default_cache(), help="folder of downloaded peers")
    add("--output", type=Path, help="default: benchmarks/results/bench_losses_<device>.json")
    return parser.parse_args(arguments)


def build_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases that `args` ask for, each suite from small to large."""
    dtype = getattr(torch, args.dtype)

    def logits(rows: Sequence[int]) -> Any:
        return lambda: Logits(rows, device, dtype)

    def deltas(size: int) -> Any:
        return lambda: Deltas(size, device, dtype)

    cases = []
    for n in sorted(args.sizes):
        rows = max(round(n / CLASSES), 1)
        cases.append(Case("sizes", f"{n:.0e}", rows * CLASSES, BINS_C, n, logits([rows])))
    rows = max(round(args.region_size / CLASSES), 1)
    for bins in sorted(args.regions):
        make, names = logits([rows]), (FUSED, EAGER, MMDET)
        cases.append(Case("regions", f"M={bins}", rows * CLASSES, bins, bins, make, names))
    for images in sorted(args.images):
        levels = [images * n for n in anchors_of_levels(*IMAGE)]
        make, size = logits(levels), sum(levels) * CLASSES
        names = (FUSED, EAGER, MMDET, *FOCAL_ROWS, "BCE, one-hot ready")
        cases.append(Case("levels", f"{images} image(s)", size, BINS_C, images, make, names))
    for n in sorted(args.coordinates):
        cases.append(Case("ghm_r", f"{n:.0e}", int(n), BINS_R, n, deltas(int(n))))
    return [case for case in cases if case.suite in args.suites]


FOCAL_ROWS = (
    "focal, fvcore jit, one-hot ready",
    "focal, fvcore jit, as Detectron2 (mask + one-hot inside)",
)


def run_case(
    case: Case,
    device: torch.device,
    mmdet: ModuleType | None,
    history: dict[tuple[str, str], list[Record]],
    args: argparse.Namespace,
    show: Callable[[str], None] = lambda row: None,
) -> list[Record]:
    """Measures every row of one case.

    Args:
        case: what to measure.
        device: where.
        mmdet: mmdetection's losses, None: without them.
        history: the measured records of each (suite, row), small to large; appended to.
        args: limits and repeats.
        show: called with the name of each row before it is measured.

    Returns:
        A record for each row, the floor first.
    """
    inputs = case.make()
    makers = inputs.calls(case.bins, mmdet)
    names = [name for name in makers if case.rows is None or name in case.rows]
    calls, peaks, records = {FLOOR: inputs.floor()}, {FLOOR: 0}, []
    for name in names:
        show(name)
        reason, predicted = _why_skip(
            history.get((case.suite, name), []), case.scale, inputs.bytes, device, args.limit_s
        )
        if reason is None:
            try:
                calls[name] = makers[name]()
                peaks[name] = measure.peak_extra_bytes(calls[name], device)
                continue
            except torch.cuda.OutOfMemoryError:
                calls.pop(name, None)
                reason = "the device has too little memory"
        records.append({"row": name, "status": "skipped", "reason": reason} | predicted)
    show("timing")
    seconds = measure.time_interleaved(
        calls,
        device,
        budget_s=args.budget_s,
        min_repeats=args.min_repeats,
        max_repeats=args.max_repeats,
    )
    floor_s = measure.summarize(seconds[FLOOR])["median_s"]
    measured = []
    for name, taken in seconds.items():
        record = {"row": name, "status": "measured", **measure.summarize(taken)}
        record |= {"times_floor": record["median_s"] / floor_s, "peak_extra_bytes": peaks[name]}
        record["peak_times_predictions"] = peaks[name] / inputs.bytes
        if device.type == "cuda" and name in (FUSED, EAGER):
            record["host_sync"] = measure.host_sync(calls[name])
        measured.append(record)
    head = {"suite": case.suite, "case": case.label, "examples": inputs.size, "bins": case.bins}
    head |= {"prediction_bytes": inputs.bytes, "scale": case.scale}
    records = [head | record for record in measured + records]
    for record in records:
        if record["status"] == "measured":
            history.setdefault((case.suite, record["row"]), []).append(record)
    return records


def _why_skip(
    smaller: Sequence[Record],
    scale: float,
    prediction_bytes: int,
    device: torch.device,
    limit_s: float,
) -> tuple[str | None, Record]:
    """The reason to skip a row, None if there is none, and the prediction behind the reason.

    Time is predicted by the line through the last two smaller cases, or through the origin and
    the only one. A proportional prediction would skip what hardly depends on the number of regions.
    """
    if not smaller:
        return None, {}
    *before, last = smaller
    first = before[-1] if before else {"scale": 0.0, "median_s": 0.0}
    slope = (last["median_s"] - first["median_s"]) / (last["scale"] - first["scale"])
    seconds = last["median_s"] + max(slope, 0) * (scale - last["scale"])
    if seconds > limit_s:
        return f"predicted {seconds:.1f} s a call, limit {limit_s:g} s", {"predicted_s": seconds}
    peak = last["peak_times_predictions"] * prediction_bytes
    if peak > 0.8 * measure.available_bytes(device):
        return f"predicted {peak / 2**30:.1f} GiB, more than is free", {"predicted_bytes": peak}
    return None, {}


def measure_bandwidth(size: int, device: torch.device, args: argparse.Namespace) -> list[Record]:
    """The pair of fused kernels against a plain copy: bytes moved a second, for each dtype."""
    out = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = Logits([max(size // CLASSES, 1)], device, dtype)
        x, labels = inputs.x[0], inputs.labels[0]
        target = torch.empty_like(x)
        arguments = [(x, labels, None)], BINS_C, None  # no second derivative
        kernel = device_examples(*arguments, ignored=-1) or sigmoid_kernel(*arguments)
        if kernel is None:  # too small for one, or a GPU without Triton
            return []
        if kernel.concludes:  # CUDA only
            state = {"acc_sum": torch.ones(BINS_C, device=device)}
            kernel.conclude_with(state, None, torch.zeros(1, dtype=torch.int64, device=device))
        weights, one = torch.ones(1, BINS_C, device=device), torch.ones((), device=device)

        def pair(kernel=kernel, weights=weights, one=one) -> None:
            kernel.counts(BINS_C)
            kernel.loss(weights)
            kernel.gradient(weights, one)

        def copy(source=x.detach(), target=target) -> None:  # noqa: B008
            target.copy_(source)

        calls = {"pair": pair, "copy": copy}
        taken = measure.time_interleaved(
            calls, device, budget_s=args.budget_s / 2, max_repeats=args.max_repeats
        )
        seconds = {name: measure.summarize(t)["median_s"] for name, t in taken.items()}
        # Logits are read twice and their gradient is written; labels are read twice.
        moved = 3 * inputs.bytes + 2 * labels.numel() * labels.element_size()
        pair_rate, copy_rate = moved / seconds["pair"], 2 * inputs.bytes / seconds["copy"]
        out.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "logits": inputs.size,
                "pair_s": seconds["pair"],
                "pair_gb_per_s": pair_rate / 1e9,
                "copy_gb_per_s": copy_rate / 1e9,
                "share_of_copy": pair_rate / copy_rate,
            }
        )
    return out


def run(device: torch.device, args: argparse.Namespace) -> Record:
    """Runs all suites on one device; returns the content of the file."""
    result: Record = describe(device)
    result["measured"] = "forward and backward of one call; times are medians with quartiles"
    result["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    del result["settings"]["peers"], result["settings"]["output"]  # folders of this machine
    try:
        mmdet = peers.mmdet_losses(args.peers)
        result["peers"] = {MMDET: "measured"}
    except peers.PeerUnavailable as error:
        mmdet = None
        result["peers"] = {MMDET: f"left out: {error}"}
        print(f"{MMDET} is left out: {error}.", file=sys.stderr)
    history: dict[tuple[str, str], list[Record]] = {}
    result["cells"] = []
    cases = build_cases(args, device)
    with tqdm(total=len(cases), desc=device.type, unit="case", file=sys.stderr) as bar:
        for case in cases:

            def show(row: str, case: Case = case) -> None:
                bar.set_postfix_str(f"{case.suite} {case.label}: {row}")

            result["cells"] += run_case(case, device, mmdet, history, args, show)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            bar.update()
    if "sizes" in args.suites:
        result["kernels"] = measure_bandwidth(int(max(args.sizes)), device, args)
    return result


def _output(args: argparse.Namespace, device: torch.device, several: bool) -> Path:
    if args.output is None:
        return RESULTS / f"bench_losses_{device.type}.json"
    if several:
        return args.output.with_stem(f"{args.output.stem}_{device.type}")
    return args.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes JSON and plots, prints one table for each device."""
    args = parse(arguments)
    names = [args.device] if args.device else ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    devices = [measure.choose_device(name) for name in names]
    reports = []
    for device in devices:
        result = run(device, args)
        path = _output(args, device, len(devices) > 1)
        write_json(path, result)
        pictures = plot.draw(result, path.with_suffix(""))
        written = ", ".join(str(p) for p in [path, *pictures])
        reports.append(f"{table.cells_table(result['cells'])}\n{table.kernel_lines(result)}")
        reports[-1] += f"written: {written}"
    print("\n\n".join(reports))


if __name__ == "__main__":
    with exits_with_one_sentence("bench_losses.py"):
        main()
