"""The paper's five figures: PNG and SVG for each, one with all of them, and the data as CSV."""

import csv
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from ghm_d2.plotting import save_figure

from .collect import PartDistributions
from .distributions import ClassificationDistribution, regression_gradients

SMOOTH_L1_DELTA = 1 / 9  # the paper's smooth L1

# Okabe and Ito's colours, which colour-blind readers tell apart; lines and markers differ as well.
_STYLES = {
    "CE": ("#0072B2", "-", "o"),
    "focal": ("#D55E00", "--", "s"),
    "GHM-C": ("#000000", "-", "^"),
    "SL1": ("#0072B2", "--", "s"),
    "ASL1": ("#D55E00", "-.", "o"),
    "GHM-R": ("#000000", "-", "^"),
    "examples": ("#0072B2", "-", "o"),
    "positives": ("#D55E00", "--", "s"),
}
_WIDTH, _HEIGHT = 5.6, 4.2
_DPI = 150

# For each figure by unit region: its curves, the label of their axis, the title.
_CLASSIFICATION = {
    "example_counts": (
        lambda data: {"examples": data.counts, "positives": data.positives},
        "number of examples",
        "Examples by gradient norm",
    ),
    "gradient_norm": (
        ClassificationDistribution.gradient_norms,
        "reformulated gradient norm",
        "Gradient of one example",
    ),
    "gradient_contribution": (
        ClassificationDistribution.contributions,
        "share of the total gradient",
        "Gradient of all examples",
    ),
}

Table = dict[str, Sequence[float] | np.ndarray]


def write_figures(part: PartDistributions, folder: Path, caption: str) -> list[Path]:
    """Draws the figures and writes their data.

    Args:
        part: has at least one classification example and one box coordinate.
        folder: created if it does not exist; gets `example_counts`, `gradient_norm`,
            `gradient_contribution`, `regression_fraction`, `regression_gradient`, each as
            .png, .svg and .csv, and `overview.png` and `.svg`.
        caption: one line on where the numbers come from.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = {
        **{name: partial(_by_region, name) for name in _CLASSIFICATION},
        "regression_fraction": _regression_fraction,
        "regression_gradient": _regression_gradient,
    }
    files = []
    overview = Figure(figsize=(3 * _WIDTH, 2 * _HEIGHT), layout="constrained")
    overview.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = overview.subplots(2, 3).flatten()
    overview.suptitle(caption, fontsize="x-large")
    _explain(grid[-1], part)
    for letter, (name, draw), axes in zip("abcde", panels.items(), grid, strict=False):
        draw(axes, part)
        axes.set_title(f"({letter}) {axes.get_title()}")
        single = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        table = draw(single.subplots(), part)
        files += save_figure(single, folder / name, _DPI)
        files.append(_write_csv(folder / f"{name}.csv", table))
    return files + save_figure(overview, folder / "overview", _DPI)


def _explain(axes: Axes, part: PartDistributions) -> None:
    """Writes definitions where a sixth figure would be: there are only five."""
    data, box = part.classification, part.regression
    lines = [
        "Reformulated gradient norm of an example",
        "   CE:  $g = |p - t|$",
        f"   focal:  $\\alpha_t\\, g^\\gamma (g - \\gamma (1 - g) \\ln(1 - g))$,  "
        f"$\\alpha$ = {data.alpha:g}, $\\gamma$ = {data.gamma:g}",
        "   GHM-C:  $\\beta g$,   GHM-R:  $\\beta g_r$,   $\\beta = N / GD$",
        "   SL1:  $\\min(|d| / \\delta, 1)$,  $\\delta$ = 1/9",
        f"   ASL1:  $g_r = |d| / \\sqrt{{d^2 + \\mu^2}}$,  $\\mu$ = {box.mu:g}",
        "",
        f"{data.counts.sum():,} classification examples in {data.bins} unit regions, ",
        f"{box.counts.sum():,} box coordinates in {box.bins}; (b) shows means by region.",
    ]
    axes.axis("off")
    axes.text(0, 0.95, "\n".join(lines), va="top", linespacing=1.7)


def _by_region(figure: str, axes: Axes, part: PartDistributions) -> Table:
    data = part.classification
    values, ylabel, title = _CLASSIFICATION[figure]
    curves = values(data)
    low, high, centre = _regions(data.bins)
    for name, column in curves.items():
        colour, line, marker = _STYLES[name]
        shown = np.where(column > 0, column, np.nan)  # a logarithmic axis cannot show 0
        label = "all examples" if name == "examples" else name
        axes.plot(centre, shown, color=colour, linestyle=line, marker=marker, ms=4, label=label)
    axes.set(yscale="log", ylabel=ylabel, title=title)
    _norm_axis(axes, "g")
    return {"g_from": low, "g_to": high, **curves}


def _regression_fraction(axes: Axes, part: PartDistributions) -> Table:
    data = part.regression
    low, high, centre = _regions(data.bins)
    fractions = data.fractions()
    axes.bar(centre, fractions, width=0.9 / data.bins, color="#56B4E9", edgecolor="black", lw=0.5)
    axes.set(ylabel="fraction of box coordinates", title="Box coordinates by gradient norm")
    _norm_axis(axes, "g_r", f", ASL1 with $\\mu$ = {data.mu:g}")
    return {"g_r_from": low, "g_r_to": high, "examples": data.counts, "fraction": fractions}


def _regression_gradient(axes: Axes, part: PartDistributions) -> Table:
    data = part.regression
    d = np.geomspace(data.mu / 20, 20 * data.mu, 501)
    curves = regression_gradients(d, data.counts, data.mu, SMOOTH_L1_DELTA)
    names = {"SL1": "SL1, $\\delta$ = 1/9", "ASL1": f"ASL1, $\\mu$ = {data.mu:g}", "GHM-R": "GHM-R"}
    for name, values in curves.items():
        colour, line, marker = _STYLES[name]
        axes.plot(
            d, values, color=colour, linestyle=line, marker=marker, markevery=50, label=names[name]
        )
    axes.set(xscale="log", yscale="log", xlabel="$|d|$, error of a box coordinate")
    axes.set(ylabel="reformulated gradient norm", title="Gradient of one box coordinate")
    _finish(axes)
    return {"abs_d": d, **curves}


def _regions(bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges = np.arange(bins + 1) / bins
    return edges[:-1], edges[1:], (edges[:-1] + edges[1:]) / 2


def _norm_axis(axes: Axes, symbol: str, more: str = "") -> None:
    axes.set(xlim=(0, 1), xlabel=f"gradient norm ${symbol}${more}")
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _write_csv(file: Path, table: Table) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table)
        writer.writerows(zip(*(_cells(column) for column in table.values()), strict=True))
    return file


def _cells(column: Iterable[float]) -> list[str]:
    """Whole numbers in full, others to nine digits; an undefined one stays empty."""
    return [str(x) if isinstance(x, np.integer) else "" if x != x else f"{x:.9g}" for x in column]
