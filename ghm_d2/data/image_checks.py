"""Whether the images of a data set exist and can be read, and how large they are."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from tqdm import tqdm

from ghm_d2.errors import shown

from .checks import Problem
from .image_files import find_images

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_DEEP = ("I", "F")  # and "I;16" with its byte orders
_PLAIN = ("RGB", "L")
_THREADS = 8  # files wait for the disk more than for a processor


def is_deep(mode: str) -> bool:
    """Whether an image of this mode of Pillow's may hold values above 255."""
    return mode in _DEEP or mode.startswith("I;")


@dataclass(frozen=True)
class ImageFile:
    """An image as it is read.

    Attributes:
        path: of the file.
        width, height: in pixels, after its EXIF orientation has been applied.
        turned: whether that exchanged the two.
    """

    path: str
    width: int
    height: int
    turned: bool = False


def image_name(entry: dict[str, Any]) -> str:
    """What a message calls an entry of "images"."""
    return f"image {entry['id']!r} ({shown(entry['file_name'])})"


def look_at_images(
    images: Sequence[dict[str, Any]],
    root: str,
    *,
    decode: bool,
    name: str,
    report: Callable[[Problem], None],
) -> list[ImageFile | None]:
    """Find the files and read their headers.

    Args:
        images: entries of "images" with `id` and `file_name`.
        root: folder that the file names are relative to.
        decode: read every pixel, which finds truncated files; False: the headers alone.
        name: of the data set, for the progress bar.
        report: called with every problem.

    Returns:
        One for each entry; None where there is no image that can be read.
    """
    places = find_images([entry["file_name"] for entry in images], root)
    for entry, place in zip(images, places, strict=True):
        where = image_name(entry)
        if place.path is None:
            why = f" ({place.words})" if place.words else ""
            report(Problem("missing image", f"{where} is missing from {root}{why}"))
        elif place.words:
            file = shown(os.path.relpath(place.path, root))
            report(Problem("image name", f"{where} is found as {file} ({place.words})"))
    words = "reading the images" if decode else "checking the images"
    files: list[ImageFile | None] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(partial(_look, decode), images, [place.path for place in places])
        for file, problems in tqdm(found, total=len(images), desc=f"{words} of {name}", delay=2):
            files.append(file)
            for problem in problems:
                report(problem)
    return files


def _look(
    decode: bool, entry: dict[str, Any], path: str | None
) -> tuple[ImageFile | None, list[Problem]]:
    if path is None:
        return None, []
    where = image_name(entry)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and large images, by the hundred
            with Image.open(path) as image:
                size, mode, orientation = image.size, image.mode, _orientation(image, decode)
                if decode:
                    image.load()
    # Decoding a damaged file can fail with any exception, not only OSError.
    except Exception as error:
        reason = " ".join(str(error).replace(path, "the file").split()) or type(error).__name__
        return None, [Problem("unreadable image", f"{where} cannot be read: {shown(reason)}")]
    turned = orientation in _SIDEWAYS
    width, height = size[::-1] if turned else size
    return ImageFile(path, width, height, turned), list(_oddities(where, mode, orientation))


def _orientation(image: Image.Image, decode: bool) -> int:
    if image.format == "PNG" and "exif" not in image.info and not decode:
        return 1  # EXIF may follow the pixels, which would have to be read
    return image.getexif().get(_EXIF_ORIENTATION, 1)


def _oddities(where: str, mode: str, orientation: int) -> Iterator[Problem]:
    if is_deep(mode):
        yield Problem(
            "image depth",
            f"{where} has Pillow's mode {mode}, in which values above 255 would be clipped: "
            "convert it to 8 bits",
        )
    elif mode not in _PLAIN:
        yield Problem("converted image", f"{where} has the mode {mode}")
    if orientation in range(2, 9):
        yield Problem("rotated image", where)
