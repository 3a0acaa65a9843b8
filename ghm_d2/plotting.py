"""Figures as files: PNG to look at, SVG to print, and the same data give the same files."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

__all__ = ["save_figure"]


def save_figure(figure: Figure, stem: Path, dpi: int) -> list[Path]:
    """Write ``<stem>.png`` and ``<stem>.svg``; returns both.

    Args:
        figure: what to save.
        stem: path without its extension; its folder exists.
        dpi: pixels per inch of the PNG.
    """
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    # Without a date, and with ids that are not drawn by chance, an SVG tells the data alone.
    with rc_context({"svg.hashsalt": "ghm_d2"}):
        for file in files:
            figure.savefig(file, dpi=dpi, metadata={"Date": None} if file.suffix == ".svg" else {})
    return files
