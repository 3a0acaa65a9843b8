"""Two pictures of a data set: images with their boxes, and histograms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .look_statistics import DataStatistics
from .pictures import UnreadableError, draw_boxes, read_image

__all__ = ["draw_grid", "draw_histograms", "sheet", "spread"]

_COLUMNS, _TILE, _GAP, _CAPTION = 4, 400, 8, 24
# Okabe and Ito's, which colour-blind readers tell apart.
_BAR, _EDGE, _LINE = "#56B4E9", "#0072B2", "#D55E00"
_MOST_BARS = 24


def spread(records: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """At most `number` records spread evenly over those with objects, or over all of them."""
    having = [record for record in records if record.get("annotations")] or list(records)
    number = min(number, len(having))
    return [having[i * len(having) // number] for i in range(number)]


def draw_grid(records: Sequence[dict[str, Any]], metadata: Metadata, file: Path) -> list[str]:
    """Draw images with boxes and class names, four in a row.

    Args:
        records: Detectron2's dictionaries of the images to draw.
        metadata: names the classes.
        file: PNG to write.

    Returns:
        One sentence for each image that could not be read; it is not drawn.
    """
    tiles, unreadable = [], []
    for record in tqdm(records, desc="drawing images", unit="image", delay=2):
        try:
            pixels = read_image(Path(record["file_name"]))
        except UnreadableError as error:
            unreadable.append(str(error))
            continue
        boxes = [
            (
                BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
                a["category_id"],
                " (crowd)" if a.get("iscrowd", 0) else "",
            )
            for a in record.get("annotations", ())
        ]
        tiles.append((Path(record["file_name"]).name, draw_boxes(pixels, boxes, metadata)))
    if tiles:
        sheet(tiles).save(file)
    return unreadable


def sheet(tiles: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Pictures under their captions, four in a row; each (H, W, 3) uint8, RGB, of a tile's size."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)  # matplotlib ships it
    rows = [tiles[i : i + _COLUMNS] for i in range(0, len(tiles), _COLUMNS)]
    heights = [max(tile.shape[0] for _, tile in row) + _CAPTION + _GAP for row in rows]
    width = min(len(tiles), _COLUMNS) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, (name, tile) in enumerate(row):
            left = _GAP + column * (_TILE + _GAP)
            draw.text((left, top + 4), name[-50:], fill="black", font=font)
            sheet.paste(Image.fromarray(tile), (left, top + _CAPTION))
        top += height
    return sheet


def draw_histograms(data: DataStatistics, file: Path) -> None:
    """Draw the classes, the boxes of an image, and the sizes and shapes of the boxes.

    Args:
        data: with at least one box.
        file: PNG to write.
    """
    bars = min(len(data.classes), _MOST_BARS + 1)
    figure = Figure(figsize=(12, 6 + 0.16 * bars), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    name = data.name.replace("$", r"\$")
    figure.suptitle(f"{name}: {len(data.images)} images, {len(data.sides)} boxes")
    (classes, per_image), (sizes, ratios) = figure.subplots(2, 2)
    _draw_classes(classes, data)
    _draw_per_image(per_image, data)
    _draw_logarithmic(sizes, data.sizes, "square root of the box area, pixels")
    _finish(sizes, "box sizes; dashed: COCO's limits of small and large")
    for limit in (32, 96):
        sizes.axvline(limit, color=_LINE, linestyle="--")
    _draw_logarithmic(ratios, data.ratios, "height / width")
    _finish(ratios, "aspect ratios; dashed: square")
    ratios.axvline(1, color=_LINE, linestyle="--")
    figure.savefig(file, dpi=110)


def _draw_classes(axes: Axes, data: DataStatistics) -> None:
    counts = data.class_counts
    order = list(np.argsort(-counts, kind="stable"))
    title = "boxes of each class"
    if len(order) > _MOST_BARS:
        half = _MOST_BARS // 2
        title += f" (the {half} most frequent and the {half} rarest of {len(order)})"
        order = order[:half] + order[-half:]
    names = [data.classes[k][-30:].replace("$", r"\$") for k in order]
    bars = axes.barh(range(len(order)), counts[order], color=_BAR, edgecolor=_EDGE)
    axes.bar_label(bars, fmt="%d", padding=3, fontsize=8)
    axes.set_yticks(range(len(order)), names, fontsize=8 if len(order) > 12 else None)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_title(title, fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_per_image(axes: Axes, data: DataStatistics) -> None:
    most = int(data.per_image.max())
    step = -(-(most + 1) // 40)
    edges = np.arange(0, most + step + 1, step) - 0.5
    axes.hist(data.per_image, bins=edges, color=_BAR, edgecolor=_EDGE)
    axes.axvline(data.per_image.mean(), color=_LINE, linestyle="--")
    axes.set(xlabel="boxes", ylabel="images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, f"boxes in an image; dashed: the mean, {data.per_image.mean():.1f}")


def _draw_logarithmic(axes: Axes, values: np.ndarray, label: str) -> None:
    low, high = values.min() / 1.1, values.max() * 1.1
    axes.hist(values, bins=np.geomspace(low, high, 41), color=_BAR, edgecolor=_EDGE)
    axes.set(xscale="log", xlabel=label, ylabel="boxes")
    powers = 2.0 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
    axes.set_xticks([p for p in powers if low <= p <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
