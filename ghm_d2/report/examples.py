"""The best and the worst images with their boxes, as data URIs of JPEGs."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import Metadata
from PIL import Image

from ghm_d2.data.pictures import UnreadableError, draw_boxes, read_image
from ghm_d2.errors import shown

from .evaluation import Evaluation, ImageScore


@dataclass(frozen=True)
class Example:
    """An image of the page.

    Attributes:
        name: of the file.
        score: the figures of the image.
        truth, shown: data URIs of the image with ground truth and with detections.
    """

    name: str
    score: ImageScore
    truth: str
    shown: str


def best_and_worst(
    result: Evaluation, folder: Path, number: int
) -> tuple[list[Example], list[Example], list[str]]:
    """Draws at most `number` of the best images, and as many of the worst ones.

    Args:
        result: of a data set.
        folder: of its images. Annotations may name files elsewhere; a page is passed on, and shows
            nothing that does not lie here.
        number: of images.

    Returns:
        The best, the worst (the very worst first), and one sentence for each image that could not
        be read. No image is in both.
    """
    number = min(number, -(-len(result.images) // 2))
    best = result.images[:number]
    worst = result.images[number:][::-1][:number]
    unreadable: list[str] = []
    best, worst = (_draw(images, folder, result.classes, unreadable) for images in (best, worst))
    return best, worst, unreadable


def _draw(
    images: list[ImageScore], folder: Path, classes: list[str], unreadable: list[str]
) -> list[Example]:
    metadata = Metadata(thing_classes=classes)
    examples = []
    for image in images:
        if not image.file.resolve().is_relative_to(folder.resolve()):
            unreadable.append(f"{shown(image.file)} lies outside of {shown(folder)}")
            continue
        try:
            pixels = read_image(image.file)
        except UnreadableError as error:
            unreadable.append(str(error).rstrip("."))
            continue
        both = [_uri(draw_boxes(pixels, boxes, metadata)) for boxes in (image.truth, image.shown)]
        examples.append(Example(image.file.name, image, *both))
    return examples


def _uri(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
