"""Pictures of data sets: images with their boxes, augmented or not, and histograms."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper, Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BoxMode
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ghm_d2.errors import counted

from .look_statistics import DataStatistics
from .pictures import UnreadableError, draw_boxes, read_image

_COLUMNS, _TILE, _GAP, _CAPTION = 4, 400, 8, 24
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BARS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
_EDGE, _LINE = "#0072B2", "#D55E00"
_MOST_BARS = 24
MOST_COMPARED = len(_BARS)  # data sets in one picture


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
    return _draw_tiles(records, file, lambda record: _as_labelled(record, metadata))


def draw_augmented(
    records: Sequence[dict[str, Any]],
    mapper: DatasetMapper,
    metadata: Metadata,
    file: Path,
) -> list[str]:
    """Draw what a mapper makes of the images, each twice; otherwise as :func:`draw_grid`.

    Args:
        records, metadata, file: as for :func:`draw_grid`.
        mapper: the training mapper; it draws from the global generators of Python, NumPy and
            PyTorch.
    """

    def tile(record: dict[str, Any]) -> tuple[str, np.ndarray]:
        sample = mapper(copy.deepcopy(record))
        pixels = convert_image_to_rgb(sample["image"].permute(1, 2, 0), mapper.image_format)
        found = sample["instances"]
        boxes = found.gt_boxes.tensor.tolist()
        items = [(box, k, "") for box, k in zip(boxes, found.gt_classes.tolist(), strict=True)]
        height, width = pixels.shape[:2]
        name = Path(record["file_name"]).name
        return f"{name[-34:]}, {width} x {height}", draw_boxes(pixels, items, metadata)

    twice = [record for record in records for _ in range(2)]
    return _draw_tiles(twice, file, tile)


def _as_labelled(record: dict[str, Any], metadata: Metadata) -> tuple[str, np.ndarray]:
    pixels = read_image(Path(record["file_name"]))
    boxes = [
        (
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
            a["category_id"],
            " (crowd)" if a.get("iscrowd", 0) else "",
        )
        for a in record.get("annotations", ())
    ]
    return Path(record["file_name"]).name, draw_boxes(pixels, boxes, metadata)


def _draw_tiles(
    records: Sequence[dict[str, Any]],
    file: Path,
    draw: Callable[[dict[str, Any]], tuple[str, np.ndarray]],
) -> list[str]:
    tiles, unreadable = [], []
    for record in tqdm(records, desc="drawing images", unit="image", delay=2):
        try:
            tiles.append(draw(record))
        except UnreadableError as error:
            unreadable.append(str(error))
    if tiles:
        sheet(tiles).save(file)
    return unreadable


def sheet(tiles: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Pictures under their captions, four in a row.

    Args:
        tiles: captions and (H, W, 3) uint8 RGB pictures, H and W at most 400.
    """
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


