"""Draws what GHM does, from the numbers of a trained detector: the picture of README.md.

make quickstart
ghm-d2 figures --config-file output/config.yaml --output output/figures MODEL.WEIGHTS output
cp output/figures/{example_counts,gradient_contribution}.csv benchmarks/results/gradients_quickstart
python benchmarks/gradient_picture.py
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ghm_d2.plotting import save_figure

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "gradients_quickstart"
RANGES = 10  # bars of a panel; the 30 unit regions are too narrow to be seen in a README

# Okabe and Ito's colours, which colour-blind readers tell apart.
EXAMPLES, OBJECTS, SHARES = "#B8C4CC", "#D55E00", "#0072B2"


def draw(records: Path, stem: Path) -> list[Path]:
    """Writes `<stem>.png` and `<stem>.svg`; returns both.

    Args:
        records: folder with `example_counts.csv` and `gradient_contribution.csv`, as `ghm-d2
            figures` writes them.
        stem: path without its extension.
    """
    counts = _read(records / "example_counts.csv")
    shares = _read(records / "gradient_contribution.csv")
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    first, *others = figure.subplots(1, 4)
    _bars(first, counts["examples"], EXAMPLES, "all")
    _bars(first, counts["positives"], OBJECTS, "on objects")
    first.set(yscale="log", ylabel="examples", title="Examples")
    first.legend(frameon=False, fontsize="small")
    titles = {"CE": "Cross entropy", "focal": "Focal loss", "GHM-C": "GHM-C"}
    for axes, (name, title) in zip(others, titles.items(), strict=True):
        axes.set(title=title, ylim=(0, 100))
        easiest = _bars(axes, 100 * shares[name], SHARES)[0]
        axes.annotate(f"{easiest:.0f} % from the easiest", (0.5, 60), ha="center", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    others[0].set_ylabel("share of the gradient (%)")
    first.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "easy: already right           gradient norm of an example           hard: wrong"
    )
    return save_figure(figure, stem, dpi=150)


def _read(file: Path) -> np.ndarray:
    return np.genfromtxt(file, delimiter=",", names=True, deletechars="", encoding="utf-8")


def _bars(axes: Axes, values: np.ndarray, colour: str, label: str | None = None) -> np.ndarray:
    heights = values.reshape(RANGES, -1).sum(axis=1)
    centres = (np.arange(RANGES) + 0.5) / RANGES
    axes.bar(centres, heights, width=0.85 / RANGES, color=colour, label=label)
    axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
    return heights


if __name__ == "__main__":
    print(*draw(RECORDS, ROOT / "docs" / "figures" / "what_ghm_does"), sep="\n")
