"""The page's charts, each as a data URI of an SVG."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ghm_d2.errors import shown

from .evaluation import Evaluation

# Okabe and Ito's colours, which colour-blind readers tell apart; lines and markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_AP = ("AP", "AP50", "AP75")
_SHARES = {"easy": "g < 1/3", "medium": "g < 2/3", "hard": "above"}
_SIZE = (4.3, 3.2)  # of a chart, in inches
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # a "$" in the name of a class begins no formula
    "svg.hashsalt": "ghm_d2",  # without it, the same data would give a different page each time
}

Rows = Mapping[int, Mapping[str, Any]]


def _uri(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _chart() -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _iterations(axes: Any) -> None:
    """All curves begin at 0, to be compared by eye, and are labelled at round numbers."""
    axes.set_xlabel("iteration")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


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
        "Losses on the test data": [n for n in names if _is_validation_loss(n)],
        "Plain losses, not harmonised (logarithmic)": [n for n in names if "/plain_loss" in n],
        "Box AP on the test data": [n for n in names if "/" in n and n.rpartition("/")[2] in _AP],
        "Learning rate": [n for n in names if n == "lr"],
    }
    found = []
    for title, drawn in charts.items():
        series = {name: _points(metrics, name) for name in drawn}
        series = {name: points for name, points in series.items() if points}
        if series:
            found.append((title, _curve_chart(series, logarithmic="plain" in title.lower())))
    return found


def _is_validation_loss(name: str) -> bool:
    return "validation/" in name and "/plain_loss" not in name


def _points(rows: Rows, name: str) -> list[tuple[int, float]]:
    return [(i, row[name]) for i, row in rows.items() if name in row and np.isfinite(row[name])]


def _curve_chart(series: Mapping[str, list[tuple[int, float]]], logarithmic: bool) -> str:
    with matplotlib.rc_context(_STYLE):
        figure, axes = _chart()
        for k, (name, points) in enumerate(series.items()):
            axes.plot(
                *zip(*points, strict=True),
                label=shown(name, 60),
                color=_COLOURS[k % len(_COLOURS)],
                linestyle=_LINES[k % len(_LINES)],
                marker=_MARKERS[k % len(_MARKERS)] if len(points) < 40 else "",
                markersize=4,
            )
        _iterations(axes)
        if logarithmic and all(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
            # Matplotlib's own labels are formulas, which stay unparsed here. The minor ones help
            # where the values span less than a power of ten.
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(
                FuncFormatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
            )
        else:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _uri(figure)


def draw_gradients(rows: Rows) -> list[tuple[str, str]]:
    """How the gradient norms of one loss change: counts, share of the gradient, easy and hard.

    Args:
        rows: what gradient_statistics.jsonl has of the loss, by iteration; at least one.

    Returns:
        (title, data URI) of three charts.
    """
    calls = [row["calls"] for row in rows.values()]
    counts, shares = (
        np.array([np.sum([c[key] for c in row], axis=0) for row in calls]).T
        for key in ("counts", "gradient_share")
    )
    with matplotlib.rc_context(_STYLE):
        numbers = _heat_map(list(rows), np.log10(1 + counts), "log10(1 + number)")
        return [
            ("number of examples", numbers),
            ("share of the gradient", _heat_map(list(rows), 100 * shares, "%")),
            ("share of easy, medium and hard examples", _shares(rows)),
        ]


def _heat_map(iterations: Sequence[int], values: np.ndarray, label: str) -> str:
    """Regions from bottom to top, one column for each observed iteration."""
    figure, axes = _chart()
    axes.grid(False)
    columns = np.arange(len(iterations) + 1)
    regions = np.linspace(0, 1, len(values) + 1)
    # "cividis" is made for colour-blind readers; as vectors, a long training would be megabytes.
    mesh = axes.pcolormesh(columns, regions, values, cmap="cividis", rasterized=True)
    figure.colorbar(mesh, ax=axes, label=label)
    step = -(-len(iterations) // 6)
    labelled = range(0, len(iterations), step)
    axes.set_xticks([k + 0.5 for k in labelled], [str(iterations[k]) for k in labelled])
    axes.set(xlabel="iteration", ylabel="gradient norm g", ylim=(0, 1))
    return _uri(figure)


def _shares(rows: Rows) -> str:
    figure, axes = _chart()
    for k, (share, limits) in enumerate(_SHARES.items()):
        if points := _points(rows, f"gradient_share_{share}"):
            x, y = zip(*points, strict=True)
            style = {"color": _COLOURS[k], "marker": _MARKERS[k], "linestyle": _LINES[k]}
            axes.plot(x, 100 * np.array(y), label=f"{share}: {limits}", markersize=4, **style)
    axes.set(ylabel="% of the gradient", ylim=(0, 100))
    _iterations(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return _uri(figure)


def draw_precision(result: Evaluation, most: int = 12) -> list[tuple[str, str]]:
    """Precision against recall of the classes with the most objects, at IoU 0.5, 0.75 and 0.9.

    Args:
        result: an evaluation.
        most: number of charts; classes without objects have none.

    Returns:
        (title, data URI) of each class.
    """
    order = [k for k in np.argsort(-result.objects, kind="stable") if result.objects[k]][:most]
    charts = []
    with matplotlib.rc_context(_STYLE):
        for k in order:
            figure, axes = _chart()
            for style, threshold in enumerate((0.5, 0.75, 0.9)):
                t = int(np.argmin(np.abs(result.thresholds - threshold)))
                axes.plot(
                    result.recalls,
                    result.precision[t, :, k],
                    color=_COLOURS[style],
                    linestyle=_LINES[style],
                    label=f"IoU {threshold:g}: AP {result.ap[t, k]:.1f}",
                )
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
            axes.legend(frameon=False, fontsize=8)
            name = shown(result.classes[k], 60)
            charts.append((f"{name} ({result.objects[k]} objects)", _uri(figure)))
    return charts


def draw_confusion(result: Evaluation, most: int = 20) -> str:
    """The confusion matrix, each row in per cent of its objects; the data URI.

    Args:
        result: an evaluation.
        most: classes with a row of their own, those with the most objects; the others share one.
    """
    order = np.argsort(-result.objects, kind="stable")
    own, others, none = order[:most], order[most:], [len(result.classes)]
    groups = [[k] for k in own] + ([list(others)] if len(others) else []) + [none]
    table = np.array([[result.confusion[np.ix_(a, b)].sum() for b in groups] for a in groups])
    names = [shown(result.classes[k], 24) for k in own]
    names += [f"{len(others)} others"] if len(others) else []
    shares = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    side = 2.2 + 0.42 * len(groups)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        # The last row has no objects that its detections could be a share of.
        mesh = axes.imshow(np.ma.array(shares, mask=_last_row(table)), cmap="cividis", vmax=100)
        for (y, x), number in np.ndenumerate(table):
            if number:
                dark = y < len(table) - 1 and shares[y, x] < 50
                axes.text(x, y, f"{number}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
        places = range(len(groups))
        axes.set_xticks(places, [*names, "missed"], rotation=45, ha="right")
        axes.set_yticks(places, [*names, "no object"])
        axes.set(xlabel="detected as", ylabel="object")
        figure.colorbar(mesh, ax=axes, label="% of the objects", shrink=0.8)
        return _uri(figure)


def _last_row(table: np.ndarray) -> np.ndarray:
    mask = np.zeros(table.shape, dtype=bool)
    mask[-1] = True
    return mask
