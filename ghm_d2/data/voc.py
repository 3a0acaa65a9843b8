"""Pascal VOC annotations, one XML file an image, as COCO-format content."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from PIL import Image

__all__ = ["DIFFICULT", "LabelledImage", "VocObject", "read_annotation", "read_xml", "to_coco"]

DIFFICULT = ("crowd", "keep", "drop")
_LARGEST_XML = 1 << 24  # bytes; the XML of an image has a few thousand
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class VocObject:
    """One object as the XML has it.

    Attributes:
        name: of the class.
        corners: xmin, ymin, xmax, ymax in pixels, as written.
        difficult: whether the annotator marked it as hard to recognise.
    """

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool = False


@dataclass(frozen=True)
class LabelledImage:
    """An image and its objects.

    Attributes:
        file: the image.
        width, height: in pixels, turned as the EXIF data says, which is how Detectron2 reads it.
        objects: may be empty.
    """

    file: Path
    width: int
    height: int
    objects: tuple[VocObject, ...] = ()


def read_xml(file: Path) -> Element:
    """Parse an XML file that may come from anywhere.

    A document type is refused: without one there are no entities, neither external ones nor those
    that grow to gigabytes.

    Raises:
        ValueError: the file is not well-formed XML, has a document type, or is larger than 16 MiB.
        OSError: it cannot be read.
    """
    if file.stat().st_size > _LARGEST_XML:
        raise ValueError(f"is larger than {_LARGEST_XML >> 20} MiB")
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse
    try:
        parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"is not well-formed XML ({error})") from error
    return builder.close()


def _refuse(*_: object) -> None:
    raise ValueError("has a document type (<!DOCTYPE ...>), which could hide entities: remove it")


def read_annotation(xml: Path, images: dict[str, list[Path]]) -> LabelledImage:
    """Read one XML file and find its image.

    The image is the one with the name of the XML file; only where there is none, the one that
    ``<filename>`` names (which annotation tools do not keep up to date).

    Args:
        xml: the file.
        images: the image files that may be meant, by their names without extension.

    Raises:
        ValueError: something is missing or wrong; the message follows the name of the file.
        OSError: the XML file cannot be read.
    """
    root = read_xml(xml)
    if root.tag != "annotation":
        raise ValueError(f"is not a VOC annotation: it begins with <{root.tag}>")
    name = _file_name(root.findtext("filename", ""))
    found = images.get(xml.stem) or images.get(Path(name).stem) or []
    file = next((f for f in found if f.name == name), found[0] if found else None)
    if file is None:
        raise ValueError(f"has no image: neither {xml.stem}.* nor its <filename> {name!r} exists")
    width, height = _image_size(file)
    written = tuple(_number(root, f"size/{side}", 0) for side in ("width", "height"))
    # Some tools write 0 where they do not know.
    if all(written) and written != (width, height):
        raise ValueError(
            f"is for an image of {written[0]:g} x {written[1]:g} pixels, but {file.name} has "
            f"{width} x {height}: the boxes would be wrong"
        )
    objects = tuple(_object(node) for node in root.findall("object"))
    return LabelledImage(file, width, height, objects)


def _file_name(text: str) -> str:
    """Without folders, whichever system wrote them."""
    return text.strip().replace("\\", "/").rpartition("/")[2]


def _image_size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"belongs to {file.name}, which is not a readable image") from error
    return (height, width) if turned else (width, height)


def _object(node: Element) -> VocObject:
    name = node.findtext("name", "").strip()
    if not name:
        raise ValueError("holds an object without a <name>")
    corners = tuple(_number(node, f"bndbox/{c}") for c in ("xmin", "ymin", "xmax", "ymax"))
    return VocObject(name, corners, node.findtext("difficult", "0").strip() == "1")


def _number(node: Element, path: str, default: float | None = None) -> float:
    text = node.findtext(path)
    if text is None and default is not None:
        return default
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"holds an <{node.tag}> with the {path} {text!r}, which is not a number")
    return value


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
        difficult: what becomes of difficult objects: "crowd" (``iscrowd`` 1: training leaves them
            out, evaluation counts them neither as found nor as missed, as VOC's does), "keep" (as
            any other) or "drop".
        zero_based: xmin and ymin count from 0 and xmax, ymax are the first pixels outside:
            x = xmin and width = xmax - xmin.

    Returns:
        The content, and how many objects were treated in other than the plain way: "difficult",
        "empty" (no area inside the image, left out), "clipped" (reached out of the image),
        "from 0" (began at 0, where VOC begins at 1), and ``("class", name)`` for objects of other
        classes, left out.
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
            notes["from 0"] += bool(shift) and min(x0, y0) == 0
            x0, y0 = max(x0 - shift, 0), max(y0 - shift, 0)
            right, bottom = min(x1, image.width), min(y1, image.height)
            if right <= x0 or bottom <= y0:
                notes["empty"] += 1
                continue
            notes["clipped"] += min(item.corners[:2]) < 0 or (right, bottom) != (x1, y1)
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
