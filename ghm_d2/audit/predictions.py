"""Detections from files in COCO's results format, by image."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghm_d2.data.fields import number, numbers
from ghm_d2.data.tables import Ids
from ghm_d2.errors import UserError, shown
from ghm_d2.files import read_json

logger = logging.getLogger(__name__)

# (N, 4) boxes as x, y, width, height, (N,) category ids and (N,) scores, float64
Detections = tuple[np.ndarray, np.ndarray, np.ndarray]


def read_predictions(
    files: Sequence[str | Path], content: Mapping[str, Any], *, complete: bool = False
) -> dict[int, Detections]:
    """Reads what a detector has found in the images of a data set.

    Detections in other images, and those without an area, are left out with a warning that counts
    them.

    Args:
        files: each a list of objects with `image_id`, `category_id`, `bbox` (x, y, width, height in
            pixels) and `score` in [0, 1], as `ghm-d2 predict` and COCO's evaluation write them.
        content: the checked content of the annotation file.
        complete: whether the detector has seen every image. Otherwise those without a detection
            are not judged, with a warning: a file does not tell them from those that were not seen.

    Returns:
        The detections of every image that is judged, by its id.

    Raises:
        UserError: a file cannot be read or has another format, or no detection is in these images.
    """
    images, categories = (Ids(content[name]) for name in ("images", "categories"))
    found: dict[int, list] = {row["id"]: [] for row in content["images"]}
    left_out: Counter[str] = Counter()
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise UserError(f"{file} is not in COCO's results format, a list of detections.")
        for place, row in enumerate(rows):
            image, *values = _parse(row, categories, f"{file}: detection {place}")
            image_id = _find(images, image)
            if image_id is None:
                left_out["in images that are not in the data set"] += 1
            elif min(values[0][2:]) <= 0:
                left_out["without width and height"] += 1
            else:
                found[image_id].append(values)
    for what, times in left_out.items():
        logger.warning("%d detections %s are left out", times, what)
    if not any(found.values()):
        names = ", ".join(map(str, files))
        raise UserError(f"{names}: nothing was detected in the images of the data set.")
    seen = {image: rows for image, rows in found.items() if rows or complete}
    if len(seen) < len(found):
        logger.warning(
            "%d of %d images have no detection and are not judged: the detector may not have seen "
            "them",
            len(found) - len(seen),
            len(found),
        )
    return {image: _arrays(rows) for image, rows in seen.items()}


def _parse(row: Any, categories: Ids, where: str) -> tuple[Any, list[float], int, float]:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object.")
    for name in ("image_id", "category_id", "bbox", "score"):
        if name not in row:
            raise UserError(f'{where} has no "{name}", which every detection must have.')
    box, score = numbers(row["bbox"], 4), number(row["score"])
    if box is None:
        text = shown(repr(row["bbox"]), 80)
        raise UserError(f"{where} has the bbox {text} instead of four finite numbers.")
    if score is None or not 0 <= score <= 1:
        text = shown(repr(row["score"]), 80)
        raise UserError(f"{where} has the score {text} instead of a probability in [0, 1].")
    category = _find(categories, row["category_id"])
    if category is None:
        text = shown(repr(row["category_id"]), 80)
        raise UserError(f"{where} has the category_id {text}, which is not in the data set.")
    return row["image_id"], box, category, score


def _find(ids: Ids, value: Any) -> int | None:
    return ids.find(value) if isinstance(value, int | float | str) else None


def _arrays(rows: list) -> Detections:
    boxes, classes, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        np.array(boxes, float).reshape(-1, 4),
        np.array(classes, int),
        np.array(scores, float),
    )
