"""CVAT's own XML, "CVAT for images": one file for all images of a task."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from .fields import number
from .image_files import find_images
from .voc import LabelledImage, VocObject, image_size, polygon_corners

__all__ = ["read_cvat"]

_SPLIT = "subset"  # an attribute of an image, where the task has subsets


def read_cvat(root: Element, folder: Path, report: Callable[[str], None]) -> list[LabelledImage]:
    """The images of one file, and their boxes.

    CVAT counts from 0 and its corners are places between pixels. Of a polygon the box around it is
    taken; other shapes are no objects of a detector.

    Args:
        root: of the file, <annotations>.
        folder: that holds the images, also further below.
        report: takes what is wrong with an image that is left out; it follows the file's name.

    Raises:
        ValueError: it holds no image; the message follows the name of the file.
    """
    nodes = root.findall("image")
    if not nodes:
        way_out = "export the task as CVAT for images" if root.find("track") is not None else ""
        raise ValueError(f"holds no <image>{': ' * bool(way_out)}{way_out}")
    places = find_images([node.get("name", "") for node in nodes], str(folder))
    images = []
    for node, place in zip(nodes, places, strict=True):
        try:
            images.append(_image(node, place.path))
        except ValueError as error:
            report(f"{node.get('name')!r} {error}")
    return images


def _image(node: Element, path: str | None) -> LabelledImage:
    if path is None:
        raise ValueError("has no image of this name")
    width, height = image_size(Path(path))
    written = tuple(number(node.get(side)) for side in ("width", "height"))
    if all(written) and written != (width, height):
        raise ValueError(
            f"is for an image of {written[0]:g} x {written[1]:g} pixels, but the file has "
            f"{width} x {height}: the boxes would be wrong"
        )
    objects, lost = [], []
    for shape in node:
        name = (shape.get("label") or "").strip()
        corners = _corners(shape)
        if corners is None or not name:
            lost.append(f"holds a <{shape.tag}> without a box or label")
        else:
            objects.append(VocObject(name, corners, outline=shape.tag != "box", from_zero=True))
    if lost and not objects:
        raise ValueError(lost[0])
    split = (node.get(_SPLIT) or "").strip()
    return LabelledImage(Path(path), width, height, tuple(objects), split, tuple(lost))


def _corners(shape: Element) -> tuple[float, float, float, float] | None:
    if shape.tag == "box":
        values = [number(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
        return None if None in values else _turned(values, number(shape.get("rotation")) or 0)
    if shape.tag == "polygon":
        points = [point.split(",") for point in (shape.get("points") or "").split(";")]
        if any(len(point) != 2 for point in points):
            return None
        x, y = zip(*points, strict=True)
        return polygon_corners([number(v) for v in x], [number(v) for v in y])
    return None


def _turned(values: Sequence[float], degrees: float) -> tuple[float, float, float, float]:
    """The box around one that is turned about its centre."""
    x0, y0, x1, y1 = values
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    w, h = (x1 - x0) / 2, (y1 - y0) / 2
    w, h = w * cos + h * sin, w * sin + h * cos
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    return (cx - w, cy - h, cx + w, cy + h) if degrees else (x0, y0, x1, y1)
