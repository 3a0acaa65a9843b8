"""The page's charts, each as a data URI of an SVG."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ghm_d2.report.evaluation import Evaluation

__all__ = ["draw_curves", "draw_gradients", "draw_precision"]

# Okabe and Ito's colours, which colour-blind readers tell apart; lines and markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_AP = ("AP", "AP50", "AP75")
_SHARES = ("easy", "medium", "hard")
_PANEL = (4.3, 3.2)
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # names of classes are nobody's formulas
    "svg.hashsalt": "ghm_d2",  # the same data gives the same page
}

Rows = Mapping[int, Mapping[str, Any]]


def _uri(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _panels(number: int, columns: int) -> tuple[Figure, list[Any]]:
    rows = -(-number // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[number:]:
        unused.remove()
    return figure, axes[:number]


def draw_curves(metrics: Rows) -> list[tuple[str, str]]:
    """Losses, plain losses, AP and learning rate against the iteration.

    Args:
        metrics: values by iteration and name.

    Returns:
        (title, data URI) of each chart for which there are values.
    """
    names = sorted({name for row in metrics.values() for name in row})
    charts = {
        "Losses that are minimised": [n for n in names if n == "total_loss" or n[:5] == "loss_"],
        "Plain losses, not harmonised (logarithmic)": [n for n in names if "/plain_loss" in n],
        "Box AP on the test data": [n for n in names if "/" in n and n.rpartition("/")[2] in _AP],
        "Learning rate": [n for n in names if n == "lr"],
    }
    found = []
    for title, shown in charts.items():
        series = {name: _points(metrics, name) for name in shown}
        series = {name: points for name, points in series.items() if points}
        if series:
            found.append((title, _curve_chart(series, logarithmic="plain" in title.lower())))
    return found


def _points(rows: Rows, name: str) -> list[tuple[int, float]]:
    values = [(i, row.get(name)) for i, row in rows.items()]
    return [(i, v) for i, v in values if isinstance(v, int | float) and np.isfinite(v)]


def _curve_chart(series: Mapping[str, list[tuple[int, float]]], logarithmic: bool) -> str:
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _panels(1, 1)
        for k, (name, points) in enumerate(series.items()):
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color=_COLOURS[k % len(_COLOURS)],
                linestyle=_LINES[k % len(_LINES)],
                marker=_MARKERS[k % len(_MARKERS)] if len(points) < 40 else "",
                markersize=4,
            )
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if logarithmic and all(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _uri(figure)


def draw_gradients(name: str, rows: Rows) -> str:
    """How the gradient norms of one loss change: counts, share of the gradient, easy and hard.

    Args:
        name: of the loss.
        rows: what gradient_statistics.jsonl has of it, by iteration; at least one.

    Returns:
        A data URI.
    """
    iterations = list(rows)
    calls = [row["calls"] for row in rows.values()]
    counts = np.array([np.sum([c["counts"] for c in row], axis=0) for row in calls]).T
    shares = np.array([np.sum([c["gradient_share"] for c in row], axis=0) for row in calls]).T
    with matplotlib.rc_context(_STYLE):
        figure, (left, middle, right) = _panels(3, 3)
        _heat(figure, left, iterations, np.log10(1 + counts), "examples, log10(1 + number)")
        _heat(figure, middle, iterations, 100 * shares, "% of the gradient")
        for axes in (left, middle):
            axes.set(ylabel="gradient norm g", ylim=(0, 1))
        for k, share in enumerate(_SHARES):
            points = _points(rows, f"gradient_share_{share}")
            if points:
                x, y = zip(*points, strict=True)
                style = {"color": _COLOURS[k], "marker": _MARKERS[k], "linestyle": _LINES[k]}
                right.plot(x, 100 * np.array(y), label=share, markersize=4, **style)
        right.set(ylabel="% of the gradient", xlabel="iteration", ylim=(0, 100))
        right.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        right.legend(frameon=False, title="g < 1/3, < 2/3, above", fontsize=8, title_fontsize=8)
        figure.suptitle(name)
        return _uri(figure)


def _heat(
    figure: Figure, axes: Any, iterations: Sequence[int], values: np.ndarray, label: str
) -> None:
    """Regions from bottom to top, one column for each observed iteration."""
    axes.grid(False)
    columns = np.arange(len(iterations) + 1)
    regions = np.linspace(0, 1, len(values) + 1)
    # "cividis" is made for colour-blind readers; rasterised, for a long training has many cells.
    mesh = axes.pcolormesh(columns, regions, values, cmap="cividis", rasterized=True)
    figure.colorbar(mesh, ax=axes, label=label)
    step = -(-len(iterations) // 6)
    shown = range(0, len(iterations), step)
    axes.set_xticks([k + 0.5 for k in shown], [str(iterations[k]) for k in shown])
    axes.set_xlabel("iteration")


def draw_precision(result: Evaluation, most: int = 12) -> tuple[str, int]:
    """Precision against recall of the classes with the most objects, at IoU 0.5, 0.75 and 0.9.

    Args:
        result: at least one class has an object.
        most: panels at most.

    Returns:
        A data URI, and how many classes it shows.
    """
    order = [k for k in np.argsort(-result.objects, kind="stable") if result.objects[k]][:most]
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(order), 3)
        for axes, k in zip(panels, order, strict=True):
            for style, threshold in enumerate((0.5, 0.75, 0.9)):
                t = int(np.argmin(np.abs(result.thresholds - threshold)))
                curve = result.precision[t, :, k]
                axes.plot(
                    result.recalls,
                    curve,
                    color=_COLOURS[style],
                    linestyle=_LINES[style],
                    label=f"IoU {threshold:g}: AP {result.ap[t, k]:.1f}",
                )
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
            axes.set_title(f"{result.classes[k][:40]} ({result.objects[k]} objects)", fontsize=9)
            axes.legend(frameon=False, fontsize=8)
        return _uri(figure), len(order)
