"""Two pictures of a training: predictions beside the ground truth, and the curves."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    Metadata,
    MetadataCatalog,
    detection_utils,
)
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_boxes", "draw_predictions", "plot_training", "read_metrics"]

logger = logging.getLogger(__name__)

_TILE = 400  # pixels of the longer side of one drawn image
_GAP = 8
_SCORE = 0.5  # predictions below are not drawn
_MOST_BOXES = 30  # of one image, the best ones
# One colour for each class in both halves, told apart also by those who cannot tell red from green.
_COLOURS = ("#e69f00", "#56b4e9", "#f0e442", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#ffffff")
_METRICS = ("AP", "AP50", "AP75")  # the ends of the names that evaluators give


def draw_predictions(cfg: CfgNode, model: torch.nn.Module, file: Path, images: int = 8) -> None:
    """Draw ground truth and predictions, side by side, of images spread over the test data.

    Args:
        cfg: `DATASETS.TEST` (`TRAIN` where it is empty) names the data.
        model: a detector that returns "instances"; its training mode is restored.
        file: PNG to write; its folder is made.
        images: how many at most.
    """
    name = (tuple(cfg.DATASETS.TEST) or tuple(cfg.DATASETS.TRAIN))[0]
    metadata = MetadataCatalog.get(name)
    records = [r for r in DatasetCatalog.get(name) if r.get("annotations")]
    picked = [records[i * len(records) // images] for i in range(images)]
    picked = list({record["file_name"]: record for record in picked}.values())
    mapper = DatasetMapper(cfg, is_train=False)
    rows = []
    was_training = model.training
    model.eval()
    try:
        for record in picked:
            with torch.no_grad():
                found = model([mapper(dict(record))])[0]["instances"].to("cpu")
            found = found[found.scores >= _SCORE][:_MOST_BOXES]
            pixels = detection_utils.read_image(record["file_name"], "RGB")
            truth = [
                (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], "")
                for a in record["annotations"]
            ]
            shown = [
                (box.tolist(), category, f" {score:.0%}")
                for box, category, score in zip(
                    found.pred_boxes, found.pred_classes.tolist(), found.scores, strict=True
                )
            ]
            both = (draw_boxes(pixels, boxes, metadata) for boxes in (truth, shown))
            rows.append((Path(record["file_name"]).name, *both))
    finally:
        model.train(was_training)
    file.parent.mkdir(parents=True, exist_ok=True)
    _contact_sheet(rows).save(file)


def draw_boxes(
    pixels: np.ndarray, items: list[tuple[list[float], int, str]], metadata: Metadata
) -> np.ndarray:
    """Draw (XYXY box, class, text after its name) on the image, enlarged to the size of a tile.

    It is enlarged first, so that lines and letters keep their size on small images.
    """
    scale = _TILE / max(pixels.shape[:2])
    size = [round(side * scale) for side in pixels.shape[1::-1]]
    drawing = Visualizer(np.asarray(Image.fromarray(pixels).resize(size)), font_size_scale=0.9)
    names = metadata.get("thing_classes")
    drawing.overlay_instances(
        boxes=np.array([box for box, _, _ in items], dtype=float).reshape(-1, 4) * scale,
        # Matplotlib draws them, to which "$" begins a formula.
        labels=[
            ((names[k] if names else str(k)) + text).replace("$", r"\$") for _, k, text in items
        ],
        assigned_colors=[_COLOURS[k % len(_COLOURS)] for _, k, _ in items],
    )
    return drawing.output.get_image()


def _contact_sheet(rows: list[tuple[str, np.ndarray, np.ndarray]]) -> Image.Image:
    """Pairs (ground truth, predictions), two pairs in a row, each under its caption."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)  # matplotlib ships it
    caption = 26
    width = 2 * _TILE + 3 * _GAP
    height = max(truth.shape[0] for _, truth, _ in rows) + caption + _GAP
    columns = min(2, len(rows))
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, truth, shown) in enumerate(rows):
        left, top = number % columns * width, number // columns * height
        titles = (f"{name}: ground truth", f"predictions, score >= {_SCORE}")
        for half, (title, pixels) in enumerate(zip(titles, (truth, shown), strict=True)):
            x = left + _GAP + half * (_TILE + _GAP)
            draw.text((x, top + 4), title, fill="black", font=font)
            sheet.paste(Image.fromarray(pixels), (x, top + caption))
    return sheet


def read_metrics(file: Path) -> dict[int, dict[str, Any]]:
    """Read metrics.json into {iteration: its values}.

    Detectron2 appends to the file, so a second run in the same folder starts at a lower iteration
    again: what the first run wrote from there on is left out.
    """
    metrics: dict[int, dict[str, Any]] = {}
    previous = -1
    for line in file.read_text().splitlines():
        row = json.loads(line)
        iteration = row["iteration"]
        if iteration < previous:
            metrics = {i: values for i, values in metrics.items() if i < iteration}
        metrics.setdefault(iteration, {}).update(row)
        previous = iteration
    return metrics


def plot_training(metrics_file: Path, file: Path) -> None:
    """Plot the losses and the AP of metrics.json against the iteration.

    Args:
        metrics_file: Detectron2's metrics.json.
        file: PNG to write; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = read_metrics(metrics_file)
    names = sorted({name for row in metrics.values() for name in row})
    losses = [n for n in names if n.startswith("loss") or n == "total_loss"]
    plain = [n for n in names if "/plain_loss" in n]
    results = [n for n in names if n.rpartition("/")[2] in _METRICS and "/" in n]
    panels = (("loss", losses), ("mean loss, not harmonised", plain), ("AP", results))
    panels = [p for p in panels if p[1]]

    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (label, shown) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for name in shown:
            points = [(i, row[name]) for i, row in metrics.items() if name in row]
            marker = "." if len(points) < 40 else ""
            axes.plot(*zip(*points, strict=True), label=name, marker=marker)
        axes.set_xlabel("iteration")
        axes.set_ylabel(label)
        if shown is plain:
            axes.set_yscale("log")  # cross entropy over all anchors, and box errors of positives
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
