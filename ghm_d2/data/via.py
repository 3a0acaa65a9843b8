"""Files of the VGG Image Annotator (VIA) 1 and 2: a project, its annotations, or a CSV table."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError, shown

from .fields import number
from .image_files import find_images
from .labels import LabelledImage, LabelledObject, checked_size, ellipse, outline

_METADATA = "_via_img_metadata"
_USUAL = ("class", "label", "name", "category", "type", "object")  # usual names of the attribute
_NAMELESS = "object"

Rows = list[tuple[str, list[Any]]]  # file name and regions of each image


def is_via(content: Any) -> bool:
    """Whether the content of a JSON file was written by VIA."""
    return isinstance(content, dict) and (_METADATA in content or bool(_rows(content)))


def via_table(text: str) -> dict[str, Any] | None:
    """A CSV table of VIA in the form of its JSON; None for any other table."""
    lines = list(csv.reader(io.StringIO(text.lstrip("\ufeff"))))
    head = [word.lstrip("#").strip() for word in lines[0]] if lines else []
    columns = ("filename", "region_shape_attributes", "region_attributes")
    if not set(columns) <= set(head):
        return None
    found: dict[str, Any] = {}
    for line in (line for line in lines[1:] if len(line) == len(head)):
        row = dict(zip(head, line, strict=True))
        entry = found.setdefault(row["filename"], {"filename": row["filename"], "regions": []})
        shape, attributes = (_json(row[name]) for name in columns[1:])
        if shape != {}:
            entry["regions"].append({"shape_attributes": shape, "region_attributes": attributes})
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return None


def _rows(content: Mapping[str, Any]) -> Rows:
    table = content.get(_METADATA, content)
    rows = []
    for entry in table.values() if isinstance(table, dict) else ():
        if isinstance(entry, dict) and "filename" in entry and "regions" in entry:
            regions = entry["regions"]
            regions = list(regions.values()) if isinstance(regions, dict) else regions or []
            rows.append((str(entry["filename"]), regions))
    return rows


def read_via(
    content: Mapping[str, Any], file: Path, folder: Path, report: Callable[[str], None]
) -> Iterator[LabelledImage]:
    """The images of a file and their objects.

    Args:
        content: the parsed JSON of the file, or what :func:`via_table` returned.
        file: the file, named in messages.
        folder: the folder that holds the images, directly or in subfolders.
        report: called with what is wrong with each image that is left out.

    Raises:
        UserError: no attribute of the regions says what they are.
    """
    rows = _rows(content)
    attribute = _class_attribute(rows, file, report)
    for (name, regions), place in zip(
        rows, find_images([name for name, _ in rows], str(folder)), strict=True
    ):
        try:
            if place.path is None:
                raise ValueError(f"refers to the image {name!r}, which does not exist")
            width, height = checked_size(Path(place.path))
        except ValueError as error:
            report(f"{file} {error}")
            continue
        objects, lost = [], []
        for region in regions:
            found = _object(region, attribute)
            if isinstance(found, str):
                lost.append(found)
            else:
                objects.append(found)
        yield LabelledImage(Path(place.path), width, height, tuple(objects), lost=tuple(lost))


def _class_attribute(rows: Rows, file: Path, report: Callable[[str], None]) -> str | None:
    """The attribute that says what a region is; None if no region has attributes."""
    regions = [r for _, listed in rows for r in listed if isinstance(r, dict)]
    counts = Counter(
        key
        for region in regions
        if isinstance(attributes := region.get("region_attributes"), dict)
        for key in attributes
        if _text(attributes[key])
    )
    usual = [key for name in _USUAL for key in counts if key.strip().lower() == name]
    if not counts or usual or len(counts) == 1:
        return (usual or [*counts, None])[0]
    most = counts.most_common()
    if most[0][1] > most[1][1]:
        return most[0][0]
    raise UserError(
        f"{file}: several attributes of the regions could be their class "
        f"({shown(', '.join(counts), 100)}): rename the right one to {_USUAL[0]!r}."
    )


def _text(value: Any) -> str:
    """The value of an attribute as text; of check boxes, the first that is ticked."""
    if isinstance(value, dict):
        value = next((key for key, ticked in value.items() if ticked in (True, "true", 1)), "")
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _object(region: Any, attribute: str | None) -> LabelledObject | str:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    if not isinstance(shape, dict):
        return "holds a region without a shape"
    attributes = region.get("region_attributes") or {}
    name = _text(attributes.get(attribute)) if attribute else _NAMELESS
    if not name:
        return f"holds a {shape.get('name')} without the attribute {attribute!r}"
    return _shape(name, shape) or f"holds a {shape.get('name')}, which has no area"


def _shape(name: str, shape: dict[str, Any]) -> LabelledObject | None:
    def get(*keys: str) -> list[Any]:
        return [number(shape.get(key)) for key in keys]

    kind = shape.get("name")
    if kind == "rect":
        x, y, w, h = get("x", "y", "width", "height")
        known = None not in (x, y, w, h)
        return LabelledObject(name, (x, y, x + w, y + h)) if known else None
    if kind == "polygon":
        x, y = (shape.get(f"all_points_{axis}") for axis in "xy")
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            return None
        return outline(name, [[v for point in zip(x, y, strict=True) for v in point]])
    if kind == "circle":
        return ellipse(name, get("cx", "cy"), get("r", "r"))
    if kind == "ellipse":
        return ellipse(name, get("cx", "cy"), get("rx", "ry"), shape.get("theta"))
    return None
