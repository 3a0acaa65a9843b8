"""The paper's five figures: PNG and SVG for each, one with all of them, and the data as CSV."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from ghm_d2.plotting import save_figure

from .collect import PartDistributions
from .distributions import regression_gradients

__all__ = ["write_figures"]

SMOOTH_L1_DELTA = 1 / 9  # the paper's smooth L1

# Okabe and Ito's colours, which colour-blind readers tell apart; lines and markers differ as well.
_STYLES = {
    "CE": ("#0072B2", "-", "o"),
    "focal": ("#D55E00", "--", "s"),
    "GHM-C": ("#000000", "-", "^"),
    "SL1": ("#0072B2", "--", "s"),
    "ASL1": ("#D55E00", "-.", "o"),
    "GHM-R": ("#000000", "-", "^"),
    "all examples": ("#0072B2", "-", "o"),
    "positives": ("#D55E00", "--", "s"),
}
_WIDTH, _HEIGHT = 5.6, 4.2
_DPI = 150

Table = dict[str, Sequence[float] | np.ndarray]


def write_figures(part: PartDistributions, folder: Path, caption: str) -> list[Path]:
    """Draws the figures and writes their data.

    Args:
        part: at least one example of each kind.
        folder: is made; gets ``example_counts``, ``gradient_norm``, ``gradient_contribution``,
            ``regression_fraction``, ``regression_gradient``, each as .png, .svg and .csv, and
            ``overview.png`` and ``.svg``.
        caption: one line that says what the numbers come from.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = {
        "example_counts": _example_counts,
        "gradient_norm": _gradient_norm,
        "gradient_contribution": _gradient_contribution,
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
    """The definitions, in the place that the fifth figure leaves free."""
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


def _example_counts(axes: Axes, part: PartDistributions) -> Table:
    data = part.classification
    low, high, centre = _regions(data.bins)
    _lines(axes, centre, {"all examples": data.counts, "positives": data.positives})
    axes.set(yscale="log", ylabel="number of examples", title="Examples by gradient norm")
    _norm_axis(axes, "g")
    counts = {"examples": data.counts, "positives": data.positives}
    return {"g_from": low, "g_to": high, **counts}


def _gradient_norm(axes: Axes, part: PartDistributions) -> Table:
    low, high, centre = _regions(part.classification.bins)
    norms = part.classification.gradient_norms()
    _lines(axes, centre, norms)
    axes.set(yscale="log", ylabel="reformulated gradient norm", title="Gradient of one example")
    _norm_axis(axes, "g")
    return {"g_from": low, "g_to": high, **norms}


def _gradient_contribution(axes: Axes, part: PartDistributions) -> Table:
    low, high, centre = _regions(part.classification.bins)
    shares = part.classification.contributions()
    _lines(axes, centre, shares)
    axes.set(yscale="log", ylabel="share of the total gradient", title="Gradient of all examples")
    _norm_axis(axes, "g")
    return {"g_from": low, "g_to": high, **shares}


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


def _lines(axes: Axes, x: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    for name, values in curves.items():
        colour, line, marker = _STYLES[name]
        shown = np.where(values > 0, values, np.nan)  # a logarithm has no place for 0
        axes.plot(x, shown, color=colour, linestyle=line, marker=marker, markersize=4, label=name)


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
