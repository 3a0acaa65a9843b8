"""Pascal VOC annotations, one XML file an image, as COCO-format content."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from PIL import Image

from .fields import flag, number

__all__ = [
    "DIFFICULT",
    "LabelledImage",
    "VocObject",
    "image_size",
    "polygon_corners",
    "read_annotation",
    "to_coco",
]

DIFFICULT = ("crowd", "keep", "drop")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocObject:
    """One object as the XML has it.

    Attributes:
        name: of the class.
        corners: xmin, ymin, xmax, ymax in pixels, as written.
        difficult: whether the annotator marked it as hard to recognise.
        outline: whether the corners are those of a polygon or rotated box.
        from_zero: whether the corners count from 0 and are no pixels, whatever the others do.
    """

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool = False
    outline: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class LabelledImage:
    """An image and its objects.

    Attributes:
        file: the image.
        width, height: in pixels, turned as the EXIF data says, which is how Detectron2 reads it.
        objects: may be empty.
        split: the part of the data set that its folder or file says; empty where neither does.
        lost: for each object that cannot be used, what is wrong with it.
    """

    file: Path
    width: int
    height: int
    objects: tuple[VocObject, ...] = ()
    split: str = ""
    lost: tuple[str, ...] = ()


def read_annotation(root: Element, xml: Path, images: dict[str, list[Path]]) -> LabelledImage:
    """The image that one XML file is for, and its objects.

    The image is the one with the name of the XML file; only where there is none, the one that
    `<filename>` names (which annotation tools do not keep up to date). Of several in different
    folders, the one whose folder is called as that of the XML file.

    Args:
        root: of the file.
        xml: the file.
        images: the image files that may be meant, by their names without extension.

    Raises:
        ValueError: something is missing or wrong; the message follows the name of the file.
    """
    if root.tag != "annotation":
        raise ValueError(f"is not a VOC annotation: it begins with <{root.tag}>")
    name = _file_name(root.findtext("filename", ""))
    found = images.get(xml.stem) or images.get(Path(name).stem) or []
    near = [f for f in found if f.parent.name == xml.parent.name] or found
    file = next((f for f in near if f.name == name), near[0] if near else None)
    if file is None:
        raise ValueError(f"has no image: neither {xml.stem}.* nor its <filename> {name!r} exists")
    width, height = image_size(file)
    written = tuple(number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    # Some tools write 0 where they do not know.
    if all(written) and written != (width, height):
        raise ValueError(
            f"is for an image of {written[0]:g} x {written[1]:g} pixels, but {file.name} has "
            f"{width} x {height}: the boxes would be wrong"
        )
    objects, lost = [], []
    for node in root.findall("object"):
        try:
            objects.append(_object(node))
        except ValueError as error:
            lost.append(str(error))
    if lost and not objects:  # it would train as an image of background
        raise ValueError(lost[0])
    return LabelledImage(file, width, height, tuple(objects), lost=tuple(lost))


def _file_name(text: str) -> str:
    """Without folders, whichever system wrote them."""
    return text.strip().replace("\\", "/").rpartition("/")[2]


def image_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels after the EXIF orientation.

    Raises:
        ValueError: it is no image that can be read.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"belongs to {file.name}, which is not a readable image") from error
    return (height, width) if turned else (width, height)


def _object(node: Element) -> VocObject:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError("holds an object without a <name>")
    difficult = bool(flag(node.findtext("difficult")))
    texts = [node.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    corners = tuple(number(text) for text in texts)
    if None not in corners:
        return VocObject(name, corners, difficult)
    if outline := _rotated(node) or _polygon(node):
        return VocObject(name, outline, difficult, outline=True, from_zero=True)
    corner, text = next(
        (c, t) for c, t, v in zip(_CORNERS, texts, corners, strict=True) if v is None
    )
    raise ValueError(f"holds an <object> with the bndbox/{corner} {text!r}, which is not a number")


def _polygon(node: Element) -> tuple[float, float, float, float] | None:
    """The box around <polygon>: <x1>, <y1>, <x2>, ..., or a <pt> for each point."""
    polygon = node.find("polygon")
    if polygon is None:
        return None
    x = [number(child.text) for child in polygon.iter() if child.tag.rstrip("0123456789") == "x"]
    y = [number(child.text) for child in polygon.iter() if child.tag.rstrip("0123456789") == "y"]
    return polygon_corners(x, y)


def polygon_corners(
    x: Sequence[float | None], y: Sequence[float | None]
) -> tuple[float, float, float, float] | None:
    """The box around points; None where one of them is no number or there are fewer than three."""
    if len(x) != len(y) or len(x) < 3 or None in x or None in y:
        return None
    return min(x), min(y), max(x), max(y)


def _rotated(node: Element) -> tuple[float, float, float, float] | None:
    """The box around <robndbox>, a rotated one: centre, sides and an angle in radians."""
    values = [number(node.findtext(f"robndbox/{key}")) for key in ("cx", "cy", "w", "h", "angle")]
    if None in values:
        return None
    cx, cy, w, h, angle = values
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    half = ((w * cos + h * sin) / 2, (w * sin + h * cos) / 2)
    return cx - half[0], cy - half[1], cx + half[0], cy + half[1]


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
        zero_based: xmin and ymin count from 0 and xmax, ymax are the first pixels outside:
            x = xmin and width = xmax - xmin.

    Returns:
        The content, and how many objects were treated in other than the plain way: "difficult",
        "empty" (no area inside the image, left out), "clipped" (reached out of the image),
        "swapped" (xmin was larger than xmax, or ymin than ymax), "outline" (the box around a
        polygon or rotated box), "from 0" (began at 0, where VOC begins at 1), and
        `("class", name)` for objects of other classes, left out.
    """
    shift = 0 if zero_based else 1
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
            x0, y0, x1, y1 = item.corners
            notes["swapped"] += x0 > x1 or y0 > y1
            (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
            notes["outline"] += item.outline
            inside = 0 if item.from_zero else shift
            notes["from 0"] += bool(inside) and min(x0, y0) == 0
            low = min(x0, y0)
            x0, y0 = max(x0 - inside, 0), max(y0 - inside, 0)
            right, bottom = min(x1, image.width), min(y1, image.height)
            if right <= x0 or bottom <= y0:
                notes["empty"] += 1
                continue
            notes["clipped"] += low < 0 or (right, bottom) != (x1, y1)
            box = [_plain(v) for v in (x0, y0, right - x0, bottom - y0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[item.name],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(item.difficult and difficult == "crowd"),
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": rows, "annotations": annotations, "categories": categories}, +notes


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value
