"""Pascal VOC annotations, one XML file per image."""

import math
from pathlib import Path
from xml.etree.ElementTree import Element

from .fields import flag, number
from .labels import LabelledImage, LabelledObject, checked_size, outline, rectangle

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_annotation(root: Element, xml: Path, images: dict[str, list[Path]]) -> LabelledImage:
    """The image that one XML file is for, and its objects.

    The image is the one with the name of the XML file; only where there is none, the one that
    `<filename>` names (which annotation tools do not keep up to date). If there are several in
    different folders, it is the one whose folder has the same name as that of the XML file.

    Args:
        root: the root element of the file.
        xml: the file.
        images: the image files that may be meant, by their names without extension.

    Raises:
        ValueError: something is missing or wrong; put the message after the name of the file.
    """
    if root.tag != "annotation":
        raise ValueError(f"is not a VOC annotation: it begins with <{root.tag}>")
    name = _file_name(root.findtext("filename", ""))
    found = images.get(xml.stem) or images.get(Path(name).stem) or []
    near = [f for f in found if f.parent.name == xml.parent.name] or found
    file = next((f for f in near if f.name == name), near[0] if near else None)
    if file is None:
        raise ValueError(f"has no image: neither {xml.stem}.* nor its <filename> {name!r} exists")
    width, height = checked_size(file, root.findtext("size/width"), root.findtext("size/height"))
    objects, lost = [], []
    for node in root.findall("object"):
        try:
            objects.append(_object(node))
        except ValueError as error:
            lost.append(str(error))
    return LabelledImage(
        file, width, height, tuple(objects), lost=tuple(lost), from_zero=_is_of_labelimg(root)
    )


def _is_of_labelimg(root: Element) -> bool:
    """Whether labelImg wrote a file: only it has all of these, in this order."""
    tags = [node.tag for node in root if node.tag != "object"]
    return (
        tags == ["folder", "filename", "path", "source", "size", "segmented"]
        and root.findtext("source/database") == "Unknown"
        and all(node.findtext("pose") == "Unspecified" for node in root.iter("object"))
    )


def _file_name(text: str) -> str:
    """The name without folders, whether Windows or another system wrote it."""
    return text.strip().replace("\\", "/").rpartition("/")[2]


def _object(node: Element) -> LabelledObject:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError("holds an object without a <name>")
    difficult = bool(flag(node.findtext("difficult")))
    texts = [node.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    corners = tuple(number(text) for text in texts)
    if None not in corners:
        return LabelledObject(name, corners, difficult, from_one=True)
    found = _rotated(node) or outline(name, _polygon(node), difficult=difficult)
    if found:
        return LabelledObject(name, found.corners, difficult, found.polygons)
    corner, text = next(
        (c, t) for c, t, v in zip(_CORNERS, texts, corners, strict=True) if v is None
    )
    raise ValueError(f"holds an <object> with the bndbox/{corner} {text!r}, which is not a number")


def _polygon(node: Element) -> list[list[str | None]]:
    """The polygon in <polygon>, if any, from <x1>, <y1>, <x2>, ... or a <pt> for each point."""
    polygon = node.find("polygon")
    if polygon is None:
        return []
    x = [child.text for child in polygon.iter() if child.tag.rstrip("0123456789") == "x"]
    y = [child.text for child in polygon.iter() if child.tag.rstrip("0123456789") == "y"]
    return [[v for point in zip(x, y, strict=True) for v in point]] if len(x) == len(y) else []


def _rotated(node: Element) -> LabelledObject | None:
    """<robndbox>, a rotated box: centre, sides and an angle in radians."""
    values = [number(node.findtext(f"robndbox/{key}")) for key in ("cx", "cy", "w", "h", "angle")]
    if None in values:
        return None
    cx, cy, w, h, angle = values
    corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    return rectangle("", corners, math.degrees(angle))
