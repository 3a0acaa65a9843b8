"""Reads an image, or draws boxes, masks and keypoints on it."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata, detection_utils
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from ghm_d2.errors import UserError, reason, shown

from .image_checks import is_deep

TILE = 400  # pixels of the longer side of one drawn image
# Of the classes, by index; readers who cannot tell red from green can tell them apart too.
_COLOURS = ("#e69f00", "#56b4e9", "#f0e442", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#ffffff")
_SEEN = 0.05  # Detectron2 draws keypoints with a higher score

Item = tuple[Sequence[float], int, str]  # XYXY box, class, text after its name


class UnreadableError(UserError):
    """An input that exists but is damaged, or is not an image or video at all."""


def read_image(file: Path) -> np.ndarray:
    """(H, W, 3) uint8, RGB, turned as its EXIF data says.

    Raises:
        UnreadableError: the file is not a readable image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(file) as image:
            mode = image.mode
        if not is_deep(mode):
            return detection_utils.read_image(str(file), "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{file} cannot be read as an image ({reason(error)}).") from error
    raise UnreadableError(
        f"{file} has Pillow's mode {mode}, in which values above 255 would be clipped: convert it "
        "to 8 bits, as for the training."
    )


def draw_boxes(pixels: np.ndarray, items: Sequence[Item], metadata: Metadata) -> np.ndarray:
    """Draw (XYXY box, class, text after its name) on the image, scaled to the size of a tile."""
    return draw(pixels, items, metadata, (TILE, TILE))


def draw(
    pixels: np.ndarray,
    items: Sequence[Item],
    metadata: Metadata,
    sides: tuple[int, int],
    masks: np.ndarray | None = None,
    keypoints: np.ndarray | None = None,
) -> np.ndarray:
    """Draw boxes with their names on the image, and masks and keypoints where there are some.

    The image is scaled first, so that lines and letters keep their size on small images, and large
    ones cost no more than others.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        items: XYXY boxes in pixels of the image, with their class and the text after its name.
        metadata: `thing_classes`, if they are known, and `keypoint_names` with
            `keypoint_connection_rules`, as Detectron2 has them.
        sides: the smallest and largest length allowed for the longer side, in pixels.
        masks: (N, H', W') bool, one for each item; they are scaled to the drawing.
        keypoints: (N, P, 3), for each item: x and y in pixels of the image, and a score.

    Returns:
        (H'', W'', 3) uint8, RGB.
    """
    longer = max(pixels.shape[:2])
    scale = min(max(longer, sides[0]), sides[1]) / longer
    size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
    # To shrink by averaging is fast: other good filters take as long as the detector itself.
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(pixels, size, interpolation=way) if scale != 1 else pixels.copy()
    colours = [_COLOURS[k % len(_COLOURS)] for _, k, _ in items]
    for mask, colour in zip(() if masks is None else masks, colours, strict=False):
        here = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        tint = np.array(tuple(bytes.fromhex(colour[1:])))
        scaled[here] = (scaled[here] + tint) // 2
    canvas = Image.fromarray(scaled)
    line = max(2, round(max(size) / 500))
    brush = ImageDraw.Draw(canvas)
    # Matplotlib ships the font.
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), max(11, max(size) // 70))
    names = metadata.get("thing_classes")
    for (box, k, text), colour in zip(items, colours, strict=True):
        left, top, right, bottom = (float(x) * scale for x in box)
        ends = [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]
        brush.rectangle(ends, outline=colour, width=line)
        _write(brush, ends, shown(names[k] if names else k, 60) + text, colour, font, canvas.size)
    for points, colour in zip(() if keypoints is None else keypoints, colours, strict=False):
        _draw_keypoints(brush, points * (scale, scale, 1.0), colour, line, metadata)
    return np.asarray(canvas)


def _write(
    brush: ImageDraw.ImageDraw,
    box: list[float],
    label: str,
    colour: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Writes the name above its box, or inside it at the edge of the image, on its colour."""
    _, _, width, height = brush.textbbox((0, 0), label, font=font)
    left = max(0.0, min(box[0], size[0] - width))
    top = box[1] - height if box[1] >= height else max(0.0, min(box[1], size[1] - height))
    brush.rectangle((left, top, left + width, top + height), fill=colour)
    brush.text((left, top), label, fill="black", font=font)


def _draw_keypoints(
    brush: ImageDraw.ImageDraw, points: np.ndarray, colour: str, line: int, metadata: Metadata
) -> None:
    names = metadata.get("keypoint_names") or ()
    places = {
        names[i] if i < len(names) else i: (x, y)
        for i, (x, y, score) in enumerate(points.tolist())
        if score > _SEEN
    }
    for first, second, rule_colour in metadata.get("keypoint_connection_rules") or ():
        if first in places and second in places:
            brush.line((*places[first], *places[second]), fill=tuple(rule_colour), width=line)
    for x, y in places.values():
        ends = (x - line, y - line, x + line, y + line)
        brush.ellipse(ends, fill=colour, outline="black")
