"""A sheet of pictures: what is annotated, and what the detector believes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from tqdm import tqdm

from ghm_d2.data.corrupt import KINDS
from ghm_d2.data.look_pictures import sheet
from ghm_d2.data.pictures import UnreadableError, draw_boxes, read_image

from .suspects import Suspect

_GIVEN, _BELIEVED, _OTHERS = 0, 1, 7  # the colours of `draw_boxes`: orange, blue, white
_AROUND = 1.2  # margin on each side of the box, in sides of the box
_SMALLEST = 60  # least pixels of the image on each side of the middle


def draw_suspects(
    suspects: Sequence[Suspect],
    content: Mapping[str, Any],
    paths: Mapping[int, str],
    file: Path,
    each: int,
) -> list[str]:
    """Draw the most suspicious of each kind in their surroundings, four in a row.

    The suspicious annotation is orange. What the detector believes is blue, with its class and
    confidence. Other annotations are white.

    Args:
        suspects: the most suspicious of a kind first.
        content: the checked content of the annotation file.
        paths: the file of each image, by its id.
        file: PNG to write.
        each: the largest number of pictures of a kind.

    Returns:
        One sentence for each image that could not be read; it is not drawn.
    """
    names = {row["id"]: row["name"] for row in content["categories"]}
    boxes: dict[int, dict[Any, list[float]]] = {}
    for row in content.get("annotations", ()):
        boxes.setdefault(row["image_id"], {})[row["id"]] = row["bbox"]
    picked = [s for kind in KINDS for s in [s for s in suspects if s.kind == kind][:each]]
    tiles, unreadable = [], []
    for suspect in tqdm(picked, desc="drawing suspects", unit="picture", delay=2):
        path = Path(paths[suspect.image_id])
        try:
            pixels = read_image(path)
        except UnreadableError as error:
            unreadable.append(str(error))
            continue
        caption = f"{suspect.kind} {suspect.score:.2f}, {path.name}"
        tiles.append((caption, _tile(pixels, suspect, boxes.get(suspect.image_id, {}), names)))
    if tiles:
        sheet(tiles).save(file)
    return unreadable


def _tile(
    pixels: np.ndarray,
    suspect: Suspect,
    annotated: Mapping[Any, Sequence[float]],
    names: Mapping[int | None, str],
) -> np.ndarray:
    """(H, W, 3) uint8, RGB: the surroundings of what is suspicious."""
    given, believed = suspect.bbox, suspect.believed_bbox
    corners = np.array([_corners(box) for box in (given, believed) if box])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    middle = (low + high) / 2
    half = np.maximum((high - low) * (0.5 + _AROUND), _SMALLEST)
    size = np.array(pixels.shape[1::-1])
    start = np.clip(np.floor(middle - half), 0, size - 1).astype(int)
    end = np.clip(np.ceil(middle + half), start + 1, size).astype(int)
    crop = np.ascontiguousarray(pixels[start[1] : end[1], start[0] : end[0]])
    shift = np.tile(start, 2)

    def item(box: Sequence[float], colour: int, text: str) -> tuple[list[float], int, str]:
        return (_corners(box) - shift).tolist(), colour, text

    others = [box for ident, box in annotated.items() if ident != suspect.annotation_id]
    items = [item(box, _OTHERS, "") for box in others]
    labelled = names.get(suspect.category_id, "")
    if given:
        items.append(item(given, _GIVEN, "" if believed else labelled))
    if believed:
        text = f"{names[suspect.believed_category_id]} {suspect.confidence:.0%}"
        both = f"{labelled} \N{RIGHTWARDS ARROW} " if suspect.kind == "wrong class" else ""
        items.append(item(believed, _BELIEVED, both + text))
    return draw_boxes(crop, items, Metadata(thing_classes=[""] * (_OTHERS + 1)))


def _corners(box: Sequence[float]) -> np.ndarray:
    x, y, w, h = box
    return np.array([x, y, x + w, y + h])
