"""What can be wrong with a data set, found one by one: for `--dataset` and ghm-d2 check-data.

Each generator yields every problem that it meets. Registration refuses the data at the first kind
that stops a training and logs how often it met those that training repairs; the tool lists all.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Findings", "KINDS", "Problem", "annotation_problems", "row_problems"]

STOPS, REPAIRED, NOTE = "stops", "repaired", "note"

# Detectron2 compares each box of an image with each anchor, at 24 bytes a pair (measured), and an
# image of 800 x 1333 has 200,000 anchors: 48 GB for the first number, 5 GB for the second.
MAX_BOXES, MANY_BOXES = 10_000, 1_000

# What each kind is, after the number of its entries, and what becomes of them.
KINDS: dict[str, tuple[str, str]] = {
    "table": (STOPS, "tables are missing or empty"),
    "entry": (STOPS, "entries are no objects or lack a field"),
    "value": (STOPS, "fields hold a value of another type or range"),
    "duplicate id": (STOPS, "ids occur more than once"),
    "unknown category": (STOPS, "annotations have a category_id that is not among the categories"),
    "bad box": (STOPS, "boxes are not four finite numbers"),
    "bad keypoints": (STOPS, "keypoints are not a list of finite numbers"),
    "ignore flag": (STOPS, 'annotations set "ignore", which Detectron2 does not know'),
    "crowded image": (STOPS, f"images have more than {MAX_BOXES} boxes"),
    "no usable annotation": (STOPS, "file without anything to train on"),
    "missing image": (STOPS, "image files do not exist"),
    "unreadable image": (STOPS, "image files cannot be opened or decoded"),
    "image size": (STOPS, "images have another size than the annotation file says"),
    "image depth": (STOPS, "images have more than 8 bits, which would be clipped at 255"),
    "stray annotation": (REPAIRED, "annotations belong to no listed image and are ignored"),
    "empty box": (
        REPAIRED,
        "boxes have no positive width and height: training drops them, evaluation counts them as "
        "objects",
    ),
    "box outside": (
        REPAIRED,
        "boxes lie outside their image: training drops them, evaluation counts them as objects",
    ),
    "box clipped": (
        REPAIRED,
        "boxes reach more than a pixel out of their image: training clips them",
    ),
    "invalid polygon": (
        REPAIRED,
        "annotations have no polygon of three points: Detectron2 drops them, boxes too",
    ),
    "image without annotation": (
        NOTE,
        "images have no annotation; training leaves them out unless "
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False",
    ),
    "many boxes": (
        NOTE,
        f"images have more than {MANY_BOXES} boxes: matching takes 5 GB for each thousand at "
        "800 x 1333 pixels",
    ),
    "converted image": (NOTE, "images are neither RGB nor gray and are converted when read"),
    "rotated image": (NOTE, "images are turned when read, as their EXIF orientation says"),
}

_FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one entry.

    Attributes:
        kind: a key of `KINDS`.
        text: the entry and what is wrong with it.
    """

    kind: str
    text: str

    @property
    def stops(self) -> bool:
        """Whether the data cannot be trained on."""
        return KINDS[self.kind][0] == STOPS


@dataclass
class Findings:
    """How often each kind was met, and the first examples of it."""

    examples_kept: int = 5
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, problems: Iterable[Problem]) -> "Findings":
        """Takes all problems in; returns itself."""
        for problem in problems:
            self.counts[problem.kind] += 1
            kept = self.examples.setdefault(problem.kind, [])
            if len(kept) < self.examples_kept:
                kept.append(problem.text)
        return self

    def kinds(self, severity: str) -> list[str]:
        """The kinds met of "stops", "repaired" or "note", in the order of `KINDS`."""
        return [kind for kind in KINDS if kind in self.counts and KINDS[kind][0] == severity]


def row_problems(content: dict[str, Any], *, labelled: bool) -> Iterator[Problem]:
    """Tables, entries, fields and ids; what the other generators rely on.

    Args:
        content: the annotation file.
        labelled: whether it must have annotations.
    """
    for table, fields in _FIELDS.items():
        rows = content.get(table)
        if table == "annotations" and not labelled:
            continue
        if not isinstance(rows, list) or not rows:
            yield Problem(
                "table", f'holds no {table}: its "{table}" must be a list that is not empty'
            )
            continue
        seen: set[Any] = set()
        for number, row in enumerate(rows):
            yield from _row(table, fields, number, row, seen)


