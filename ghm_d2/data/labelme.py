"""JSON of labelme and its successors: one file per image, points in pixels."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .fields import numbers
from .image_files import find_images
from .labels import LabelledImage, LabelledObject, checked_size, ellipse, outline
from .tables import read_json


def is_labelme(content: Any) -> bool:
    """Whether a JSON file is one of labelme's."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read_labelme(
    files: Sequence[Path], folder: Path, report: Callable[[str], None]
) -> Iterator[LabelledImage]:
    """The images of labelme's files and their objects.

    Args:
        files: JSON files; those that are not labelme's are skipped.
        folder: the folder that holds the images, directly or in subfolders.
        report: called with what is wrong with each file that is left out.
    """
    contents = []
    for file in files:
        try:
            content = read_json(str(file))
            if is_labelme(content):
                contents.append((file, content))
        except ValueError as error:
            report(str(error).rstrip("."))
    places = find_images([_image_name(content, file, folder) for file, content in contents], folder)
    stems = find_images([_with_suffix(file, folder) for file, _ in contents], folder)
    for (file, content), place, beside in zip(contents, places, stems, strict=True):
        try:
            yield _image(content, place.path or beside.path)
        except ValueError as error:
            report(f"{file} {error}")


def _image_name(content: dict[str, Any], file: Path, folder: Path) -> str:
    """The path of the image relative to `folder`; the JSON has it relative to its own file."""
    name = str(content.get("imagePath") or "").replace("\\", "/")
    return os.path.normpath(os.path.relpath(file.parent / name, folder)) if name else "\0"


def _with_suffix(file: Path, folder: Path) -> str:
    """The image beside the JSON file with the same stem, for an `imagePath` that leads nowhere."""
    beside = sorted(f for f in file.parent.glob(f"{_escaped(file.stem)}.*") if f != file)
    return os.path.relpath(beside[0], folder) if beside else "\0"


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "[*?" else c for c in text)


def _image(content: dict[str, Any], path: str | None) -> LabelledImage:
    if path is None:
        inside = " (the JSON file itself holds it: labelme_export_json extracts it)"
        text = f"refers to the image {content.get('imagePath')!r}, which does not exist"
        raise ValueError(text + (inside if content.get("imageData") else ""))
    size = content.get("imageWidth"), content.get("imageHeight")
    width, height = checked_size(Path(path), *size)
    objects, lost = [], []
    groups: dict[tuple[str, Any], list[list[float]]] = {}
    for shape in content["shapes"]:
        name = str(shape.get("label") or "").strip() if isinstance(shape, dict) else ""
        kind = shape.get("shape_type") or "polygon" if name else ""
        found = _object(name, kind, shape.get("points")) if name else None
        if found is None:
            lost.append(f"holds a {kind or 'shape'} without a label or an area")
        elif found.polygons and kind == "polygon" and shape.get("group_id") is not None:
            groups.setdefault((name, shape["group_id"]), []).extend(found.polygons)
        else:
            objects.append(found)
    objects += [outline(name, parts) for (name, _), parts in groups.items()]
    return LabelledImage(Path(path), width, height, tuple(objects), lost=tuple(lost))


def _object(name: str, kind: str, points: Any) -> LabelledObject | None:
    points = [numbers(p, 2) for p in points] if isinstance(points, list) else []
    if len(points) < 2 or None in points:
        return None
    if kind == "circle":  # given by its centre and a point on its edge
        radius = math.dist(*points[:2])
        return ellipse(name, points[0], (radius, radius))
    x, y = zip(*points, strict=True)
    if kind in ("rectangle", "mask") and len(points) == 2:
        return LabelledObject(name, (x[0], y[0], x[1], y[1]))
    if kind in ("polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral"):
        return outline(name, [[v for point in points for v in point]])
    return None
