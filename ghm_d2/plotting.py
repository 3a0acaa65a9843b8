"""Figures as files: PNG to look at, SVG to print; the same data give the same files."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ghm_d2.files import whole_file


def save_figure(figure: Figure, stem: Path, dpi: int) -> list[Path]:
    """Writes `<stem>.png` and `<stem>.svg`; returns both.

    Args:
        figure: what to save.
        stem: path without its extension; its folder exists.
        dpi: pixels per inch of the PNG.

    Raises:
        UserError: a file cannot be written.
    """
    files = []
    # A date or random ids would make each SVG of the same data another file.
    with rc_context({"svg.hashsalt": "ghm_d2"}):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            files.append(stem.with_name(f"{stem.name}.{kind}"))
            with whole_file(files[-1]) as stream:
                figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata)
    return files