def draw_histograms(sets: Sequence[DataStatistics], file: Path) -> None:
    """Draw the classes, the boxes of an image, and the sizes and shapes of the boxes.

    Several data sets, such as training and validation data, are compared by shares; a single one
    is shown in numbers.

    Args:
        sets: at most `MOST_COMPARED`, each with at least one box, all with the same classes.
        file: PNG to write.
    """
    bars = min(len(sets[0].classes), _MOST_BARS + 1) * len(sets)
    figure = Figure(figsize=(12, 6 + 0.16 * bars), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    titles = [
        f"{_plain(d.name)}: {counted(len(d.images), 'image')}, {counted(len(d.sides), 'box')}"
        for d in sets
    ]
    handles = [Patch(facecolor=c, edgecolor=_EDGE) for c in _BARS[: len(sets)]]
    if len(sets) == 1:
        figure.suptitle(titles[0])
    else:
        figure.legend(handles, titles, loc="outside upper center", ncols=2, frameon=False)
    (classes, per_image), (sizes, ratios) = figure.subplots(2, 2)
    _draw_classes(classes, sets)
    _draw_per_image(per_image, sets)
    _draw_logarithmic(sizes, [d.sizes for d in sets], "square root of the box area, pixels")
    _finish(sizes, "box sizes; dashed: COCO's limits of small and large")
    for limit in (32, 96):
        sizes.axvline(limit, color=_LINE, linestyle="--")
    _draw_logarithmic(ratios, [d.ratios for d in sets], "height / width")
    _finish(ratios, "aspect ratios; dashed: square")
    ratios.axvline(1, color=_LINE, linestyle="--")
    figure.savefig(file, dpi=110)


def _plain(name: str) -> str:
    """A name with "$" escaped, which Matplotlib would take for the beginning of a formula."""
    return name[-30:].replace("$", r"\$")


def _draw_classes(axes: Axes, sets: Sequence[DataStatistics]) -> None:
    counts = [data.class_counts for data in sets]
    order = list(np.argsort(-counts[0], kind="stable"))
    title = "boxes of each class" if len(sets) == 1 else "boxes of each class, share of the data"
    if len(order) > _MOST_BARS:
        half = _MOST_BARS // 2
        title += f" (the {half} most frequent and the {half} rarest of {len(order)})"
        order = order[:half] + order[-half:]
    height = 0.8 / len(sets)
    for place, numbers in enumerate(counts):
        values = numbers[order] if len(sets) == 1 else numbers[order] / max(numbers.sum(), 1)
        where = np.arange(len(order)) + (place - (len(sets) - 1) / 2) * height
        bars = axes.barh(where, values, height, color=_BARS[place], edgecolor=_EDGE)
        labels = [f"{number:,}" for number in numbers[order]]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    names = [_plain(sets[0].classes[k]) for k in order]
    axes.set_yticks(range(len(order)), names, fontsize=8 if len(order) > 12 else None)
    axes.invert_yaxis()
    axes.margins(x=0.14, y=0.02)
    axes.set_title(title, fontsize="medium")
    _count_axis(axes.xaxis, shares=len(sets) > 1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_per_image(axes: Axes, sets: Sequence[DataStatistics]) -> None:
    most = max(int(data.per_image.max()) for data in sets)
    step = -(-(most + 1) // 40)
    edges = np.arange(0, most + step + 1, step) - 0.5
    _histogram(axes, [data.per_image for data in sets], edges, "images")
    means = [float(data.per_image.mean()) for data in sets]
    for mean in means:
        axes.axvline(mean, color=_LINE, linestyle="--")
    axes.set(xlabel="boxes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    words = " and ".join(f"{mean:.1f}" for mean in means)
    _finish(axes, f"boxes in an image; dashed: the mean, {words}")


def _histogram(axes: Axes, values: Sequence[np.ndarray], edges: np.ndarray, things: str) -> None:
    """Draws the numbers of one data set, or the shares of several on top of each other."""
    if len(values) == 1:
        axes.hist(values[0], bins=edges, color=_BARS[0], edgecolor=_EDGE)
    for place, some in enumerate(values if len(values) > 1 else ()):
        weights = np.full(len(some), 1 / len(some))
        kind = {"histtype": "stepfilled", "alpha": 0.5} if place == 0 else {"histtype": "step"}
        axes.hist(some, edges, weights=weights, color=_BARS[place], linewidth=1.8, **kind)
    axes.set_ylabel(things if len(values) == 1 else f"share of the {things}")
    _count_axis(axes.yaxis, shares=len(values) > 1)


def _count_axis(axis: Axis, *, shares: bool) -> None:
    axis.set_major_locator(MaxNLocator(nbins=6, integer=not shares))
    as_share = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
    axis.set_major_formatter(as_share if shares else StrMethodFormatter("{x:,.0f}"))


def _draw_logarithmic(axes: Axes, values: Sequence[np.ndarray], label: str) -> None:
    low, high = min(v.min() for v in values) / 1.1, max(v.max() for v in values) * 1.1
    axes.set(xscale="log", xlabel=label)
    _histogram(axes, values, np.geomspace(low, high, 41), "boxes")
    powers = 2.0 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
    powers = [p for p in powers if low <= p <= high]
    axes.set_xticks(powers[:: 1 + len(powers) // 10], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(_power))


def _power(value: float, _: int) -> str:
    return f"{value:.0f}" if value >= 1 else f"1/{1 / value:.0f}"


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
