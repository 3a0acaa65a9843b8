"""Label Studio's JSON, whole or "JSON-MIN": shapes in per cent of the image."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .fields import number, numbers
from .image_files import find_images
from .labels import LabelledImage, LabelledObject, checked_size, ellipse, outline, rectangle

_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what an upload puts before the name
_IMAGE = re.compile(r"\.(jpe?g|png|bmp|gif|tiff?|webp)\b", re.IGNORECASE)


def is_label_studio(content: Any) -> bool:
    """Whether a JSON file is one of Label Studio's."""
    rows = content if isinstance(content, list) else [content]
    return bool(rows) and all(isinstance(r, dict) for r in rows) and any(map(_is_task, rows))


def _is_task(row: dict[str, Any]) -> bool:
    if isinstance(row.get("data"), dict):
        return isinstance(row.get("annotations", row.get("completions")), list)
    return "annotation_id" in row or "annotator" in row or bool(_image_name(row) and _minimal(row))


def read_label_studio(
    content: Any, file: Path, folder: Path, report: Callable[[str], None]
) -> Iterator[LabelledImage]:
    """The images of a file and their objects; only the latest annotation of an image counts.

    Args:
        content: the parsed JSON of the file.
        file: the file, named in messages.
        folder: the folder that holds the images, directly or in subfolders.
        report: called with what is wrong with each image that is left out.
    """
    tasks = [(name, row) for row in _list(content) if (name := _image_name(row))]
    names = [name for name, _ in tasks]
    places = find_images(names, str(folder))
    short = find_images([_UPLOADED.sub("", Path(name).name) for name in names], str(folder))
    for (name, row), place, other in zip(tasks, places, short, strict=True):
        path = place.path or other.path
        try:
            results = _results(row)
            if path is None:
                raise ValueError(f"refers to the image {name!r}, which does not exist")
            if results is None:
                raise ValueError(f"has no finished annotation of {name}")
            yield _image(Path(path), results)
        except ValueError as error:
            report(f"{file} {error}")


def _list(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [content]


def _image_name(row: dict[str, Any]) -> str:
    """The path of the image in a task, without the server or storage that its URL names."""
    data = row["data"] if isinstance(row.get("data"), dict) else row
    texts = [v for v in data.values() if isinstance(v, str) and _IMAGE.search(v)]
    if not texts:
        return ""
    address = urlsplit(texts[0].replace("\\", "/"))
    local = parse_qs(address.query).get("d")  # /data/local-files/?d=folder/image.jpg
    return (local[0] if local else address.path).lstrip("/")


def _results(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The shapes of the latest annotation that was not cancelled; None if there is none."""
    if not isinstance(row.get("data"), dict):
        return _minimal(row)
    made = row.get("annotations", row.get("completions"))
    made = [a for a in made if isinstance(a, dict) and not a.get("was_cancelled")]
    if not made:
        return None
    last = max(made, key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""))
    return [r for r in last.get("result") or [] if isinstance(r, dict)]


def _minimal(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes of a JSON-MIN row, whatever their key is, in the form of the full format."""
    lists = [v for v in row.values() if isinstance(v, list)]
    shapes = [s for v in lists for s in v if isinstance(s, dict) and ("x" in s or "points" in s)]
    return [{"value": s, **s} for s in shapes]


def _image(path: Path, results: Sequence[dict[str, Any]]) -> LabelledImage:
    written = [(r.get("original_width"), r.get("original_height")) for r in results]
    turned = any(number(r.get("image_rotation")) for r in results)
    width, height = checked_size(path, *(written[0] if written and not turned else ()))
    if turned:
        raise ValueError(f"rotates {path.name}: rotate the image file itself")
    objects, lost = [], []
    # A shape and its label may be two results with the same id.
    for parts in _by_id(results):
        value = {k: v for part in parts for k, v in (part.get("value") or {}).items()}
        if not ("x" in value or "points" in value or "rle" in value or "format" in value):
            continue  # a choice or a text about the whole image
        names = [v for k, v in value.items() if k.endswith("labels") and isinstance(v, list) and v]
        found = _object(str(names[0][0]).strip(), value, width, height) if names else None
        if found is None:
            kind = next((k for k in value if k.endswith("labels")), "shape")
            lost.append(f"holds a {kind} result without a label or an area")
        else:
            objects.append(found)
    return LabelledImage(path, width, height, tuple(objects), lost=tuple(lost))


def _by_id(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for place, result in enumerate(results):
        groups.setdefault(result.get("id") or place, []).append(result)
    return list(groups.values())


def _object(name: str, value: dict[str, Any], width: int, height: int) -> LabelledObject | None:
    def pixels(*keys: str) -> list[float] | None:
        found = numbers([value.get(key) for key in keys], len(keys))
        sides = (width, height) * len(keys)
        return found and [v * side / 100 for v, side in zip(found, sides, strict=False)]

    if isinstance(value.get("points"), list):
        points = [p for p in value["points"] if numbers(p, 2)]
        if len(points) < len(value["points"]):
            return None
        return outline(name, [[v for x, y in points for v in (x * width / 100, y * height / 100)]])
    if radii := pixels("radiusX", "radiusY"):
        centre = pixels("x", "y")
        turn = math.radians(number(value.get("rotation")) or 0)
        return centre and ellipse(name, centre, radii, turn)
    if (box := pixels("x", "y", "width", "height")) and box[2] > 0 and box[3] > 0:
        x, y, w, h = box
        return rectangle(name, (x, y, x + w, y + h), value.get("rotation"), centred=False)
    return None
