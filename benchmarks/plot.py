"""Draws what bench_losses.py measured: time against logits, and time against unit regions.

python benchmarks/plot.py benchmarks/results/bench_losses_cpu.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from cases import EAGER, EXACT, FLOOR, FUSED, MMDET
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ghm_d2.plotting import save_figure

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
STYLES = {
    FLOOR: ("#999999", ".", "--"),
    FUSED: ("#D55E00", "o", "-"),
    EAGER: ("#E69F00", "s", "-"),
    EXACT: ("#F0E442", "D", "-"),
    MMDET: ("#000000", "X", "-"),
    "focal, fvcore jit, one-hot ready": ("#0072B2", "^", "-"),
    "focal, fvcore jit, as Detectron2 (mask + one-hot inside)": ("#56B4E9", "v", "-"),
    "focal, torchvision, one-hot ready": ("#CC79A7", "P", "-"),
    "BCE, one-hot ready": ("#009E73", "*", "-"),
}


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """Writes `<stem>.png` and `<stem>.svg`; returns the files, none where nothing fits.

    Args:
        result: what bench_losses.py writes.
        stem: path without its extension.
    """
    cells = [c for c in result["cells"] if c["status"] == "measured" and c["row"] in STYLES]
    panels = [
        ("sizes", "examples", "logits", "Forward and backward"),
        ("regions", "bins", "unit regions", "{examples:,} logits"),
    ]
    panels = [p for p in panels if any(c["suite"] == p[0] for c in cells)]
    if not panels:
        return []
    figure = Figure(figsize=(6 * len(panels), 6.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (suite, key, label, title) in zip(axes, panels, strict=True):
        chosen = [c for c in cells if c["suite"] == suite]
        _panel(axis, chosen, key)
        axis.set(xlabel=label, ylabel="seconds a call", title=title.format(**chosen[0]))
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    ordered = [name for name in STYLES if name in handles]
    columns = len(panels)
    figure.legend(
        [handles[name] for name in ordered], ordered, loc="outside lower center", ncols=columns
    )
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    figure.suptitle(f"{where}, PyTorch {result['versions']['torch']}", fontsize="medium")
    return save_figure(figure, stem, dpi=150)


def _panel(axis: Axes, cells: list[dict[str, Any]], key: str) -> None:
    for name, (color, marker, line) in STYLES.items():
        own = sorted((c for c in cells if c["row"] == name), key=lambda c: c[key])
        if not own:
            continue
        x = [c[key] for c in own]
        style = {"color": color, "marker": marker, "linestyle": line, "label": name}
        # A dark rim keeps the yellow visible on white.
        axis.plot(
            x, [c["median_s"] for c in own], **style, markeredgecolor="black", markeredgewidth=0.4
        )
        axis.fill_between(
            x, [c["q1_s"] for c in own], [c["q3_s"] for c in own], color=color, alpha=0.2, lw=0
        )
    axis.set(xscale="log", yscale="log")
    axis.grid(True, which="major", alpha=0.3)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: plot.py RESULT.json")
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text()), source.with_suffix("")), sep="\n")
