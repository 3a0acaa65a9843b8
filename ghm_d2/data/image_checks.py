"""Whether the images of a data set are there, can be read, and are what the file says."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image
from tqdm import tqdm

from .checks import Problem

__all__ = ["image_problems", "is_deep"]

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_DEEP = ("I", "F")  # and "I;16" with its byte orders
_PLAIN = ("RGB", "L")
_THREADS = 8  # files wait for the disk more than for a processor


def is_deep(mode: str) -> bool:
    """Whether an image of this mode of Pillow's may hold values above 255."""
    return mode in _DEEP or mode.startswith("I;")


def image_problems(
    images: Sequence[dict[str, Any]], root: str, *, decode: bool, name: str
) -> Iterator[Problem]:
    """Problems of the image files.

    Args:
        images: entries of "images" with `id`, `file_name`, `width` and `height`.
        root: folder that the file names are relative to.
        decode: read every pixel, which finds truncated files; False: the headers alone.
        name: of the data set, for the progress bar.
    """
    words = "reading the images" if decode else "looking for the images"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(partial(_look, root, decode), images)
        for problems in tqdm(found, total=len(images), desc=f"{words} of {name}", delay=2):
            yield from problems


def _look(root: str, decode: bool, entry: dict[str, Any]) -> list[Problem]:
    path = os.path.join(root, entry["file_name"])
    where = f"image {entry['id']!r} ({entry['file_name']})"
    if not os.path.isfile(path):
        return [Problem("missing image", f"{where} is missing from {root}")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and large images, by the hundred
            with Image.open(path) as image:
                size, mode, orientation = image.size, image.mode, _orientation(image, decode)
                if decode:
                    image.load()
    # A damaged file is a random program of its format: it can fail with any exception.
    except Exception as error:
        reason = " ".join(str(error).replace(path, "the file").split()) or type(error).__name__
        return [Problem("unreadable image", f"{where} cannot be read: {reason}")]
    return list(_compare(entry, where, size, mode, orientation))


def _orientation(image: Image.Image, decode: bool) -> int:
    if image.format == "PNG" and "exif" not in image.info and not decode:
        return 1  # it may stand behind the pixels, which would have to be read
    return image.getexif().get(_EXIF_ORIENTATION, 1)


def _compare(
    entry: dict[str, Any], where: str, size: tuple[int, int], mode: str, orientation: int
) -> Iterator[Problem]:
    turned = size[::-1] if orientation in _SIDEWAYS else size
    if turned != (entry["width"], entry["height"]):
        exif = ", as its EXIF orientation turns it" if turned != size else ""
        yield Problem(
            "image size",
            f"{where} has {turned[0]} x {turned[1]} pixels{exif}, but the annotation file says "
            f"{entry['width']} x {entry['height']}",
        )
    if is_deep(mode):
        yield Problem(
            "image depth",
            f"{where} is of Pillow's mode {mode}, whose values above 255 would be clipped: "
            "convert it to 8 bits",
        )
    elif mode not in _PLAIN:
        yield Problem("converted image", f"{where} is {mode}")
    if orientation in range(2, 9):
        yield Problem("rotated image", where)
