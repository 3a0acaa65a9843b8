"""The table as a picture: every seed, the means, and the published values beside them."""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ghm_d2.plotting import save_figure

from .grid import SPEED

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers differ as well.
_SEED, _MEAN, _PUBLISHED, _REFERENCE = "#56B4E9", "#0072B2", "#D55E00", "#999999"


def draw_summary(summary: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; returns the files.

    Args:
        summary: what :func:`~ghm_d2.ablation.report.summarize` returns.
        stem: path without its extension.
    """
    rows, first = summary["rows"], summary["columns"][0]
    published = [c for c in (first, SPEED) if any(c in row["published"] for row in rows)]
    tuned = summary.get("tuning")
    panels = 2 + len(published) + bool(tuned)
    figure = Figure(figsize=(3.4 * panels + 1.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    _measured(axes[0], summary, first)
    speeds = [row[SPEED]["mean"] for row in rows]
    _points(axes[1], speeds, _MEAN, "D", "s/iteration, measured")
    names = {SPEED: "s/iteration"}
    if tuned:
        _tries(axes[-1], tuned)
    for axis, column in zip(axes[2:], published, strict=False):
        values = [row["published"].get(column) for row in rows]
        label = f"{names.get(column, column)}, published"
        if summary["published_on"]:
            label += "\n" + textwrap.fill(f"({summary['published_on']})", width=36)
        _points(axis, values, _PUBLISHED, "s", label)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, and all of them
    for axis in axes:
        axis.grid(True, axis="x", alpha=0.3)
        axis.margins(x=0.15)
        if not axis.has_data():  # a scale around 0 would pass for one
            axis.set_xticks([])
    figure.suptitle(summary["title"], fontsize="medium")
    if any(axis.get_legend_handles_labels()[0] for axis in axes):
        figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return save_figure(figure, stem, dpi=150)


def _measured(axis: Axes, summary: Mapping[str, Any], column: str) -> None:
    for mean, ends in _references(summary, column):
        axis.plot([mean, mean], ends, "--", color=_REFERENCE, linewidth=1, zorder=0)
    seeds: list[tuple[float, int]] = []
    means: list[tuple[float, int, float]] = []
    for y, row in enumerate(summary["rows"]):
        figure = row["figures"][column]
        seeds += [(value, y) for value in figure["by_seed"].values()]
        if figure["mean"] is not None:
            means.append((figure["mean"], y, figure["deviation"] or 0.0))
    if means:
        x, y, deviation = zip(*means, strict=True)
        axis.errorbar(
            x, y, xerr=deviation, fmt="o", color=_MEAN, capsize=4, label="mean ± deviation"
        )
    if seeds:
        x, y = zip(*seeds, strict=True)
        axis.plot(x, y, "|", color=_SEED, markersize=14, markeredgewidth=2, label="seeds")
    axis.set_xlabel(f"{column}, measured")


def _references(
    summary: Mapping[str, Any], column: str
) -> Iterator[tuple[float, tuple[float, float]]]:
    """The mean of each row that others are compared with, and where a line for it ends."""
    rows = {
        row["name"]: (y, row["figures"][column]["mean"]) for y, row in enumerate(summary["rows"])
    }
    for name in dict.fromkeys(item["reference"] for item in summary["comparisons"]):
        compared = [item["row"] for item in summary["comparisons"] if item["reference"] == name]
        places = [rows[row][0] for row in (name, *compared)]
        if (mean := rows[name][1]) is not None:
            yield mean, (min(places) - 0.4, max(places) + 0.4)


def _tries(axis: Axes, record: Mapping[str, Any]) -> None:
    """Every try on the images held out: how much a row depends on the values that it is given."""
    scores = [[one["score"] for one in row["tries"]] for row in record["rows"].values()]
    for marker, label, count in (("x", "tries", None), ("D", "as configured", 1)):
        known = [(s, y) for y, row in enumerate(scores) for s in row[:count] if s is not None]
        if known:
            x, y = zip(*known, strict=True)
            color = _MEAN if count else _SEED
            axis.plot(x, y, marker, color=color, markerfacecolor="none", label=label)
    axis.set_xlabel(f"{record['column']} of each try,\non held-out training images")


def _points(axis: Axes, values: list[float | None], color: str, marker: str, label: str) -> None:
    known = [(value, y) for y, value in enumerate(values) if value is not None]
    if known:
        x, y = zip(*known, strict=True)
        axis.plot(x, y, marker, color=color, markerfacecolor="white", markersize=8)
    axis.set_xlabel(label)