def _row(
    table: str, fields: Sequence[str], number: int, row: Any, seen: set[Any]
) -> Iterator[Problem]:
    where = f"entry {number} of {table}"
    if not isinstance(row, dict):
        yield Problem("entry", f"{where} is not an object")
        return
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        yield Problem("entry", f'{where} has no "{missing[0]}"')
    for name in fields:
        value = row.get(name)
        if value is not None and (wanted := _wanted(name, value)):
            yield Problem("value", f'{where} has the "{name}" {value!r} instead of {wanted}')
    ident = row.get("id")
    if isinstance(ident, int | float | str):
        if ident in seen:
            yield Problem("duplicate id", f"the id {ident!r} occurs more than once in {table}")
        seen.add(ident)


def _wanted(name: str, value: Any) -> str:
    """What a field should hold where `value` is something else."""
    if name in ("height", "width"):
        good = isinstance(value, int | float) and math.isfinite(value) and value >= 1
        return "" if good and value == int(value) else "a whole number of pixels above 0"
    if name in ("file_name", "name"):
        return "" if isinstance(value, str) and value else "a text"
    if name == "bbox":
        return ""  # its numbers are looked at with the annotation
    good = isinstance(value, int | float | str) and not isinstance(value, bool)
    return "" if good else "a number or text"


def annotation_problems(content: dict[str, Any]) -> Iterator[Problem]:
    """Categories, boxes, images without boxes and with too many.

    Args:
        content: an annotation file in which :func:`row_problems` met nothing.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    annotations = content.get("annotations") or []
    boxes: Counter = Counter()
    usable = False
    for annotation in annotations:
        image = images.get(annotation["image_id"])
        boxes[annotation["image_id"]] += 1
        usable = usable or (image is not None and not annotation.get("iscrowd", 0))
        yield from _annotation(annotation, image, categories)
    for ident, number in boxes.items():
        if MANY_BOXES < number <= MAX_BOXES and ident in images:
            yield Problem("many boxes", f"{_image(images[ident])} has {number}")
        if number > MAX_BOXES and ident in images:
            yield Problem(
                "crowded image",
                f"{_image(images[ident])} has {number} boxes, more than {MAX_BOXES}, which "
                "matching with all anchors has no memory for: cut the image into tiles",
            )
    if "annotations" in content and not usable:
        yield Problem(
            "no usable annotation",
            "holds no annotation that is not a crowd region of a listed image",
        )
    if annotations:
        for ident, image in images.items():
            if ident not in boxes:
                yield Problem("image without annotation", _image(image))


def _annotation(
    annotation: dict[str, Any], image: dict[str, Any] | None, categories: set[Any]
) -> Iterator[Problem]:
    where, box = f"annotation {annotation['id']!r}", annotation["bbox"]
    if annotation["category_id"] not in categories:
        yield Problem(
            "unknown category",
            f"{where} has the category_id {annotation['category_id']!r}, which is not among the "
            "categories",
        )
    if annotation.get("ignore", 0):
        yield Problem(
            "ignore flag",
            f'{where} sets "ignore", which Detectron2 does not know: use "iscrowd"',
        )
    keypoints = annotation.get("keypoints")
    if keypoints and not (isinstance(keypoints, list) and all(map(_is_number, keypoints))):
        yield Problem("bad keypoints", f"{where} has keypoints that are no list of finite numbers")
    if not _is_box(box):
        yield Problem(
            "bad box", f"{where} has the bbox {box!r} instead of four finite numbers x, y, w, h"
        )
        return
    if image is None:
        yield Problem("stray annotation", f"{where} names the image {annotation['image_id']!r}")
        return
    where = f"{where} of {_image(image)} has the bbox {box!r}"
    x, y, w, h = box
    outside = max(-x, -y, x + w - image["width"], y + h - image["height"])
    if min(w, h) <= 0:
        yield Problem("empty box", where)
    elif min(x + w, y + h) <= 0 or x >= image["width"] or y >= image["height"]:
        yield Problem("box outside", f"{where} in {image['width']} x {image['height']} pixels")
    elif outside > 1:
        yield Problem("box clipped", f"{where} in {image['width']} x {image['height']} pixels")
    polygons = annotation.get("segmentation")
    if isinstance(polygons, list) and polygons and not any(map(_is_polygon, polygons)):
        yield Problem("invalid polygon", where)


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0


def _image(image: dict[str, Any]) -> str:
    return f"image {image['id']!r} ({image['file_name']})"
