"""The table that bench_losses.py prints."""

from collections.abc import Iterable
from typing import Any

from cases import FUSED

Record = dict[str, Any]


def cells_table(cells: Iterable[Record]) -> str:
    """One line for each cell; "fused = 1" is the time over that of this project's fused path."""
    cells = list(cells)
    fused = {(c["suite"], c["case"]): c.get("median_s") for c in cells if c["row"] == FUSED}
    width = max(len(c["row"]) for c in cells)
    head = f"{'suite':8}{'case':12}{'implementation':{width + 2}}{'median':>10}{'quartiles':>20}"
    lines = [head + f"{'floor = 1':>11}{'fused = 1':>11}{'memory*':>9}"]
    for cell in cells:
        start = f"{cell['suite']:8}{cell['case']:12}{cell['row']:{width + 2}}"
        if cell["status"] == "skipped":
            lines.append(f"{start}skipped: {cell['reason']}")
            continue
        base = fused.get((cell["suite"], cell["case"]))
        ratio = f"{cell['median_s'] / base:11.2f}" if base else f"{'':11}"
        spread = f"{_time(cell['q1_s'])} - {_time(cell['q3_s'])}"
        line = f"{start}{_time(cell['median_s']):>10}{spread:>20}{cell['times_floor']:11.2f}"
        lines.append(f"{line}{ratio}{cell['peak_times_predictions']:9.2f}")
    lines.append("* peak extra memory / bytes of the predictions")
    watched = [c for c in cells if "host_sync" in c]
    waits = [f"{c['suite']} {c['case']} {c['row']}: {c['host_sync']}" for c in watched]
    if watched:
        waits = [w for w, c in zip(waits, watched, strict=True) if c["host_sync"]]
        lines.append(f"calls of this project in which the host waits for the device: {len(waits)}")
    return "\n".join(lines + waits)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def kernel_lines(result: Record) -> str:
    """One line for each dtype in which the pair of kernels was measured against a copy."""
    return "".join(
        f"kernels, {k['dtype']}: {k['pair_gb_per_s']:.1f} GB/s, "
        f"{k['share_of_copy']:.0%} of a copy's {k['copy_gb_per_s']:.1f} GB/s\n"
        for k in result.get("kernels", [])
    )
