"""Labelled images, whichever tool wrote them, and their conversion to COCO format."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .fields import number, polygon_area, polygon_box

DIFFICULT = ("crowd", "keep", "drop")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_ELLIPSE_POINTS = 36

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class LabelledObject:
    """One object as its label file describes it.

    Attributes:
        name: the name of its class.
        corners: xmin, ymin, xmax, ymax in pixels, as written.
        difficult: whether the annotator marked it as hard to recognise.
        polygons: one flat x, y, x, y, ... for each part, in pixels; empty for a box.
        from_one: whether pixels count from 1 and xmax, ymax are the last ones inside, as in VOC.
    """

    name: str
    corners: Corners
    difficult: bool = False
    polygons: tuple[tuple[float, ...], ...] = ()
    from_one: bool = False


@dataclass(frozen=True)
class LabelledImage:
    """An image and its objects.

    Attributes:
        file: the image.
        width, height: in pixels, turned as the EXIF data says, which is how Detectron2 reads it.
        objects: may be empty.
        split: the part of the data set that its folder or file says; empty where neither does.
        lost: for each object that cannot be used, what is wrong with it.
        from_zero: whether boxes that are read as VOC's come from a tool that counts from 0.
    """

    file: Path
    width: int
    height: int
    objects: tuple[LabelledObject, ...] = ()
    split: str = ""
    lost: tuple[str, ...] = ()
    from_zero: bool = False


def checked_size(file: Path, width: Any = None, height: Any = None) -> tuple[int, int]:
    """Width and height of an image in pixels after its EXIF orientation.

    Args:
        file: the image.
        width, height: as the labels give them; 0 or None, as some tools write, is not compared.

    Raises:
        ValueError: it is not a readable image, or the labels are for an image of another size. The
            message is to be put after the name of the label file.
    """
    try:
        with Image.open(file) as image:
            size = image.size
            turned = image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"belongs to {file.name}, which is not a readable image") from error
    size = size[::-1] if turned else size
    written = number(width), number(height)
    if all(written) and written != size:
        raise ValueError(
            f"is for an image of {written[0]:g} x {written[1]:g} pixels, but {file.name} has "
            f"{size[0]} x {size[1]}: the boxes would be wrong"
        )
    return size


def outline(
    name: str, parts: Iterable[Sequence[Any]], *, difficult: bool = False
) -> LabelledObject | None:
    """An object of one or more polygons; None if any of them is not a polygon.

    Args:
        name: the name of its class.
        parts: one flat x, y, x, y, ... for each polygon, in pixels.
        difficult: see :class:`LabelledObject`.
    """
    polygons = [[number(v) for v in part] for part in parts]
    if not polygons or any(len(p) < 6 or len(p) % 2 or None in p for p in polygons):
        return None
    x, y, w, h = polygon_box(polygons)
    return LabelledObject(name, (x, y, x + w, y + h), difficult, tuple(map(tuple, polygons)))


def rectangle(
    name: str, box: Sequence[Any], degrees: Any = 0, centred: bool = True
) -> LabelledObject | None:
    """A box that may be rotated; None if one of `box` is not a number.

    Args:
        name: the name of its class.
        box: xmin, ymin, xmax, ymax in pixels; minimum and maximum may be exchanged.
        degrees: angle of the rotation, clockwise.
        centred: whether it is rotated about its centre rather than about its first corner.
    """
    values, angle = [number(v) for v in box], math.radians(number(degrees) or 0)
    if None in values:
        return None
    x0, y0, x1, y1 = values
    if not angle:
        return LabelledObject(name, (x0, y0, x1, y1))
    cx, cy = ((x0 + x1) / 2, (y0 + y1) / 2) if centred else (x0, y0)
    cos, sin = math.cos(angle), math.sin(angle)
    around = [(x - cx, y - cy) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    points = [v for x, y in around for v in (cx + x * cos - y * sin, cy + x * sin + y * cos)]
    return outline(name, [points])


def ellipse(
    name: str, centre: Sequence[Any], radii: Sequence[Any], radians: Any = 0
) -> LabelledObject | None:
    """An ellipse or circle, as a polygon; None if a value is no number or a radius not positive.

    Args:
        name: the name of its class.
        centre: x and y in pixels.
        radii: along x and y before the rotation, in pixels.
        radians: angle of the rotation, clockwise.
    """
    cx, cy, rx, ry = (number(v) for v in (*centre, *radii))
    if None in (cx, cy, rx, ry) or min(rx, ry) <= 0:
        return None
    cos, sin = math.cos(number(radians) or 0), math.sin(number(radians) or 0)
    points = []
    for k in range(_ELLIPSE_POINTS):
        x, y = (f(2 * math.pi * k / _ELLIPSE_POINTS) for f in (math.cos, math.sin))
        points += [cx + rx * x * cos - ry * y * sin, cy + rx * x * sin + ry * y * cos]
    half = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    corners = (cx - half[0], cy - half[1], cx + half[0], cy + half[1])  # the ellipse's own
    return LabelledObject(name, corners, polygons=(tuple(points),))


def to_coco(
    images: Iterable[LabelledImage],
    classes: Sequence[str],
    root: Path,
    *,
    difficult: str = "crowd",
    zero_based: bool = False,
) -> tuple[dict[str, Any], Counter]:
    """COCO-format content of labelled images.

    VOC counts pixels from 1 and xmax, ymax are the last ones inside, so that xmin 1, xmax W covers
    an image of width W: x = xmin - 1 and width = xmax - xmin + 1, as in Detectron2's own loader.

    Args:
        images: in the order of their ids, from 1.
        classes: the categories, whose ids are 1, 2, ...
        root: folder that the file names are relative to.
        difficult: what becomes of difficult objects: "crowd" (`iscrowd` 1: training leaves them
            out, evaluation counts them neither as found nor as missed, as VOC's does), "keep" (as
            any other) or "drop".
        zero_based: read VOC's coordinates as counted from 0, with xmax, ymax as the first pixels
            outside: x = xmin and width = xmax - xmin.

    Returns:
        The content, and how many objects needed special treatment, by its kind: "difficult",
        "empty" (no area inside the image, left out), "clipped" (reached out of the image),
        "swapped" (xmin was larger than xmax, or ymin than ymax), "outline" (a polygon or rotated
        box, replaced by the box around it), "from 0" (begins at 0, although VOC counts from 1),
        "labelImg" (written by labelImg, which counts from 0), and `("class", name)` (not one of
        the classes, left out).
    """
    ids = {name: number for number, name in enumerate(classes, start=1)}
    notes: Counter = Counter()
    rows, annotations = [], []
    for image_id, image in enumerate(images, start=1):
        name = image.file.relative_to(root).as_posix()
        rows.append(
            {"id": image_id, "file_name": name, "width": image.width, "height": image.height}
        )
        for item in image.objects:
            if item.name not in ids:
                notes["class", item.name] += 1
                continue
            if item.difficult:
                notes["difficult"] += 1
                if difficult == "drop":
                    continue
            box = _box(item, image, item.from_one and not zero_based, notes)
            if box is None:
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[item.name],
                    "bbox": box,
                    "area": polygon_area(item.polygons) or box[2] * box[3],
                    "iscrowd": int(item.difficult and difficult == "crowd"),
                }
            )
            if item.polygons:
                annotations[-1]["segmentation"] = [list(part) for part in item.polygons]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": rows, "annotations": annotations, "categories": categories}, +notes


def _box(
    item: LabelledObject, image: LabelledImage, from_one: bool, notes: Counter
) -> list[float] | None:
    """x, y, width, height of the part inside the image; None where there is none."""
    x0, y0, x1, y1 = item.corners
    notes["swapped"] += x0 > x1 or y0 > y1
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    notes["outline"] += bool(item.polygons)
    low = min(x0, y0)
    notes["from 0"] += from_one and low == 0
    notes["labelImg"] += from_one and image.from_zero
    x0, y0 = max(x0 - from_one, 0), max(y0 - from_one, 0)
    right, bottom = min(x1, image.width), min(y1, image.height)
    if right <= x0 or bottom <= y0:
        notes["empty"] += 1
        return None
    # Half a pixel of tolerance: rounding alone moves fractions and polygons slightly outside.
    notes["clipped"] += low < -0.5 or x1 > image.width + 0.5 or y1 > image.height + 0.5
    return [_plain(v) for v in (x0, y0, right - x0, bottom - y0)]


def _plain(value: float) -> float:
    return int(value) if value == int(value) else round(value, 6)
