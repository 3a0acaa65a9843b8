"""Two pictures of a training: predictions beside the ground truth, and the curves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    detection_utils,
)
from detectron2.structures import BoxMode
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from ghm_d2.data.pictures import TILE, draw_boxes
from ghm_d2.errors import shown
from ghm_d2.files import whole_file

_GAP = 8
_SCORE = 0.5  # threshold where no evaluation has found a better one
_MOST_BOXES = 30  # of one image, the best ones
_METRICS = ("AP", "AP50", "AP75")  # the ends of the names that evaluators give


def draw_predictions(
    name: str,
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    model: torch.nn.Module,
    file: Path,
    images: int = 8,
    threshold: float | None = None,
) -> None:
    """Draw ground truth and predictions, side by side, of images spread over a data set.

    Args:
        name: of the data set.
        mapper: turns one of its records into the model's input.
        model: a detector that returns "instances"; its training mode is restored.
        file: PNG to write; its folder is made.
        images: how many at most.
        threshold: predictions with lower scores are not drawn; None: 0.5.

    Raises:
        UserError: the file cannot be written.
    """
    threshold = _SCORE if threshold is None else threshold
    metadata = MetadataCatalog.get(name)
    records = [r for r in DatasetCatalog.get(name) if r.get("annotations")]
    picked = [records[i * len(records) // images] for i in range(images)]
    picked = list({record["file_name"]: record for record in picked}.values())
    rows = []
    was_training = model.training
    model.eval()
    try:
        for record in picked:
            with torch.no_grad():
                found = model([mapper(dict(record))])[0]["instances"].to("cpu")
            best = float(found.scores.max()) if len(found) else None
            found = found[found.scores >= threshold][:_MOST_BOXES]
            pixels = detection_utils.read_image(record["file_name"], "RGB")
            truth = [
                (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], "")
                for a in record["annotations"]
            ]
            detected = [
                (box.tolist(), category, f" {score:.0%}")
                for box, category, score in zip(
                    found.pred_boxes, found.pred_classes.tolist(), found.scores, strict=True
                )
            ]
            both = (draw_boxes(pixels, boxes, metadata) for boxes in (truth, detected))
            title = f"predictions, score >= {threshold:.2f}"
            if not len(found):
                title = f"best score {best:.2f}" if best is not None else "no prediction"
            rows.append((Path(record["file_name"]).name, title, *both))
    finally:
        model.train(was_training)
    with whole_file(file) as stream:
        _contact_sheet(rows).save(stream, "PNG")


def _contact_sheet(rows: list[tuple[str, str, np.ndarray, np.ndarray]]) -> Image.Image:
    """Pairs (ground truth, predictions), two pairs in a row, each under its caption."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)  # matplotlib ships it
    caption = 26
    width = 2 * TILE + 3 * _GAP
    height = max(truth.shape[0] for _, _, truth, _ in rows) + caption + _GAP
    columns = min(2, len(rows))
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, title, truth, detected) in enumerate(rows):
        left, top = number % columns * width, number // columns * height
        titled = ((f"{shown(name, 80)}: ground truth", truth), (title, detected))
        for half, (text, pixels) in enumerate(titled):
            x = left + _GAP + half * (TILE + _GAP)
            draw.text((x, top + 4), text, fill="black", font=font)
            sheet.paste(Image.fromarray(pixels), (x, top + caption))
    return sheet


def plot_training(metrics: Mapping[int, Mapping[str, float]], file: Path) -> None:
    """Plot the losses and the AP against the iteration.

    Args:
        metrics: values by iteration and name.
        file: PNG to write; its folder is made.

    Raises:
        UserError: the file cannot be written.
    """
    names = sorted({name for row in metrics.values() for name in row})
    losses = [n for n in names if n.startswith("loss") or n.rpartition("/")[2] == "total_loss"]
    plain = [n for n in names if "/plain_loss" in n]
    results = [n for n in names if n.rpartition("/")[2] in _METRICS and "/" in n]
    panels = (("loss", losses), ("mean loss, not harmonised", plain), ("AP", results))
    panels = [p for p in panels if p[1]]

    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (label, drawn) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for name in drawn:
            points = [(i, row[name]) for i, row in metrics.items() if name in row]
            marker = "." if len(points) < 40 else ""
            axes.plot(*zip(*points, strict=True), label=shown(name), marker=marker)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.set_ylabel(label)
        if drawn is plain:
            axes.set_yscale("log")  # cross entropy over all anchors, and box errors of positives
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(file) as stream:
        figure.savefig(stream, format="png", dpi=110)
