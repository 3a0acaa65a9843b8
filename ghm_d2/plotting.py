"""Figures as files: PNG to look at, SVG to print, and the same data give the same files."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ghm_d2.files import whole_file

__all__ = ["save_figure"]


def save_figure(figure: Figure, stem: Path, dpi: int) -> list[Path]:
    """Write ``<stem>.png`` and ``<stem>.svg``; returns both.

    Args:
        figure: what to save.
        stem: path without its extension; its folder exists.
        dpi: pixels per inch of the PNG.

    Raises:
        UserError: a file cannot be written.
    """
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    # Without a date, and with ids that are not drawn by chance, an SVG tells the data alone.
    with rc_context({"svg.hashsalt": "ghm_d2"}):
        for file in files:
            kind = file.suffix[1:]
            with whole_file(file) as stream:
                date = {"Date": None} if kind == "svg" else {}
                figure.savefig(stream, format=kind, dpi=dpi, metadata=date)
    return files
