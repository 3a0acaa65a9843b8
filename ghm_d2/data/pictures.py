"""One image: read, or drawn with its boxes."""

from pathlib import Path

import numpy as np
from detectron2.data import Metadata, detection_utils
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ghm_d2.errors import UserError, reason, shown

__all__ = ["TILE", "UnreadableError", "draw_boxes", "read_image"]

TILE = 400  # pixels of the longer side of one drawn image
# One colour for each class in both halves, told apart also by those who cannot tell red from green.
_COLOURS = ("#e69f00", "#56b4e9", "#f0e442", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#ffffff")


class UnreadableError(UserError):
    """An input that is there but broken, or no image or video at all."""


def read_image(file: Path) -> np.ndarray:
    """(H, W, 3) uint8, RGB, turned as its EXIF data says.

    Raises:
        UnreadableError: the file is not an image that can be read.
    """
    try:
        return detection_utils.read_image(str(file), "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{file} cannot be read as an image ({reason(error)}).") from error


def draw_boxes(
    pixels: np.ndarray, items: list[tuple[list[float], int, str]], metadata: Metadata
) -> np.ndarray:
    """Draw (XYXY box, class, text after its name) on the image, enlarged to the size of a tile.

    It is enlarged first, so that lines and letters keep their size on small images.
    """
    scale = TILE / max(pixels.shape[:2])
    size = [round(side * scale) for side in pixels.shape[1::-1]]
    drawing = Visualizer(np.asarray(Image.fromarray(pixels).resize(size)), font_size_scale=0.9)
    names = metadata.get("thing_classes")
    drawing.overlay_instances(
        boxes=np.array([box for box, _, _ in items], dtype=float).reshape(-1, 4) * scale,
        # Matplotlib draws them, to which "$" begins a formula.
        labels=[
            (shown(names[k] if names else k, 60) + text).replace("$", r"\$") for _, k, text in items
        ],
        assigned_colors=[_COLOURS[k % len(_COLOURS)] for _, k, _ in items],
    )
    return drawing.output.get_image()
